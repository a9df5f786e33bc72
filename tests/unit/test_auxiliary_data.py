"""Training data of many categories: class names, mosaics, the epoch's order, what is held out."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder, MVTecAD
from anomalib.data.utils import read_image
from torch import Tensor
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_aprilgan.data import AuxiliaryData
from anomalib_aprilgan.data.multi_category import ClassImageBatch, ClassImageItem, MultiCategoryDataset
from anomalib_aprilgan.data.pre_processing import EightBitResize

from ..conftest import DATASET

CATEGORIES = ["bottle", "metal_nut", "tile"]
RESIZE = EightBitResize((32, 32))


@pytest.fixture
def build() -> Callable[..., AuxiliaryData]:
    def build(**overrides: Any) -> AuxiliaryData:
        arguments = {
            "dataset": "mvtec",
            "root": DATASET,
            "categories": CATEGORIES,
            "num_workers": 0,
            "train_augmentations": RESIZE,
            "train_batch_size": 8,
        }
        data = AuxiliaryData(**(arguments | overrides))
        data.val_augmentations = RESIZE
        data.setup()
        return data

    return build


def category_of(path: str) -> str:
    return Path(path).relative_to(DATASET).parts[0]


class TestItems:
    def test_all_test_images_with_their_class_names(self, build: Callable[..., AuxiliaryData]) -> None:
        data = build()
        samples = data.train_data.samples
        assert len(data.train_data) == 33
        assert Counter(samples.class_name) == dict.fromkeys(CATEGORIES, 11)
        assert Counter(samples.label_index) == {0: 12, 1: 21}
        assert samples.image_path.is_unique
        assert all("/test/" in path for path in samples.image_path)
        assert data.class_names == tuple(CATEGORIES)
        assert data.train_data.has_anomalous

    def test_item_by_hand(self, build: Callable[..., AuxiliaryData]) -> None:
        dataset = build(train_augmentations=None).train_data
        for item in (dataset[index] for index in range(0, 33, 4)):
            assert isinstance(item, ClassImageItem)
            assert item.class_name == category_of(item.image_path)
            assert torch.equal(
                item.image.as_subclass(Tensor), read_image(item.image_path, as_tensor=True).as_subclass(Tensor)
            )
            good = "/good/" in item.image_path
            assert item.gt_label.item() == (0 if good else 1)
            assert item.gt_mask.shape == item.image.shape[-2:]
            assert bool(item.gt_mask.any()) is not good

    def test_batches_carry_a_name_per_image(self, build: Callable[..., AuxiliaryData]) -> None:
        batches = list(build().train_dataloader())
        assert [len(batch.class_name) for batch in batches] == [8, 8, 8, 8, 1]
        for batch in batches:
            assert isinstance(batch, ClassImageBatch)
            assert batch.class_name == [category_of(path) for path in batch.image_path]
            assert batch.image.shape[1:] == (3, 32, 32)
            assert batch.gt_mask.shape[1:] == (32, 32)
        assert len(set(batches[0].class_name)) > 1  # shuffled across categories
        assert sorted(path for batch in batches for path in batch.image_path) == sorted(
            build().train_data.samples.image_path
        )

    def test_augmentations_move_image_and_mask_together(self, build: Callable[..., AuxiliaryData]) -> None:
        plain = build(train_augmentations=None).train_data
        flipped = build(train_augmentations=RandomHorizontalFlip(p=1.0)).train_data
        index = int(plain.samples.index[plain.samples.label_index == 1][0])
        assert torch.equal(flipped[index].image, plain[index].image.flip(-1))
        assert torch.equal(flipped[index].gt_mask, plain[index].gt_mask.flip(-1))

    def test_label_stays_where_a_small_defect_is_lost_in_the_resize(self, build: Callable[..., AuxiliaryData]) -> None:
        dataset = build(train_augmentations=EightBitResize((2, 2))).train_data
        items = [dataset[index] for index in range(33)]
        assert any("/good/" not in item.image_path and not item.gt_mask.any() for item in items)
        assert [item.gt_label.item() for item in items] == dataset.samples.label_index.tolist()


class TestSources:
    def test_data_sets_and_categories(self, build: Callable[..., AuxiliaryData]) -> None:
        assert build().sources == {"MVTecAD": CATEGORIES}

    def test_own_datamodules_instead_and_added(self, build: Callable[..., AuxiliaryData]) -> None:
        root = DATASET / "tile"
        folder = Folder(
            name="floor",
            root=root,
            normal_dir="train/good",
            abnormal_dir="test/hole",
            normal_test_dir="test/good",
            mask_dir="ground_truth/hole",
            val_split_mode="same_as_test",  # by default anomalib keeps half of the test images for validation
            num_workers=0,
        )
        alone = build(dataset=None, categories=None, datamodules=[folder])
        assert alone.class_names == ("floor",)
        assert alone.sources == {"floor": []}
        assert Counter(alone.train_data.samples.label_index) == {0: 4, 1: 3}
        both = build(categories=["bottle"], datamodules=[folder])
        assert both.class_names == ("bottle", "floor")
        assert len(both.train_data) == 11 + 7

    def test_all_categories_by_default(self) -> None:
        assert len(AuxiliaryData("mvtec", num_workers=0).class_names) == 15
        visa = AuxiliaryData("visa", num_workers=0)
        assert len(visa.class_names) == 12
        assert list(visa.sources) == ["Visa"]


class TestMosaic:
    @staticmethod
    def picks(dataset: MultiCategoryDataset, index: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Files that an item is made of."""
        read, seen = type(dataset)._read, []
        monkeypatch.setattr(type(dataset), "_read", lambda self, row: seen.append(row.image_path) or read(self, row))
        dataset[index]
        monkeypatch.setattr(type(dataset), "_read", read)
        return seen

    def test_always(self, build: Callable[..., AuxiliaryData], monkeypatch: pytest.MonkeyPatch) -> None:
        dataset = build(mosaic_rate=1.0, train_augmentations=None).train_data
        for index in range(0, 33, 3):
            picks = self.picks(dataset, index, monkeypatch)
            assert len(picks) == 4
            assert {category_of(path) for path in picks} == {dataset.samples.class_name[index]}
            item = dataset[index]
            first = read_image(picks[0], as_tensor=True)
            height, width = first.shape[-2:]
            assert item.image.shape == (3, 2 * height, 2 * width)
            assert item.gt_mask.shape == (2 * height, 2 * width)
            assert torch.equal(item.image[:, :height, :width].as_subclass(Tensor), first.as_subclass(Tensor))
            assert item.gt_label.item() == int(item.gt_mask.any())

    def test_never(self, build: Callable[..., AuxiliaryData], monkeypatch: pytest.MonkeyPatch) -> None:
        dataset = build(mosaic_rate=0.0).train_data
        for index in range(33):
            assert self.picks(dataset, index, monkeypatch) == [dataset.samples.image_path[index]]

    def test_share(self, build: Callable[..., AuxiliaryData], monkeypatch: pytest.MonkeyPatch) -> None:
        dataset = build(mosaic_rate=0.2, categories=["bottle"]).train_data
        counts = []
        for dataset.epoch in range(20):
            counts += [len(self.picks(dataset, index, monkeypatch)) == 4 for index in range(11)]
        assert 0.1 < sum(counts) / len(counts) < 0.3

    def test_folders_are_equally_likely_whatever_their_size(
        self, build: Callable[..., AuxiliaryData], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = build(mosaic_rate=1.0, categories=["bottle"]).train_data
        # Of 4 good, 4 scratched and 3 pierced images one folder keeps a single one.
        good = [path for path in dataset.samples.image_path if "/good/" in path]
        dataset.samples = dataset.samples[~dataset.samples.image_path.isin(good[1:])].reset_index(drop=True)
        folders = Counter()
        for dataset.epoch in range(10):
            for index in range(len(dataset)):
                folders.update(Path(path).parent.name for path in self.picks(dataset, index, monkeypatch))
        shares = [count / folders.total() for count in folders.values()]
        assert len(shares) == 3
        assert all(abs(share - 1 / 3) < 0.1 for share in shares)

    def test_depends_on_seed_epoch_and_index_alone(self, build: Callable[..., AuxiliaryData]) -> None:
        one, same, other = (build(mosaic_rate=1.0, seed=seed).train_data for seed in (3, 3, 4))
        for index in (0, 17):
            torch.manual_seed(index)
            first = one[index].image
            assert torch.equal(first, same[index].image)
            assert torch.equal(first, one[index].image)
            assert not torch.equal(first, other[index].image)
            assert not torch.equal(first, one[index + 1].image)
        one.epoch = 1
        assert not torch.equal(one[0].image, same[0].image)


class TestOrder:
    @staticmethod
    def order(data: AuxiliaryData, epoch: int) -> list[int]:
        sampler = data.train_dataloader().sampler
        sampler.set_epoch(epoch)
        return list(sampler)

    def test_depends_on_seed_and_epoch_alone(self, build: Callable[..., AuxiliaryData]) -> None:
        data = build(seed=3)
        first, second = self.order(data, 0), self.order(data, 1)
        assert sorted(first) == sorted(second) == list(range(33))
        assert first != second
        assert self.order(build(seed=3), 1) == second
        assert self.order(build(seed=4), 0) != first

    def test_the_sampler_tells_the_epoch(self, build: Callable[..., AuxiliaryData]) -> None:
        data = build(mosaic_rate=1.0)
        self.order(data, 5)
        assert data.train_data.epoch == 5

    def test_ranks_share_the_images(self, build: Callable[..., AuxiliaryData]) -> None:
        data = build()
        shares = []
        for rank in (0, 1):
            data.trainer = type("Trainer", (), {"world_size": 2, "global_rank": rank})()
            shares.append(list(data.train_dataloader().sampler))
        assert [len(share) for share in shares] == [17, 17]  # 33, and one twice
        assert set(shares[0]) | set(shares[1]) == set(range(33))


class TestHeldOut:
    def test_is_disjoint_and_holds_both_kinds(self, build: Callable[..., AuxiliaryData]) -> None:
        data = build(val_split_ratio=0.25)
        train, held_out = set(data.train_data.samples.image_path), set(data.val_data.samples.image_path)
        assert not train & held_out
        assert len(train | held_out) == 33
        assert Counter(data.val_data.samples.label_index) == {0: 3, 1: 5}

    def test_depends_on_the_seed(self, build: Callable[..., AuxiliaryData]) -> None:
        held_out = [set(build(val_split_ratio=0.25, seed=seed).val_data.samples.image_path) for seed in (1, 1, 2)]
        assert held_out[0] == held_out[1] != held_out[2]

    def test_mosaics_neither_show_held_out_images_nor_replace_them(
        self, build: Callable[..., AuxiliaryData], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = build(val_split_ratio=0.25, mosaic_rate=1.0)
        held_out = set(data.val_data.samples.image_path)
        used = set()
        for index in range(len(data.train_data)):
            used.update(TestMosaic.picks(data.train_data, index, monkeypatch))
        assert len(used) > 15
        assert not used & held_out
        for index in range(len(data.val_data)):
            assert len(TestMosaic.picks(data.val_data, index, monkeypatch)) == 1

    def test_loaders(self, build: Callable[..., AuxiliaryData]) -> None:
        data = build(val_split_ratio=0.25)
        (batch,) = data.val_dataloader()
        assert batch.class_name == [category_of(path) for path in batch.image_path]
        assert [path for test in data.test_dataloader() for path in test.image_path] == batch.image_path

    def test_nothing_to_validate_or_test_on(self, build: Callable[..., AuxiliaryData]) -> None:
        data = build()
        assert data.val_dataloader() == []
        with pytest.raises(RuntimeError, match="nothing to test on: set `val_split_ratio` or `validation`"):
            data.test_dataloader()

    def test_validation_on_another_datamodule(self, build: Callable[..., AuxiliaryData]) -> None:
        validation = MVTecAD(DATASET, category="tile", num_workers=0)
        data = build(categories=["bottle", "metal_nut"], validation=validation)
        assert data.class_names == ("bottle", "metal_nut", "tile")
        assert data.sources == {"MVTecAD": ["bottle", "metal_nut"]}
        assert set(data.train_data.samples.class_name) == {"bottle", "metal_nut"}
        assert set(data.val_data.samples.class_name) == {"tile"}
        assert sum(len(batch.class_name) for batch in data.val_dataloader()) == 11

    def test_setup_happens_once(self, build: Callable[..., AuxiliaryData]) -> None:
        data = build(val_split_ratio=0.25)
        before = data.train_data, data.val_data
        data.setup("fit")
        assert (data.train_data, data.val_data) == before


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, r"`dataset` must be one of \('mvtec', 'visa'\), or `datamodules` a list .*; got neither\."),
            ({"dataset": "mvtec2"}, r"`dataset` must be one of \('mvtec', 'visa'\), got 'mvtec2'\. Give others as"),
            (
                {"dataset": "mvtec", "categories": ["bottle", "nut"]},
                r"`categories` must be out of \('bottle', .*got \['nut'\]",
            ),
            ({"dataset": "visa", "mosaic_rate": 1.5}, r"`mosaic_rate` must lie in \[0, 1\], got 1\.5\."),
            ({"dataset": "visa", "mosaic_rate": -0.1}, r"`mosaic_rate` must lie in \[0, 1\], got -0\.1\."),
            ({"dataset": "visa", "synthetic_rate": 1.5}, r"`synthetic_rate` must lie in \[0, 1\], got 1\.5\."),
            ({"dataset": "visa", "val_split_ratio": 2}, r"`val_split_ratio` must lie in \[0, 1.*, got 2"),
            ({"dataset": "visa", "val_split_ratio": 1.0}, r"`val_split_ratio` must lie in \[0, 1\), got 1"),
            (
                {"dataset": "visa", "val_split_ratio": 0.5, "validation": MVTecAD(DATASET)},
                r"`val_split_ratio` and `validation` are two ways to validate: give one of them\.",
            ),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            AuxiliaryData(**arguments)

    def test_categories_or_root_without_a_dataset(self) -> None:
        """They would be dropped in silence."""
        with pytest.raises(ValueError, match="`categories`"):
            AuxiliaryData(categories=["bottle"], datamodules=[MVTecAD(DATASET)])
