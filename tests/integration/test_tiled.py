"""Large images in tiles, through the Engine, with references and classes, and what raises an error."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import product
from pathlib import Path
from threading import Event, Thread
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
from anomalib_aprilgan.data.references import read_reference
from anomalib_aprilgan.demo import built_in
from anomalib_aprilgan.demo.drawing import TEXTURES, draw_twins
from anomalib_aprilgan.demo.drawn_clip.pretrain import UNSEEN_CATEGORIES
from anomalib_aprilgan.network.tiling import TiledMap
from anomalib_aprilgan.tile_layout import tile_positions

from ..conftest import DATASET

Build = Callable[..., AprilGAN]
BUILT_IN: dict[str, Any] = {
    "backbone": built_in.ARCHITECTURE,
    "pretrained": built_in.PRETRAINED,
    "image_size": built_in.IMAGE_SIZE,
    "stages": built_in.STAGES,
    "memory_stages": built_in.MEMORY_STAGES,
}
GOOD = DATASET / "tile" / "train" / "good"
STATUS = Path("/proc/self/status")


def engine(folder: Path, **options: Any) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", devices=1, enable_progress_bar=False, **options)


def large(height: int = 150, width: int = 230, count: int = 1) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def raw(model: AprilGAN) -> AprilGAN:
    """Without scale, to compare what the tiles gave."""
    model.setup("predict")
    model.post_processor.enable_normalization = False
    return model.eval()


def blended(model: AprilGAN, image: Tensor, side: int, overlap: float) -> tuple[Tensor, Tensor]:
    """Map of an image from those of its tiles, and the tiles' text probabilities, by a model of whole images."""
    whole, scores = TiledMap(image.shape[-2], image.shape[-1], side, overlap), []
    for top, left in whole.positions:
        one = model.predict(image[..., top : top + side, left : left + side])
        whole.add(one.anomaly_map[0], top, left)
        scores.append(one.text_probability)
    return whole.result(), torch.cat(scores)


@pytest.mark.parametrize("k_shot", [0, 2])
def test_tiles_are_inspected_one_by_one_and_blended(april_gan: Build, k_shot: int) -> None:
    given = {"references": str(GOOD)} if k_shot else {}
    arguments: dict[str, Any] = {"class_name": "tile", "k_shot": k_shot, **given}
    tiled = raw(april_gan(**arguments, tile_size=100, tile_overlap=0.3))
    image = large()
    out = tiled(image)
    assert out.anomaly_map.shape == (1, 150, 230)
    # The same, tile by tile: a model of whole images with the bank of the tiled one.
    single = raw(april_gan(**arguments))
    if k_shot:
        single.model.few_shot.set_features(0, tiled.model.few_shot.features(0))
    expected, scores = blended(single, image, 100, 0.3)
    torch.testing.assert_close(out.anomaly_map[0], expected, atol=1e-4, rtol=0)
    assert len(scores) == 6
    if not k_shot:
        torch.testing.assert_close(out.pred_score, scores.amax()[None], atol=1e-5, rtol=0)


def test_small_images_are_one_tile(april_gan: Build) -> None:
    whole, tiled = raw(april_gan(class_name="tile")), raw(april_gan(class_name="tile", tile_size=400))
    image = large(96, 96, 2)
    torch.testing.assert_close(tiled(image).pred_score, whole(image).pred_score, atol=1e-5, rtol=0)
    torch.testing.assert_close(tiled(image).anomaly_map, whole(image).anomaly_map, atol=1e-4, rtol=0)


def test_references_are_remembered_in_tiles_and_held_out_image_by_image(april_gan: Build) -> None:
    given: dict[str, Any] = {"class_name": "tile", "k_shot": 2, "references": str(GOOD)}
    tiled, single = april_gan(**given, tile_size=64), april_gan(**given)
    for model in (tiled, single):
        model.setup("predict")
    (files,) = tiled.made.references.values()
    images = [read_reference(Path(file)) for file in files]
    # Remembered are tiles side by side.
    cut = [
        single.pre_processor(image[..., top : top + 64, left : left + 64])
        for image in images
        for top, left in tile_positions(image.shape[-2], image.shape[-1], 64, 0.0)
    ]
    tokens = single.model.encode(torch.cat(cut)).patch_tokens
    features = tiled.model.few_shot.features(0)
    expected = torch.cat([F.normalize(stage, dim=-1).flatten(1) for stage in tokens], dim=1)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    of_each = len(cut) // 2
    assert of_each > 1  # 96 px in tiles of 64
    # Held out are all tiles of an image; it is inspected as any other, in overlapping tiles.
    highest = []
    for image, others in zip(images, (features[of_each:], features[:of_each]), strict=True):
        single.model.few_shot.set_features(0, others)
        with torch.no_grad():
            highest.append(blended(single, image, 64, 0.25)[0].amax().item())
    values = tiled.post_processor.values()
    assert values["map_maximum_min"] == pytest.approx(min(highest), abs=1e-5)
    assert values["pixel_threshold"] == pytest.approx(max(highest), abs=1e-5)


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
    with pytest.raises(RuntimeError, match=r"`tile_size` cannot be exported to torch"):
        april_gan(class_name="tile", tile_size=64).to_torch(tmp_path)
    cropped = april_gan(class_name="tile", tile_size=64, roi=[0, 0, 50, 50])
    cropped.make_ready("predict", frame=(100, 100))
    with pytest.raises(ValueError, match=r"`roi` cannot be exported with `tile_size`"):
        cropped.to_onnx(tmp_path)
    data = AuxiliaryData("mvtec", DATASET, ["tile"], num_workers=0)
    with pytest.raises(RuntimeError, match=r"`tile_size` is for inspection"):
        engine(tmp_path, max_epochs=1).fit(april_gan(adapters=None, tile_size=64), datamodule=data)
    with pytest.raises(ValueError, match=r"`tile_size`"):
        april_gan(tile_size=0)
    with pytest.raises(ValueError, match=r"`pre_processor` and `tile_size` do not go together"):
        april_gan(tile_size=64, pre_processor=AprilGANPreProcessor((96, 96)))


def test_bank_of_tiles_does_not_serve_whole_images(april_gan: Build, tmp_path: Path) -> None:
    references = str(GOOD)
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


def large_image(category: str, seed: int, kind: str) -> tuple[Tensor, Tensor]:
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


def test_small_defects_of_large_images_are_found_in_tiles_alone() -> None:
    """Twelve images of textures that nobody was shown, each with one small defect in 2 million pixels.

    Zero-shot. "Found" is within a patch, which of a squashed image are 85 x 170 pixels.
    """
    grid = built_in.IMAGE_SIZE // 8
    textures = [category for category in UNSEEN_CATEGORIES if category in TEXTURES]
    assert textures == ["leather", "tile"]
    found = []
    for category in textures:
        tiled = raw(AprilGAN(**BUILT_IN, class_name=category, tile_size=SIDE))
        whole = raw(AprilGAN(**BUILT_IN, class_name=category))
        for seed, kind in product((1, 2), ("crack", "contamination", "fibre")):
            image, mask = large_image(category, seed, kind)
            assert 0 < mask.float().mean() < 0.0005
            with torch.no_grad():
                maps = tiled(image[None]).anomaly_map[0], whole(image[None]).anomaly_map[0]
            patches = (SIDE // grid, SIDE // grid), (image.shape[1] // grid, image.shape[2] // grid)
            found.append([points_at(one, mask, patch) for one, patch in zip(maps, patches, strict=True)])
    in_tiles, at_once = np.array(found).T
    assert in_tiles.mean() >= 2 / 3
    assert at_once.mean() <= 1 / 2
    assert (in_tiles & ~at_once).mean() >= 1 / 2


def own_memory() -> int:
    """Bytes that this process has beside what lies in files."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("RssAnon")) * 1024


@pytest.mark.skipif(not STATUS.exists(), reason="what memory is taken is read from /proc")
@pytest.mark.slow
def test_memory_of_a_very_large_image() -> None:
    """8192 x 4096 pixels through all of the model: the image takes 403 MB, its map 134."""
    model = AprilGAN(**BUILT_IN, class_name="leather", tile_size=1024).eval()
    with torch.no_grad():
        model(torch.rand(1, 3, 1024, 1024))
        gc.collect()
        taken, done = [own_memory()], Event()

        def watch() -> None:
            while not done.wait(0.002):
                taken.append(own_memory())

        watcher = Thread(target=watch)
        watcher.start()
        try:
            out = model(torch.rand(1, 3, 4096, 8192))
        finally:
            done.set()
            watcher.join()
    assert out.anomaly_map.shape == out.pred_mask.shape == (1, 4096, 8192)
    assert 500 < (max(taken) - taken[0]) / 1e6 < 2000
