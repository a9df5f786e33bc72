"""The small CLIP that comes with this package, and adapters for it: for trying things out, offline and fast.

It was trained on captioned drawings (``anomalib_aprilgan.demo.drawn_clip``) and knows nothing else:
a demonstration model, no substitute for CLIP.
"""

from pathlib import Path

from ...clip.architecture import BuiltInClip

_FOLDER = Path(__file__).parent

# What `backbone`, `pretrained`, `image_size`, `stages` and `memory_stages` are for it.
ARCHITECTURE = "ViT-drawn-96"
PRETRAINED = "drawn"
IMAGE_SIZE = 96
STAGES = (4,)
MEMORY_STAGES = (2, 3)

CONFIG = _FOLDER / f"{ARCHITECTURE}.json"
WEIGHTS = _FOLDER / f"{ARCHITECTURE}.safetensors"
ADAPTERS = _FOLDER / "adapters.safetensors"

HINT = (
    f"To try things out on drawn images there is a small CLIP in this package: `backbone={ARCHITECTURE!r}`, "
    f"`pretrained={PRETRAINED!r}`, `image_size={IMAGE_SIZE}`, `stages={STAGES}`, `memory_stages={MEMORY_STAGES}`, or "
    "`anomalib-aprilgan quickstart`."
)

CLIP = BuiltInClip(ARCHITECTURE, PRETRAINED, CONFIG, WEIGHTS, ADAPTERS, HINT)
