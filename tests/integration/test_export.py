"""One model in five run times: Engine, ``forward``, TorchInferencer, ONNX Runtime and OpenVINO agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from PIL import Image

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.runtime.openvino_core import FULL_PRECISION, compiled

from ..conftest import DATASET

MAPS, SCORES = 1e-4, 1e-5  # the same tensor in
MAPS_FROM_FILES, SCORES_FROM_FILES = 0.02, 1e-3
REFERENCES = str(DATASET / "bottle" / "train" / "good")
# Larger, smaller and not square, against the model's 96 x 96.
SIZES = [(160, 160), (61, 47), (40, 200), (96, 96)]
pytestmark = pytest.mark.thorough  # the default tests have an export in test_deployment.py


@dataclass(frozen=True)
class Exported:
    """A model and what anomalib's export wrote of it, image size left open."""

    model: AprilGAN
    torch: Path
    onnx: Path
    openvino: Path


@pytest.fixture(scope="module", params=[0, 4], ids=["zero-shot", "few-shot"])
def exported(
    april_gan: Callable[..., AprilGAN], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    model = april_gan(class_name="bottle", k_shot=request.param, references=REFERENCES if request.param else None)
    model.setup("predict")
    # Scores and maps before the scale that validation learns: the tolerances are about those.
    model.post_processor.enable_normalization = False
    root = tmp_path_factory.mktemp("exported")
    return Exported(model, model.to_torch(root), model.eval().to_onnx(root), model.to_openvino(root))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of other sizes than the model's, with structure at every scale."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    source = Image.open(DATASET / "bottle" / "test" / "scratch" / "000.png").convert("RGB")
    for number, (height, width) in enumerate(SIZES):
        pixels = np.asarray(source.resize((width, height)), dtype=np.int16) + rng.integers(-20, 20, (height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def _onnx_runner(path: Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {session.get_inputs()[0].name: images}), strict=True))


def test_onnx_and_openvino_agree_with_torch_for_any_batch(exported: Exported) -> None:
    run_onnx = _onnx_runner(exported.onnx)
    run_openvino = compiled(exported.openvino)
    for batch in (1, 3):
        images = torch.rand(batch, 3, 96, 96, generator=torch.Generator().manual_seed(batch))
        images = (images * 255).round() / 255
        with torch.no_grad():
            expected = exported.model(images)
        by_onnx, by_openvino = run_onnx(images.numpy()), run_openvino(images.numpy())
        for name, tolerance in (("anomaly_map", MAPS), ("pred_score", SCORES)):
            reference = getattr(expected, name).numpy()
            assert by_onnx[name].shape == by_openvino[name].shape == reference.shape
            assert np.abs(by_onnx[name] - reference).max() < tolerance
            assert np.abs(by_openvino[name] - reference).max() < tolerance


@pytest.mark.slow
def test_export_at_a_fixed_size_keeps_the_batch_open(april_gan: Callable[..., AprilGAN], tmp_path: Path) -> None:
    model = april_gan(class_name="bottle")
    run_onnx = _onnx_runner(model.to_onnx(tmp_path, input_size=(120, 80)))
    images = torch.rand(3, 3, 120, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval()(images)
    assert np.abs(run_onnx(images.numpy())["anomaly_map"] - expected.anomaly_map.numpy()).max() < MAPS_FROM_FILES


def test_options_are_exported(
    april_gan: Callable[..., AprilGAN], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    options = {"smoothing_sigma": 1.5, "neighbourhood": 3, "top_share": 0.02, "aspect_ratio": 1.5}
    model = april_gan(class_name="bottle", k_shot=2, references=REFERENCES, **options)
    model.setup("predict")
    model.post_processor.enable_normalization = False
    onnx = model.eval().to_onnx(tmp_path)
    run_onnx = _onnx_runner(onnx)
    run_openvino = compiled(onnx)  # what `to_openvino` starts from
    by_torch = TorchInferencer(model.to_torch(tmp_path), device="cpu").model
    images = torch.rand(3, 3, 80, 112, generator=torch.Generator().manual_seed(0))
    images = (images * 255).round() / 255
    with torch.no_grad():
        expected, from_file = model(images), by_torch(images)
    outputs = (run_onnx(images.numpy()), run_openvino(images.numpy()), from_file._asdict())
    for name, tolerance in (("anomaly_map", MAPS), ("pred_score", SCORES)):
        reference = getattr(expected, name).numpy()
        assert reference.shape == ((3, 80, 112) if name == "anomaly_map" else (3,))
        assert all(np.abs(np.asarray(output[name]) - reference).max() < tolerance for output in outputs)


def test_exports_leave_the_text_tower_out(exported: Exported) -> None:
    text_bytes = 4 * sum(parameter.numel() for parameter in exported.model.model.backbone.text.parameters())
    for path in (exported.torch, exported.onnx, exported.openvino):
        assert sum(file.stat().st_size for file in path.parent.iterdir()) < text_bytes
    assert exported.model.model.backbone.text is not None  # the model itself keeps it


def test_every_run_time_gives_the_same_for_image_files(
    exported: Exported, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # OpenVINOInferencer leaves a cache folder
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    torch_inferencer = TorchInferencer(exported.torch, device="cpu")
    openvino_inferencer = OpenVINOInferencer(exported.openvino, device="CPU", config=FULL_PRECISION)
    run_onnx = _onnx_runner(exported.onnx)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1)
    predictions = {Path(batch.image_path[0]).name: batch for batch in engine.predict(exported.model, data_path=folder)}
    assert len(predictions) == len(SIZES)
    for file in sorted(folder.iterdir()):
        image = torch.as_tensor(read_image(file, as_tensor=True))[None]
        with torch.no_grad():
            direct = exported.model(image)
            by_torch = torch_inferencer.predict(file)
        by_onnx, by_openvino = run_onnx(image.numpy()), openvino_inferencer.predict(file)
        expected_map = np.asarray(predictions[file.name].anomaly_map)
        expected_score = float(predictions[file.name].pred_score)
        for anomaly_map, score in (
            (direct.anomaly_map, direct.pred_score),
            (by_torch.anomaly_map, by_torch.pred_score),
            (by_openvino.anomaly_map, by_openvino.pred_score),
            (by_onnx["anomaly_map"], by_onnx["pred_score"]),
        ):
            assert np.abs(np.asarray(anomaly_map) - expected_map).max() < MAPS_FROM_FILES
            assert abs(float(np.asarray(score).squeeze()) - expected_score) < SCORES_FROM_FILES
