"""Exports with all classes, in tiles, in fewer bits, and with other thresholds."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from PIL import Image

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan import command as command_line
from anomalib_aprilgan.data import MultiCategoryData
from anomalib_aprilgan.runtime import Inferencer
from anomalib_aprilgan.runtime.changes import change, undo
from anomalib_aprilgan.runtime.openvino_core import FULL_PRECISION, compiled
from anomalib_aprilgan.runtime.values import open_values

from .. import hostile
from ..conftest import DATASET

CLASSES = ["bottle", "tile", "metal_nut"]
GOOD = {name: str(DATASET / name / "train" / "good") for name in CLASSES if (DATASET / name).is_dir()}
Build = Callable[..., AprilGAN]


def pictures(number: int, height: int = 61, width: int = 83, seed: int = 0) -> torch.Tensor:
    images = torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return (images * 255).round() / 255


def runs(path: Path) -> list[Callable[..., dict[str, np.ndarray]]]:
    """An ONNX file in ONNX Runtime and in OpenVINO."""
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    inputs = [one.name for one in session.get_inputs()]
    graph = compiled(path)

    def in_onnxruntime(*values: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, dict(zip(inputs, values, strict=True))), strict=True))

    def in_openvino(*values: np.ndarray) -> dict[str, np.ndarray]:
        found = graph(list(values))
        return {name: found[name] for name in names}

    return [in_onnxruntime, in_openvino]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deployed")


@pytest.fixture(scope="module")
def single(april_gan: Build, root: Path) -> tuple[AprilGAN, Path]:
    """A few-shot model of one class and what was exported of it: ONNX, OpenVINO, torch, and a checkpoint."""
    model = april_gan(class_name="bottle", k_shot=2, references=GOOD["bottle"])
    model.setup("predict")
    model.eval().post_processor.set_values(image_threshold=0.4, pixel_threshold=2.0)
    folder = root / "single"
    model.to_onnx(folder)
    model.to_openvino(folder)
    model.to_torch(folder)
    engine = Engine(default_root_dir=folder, accelerator="cpu", devices=1, logger=False)
    engine.predict(model, data_path=DATASET / "bottle" / "test" / "good")
    engine.trainer.save_checkpoint(folder / "model.ckpt")
    return model, folder


def file_of(folder: Path, kind: str) -> Path:
    return folder / (
        "model.ckpt"
        if kind == "ckpt"
        else f"weights/{ {'xml': 'openvino', 'pt': 'torch'}.get(kind, kind) }/model.{kind}"
    )


KINDS = ["xml", "onnx", "pt", "ckpt"]


# -- many classes in one graph --------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("k_shot", [0, 2])
def test_a_batch_of_mixed_classes(
    april_gan: Build, tmp_path: Path, k_shot: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(GOOD)
    roi = {names[0]: [5, 5, 60, 80]}
    model = april_gan(
        class_name=names,
        k_shot=k_shot,
        references=GOOD if k_shot else None,
        neighbourhood=3,
        roi=roi if k_shot == 0 else None,
        export_options={"class_index": True},
    )
    images = pictures(5, 96, 96)
    model.make_ready("predict", is_named=True, frame=(96, 96))
    for row, name in enumerate(names):
        model.post_processor.of_class(name).set_values(image_threshold=0.3 + 0.1 * row, pixel_threshold=1.0 + 0.3 * row)
    model.eval()
    onnx = model.to_onnx(tmp_path)
    assert json.loads((onnx.parent / "metadata.json").read_text())["model.onnx"]["classes"] == names
    for rows in ([0, 1, len(names) - 1, 1, 0], [1]):
        batch, index = images[: len(rows)], torch.tensor(rows)
        with torch.no_grad():
            expected = model(batch, class_index=index)
            by_name = model(batch, class_name=[names[row] for row in rows])
        assert torch.equal(expected.pred_score, by_name.pred_score)
        for run in runs(onnx):
            found = run(batch.numpy(), index.numpy())
            assert np.abs(found["pred_score"] - expected.pred_score.numpy()).max() < 1e-5
            assert np.abs(found["anomaly_map"] - expected.anomaly_map.numpy()).max() < 1e-4
            assert (found["pred_label"] == expected.pred_label.numpy()).all()
    for run in runs(onnx):
        unknown = run(images[:2].numpy(), np.array([len(names), -1]))
        assert np.isnan(unknown["pred_score"]).all()
        assert unknown["pred_label"].all()
    with pytest.raises(ValueError, match=r"`class_index` must be 2 whole numbers"):
        model(images[:2], class_index=torch.tensor([0, len(names)]))
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    by_torch = TorchInferencer(model.to_torch(tmp_path), device="cpu").model
    assert torch.equal(by_torch(images[:1], class_index=torch.tensor([1])).pred_score, by_name.pred_score)


# -- tiles, without torch -------------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys
for name in ("torch", "anomalib", "lightning"):
    sys.modules[name] = None  # importing them fails
import numpy as np
from anomalib_aprilgan_runtime import Inferencer

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

image = np.load(sys.argv[2])
model = Inferencer(sys.argv[1], sys.argv[3])
model.predict(image[:64, :64])
before = peak()
found = model.predict(image)
np.savez(sys.argv[4], score=found.pred_score, label=found.pred_label, map=found.anomaly_map, mask=found.pred_mask)
print(peak() - before)
"""


@pytest.mark.thorough
def test_a_large_image_in_tiles_without_torch(april_gan: Build, tmp_path: Path) -> None:
    model = april_gan(class_name="bottle", k_shot=2, references=GOOD["bottle"], tile_size=512, tile_overlap=0.25)
    model.setup("predict")
    model.eval().post_processor.set_values(pixel_threshold=2.5)
    paths = [model.to_onnx(tmp_path), model.to_openvino(tmp_path)]
    image = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(image).resize((4096, 2048), Image.Resampling.BICUBIC))
    np.save(tmp_path / "image.npy", image)
    with torch.no_grad():
        expected = model(torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 255)[None])
    for path, engine in ((paths[0], "onnxruntime"), (paths[0], "openvino"), (paths[1], "openvino")):
        arguments = [str(path), str(tmp_path / "image.npy"), engine, str(tmp_path / "found.npz")]
        run = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        assert int(run.stdout) < 1e9
        found = np.load(tmp_path / "found.npz")
        assert abs(found["score"] - float(expected.pred_score)) < 1e-4
        assert found["map"].shape == (2048, 4096)
        assert np.abs(found["map"] - expected.anomaly_map[0].numpy()).max() < 1e-3
        assert (found["mask"] != expected.pred_mask[0].numpy()).mean() < 1e-4
        assert bool(found["label"]) == bool(expected.pred_label)
    assert change(paths[1], {"pixel": 0.5})[1]["bottle"]["pixel_threshold"] == 0.5
    assert Inferencer(paths[1]).predict(image[:600, :600]).pred_mask.mean() > 0.9


SIGNALLED = """
import faulthandler, signal, sys
faulthandler.enable()
import _anomalib_aprilgan_startup as startup
startup.is_light = True
import numpy as np
from anomalib_aprilgan.runtime import Inferencer

models = [Inferencer(sys.argv[1]) for _ in range(2)]
image = np.zeros((64, 64, 3), np.uint8)
scores = [model.predict(image).pred_score for model in models]
while models:
    models.pop(0)  # the older one first
told = []
signal.signal(signal.SIGALRM, lambda *_: told.append("alarm"))
signal.raise_signal(signal.SIGALRM)
print(*told, scores[0] == scores[1])
"""


def test_a_signal_after_models_have_gone(single: tuple[AprilGAN, Path]) -> None:
    """OpenVINO's cores leave a stack of signal handlers that is gone; loaders of torch have handlers."""
    arguments = [sys.executable, "-c", SIGNALLED, str(file_of(single[1], "xml"))]
    run = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "alarm True\n"), run.stderr


def test_the_runtime_names_what_is_wrong(single: tuple[AprilGAN, Path], tmp_path: Path) -> None:
    _, folder = single
    model = Inferencer(file_of(folder, "xml"))
    for image in (np.zeros((4, 4)), np.zeros((4, 4, 3), int), np.full((4, 4, 3), np.nan), "image.png"):
        with pytest.raises(ValueError, match=r"`image` must be"):
            model.predict(image)
    with pytest.raises(ValueError, match=r"`class_name` must be one of bottle, got 'nut'"):
        model.predict(np.zeros((8, 8, 3), np.uint8), "nut")
    with pytest.raises(ValueError, match=r"`engine` must be"):
        Inferencer(file_of(folder, "xml"), "onnxruntime")
    with pytest.raises(FileNotFoundError, match=r"metadata\.json"):
        Inferencer(shutil.copy(file_of(folder, "onnx"), tmp_path))
    shutil.copytree(file_of(folder, "xml").parent, tmp_path / "broken")
    (tmp_path / "broken" / "model.xml").write_text("no XML")
    with pytest.raises(ValueError, match=r"cannot be read by openvino"):
        Inferencer(tmp_path / "broken" / "model.xml")


def test_a_batch_in_every_run_time(single: tuple[AprilGAN, Path]) -> None:
    model, folder = single
    images = pictures(3, 96, 96)  # another size would be resized to 8 bits, where rounding tips
    with torch.no_grad():
        expected = model(images)
    for run in (*runs(file_of(folder, "onnx")), compiled(file_of(folder, "xml"))):
        found = run(images.numpy())
        assert np.abs(found["pred_score"] - expected.pred_score.numpy()).max() < 1e-5
        assert np.abs(found["anomaly_map"] - expected.anomaly_map.numpy()).max() < 1e-4
        assert (found["pred_label"] == expected.pred_label.numpy()).all()


# -- thresholds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_change_decisions_and_nothing_else(
    single: tuple[AprilGAN, Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(tmp_path)  # where OpenVINOInferencer keeps compiled models, which must not outlive a change
    model, folder = single
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    path = file_of(copied, kind)
    picture = DATASET / "bottle" / "test" / "scratch" / "000.png"

    def predicted() -> Any:
        if kind == "pt":
            return TorchInferencer(path, device="cpu").predict(picture)
        if kind == "ckpt":
            loaded = AprilGAN.load_from_checkpoint(path)
            loaded.eval()
            return loaded(torch.as_tensor(read_image(picture, as_tensor=True))[None])
        return OpenVINOInferencer(path, device="CPU", config=FULL_PRECISION).predict(picture)

    assert open_values(path).read()["bottle"] == pytest.approx(model.post_processor.values())
    before, content = predicted(), {file: file.read_bytes() for file in path.parent.glob("model.*")}
    for threshold, label in ((0.99, False), (0.01, True)):
        assert change(path, {"image": threshold})[1]["bottle"]["image_threshold"] == np.float32(threshold)
        after = predicted()
        assert bool(np.asarray(after.pred_label).reshape(-1)[0]) is label
        assert np.array_equal(np.asarray(after.anomaly_map), np.asarray(before.anomaly_map))
    undo(path)
    undo(path)
    again = predicted()
    assert np.array_equal(np.asarray(again.pred_score), np.asarray(before.pred_score))
    if kind in {"xml", "onnx"}:
        assert {file: file.read_bytes() for file in content} == content
    with pytest.raises(ValueError, match=r"no change of .* to take back"):
        undo(path)


KILLED = """
import sys
from pathlib import Path
from anomalib_aprilgan.runtime.changes import change
number = 0
while True:
    number += 1
    change(Path(sys.argv[1]), {"image": (number % 90 + 1) / 100})
    print(number, flush=True)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_that_is_killed_leaves_a_whole_file(single: tuple[AprilGAN, Path], tmp_path: Path, kind: str) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(single[1], copied)
    path = file_of(copied, kind)
    code = "import _anomalib_aprilgan_startup as s; s.is_light = True\n" + KILLED
    for attempt in range(4):
        with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(0.01 * attempt + 0.003)
            os.kill(process.pid, signal.SIGKILL)
        values = open_values(path).read()["bottle"]
        assert 0.01 <= values["image_threshold"] <= 0.91
        assert values["pixel_threshold"] == 2.0
        change(path, {"image": 0.5})
        assert undo(path)[1]["bottle"] == values


@pytest.mark.parametrize(
    ("given", "class_name", "message"),
    [
        ({"image": float("nan")}, None, "`image_threshold` must be a number from 0 to 1, got nan"),
        ({"image": 1.5}, None, "`image_threshold` must be a number from 0 to 1, got 1.5"),
        ({"pixel": -1.0}, None, "`pixel_threshold` must be a number from 0"),
        ({"pixel": float("inf")}, None, "`pixel_threshold` must be a number from 0"),
        ({"pixels": 1.0}, None, "`pixels` cannot be set"),
        ({"image_min": 0.9, "image_max": 0.2}, None, "`image_min` must be below `image_max`"),
        ({"image": 0.4}, "nut", "`class_name` must be one of bottle, got 'nut'"),
        ({}, None, "Nothing to set"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_thresholds_change_nothing(
    single: tuple[AprilGAN, Path], kind: str, given: dict[str, float], class_name: str | None, message: str
) -> None:
    path = file_of(single[1], kind)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    with pytest.raises(ValueError, match=message):
        change(path, given, class_name)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir() if file.is_file()} == before


def test_files_that_are_not_ours(single: tuple[AprilGAN, Path], tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(single[1], copied)
    path = file_of(copied, "xml")
    text = path.read_text()
    place = text.index('post_processor.table"')
    start, end = text.index("<data", place), text.index("/>", place)
    for old, new in (
        ('shape="1, 10"', 'shape="2, 5"'),
        ('element_type="f32"', 'element_type="f16"'),
        ('size="40"', 'size="44"'),
    ):
        edited = text[start:end].replace(old, new)
        assert edited != text[start:end]
        path.write_text(text[:start] + edited + text[end:])
        with pytest.raises(ValueError, match=r"edited by hand"):
            open_values(path).read()
    path.write_text(text.replace("post_processor.table", "table"))
    with pytest.raises(ValueError, match=r"it has 0 tables"):
        open_values(path).read()
    path.write_text(text)
    binary = path.with_suffix(".bin")
    binary.write_bytes(binary.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"ends before its table"):
        open_values(path).read()
    file_of(copied, "onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"no export of anomalib-aprilgan"):
        open_values(file_of(copied, "onnx")).read()
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"is no checkpoint of an AprilGAN"):
        open_values(tmp_path / "other.ckpt")
    (tmp_path / "other.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"is no file that torch wrote"):
        open_values(tmp_path / "other.pt")


def test_checkpoints_of_the_first_version_are_told_apart(tmp_path: Path) -> None:
    path = next((Path(__file__).parents[1] / "data" / "checkpoints_0_1_0").glob("*.ckpt"))
    with pytest.raises(ValueError, match=r"written by 0\.1\.0.*save"):
        open_values(Path(shutil.copy(path, tmp_path)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_threshold_that_is_not_a_number_is_refused(single: tuple[AprilGAN, Path], tmp_path: Path, kind: str) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(file_of(single[1], kind).parent, copied, ignore=shutil.ignore_patterns("weights"))
    path = copied / file_of(single[1], kind).name
    change(path, {"image": 0.4321})
    old, new = (np.float32(value).tobytes() for value in (0.4321, np.nan))
    if kind in {"pt", "ckpt"}:  # whose records have a checksum
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, record in records.items():
                archive.writestr(name, record.replace(old, new))
    else:
        for file in copied.iterdir():
            file.write_bytes(file.read_bytes().replace(old, new))
    with pytest.raises(ValueError, match=r"not a number"):
        open_values(path).read()


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_changed_as_a_whole_or_refused_by_name(
    single: tuple[AprilGAN, Path], tmp_path: Path, kind: str
) -> None:
    copied, draw, results = tmp_path / "copied", random.Random(kind), {}  # noqa: S311  # no secret
    shutil.copytree(file_of(single[1], kind).parent, copied, ignore=shutil.ignore_patterns("weights"))
    path = copied / file_of(single[1], kind).name
    whole = path.read_bytes()
    for number in range(150):
        damaged = hostile.damaged(whole[:20000], draw) + whole[20000:-20000] + hostile.damaged(whole[-20000:], draw)
        path.write_bytes(damaged)
        before = sorted(copied.iterdir())
        results[str(number)] = hostile.outcome(lambda: change(path, {"image": 0.5}), [str(copied)])
        if results[str(number)] != "ok":
            assert path.read_bytes() == damaged
            assert sorted(copied.iterdir()) == before
        (copied / f"{path.name}.thresholds.json").unlink(missing_ok=True)
    assert set(results.values()) <= {"ok", "refused"}, results
    assert "refused" in results.values()


class Harmful:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_file_runs_code(tmp_path: Path) -> None:
    torch.save({"model": Harmful(tmp_path / "made")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"is no export of an AprilGAN"):
        open_values(tmp_path / "model.pt")
    assert not (tmp_path / "made").exists()
    pickle.loads(pickle.dumps(Harmful(tmp_path / "made")))  # noqa: S301  # it would have
    assert (tmp_path / "made").exists()


def test_the_command(single: tuple[AprilGAN, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(single[1], copied)
    path = str(file_of(copied, "xml"))
    assert command_line.main(["thresholds", path, "--set", "image=0.62", "pixel=1.5"]) == 0
    assert "image_threshold 0.62 (was 0.4)" in capsys.readouterr().out
    assert command_line.main(["thresholds", path, "--undo"]) == 0
    capsys.readouterr()
    assert command_line.main(["thresholds", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bottle"]["image_threshold"] == pytest.approx(0.4)
    for bad in (["--set", "image"], ["--set", "image=0.5", "--undo"], ["--class_name", "nut"], ["--set", "image=2"]):
        with pytest.raises(SystemExit) as ended:
            command_line.main(["thresholds", path, *bad])
        assert ended.value.code == 2


# -- fewer bits -----------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["fp16", pytest.param("int8", marks=pytest.mark.slow), "int8_ptq"])
def test_compressed(single: tuple[AprilGAN, Path], tmp_path: Path, kind: str) -> None:
    model, _ = single
    path = model.to_openvino(tmp_path, compression_type=kind)
    report = json.loads((path.parent / "metadata.json").read_text())["model.xml"]["compression"]
    assert report["type"] == kind
    assert report["layers"] == (0 if kind == "fp16" else 17)
    assert report["images"].endswith("from the references")
    assert report["megabytes"]["after"] < report["megabytes"]["before"]
    moved = report["thresholds"]["bottle"]["image_threshold"]
    assert open_values(path).read()["bottle"]["image_threshold"] == pytest.approx(moved["after"])
    assert moved["before"] == pytest.approx(0.4)
    images = pictures(3)
    with torch.no_grad():
        expected = model(images)
    found = compiled(path)(images.numpy())
    assert 0 < np.abs(found["anomaly_map"] - expected.anomaly_map.numpy()).mean() < 0.02
    assert np.abs(found["pred_score"] - expected.pred_score.numpy()).max() < 0.02
    assert model.post_processor.values()["image_threshold"] == pytest.approx(0.4)  # the model itself stays


@pytest.mark.thorough
def test_compression_that_cannot_be_had(april_gan: Build, tmp_path: Path) -> None:
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False)
    model = april_gan(class_name="bottle")
    with pytest.raises(ValueError, match=r"needs normal images"):
        engine.export(model, "openvino", tmp_path / "out", compression_type="int8_ptq")
    with pytest.raises(ValueError, match=r"INT8_ACQ"):
        model.to_openvino(tmp_path / "out", compression_type="int8_acq")
    few = april_gan(class_name="bottle", export_options={"max_flips": 0.0, "images": GOOD["bottle"]})
    few.setup("predict")
    with pytest.MonkeyPatch.context() as patch:
        changed = {"changed_decisions": 3, "share": 0.1}
        patch.setattr("anomalib_aprilgan.deployment.compression._changes", lambda *_: changed)
        with pytest.raises(ValueError, match=r"changes 3 decisions .* more than `max_flips=0.0`"):
            few.to_openvino(tmp_path / "out", compression_type="int8_ptq")
    assert not list((tmp_path / "out").rglob("*.*"))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"classes": True}, "must be some of class_index, images, max_flips, got classes"),
        ({"class_index": 1}, "`export_options.class_index` must be true or false"),
        ({"max_flips": 2.0}, r"`export_options.max_flips` must lie in \[0, 1\]"),
        ([1], "must be a mapping"),
    ],
)
def test_bad_options(april_gan: Build, options: Any, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        april_gan(export_options=options)


@pytest.mark.thorough
def test_int8_with_the_images_of_a_datamodule(april_gan: Build, tmp_path: Path) -> None:
    """Several classes, in one graph, calibrated: the images of each are those of its own."""
    names = list(GOOD)
    data = MultiCategoryData(dataset="mvtec", root=DATASET, categories=names, num_workers=0)
    model = april_gan(class_name=names, calibration=GOOD, false_positive_rate=0.5, export_options={"class_index": True})
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False)
    path = engine.export(model, "openvino", tmp_path, compression_type="int8_ptq", datamodule=data)
    report = json.loads((path.parent / "metadata.json").read_text())["model.xml"]["compression"]
    assert report["images"].endswith("from the datamodule")
    assert list(report["thresholds"]) == names
    images, rows = pictures(3, 96, 96), np.array([0, 2, 1])
    with torch.no_grad():
        expected = model(images, class_index=torch.from_numpy(rows))
    found = compiled(path)([images.numpy(), rows])
    assert np.abs(found["pred_score"] - expected.pred_score.numpy()).max() < 0.05
