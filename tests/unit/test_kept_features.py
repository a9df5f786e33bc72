"""What CLIP makes of images, kept on disk: found again, whole, and no more than there is room for."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from anomalib_aprilgan.clip.backbone import VisionOutput
from anomalib_aprilgan.kept_features import KeptFeatures
from anomalib_aprilgan.recipe import Recipe

WIDTHS, STAGES, EMBED_DIM = [(4, 3), (2, 5)], (2, 4), 6
RECIPE = Recipe.of(clip="x")
ROW = (4 * 3 + 2 * 5 + EMBED_DIM) * 4


class Encoder:
    """A function of each image alone, which counts them."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Tensor) -> VisionOutput:
        self.seen += len(images)
        flat = images.flatten(1)
        return VisionOutput([flat[:, :12].view(-1, 4, 3), flat[:, 12:22].view(-1, 2, 5)], flat[:, 22:28] * 2.0, STAGES)


def images_of(number: int, seed: int = 0) -> Tensor:
    return torch.rand(number, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def opened(folder: Path, images: int = 10, recipe: Recipe = RECIPE) -> KeptFeatures:
    return KeptFeatures(folder, recipe, WIDTHS, STAGES, EMBED_DIM, images)


def same(first: VisionOutput, second: VisionOutput) -> bool:
    tokens = all(torch.equal(one, other) for one, other in zip(first.patch_tokens, second.patch_tokens, strict=True))
    return tokens and torch.equal(first.image_feature, second.image_feature) and first.stages == second.stages


def test_each_image_is_encoded_once_in_whatever_batches(tmp_path: Path) -> None:
    images, encode, expected = images_of(5), Encoder(), Encoder()(images_of(5))
    kept = opened(tmp_path)
    assert same(kept.output_of(images[[0, 1, 1]], encode), Encoder()(images[[0, 1, 1]]))
    assert encode.seen == 2
    assert same(kept.output_of(images, encode), expected)
    assert encode.seen == 5
    assert same(kept.output_of(images.flip(0), encode), Encoder()(images.flip(0)))
    assert encode.seen == 5
    kept.close()
    later = opened(tmp_path)
    assert same(later.output_of(images, encode), expected)
    assert encode.seen == 5
    later.close()
    other = opened(tmp_path, recipe=Recipe.of(clip="y"))
    other.output_of(images, encode)
    assert encode.seen == 10
    other.close()


def test_room_is_taken_and_what_was_not_needed_given_back(tmp_path: Path) -> None:
    kept = opened(tmp_path, images=100)
    (path,) = tmp_path.glob("*.features")
    assert path.stat().st_size == 100 * ROW
    assert path.stat().st_blocks * 512 >= 100 * ROW  # not only a number
    kept.output_of(images_of(3), Encoder())
    kept.close()
    assert path.stat().st_size == 3 * ROW


def test_without_room_it_is_refused_and_the_need_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 * ROW - 1))
    with pytest.raises(OSError, match=r"`kept_features` needs 0\.00 GB for 10 images, and .* has 0\.00 GB"):
        opened(tmp_path)
    monkeypatch.undo()
    opened(tmp_path).close()  # nothing is locked


def test_two_trainings_do_not_write_to_the_same_file(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(OSError, match="another training writes to"):
        opened(tmp_path)
    first.close()
    opened(tmp_path).close()


def test_images_that_are_new_each_time_are_not_kept_beyond_what_was_said(tmp_path: Path) -> None:
    kept, encode = opened(tmp_path, images=3), Encoder()
    kept.output_of(images_of(2), encode)
    with pytest.warns(UserWarning, match="the images differ from epoch to epoch"):
        assert same(kept.output_of(images_of(2, seed=1), encode), Encoder()(images_of(2, seed=1)))
    kept.output_of(images_of(2), encode)
    assert encode.seen == 4
    kept.close()
    (path,) = tmp_path.glob("*.features")
    assert path.stat().st_size == 2 * ROW


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("suffix", ["index", "features"])
def test_what_was_half_written_does_not_count(tmp_path: Path, suffix: str, cut: int) -> None:
    images, kept = images_of(4), opened(tmp_path)
    kept.output_of(images, Encoder())
    kept.close()
    (path,) = tmp_path.glob(f"*.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - cut])
    later, encode = opened(tmp_path), Encoder()
    assert same(later.output_of(images, encode), Encoder()(images))
    assert encode.seen >= 1
    later.close()


def write_until_killed(folder: str) -> None:
    kept = opened(Path(folder), images=100_000)
    for seed in range(100_000):
        kept.output_of(images_of(1, seed), Encoder())


def test_a_run_that_is_killed_leaves_only_whole_outputs(tmp_path: Path) -> None:
    context: Any = multiprocessing.get_context("fork")
    for number in range(8):
        process = context.Process(target=write_until_killed, args=(str(tmp_path),))
        process.start()
        time.sleep(0.05 + 0.03 * number)
        os.kill(process.pid, 9)
        process.join()
        kept, encode = opened(tmp_path, images=50), Encoder()
        found = len(kept._rows)
        for seed in range(found):
            assert same(kept.output_of(images_of(1, seed), encode), Encoder()(images_of(1, seed)))
        assert encode.seen == 0
        kept.close()
    assert found > 10
