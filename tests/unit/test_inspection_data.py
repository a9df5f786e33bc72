"""Drawn data on disk: MVTec AD's layout, all or nothing, and the datamodule over it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from PIL import Image

from anomalib_aprilgan.demo import drawing
from anomalib_aprilgan.demo.drawing import DEFECTS, draw_good, folder
from anomalib_aprilgan.demo.inspection import DrawnInspection, write_category
from anomalib_aprilgan.files import _remove_abandoned, temporary_folder

WRITE = (
    "import sys, types\n"
    "for name, folder in (('anomalib_aprilgan', ''), ('anomalib_aprilgan.demo', '/demo')):\n"
    "    sys.modules[name] = types.ModuleType(name); sys.modules[name].__path__ = [sys.argv[1] + folder]\n"
    "from anomalib_aprilgan.demo.drawing import write_category\n"
    "sys.stdin.readline()\n"
    "print(write_category(sys.argv[2], 'pill', image_size=32, num_train=30, num_test=14))\n"
)


def names(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


class TestFolder:
    def test_layout(self, tmp_path: Path) -> None:
        target = write_category(tmp_path, "nut", image_size=32, num_train=3, num_test=5, defects=["stain", "bent"])
        assert target.name == "nut"
        bent, stain = len(list((target / "test/bent").iterdir())), len(list((target / "test/stain").iterdir()))
        assert sorted((bent, stain)) == [2, 3]
        expected = {f"train/good/00{number}.png" for number in range(3)}
        expected |= {f"test/good/00{number}.png" for number in range(5)}
        for kind, count in (("bent", bent), ("stain", stain)):
            expected |= {f"test/{kind}/00{number}.png" for number in range(count)}
            expected |= {f"ground_truth/{kind}/00{number}_mask.png" for number in range(count)}
        assert names(target) == expected
        np.testing.assert_array_equal(pixels(target / "train/good/002.png"), draw_good("nut", 0, 2, 32))
        assert [path.name for path in tmp_path.iterdir()] == [target.parent.name]
        assert [path.name for path in target.parent.iterdir()] == ["nut"]

    def test_masks(self, tmp_path: Path) -> None:
        target = write_category(tmp_path, "wood", image_size=48, num_train=1, num_test=14, seed=3)
        assert {path.name for path in (target / "ground_truth").iterdir()} == set(DEFECTS)
        for kind in DEFECTS:
            mask = pixels(target / "ground_truth" / kind / "000_mask.png")
            bad = pixels(target / "test" / kind / "000.png")
            assert set(np.unique(mask)) == {0, 255}
            index = 1_000_000 * (2 + DEFECTS.index(kind))
            good = draw_good("wood", 3, index, 48)
            np.testing.assert_array_equal(mask == 255, (good != bad).any(axis=2))

    @pytest.mark.parametrize("count", [3, 14, 33])
    def test_even_spread(self, count: int) -> None:
        selection = folder.Selection(32, 1, count, 0, DEFECTS, random_style=False)
        counts = selection.counts("tile")
        padded = [counts.get(kind, 0) for kind in DEFECTS]
        assert sum(padded) == count
        assert max(padded) - min(padded) <= 1

    def test_more_pictures_leave_the_others_alone(self, tmp_path: Path) -> None:
        few = write_category(tmp_path, "grid", image_size=32, num_train=2, num_test=1, defects=["hole"])
        many = write_category(tmp_path, "grid", image_size=32, num_train=4, num_test=3, defects=["hole"])
        for name in ("train/good/001.png", "test/good/000.png", "test/hole/000.png", "ground_truth/hole/000_mask.png"):
            assert (many / name).read_bytes() == (few / name).read_bytes()

    def test_train_and_test_are_different_pictures(self, tmp_path: Path) -> None:
        target = write_category(tmp_path, "tile", image_size=32, num_train=2, num_test=2, defects=["hole"])
        pictures = [path.read_bytes() for path in target.rglob("*/*/00?.png")]
        assert len(pictures) == len(set(pictures)) == 6

    def test_found_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        arguments = {"image_size": 32, "num_train": 1, "num_test": 1}
        target = write_category(tmp_path, "tile", **arguments)
        monkeypatch.setattr(folder, "draw_good", None)  # drawing again would fail
        assert write_category(tmp_path, "tile", **arguments) == target

    @pytest.mark.parametrize("empty", [False, True])
    def test_incomplete_folder_is_replaced(self, tmp_path: Path, *, empty: bool) -> None:
        arguments = {"image_size": 32, "num_train": 2, "num_test": 1, "defects": ["crack"]}
        target = write_category(tmp_path, "tile", **arguments)
        before, lost = names(target), target / "train/good/001.png"
        content = lost.read_bytes()
        lost.unlink()
        if empty:
            lost.touch()
        write_category(tmp_path, "tile", **arguments)
        assert names(target) == before
        assert lost.read_bytes() == content
        assert [path.name for path in target.parent.iterdir()] == ["tile"]

    def test_interrupted_write_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(folder, "draw_twins", interrupt)
            with pytest.raises(KeyboardInterrupt):
                write_category(tmp_path, "tile", image_size=32, num_train=2, num_test=1)
        assert not names(tmp_path)
        assert (write_category(tmp_path, "tile", image_size=32, num_train=2, num_test=1) / "test").is_dir()

    def test_two_processes(self, tmp_path: Path) -> None:
        command = [sys.executable, "-c", WRITE, str(Path(drawing.__file__).parents[2]), str(tmp_path / "new")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        results = [process.communicate(timeout=60) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], results
        assert results[0][0] == results[1][0]
        target = Path(results[0][0].strip())
        assert len(names(target)) == 30 + 14 + 2 * 14
        assert [path.name for path in target.parent.iterdir()] == ["pill"]

    def test_slower_writer_keeps_the_first_copy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        arguments = {"image_size": 32, "num_train": 1, "num_test": 1}
        draw_into, stamps = folder._draw_into, []

        def overtaken(*given: object) -> None:
            draw_into(*given)
            monkeypatch.setattr(folder, "_draw_into", draw_into)
            stamps.append((write_category(tmp_path, "tile", **arguments) / "train").stat().st_ino)

        monkeypatch.setattr(folder, "_draw_into", overtaken)
        target = write_category(tmp_path, "tile", **arguments)
        assert [(target / "train").stat().st_ino] == stamps
        assert [path.name for path in target.parent.iterdir()] == ["tile"]

    @pytest.mark.parametrize("place", ["root", "category"])
    def test_file_in_the_way(self, tmp_path: Path, place: str) -> None:
        blocked = tmp_path / "data"
        if place == "category":
            target = write_category(blocked, "nut", image_size=32, num_train=1, num_test=1)
            blocked = target.parent / "tile"
        blocked.write_text("here first")
        with pytest.raises(NotADirectoryError, match=r"A file lies where the folder .*tile is needed; move it away"):
            write_category(tmp_path / "data", "tile", image_size=32, num_train=1, num_test=1)
        assert blocked.read_text() == "here first"

    def test_not_writable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(PermissionError, match=r"Cannot write the drawn pictures to .*tile .*choose another `root`"):
            write_category(tmp_path, "tile", image_size=32, num_train=1, num_test=1)


class TestDatamodule:
    def test_batches(self, tmp_path: Path) -> None:
        data = DrawnInspection(tmp_path, "gear", image_size=48, num_train=5, num_test=16, eval_batch_size=40)
        data.prepare_data()
        data.setup()
        assert (data.name, data.category) == ("DrawnInspection", "gear")
        assert (len(data.train_data), len(data.test_data), len(data.val_data)) == (5, 32, 32)
        batch = next(iter(data.test_dataloader()))
        assert batch.image.shape == (32, 3, 48, 48)
        assert batch.gt_label.sum() == 16
        torch.testing.assert_close(batch.gt_mask.flatten(1).any(dim=1), batch.gt_label.bool())
        train = next(iter(data.train_dataloader()))
        assert not train.gt_label.any()

    def test_readable_by_mvtec_ad(self, tmp_path: Path) -> None:
        data = DrawnInspection(tmp_path, "leather", image_size=32, num_train=4, num_test=6)
        data.prepare_data()
        reader = MVTecAD(root=data.dataset_root, category="leather", num_workers=0)
        reader.prepare_data()
        reader.setup()
        assert len(reader.train_data) == 4
        assert sorted(reader.test_data.samples.label_index) == [0] * 6 + [1] * 6
        masks = reader.test_data.samples.set_index("image_path").mask_path
        for image, mask in masks.items():
            good = Path(image).parent.name == "good"
            assert (not mask) == good
            assert good or Path(mask).name == f"{Path(image).stem}_mask.png"

    def test_every_selection_has_its_folder(self, tmp_path: Path) -> None:
        changes = [
            {}, {"image_size": 64}, {"num_train": 3}, {"num_test": 3}, {"seed": 1}, {"random_style": True},
            {"defects": ["hole"]}, {"defects": ["stain"]},
        ]  # fmt: skip
        roots = [DrawnInspection(tmp_path, **change).dataset_root for change in changes]
        assert len(set(roots)) == len(changes)
        assert {root.parent for root in roots} == {tmp_path}
        same = DrawnInspection(tmp_path, defects=["stain", "hole", "stain"]).dataset_root
        assert same == DrawnInspection(tmp_path, defects=["hole", "stain"]).dataset_root
        assert DrawnInspection(tmp_path, defects=list(DEFECTS)).dataset_root == roots[0]

    def test_setup_before_prepare(self, tmp_path: Path) -> None:
        data = DrawnInspection(tmp_path, "tile")
        with pytest.raises(RuntimeError, match=r"No pictures in .*tile; call `prepare_data\(\)` before `setup\(\)`"):
            data.setup()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"category": "hazelnut"}, r"`category` must be one of bearing, .*got 'hazelnut'\."),
            ({"image_size": 2048}, r"`image_size` must be an int in \[32, 1024\] .*got 2048\."),
            ({"num_train": 0}, r"`num_train` must be an int in \[1, 1000000\] .*got 0\."),
            ({"num_test": -2}, r"`num_test` must be an int in \[1, 1000000\] .*got -2\."),
            ({"num_test": 2.5}, r"`num_test` must be .*got 2\.5\."),
            ({"seed": -1}, r"`seed` must be an int of at least 0, got -1\."),
            ({"defects": ["hole", "rust"]}, r"`defects` must be None or a list of some of bent, .*'rust'\]\."),
            ({"defects": []}, r"`defects` must be None or a list .*got \[\]\."),
            ({"defects": "hole"}, r"`defects` must be None or a list .*got 'hole'\."),
        ],
    )
    def test_bad_arguments(self, tmp_path: Path, change: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DrawnInspection(tmp_path, **change)
        assert not list(tmp_path.iterdir())


def test_a_draft_of_a_killed_writer_goes_with_the_next(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    target = write_category(tmp_path, "tile", image_size=32, num_train=1, num_test=1)
    with temporary_folder(target.parent) as own:
        draft = own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{gone.pid}-"))
    (draft / "train").mkdir(parents=True)
    _remove_abandoned.cache_clear()
    write_category(tmp_path, "nut", image_size=32, num_train=1, num_test=1)
    assert {path.name for path in target.parent.iterdir()} == {"tile", "nut"}
