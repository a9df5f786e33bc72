"""Every command and every piece of code of README and documentation, run as it stands there.

The published CLIP cannot be had where these tests run. Commands that need it are given the built-in one, and data sets
are stand-ins; a training or benchmark that takes hours is read and checked in full, and not run.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan import command as command_line
from anomalib_aprilgan.config_files import folder as config_folder
from anomalib_aprilgan.csv_text import as_csv
from anomalib_aprilgan.demo import built_in
from anomalib_aprilgan.demo.drawn_clip import pretrain
from anomalib_aprilgan.evaluation.config import checked, read_arguments
from anomalib_aprilgan.evaluation.plan import read_plan

from ..conftest import DATASET

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BUILT_IN = [
    f"--model.backbone={built_in.ARCHITECTURE}",
    f"--model.pretrained={built_in.PRETRAINED}",
    f"--model.image_size={built_in.IMAGE_SIZE}",
    f"--model.stages={list(built_in.STAGES)}",
    f"--model.memory_stages={list(built_in.MEMORY_STAGES)}",
]
pytestmark = pytest.mark.thorough


def blocks(*languages: str) -> list[tuple[str, str]]:
    """Pages, by their names, and the text of their code blocks in these languages."""
    found = [(page.name, *match) for page in PAGES for match in BLOCK.findall(page.read_text(encoding="utf-8"))]
    return [(page, text) for page, language, text in found if language in languages]


def commands() -> list[str]:
    """All commands, each once, without comments; a command that goes on in the next line is one."""
    lines = [line for _, text in blocks("sh", "bash") for line in text.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in line.partition(" #")[0].split("&&")]
    return sorted({" ".join(part.split()) for part in parts if part.strip()})


COMMANDS = commands()


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the documentation calls ``path/to/...`` and ``datasets/...``."""
    images = [Image.open(path) for path in sorted(DATASET.glob("*/train/good/*.png"))]
    variants = [image.rotate(angle) for angle in (0, 90) for image in images]
    for name in ("images", "inspect", "incoming"):
        (tmp_path / "path/to" / name).mkdir(parents=True)
        for number, image in enumerate(variants[:3]):
            image.save(tmp_path / "path/to" / name / f"{number}.png")
    (tmp_path / "path/to/masks").mkdir()
    Image.effect_noise(variants[0].size, 90).save(tmp_path / "path/to/masks/0.png")
    for name in ("good", "normal", "yesterday"):
        (tmp_path / "path/to" / name).mkdir()
        for number, image in enumerate(variants[:24]):
            image.save(tmp_path / "path/to" / name / f"{number}.png")
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "MVTecAD").symlink_to(DATASET)
    (tmp_path / "configs").symlink_to(config_folder())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_command(
    command: str,
    anomalib: Callable[..., str],
    work: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    words = [word for word in shlex.split(command) if word != "OMP_NUM_THREADS=1"]
    program, arguments = Path(words[0]).name, words[1:]
    if words[0].startswith(".venv/") or words[:3] == ["python3", "-m", "venv"]:
        # The README's are run by .ci/run itself, those of contributors as it runs them.
        tool = "pip install" if program == "pip" else " ".join([program, *arguments[:2]]).removesuffix(" -q")
        assert tool in CI or command in (ROOT / "README.md").read_text(encoding="utf-8")
    elif program == "anomalib-aprilgan" and arguments[0] == "benchmark":
        assert read_plan(checked(read_arguments(arguments[1:])).benchmark).cells()
    elif program == "anomalib-aprilgan":
        run_subcommand(arguments, capsys, anomalib, tmp_path_factory.getbasetemp() / "exported")
    elif program == "python":
        assert arguments[:2] == ["-m", "anomalib_aprilgan.demo.drawn_clip.pretrain"]
        with pytest.raises(SystemExit) as ended:
            pretrain.main([*arguments[2:], "--help"])
        assert ended.value.code == 0
    elif "fit" in arguments[:1] or "WinClip" in arguments:
        with pytest.raises(SystemExit) as ended:
            anomalib(*arguments, "--print_config")
        assert ended.value.code in {None, 0}
        assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"].endswith(("AprilGAN", "WinClip"))
    else:
        assert (program, arguments[1:3]) == ("anomalib", ["--model", "AprilGAN"])
        if "left:" in command:
            for folder in (work / "path/to/images", work / "path/to/good"):
                for name in ("left", "right"):
                    shutil.copytree(work / "path/to/normal", folder / name)
                for file in folder.glob("*.png"):
                    file.unlink()
        arguments = [str(built_in.ADAPTERS) if word.startswith("hf://") else word for word in arguments]
        if "MVTecAD" in arguments and "--data.root" not in arguments:
            arguments.append("--data.root=datasets/MVTecAD")
        anomalib(*arguments, *BUILT_IN)
        if arguments[0] == "predict":
            (table,) = work.glob("results/AprilGAN/**/v0/decisions.csv")
            assert len(table.read_text(encoding="utf-8").splitlines()) == 1 + (48 if "left:" in command else 3)


INSPECT = [
    "inspect",
    "path/to/inspect",
    "--class_name",
    "metal washer",
    "--references",
    "path/to/good",
    "--k_shot",
    "2",
]


def run_subcommand(
    arguments: list[str], capsys: pytest.CaptureFixture[str], anomalib: Callable[..., str], exported: Path
) -> None:
    """Run a command of the package; those for checkpoints on the one that their page says how to write.

    ``exported`` is where an exported model is kept for all.
    """
    if arguments[0] == "backbones":
        command_line.main([*arguments, "ViT-B-32", "RN50"])
        assert "2 of 2 architectures" in capsys.readouterr().out
        return
    if arguments[0] == "inspect":
        assert command_line.main([*arguments, *BUILT_IN]) == 0
        assert Path("results/inspect/1/report.html").is_file()
        return
    if arguments[0] == "report":
        given = ["--model.class_name=washer", "--model.outputs=[maps, regions]", *BUILT_IN]
        anomalib("predict", "--model", "AprilGAN", "--data", "path/to/images", *given)
        assert command_line.main(arguments) == 0
        assert Path("results/AprilGAN/latest/report.html").is_file()
        return
    if arguments[0] == "thresholds":
        if not exported.is_dir():
            given = ["--model.class_name=washer", "--export_type=openvino", f"--export_root={exported}", *BUILT_IN]
            anomalib("export", "--model", "AprilGAN", *given)
        shutil.copytree(exported, "results/exported")
        if "--undo" in arguments:
            assert command_line.main([*arguments[:2], "--set", "image=0.4"]) == 0
        assert command_line.main(arguments) == 0
        assert "image_threshold" in capsys.readouterr().out
        return
    if "corrections.csv" in arguments:
        assert command_line.main([*INSPECT, *BUILT_IN]) == 0
        rows = [("image_path", "class_name", "mark"), ("path/to/inspect/0.png", "metal washer", "good")]
        Path("corrections.csv").write_bytes(as_csv(rows))
        assert command_line.main(arguments) == 0
        assert Path("results/inspect/1/model-accepted-1.ckpt").is_file()
        return
    assert arguments[0] in {"accept", "reject", "watch"}
    (code,) = [text for page, text in blocks("python") if "save_checkpoint" in text and page == "memory.md"]
    executed("memory.md", code)
    if "--undo" in arguments:
        command_line.main(["accept", "path/to/inspect/0.png", "path/to/inspect/1.png", "--ckpt_path", "washer.ckpt"])
    capsys.readouterr()
    if arguments[0] == "watch":
        assert command_line.main([*arguments, "--once", "--interval", "0.1"]) == 0
        assert "3 inspected" in capsys.readouterr().out
        return
    command_line.main(arguments)
    printed = capsys.readouterr().out
    if arguments[0] == "reject":
        assert "of the good parts" in printed
        assert Path("path/to/escaped/masks").is_dir() is ("--masks" in arguments)
    else:
        assert f"Checkpoint: washer-accepted-{2 if '--undo' in arguments else 1}.ckpt" in printed


def executed(page: str, text: str) -> dict[str, object]:
    """The names that code of the documentation leaves, run with the built-in CLIP."""
    arguments = f"backbone={built_in.ARCHITECTURE!r}, pretrained={built_in.PRETRAINED!r}, image_size=96, stages=[4]"
    text = re.sub(r"AprilGAN\((\s*class_name)", rf"AprilGAN({arguments}, \1", text)
    text = text.replace("AprilGAN(),", f"AprilGAN({arguments}),")
    text = text.replace('dataset="mvtec"', 'dataset="mvtec", categories=["bottle", "tile"]')  # what the stand-in has
    preamble = "from anomalib.engine import Engine\nfrom anomalib_aprilgan import AprilGAN\n"
    names: dict[str, object] = {"images": torch.rand(2, 3, 40, 60)}
    exec(compile(preamble + text, page, "exec"), names)  # noqa: S102  # the documentation's own code
    return names


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python(page: str, text: str, work: Path) -> None:
    if "push_adapters" in text:
        compile(text, page, "exec")  # run in tests/unit/test_hub.py, against a hub on the loopback interface
        return
    names = executed(page, text)
    if "result" in names:
        assert names["result"].anomaly_map.shape[0] == 2


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_yaml(page: str, text: str, anomalib: Callable[..., str], work: Path) -> None:
    config = work / "config.yaml"
    config.write_text(text, encoding="utf-8")
    content = yaml.safe_load(text)
    if "trainer" in content:
        anomalib("predict", f"--config={config}", "--data=path/to/images", *BUILT_IN)
        assert (work / "shown" / "table.csv").is_file()
    elif "benchmark" in content:
        plan = read_plan(checked(read_arguments([f"--config={config}"])).benchmark)
        assert len(plan.cells()) == 2 * (1 + 3 * 5)
    elif "class_path" in content["model"]:
        model = AprilGAN(**content["model"]["init_args"])
        assert model.settings.stages in {(1, 2, 3, 4), (6, 12, 18, 24)}
    else:
        assert "grid" in content["model"]  # a part of a config of `anomalib benchmark`, run in test_cli.py
