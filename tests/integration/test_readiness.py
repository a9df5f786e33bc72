"""What is made ready is what the run at hand needs: for its data, its references, its device and its precision."""

from __future__ import annotations

import shutil
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, MVTecAD
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.decision.calibration import Calibration, Thresholds

from ..conftest import DATASET
from .runs import adapters, auxiliary, by_path, category, engine, equal, good, read

Build = Callable[..., AprilGAN]


def trainer(folder: Path) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )


# -- training goes on, and what it leaves serves other data -------------------------------------------


def test_a_second_fit_trains_on(april_gan: Build, tmp_path: Path) -> None:
    model = april_gan(adapters=None)
    engine(tmp_path / "a", max_epochs=1).fit(model, datamodule=auxiliary())
    first = adapters(model)
    engine(tmp_path / "b", max_epochs=1).fit(model, datamodule=auxiliary())
    assert all(not torch.equal(value, first[name]) for name, value in adapters(model).items())


def test_fit_trains_on_from_a_loaded_checkpoint(april_gan: Build, tmp_path: Path) -> None:
    model = april_gan(adapters=None)
    engine(tmp_path / "a", max_epochs=1).fit(model, datamodule=auxiliary(categories=["tile"]))
    (checkpoint,) = (tmp_path / "a").glob("**/*.ckpt")
    loaded = AprilGAN.load_from_checkpoint(checkpoint)
    first = adapters(loaded)
    assert equal(first, adapters(model))
    engine(tmp_path / "b", max_epochs=1).fit(loaded, datamodule=auxiliary(categories=["metal_nut"]))
    assert all(not torch.equal(value, first[name]) for name, value in adapters(loaded).items())
    file = loaded.save_adapters(tmp_path / "both.safetensors")
    target = april_gan(adapters=str(file))
    with pytest.warns(UserWarning, match=r"trained on MVTecAD \(tile\), which is the data under test"):
        engine(tmp_path / "c").test(target, datamodule=category("tile"), verbose=False)


@pytest.mark.parametrize("validation", [None, "bottle"])
@pytest.mark.parametrize("k_shot", [0, 2])
def test_trained_models_are_tested_as_fresh_ones_with_their_adapters(
    april_gan: Build, tmp_path: Path, k_shot: int, validation: str | None
) -> None:
    """anomalib's Engine does not validate before it tests a model that it may train: thresholds are learned anyway."""
    model = april_gan(adapters=None, k_shot=k_shot)
    data = auxiliary(validation=None if validation is None else category(validation))
    engine(tmp_path / "fit", max_epochs=1).fit(model, datamodule=data)
    (checkpoint,) = (tmp_path / "fit").glob("**/*.ckpt")
    file = model.save_adapters(tmp_path / "own.safetensors")
    fresh = april_gan(adapters=str(file), k_shot=k_shot)
    expected = engine(tmp_path / "fresh").test(fresh, datamodule=category("bottle"), verbose=False)
    for tested in (model, AprilGAN.load_from_checkpoint(checkpoint)):
        found = engine(tmp_path / "test").test(tested, datamodule=category("bottle"), verbose=False)
        assert found[0] == pytest.approx(expected[0], abs=1e-6)
        assert tested.post_processor.values() == pytest.approx(fresh.post_processor.values(), abs=1e-6)


# -- bounds and thresholds are those of the class and the references at hand -------------------------


class TestImagesAlone(MVTecAD):
    """Predicts its test images; there is nothing to learn thresholds from."""

    __test__ = False

    def val_dataloader(self) -> list[Any]:
        return []

    predict_dataloader = MVTecAD.test_dataloader


def test_bounds_are_those_of_the_next_category(april_gan: Build, tmp_path: Path) -> None:
    def predict(model: AprilGAN, name: str) -> dict[str, float]:
        engine(tmp_path).predict(model, datamodule=TestImagesAlone(root=DATASET, category=name, num_workers=0))
        return model.post_processor.values()

    references = {"k_shot": 2, "references": str(good("bottle"))}
    model = april_gan(**references)
    bottle, tile = predict(model, "bottle"), predict(model, "tile")
    assert bottle["map_maximum_min"] > 0
    assert bottle != tile  # other words, other maps
    assert tile == predict(april_gan(**references), "tile")


def move_folder(folder: Path) -> Path:
    return Path(shutil.move(folder, folder.parent / "elsewhere"))


def rename_files(folder: Path) -> Path:
    for file in sorted(folder.iterdir()):
        file.rename(folder / f"part_{file.name}")
    return folder


def write_files_again(folder: Path) -> Path:
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("change", [move_folder, rename_files, write_files_again])
def test_thresholds_are_kept_where_the_references_are_the_same_images(
    april_gan: Build, tmp_path: Path, change: Callable[[Path], Path]
) -> None:
    folder = shutil.copytree(good("bottle"), tmp_path / "references")
    model = april_gan(class_name="bottle", k_shot=2, references=str(folder))
    engine(tmp_path / "train").train(model, datamodule=category("bottle"))
    (checkpoint,) = (tmp_path / "train").glob("**/*.ckpt")
    learned = model.post_processor.values()
    again = april_gan(class_name="bottle", k_shot=2, references=str(change(folder)))
    assert learned != again.post_processor.values()
    engine(tmp_path / "test").test(again, datamodule=category("bottle"), ckpt_path=checkpoint, verbose=False)
    assert again.post_processor.values() == learned


def test_other_images_under_the_same_names_are_remembered_anew(april_gan: Build, tmp_path: Path) -> None:
    folder = shutil.copytree(good("bottle"), tmp_path / "references")
    given = {"class_name": "bottle", "k_shot": 2, "references": str(folder)}
    model = april_gan(**given)
    engine(tmp_path / "train").train(model, datamodule=category("bottle"))
    (checkpoint,) = (tmp_path / "train").glob("**/*.ckpt")
    shutil.copytree(good("tile"), folder, dirs_exist_ok=True)
    image = DATASET / "bottle" / "test" / "good" / "000.png"
    (restored,) = engine(tmp_path / "a").predict(april_gan(**given), data_path=image, ckpt_path=checkpoint)
    (fresh,) = engine(tmp_path / "b").predict(april_gan(**given), data_path=image)
    torch.testing.assert_close(restored.anomaly_map, fresh.anomaly_map)
    torch.testing.assert_close(restored.pred_score, fresh.pred_score)


# -- references that were asked for are there, or their absence is said ------------------------------


def test_a_call_after_fit_uses_the_references(april_gan: Build, tmp_path: Path) -> None:
    references = {"class_name": "bottle", "k_shot": 2, "references": str(good("bottle"))}
    model = april_gan(adapters=None, **references)
    engine(tmp_path, max_epochs=1).fit(model, datamodule=auxiliary())
    file = model.save_adapters(tmp_path / "own.safetensors")
    images = torch.rand(2, 3, 70, 90, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.eval()(images)
        expected = april_gan(adapters=str(file), **references).eval()(images)
    torch.testing.assert_close(found.pred_score, expected.pred_score)
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map)


def test_a_call_after_fit_without_references_is_an_error(april_gan: Build, tmp_path: Path) -> None:
    model = april_gan(adapters=None, class_name="bottle", k_shot=2)
    engine(tmp_path, max_epochs=1).fit(model, datamodule=auxiliary())
    with pytest.raises(ValueError, match=r"`k_shot=2` needs normal images of 'bottle': pass `references`"):
        model.eval()(torch.rand(1, 3, 96, 96))


def test_validation_without_references_is_an_error(april_gan: Build, tmp_path: Path) -> None:
    data = category("bottle")
    data.setup()
    model = april_gan(class_name="bottle", k_shot=2)
    with pytest.raises(ValueError, match=r"`k_shot=2` needs normal images of 'bottle': pass `references`"):
        trainer(tmp_path).validate(model, data.val_dataloader(), verbose=False)


@pytest.mark.parametrize("name", ["no such class", ["no such class"]])
def test_a_class_that_is_not_there_is_an_error(april_gan: Build, name: str | list[str]) -> None:
    model = april_gan(class_name="bottle").eval()
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images, "bottle").pred_score, model(images).pred_score)
    with pytest.raises(ValueError, match=r"no such class belongs to none of the classes \('bottle',\)"):
        model(images, name)


# -- references and inspected images are treated alike -----------------------------------------------


@pytest.fixture
def large_image(tmp_path: Path) -> Path:
    """A bottle of 800 x 800 pixels with structure at every scale, so that how it is made smaller matters."""
    rng = np.random.default_rng(0)
    small = Image.open(good("bottle") / "000.png").convert("RGB")
    pixels = np.asarray(small.resize((800, 800), Image.Resampling.BICUBIC), dtype=int)
    file = tmp_path / "images" / "bottle.png"
    file.parent.mkdir()
    Image.fromarray((pixels + rng.integers(-25, 25, (800, 800, 3))).clip(0, 255).astype(np.uint8)).save(file)
    return file


def raw_maps(build: Build, file: Path, folder: Path, **options: Any) -> dict[str, Tensor]:
    """The raw map of an image in the Engine and from a call."""
    model = build(class_name="bottle", post_processor=False, visualizer=False, **options)
    (batch,) = engine(folder).predict(model, data_path=file)
    with torch.no_grad():
        called = model.eval()(read(file))
    return {"engine": batch.anomaly_map, "call": called.anomaly_map}


def own_pre_processor() -> PreProcessor:
    mean, std = (0.48, 0.45, 0.41), (0.27, 0.26, 0.28)
    resize = Resize((96, 96), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return PreProcessor(Compose([resize, Normalize(mean, std)]))


@pytest.mark.parametrize("pre_processor", [own_pre_processor, lambda: True], ids=["of the user", "default"])
def test_an_image_that_is_its_own_reference_has_no_distance(
    april_gan: Build, tmp_path: Path, large_image: Path, pre_processor: Callable[[], nn.Module | bool]
) -> None:
    references = {"k_shot": 1, "references": [str(large_image)]}
    with_itself = raw_maps(april_gan, large_image, tmp_path, pre_processor=pre_processor(), **references)
    with_none = raw_maps(april_gan, large_image, tmp_path, pre_processor=pre_processor())
    for where, anomaly_map in with_itself.items():
        torch.testing.assert_close(anomaly_map, with_none[where], atol=1e-5, rtol=0)


def test_references_are_encoded_in_the_precision_of_the_run(april_gan: Build, tmp_path: Path) -> None:
    file = good("bottle") / "000.png"

    def anomaly_map(**options: Any) -> Tensor:
        model = april_gan(class_name="bottle", post_processor=False, visualizer=False, **options)
        (batch,) = engine(tmp_path, precision="bf16-mixed").predict(model, data_path=file)
        return batch.anomaly_map

    of_itself = anomaly_map(k_shot=1, references=[str(file)])
    torch.testing.assert_close(of_itself, anomaly_map(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("calibration", [None, "references"])
def test_whatever_is_encoded_is_encoded_in_the_precision_of_the_run(
    april_gan: Build, tmp_path: Path, calibration: str | None
) -> None:
    model = april_gan(
        class_name="bottle",
        k_shot=2,
        references=str(good("bottle")),
        calibration=calibration,
        false_positive_rate=0.1,
        visualizer=False,
    )
    network = type(model.model)
    encode, is_autocast = network.encode, []

    def encode_and_note(self: nn.Module, images: Tensor) -> Any:
        is_autocast.append(torch.is_autocast_enabled("cpu"))
        return encode(self, images)

    with mock.patch.object(network, "encode", encode_and_note):
        engine(tmp_path, precision="bf16-mixed").test(model, datamodule=category("bottle"), verbose=False)
    assert len(is_autocast) > 2
    assert all(is_autocast)


def test_a_bank_of_another_precision_is_filled_anew(april_gan: Build, tmp_path: Path) -> None:
    file = good("bottle") / "000.png"
    model = april_gan(
        class_name="bottle", k_shot=1, references=[str(file)], post_processor=False, visualizer=False
    ).eval()
    zero_shot = april_gan(class_name="bottle", post_processor=False, visualizer=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(read(file)).anomaly_map, zero_shot(read(file)).anomaly_map, atol=1e-5, rtol=0)
    (with_itself,) = engine(tmp_path / "a", precision="bf16-mixed").predict(model, data_path=file)
    (with_none,) = engine(tmp_path / "b", precision="bf16-mixed").predict(zero_shot, data_path=file)
    torch.testing.assert_close(with_itself.anomaly_map, with_none.anomaly_map, atol=1e-5, rtol=0)


# -- devices and threads -----------------------------------------------------------------------------


def run_torch(path: Path, images: Tensor) -> np.ndarray:
    model: nn.Module = torch.load(path, weights_only=False)["model"]  # written by the test itself
    with torch.no_grad():
        return model.eval()(images).pred_score.numpy()


@pytest.mark.parametrize(("export", "k_shot"), [("to_torch", 0), ("to_torch", 2), ("to_onnx", 2)])
def test_export_after_a_run_on_another_device(
    april_gan: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: str, k_shot: int
) -> None:
    """Lightning moves a model back when a run on an accelerator ends; the trainer's device stays the accelerator."""
    model = april_gan(class_name="bottle", k_shot=k_shot)
    runner = engine(tmp_path)
    runner.test(model, datamodule=category("bottle"), verbose=False)
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval()(images)
    traced: list[Tensor] = []
    # The graph itself is compared elsewhere; here the model is run as the exporter would run it.
    monkeypatch.setattr(torch.onnx, "export", lambda model, args, **_: traced.append(model(*args)["pred_score"]))
    strategy = type(runner.trainer.strategy)
    with mock.patch.object(strategy, "root_device", new_callable=mock.PropertyMock, return_value=torch.device("meta")):
        path = getattr(model, export)(tmp_path)
    tensors = [*model.parameters(), *model.buffers(), *model.model.backbone.parameters()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    if export == "to_torch":
        np.testing.assert_allclose(run_torch(path, images), expected.pred_score, atol=1e-5)
    else:
        assert [score.device.type for score in traced] == ["cpu"]
    with torch.no_grad():
        assert torch.equal(model(images).pred_score, expected.pred_score)


@pytest.mark.parametrize("export", ["to_torch", "to_onnx"])
def test_an_export_does_not_disturb_another_thread(
    april_gan: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: str
) -> None:
    """While one class is being exported, the model answers for the others as before."""
    model = april_gan(class_name=["bottle", "tile"], default_class="bottle").eval()
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images, "tile")
    found: list[Any] = []

    def call() -> None:
        try:
            with torch.no_grad():
                found.append(model(images, "tile"))
        except ValueError as error:
            found.append(error)

    def export_meanwhile(*_: Any, **__: Any) -> Path:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        return tmp_path

    where = (torch.onnx, "export") if export == "to_onnx" else (AnomalibModule, export)
    monkeypatch.setattr(*where, export_meanwhile)
    getattr(model, export)(tmp_path)
    (answer,) = found
    assert torch.equal(answer.pred_score, expected.pred_score)
    assert torch.equal(answer.anomaly_map, expected.anomaly_map)


def test_several_first_callers_load_clip_once(april_gan: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    built, build_tower = [], VisionTransformer.__init__

    def build_slowly(self: VisionTransformer, *arguments: Any, **options: Any) -> None:
        built.append(self)
        time.sleep(0.3)
        build_tower(self, *arguments, **options)

    monkeypatch.setattr(VisionTransformer, "__init__", build_slowly)
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    model = april_gan(class_name=["bottle", "tile"]).eval()
    names, found = ["bottle", "tile", "bottle"], {}

    def call(place: int) -> None:
        with torch.no_grad():
            found[place] = model(images, names[place]).pred_score

    threads = [threading.Thread(target=call, args=(place,)) for place in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    with torch.no_grad():
        assert all(torch.equal(found[place], model(images, name).pred_score) for place, name in enumerate(names))


def test_a_caller_in_the_middle_of_the_calibration_waits(april_gan: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    options = {"class_name": "bottle", "k_shot": 2, "references": str(good("bottle")), "calibration": "references"}
    with torch.no_grad():
        expected = april_gan(**options, false_positive_rate=0.1).eval()(images)
        model, found = april_gan(**options, false_positive_rate=0.1).eval(), {}
        begun, measure = threading.Event(), Calibration.thresholds

        def call(place: str) -> None:
            with torch.no_grad():
                found[place] = model(images)

        def slowly(self: Calibration, *arguments: Any) -> Thresholds:
            begun.set()
            time.sleep(0.3)
            return measure(self, *arguments)

        monkeypatch.setattr(Calibration, "thresholds", slowly)
        first = threading.Thread(target=call, args=("first",))
        first.start()
        begun.wait(20)
        call("in the middle")
        first.join()
    for answer in found.values():
        assert torch.equal(answer.pred_score, expected.pred_score)
    assert len(found) == 2


def test_nothing_is_made_twice(april_gan: Build, tmp_path: Path) -> None:
    """A second run on the same data encodes no text and no reference, and says nothing new."""
    model = april_gan(k_shot=2, visualizer=False)
    engine(tmp_path).test(model, datamodule=category("bottle"), verbose=False)
    backbone, network, sizes = model.model.backbone, type(model.model), []
    encode = network.encode

    def encode_and_note(self: nn.Module, images: Tensor) -> Any:
        sizes.append(len(images))
        return encode(self, images)

    images: list[ImageBatch] = []
    with (
        mock.patch.object(type(backbone), "encode_text", side_effect=AssertionError("text encoded again")),
        mock.patch.object(network, "encode", encode_and_note),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("error", message=".*(threshold|reference).*")
        images += engine(tmp_path).predict(model, data_path=DATASET / "bottle" / "test" / "good")
    assert sum(sizes) == len(by_path(images)) == 4
