"""Data that was used with AprilGAN behaves as before with the next model, whatever became of the run."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch, MVTecAD, PredictDataset
from anomalib.data.datasets.image.folder import FolderDataset
from anomalib.data.datasets.image.mvtecad import MVTecADDataset
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.data import AuxiliaryData, MultiCategoryData

from ..conftest import DATASET

OPTIONS: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False}


class Raises(Callback):
    """Ends a run in the middle."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def fail(self, *args: object) -> None:
        del args
        raise self.error

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end = on_train_batch_end = fail


class Watches(LightningModule):
    """The next model: notes the images that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def test_step(self, batch: ImageBatch) -> None:
        self.seen += [image.as_subclass(Tensor) for image in batch.image]

    predict_step = test_step


def images_of(stage: str, data: Any, folder: Path) -> list[Tensor]:
    """What the next model sees of a datamodule or loaders."""
    model = Watches()
    trainer = Trainer(**OPTIONS, enable_checkpointing=False, default_root_dir=folder, enable_model_summary=False)
    getattr(trainer, stage)(model, data)
    return model.seen


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) > 0 and all(map(torch.equal, before, after))


def write_wide(path: Path) -> None:
    """A 16-bit image, which anomalib reads as white and AprilGAN as a viewer shows it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[:48, :64]
    Image.fromarray(((rows * 700 + columns * 500) % 65536).astype(np.uint16)).save(path)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    for name in ("good/a.png", "good/b.png", "bad/c.png", "bad/d.png"):
        write_wide(tmp_path / "parts" / name)
    return tmp_path / "parts"


@pytest.fixture
def folder(parts: Path) -> Folder:
    options = {"num_workers": 0, "val_split_mode": "same_as_test", "eval_batch_size": 2, "train_batch_size": 2}
    return Folder("parts", root=parts, normal_dir="good", abnormal_dir="bad", normal_test_dir="good", **options)


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Engine]:
    return lambda *callbacks, **options: Engine(
        callbacks=list(callbacks), default_root_dir=tmp_path / "run", **OPTIONS, **options
    )


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning switches Ctrl+C off when it was pressed."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


class TestDatamodule:
    @pytest.mark.parametrize("stage", ["validate", "test", "predict"])
    def test_is_itself_after_a_run(
        self,
        stage: str,
        folder: Folder,
        april_gan: Callable[..., AprilGAN],
        engine: Callable[..., Engine],
        tmp_path: Path,
    ) -> None:
        before = images_of("test", folder, tmp_path / "before")
        model = april_gan()
        for _ in range(2):
            getattr(engine(), stage)(model, datamodule=folder)
            assert type(folder.test_data) is type(folder.train_data) is FolderDataset
            assert folder.test_data.__getitem__.__func__.__globals__["read_image"] is read_image
            assert same(before, images_of("test", folder, tmp_path / "after"))

    def test_anomalibs_own(self, april_gan: Callable[..., AprilGAN], engine: Callable[..., Engine]) -> None:
        datamodule = MVTecAD(root=DATASET, category="bottle", num_workers=0)
        engine().test(april_gan(), datamodule=datamodule)
        assert type(datamodule.test_data) is MVTecADDataset

    def test_many_categories(
        self, folder: Folder, april_gan: Callable[..., AprilGAN], engine: Callable[..., Engine]
    ) -> None:
        engine().test(april_gan(), datamodule=MultiCategoryData(datamodules=[folder], num_workers=0))
        assert type(folder.test_data) is FolderDataset

    def test_training(self, folder: Folder, april_gan: Callable[..., AprilGAN], engine: Callable[..., Engine]) -> None:
        data = AuxiliaryData(datamodules=[folder], num_workers=0)
        engine(max_epochs=1).fit(april_gan(adapters=None), datamodule=data)
        assert type(folder.test_data) is FolderDataset

    @pytest.mark.usefixtures("interruptible")
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("stage", ["test", "predict", "fit"])
    def test_is_itself_after_a_run_that_failed(
        self,
        stage: str,
        error: type[BaseException],
        folder: Folder,
        april_gan: Callable[..., AprilGAN],
        engine: Callable[..., Engine],
        tmp_path: Path,
    ) -> None:
        before = images_of("test", folder, tmp_path / "before")
        adapters = {"adapters": None} if stage == "fit" else {}
        data = AuxiliaryData(datamodules=[folder], num_workers=0) if stage == "fit" else folder
        with pytest.raises((error, SystemExit)):
            getattr(engine(Raises(error), max_epochs=1), stage)(april_gan(**adapters), datamodule=data)
        assert type(folder.test_data) is FolderDataset
        assert same(before, images_of("test", folder, tmp_path / "after"))

    def test_a_run_within_a_run(
        self, folder: Folder, april_gan: Callable[..., AprilGAN], engine: Callable[..., Engine]
    ) -> None:
        """The inner ones leave the outer one its reading, and the outer one leaves nothing."""
        kinds, outer, inner, failing = [], april_gan(), april_gan(), april_gan()

        class Nested(Callback):
            def on_test_batch_end(self, *args: object) -> None:
                del args
                kinds.append(type(folder.test_data))
                engine().test(inner, datamodule=folder)
                kinds.append(type(folder.test_data))
                with pytest.raises(RuntimeError):
                    engine(Raises(RuntimeError)).test(failing, datamodule=folder)
                kinds.append(type(folder.test_data))

        engine(Nested()).test(outer, datamodule=folder)
        assert len(kinds) == 6
        assert len(set(kinds)) == 1
        assert FolderDataset not in kinds
        assert type(folder.test_data) is FolderDataset


class TestLoaders:
    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize(
        "wrap", [lambda data: data, lambda data: Subset(data, [1, 2]), lambda data: ConcatDataset([data, data])]
    )
    @pytest.mark.parametrize("stage", ["test", "predict"])
    def test_are_themselves_after_a_run(
        self, stage: str, wrap: Callable, workers: int, parts: Path, april_gan: Callable[..., AprilGAN], tmp_path: Path
    ) -> None:
        dataset = PredictDataset(parts)
        options = {"num_workers": workers, "persistent_workers": workers > 0, "batch_size": 2}
        loader = DataLoader(wrap(dataset), collate_fn=ImageBatch.collate, **options)
        before, state = images_of(stage, loader, tmp_path), {**vars(loader), "_iterator": None}
        trainer = Trainer(**OPTIONS, default_root_dir=tmp_path)
        getattr(trainer, stage)(april_gan(class_name="part", evaluator=False), loader)
        assert type(loader) is DataLoader
        assert vars(loader) == state
        assert type(dataset) is PredictDataset
        assert vars(dataset).keys() == vars(PredictDataset(parts)).keys()
        assert same(before, images_of(stage, loader, tmp_path))

    def test_skipped_files_are_told_before_all_is_put_back(
        self, parts: Path, april_gan: Callable[..., AprilGAN], tmp_path: Path
    ) -> None:
        (parts / "bad" / "c.png").write_bytes(b"broken")
        dataset = PredictDataset(parts)
        loader = DataLoader(dataset, collate_fn=ImageBatch.collate)
        with pytest.warns(UserWarning, match=r"1 files could not be read and have no prediction: c\.png"):
            Trainer(**OPTIONS, default_root_dir=tmp_path).predict(april_gan(class_name="part"), loader)
        assert type(loader) is DataLoader
        assert vars(dataset).keys() == vars(PredictDataset(parts)).keys()
        with pytest.raises(OSError, match="cannot identify image file"):
            list(loader)


class TestDrawings:
    def test_an_image_is_decoded_once(
        self,
        parts: Path,
        april_gan: Callable[..., AprilGAN],
        engine: Callable[..., Engine],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        opened: Counter[str] = Counter()
        open_image = Image.open

        def count(path: Any, *args: Any, **kwargs: Any) -> Image.Image:
            opened[Path(path).name] += 1
            return open_image(path, *args, **kwargs)

        monkeypatch.setattr(Image, "open", count)
        engine().predict(april_gan(class_name="part"), data_path=parts)
        assert opened == {"a.png": 1, "b.png": 1, "c.png": 1, "d.png": 1}
        assert len(list((tmp_path / "run").rglob("images/**/*.png"))) == 4
