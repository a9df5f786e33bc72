"""Adapter files and where adapters come from: our safetensors with provenance, the authors' ``.pth`` files without."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .checks import check_entries, shown
from .clip.architecture import BUILT_IN_CLIPS, ClipArchitecture
from .clip.backbone import ClipBackbone
from .clip.hub import SCHEME, find_adapters, is_on_hub
from .clip.state_dict import read_state_dict
from .clip.weights import AUTHORS_ADAPTERS, authors_adapters
from .files import is_file, sha256, write_atomically

# The mapping in the authors' files (train.py).
AUTHORS_KEY = "trainable_linearlayer"
METADATA_KEY = "anomalib_aprilgan"
# The CLIP that the authors' adapters were trained for; its name comes with and without QuickGELU.
AUTHORS_BACKBONES = ("ViT-L-14-336", "ViT-L-14-336-quickgelu")
AUTHORS_STAGES = (6, 12, 18, 24)

# What the entries of a provenance are.
_ENTRIES: dict[str, Any] = {
    "trained_on": {str: [str]},
    "backbone": (str, None),
    "fingerprint": (str, None),
    "stages": ([int], None),
    "quick_gelu": (bool, None),
    "image_size": ([int], None),
    "versions": {str: str},
    "source": (str, None),
    "sha256": (str, None),
}


@dataclass(frozen=True)
class Provenance:
    """What adapters were trained on and for; ``None`` or empty where that is not known.

    Attributes:
        trained_on: anomalib's data set names and the categories used; an empty list stands for all.
        fingerprint: Digest of CLIP's weights (``ClipBackbone.digest``; 0.1.0 hashed the projection alone).
        stages: Tapped blocks, counted from 1.
        image_size: Height and width in pixels.
        versions: Of packages, by their names.
        source: Where they were fetched on the Hugging Face hub: ``hf://owner/name@commit``.
        sha256: Digest of the file fetched there.
    """

    trained_on: dict[str, list[str]] = field(default_factory=dict)
    backbone: str | None = None
    fingerprint: str | None = None
    stages: list[int] | None = None
    quick_gelu: bool | None = None
    image_size: list[int] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    source: str | None = None
    sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Provenance:
        """From what ``to_dict`` returned; keys of later versions are left out. A ValueError names a wrong entry."""
        check_entries("provenance", content, {name: of_entry for name, of_entry in _ENTRIES.items() if name in content})
        return cls(**{key: content[key] for key in _ENTRIES if key in content})

    @classmethod
    def of_training(
        cls, datamodule: AnomalibDataModule | None, backbone: ClipBackbone, stages: tuple[int, ...]
    ) -> Provenance:
        """What adapters trained now, on this data and for this CLIP, shall tell later."""
        architecture = backbone.architecture
        return cls(
            trained_on=datasets_of(datamodule),
            backbone=architecture.name,
            fingerprint=backbone.digest,
            stages=list(stages),
            quick_gelu=architecture.quick_gelu,
            image_size=list(architecture.image_size),
            versions={name: version(name) for name in ("anomalib", "open_clip_torch", "torch")},
        )

    def with_earlier(self, trained_on: Mapping[str, list[str]]) -> Provenance:
        """The same, with the data of an earlier training added; a data set without categories stands for all of it."""
        merged = dict(self.trained_on)
        for dataset, categories in trained_on.items():
            ours = merged.get(dataset)
            merged[dataset] = [] if not categories or ours == [] else sorted({*(ours or []), *categories})
        return replace(self, trained_on=merged)

    def overlap(self, datamodule: AnomalibDataModule | None) -> str | None:
        """The data of a datamodule that the adapters were trained on, in words; ``None`` where there is none."""
        for dataset, categories in datasets_of(datamodule).items():
            if dataset in self.trained_on:
                seen = self.trained_on[dataset]
                common = [category for category in categories if category in seen] if seen else categories
                if common or not (seen and categories):
                    return f"{dataset} ({', '.join(common)})" if common else dataset
        return None

    def warn_of_seen(self, datamodule: AnomalibDataModule | None) -> None:
        """Warn, so that it cannot be missed, where the data under test trained the adapters."""
        seen = self.overlap(datamodule)
        if seen:
            rule = "!" * 100
            warnings.warn(
                f"\n{rule}\nNOT ZERO-SHOT: the adapters were trained on {seen}, which is the data under test. "
                f"The figures will be too good. Use adapters trained on other data, e.g. `adapters='auto'`.\n{rule}",
                stacklevel=2,
            )

    def check(self, backbone: ClipBackbone, stages: tuple[int, ...], source: str) -> None:
        """Raise a ValueError for adapters of another CLIP or other stages; warn of another activation."""
        architecture = backbone.architecture
        if self.stages is not None and tuple(self.stages) != stages:
            msg = f"`adapters`: {source} was trained for stages {tuple(self.stages)}, the model taps {stages}."
            raise ValueError(msg)
        if self.fingerprint is not None and not backbone.matches(self.fingerprint):
            msg = (
                f"`adapters`: {source} was trained for the CLIP {self.backbone} with weights {self.fingerprint}, "
                f"the model has {architecture.name} with weights {backbone.digest}."
            )
            raise ValueError(msg)
        if self.quick_gelu is not None and self.quick_gelu != architecture.quick_gelu:
            ours, theirs = (("GELU", "QuickGELU")[flag] for flag in (architecture.quick_gelu, self.quick_gelu))
            warnings.warn(
                f"`adapters`: {source} was trained with a CLIP that runs {theirs}, this runs {ours} (`quick_gelu`).",
                stacklevel=2,
            )


def load_adapters(path: Path) -> tuple[dict[str, Tensor], Provenance]:
    """Weights ``fc.<i>.weight`` ``(D, C)`` and ``fc.<i>.bias`` ``(D,)`` of an adapter file, and their provenance.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or holds no adapters.
    """
    state_dict = read_state_dict(path, "adapters", nested_under=AUTHORS_KEY)
    if not all(name.startswith("fc.") for name in state_dict):
        names = ", ".join(list(state_dict)[:3])
        msg = f"`adapters`: {path} holds no adapters: expected names fc.<i>.weight and fc.<i>.bias, got {names}."
        raise ValueError(msg)
    return state_dict, _read_provenance(path)


def save_adapters(path: Path, state_dict: Mapping[str, Tensor], provenance: Provenance) -> Path:
    """Write adapters and their provenance to a ``.safetensors`` file (a ValueError for another name)."""
    if path.suffix != ".safetensors":
        msg = f"`path` must end in .safetensors, got {path.name}."
        raise ValueError(msg)
    content = serialized(state_dict, provenance)
    write_atomically(path, lambda file: file.write(content))
    return path


def serialized(state_dict: Mapping[str, Tensor], provenance: Provenance) -> bytes:
    """Adapters and their provenance as the content of a ``.safetensors`` file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    return save(tensors, metadata={METADATA_KEY: json.dumps(provenance.to_dict())})


def resolve_adapters(adapters: str, datamodule: AnomalibDataModule | None, architecture: ClipArchitecture) -> str:
    """The source that ``adapters`` stands for: ``"mvtec"``, ``"visa"``, a path, or a commit of a hub's repository.

    ``"auto"`` chooses the authors' adapters that have not seen the data, and for a built-in CLIP the built-in ones. A
    repository on the hub is looked up, and its adapters fetched where they are missing.

    Raises:
        ValueError: The authors' adapters are asked for and the CLIP is another, or all of them have seen the data.
    """
    if is_on_hub(adapters):
        return find_adapters(adapters).source
    if adapters not in {"auto", *AUTHORS_ADAPTERS}:
        return adapters
    if adapters == "auto" and architecture.name in BUILT_IN_CLIPS:
        return str(BUILT_IN_CLIPS[architecture.name].adapters)
    if architecture.name not in AUTHORS_BACKBONES:
        msg = (
            f"`adapters={adapters!r}` were trained for the CLIP {AUTHORS_BACKBONES[0]}, the model has "
            f"{architecture.name}. Pass an adapter file for it, or None to train fresh ones."
        )
        raise ValueError(msg)
    if adapters != "auto":
        return adapters
    targets = datasets_of(datamodule)
    unseen = [name for name, source in AUTHORS_ADAPTERS.items() if source.trained_on not in targets]
    if not unseen:
        msg = (
            f"`adapters='auto'`: the authors' adapters were trained on {', '.join(targets)}. Pass one of them by name."
        )
        raise ValueError(msg)
    return unseen[0]


def adapter_path(source: str) -> Path:
    """File of what ``resolve_adapters`` returned; the authors' are fetched where they are missing."""
    if is_on_hub(source):
        return find_adapters(source).path
    return authors_adapters(source) if source in AUTHORS_ADAPTERS else Path(source).expanduser()


def digest_of_adapters(source: str) -> str:
    """SHA-256 of the file of what ``resolve_adapters`` returned; a FileNotFoundError where there is none."""
    path = adapter_path(source)
    if not is_file(path):
        known = ", ".join(["auto", *AUTHORS_ADAPTERS])
        msg = (
            f"`adapters`: no weight file {shown(str(path), 200)}. Pass an existing file, one of {known}, or "
            f"{SCHEME}owner/name of the Hugging Face hub."
        )
        raise FileNotFoundError(msg)
    return sha256(path)


def load_resolved_adapters(source: str) -> tuple[dict[str, Tensor], Provenance]:
    """Weights and provenance of what ``resolve_adapters`` returned; see ``load_adapters``."""
    path = adapter_path(source)
    state_dict, provenance = load_adapters(path)
    if is_on_hub(source):
        return state_dict, replace(provenance, source=source, sha256=sha256(path))
    if source not in AUTHORS_ADAPTERS:
        return state_dict, provenance
    known: dict[str, list[str]] = {AUTHORS_ADAPTERS[source].trained_on: []}
    return state_dict, replace(
        provenance, trained_on=known, backbone=AUTHORS_BACKBONES[0], stages=[*AUTHORS_STAGES], quick_gelu=False
    )


def check_shapes(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Raise a ValueError if adapters are of another width or for another number of stages."""
    found_stages, stages = (len({name.split(".")[1] for name in names}) for names in (state_dict, expected))
    if found_stages != stages:
        msg = f"`adapters`: {source} is for {found_stages} stages, the model taps {stages}."
        raise ValueError(msg)
    if set(state_dict) != set(expected):
        msg = f"`adapters`: {source} has {sorted(state_dict)}, the model needs {sorted(expected)}."
        raise ValueError(msg)
    for name, value in state_dict.items():
        if value.shape != expected[name].shape:
            msg = (
                f"`adapters`: {source} is for another CLIP: {name} is {tuple(value.shape)} (joint and vision width), "
                f"the model needs {tuple(expected[name].shape)}."
            )
            raise ValueError(msg)


def _read_provenance(path: Path) -> Provenance:
    if path.suffix != ".safetensors":
        return Provenance()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if METADATA_KEY not in metadata:
        return Provenance()
    try:
        content = json.loads(metadata[METADATA_KEY])
        check_entries("provenance", content, {})
        return Provenance.from_dict(content)
    except (ValueError, RecursionError) as error:
        msg = f"`adapters`: {path} has a damaged record of what they were trained on: {error}"
        raise ValueError(msg) from error


def datasets_of(datamodule: AnomalibDataModule | None) -> dict[str, list[str]]:
    """Names that anomalib gives to the data sets of a datamodule, and their categories."""
    if datamodule is None:
        return {}
    sources = getattr(datamodule, "sources", None)
    if sources is not None:
        return dict(sources)
    return {datamodule.name: [datamodule.category] if datamodule.category else []}
