"""Large images in tiles, through the Engine, with references, classes and all that must be refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from numpy.typing import NDArray
from torch import Tensor

from anomalib_aprilgan import AprilGAN, AuxiliaryData
from anomalib_aprilgan.data.pre_processing import AprilGANPreProcessor
from anomalib_aprilgan.demo import built_in
from anomalib_aprilgan.demo.drawing import TEXTURES, draw_twins
from anomalib_aprilgan.demo.drawn_clip.pretrain import UNSEEN_CATEGORIES
from anomalib_aprilgan.network.tiling import TiledMap

from ..conftest import DATASET

Build = Callable[..., AprilGAN]
BUILT_IN: dict[str, Any] = {
    "backbone": built_in.ARCHITECTURE,
    "pretrained": built_in.PRETRAINED,
    "image_size": built_in.IMAGE_SIZE,
    "stages": built_in.STAGES,
    "memory_stages": built_in.MEMORY_STAGES,
}
# A process of its own: the peak of this one would be that of the largest test.
MEMORY = f"""
import torch
from anomalib_aprilgan import AprilGAN

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

model = AprilGAN(**{BUILT_IN!r}, class_name="leather", tile_size=1024)
model.setup("predict")
model.eval()
model(torch.rand(1, 3, 1024, 1024))
before = peak()
with torch.no_grad():
    out = model(torch.rand(1, 3, 4096, 8192))
assert out.anomaly_map.shape == out.pred_mask.shape == (1, 4096, 8192)
print(peak() - before)
"""


def engine(folder: Path, **options: Any) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", devices=1, enable_progress_bar=False, **options)


def large(height: int = 150, width: int = 230, count: int = 1) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def raw(model: AprilGAN) -> AprilGAN:
    """Without scale, to compare what the tiles gave."""
    model.setup("predict")
    model.post_processor.enable_normalization = False
    return model.eval()


@pytest.mark.parametrize("k_shot", [0, 2])
def test_tiles_are_inspected_one_by_one_and_blended(april_gan: Build, k_shot: int) -> None:
    given = {"references": str(DATASET / "tile" / "train" / "good")} if k_shot else {}
    arguments: dict[str, Any] = {"class_name": "tile", "k_shot": k_shot, **given}
    tiled = raw(april_gan(**arguments, tile_size=100, tile_overlap=0.3))
    image = large()
    out = tiled(image)
    assert out.anomaly_map.shape == (1, 150, 230)
    # The same, tile by tile: a model of whole images with the bank of the tiled one.
    single = raw(april_gan(class_name="tile"))
    single.model.memory_banks = tiled.model.memory_banks
    blended, scores = TiledMap(150, 230, 100, 0.3), []
    for top, left in blended.positions:
        one = single.model(single.pre_processor(image[..., top : top + 100, left : left + 100]))
        blended.add(one.anomaly_map[0], top, left)
        scores.append(one.pred_score)
    torch.testing.assert_close(out.anomaly_map[0], blended.result(), atol=1e-4, rtol=0)
    assert len(scores) == 6
    if not k_shot:
        torch.testing.assert_close(out.pred_score, torch.stack(scores).amax(dim=0), atol=1e-5, rtol=0)


def test_small_images_are_one_tile(april_gan: Build) -> None:
    whole, tiled = raw(april_gan(class_name="tile")), raw(april_gan(class_name="tile", tile_size=400))
    image = large(96, 96, 2)
    torch.testing.assert_close(tiled(image).pred_score, whole(image).pred_score, atol=1e-5, rtol=0)
    torch.testing.assert_close(tiled(image).anomaly_map, whole(image).anomaly_map, atol=1e-4, rtol=0)


def test_references_are_cut_into_tiles_and_held_out_picture_by_picture(april_gan: Build) -> None:
    references = str(DATASET / "tile" / "train" / "good")
    model = april_gan(class_name="tile", k_shot=2, references=references, tile_size=64)
    model.setup("predict")
    pictures = model.model.memory_bank().k_shot // 2
    assert pictures > 1  # 96 px in tiles of 64
    tokens = model.model.memory_bank().tokens
    assert [len(stage) for stage in model.model.memory_bank().stages(without=range(pictures))] == [pictures] * 4
    assert [len(paths) for paths in model.preparation.reference_paths.values()] == [2]
    assert tokens.shape[1] == 2 * pictures


def test_engine_has_maps_and_masks_at_full_size(april_gan: Build, tmp_path: Path) -> None:
    data = MVTecAD(root=DATASET, category="tile", num_workers=0, eval_batch_size=2)
    model, runner = april_gan(tile_size=64), engine(tmp_path)
    (metrics,) = runner.test(model, datamodule=data, verbose=False)
    assert 0 < metrics["pixel_AUROC"] < 1
    batches = runner.predict(model, datamodule=data)
    assert {tuple(batch.anomaly_map.shape[-2:]) for batch in batches} == {tuple(batches[0].image.shape[-2:])}


def test_classes_are_told_apart_in_tiles_too(april_gan: Build) -> None:
    model = raw(april_gan(class_name=["bottle", "tile"], tile_size=100))
    images = large(count=2)
    mixed = model(images, ["tile", "bottle"])
    for number, name in enumerate(("tile", "bottle")):
        alone = raw(april_gan(class_name=name, tile_size=100))(images[number : number + 1])
        torch.testing.assert_close(mixed.anomaly_map[number], alone.anomaly_map[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(mixed.pred_score[number], alone.pred_score[0], atol=1e-6, rtol=0)


def test_what_is_refused(april_gan: Build, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"`tile_size` cannot be exported"):
        april_gan(class_name="tile", tile_size=64).to_onnx(tmp_path)
    data = AuxiliaryData("mvtec", DATASET, ["tile"], num_workers=0)
    with pytest.raises(RuntimeError, match=r"`tile_size` is for inspection"):
        engine(tmp_path, max_epochs=1).fit(april_gan(adapters=None, tile_size=64), datamodule=data)
    with pytest.raises(ValueError, match=r"`tile_size`"):
        april_gan(tile_size=0)
    with pytest.raises(ValueError, match=r"`pre_processor` and `tile_size` do not go together"):
        april_gan(tile_size=64, pre_processor=AprilGANPreProcessor((96, 96)))


def test_bank_of_tiles_does_not_serve_whole_images(april_gan: Build, tmp_path: Path) -> None:
    references = str(DATASET / "tile" / "train" / "good")
    given: dict[str, Any] = {"class_name": "tile", "k_shot": 2, "references": references}
    model, runner = april_gan(**given, tile_size=64), engine(tmp_path)
    runner.predict(model, data_path=DATASET / "tile" / "test" / "hole")
    runner.trainer.save_checkpoint(tmp_path / "tiled.ckpt")
    with pytest.raises(ValueError, match=r"`tile_size` of the checkpoint is 64, of the model None"):
        engine(tmp_path).predict(
            april_gan(**given), data_path=DATASET / "tile" / "test" / "hole", ckpt_path=tmp_path / "tiled.ckpt"
        )


# -- what tiles are for -------------------------------------------------------------------------------

SIDE, ROWS, COLUMNS = 256, 4, 8


def spread(piece: NDArray[Any]) -> NDArray[Any]:
    """A piece of a texture, mirrored again and again until it fills 2048 x 1024 pixels without a seam."""
    borders = [(0, (ROWS - 1) * SIDE), (0, (COLUMNS - 1) * SIDE), (0, 0)][: piece.ndim]
    return np.pad(piece, borders, mode="symmetric")


def large_picture(category: str, seed: int, kind: str) -> tuple[Tensor, Tensor]:
    """``(3, 1024, 2048)`` of a texture with one defect, at a place drawn by the seed, and its mask ``(1024, 2048)``."""
    twins = draw_twins(category, seed, 0, kind, SIDE)
    places = np.zeros((ROWS * SIDE, COLUMNS * SIDE), dtype=bool)
    rng = np.random.default_rng(seed)
    top, left = SIDE * rng.integers(ROWS), SIDE * rng.integers(COLUMNS)
    places[top : top + SIDE, left : left + SIDE] = True
    mask = spread(twins.mask) & places
    pixels = np.where(mask[..., None], spread(twins.bad), spread(twins.good))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255, torch.from_numpy(mask)


def points_at(anomaly_map: Tensor, mask: Tensor, patch: tuple[int, int]) -> bool:
    """Whether the maximum of a map lies on the defect, or less than a patch (height, width in pixels) beside it."""
    full = F.interpolate(anomaly_map[None, None], mask.shape, mode="bilinear")[0, 0]
    row, column = divmod(int(full.argmax()), mask.shape[1])
    rows, columns = mask.nonzero(as_tuple=True)
    return bool((((rows - row).abs() < patch[0]) & ((columns - column).abs() < patch[1])).any())


def test_small_defects_of_large_pictures_are_found_in_tiles_alone() -> None:
    """Twelve pictures of textures that nobody was shown, each with one small defect in 2 million pixels.

    Zero-shot. "Found" is within a patch, which of a squashed picture are 85 x 170 pixels.
    """
    grid = built_in.IMAGE_SIZE // 8
    textures = [category for category in UNSEEN_CATEGORIES if category in TEXTURES]
    assert textures == ["leather", "tile"]
    found = []
    for category in textures:
        tiled = raw(AprilGAN(**BUILT_IN, class_name=category, tile_size=SIDE))
        whole = raw(AprilGAN(**BUILT_IN, class_name=category))
        for seed, kind in product((1, 2), ("crack", "contamination", "fibre")):
            image, mask = large_picture(category, seed, kind)
            assert 0 < mask.float().mean() < 0.0005
            with torch.no_grad():
                maps = tiled(image[None]).anomaly_map[0], whole(image[None]).anomaly_map[0]
            patches = (SIDE // grid, SIDE // grid), (image.shape[1] // grid, image.shape[2] // grid)
            found.append([points_at(one, mask, patch) for one, patch in zip(maps, patches, strict=True)])
    in_tiles, at_once = np.array(found).T
    assert in_tiles.mean() >= 2 / 3
    assert at_once.mean() <= 1 / 2
    assert (in_tiles & ~at_once).mean() >= 1 / 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_memory_of_a_very_large_image() -> None:
    """8192 x 4096 pixels through all of the model: the image takes 403 MB, its map 134."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=250, check=False)
    assert run.returncode == 0, run.stderr
    assert 500 < int(run.stdout) / 1e6 < 2000
