"""The subcommand ``inspect``: from a folder of images to decisions, drawings, regions and a report."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from anomalib.engine import Engine
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.callbacks import RichProgressBar
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from yaml import YAMLError

from ..config_files import names, path_of
from ..data.references import References, list_references, references_of_class
from ..files import check_writable, fitting_name, temporary_folder, write_atomically
from ..lightning_model import AprilGAN
from ..plugin import register
from ..results.file_names import marked
from ..results.outputs import Outputs
from ..results.report import REPORT
from ..results.run_files import DECISIONS, REGIONS, InspectedImage, RunFiles
from ..results.visualizer import AprilGANVisualizer
from .loading import load_for_inspection
from .printing import say

CHECKPOINT = "model.ckpt"
_RESULTS = Path("results/inspect")
# What is written beside decisions and drawings.
_WRITTEN = ("coco", "report")
# Arguments of the model that have an option of their own.
_OPTIONS = ("references", "k_shot", "calibration", "false_positive_rate", "roi", "min_area")
_SHOWN = 5  # highest scores on the screen


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Inspect; the code is 1 where that was asked for and not every image is good."""
    list_references(given.images, "images")
    model = _of_checkpoint(given, parser) if given.ckpt_path is not None else model_of(given, parser)
    folder, is_new = _folder_for_results(given.out)
    register()
    _write_to(model, folder)
    try:
        _predict(model, given.images, folder)
    except BaseException:
        if is_new and not (folder / DECISIONS).exists():
            shutil.rmtree(folder, ignore_errors=True)  # nothing was found out
        raise
    images = RunFiles.read(folder).images
    _draw_roi(model, folder, images)
    if given.json:
        say(json.dumps(_summary(images, folder), indent=1))
    else:
        _print_summary(images, model, folder)
    return int(given.fail_on_anomaly and any(one.decision != "good" for one in images))


def _predict(model: AprilGAN, images: Path, folder: Path) -> None:
    """Inspect with anomalib's Engine, and write the checkpoint."""
    with temporary_folder(folder) as scratch, _quiet():
        progress = RichProgressBar(console_kwargs={"stderr": True})  # what is printed may be read by a program
        engine = Engine(default_root_dir=scratch, logger=False, devices=1, callbacks=[progress])
        engine.predict(model, data_path=images, return_predictions=False)
        engine.trainer.save_checkpoint(folder / CHECKPOINT)


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without the greetings and hints of Lightning and anomalib; what is wrong is still said."""
    of_engine = logging.getLogger("anomalib.engine.engine")  # it warns that no checkpoint was asked for
    level = of_engine.level
    of_engine.setLevel(logging.ERROR)
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            for text in (
                "does not have many workers",
                "Total length of .* across ranks is zero",
                "'pin_memory' argument",
            ):
                warnings.filterwarnings("ignore", message=f".*{text}")
            yield
    finally:
        logging.disable(logging.NOTSET)
        of_engine.setLevel(level)


def model_of(given: argparse.Namespace, parser: argparse.ArgumentParser) -> AprilGAN:
    """A model from the arguments of a config, then ``--model.NAME VALUE``, then the options.

    Ends the command where one of them cannot be.
    """
    arguments = {**_of_config(given.config), **_of_rest(given.rest, parser)}
    arguments |= {name: getattr(given, name) for name in _OPTIONS if getattr(given, name) is not None}
    if given.class_name is not None:
        arguments["class_name"] = given.class_name[0] if len(given.class_name) == 1 else given.class_name
    if "references" in arguments and "k_shot" not in arguments:
        arguments["k_shot"] = _number_of_references(arguments["references"], arguments.get("class_name"))
    arguments["outputs"] = sorted({*_WRITTEN, *arguments.get("outputs", ())})
    parsing = ArgumentParser(exit_on_error=False)
    parsing.add_class_arguments(AprilGAN, "model")
    try:
        parsed = parsing.parse_object({"model": arguments})
    except ArgumentError as error:
        parser.error(" ".join(str(error).split()))
    model: AprilGAN = parsing.instantiate_classes(parsed).model
    return model


def _of_checkpoint(given: argparse.Namespace, parser: argparse.ArgumentParser) -> AprilGAN:
    """The model of a checkpoint, which has all arguments of the model."""
    others = [f"--{name}" for name in (*_OPTIONS, "class_name", "config") if getattr(given, name) is not None]
    others = [name for name in others if name != "--min_area"] + given.rest
    if others:
        parser.error(f"--ckpt_path has all arguments of the model: leave out {', '.join(others)}.")
    model = load_for_inspection(given.ckpt_path)
    model.outputs = Outputs(_WRITTEN, given.min_area or 0)
    return model


def _of_config(name: str | None) -> dict[str, Any]:
    """Arguments of the model in a YAML file, or a config that comes with the package."""
    if name is None:
        return {}
    path = path_of(name) if name in names() else Path(name)
    if not path.is_file():
        msg = f"--config: there is no file {path}, and none of {', '.join(names())} that come with the package."
        raise FileNotFoundError(msg)
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        msg = f"--config: {path} cannot be read as YAML ({' '.join(str(error).split())})."
        raise ValueError(msg) from error
    model = content.get("model") if isinstance(content, dict) else None
    arguments = model.get("init_args", {}) if isinstance(model, dict) else None
    if not isinstance(arguments, dict):
        msg = f"--config: {path} must have `model` with `class_path` and `init_args`, as `anomalib --config` takes it."
        raise ValueError(msg)
    return {str(key): value for key, value in arguments.items()}


def _of_rest(rest: Sequence[str], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Arguments that are given as ``--model.NAME VALUE`` or ``--model.NAME=VALUE``."""
    entries, words = [], list(rest)
    while words:
        name, has_value, value = words.pop(0).partition("=")
        if not name.startswith("--model.") or not (has_value or words):
            parser.error(f"unrecognized arguments: {name}. Arguments of the model are --model.NAME VALUE.")
        entries.append(f"{name.removeprefix('--model.')}={value if has_value else words.pop(0)}")
    found = OmegaConf.to_container(OmegaConf.from_dotlist(entries))
    return {str(name): value for name, value in found.items()} if isinstance(found, dict) else {}


def _number_of_references(references: References, class_name: object) -> int:
    """How many references each class can have."""
    names = list(class_name) if isinstance(class_name, (list, Mapping)) else [str(class_name)]
    return min(len(list_references(references_of_class(references, name, names))) for name in names)


def _folder_for_results(out: Path | None) -> tuple[Path, bool]:
    """The folder for the results, and whether it is made here.

    A ValueError where it holds other results, an OSError where it cannot be written.
    """
    if out is None:
        out = next(path for number in count(1) if not (path := _RESULTS / str(number)).exists())
    elif (out / DECISIONS).exists():
        msg = f"--out: {out} holds results already. Choose another folder; results are never overwritten."
        raise ValueError(msg)
    is_new = not out.exists()
    check_writable(out)
    return out, is_new


def _write_to(model: AprilGAN, folder: Path) -> None:
    """Have all files of a run go into one folder."""
    model.table.path = folder / DECISIONS
    for writer in (*model.outputs.before_table, *model.outputs.report):
        vars(writer)["folder"] = folder
    if isinstance(model.visualizer, AprilGANVisualizer):
        model.visualizer.output_dir = folder / "images"


def _draw_roi(model: AprilGAN, folder: Path, images: Sequence[InspectedImage]) -> None:
    """Draw the region of interest of each class over one of its images."""
    if model.model.roi is None:
        return
    for row, name in enumerate(model.classes.names):
        samples = [one.image_path for one in images if one.class_name == name and one.decision != "unreadable"]
        if samples and model.model.roi.inside(row) is not None:
            drawing = model.draw_roi(samples[0], name)
            path = folder / fitting_name(f"roi-{name.replace('/', '-')}", ".png")
            write_atomically(path, partial(drawing.save, format="PNG", pnginfo=marked()))


def _summary(images: Sequence[InspectedImage], folder: Path) -> dict[str, Any]:
    """What was found, and where it lies, as plain data."""
    by_class: dict[str, Counter[str]] = {}
    for one in images:
        by_class.setdefault(one.class_name, Counter())[one.decision] += 1
    files = {name: str(folder / name) for name in (REPORT, DECISIONS, REGIONS, "images", CHECKPOINT)}
    return {"images": len(images), "decisions": {name: dict(found) for name, found in by_class.items()}, "files": files}


def _print_summary(images: Sequence[InspectedImage], model: AprilGAN, folder: Path) -> None:
    """One screen: how many are good, which are the worst, where everything lies, how to go on."""
    found = _summary(images, folder)
    words = ("anomalous", "good", "undecided", "unreadable")
    table = Table("class", *words, "regions", box=SIMPLE, title=f"{len(images)} images")
    for name, decisions in found["decisions"].items():
        regions = sum(len(one.regions) for one in images if one.class_name == name)
        table.add_row(escape(name or "-"), *(str(decisions.get(word, 0)) for word in words), str(regions))
    Console(highlight=False).print(table)
    known = sorted((one for one in images if one.score is not None), key=lambda one: -(one.score or 0.0))
    for one in known[:_SHOWN]:
        say(f"  {one.score:.3f}  {one.decision:10} {_printable(one.image_path)}")
    if model.settings.calibration is None:
        say("\nThe thresholds are defaults: `--calibration` with a folder of good images sets them.")
    say(f"\nReport to look at:  {folder / REPORT}")
    say(f"Table:              {folder / DECISIONS} ({REGIONS}, regions.json for COCO)")
    say(f"Drawings:           {folder / 'images'}")
    say(f"Model:              {folder / CHECKPOINT}")
    checkpoint = shlex.quote(str(folder / CHECKPOINT))
    say(f"Next: anomalib-aprilgan accept corrections.csv --ckpt_path {checkpoint}   (marks from the report)")
    watch = shlex.quote(str(folder.parent / "watch"))
    say(f"      anomalib-aprilgan watch FOLDER --ckpt_path {checkpoint} --out {watch}")


def _printable(path: str) -> str:
    """A path without what would move the cursor of a terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in path)
