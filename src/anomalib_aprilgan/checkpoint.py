"""What a checkpoint holds beside tensors, and whether a model can take it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from anomalib.utils.serialization import anomalib_safe_globals
from torch import Tensor, nn

from .building import build_scorer
from .checks import check_entries
from .classes import Classes
from .clip.prompts import PromptEnsemble
from .decision.fusion import ScoreFusion
from .decision.post_processing import AprilGANPostProcessor
from .files import check_no_bomb, damaged, is_file, write_atomically
from .migration import CHECKPOINT_KEY, FEW_SHOT, FORMAT, migrate
from .network.memory_bank import VisionMemoryBank
from .network.model import AprilGANModel
from .network.roi import RegionsOfInterest
from .preparation.workplace import Made
from .provenance import Provenance, check_shapes
from .recipe import HELD, RowRecipes
from .remembering import Remembering
from .settings import Settings

_BACKBONE, _TOWER = "model._backbone.", "model.few_shot.tower."
# What checkpoints were made with that do not say it.
_EARLIER_SETTINGS = {
    "tile_size": None,
    "smoothing_sigma": 0.0,
    "neighbourhood": 1,
    "top_share": 0.0,
    "few_shot": "memory_bank",
    "score_fusion": "mean",
    "temperature": 100.0,
    "memory_backbone": None,
    "memory_image_size": None,
    **Remembering().settled,
}
# What memory banks and the bounds of the fused score rest on, and nothing else.
_OF_REFERENCES = {
    "neighbourhood", "top_share", "few_shot", "score_fusion", "memory_backbone", "memory_image_size",
    *Remembering().settled,
}  # fmt: skip
# What the entries of a checkpoint are, and of one of its rows.
_ENTRIES: dict[str, Any] = {
    "format": int,
    "classes": [[str]],
    "rows": [dict],
    "clip": (str, None),
    "memory_tower": (str, None),
    "settings": dict,
    "prompts": dict,
    "provenance": dict,
    "has_trained": bool,
}
_RECIPE = ({str: {str: str}}, None)
_ENTRIES_OF_ROW: dict[str, Any] = {
    **dict.fromkeys(("text", "bank", "bounds", "calibration"), _RECIPE),
    "asked": str,
    "references": [str],
}
_LATER_ENTRIES_OF_ROW: dict[str, Any] = {"contents": [str], "accepted": [dict], "roi": _RECIPE, "asked_roi": str}
_ENTRIES_OF_ACCEPTANCE: dict[str, Any] = {
    "when": str,
    "files": [str],
    "contents": [str],
    "parts": int,
    "values": {str: [float]},
    "recipes": {str: _RECIPE},
}
_REMEMBERED = "model.few_shot.remembered.{}."
_ROI = "model.roi.of_class.{}."


def write(checkpoint: dict[str, Any], settings: Settings, made: Made, network: AprilGANModel) -> None:
    """Complete a checkpoint with what a model needs beside the tensors, and leave the frozen CLIP out of them."""
    tensors = checkpoint["state_dict"].items()
    # Images under inspection, with which others of their run were compared, are none that a later run could use.
    left_out = (_BACKBONE, _TOWER, *([FEW_SHOT] if settings.remembering.batch_zero_shot else []))
    checkpoint["state_dict"] = {name: value for name, value in tensors if not name.startswith(left_out)}
    checkpoint[CHECKPOINT_KEY] = {
        "format": FORMAT,
        "classes": [list(pair) for pair in zip(made.classes.names, made.classes.words, strict=True)],
        "rows": [recipes.to_dict() for recipes in made.rows],
        "clip": network.backbone.digest if network.has_backbone else made.clip,
        "memory_tower": made.memory_tower,
        "settings": _settings_of(settings, few_shot=network.few_shot is not None),
        "prompts": settings.prompts.to_dict(),
        "provenance": made.provenance.to_dict(),
        "has_trained": made.has_trained or settings.adapters is not None,
    }
    parameters = checkpoint["hyper_parameters"]
    if isinstance(parameters.get("prompts"), str):  # a file that may be gone when the checkpoint is loaded
        parameters["prompts"] = settings.prompts.to_dict()


def rewrite(path: Path, target: Path, model: nn.Module, settings: Settings, made: Made) -> None:
    """Write a checkpoint again, with what a model that was loaded from it holds now; whole or not at all."""
    with anomalib_safe_globals():
        content = torch.load(path, map_location="cpu", weights_only=True)
    migrate(content)
    content["state_dict"] = {name: value.cpu() for name, value in model.state_dict().items()}
    network = model.get_submodule("model")
    if isinstance(network, AprilGANModel):
        write(content, settings, made, network)
    write_atomically(target, partial(torch.save, content))


def check_file(path: str | Path) -> None:
    """Raise an error that names a local file unless it can be read as a checkpoint; its pickle runs no code.

    A missing file is a FileNotFoundError; one that is damaged or something else is a ValueError.
    """
    if "://" in str(path):
        return
    file = Path(path).expanduser()
    if not is_file(file):
        msg = f"`ckpt_path`: no checkpoint file {file}."
        raise FileNotFoundError(msg)
    try:
        check_no_bomb(file)
        with anomalib_safe_globals():
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers meet a damaged file with a dozen kinds of exceptions
        told = damaged("ckpt_path", file, " as a checkpoint: is it complete?", error)
        raise told from error
    if not (isinstance(content, dict) and {"state_dict", "pytorch-lightning_version"} <= set(content)):
        msg = f"`ckpt_path`: {file} is not a checkpoint of a trainer. To load weights alone, pass them as `adapters`."
        raise ValueError(msg)


def check(checkpoint: MutableMapping[str, Any], settings: Settings, network: AprilGANModel) -> None:
    """Raise a ValueError if a checkpoint is of another model, CLIP, other settings or adapters.

    The model is left alone. A checkpoint of 0.1.0 is brought into today's form, in place.
    """
    migrate(checkpoint)
    content, state_dict = checkpoint[CHECKPOINT_KEY], checkpoint["state_dict"]
    _check_content(content, state_dict, network)
    recorded = content["clip"]
    if network.has_backbone and recorded is not None and not network.backbone.matches(recorded):
        msg = (
            f"`pretrained`: the checkpoint belongs to a CLIP with weights {recorded}, "
            f"the model has weights {network.backbone.digest}."
        )
        raise ValueError(msg)
    few_shot = has_references(state_dict)
    given = _EARLIER_SETTINGS | content["settings"]
    for name, ours in _settings_of(settings, few_shot=few_shot).items():
        if given.get(name) != ours and (few_shot or name not in _OF_REFERENCES):
            msg = f"`{name}` of the checkpoint is {given.get(name)}, of the model {ours}. Use the same value for both."
            raise ValueError(msg)
    prefix = "model.adapters."
    adapters = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    check_shapes(adapters, network.adapters.state_dict(), "the checkpoint")


def _check_content(content: Mapping[str, Any], tensors: Mapping[str, Any], network: AprilGANModel) -> None:
    """Raise a ValueError that names what does not fit together, or is not a number."""
    check_entries("ckpt_path", content, _ENTRIES)
    for entry in content["rows"]:
        check_entries("ckpt_path", entry, _ENTRIES_OF_ROW)
        later = {name: entry[name] for name in _LATER_ENTRIES_OF_ROW if name in entry}
        check_entries("ckpt_path", later, {name: _LATER_ENTRIES_OF_ROW[name] for name in later})
        _check_history(entry.get("accepted", []))
    wrong = [name for name, value in tensors.items() if not isinstance(value, Tensor) or not value.isfinite().all()]
    if wrong:
        msg = f"`ckpt_path` must hold finite tensors, got others, NaN or infinity in {', '.join(wrong[:5])}."
        raise ValueError(msg)
    number, width = len(content["classes"]), network.adapters.fc[0].out_features
    per_class = [name for name in tensors if name.startswith(("post_processor.", "own_fusion."))]
    found = {name: len(tensors[name]) if tensors[name].ndim else None for name in per_class}
    features = tensors.get("model.text_features")
    expected = (number, width, 2)
    if features is None or (number and tuple(features.shape) != expected):
        shape = None if features is None else tuple(features.shape)
        msg = f"`ckpt_path`: model.text_features must be {expected} for the classes of the checkpoint, got {shape}."
        raise ValueError(msg)
    unlike = [name for name, length in found.items() if length != max(number, 1)]
    if unlike or len(content["rows"]) != number or any(len(pair) != 2 for pair in content["classes"]):
        msg = f"`ckpt_path` must hold a row for each of {number} classes; {', '.join(unlike[:5]) or 'rows'} has others."
        raise ValueError(msg)


def _check_history(accepted: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ValueError unless accepted parts are told in the way that ``anomalib_aprilgan.growing`` does it."""
    for acceptance in accepted:
        check_entries("ckpt_path", acceptance, _ENTRIES_OF_ACCEPTANCE)
        values, recipes = acceptance["values"], acceptance["recipes"]
        wrong = [name for name, numbers in values.items() if not torch.tensor(numbers).isfinite().all()]
        wrong += [name for name in values if name not in HELD] + [*({*recipes} - {"bounds", "calibration"})]
        wrong += [
            name for name, numbers in values.items() if len(numbers) != 1 and name not in {"scores", "appearances"}
        ]
        if wrong or acceptance["parts"] < 1:
            msg = f"`ckpt_path`: the history of accepted parts is damaged: {', '.join(wrong[:5]) or 'parts'}."
            raise ValueError(msg)


def restore(
    checkpoint: Mapping[str, Any],
    settings: Settings,
    network: AprilGANModel,
    own_fusion: ScoreFusion,
    post_processor: nn.Module | None,
    pre_processor: nn.Module | None,
) -> tuple[Settings, Made]:
    """Make room for a checkpoint's tensors, and tell what they are and what they were made from.

    Where the user gave no prompts, the checkpoint's hold on. Its tensors are completed by those of the network's CLIP.
    """
    content, state_dict = checkpoint[CHECKPOINT_KEY], checkpoint["state_dict"]
    words = dict(content["classes"])
    classes = Classes.of(words, settings.default_class if settings.default_class in words else None)
    if network.few_shot is None and has_references(state_dict):
        network.few_shot = build_scorer(settings, pre_processor)
    none = [None] * len(classes)
    network.set_rows(torch.empty_like(state_dict["model.text_features"]), none)
    if network.few_shot is not None:
        for row in range(len(classes)):
            prefix = _REMEMBERED.format(row)
            state_dict.setdefault(f"{prefix}features", torch.empty(0))
            tensors = {
                name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)
            }
            network.few_shot.make_room(row, tensors)
    network.roi = _room_for_roi(state_dict, settings, len(classes))
    own_fusion.set_rows(none, network.map_limit)
    for name, value in own_fusion.state_dict().items():
        state_dict.setdefault(f"own_fusion.{name}", value)
    if isinstance(post_processor, AprilGANPostProcessor):
        post_processor.make_room(classes, network.map_limit, network.map_ceiling)
    frozen: dict[str, nn.Module] = {_BACKBONE: network.backbone} if network.has_backbone else {}
    if isinstance(network.few_shot, VisionMemoryBank) and network.few_shot.tower is not None:
        frozen[_TOWER] = network.few_shot.tower
    for prefix, tower in frozen.items():
        state_dict.update({f"{prefix}{name}": value for name, value in tower.state_dict().items()})
    if settings.prompts == PromptEnsemble():
        settings = replace(settings, prompts=PromptEnsemble.of(content["prompts"]))
    return settings, Made(
        classes=classes,
        rows=[RowRecipes.from_dict(recipes) for recipes in content["rows"]],
        provenance=Provenance.from_dict(content["provenance"]),
        has_trained=content["has_trained"],
        clip=content["clip"],
        memory_tower=content["memory_tower"],
    )


def _room_for_roi(tensors: Mapping[str, Tensor], settings: Settings, number: int) -> RegionsOfInterest | None:
    """Room for the regions of interest of a checkpoint; a ValueError where they cannot be such."""
    if not any(name.startswith(_ROI.partition("{")[0]) for name in tensors):
        return None
    roi, size = RegionsOfInterest(number), tuple(settings.architecture.image_size)
    for row in range(number):
        prefix = _ROI.format(row)
        one = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        inside, frame = (one.get(name, torch.empty(0)) for name in ("inside", "frame"))
        expected = tuple(frame.tolist()) if settings.tile_size is not None else size
        if inside.dtype != torch.bool or len(frame) != 2 or (inside.numel() and tuple(inside.shape) != expected):
            msg = f"`ckpt_path`: the region of interest of class {row} must be a mask of {expected}, the rows of a map."
            raise ValueError(msg)
        roi.make_room(row, one)
    return roi


def has_references(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint's tensors hold what a few-shot scorer remembers."""
    return any(name.startswith(FEW_SHOT) for name in state_dict)


def _settings_of(settings: Settings, *, few_shot: bool) -> dict[str, Any]:
    """What a checkpoint's tensors rest on: other settings would give other numbers without a word."""
    return {
        "memory_backbone": None if settings.memory_tower is None else settings.memory_tower.name,
        "memory_image_size": None if settings.memory_tower is None else list(settings.memory_tower.image_size),
        "stages": list(settings.stages),
        "memory_stages": list(settings.memory_stages),
        "quick_gelu": settings.architecture.quick_gelu,
        "image_size": list(settings.architecture.image_size),
        **{name: getattr(settings, name) for name in _EARLIER_SETTINGS if hasattr(settings, name)},
        **settings.remembering.settled,
        "tile_size": settings.tile_size if few_shot else None,  # banks remember tiles
    }
