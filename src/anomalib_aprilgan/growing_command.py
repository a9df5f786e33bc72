"""The subcommands ``accept`` and ``reject``: what the line has taught, from and to checkpoint files."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console

from .checkpoint import rewrite
from .data.corrections import add_to_training_folder, masks_of
from .data.references import list_references
from .growing import Accepted, Rejected
from .lightning_model import AprilGAN

_ACCEPT = (
    "Good parts that were flagged join the memory bank of a checkpoint. Its thresholds are calibrated anew with the "
    "images that calibrated them. A new checkpoint is written beside the old one, which stays as it is."
)
_REJECT = (
    "Tell at which threshold defects that escaped would have been caught, and what share of the calibration's good "
    "parts it would flag. Nothing changes. With masks they are copied to where adapters can be trained on them."
)


def add_growing(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the subcommands, by ``add_parser`` of those that there are."""
    accept = add_parser("accept", help="have good parts join the memory bank", description=_ACCEPT)
    _add_common(accept, "*", "files of good parts, or a folder")
    accept.add_argument("--undo", action="store_true", help="take back what was accepted last")
    accept.add_argument("--out", type=Path, help="checkpoint to write (default: NAME-accepted-1.ckpt and so on)")
    accept.set_defaults(run=_run_accept)
    reject = add_parser("reject", help="what catching escaped defects would take", description=_REJECT)
    _add_common(reject, "+", "files of defects, or a folder")
    reject.add_argument("--masks", type=Path, help="folder of masks, named as the files; white is defective")
    reject.add_argument("--training_folder", type=Path, help="where files and masks are collected for training")
    reject.set_defaults(run=_run_reject)


def _add_common(parser: argparse.ArgumentParser, number: str, what: str) -> None:
    parser.add_argument("files", nargs=number, help=what)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint of an AprilGAN")
    parser.add_argument("--class_name", help="class of the parts (default: the only one)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run_accept(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if bool(given.files) == given.undo:
        parser.error("accept takes either files or --undo.")
    target = given.out
    if target is not None and target.exists():
        parser.error(f"--out: {target} exists already. Choose another name; checkpoints are never overwritten.")
    with _told(parser):
        model = _loaded(given.ckpt_path)
        accepted: list[Accepted] = []
        taken_back: list[str] = []
        if given.undo:
            taken_back = model.undo_accept(given.class_name).files
        else:
            accepted = model.accept(_files(given.files), given.class_name)
        is_changed = bool(taken_back) or not all(one.was_known for one in accepted)
        if is_changed:
            target = target or _free_name(given.ckpt_path)
            rewrite(given.ckpt_path, target, model, model.settings, model.made)
    written = str(target) if is_changed else None
    if given.json:
        found = {"accepted": [asdict(one) for one in accepted], "taken_back": taken_back, "ckpt_path": written}
        _print(json.dumps(found, indent=1))
        return
    for one in accepted:
        state = "was there already" if one.was_known else "joined"
        above = ", still anomalous" if one.score_after > 0.5 else ""
        _print(f"{one.file}: {state}; score {one.score_before:.3f}, now {one.score_after:.3f}{above}")
    for file in taken_back:
        _print(f"{file}: taken back")
    if accepted and is_changed and model.settings.calibration is None:
        _print("Thresholds are as they were: the model has no `calibration` to find them anew with.")
    _print(f"Checkpoint: {written}" if written else "Nothing has changed, and no checkpoint was written.")


def _run_reject(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if (given.masks is None) != (given.training_folder is None):
        parser.error("--masks and --training_folder go together.")
    with _told(parser):
        files = list_references(_files(given.files), "files")
        masks = [] if given.masks is None else masks_of(files, given.masks)
        model = _loaded(given.ckpt_path)
        rejected = model.reject([str(file) for file in files], given.class_name)
        if masks:
            add_to_training_folder(files, masks, given.training_folder)
    if given.json:
        _print(json.dumps([asdict(one) for one in rejected], indent=1))
        return
    for one in rejected:
        _print(f"{one.file}: score {one.score:.3f}, {_cost(one)}")
    lowest = min(rejected, key=lambda one: one.threshold)
    name = "" if given.class_name is None else repr(given.class_name)
    _print(f"All of them are caught with image_threshold={lowest.threshold:.7g} or less (raw). To set it:")
    _print(f"  model.post_processor.of_class({name or 0}).set_values(image_threshold={lowest.threshold!r})")
    if masks:
        _print(f"{len(masks)} images with masks: {given.training_folder}")


def _cost(one: Rejected) -> str:
    state = "caught as things are" if one.is_caught else f"caught with image_threshold={one.threshold:.7g} (raw)"
    if one.good_parts_flagged is None:
        return f"{state}; what that costs is unknown: thresholds were not calibrated with held-out good parts"
    return f"{state}, which flags {one.good_parts_flagged:.1%} of the good parts"


def _files(files: list[str]) -> str | list[str]:
    """A folder as it is, else a list."""
    return files[0] if len(files) == 1 else files


def _loaded(path: Path) -> AprilGAN:
    model: Any = AprilGAN.load_from_checkpoint(path, map_location="cpu")
    model.eval()
    found: AprilGAN = model
    return found


def _free_name(path: Path) -> Path:
    """The first name beside a checkpoint that no file has: its own, and how often it has grown."""
    stem = re.sub(r"-accepted-\d+$", "", path.stem)
    names = (path.with_name(f"{stem}-accepted-{number}{path.suffix}") for number in count(1))
    return next(name for name in names if not name.exists())


@contextmanager
def _told(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Context in which an error that a user can mend ends the command with its text."""
    try:
        yield
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _print(text: str) -> None:
    Console(soft_wrap=True, highlight=False, markup=False, emoji=False).print(text)
