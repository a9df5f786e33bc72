"""The command from a folder to a report, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.command import main
from anomalib_aprilgan.csv_text import as_csv, read_csv
from anomalib_aprilgan.data.corrections import read_corrections
from anomalib_aprilgan.files import is_drawing
from anomalib_aprilgan.results.run_files import RunFiles

from ..conftest import DATASET, SmallClip
from .runs import good

TEST = DATASET / "bottle" / "test" / "hole"
COMMANDS = Path(sys.executable).parent


@pytest.fixture
def words(small_clip: SmallClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The small CLIP, as arguments of the model."""
    monkeypatch.chdir(tmp_path)
    given = {"backbone": small_clip.quick_gelu, "pretrained": small_clip.weights, "adapters": small_clip.adapters_4}
    given |= {"image_size": 96, "stages": [1, 2, 3, 4]}
    return [f"--model.{name}={value}" for name, value in given.items()]


def test_from_a_folder_to_a_report(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--class_name", "bottle", "--references", str(good("bottle")), "--calibration", "references"]
    given += ["--false_positive_rate", "0.1", "--roi", "[20,20,140,150]", "--min_area", "3"]
    assert main(["inspect", str(TEST), *given, *words]) == 0
    folder = tmp_path / "results" / "inspect" / "1"
    assert {path.name for path in folder.iterdir()} == {
        *("decisions.csv", "regions.csv", "regions.json", "maps.csv", "maps", "images", "thresholds.json"),
        *("report.html", "model.ckpt", "roi-bottle.png"),
    }
    images = RunFiles.read(folder).images
    assert [Path(one.image_path) for one in images] == sorted(TEST.glob("*.png"))
    assert all(one.decision in {"good", "anomalous"} and one.map_file for one in images)
    assert all(region.area >= 3 for one in images for region in one.regions)
    printed = capsys.readouterr().out
    assert f"{len(images)} images" in printed
    assert "results/inspect/1/report.html" in printed
    assert "The thresholds are defaults" not in printed
    model = AprilGAN.load_from_checkpoint(folder / "model.ckpt", map_location="cpu").eval()
    assert model.settings.k_shot == len(list(good("bottle").glob("*.png")))
    assert all(is_drawing(path) for path in folder.rglob("*.png"))  # so that no later run inspects them
    assert main(["inspect", str(TEST), "--ckpt_path", str(folder / "model.ckpt")]) == 0
    again = RunFiles.read(tmp_path / "results" / "inspect" / "2").images
    assert [one.score for one in again] == [one.score for one in images]


def test_codes_and_json(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(tmp_path / "black.png")
    run = ["inspect", str(tmp_path / "black.png"), "--class_name", "bottle", *words, "--json", "--fail-on-anomaly"]
    code = main([*run, "--out", str(tmp_path / "out")])
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 1
    (decisions,) = found["decisions"].values()
    assert code == int(set(decisions) != {"good"})
    assert all(Path(path).exists() for path in found["files"].values())
    with pytest.raises(SystemExit) as ended:
        main([*run, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "holds results already" in capsys.readouterr().err


def test_several_classes_by_folder(words: list[str], tmp_path: Path) -> None:
    for name in ("bottle", "tile"):
        for kind, source in (("parts", "test"), ("good", "train")):
            folder = tmp_path / kind / name
            folder.mkdir(parents=True)
            for file in sorted((DATASET / name / source / "good").glob("*.png"))[:2]:
                (folder / file.name).symlink_to(file)
    given = ["--class_name", "bottle", "tile", "--references", "good"]
    assert main(["inspect", "parts", *given, *words, "--out", "out"]) == 0
    assert {one.class_name for one in RunFiles.read(Path("out")).images} == {"bottle", "tile"}
    assert AprilGAN.load_from_checkpoint("out/model.ckpt", map_location="cpu").settings.k_shot == 2


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (["gone"], "gone does not exist"),
        (["empty"], "holds no images"),
        (["parts", "--references", "gone"], "gone does not exist"),
        (["parts", "--roi", "[0,0,9999,5]"], "lies outside the images"),
        (["parts", "--roi", "gone.png"], "no file gone.png"),
        (["parts", "--calibration", "references"], "`calibration='references'` needs `k_shot`"),
        (["parts", "--false_positive_rate", "2"], "`false_positive_rate` must be"),
        (["parts", "--model.k_shots", "2"], "k_shots"),
        (["parts", "--model.k_shot", "many"], "k_shot"),
        (["parts", "--models.k_shot", "2"], "unrecognized arguments: --models.k_shot"),
        (["parts", "--model.outputs", "[all]"], "`outputs` must be one of regions"),
        (["parts", "--config", "gone.yaml"], "there is no file gone.yaml"),
        (["parts", "--config", "list.yaml"], "must have `model` with `class_path` and `init_args`"),
        (["parts", "--ckpt_path", "gone.ckpt"], "no checkpoint file gone.ckpt"),
        (["parts", "--ckpt_path", "x.ckpt", "--roi", "[0,0,5,5]"], "leave out --roi"),
        (["parts", "--ckpt_path", "x.ckpt", "--class_name", "nut", "bolt"], "leave out --class_name"),
        (["parts", "--out", "file"], "cannot be written"),
    ],
)
def test_bad_use_ends_with_code_2_and_a_reason(
    words: list[str], tmp_path: Path, wrong: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "parts").symlink_to(TEST)
    given = [] if "--ckpt_path" in wrong else ["--class_name", "bottle", *words]
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *wrong, *given])
    assert ended.value.code == 2
    assert text in capsys.readouterr().err
    assert not list(tmp_path.rglob("decisions.csv"))
    assert not list(tmp_path.glob("results/inspect/*"))


def test_an_error_leaves_a_folder_of_the_user_alone(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(SystemExit):
        main(["inspect", str(TEST), "--class_name", "bottle", *words, "--roi", "[0,0,9999,5]", "--out", "mine"])
    assert (tmp_path / "mine" / "notes.txt").read_text() == "x"


def test_marks_of_a_report_are_accepted_and_rejected(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--class_name", "bottle", "--references", str(good("bottle")), "--k_shot", "2", *words]
    assert main(["inspect", str(TEST), *given, "--out", "out"]) == 0
    files = [row["image_path"] for row in read_csv(Path("out/decisions.csv"))]
    marks = [["image_path", "class_name", "mark"], [files[0], "bottle", "good"], [files[1], "bottle", "bad"]]
    Path("corrections.csv").write_bytes(as_csv(marks))
    capsys.readouterr()
    assert main(["accept", "corrections.csv", "--ckpt_path", "out/model.ckpt"]) == 0
    printed = capsys.readouterr().out
    assert f"{files[0]}: joined" in printed
    assert files[1] not in printed
    assert main(["reject", "corrections.csv", "--ckpt_path", "out/model.ckpt"]) == 0
    printed = capsys.readouterr().out
    assert files[1] in printed
    assert "of_class('bottle')" in printed


class TestCorrections:
    @pytest.mark.parametrize(
        ("content", "text"),
        [
            (b'"image_path","class_name","mark"\n"x.png","","maybe"\n', "must have the columns image_path"),
            (b'"image_path","mark"\n"x.png","good"\n', "must have the columns image_path"),
            (b'"image_path","class_name","mark"\n"x.png","","bad"\n', "marks no image as good"),
        ],
    )
    def test_other_tables_are_refused(self, tmp_path: Path, content: bytes, text: str) -> None:
        (tmp_path / "corrections.csv").write_bytes(content)
        with pytest.raises(ValueError, match=text):
            read_corrections(tmp_path / "corrections.csv", "good")
        with pytest.raises(FileNotFoundError, match=r"give the corrections\.csv"):
            read_corrections(tmp_path / "gone.csv", "good")

    def test_by_class(self, tmp_path: Path) -> None:
        rows = [["image_path", "class_name", "mark"], ["a", "nut", "good"], ["b", "", "good"], ["c", "'=x", "good"]]
        (tmp_path / "corrections.csv").write_bytes(as_csv(rows))
        path = tmp_path / "corrections.csv"
        assert read_corrections(path, "good") == {"nut": ["a"], None: ["b"], "=x": ["c"]}
        assert read_corrections(path, "good", "nut") == {"nut": ["a"]}


class TestHelp:
    SUBCOMMANDS = (
        "",
        "quickstart",
        "inspect",
        "watch",
        "report",
        "accept",
        "reject",
        "benchmark",
        "backbones",
        "config",
    )

    @pytest.mark.parametrize("name", SUBCOMMANDS)
    def test_it_takes_less_than_two_seconds(self, name: str) -> None:
        command = [str(COMMANDS / "anomalib-aprilgan"), *([name] if name else []), "--help"]
        started = time.monotonic()
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        assert time.monotonic() - started < 2.0
        assert f"usage: anomalib-aprilgan {name}".rstrip() in process.stdout

    @pytest.mark.parametrize("name", ["quickstart", "benchmark", "config"])
    def test_the_old_names_are_the_same_commands(self, name: str) -> None:
        printed = [
            subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
            for command in ([COMMANDS / f"anomalib-aprilgan-{name}"], [COMMANDS / "anomalib-aprilgan", name])
        ]
        assert printed[0] == printed[1]

    def test_nothing_heavy_is_imported_for_it(self) -> None:
        script = (
            "import sys, _anomalib_aprilgan_startup as startup\n"
            "sys.argv = ['anomalib-aprilgan', 'inspect', '--help']\n"
            "try:\n    startup.command()\n"
            "except SystemExit:\n    print([name for name in ('torch', 'anomalib') if name in sys.modules])"
        )
        output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        assert output.splitlines()[-1] == "[]"


@pytest.mark.thorough
def test_the_public_names_are_there_also_for_the_command() -> None:
    script = (
        "import _anomalib_aprilgan_startup as startup\nstartup.is_light = True\n"
        "import anomalib_aprilgan\nassert 'AprilGAN' not in vars(anomalib_aprilgan)\n"
        "print(anomalib_aprilgan.AprilGAN.__name__, anomalib_aprilgan.DrawnInspection.__name__)\n"
        "try:\n    anomalib_aprilgan.Nothing\nexcept AttributeError as error:\n    print(error)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.split("\n")[:2] == [
        "AprilGAN DrawnInspection",
        "module 'anomalib_aprilgan' has no attribute 'Nothing'",
    ]


Build = Callable[..., AprilGAN]


@pytest.mark.parametrize(
    ("outputs", "text"), [(["all"], "`outputs` must be one of"), ("report", "`outputs` must be a list")]
)
def test_outputs_are_checked(april_gan: Build, outputs: Any, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        april_gan(outputs=outputs)
    with pytest.raises(ValueError, match="`min_area` must be at least 0"):
        april_gan(min_area=-1)
