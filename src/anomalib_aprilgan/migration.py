"""How checkpoints of earlier versions are brought into today's form."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import check_entries
from .clip.prompts import PromptEnsemble
from .data.references import content_digests
from .recipe import Recipe, RowRecipes

CHECKPOINT_KEY = "anomalib_aprilgan"
FORMAT = 3
FEW_SHOT = "model.few_shot."
# Names of tensors in 0.1.0 and now.
_RENAMED = {
    r"model\.memory_banks\.(\d+)\.tokens": r"model.few_shot.remembered.\1.features",
    r"post_processor\.map_maximum_min": "post_processor.fusion.low",
    r"post_processor\.map_maximum_max": "post_processor.fusion.high",
    r"post_processor\.calibrated": "post_processor.fixed",
}


def migrate(checkpoint: MutableMapping[str, Any]) -> None:
    """Bring an earlier checkpoint into today's form, in place; a ValueError for one of another model or version.

    Memory banks were ``(S, K, L, C)`` up to format 2, before stages could differ in width and grid.
    """
    content = checkpoint.get(CHECKPOINT_KEY)
    if content is None:
        msg = "`ckpt_path` must be a checkpoint that AprilGAN wrote; this one holds nothing of it."
        raise ValueError(msg)
    check_entries("ckpt_path", content, {"format": int} if "format" in content else {})
    if content.get("format", 1) > FORMAT:
        found = content["format"]
        msg = f"`ckpt_path`: the checkpoint has format {found}, this version reads up to {FORMAT}. Update the package."
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
    content = checkpoint[CHECKPOINT_KEY]
    if content["format"] < FORMAT:
        tensors = checkpoint["state_dict"] if _has_memory_bank(content) else {}
        for name, value in tensors.items():
            if name.startswith(FEW_SHOT) and isinstance(value, Tensor) and value.ndim == 4:
                tensors[name] = value.transpose(0, 1).flatten(1)
        content["format"] = FORMAT
        content["memory_tower"] = None


def _has_memory_bank(content: Mapping[str, Any]) -> bool:
    settings = content.get("settings")
    return isinstance(settings, Mapping) and settings.get("few_shot", "memory_bank") == "memory_bank"


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
    filled = any(value.numel() for name, value in tensors.items() if name.startswith(FEW_SHOT))
    return {name: value for name, value in tensors.items() if filled or not name.startswith(FEW_SHOT)}


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
        "format": 2,
        "classes": [list(pair) for pair in content["class_names"].items()],
        "rows": rows,
        "clip": content["fingerprint"],
        "settings": content["clip"],
        "prompts": prompts.to_dict(),
        "provenance": content["provenance"],
        "has_trained": True,
    }
