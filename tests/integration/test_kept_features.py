"""Trainings that keep what CLIP makes of their images: the same adapters, one vision pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.training import keep_features

from .runs import adapters, auxiliary, engine, equal

Build = Callable[..., AprilGAN]


def trained(build: Build, folder: Path, kept: Path | None, epochs: int = 3, **data: object) -> tuple[AprilGAN, int]:
    """A model after a training, and how many images have gone through its CLIP."""
    torch.manual_seed(0)
    model = build(adapters=None, kept_features=None if kept is None else str(kept), visualizer=False)
    seen, encode = [], model.model.encode

    def counted(images: torch.Tensor) -> object:
        seen.append(len(images))
        return encode(images)

    model.model.encode = counted  # type: ignore[method-assign,assignment]
    engine(folder, max_epochs=epochs).fit(model, datamodule=auxiliary(**data))
    return model, sum(seen)


def test_the_adapters_are_the_same_and_each_image_is_seen_once(april_gan: Build, tmp_path: Path) -> None:
    plain, every = trained(april_gan, tmp_path / "plain", None)
    kept, once = trained(april_gan, tmp_path / "kept", tmp_path / "features")
    assert equal(adapters(plain), adapters(kept))
    assert every == 3 * once > 0
    again, none = trained(april_gan, tmp_path / "again", tmp_path / "features")
    assert equal(adapters(plain), adapters(again))
    assert none == 0
    assert len(list((tmp_path / "features").glob("*.features"))) == 1


def test_every_precision_and_image_size_has_files_of_its_own(april_gan: Build, tmp_path: Path) -> None:
    for size, precision in ((96, "32-true"), (96, "bf16-mixed"), (64, "32-true")):
        model = april_gan(image_size=size)
        model.setup("predict")
        keep_features(tmp_path, model.model, precision, [0, 1], images=2).close()
    assert len(list(tmp_path.glob("*.features"))) == 3


def test_random_augmentations_are_said_to_make_it_vain(april_gan: Build, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="`kept_features`: the images differ from epoch to epoch"):
        trained(april_gan, tmp_path, tmp_path / "features", train_augmentations=RandomHorizontalFlip())


def test_after_an_error_the_next_training_can_write(
    april_gan: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        msg = "the middle of it"
        raise RuntimeError(msg)

    monkeypatch.setattr(AprilGAN, "on_train_epoch_end", fail)
    with pytest.raises(RuntimeError, match="the middle of it"):
        trained(april_gan, tmp_path / "first", tmp_path / "features")
    monkeypatch.undo()
    model, _ = trained(april_gan, tmp_path / "second", tmp_path / "features", epochs=1)
    assert model.kept is None


def test_a_folder_that_cannot_be(april_gan: Build, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot be written"):
        trained(april_gan, tmp_path / "run", tmp_path / "file")
    with pytest.raises(ValueError, match="`kept_features` must be a name or a path"):
        april_gan(adapters=None, kept_features="")
