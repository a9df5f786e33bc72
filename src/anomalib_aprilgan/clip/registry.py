"""CLIPs that come as files of a package and are chosen by name, as open_clip's are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BuiltInClip:
    """A CLIP whose configuration, weights and adapters are files of a package.

    Args:
        architecture: What `backbone` is for it.
        pretrained: What `pretrained` is for it.
        config: open_clip's model configuration (JSON).
        weights: Weights in open_clip's layout.
        adapters: Adapters that ``adapters="auto"`` means for it.
        hint: Sentence that offers it where another CLIP's weights cannot be had.
    """

    architecture: str
    pretrained: str
    config: Path
    weights: Path
    adapters: Path
    hint: str = ""


# By name of the architecture; filled when the package is imported.
BUILT_IN_CLIPS: dict[str, BuiltInClip] = {}


def register_clip(clip: BuiltInClip) -> None:
    """Make a CLIP known by the name of its architecture. Harmless when repeated."""
    BUILT_IN_CLIPS[clip.architecture] = clip
