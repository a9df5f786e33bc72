"""Regions of defects: measured, and in files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from scipy.ndimage import gaussian_filter
from skimage.draw import disk, line
from skimage.measure import label, regionprops
from torchvision.transforms.v2 import CenterCrop

from anomalib_aprilgan.csv_text import read_csv
from anomalib_aprilgan.data.pre_processing import resize_mask
from anomalib_aprilgan.network.tiling import run_tiled
from anomalib_aprilgan.results.region_files import CocoWriter, MapWriter, MaskWriter, RegionsWriter
from anomalib_aprilgan.results.regions import find_regions, regions_of

SIZES = [
    ((101, 77), (96, 96)),
    ((480, 641), (70, 70)),
    ((60, 90), (96, 144)),
    ((333, 222), (98, 56)),
    ((50, 50), (50, 50)),
]


def drawn(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A mask with some blobs apart from each other, each several pixels of a map wide."""
    rng = np.random.default_rng(seed)
    noise = gaussian_filter(rng.random(size), min(size) / 12)
    return noise > np.quantile(noise, 0.85)


@pytest.mark.parametrize(("size", "of_map"), SIZES)
def test_all_figures_are_those_of_the_pixels_in_the_image_file(size: tuple[int, int], of_map: tuple[int, int]) -> None:
    values = gaussian_filter(np.random.default_rng(1).random(of_map), 3).astype(np.float32)
    mask = values > np.quantile(values, 0.9)
    found = find_regions(mask, values, size)
    rows, columns = ((np.arange(length) + 0.5) * of / length for length, of in zip(size, of_map, strict=True))
    labels = label(mask, connectivity=2)[np.ix_(rows.astype(int), columns.astype(int))]
    expected = {one.label: one for one in regionprops(labels)}
    assert len(found) == label(mask, connectivity=2).max() > 3
    assert np.array_equal(found.mask(), labels > 0)
    for number, one in enumerate(found, start=1):
        top, left, bottom, right = expected[number].bbox
        assert (one.left, one.top, one.width, one.height) == (left, top, right - left, bottom - top)
        assert one.area == expected[number].area
        assert (one.centroid_y, one.centroid_x) == pytest.approx([side + 0.5 for side in expected[number].centroid])
        within = values[label(mask, connectivity=2) == number]
        assert (one.peak, one.mean) == pytest.approx((within.max(), within.mean()), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("size", "of_map"), SIZES)
def test_boxes_are_those_of_the_truth_within_a_pixel_of_the_map(
    size: tuple[int, int], of_map: tuple[int, int], seed: int
) -> None:
    truth = drawn(size, seed)
    mask = resize_mask(torch.from_numpy(truth).float()[None], of_map)[0].numpy()
    assert_boxes_of(truth, find_regions(mask > 0, mask, size), of_map)


@pytest.mark.parametrize("size", [(130, 97), (64, 200), (40, 40)])
def test_boxes_are_those_of_the_truth_in_tiles(size: tuple[int, int]) -> None:
    truth = drawn(size)
    _, blended = run_tiled(
        torch.from_numpy(truth).float().repeat(3, 1, 1),
        48,
        0.25,
        2,
        lambda tiles: (tiles.amax(dim=(1, 2, 3)), tiles[:, 0]),
    )
    assert_boxes_of(truth, find_regions((blended > 0.5).numpy(), blended.numpy(), size), size)


def assert_boxes_of(truth: np.ndarray, found: Any, of_map: tuple[int, int]) -> None:
    expected = sorted(one.bbox for one in regionprops(label(truth, connectivity=2)))
    boxes = sorted((one.top, one.left, one.top + one.height, one.left + one.width) for one in found)
    assert len(boxes) == len(expected) > 0
    pixel = [max(1.0, length / of) for length, of in zip(truth.shape, of_map, strict=True)] * 2
    for box, wanted in zip(boxes, expected, strict=True):
        assert all(abs(ours - theirs) <= step for ours, theirs, step in zip(box, wanted, pixel, strict=True))


def test_a_region_between_the_centres_of_pixels_is_one_pixel() -> None:
    mask, values = np.zeros((100, 100), dtype=bool), np.zeros((100, 100), dtype=np.float32)
    mask[13, 27], values[13, 27] = True, 0.9
    found = find_regions(mask, values, (10, 10))
    (one,) = found
    assert (one.left, one.top, one.width, one.height, one.area, one.peak) == (2, 1, 1, 1, 1, np.float32(0.9))
    assert (found.mask().sum(), found.mask()[1, 2]) == (1, True)
    assert sum(found.run_lengths(1)[1::2]) == 1


def test_corners_touch_small_regions_go_and_what_is_no_number_is_in_none() -> None:
    mask, values = np.zeros((20, 20), dtype=bool), np.ones((20, 20), dtype=np.float32)
    mask[2, 2] = mask[3, 3] = mask[10:14, 10:14] = mask[18, 18] = True
    assert [one.area for one in find_regions(mask, values, (20, 20))] == [2, 16, 1]
    assert [one.area for one in find_regions(mask, values, (20, 20), min_area=2)] == [2, 16]
    assert [one.area for one in find_regions(mask, values, (40, 40), min_area=8)] == [8, 64]
    values[10:14] = np.nan
    assert [one.area for one in find_regions(mask, values, (20, 20))] == [2, 1]
    assert find_regions(mask, np.full((20, 20), np.nan, dtype=np.float32), (20, 20)).mask().sum() == 0


# -- files -----------------------------------------------------------------------------------------------------------


def batch_of(folder: Path, truths: Sequence[np.ndarray], of_map: tuple[int, int], names: Sequence[str]) -> ImageBatch:
    paths = []
    for name, truth in zip(names, truths, strict=True):
        Image.fromarray((truth * 255).astype(np.uint8)).save(folder / name)
        paths.append(str(folder / name))
    masks = torch.stack([resize_mask(torch.from_numpy(truth).float()[None], of_map)[0] for truth in truths])
    return ImageBatch(
        image=torch.zeros(len(paths), 3, *of_map), image_path=paths, anomaly_map=masks, pred_mask=masks > 0.5
    )


def write(writer: Any, folder: Path, batch: ImageBatch) -> None:
    trainer = SimpleNamespace(
        default_root_dir=folder, testing=False, global_rank=0, world_size=1, is_global_zero=True, predict_dataloaders=[]
    )
    module = SimpleNamespace(classes=SimpleNamespace(names=("nut",)))
    writer.on_predict_start(trainer, module)
    writer.on_predict_batch_end(trainer, module, batch, batch, 0)
    writer.on_predict_end(trainer, module)


@pytest.fixture
def batch(tmp_path: Path) -> ImageBatch:
    (tmp_path / "in").mkdir()
    empty = np.zeros((60, 90), dtype=bool)
    return batch_of(
        tmp_path / "in", [drawn((101, 77)), empty, drawn((64, 64))], (96, 96), ["a.png", "=1+1.png", "c.png"]
    )


def test_coco_reads_the_json_and_its_areas_agree(batch: ImageBatch, tmp_path: Path) -> None:
    write(CocoWriter(), tmp_path / "out", batch)
    coco = COCO(str(tmp_path / "out" / "regions.json"))
    regions = regions_of(batch)
    assert [coco.imgs[number]["file_name"] for number in (1, 2, 3)] == batch.image_path
    assert (coco.imgs[1]["width"], coco.imgs[1]["height"]) == (77, 101)
    assert len(coco.anns) == sum(map(len, regions)) > 4
    for number, of_image in enumerate(regions, start=1):
        found = coco.loadAnns(coco.getAnnIds(imgIds=number))
        whole = np.zeros(of_image.size, dtype=np.uint8)
        for annotation, one in zip(found, of_image, strict=True):
            code = coco.annToRLE(annotation)
            assert coco_masks.area(code) == annotation["area"] == one.area
            assert coco_masks.toBbox(code).tolist() == annotation["bbox"]
            whole |= coco_masks.decode(code)
        assert np.array_equal(whole > 0, of_image.mask())


def test_the_table_has_a_row_for_each_region(batch: ImageBatch, tmp_path: Path) -> None:
    write(RegionsWriter(min_area=30), tmp_path / "out", batch)
    rows = read_csv(tmp_path / "out" / "regions.csv")
    wanted = [(path, one) for path, of_image in zip(batch.image_path, batch.regions, strict=True) for one in of_image]
    assert [row["image_path"] for row in rows] == [path for path, _ in wanted]
    assert {row["class_name"] for row in rows} == {"nut"}
    for row, (_, one) in zip(rows, wanted, strict=True):
        assert one.area >= 30
        assert [int(row[name]) for name in ("left", "top", "width", "height", "area")] == list(one[:5])
        assert float(row["centroid_x"]) == pytest.approx(one.centroid_x, rel=1e-5)


def test_masks_are_of_the_size_of_the_image_files(batch: ImageBatch, tmp_path: Path) -> None:
    write(MaskWriter(), tmp_path / "out", batch)
    files = sorted((tmp_path / "out" / "masks").rglob("*.png"))
    assert [file.name for file in files] == ["=1+1.png", "a.png", "c.png"]
    for file, of_image in zip(files, [regions_of(batch)[place] for place in (1, 0, 2)], strict=True):
        assert np.array_equal(np.asarray(Image.open(file)) > 0, of_image.mask())


def test_maps_keep_sixteen_bits_and_their_maxima(batch: ImageBatch, tmp_path: Path) -> None:
    batch.anomaly_map = torch.rand(3, 96, 96)
    batch.anomaly_map[2, 0, 0] = torch.nan
    write(MapWriter(max_side=24), tmp_path / "small", batch)
    write(MapWriter(), tmp_path / "whole", batch)
    rows = read_csv(tmp_path / "whole" / "maps.csv")
    assert [row["image_path"] for row in rows] == batch.image_path[:2]  # one that is not a number has no file
    for row, anomaly_map in zip(rows, batch.anomaly_map, strict=False):
        whole = np.asarray(Image.open(tmp_path / "whole" / row["map"])).astype(float) / 65535
        assert np.abs(whole - anomaly_map.numpy()).max() < 1e-5
        small = np.asarray(Image.open(tmp_path / "small" / row["map"])).astype(float) / 65535
        assert np.abs(small - anomaly_map.numpy().reshape(24, 4, 24, 4).max(axis=(1, 3))).max() < 1e-5


def test_without_thresholds_or_maps_there_are_no_regions(batch: ImageBatch, tmp_path: Path) -> None:
    batch.pred_mask = None
    with pytest.raises(ValueError, match="leave the post-processor's `enable_thresholding` on"):
        write(RegionsWriter(), tmp_path, batch)
    batch.anomaly_map = None
    with pytest.raises(ValueError, match="no maps"):
        write(MapWriter(), tmp_path, batch)


def test_a_line_and_a_disk_are_two_regions_in_reading_order() -> None:
    mask = np.zeros((50, 80), dtype=bool)
    mask[line(5, 60, 20, 75)] = True
    mask[disk((35, 20), 8)] = True
    found = list(find_regions(mask, mask.astype(np.float32), (50, 80)))
    assert [(one.left, one.top) for one in found] == [(60, 5), (13, 28)]
    assert json.dumps([one.area for one in found]) == json.dumps([16, int(mask[28:, :40].sum())])


def test_data_that_change_their_files_have_no_regions(tmp_path: Path) -> None:
    dataset = SimpleNamespace(augmentations=CenterCrop(10))
    trainer = SimpleNamespace(
        default_root_dir=tmp_path,
        testing=False,
        global_rank=0,
        world_size=1,
        predict_dataloaders=[SimpleNamespace(dataset=dataset)],
    )
    with pytest.raises(ValueError, match="Regions are told in pixels of the image files"):
        RegionsWriter().on_predict_start(trainer, SimpleNamespace(pre_processor=None))
    MapWriter().on_predict_start(trainer, SimpleNamespace(pre_processor=None))
