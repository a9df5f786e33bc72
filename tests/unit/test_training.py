"""Training of fresh adapters: what it needs of its data, and what it leaves written down."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import ImageBatch
from torch import Tensor
from torchvision.tv_tensors import Image, Mask

from anomalib_aprilgan import AprilGAN, training
from anomalib_aprilgan.data.multi_category import ClassImageBatch
from anomalib_aprilgan.network.losses import UNKNOWN
from anomalib_aprilgan.preparation import Made
from anomalib_aprilgan.provenance import Provenance

Build = Callable[..., AprilGAN]


def data(has_anomalous: bool | None = None, name: str = "Folder", category: str = "") -> Any:
    """A datamodule, as far as training looks at it."""
    told = {} if has_anomalous is None else {"has_anomalous": has_anomalous}
    return SimpleNamespace(train_data=SimpleNamespace(**told), name=name, category=category)


def images(count: int = 2) -> Image:
    return Image(torch.rand(count, 3, 4, 4))


class TestCheck:
    @pytest.mark.parametrize("datamodule", [None, data(), data(has_anomalous=True)])
    def test_fresh_adapters_and_data_that_may_hold_defects(self, april_gan: Build, datamodule: Any) -> None:
        assert training.check(april_gan(adapters=None).settings, datamodule) is None

    def test_given_adapters(self, april_gan: Build) -> None:
        with pytest.raises(RuntimeError, match=r"`adapters='a\.pth'` are given and not trained\. Pass `adapters=None`"):
            training.check(april_gan(adapters="a.pth").settings, None)

    def test_tiles(self, april_gan: Build) -> None:
        with pytest.raises(RuntimeError, match=r"`tile_size` is for inspection\. Train the adapters without it"):
            training.check(april_gan(adapters=None, tile_size=96).settings, None)

    def test_data_without_a_defect(self, april_gan: Build) -> None:
        text = r"the training data of Folder has not a single anomalous image\. .*AuxiliaryData.*`synthetic_rate=0\.5`"
        with pytest.raises(ValueError, match=text):
            training.check(april_gan(adapters=None).settings, data(has_anomalous=False))

    def test_whether_there_are_defects_may_not_be_known(self) -> None:
        assert training.has_defects(data(has_anomalous=True)) is True
        assert training.has_defects(data(has_anomalous=False)) is False
        assert training.has_defects(data()) is training.has_defects(None) is None

    def test_a_loader_has_no_name(self) -> None:
        with pytest.raises(ValueError, match="the training data of the loader has not a single anomalous image"):
            training.raise_without_defects(None)


class TestMasks:
    def test_of_a_batch_with_masks(self) -> None:
        mask = Mask(torch.tensor([[[0, 1]], [[0, 0]]]))
        batch = ImageBatch(image=images(), gt_mask=mask)
        found = training.mask_of(batch)
        assert type(found) is Tensor
        assert torch.equal(found, mask.as_subclass(Tensor).to(found.dtype))

    def test_of_a_batch_with_labels_alone(self) -> None:
        partial = torch.full((2, 4, 4), UNKNOWN, dtype=torch.uint8)
        assert torch.equal(training.mask_of(ClassImageBatch(image=images(), partial_mask=Mask(partial))), partial)

    def test_of_a_batch_that_tells_neither(self) -> None:
        batch = ImageBatch(image=images())
        assert training.known_mask(batch) is None
        with pytest.raises(ValueError, match=r"needs masks \(`gt_mask`\), and this batch has none\. .*AuxiliaryData"):
            training.mask_of(batch)


def test_what_was_seen_before_stays_written_down() -> None:
    made = Made(provenance=Provenance(trained_on={"Visa": [], "MVTecAD": ["tile"]}))
    backbone = SimpleNamespace(
        digest="00ff", architecture=SimpleNamespace(name="ViT-tiny", quick_gelu=False, image_size=(96, 64))
    )
    network: Any = SimpleNamespace(backbone=backbone, stages=(1, 3))
    training.note(made, network, data(name="MVTecAD", category="wood"))
    training.note(made, network, data(name="Visa", category="pcb1"))
    assert made.provenance.trained_on == {"Visa": [], "MVTecAD": ["tile", "wood"]}
    assert (made.provenance.fingerprint, made.provenance.stages) == ("00ff", [1, 3])
    training.note(made, network, None)
    assert made.provenance.trained_on == {"Visa": [], "MVTecAD": ["tile", "wood"]}
