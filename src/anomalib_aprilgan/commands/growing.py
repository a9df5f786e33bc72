"""The subcommands ``accept`` and ``reject``: what the line has taught, from and to checkpoint files."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from itertools import count
from pathlib import Path

from ..checkpoint import rewrite
from ..data.corrections import add_to_training_folder, masks_of, read_corrections
from ..data.references import list_references
from ..growing import Accepted, Rejected
from .loading import load_for_inspection
from .printing import say


def run_accept(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Accept good parts, or take back those accepted last."""
    if bool(given.files) == given.undo:
        parser.error("accept takes either files or --undo.")
    target = given.out
    if target is not None and target.exists():
        parser.error(f"--out: {target} exists already. Choose another name; checkpoints are never overwritten.")
    files = {} if given.undo else _files(given, "good")
    model = load_for_inspection(given.ckpt_path)
    accepted: list[Accepted] = []
    taken_back: list[str] = []
    if given.undo:
        taken_back = model.undo_accept(given.class_name).files
    for name, of_class in files.items():
        accepted += model.accept(of_class, name)
    is_changed = bool(taken_back) or not all(one.was_known for one in accepted)
    if is_changed:
        target = target or _free_name(given.ckpt_path)
        rewrite(given.ckpt_path, target, model, model.settings, model.made)
    written = str(target) if is_changed else None
    if given.json:
        found = {"accepted": [asdict(one) for one in accepted], "taken_back": taken_back, "ckpt_path": written}
        say(json.dumps(found, indent=1))
        return 0
    for one in accepted:
        state = "was there already" if one.was_known else "joined"
        above = ", still anomalous" if one.score_after > 0.5 else ""
        say(f"{one.file}: {state}; score {one.score_before:.3f}, now {one.score_after:.3f}{above}")
    for file in taken_back:
        say(f"{file}: taken back")
    if accepted and is_changed and model.settings.calibration is None:
        say("Thresholds are as they were: the model has no `calibration` to find them anew with.")
    say(f"Checkpoint: {written}" if written else "Nothing has changed, and no checkpoint was written.")
    return 0


def run_reject(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Tell what catching escaped defects would take."""
    if (given.masks is None) != (given.training_folder is None):
        parser.error("--masks and --training_folder go together.")
    by_class = {name: list_references(files, "files") for name, files in _files(given, "bad").items()}
    every = [file for files in by_class.values() for file in files]
    masks = [] if given.masks is None else masks_of(every, given.masks)
    model = load_for_inspection(given.ckpt_path)
    rejected = {name: model.reject([str(file) for file in files], name) for name, files in by_class.items()}
    if masks:
        add_to_training_folder(every, masks, given.training_folder)
    if given.json:
        say(json.dumps([asdict(one) for of_class in rejected.values() for one in of_class], indent=1))
        return 0
    for name, of_class in rejected.items():
        for one in of_class:
            say(f"{one.file}: score {one.score:.3f}, {_cost(one)}")
        lowest = min(of_class, key=lambda one: one.threshold)
        row = 0 if name is None else repr(name)
        say(f"All of them are caught with image_threshold={lowest.threshold:.7g} or less (raw). To set it:")
        say(f"  model.post_processor.of_class({row}).set_values(image_threshold={lowest.threshold!r})")
    if masks:
        say(f"{len(masks)} images with masks: {given.training_folder}")
    return 0


def _cost(one: Rejected) -> str:
    state = "caught as things are" if one.is_caught else f"caught with image_threshold={one.threshold:.7g} (raw)"
    if one.good_parts_flagged is None:
        return f"{state}; what that costs is unknown: thresholds were not calibrated with held-out good parts"
    return f"{state}, which flags {one.good_parts_flagged:.1%} of the good parts"


def _files(given: argparse.Namespace, mark: str) -> Mapping[str | None, str | list[str]]:
    """By class, ``None`` for the one that was given, a folder as it is, else a list; of a report's corrections too."""
    first = given.files[0]
    if len(given.files) == 1 and Path(first).suffix.lower() == ".csv":
        return read_corrections(Path(first), mark, given.class_name)
    return {given.class_name: first if len(given.files) == 1 else given.files}


def _free_name(path: Path) -> Path:
    """The first name beside a checkpoint that no file has: its own, and how often it has grown."""
    stem = re.sub(r"-accepted-\d+$", "", path.stem)
    names = (path.with_name(f"{stem}-accepted-{number}{path.suffix}") for number in count(1))
    return next(name for name in names if not name.exists())
