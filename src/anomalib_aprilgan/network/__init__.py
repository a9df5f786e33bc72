"""The network: from images to raw predictions."""

from .few_shot import ScorerBuilder
from .memory_bank import MemoryBank

# From a CLIP, the stages to remember and the neighbourhood to a scorer, by the name that `few_shot` takes.
SCORERS: dict[str, ScorerBuilder] = {"memory_bank": MemoryBank}
