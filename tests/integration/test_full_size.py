"""The model as it is by default, ViT-L/14 at 518 x 518 pixels: what the small one of all other tests cannot show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import open_clip
import pytest
import torch
from anomalib import LearningType
from PIL import Image
from safetensors.torch import save_file

from anomalib_aprilgan import AprilGAN

from ..conftest import DATASET
from .runs import engine, good

STAGES = 4


@dataclass(frozen=True)
class LargeClip:
    """Files of weights drawn at random, and of adapters for them."""

    weights: Path
    adapters: Path


@pytest.fixture
def large_clip(tmp_path: Path) -> Iterator[LargeClip]:
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-L-14-336")  # without weights: those that its parts are initialised with
    files = LargeClip(tmp_path / "clip.safetensors", tmp_path / "adapters.pth")
    save_file({name: value.contiguous() for name, value in clip.state_dict().items()}, files.weights)
    del clip
    adapters = {}
    for stage in range(STAGES):
        adapters[f"fc.{stage}.weight"] = 0.02 * torch.randn(768, 1024)
        adapters[f"fc.{stage}.bias"] = 0.02 * torch.randn(768)
    torch.save({"trainable_linearlayer": adapters}, files.adapters)
    yield files
    files.weights.unlink()  # 1.7 GB


@pytest.mark.slow  # builds ViT-L twice and runs it at full size: minutes and 5 GB
@pytest.mark.timeout(1800)
def test_default_model_end_to_end(large_clip: LargeClip, tmp_path: Path) -> None:
    model = AprilGAN(
        pretrained=str(large_clip.weights),
        adapters=str(large_clip.adapters),
        class_name="bottle",
        k_shot=1,
        references=[str(good("bottle") / "000.png")],
    )
    assert model.learning_type == LearningType.FEW_SHOT
    model.setup("predict")
    assert model.model.stages == (6, 12, 18, 24)
    assert model.model.few_shot.features(0).shape == (1, 4 * 37 * 37 * 1024)
    assert model.model.text_features.shape == (1, 768, 2)

    image = tmp_path / "large.png"
    Image.open(DATASET / "bottle" / "test" / "hole" / "000.png").resize((900, 700)).save(image)
    runner = engine(tmp_path / "runs")
    (batch,) = runner.predict(model, data_path=image)
    assert batch.anomaly_map.shape == batch.pred_mask.shape == (1, 518, 518)
    for values in (batch.anomaly_map, batch.pred_score):
        assert torch.isfinite(values).all()
        assert values.min() >= 0
        assert values.max() <= 1
    assert batch.anomaly_map.std() > 0

    with torch.no_grad():
        raw = model.predict(torch.rand(1, 3, 300, 400, generator=torch.Generator().manual_seed(0)))
    assert raw.anomaly_map.shape == (1, 518, 518)
    assert [maps.shape for maps in raw.stage_probabilities] == [(1, 2, 518, 518)] * STAGES
    assert 0 <= raw.anomaly_map.min() <= raw.anomaly_map.max() <= model.model.map_ceiling

    runner.trainer.save_checkpoint(tmp_path / "own.ckpt")
    assert (tmp_path / "own.ckpt").stat().st_size < 40e6  # adapters and bank, not CLIP
