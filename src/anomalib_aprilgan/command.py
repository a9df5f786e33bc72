"""The command ``anomalib-aprilgan``: its subcommands and their arguments.

What a subcommand does, and all that it needs, is loaded when it is called: help is printed without.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from .clip.columns import COLUMNS

_ABOUT = "Find defects on products that the model was never trained on. Exit codes: 0 done, 1 an anomaly, 2 bad use."
_INSPECT = (
    "Inspect a folder of images: decisions, drawings, regions of defects and a report to look at in a browser. Say "
    "what the object is; give a few good images as references, and good images to set the threshold from. Every other "
    "argument of the model can be given as --model.NAME VALUE."
)
_WATCH = (
    "Inspect every image that comes into a folder, with the model of a checkpoint, until SIGTERM or Ctrl-C. A file "
    "counts once its size and time have stopped to change. Its row in decisions.csv is written when all else is; after "
    "a kill the same command goes on where it was."
)
_REPORT = (
    "Write report.html from the files of a run: decisions.csv, and regions.csv, maps.csv, thresholds.json if there."
)
_ACCEPT = (
    "Good parts that were flagged join the memory bank of a checkpoint. Its thresholds are calibrated anew with the "
    "images that calibrated them. A new checkpoint is written beside the old one, which stays as it is."
)
_REJECT = (
    "Tell at which threshold defects that escaped would have been caught, and what share of the calibration's good "
    "parts it would flag. Nothing changes. With masks they are copied to where adapters can be trained on them."
)
_THRESHOLDS = (
    "Print the bounds and thresholds of an exported model or a checkpoint, raw, or change some: an image is anomalous "
    "where its raw score is above image_threshold. Nothing else of the file changes; --undo takes the last change back."
)
_BENCH = (
    "Time torch, ONNX Runtime and OpenVINO with a CLIP of random weights, side by side: a batch, images a second, peak "
    "of memory, and for torch the share of the speed of this device's matrix products."
)
_BACKBONES = (
    "List the CLIPs of open_clip: what `backbone` and `pretrained` take, and what each costs. GFLOPs are those of "
    "one image through the vision tower, a multiplication with an addition counted as two. Nothing is downloaded."
)
_CONFIG = (
    "Print the path of a config that comes with the package, or the names of all: "
    'anomalib fit --config "$(anomalib-aprilgan config train/visa)" --data.root /path/to/visa'
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``anomalib-aprilgan``; returns its exit code.

    Raises:
        SystemExit: Help was printed (code 0), or what was given cannot be used (code 2).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    if words[:1] == ["benchmark"]:  # its arguments are the entries of a config, read by another parser
        given = argparse.Namespace(run="benchmark:run_command", words=words[1:])
    else:
        given, rest = parser.parse_known_args(words)
        if rest and not getattr(given, "takes_model_arguments", False):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        given.rest = rest
    module, _, function = given.run.partition(":")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of timm and anomalib, while they are imported
    try:
        return int(getattr(import_module(f".commands.{module}", __package__), function)(given, parser))
    except (ValueError, OSError) as error:
        parser.error(str(error))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; nothing that takes time is imported."""
    parser = argparse.ArgumentParser(prog="anomalib-aprilgan", description=_ABOUT, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"anomalib-aprilgan {version('anomalib-aprilgan')}")
    commands = parser.add_subparsers(dest="command", required=True)
    quick = commands.add_parser("quickstart", help="try it on a drawn product, offline, in a minute")
    quick.add_argument("--root", type=Path, default=Path("results/quickstart"), help="folder for all that is written")
    quick.set_defaults(run="quickstart:run")
    _add_inspect(commands)
    _add_watch(commands)
    report = commands.add_parser("report", help="make a page of the results of a run", description=_REPORT)
    report.add_argument("folder", type=Path, help="folder of a run, in which decisions.csv lies")
    report.add_argument("--title", default="", help="what was inspected")
    report.set_defaults(run="report:run")
    _add_growing(commands)
    _add_thresholds(commands)
    commands.add_parser("benchmark", help="compare anomalib models in one table", add_help=False)
    _add_bench(commands)
    listed = commands.add_parser("backbones", help="list the CLIPs that can be used", description=_BACKBONES)
    listed.add_argument("names", nargs="*", help="architectures of open_clip (default: all)")
    listed.add_argument("--image_size", type=int, help="side in pixels that figures are of (default: each one's own)")
    listed.add_argument("--sort", choices=COLUMNS, default="name", help="column to sort by, ascending")
    listed.add_argument("--json", action="store_true", help="print JSON")
    listed.add_argument("--markdown", action="store_true", help="print a Markdown table")
    listed.set_defaults(run="backbones:run")
    config = commands.add_parser("config", help="where the configs of the package are", description=_CONFIG)
    config.add_argument("name", nargs="?", help="such as train/visa")
    config.set_defaults(run="config:run")
    return parser


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "inspect", help="a folder of images: decisions, drawings, report", description=_INSPECT, allow_abbrev=False
    )
    parser.add_argument("images", type=Path, help="folder of images, or one image")
    parser.add_argument(
        "--class_name",
        nargs="+",
        help="words for the object; of several, each image is of the one its folder is named after",
    )
    parser.add_argument("--references", help="folder of good images to compare with")
    parser.add_argument("--k_shot", type=int, help="how many of the references (default: all)")
    parser.add_argument("--calibration", help='folder of other good images that set the threshold, or "references"')
    parser.add_argument(
        "--false_positive_rate", type=float, help="share of good parts that may be flagged (default: 0.01)"
    )
    parser.add_argument("--roi", help="region of interest: a mask image, [left,top,right,bottom] or polygons")
    parser.add_argument("--min_area", type=int, help="leave out regions of fewer pixels")
    parser.add_argument("--ckpt_path", type=Path, help="checkpoint of an AprilGAN, instead of all of these")
    parser.add_argument(
        "--config", help="YAML with arguments of the model, or one of the package, such as model/built_in"
    )
    parser.add_argument("--out", type=Path, help="new folder for the results (default: results/inspect/1 and so on)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    _add_fail(parser)
    parser.set_defaults(run="inspect:run", takes_model_arguments=True)


def _add_watch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("watch", help="inspect what comes into a folder", description=_WATCH)
    parser.add_argument("folder", type=Path, help="folder to watch, with all folders in it")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint of an AprilGAN")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, outside the watched one")
    parser.add_argument("--class_name", help="class of all images (default: the only one, or by folder)")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks (default: 1)")
    parser.add_argument(
        "--patience", type=float, default=10.0, help="seconds until a broken file is given up (default: 10)"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="images that are inspected together (default: 8)")
    parser.add_argument(
        "--keep",
        choices=("anomalous", "all", "none"),
        default="anomalous",
        help="of which images drawings and maps are kept",
    )
    parser.add_argument("--min_area", type=int, default=0, help="leave out regions of fewer pixels")
    parser.add_argument("--once", action="store_true", help="end when all that is there was inspected")
    _add_fail(parser)
    parser.set_defaults(run="watch:run")


def _add_fail(parser: argparse.ArgumentParser) -> None:
    text = "end with code 1 unless every image is good"
    parser.add_argument("--fail-on-anomaly", "--fail_on_anomaly", action="store_true", help=text)


def _add_thresholds(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "thresholds", help="read or change thresholds of an exported model", description=_THRESHOLDS, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help=".xml, .onnx, .pt or .ckpt file")
    parser.add_argument("--set", nargs="+", metavar="NAME=NUMBER", help="such as image=0.62 pixel=1.1")
    parser.add_argument("--class_name", help="class whose values are set or printed (default: the only one, all)")
    parser.add_argument("--undo", action="store_true", help="take back what was set last")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run="thresholds:run")


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("bench", help="time run times side by side", description=_BENCH, allow_abbrev=False)
    parser.add_argument("--backbone", default="ViT-L-14-336", help="architecture of open_clip (default: ViT-L-14-336)")
    parser.add_argument("--image_size", type=int, help="side in pixels (default: the architecture's own)")
    parser.add_argument("--k_shot", type=int, default=4, help="references (default: 4)")
    engines = ["torch", "onnxruntime", "openvino", "openvino-fp16", "openvino-int8"]
    parser.add_argument("--engines", nargs="+", default=engines, help="what to compare, the first with the others")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="images of a batch (default: 1 8)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that is not counted")
    parser.add_argument("--device", default="cpu", help="device of torch (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run="bench:run")


def _add_growing(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    accept = commands.add_parser("accept", help="have good parts join the memory bank", description=_ACCEPT)
    _add_parts(accept, "*", "files of good parts, a folder, or the corrections.csv of a report")
    accept.add_argument("--undo", action="store_true", help="take back what was accepted last")
    accept.add_argument("--out", type=Path, help="checkpoint to write (default: NAME-accepted-1.ckpt and so on)")
    accept.set_defaults(run="growing:run_accept")
    reject = commands.add_parser("reject", help="what catching escaped defects would take", description=_REJECT)
    _add_parts(reject, "+", "files of defects, a folder, or the corrections.csv of a report")
    reject.add_argument("--masks", type=Path, help="folder of masks, named as the files; white is defective")
    reject.add_argument("--training_folder", type=Path, help="where files and masks are collected for training")
    reject.set_defaults(run="growing:run_reject")


def _add_parts(parser: argparse.ArgumentParser, number: str, what: str) -> None:
    parser.add_argument("files", nargs=number, help=what)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint of an AprilGAN")
    parser.add_argument("--class_name", help="class of the parts (default: the only one)")
    parser.add_argument("--json", action="store_true", help="print JSON")


if __name__ == "__main__":
    sys.exit(main())
