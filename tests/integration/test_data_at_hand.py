"""Images, masks and references of a run get the same preparation, whatever their sizes and their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, RandomHorizontalFlip

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.data.reading import UnreadableImageError

Build = Callable[..., AprilGAN]
SIZES = [(96, 96), (40, 120), (130, 64), (96, 70)]


class NoFloat64(TorchDispatchMode):
    """As on an accelerator without double precision."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, found)):
            assert not (isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64), func
        return found


def picture(height: int, width: int, seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(90, 160, (height // 8, width // 8, 3)).astype(np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Good and bad images of different sizes, the masks of which are twice as large."""
    folder = tmp_path / "parts"
    for number, (height, width) in enumerate(SIZES):
        for kind in ("good", "bad", "masks"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        picture(height, width, number).save(folder / "good" / f"{number}.png")
        bad = picture(height, width, 10 + number)
        bad.paste((255, 0, 0), (10, 10, 30, 30))
        bad.save(folder / "bad" / f"{number}.png")
        mask = Image.new("L", (2 * width, 2 * height))
        mask.paste(255, (20, 20, 60, 60))
        mask.save(folder / "masks" / f"{number}.png")
    return folder


def engine(folder: Path) -> Engine:
    return Engine(
        default_root_dir=folder / "out", accelerator="cpu", devices=1, enable_progress_bar=False, logger=False
    )


def data(root: Path, batch_size: int = 1, **options: Any) -> Folder:
    given = {"normal_dir": "good", "abnormal_dir": "bad", "mask_dir": "masks", "normal_test_dir": "good"}
    return Folder("parts", root=root, **given, eval_batch_size=batch_size, num_workers=0, seed=0, **options)


def results(batches: Any) -> Iterator[tuple[str, float, torch.Tensor]]:
    for batch in batches:
        yield from zip(batch.image_path, batch.pred_score.tolist(), batch.anomaly_map, strict=True)


def test_scores_do_not_depend_on_the_neighbours_in_a_batch(april_gan: Build, root: Path) -> None:
    model, found = april_gan(visualizer=False), []
    for size in (1, 4):
        dataset = PredictDataset(root / "good")
        loader = DataLoader(dataset, batch_size=size, collate_fn=dataset.collate_fn)
        found.append(list(results(engine(root).predict(model, dataloaders=loader))))
        assert "finish" not in vars(dataset)
        assert type(dataset) is PredictDataset
        assert dataset[1].image.shape[-2:] == SIZES[1]  # as before
    for one, other in zip(*found, strict=True):
        assert one[0] == other[0]
        assert one[1] == pytest.approx(other[1], abs=1e-6)
        torch.testing.assert_close(one[2], other[2], atol=1e-5, rtol=0)


def test_tiles_of_images_of_different_sizes(april_gan: Build, root: Path) -> None:
    model = april_gan(tile_size=96, visualizer=False)
    (found,) = engine(root).test(model, datamodule=data(root), verbose=False)
    assert set(found) >= {"image_AUROC", "pixel_AUROC", "pixel_AUPRO"}
    with pytest.raises(ValueError, match="`eval_batch_size` must be 1 for images of different sizes"):
        engine(root).test(april_gan(tile_size=96, visualizer=False), datamodule=data(root, 4), verbose=False)
    dataset = PredictDataset(root / "good")
    loader = DataLoader(dataset, batch_size=4, collate_fn=dataset.collate_fn)
    with pytest.raises(ValueError, match="this batch has 40 x 120, 96 x 70, 96 x 96, 130 x 64 pixels"):
        engine(root).predict(april_gan(tile_size=96, visualizer=False), dataloaders=loader)


def test_a_damaged_mask_is_named(april_gan: Build, root: Path) -> None:
    mask = root / "masks" / "2.png"
    mask.write_bytes(mask.read_bytes()[:50])
    with pytest.raises(UnreadableImageError, match=f"{mask} cannot be read as an image .as the mask of a defect"):
        engine(root).test(april_gan(visualizer=False), datamodule=data(root), verbose=False)


@pytest.mark.parametrize("k_shot", [1, 3])
def test_references_are_cropped_as_images_are(april_gan: Build, root: Path, k_shot: int) -> None:
    """The same as images and references that were cropped on disk."""
    crop = CenterCrop(32)
    cropped = root.parent / "cropped"
    for path in root.glob("*/*.png"):
        (cropped / path.parent.name).mkdir(parents=True, exist_ok=True)
        image = Image.open(path).resize(Image.open(root / "good" / path.name).size, Image.Resampling.NEAREST)
        crop(image).save(cropped / path.parent.name / path.name)
    found = []
    for folder, options in ((root, {"augmentations": crop}), (cropped, {})):
        model = april_gan(k_shot=k_shot, references=str(folder / "good"), calibration="references",
                          false_positive_rate=0.3, visualizer=True)  # fmt: skip
        (metrics,) = engine(folder).test(model, datamodule=data(folder, **options), verbose=False)
        found.append((metrics, model.post_processor.values(), model.model.few_shot.features(0)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-6)
    assert torch.equal(found[0][2], found[1][2])
    drawings = [
        {path.name: Image.open(path).size for path in folder.rglob("images/**/*.png")} for folder in (root, cropped)
    ]
    assert drawings[0] == drawings[1]  # of what was inspected, where the map lies


def test_other_augmentations_make_another_bank(april_gan: Build, root: Path) -> None:
    model = april_gan(k_shot=2, references=str(root / "good"), visualizer=False)
    banks = []
    for augmentations in (None, RandomHorizontalFlip(1.0), RandomHorizontalFlip(1.0), None):
        engine(root).test(model, datamodule=data(root, test_augmentations=augmentations), verbose=False)
        banks.append(model.model.few_shot.features(0))
    assert torch.equal(banks[1], banks[2])
    assert torch.equal(banks[0], banks[3])
    assert not torch.equal(banks[0], banks[1])


def test_nothing_needs_double_precision(april_gan: Build, root: Path) -> None:
    images = torch.rand(2, 3, 50, 70)
    with NoFloat64():
        for options in ({"calibration": "references"}, {"calibration": str(root / "bad"), "tile_size": 64}):
            model = april_gan(
                class_name="part", k_shot=2, references=str(root / "good"), false_positive_rate=0.3, **options
            )
            model.setup("predict")
            assert model(images).pred_score.isfinite().all()
        april_gan(smoothing_sigma=1.0, neighbourhood=3, aspect_ratio=1.5, image_size=96).pre_processor(images)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_thresholds_keep_their_precision(april_gan: Build, root: Path, precision: str) -> None:
    model = april_gan(k_shot=1, references=str(root / "good"), visualizer=False)
    runner = Engine(default_root_dir=root, accelerator="cpu", devices=1, precision=precision, logger=False)
    runner.validate(model, datamodule=data(root), verbose=False)
    buffers = [model.model.text_features, model.model.few_shot.features(0), *model.post_processor.buffers()]
    assert {buffer.dtype for buffer in buffers} <= {torch.float32, torch.bool}
    values = model.post_processor.values()
    runner.test(model, datamodule=data(root), verbose=False)
    assert model.post_processor.values() == values
    assert not all(value == torch.tensor(value).bfloat16().item() for value in values.values())


def test_a_test_and_then_a_training_in_one_folder(april_gan: Build, root: Path) -> None:
    for _ in range(2):
        engine(root).test(april_gan(visualizer=False), datamodule=data(root), verbose=False)
    engine(root).train(april_gan(visualizer=False), datamodule=data(root))
    folder = root / "out" / "AprilGAN" / "parts"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "v0", "v1"]
    assert (folder / "latest").resolve() == folder / "v1"
    assert (folder / "v0" / "decisions.csv").is_file()
