"""What a checkpoint holds beside tensors, whether a model can take it, and how those of 0.1.0 are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from anomalib.utils.serialization import anomalib_safe_globals
from torch import Tensor, nn

from .building import build_scorer
from .checks import check_entries
from .classes import Classes
from .clip.prompts import PromptEnsemble
from .data.references import content_digests
from .decision.fusion import ScoreFusion
from .decision.post_processing import AprilGANPostProcessor
from .files import check_no_bomb, damaged, is_file
from .network.model import AprilGANModel
from .preparation.workplace import Made
from .provenance import Provenance, check_shapes
from .recipe import Recipe, RowRecipes
from .settings import Settings

CHECKPOINT_KEY = "anomalib_aprilgan"
_BACKBONE = "model._backbone."
_FORMAT = 2
# What checkpoints were made with that do not say it.
_EARLIER_SETTINGS = {
    "tile_size": None,
    "smoothing_sigma": 0.0,
    "neighbourhood": 1,
    "top_share": 0.0,
    "few_shot": "memory_bank",
    "score_fusion": "mean",
}
# What memory banks and the bounds of the fused score rest on, and nothing else.
_OF_REFERENCES = {"neighbourhood", "top_share", "few_shot", "score_fusion"}
# What the entries of a checkpoint are, and of one of its rows.
_ENTRIES: dict[str, Any] = {
    "format": int,
    "classes": [[str]],
    "rows": [dict],
    "clip": (str, None),
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
# Names of tensors in 0.1.0 and now.
_RENAMED = {
    r"model\.memory_banks\.(\d+)\.tokens": r"model.few_shot.remembered.\1.features",
    r"post_processor\.map_maximum_min": "post_processor.fusion.low",
    r"post_processor\.map_maximum_max": "post_processor.fusion.high",
    r"post_processor\.calibrated": "post_processor.fixed",
}
_FEW_SHOT = "model.few_shot."
_FEATURES = "model.few_shot.remembered.{}.features"


def write(checkpoint: dict[str, Any], settings: Settings, made: Made, network: AprilGANModel) -> None:
    """Complete a checkpoint with what a model needs beside the tensors, and leave the frozen CLIP out of them."""
    tensors = checkpoint["state_dict"].items()
    checkpoint["state_dict"] = {name: value for name, value in tensors if not name.startswith(_BACKBONE)}
    checkpoint[CHECKPOINT_KEY] = {
        "format": _FORMAT,
        "classes": [list(pair) for pair in zip(made.classes.names, made.classes.words, strict=True)],
        "rows": [recipes.to_dict() for recipes in made.rows],
        "clip": network.backbone.digest if network.has_backbone else made.clip,
        "settings": _settings_of(settings, few_shot=network.few_shot is not None),
        "prompts": settings.prompts.to_dict(),
        "provenance": made.provenance.to_dict(),
        "has_trained": made.has_trained or settings.adapters is not None,
    }
    parameters = checkpoint["hyper_parameters"]
    if isinstance(parameters.get("prompts"), str):  # a file that may be gone when the checkpoint is loaded
        parameters["prompts"] = settings.prompts.to_dict()


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


def migrate(checkpoint: MutableMapping[str, Any]) -> None:
    """Bring a checkpoint of 0.1.0 into today's form, in place; a ValueError for one of another model or version."""
    content = checkpoint.get(CHECKPOINT_KEY)
    if content is None:
        msg = "`ckpt_path` must be a checkpoint that AprilGAN wrote; this one holds nothing of it."
        raise ValueError(msg)
    check_entries("ckpt_path", content, {"format": int} if "format" in content else {})
    if content.get("format", 1) > _FORMAT:
        found = content["format"]
        msg = f"`ckpt_path`: the checkpoint has format {found}, this version reads up to {_FORMAT}. Update the package."
        raise ValueError(msg)
    if "format" not in content:
        try:
            checkpoint["state_dict"] = _migrated_tensors(checkpoint["state_dict"], len(content["class_names"]))
            checkpoint[CHECKPOINT_KEY] = _migrated_content(content)
        except (KeyError, TypeError, AttributeError) as error:
            msg = f"`ckpt_path`: the checkpoint is of 0.1.0 and damaged, or of something else ({error!r})."
            raise ValueError(msg) from error
        # Lightning keeps the post-processor's tensors a second time, under their old names.
        checkpoint.get("callbacks", {}).pop("AprilGANPostProcessor", None)


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


def restore(
    checkpoint: Mapping[str, Any],
    settings: Settings,
    network: AprilGANModel,
    own_fusion: ScoreFusion,
    post_processor: nn.Module | None,
) -> tuple[Settings, Made]:
    """Make room for a checkpoint's tensors, and tell what they are and what they were made from.

    Where the user gave no prompts, the checkpoint's hold on. Its tensors are completed by those of the network's CLIP.
    """
    content, state_dict = checkpoint[CHECKPOINT_KEY], checkpoint["state_dict"]
    words = dict(content["classes"])
    classes = Classes.of(words, settings.default_class if settings.default_class in words else None)
    if network.few_shot is None and has_references(state_dict):
        network.few_shot = build_scorer(settings)
    none = [None] * len(classes)
    network.set_rows(torch.empty_like(state_dict["model.text_features"]), none)
    if network.few_shot is not None:
        for row in range(len(classes)):
            features = state_dict.setdefault(_FEATURES.format(row), torch.empty(0))
            network.few_shot.check_features(features)
            network.few_shot.set_features(row, torch.empty_like(features))
    own_fusion.set_rows(none, network.map_limit)
    for name, value in own_fusion.state_dict().items():
        state_dict.setdefault(f"own_fusion.{name}", value)
    if isinstance(post_processor, AprilGANPostProcessor):
        post_processor.make_room(classes, network.map_limit, network.map_ceiling)
    if network.has_backbone:
        backbone = network.backbone.state_dict()
        state_dict.update({f"{_BACKBONE}{name}": value for name, value in backbone.items()})
    if settings.prompts == PromptEnsemble():
        settings = replace(settings, prompts=PromptEnsemble.of(content["prompts"]))
    return settings, Made(
        classes=classes,
        rows=[RowRecipes.from_dict(recipes) for recipes in content["rows"]],
        provenance=Provenance.from_dict(content["provenance"]),
        has_trained=content["has_trained"],
        clip=content["clip"],
    )


def has_references(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint's tensors hold what a few-shot scorer remembers."""
    return any(name.startswith(_FEW_SHOT) for name in state_dict)


def _settings_of(settings: Settings, *, few_shot: bool) -> dict[str, Any]:
    """What a checkpoint's tensors rest on: other settings would give other numbers without a word."""
    return {
        "stages": list(settings.stages),
        "memory_stages": list(settings.memory_stages),
        "quick_gelu": settings.architecture.quick_gelu,
        "image_size": list(settings.architecture.image_size),
        **{name: getattr(settings, name) for name in _EARLIER_SETTINGS},
        "tile_size": settings.tile_size if few_shot else None,  # banks remember tiles
    }


def _migrated_tensors(state_dict: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    one, several, tensors = "post_processor.", "post_processor.by_class.", {}
    for name, value in state_dict.items():
        if name.startswith(f"{several}0."):
            parts = [state_dict[name.replace(f"{several}0.", f"{several}{row}.")] for row in range(number)]
            tensors[_renamed(name.replace(f"{several}0.", one))] = torch.stack(parts)
        elif name.startswith(one) and not name.startswith(several):
            tensors.setdefault(_renamed(name), value.reshape(1))
        elif not name.startswith(one):
            tensors[_renamed(name)] = value
    filled = any(value.numel() for name, value in tensors.items() if name.startswith(_FEW_SHOT))
    return {name: value for name, value in tensors.items() if filled or not name.startswith(_FEW_SHOT)}


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        name = re.sub(f"^{old}$", new, name)
    return name


def _migrated_content(content: Mapping[str, Any]) -> dict[str, Any]:
    """The recipes know what 0.1.0 recorded; what they do not know does not count when they are compared."""
    lists = dict(content["prompts"])
    for own in lists.get("classes", {}).values():
        own.pop("classes", None)  # 0.1.0 wrote empty ones
    prompts = PromptEnsemble.of(lists)
    rows = []
    for name, words in content["class_names"].items():
        normal, anomalous = prompts.of_class(name).sentences(words)
        recipes = RowRecipes(text=Recipe.of(normal=normal, anomalous=anomalous), bounds=Recipe({}))
        paths = [Path(path) for path in content["references"].get(name, [])]
        if paths:
            known = content_digests(paths) if all(path.is_file() for path in paths) else ["unknown"]
            recipes.bank = Recipe.of(references=known, number=len(paths))
            recipes.references = [str(path) for path in paths]
            recipes.asked = " ".join(content["reference_keys"].get(name, []))
        if name in content.get("calibration", {}):
            recipes.calibration = Recipe({})
        rows.append(recipes.to_dict())
    return {
        "format": _FORMAT,
        "classes": [list(pair) for pair in content["class_names"].items()],
        "rows": rows,
        "clip": content["fingerprint"],
        "settings": content["clip"],
        "prompts": prompts.to_dict(),
        "provenance": content["provenance"],
        "has_trained": True,
    }
