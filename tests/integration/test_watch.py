"""A folder that is watched: each image once, whatever is dropped there and whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.command import main
from anomalib_aprilgan.csv_text import read_csv
from anomalib_aprilgan.results.run_files import RunFiles
from anomalib_aprilgan.single_images import inspect_images
from anomalib_aprilgan.watching import FolderWatch

from .runs import engine, good, read

Build = Callable[..., AprilGAN]
COMMAND = Path(sys.executable).parent / "anomalib-aprilgan"


@pytest.fixture
def model(april_gan: Build) -> AprilGAN:
    found = april_gan(class_name="bottle", k_shot=1, references=str(good("bottle")), visualizer=False).eval()
    found.make_ready("predict")
    return found


@pytest.fixture
def watch(model: AprilGAN, tmp_path: Path) -> Iterator[Callable[..., FolderWatch]]:
    """Begins to watch ``in`` and write to ``out``."""
    begun: list[FolderWatch] = []
    (tmp_path / "in").mkdir()

    def begin(**options: Any) -> FolderWatch:
        for earlier in begun:
            earlier.lock.release()
        begun.append(FolderWatch(model, tmp_path / "in", tmp_path / "out", **options))
        return begun[-1]

    yield begin
    for earlier in begun:
        earlier.lock.release()


def drop(folder: Path, name: str, seed: int = 0, side: int = 40) -> Path:
    """A file that is there at once, as by a camera that renames it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path.with_name(f".{path.name}.part"), "PNG")
    path.with_name(f".{path.name}.part").rename(path)
    return path


def table(folder: Path) -> list[dict[str, str]]:
    return read_csv(folder / "out" / "decisions.csv")


def decided(folder: Path) -> Counter[str]:
    return Counter(Path(row["image_path"]).name for row in table(folder))


class TestOnce:
    def test_every_image_is_inspected_once_and_as_by_the_engine(
        self, watch: Callable[..., FolderWatch], model: AprilGAN, tmp_path: Path
    ) -> None:
        for number in range(5):
            drop(tmp_path / "in", f"{number % 2}/{number}.png", number, 40 + number)
        watching = watch(keep="all", batch_size=3)
        assert watching.look()  # seen once: it may still be written
        assert not watching.look()
        assert not watching.look()
        rows = table(tmp_path)
        assert decided(tmp_path) == Counter(f"{number}.png" for number in range(5))
        runner = engine(tmp_path / "run")
        runner.predict(model, data_path=tmp_path / "in", return_predictions=False)
        expected = {row["image_path"]: row for row in read_csv(next((tmp_path / "run").rglob("decisions.csv")))}
        for row in rows:
            same = expected[row["image_path"]]
            assert (row["class_name"], row["decision"]) == (same["class_name"], same["decision"])
            assert float(row["score"]) == pytest.approx(float(same["score"]), abs=1e-6)
        assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 5
        assert len(list((tmp_path / "out" / "maps").rglob("*.png"))) == 5
        assert sum(len(one.regions) for one in RunFiles.read(tmp_path / "out").images) > 0
        assert main(["report", str(tmp_path / "out")]) == 0

    def test_who_comes_later_goes_on(self, watch: Callable[..., FolderWatch], tmp_path: Path) -> None:
        drop(tmp_path / "in", "a.png")
        watching = watch()
        watching.look(), watching.look()
        drop(tmp_path / "in", "b.png")
        watching = watch()
        watching.look(), watching.look()
        assert decided(tmp_path) == {"a.png": 1, "b.png": 1}

    def test_a_file_that_is_replaced_is_another_one(self, watch: Callable[..., FolderWatch], tmp_path: Path) -> None:
        watching = watch()
        for seed in (0, 1):
            drop(tmp_path / "in", "latest.png", seed)
            watching.look(), watching.look()
        assert decided(tmp_path) == {"latest.png": 2}
        assert len({row["score"] for row in table(tmp_path)}) == 2

    def test_a_file_that_grows_waits(self, watch: Callable[..., FolderWatch], tmp_path: Path) -> None:
        whole = drop(tmp_path, "whole.png").read_bytes()
        watching, path = watch(patience=1000.0), tmp_path / "in" / "slow.png"
        for end in (len(whole) // 3, len(whole) // 2):
            path.write_bytes(whole[:end])
            assert watching.look()
            assert watching.look()  # as before, but broken: it may go on
        path.write_bytes(whole)
        assert watching.look()
        assert not watching.look()
        (row,) = table(tmp_path)
        assert row["decision"] in {"good", "anomalous"}

    def test_what_is_no_image_does_no_harm(self, watch: Callable[..., FolderWatch], tmp_path: Path) -> None:
        folder = tmp_path / "in"
        (folder / "folder.png").mkdir()
        (folder / "notes.txt").write_text("x")
        (folder / ".hidden.png").write_bytes(b"x")
        (folder / "broken.png").write_bytes(b"x")
        (folder / "empty.png").write_bytes(b"")
        os.mkfifo(folder / "pipe.png")
        (folder / "nowhere.png").symlink_to(folder / "gone")
        drop(folder, "=cmd().png")
        drop(folder, "line\nbreak.png", 1)
        watching = watch(patience=0.0)
        watching.look()
        drop(folder, "vanishes.png").unlink()
        assert not watching.look()
        assert decided(tmp_path) == {"broken.png": 1, "empty.png": 1, "=cmd().png": 1, "line\nbreak.png": 1}
        words = {Path(row["image_path"]).name: row["decision"] for row in table(tmp_path)}
        assert words["broken.png"] == words["empty.png"] == "unreadable"

    def test_a_file_that_vanishes_between_two_looks(self, watch: Callable[..., FolderWatch], tmp_path: Path) -> None:
        watching, path = watch(), drop(tmp_path / "in", "a.png")
        drop(tmp_path / "in", "b.png", 1)
        watching.look()
        scan = watching._scan

        def vanish() -> Iterator[Any]:
            found = list(scan())
            path.unlink()
            yield from found

        watching._scan = vanish
        watching.look()
        assert decided(tmp_path) == {"b.png": 1}

    def test_an_image_that_does_not_fit_is_not_decided(
        self, april_gan: Build, tmp_path: Path, recwarn: pytest.WarningsRecorder
    ) -> None:
        (tmp_path / "in").mkdir()
        model = april_gan(class_name="bottle", roi=[0, 0, 40, 40]).eval()
        model(torch.rand(1, 3, 40, 40))
        for number, side in enumerate((40, 41, 40)):
            drop(tmp_path / "in", f"{number}.png", number, side)
        watching = FolderWatch(model, tmp_path / "in", tmp_path / "out")
        watching.look(), watching.look()
        words = {Path(row["image_path"]).name: row["decision"] for row in table(tmp_path)}
        assert words.pop("1.png") == "undecided"
        assert set(words.values()) <= {"good", "anomalous"}
        assert any("`roi` is for images of 40 x 40 pixels" in str(one.message) for one in recwarn)

    def test_classes_are_told_by_folders_or_by_the_user(self, april_gan: Build, tmp_path: Path) -> None:
        model = april_gan(class_name=["bottle", "tile"]).eval()
        model.make_ready("predict", is_named=True)
        for name in ("bottle", "tile"):
            drop(tmp_path / "in", f"{name}/0.png")
        for out, given, expected in (("out", None, ["bottle", "tile"]), ("other", "tile", ["tile", "tile"])):
            watching = FolderWatch(model, tmp_path / "in", tmp_path / out, given)
            watching.look(), watching.look()
            assert sorted(row["class_name"] for row in read_csv(tmp_path / out / "decisions.csv")) == expected
        with pytest.raises(ValueError, match="`class_name` must be one of bottle, tile, got 'can'"):
            FolderWatch(model, tmp_path / "in", tmp_path / "third", "can")

    def test_tiles(self, april_gan: Build, tmp_path: Path) -> None:
        model = april_gan(class_name="bottle", tile_size=48).eval()
        model.make_ready("predict")
        for number in range(2):
            drop(tmp_path / "in", f"{number}.png", number, 100 + number)
        watching = FolderWatch(model, tmp_path / "in", tmp_path / "out")
        watching.look(), watching.look()
        assert decided(tmp_path) == {"0.png": 1, "1.png": 1}


class TestFiles:
    def test_what_a_kill_has_torn_is_mended(self, watch: Callable[..., FolderWatch], tmp_path: Path) -> None:
        for number in range(4):
            drop(tmp_path / "in", f"line\n{number}.png", number)
        watching = watch(keep="none")
        watching.look(), watching.look()
        decisions, regions = (tmp_path / "out" / name for name in ("decisions.csv", "regions.csv"))
        whole, of_regions = decisions.read_bytes(), read_csv(regions)
        lines = whole.split(b'"\n"')
        for cut in range(len(lines[-1]) + 2):
            decisions.write_bytes(whole[: len(whole) - cut])
            watch(keep="none")
            left = decided(tmp_path)
            assert set(left.values()) == {1}
            assert len(left) == (4 if cut == 0 else 3)
            assert {row["image_path"] for row in read_csv(regions)} <= {row["image_path"] for row in table(tmp_path)}
        watching = watch(keep="none")
        watching.look(), watching.look()
        assert set(decided(tmp_path).values()) == {1}
        assert len(decided(tmp_path)) == 4
        key = lambda row: (row["image_path"], row["region"])  # noqa: E731
        assert sorted(read_csv(regions), key=key) == sorted(of_regions, key=key)

    def test_bad_folders(self, watch: Callable[..., FolderWatch], model: AprilGAN, tmp_path: Path) -> None:
        watch()
        with pytest.raises(OSError, match="Another process writes to"):
            FolderWatch(model, tmp_path / "in", tmp_path / "out")
        with pytest.raises(ValueError, match="lies in the watched folder"):
            FolderWatch(model, tmp_path / "in", tmp_path / "in" / "results")
        with pytest.raises(ValueError, match="`keep` must be one of anomalous, all, none"):
            FolderWatch(model, tmp_path / "in", tmp_path / "other", keep="some")
        with pytest.raises(ValueError, match="is no folder"):
            FolderWatch(model, tmp_path / "gone", tmp_path / "other")
        (tmp_path / "file").write_text("x")
        with pytest.raises(OSError, match="cannot be written"):
            FolderWatch(model, tmp_path / "in", tmp_path / "file")
        (tmp_path / "run").mkdir()
        text = '"image_path","class_name","score","decision"\n"x.png","","0.5","good"\n'
        (tmp_path / "run" / "decisions.csv").write_text(text)
        with pytest.raises(ValueError, match=r"decisions\.csv is no table of a watched folder"):
            FolderWatch(model, tmp_path / "in", tmp_path / "run")
        assert (tmp_path / "run" / "decisions.csv").read_text() == text

    def test_any_sizes_go_together(self, model: AprilGAN, tmp_path: Path) -> None:
        paths = [drop(tmp_path, f"{side}.png", side, side) for side in (30, 50, 96)]
        images = [read(path)[0] for path in paths]
        together = inspect_images(model, images, [str(path) for path in paths], None, tmp_path)
        alone = torch.cat([model(image[None]).pred_score for image in images])
        assert torch.allclose(together.pred_score, alone, atol=1e-6)


@pytest.fixture
def checkpoint(model: AprilGAN, tmp_path: Path) -> Path:
    runner = engine(tmp_path / "run")
    runner.predict(model, data_path=good("bottle"), return_predictions=False)
    runner.trainer.save_checkpoint(tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


class TestCommand:
    def test_once_and_its_codes(self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        drop(tmp_path / "in", "a.png")
        (tmp_path / "in" / "broken.png").write_bytes(b"x")
        words = ["watch", str(tmp_path / "in"), "--ckpt_path", str(checkpoint), "--once", "--interval", "0.05"]
        fail = ["--fail-on-anomaly", "--patience", "0"]
        assert main([*words, "--out", str(tmp_path / "out"), *fail]) == 1
        assert "2 inspected" in capsys.readouterr().out
        assert main([*words, "--out", str(tmp_path / "out"), *fail]) == 0  # nothing new
        for wrong in (["--interval", "0"], ["--batch_size", "0"], ["--out", str(tmp_path / "in" / "x")]):
            with pytest.raises(SystemExit) as ended:
                main([*words, "--out", str(tmp_path / "out"), *wrong])
            assert ended.value.code == 2

    @pytest.mark.thorough
    def test_it_stops_when_it_is_asked_to(self, checkpoint: Path, tmp_path: Path) -> None:
        drop(tmp_path / "in", "a.png")
        words = [str(COMMAND), "watch", str(tmp_path / "in"), "--ckpt_path", str(checkpoint), "--interval", "0.1"]
        process = subprocess.Popen([*words, "--out", str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
        wait_until(lambda: (tmp_path / "out/decisions.csv").is_file() and table(tmp_path), process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "Stopped. 1 inspected" in output

    @pytest.mark.slow
    def test_ten_thousand_files_and_ten_kills(self, checkpoint: Path, tmp_path: Path) -> None:
        """Files are dropped by another process, some written slowly, some broken, while the watcher is killed."""
        dropping = subprocess.Popen([sys.executable, "-c", DROPPER, str(tmp_path / "in"), "10000"])
        generator, memory = np.random.default_rng(0), []
        words = [str(COMMAND), "watch", str(tmp_path / "in"), "--ckpt_path", str(checkpoint), "--interval", "0.2"]
        words += ["--out", str(tmp_path / "out"), "--patience", "3", "--batch_size", "16"]
        wait_until((tmp_path / "in").is_dir, dropping)
        for _ in range(10):
            process, before = subprocess.Popen(words), rows_in(tmp_path)
            wait_until(lambda before=before: rows_in(tmp_path) > before, process)
            time.sleep(generator.uniform(0.0, 3.0))
            process.kill()
            process.wait()
        process = subprocess.Popen(words)
        assert dropping.wait(timeout=600) == 0
        expected = {*(f"{number:05d}.png" for number in range(10000)), *(f"broken{number}.png" for number in range(10))}
        deadline = time.monotonic() + 1200
        while rows_in(tmp_path) < len(expected) and time.monotonic() < deadline:
            memory.append(psutil.Process(process.pid).memory_info().rss / 2**20)
            time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        found = decided(tmp_path)
        assert set(found) == expected
        assert set(found.values()) == {1}
        keys = Counter((row["image_path"], row["region"]) for row in read_csv(tmp_path / "out" / "regions.csv"))
        assert set(keys.values()) <= {1}
        settled = memory[len(memory) // 5 :]
        assert len(settled) > 20
        assert max(settled) - settled[0] <= 50.0, memory


DROPPER = """
import io, pathlib, sys, time
import numpy as np
from PIL import Image
folder, number = pathlib.Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir()
rng = np.random.default_rng(0)
for place in range(number):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 24, 3)).astype(np.uint8)).save(file, "PNG")
    path, content = folder / f"{place:05d}.png", file.getvalue()
    if place % 500 == 250:  # written slowly
        with path.open("wb", buffering=0) as slow:
            slow.write(content[:300])
            time.sleep(0.5)
            slow.write(content[300:])
    else:
        path.with_name(f".{path.name}").write_bytes(content)
        path.with_name(f".{path.name}").rename(path)
    if place % 1000 == 100:
        (folder / f"broken{place // 1000}.png").write_bytes(content[:100])
        (folder / f"folder{place}.png").mkdir()
        gone = folder / f"gone{place}.png"
        gone.write_bytes(content[:50])
        time.sleep(0.05)
        gone.unlink()
    time.sleep(0.002)
"""


def rows_in(folder: Path) -> int:
    path = folder / "out" / "decisions.csv"
    return path.read_bytes().count(b"\n") - 1 if path.is_file() else 0


def wait_until(condition: Callable[[], object], process: subprocess.Popen[Any], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)
