"""Training on what a user has: folders with masks, with labels alone, of good parts alone, and all of them together."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import AnomalibDataModule, Folder, MVTecAD, Tabular
from anomalib.data.utils import read_image, read_mask
from anomalib.engine import Engine
from torch import Tensor
from torchvision.tv_tensors import Image

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.data import AuxiliaryData
from anomalib_aprilgan.data.listing import class_name_of
from anomalib_aprilgan.data.multi_category import ClassImageBatch, ClassImageItem, synthetic_defect
from anomalib_aprilgan.data.pre_processing import EightBitResize
from anomalib_aprilgan.network.losses import UNKNOWN

from ..conftest import DATASET

TILE = DATASET / "tile"
KINDS = ("hole", "scratch")


def with_masks(name: str = "floor", root: Path = TILE, **overrides: Any) -> Folder:
    arguments = {
        "normal_dir": "train/good",
        "normal_test_dir": "test/good",
        "abnormal_dir": [f"test/{kind}" for kind in KINDS],
        "mask_dir": [f"ground_truth/{kind}" for kind in KINDS],
    }
    return Folder(name=name, root=root, num_workers=0, **(arguments | overrides))


def with_labels(name: str = "bottle neck", root: Path = DATASET / "bottle", **overrides: Any) -> Folder:
    return with_masks(name, root, **({"mask_dir": None} | overrides))


def good_only(name: str = "nut", root: Path = DATASET / "metal_nut") -> Folder:
    return Folder(name=name, root=root, normal_dir="train/good", num_workers=0)


def gather(*datamodules: AnomalibDataModule, size: int | None = 32, **overrides: Any) -> AuxiliaryData:
    resize = None if size is None else EightBitResize((size, size))
    data = AuxiliaryData(
        datamodules=list(datamodules),
        num_workers=0,
        train_augmentations=resize,
        **({"train_batch_size": 8} | overrides),
    )
    data.val_augmentations = resize
    data.setup()
    return data


def items_of(data: AuxiliaryData) -> list[ClassImageItem]:
    return [data.train_data[index] for index in range(len(data.train_data))]


def is_good(item: ClassImageItem) -> bool:
    return "good" in Path(item.image_path).parts


class TestMasks:
    def test_folder_gives_images_masks_and_the_users_name(self) -> None:
        data = gather(with_masks("floor tile"), size=None)
        items = items_of(data)
        assert data.class_names == ("floor tile",)
        assert data.sources == {"floor tile": []}
        assert Counter(is_good(item) for item in items) == {True: 4, False: 7}
        for item in items:
            path = Path(item.image_path)
            assert item.class_name == "floor tile"
            assert torch.equal(item.image.as_subclass(Tensor), read_image(path, as_tensor=True).as_subclass(Tensor))
            if is_good(item):
                assert not item.gt_mask.any()
            else:
                mask = TILE / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
                assert torch.equal(item.gt_mask, read_mask(mask, as_tensor=True).bool())

    def test_any_layout(self, tmp_path: Path) -> None:
        for source, target in (("test/good", "ok"), ("test/hole", "nok/deep"), ("ground_truth/hole", "marks")):
            shutil.copytree(TILE / source, tmp_path / target)
        folder = with_masks(
            "floor", tmp_path, normal_dir="ok", normal_test_dir="ok", abnormal_dir="nok", mask_dir="marks"
        )
        items = items_of(gather(folder))
        assert Counter(bool(item.gt_mask.any()) for item in items) == {False: 4, True: 3}

    def test_a_draw_of_anomalibs_is_the_same_again(self) -> None:
        """Without ``normal_test_dir``, anomalib draws some of the normal images for testing, by default at random."""
        paths = []
        for seed in (1, 1, 2, 3, 4):
            torch.seed()
            paths.append([item.image_path for item in items_of(gather(with_masks(normal_test_dir=None), seed=seed))])
        assert paths[0] == paths[1]
        assert len({tuple(path) for path in paths}) > 1

    def test_a_mask_is_missing(self) -> None:
        message = r"`datamodules`: the masks of floor do not fit its images\. Every image in `abnormal_dir` needs one"
        with pytest.raises(ValueError, match=message):
            gather(with_masks(mask_dir="ground_truth/hole"))

    def test_a_mask_has_another_name(self, tmp_path: Path) -> None:
        shutil.copytree(TILE, tmp_path / "tile")
        masks = tmp_path / "tile" / "ground_truth" / "hole"
        (masks / "000_mask.png").rename(masks / "other.png")
        with pytest.raises(ValueError, match="the masks of floor do not fit its images"):
            gather(with_masks(root=tmp_path / "tile"))

    def test_folder_without_images(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(RuntimeError, match=r"Found 0 .* images in .*empty"):
            gather(Folder(name="floor", root=tmp_path, normal_dir="empty", num_workers=0))
        with pytest.raises(FileNotFoundError, match="nowhere"):
            gather(with_masks(normal_dir="nowhere"))


class TestLabels:
    def test_items_say_that_the_mask_is_unknown(self) -> None:
        for item in items_of(gather(with_labels())):
            if is_good(item):
                assert not item.gt_mask.any()
                assert item.partial_mask is None
            else:
                assert item.gt_mask is None
                assert (item.partial_mask == UNKNOWN).all()
                assert item.partial_mask.shape == item.image.shape[-2:]
            assert item.gt_label.item() == (0 if is_good(item) else 1)

    def test_batches(self) -> None:
        data = gather(with_labels(), with_masks(), train_batch_size=4)
        seen = set()
        for batch in data.train_dataloader():
            assert isinstance(batch, ClassImageBatch)
            unknown = [
                name == "bottle neck" and bool(label)
                for name, label in zip(batch.class_name, batch.gt_label, strict=True)
            ]
            seen.add(any(unknown))
            if not any(unknown):
                assert batch.partial_mask is None
                assert batch.gt_mask.dtype == torch.bool
                continue
            assert batch.gt_mask is None  # or a metric would take the image for a normal one
            assert [(mask == UNKNOWN).all().item() for mask in batch.partial_mask] == unknown
            for mask, path, is_unknown in zip(batch.partial_mask, batch.image_path, unknown, strict=True):
                if not is_unknown:
                    assert set(mask.unique().tolist()) == ({0} if "/good/" in path else {0, 1})
            assert [item.partial_mask.shape for item in batch.items] == [(32, 32)] * len(unknown)
        assert seen == {True, False}

    def test_batch_of_different_sizes(self) -> None:
        items = [
            ClassImageItem(image=Image(torch.rand(3, 8, 8)), gt_mask=torch.ones(8, 8), gt_label=torch.tensor(1)),
            ClassImageItem.without_mask(ClassImageItem(image=Image(torch.rand(3, 16, 16)), gt_label=torch.tensor(1))),
        ]
        batch = ClassImageBatch.collate(items)
        assert batch.image.shape == (2, 3, 16, 16)
        assert [mask.unique().tolist() for mask in batch.partial_mask] == [[1], [UNKNOWN]]
        assert items[0].gt_mask is not None

    def test_a_table_with_some_masks(self) -> None:
        rows = [(TILE / "test" / "good" / f"{n:03}.png", 0, "") for n in range(4)]
        rows += [(TILE / "test" / "hole" / f"{n:03}.png", 1, "") for n in (0, 1)]
        rows += [(TILE / "test" / "hole" / "002.png", 1, TILE / "ground_truth" / "hole" / "002_mask.png")]
        rows += [(TILE / "train" / "good" / f"{n:03}.png", 0, "") for n in range(2)]
        samples = pd.DataFrame(rows, columns=["image_path", "label_index", "mask_path"]).astype(
            {"image_path": str, "mask_path": str}
        )
        samples["split"] = ["test"] * 7 + ["train"] * 2
        items = items_of(gather(Tabular("floor", samples=samples, num_workers=0)))
        assert [item.gt_mask is None for item in items if not is_good(item)] == [True, True, False]
        assert all(item.gt_mask is not None for item in items if is_good(item))

    def test_mosaic_with_an_unknown_quarter_is_unknown(self) -> None:
        data = gather(with_labels(abnormal_dir="test/hole"), mosaic_rate=1.0)
        unknown = []
        for data.train_data.epoch in range(10):
            for item in items_of(data):
                assert (item.gt_mask is None) == bool(item.gt_label)
                assert item.gt_mask is None or not item.gt_mask.any()
                unknown.append(item.gt_mask is None)
        assert 0.85 < np.mean(unknown) < 1.0  # of 4 images from 2 folders, 15/16

    def test_nothing_normal(self) -> None:
        labels = with_labels()
        labels.setup()
        everything = labels.test_data + labels.val_data
        bad = everything.subsample([int(i) for i in everything.samples.index[everything.samples.label_index == 1]])
        labels.test_data, labels.val_split_mode, labels.setup = bad, "none", lambda: None
        with pytest.raises(
            ValueError, match="of bottle neck are all anomalous and without masks, which teaches nothing"
        ):
            gather(labels)

    def test_unlabelled_images(self) -> None:
        labels = with_labels(val_split_mode="none")
        labels.setup()
        labels.test_data.samples.loc[0, "label_index"] = -1
        labels.setup = lambda: None
        with pytest.raises(ValueError, match="some images of bottle neck are labelled neither normal nor anomalous"):
            gather(labels)


class TestGoodParts:
    def test_all_images_with_and_without_defects_of_noise(self) -> None:
        data = gather(good_only(), synthetic_rate=0.5, size=None)
        assert data.sources == {"nut": []}
        assert len(data.train_data) == 6  # what anomalib would set aside for testing included
        assert data.train_data.has_anomalous
        share = []
        for data.train_data.epoch in range(8):
            for item in items_of(data):
                original = read_image(item.image_path, as_tensor=True)
                changed = (item.image != original).any(dim=0)
                assert item.gt_label.item() == int(item.gt_mask.any())
                assert not changed[~item.gt_mask.bool()].any()
                assert bool(changed.any()) == bool(item.gt_label)
                assert 0.0 <= item.image.min() <= item.image.max() <= 1.0
                share.append(item.gt_label.item())
        assert 0.35 < np.mean(share) < 0.65

    @pytest.mark.parametrize(("rate", "share"), [(0.0, 0), (1.0, 6)])
    def test_none_and_all(self, rate: float, share: int) -> None:
        data = gather(good_only(), synthetic_rate=rate)
        assert sum(item.gt_label.item() for item in items_of(data)) == share
        assert data.train_data.has_anomalous == bool(share)

    def test_depends_on_seed_epoch_and_index_alone(self) -> None:
        one, same, other = (gather(good_only(), synthetic_rate=1.0, seed=seed).train_data for seed in (3, 3, 4))
        for index in (0, 4):
            torch.seed()
            before = torch.get_rng_state()
            first = one[index].image
            assert torch.equal(torch.get_rng_state(), before)
            assert torch.equal(first, same[index].image)
            assert torch.equal(first, one[index].image)
            assert not torch.equal(first, other[index].image)
        one.epoch = 1
        assert not torch.equal(one[0].image, same[0].image)

    def test_worker_processes_draw_the_same(self) -> None:
        data = gather(good_only(), synthetic_rate=1.0, train_batch_size=6)
        (batch,) = data.train_dataloader()
        data.num_workers = 1
        (from_worker,) = data.train_dataloader()
        assert torch.equal(batch.image, from_worker.image)
        assert torch.equal(batch.gt_mask, from_worker.gt_mask)

    def test_real_defects_get_no_company(self) -> None:
        data = gather(with_masks(), good_only(), synthetic_rate=1.0)
        plain = gather(with_masks(), good_only())
        for one, other in zip(items_of(data), items_of(plain), strict=True):
            assert torch.equal(one.image, other.image) == (one.class_name == "floor")

    def test_held_out_images_keep_their_defects(self) -> None:
        data = gather(good_only(), synthetic_rate=1.0, val_split_ratio=0.5)
        first = [data.val_data[index].image for index in range(len(data.val_data))]
        data.train_dataloader().sampler.set_epoch(3)
        assert data.train_data.epoch == 3
        assert all(torch.equal(data.val_data[index].image, image) for index, image in enumerate(first))
        assert all(data.val_data[index].gt_label for index in range(len(data.val_data)))

    def test_other_data_has_real_ones(self) -> None:
        message = (
            r"`synthetic_rate=0\.5` puts defects into datamodules without any, and all of these have real ones: floor"
        )
        with pytest.raises(ValueError, match=message):
            gather(with_masks(), synthetic_rate=0.5)

    def test_defect_of_a_large_image(self) -> None:
        image = torch.full((3, 70, 110), 0.5)
        changed, mask = synthetic_defect(image, 2**62)
        assert changed.shape == (3, 70, 110)
        assert mask.shape == (70, 110)
        assert set(mask.unique().tolist()) == {0, 1}
        assert (image == 0.5).all()


class Unnamed(Folder):
    """A datamodule of the user's own, which has no name but that of its type."""

    @property
    def name(self) -> str:
        return type(self).__name__


def unnamed() -> Unnamed:
    folder = with_masks("floor", seed=0)
    folder.__class__ = Unnamed
    return folder


class TestClassName:
    def test_category_then_name_then_object(self) -> None:
        assert class_name_of(MVTecAD(DATASET, category="tile")) == "tile"
        assert class_name_of(with_masks("floor")) == "floor"
        assert class_name_of(unnamed()) == "object"

    def test_inspection_takes_the_words_of_training(self, april_gan: Callable[..., AprilGAN], tmp_path: Path) -> None:
        engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, enable_progress_bar=False)

        def maps(folder: Folder, class_name: str | None = None) -> Tensor:
            model = april_gan(class_name=class_name, post_processor=False, evaluator=False, visualizer=False)
            return torch.cat([batch.anomaly_map for batch in engine.predict(model, datamodule=folder)])

        def floor() -> Folder:
            return with_masks("floor", seed=0)

        assert torch.equal(maps(floor()), maps(floor(), "floor"))
        assert torch.equal(maps(unnamed()), maps(unnamed(), "object"))
        assert not torch.equal(maps(floor()), maps(unnamed()))


class TestTogether:
    def test_everything_in_one_training(self, april_gan: Callable[..., AprilGAN], tmp_path: Path) -> None:
        benchmark = MVTecAD(DATASET, category="tile", num_workers=0)
        data = gather(
            with_masks(), with_labels(), good_only(), benchmark, synthetic_rate=0.5, val_split_ratio=0.3, size=None
        )
        assert data.sources == {"floor": [], "bottle neck": [], "nut": [], "MVTecAD": ["tile"]}
        model = april_gan(adapters=None)
        engine = Engine(
            default_root_dir=tmp_path, accelerator="cpu", devices=1, enable_progress_bar=False, max_epochs=1
        )
        engine.fit(model, datamodule=data)
        assert torch.isfinite(engine.trainer.callback_metrics["train_loss"])
        assert torch.isfinite(engine.trainer.callback_metrics["val_loss"])
        assert model.made.provenance.trained_on == data.sources
        assert model.made.provenance.overlap(with_masks()) == "floor"

    @pytest.mark.filterwarnings("ignore:\\n!!!")  # tested on what it was trained on
    def test_images_without_masks_do_not_count_as_normal_pixels(
        self, april_gan: Callable[..., AprilGAN], tmp_path: Path
    ) -> None:
        """Held-out images of labels alone: figures of images, none of pixels; with masks beside them those alone."""
        engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, enable_progress_bar=False)
        labels, masks = gather(good_only(), validation=with_labels()), gather(good_only(), validation=with_masks())
        (figures,) = engine.test(april_gan(), datamodule=labels)
        assert "image_AUROC" in figures
        assert not any(name.startswith("pixel") for name, value in figures.items() if value is not None)
        (figures,) = engine.test(april_gan(), datamodule=masks)
        assert "pixel_AUROC" in figures

    @pytest.mark.parametrize("kind", ["labels", "good parts"])
    def test_a_resumed_training_is_the_same_bit_by_bit(
        self, kind: str, april_gan: Callable[..., AprilGAN], tmp_path: Path
    ) -> None:
        def fit(folder: str, epochs: int, ckpt_path: str | None = None) -> tuple[AprilGAN, Engine]:
            torch.manual_seed(0 if ckpt_path is None else 1)
            source, rate = (with_labels(normal_test_dir=None), 0.0) if kind == "labels" else (good_only(), 0.5)
            model = april_gan(adapters=None)
            engine = Engine(
                default_root_dir=tmp_path / folder,
                accelerator="cpu",
                devices=1,
                enable_progress_bar=False,
                max_epochs=epochs,
            )
            engine.fit(model, datamodule=gather(source, synthetic_rate=rate, size=None), ckpt_path=ckpt_path)
            return model, engine

        whole, _ = fit("whole", 2)
        half, engine = fit("half", 1)
        resumed, _ = fit("resumed", 2, engine.trainer.checkpoint_callback.best_model_path)
        for name, value in whole.model.adapters.state_dict().items():
            assert torch.equal(value, resumed.model.adapters.state_dict()[name])
            assert not torch.equal(value, half.model.adapters.state_dict()[name])
