"""AprilGAN inside anomalib's Engine: training, resuming, checkpoints, metrics, and what it must refuse."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib import LearningType
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder, ImageBatch, MVTecAD
from anomalib.engine import Engine
from anomalib.models import get_model, list_models
from lightning.pytorch import seed_everything
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalib_aprilgan import AprilGAN, AuxiliaryData

from ..conftest import DATASET

Build = Callable[..., AprilGAN]


def engine(folder: Path, **options: Any) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", devices=1, enable_progress_bar=False, **options)


def bottle(**options: Any) -> MVTecAD:
    return MVTecAD(root=DATASET, category="bottle", num_workers=0, **options)


def auxiliary(**options: Any) -> AuxiliaryData:
    arguments: dict[str, Any] = {"categories": ["metal_nut", "tile"], "num_workers": 0, "train_batch_size": 4}
    return AuxiliaryData(dataset="mvtec", root=DATASET, **(arguments | options))


def clip_parameters(model: AprilGAN) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.model.backbone.state_dict().items()}


def adapters(model: AprilGAN) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.model.adapters.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# -- training ---------------------------------------------------------------------------------------


def test_a_step_changes_adapters_and_leaves_clip_bit_identical(april_gan: Build, tmp_path: Path) -> None:
    model = april_gan(adapters=None)
    assert model.learning_type == LearningType.ONE_CLASS
    model.setup("fit")
    before_clip, before = clip_parameters(model), adapters(model)
    engine(tmp_path, max_steps=1).fit(model, datamodule=auxiliary())
    assert equal(clip_parameters(model), before_clip)
    assert all(not torch.equal(value, before[name]) for name, value in adapters(model).items())
    assert not any(parameter.requires_grad for parameter in model.model.backbone.parameters())
    assert model.learning_type == LearningType.ONE_CLASS  # a second fit trains on


def test_given_adapters_are_never_trained(april_gan: Build, tmp_path: Path) -> None:
    model = april_gan()
    assert model.learning_type == LearningType.ZERO_SHOT
    model.setup("fit")
    before = adapters(model)
    runner = engine(tmp_path, max_epochs=1)
    runner.fit(model, datamodule=auxiliary(validation=bottle()))  # anomalib only validates
    assert equal(adapters(model), before)
    with pytest.raises(RuntimeError, match=r"Pass `adapters=None` to train fresh ones"):
        runner.trainer.fit(model, datamodule=auxiliary())


def test_resumed_training_is_bit_identical(april_gan: Build, tmp_path: Path) -> None:
    def trained(folder: str, epochs: int, checkpoint: Path | None = None) -> AprilGAN:
        seed_everything(7)
        model = april_gan(adapters=None)
        runner = engine(tmp_path / folder, max_epochs=epochs)
        runner.fit(model, datamodule=auxiliary(mosaic_rate=0.5, validation=bottle()), ckpt_path=checkpoint)
        return model

    at_once = trained("at_once", 3)
    trained("first", 1)
    (checkpoint,) = (tmp_path / "first").glob("**/*.ckpt")
    resumed = trained("second", 3, checkpoint)
    assert equal(adapters(resumed), adapters(at_once))
    assert torch.equal(resumed.post_processor.image_threshold, at_once.post_processor.image_threshold)
    assert list((tmp_path / "second").glob("**/*.ckpt"))  # checkpoints go on being written


def test_validation_loss_can_be_monitored(april_gan: Build, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="best", monitor="val_loss")
    runner = engine(tmp_path, max_epochs=1, callbacks=[checkpoint])
    runner.fit(april_gan(adapters=None), datamodule=auxiliary(val_split_ratio=0.3))
    assert checkpoint.best_model_score.item() > 0
    assert (tmp_path / "best.ckpt").is_file()


def test_normal_images_alone_are_refused_with_the_way_out(april_gan: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has not a single anomalous image\. .*AuxiliaryData"):
        engine(tmp_path, max_epochs=1).fit(april_gan(adapters=None), datamodule=bottle())


def test_loaders_with_normal_images_alone_are_refused_too(april_gan: Build, tmp_path: Path) -> None:
    data = bottle()
    data.setup()
    with pytest.raises(ValueError, match=r"has not a single anomalous image"):
        engine(tmp_path, max_epochs=1).fit(april_gan(adapters=None), train_dataloaders=data.train_dataloader())


# -- checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k_shot", [0, 4])
def test_checkpoint_round_trip(april_gan: Build, tmp_path: Path, k_shot: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = april_gan(k_shot=k_shot)
    engine(tmp_path).train(model, datamodule=bottle())
    (checkpoint,) = tmp_path.glob("**/*.ckpt")
    images = torch.rand(3, 3, 70, 110, generator=torch.Generator().manual_seed(0))
    expected = model.eval()(images)

    # The references and the datamodule are not asked for again.
    monkeypatch.setattr(
        "anomalib_aprilgan.data.references.read_reference", lambda _: pytest.fail("references read again")
    )
    loaded = AprilGAN.load_from_checkpoint(checkpoint).eval()
    result = loaded(images)
    assert loaded.classes.names == ("bottle",)
    assert loaded.made.references == model.made.references
    assert sum(map(len, loaded.made.references.values())) == k_shot
    for ours, theirs in zip(result, expected, strict=True):
        assert torch.equal(ours, theirs)

    # A fresh model with `ckpt_path`, as anomalib's CLI does it.
    batches = engine(tmp_path).predict(april_gan(), data_path=DATASET / "tile" / "test" / "hole", ckpt_path=checkpoint)
    direct = engine(tmp_path).predict(loaded, data_path=DATASET / "tile" / "test" / "hole")
    for ours, theirs in zip(batches, direct, strict=True):
        assert torch.equal(ours.pred_score, theirs.pred_score)
        assert torch.equal(ours.anomaly_map, theirs.anomaly_map)


@pytest.mark.parametrize("k_shot", [0, 4])
def test_checkpoint_needs_neither_references_nor_adapter_file(april_gan: Build, tmp_path: Path, k_shot: int) -> None:
    engine(tmp_path).train(april_gan(k_shot=k_shot), datamodule=bottle())
    (checkpoint,) = tmp_path.glob("**/*.ckpt")
    folder = DATASET / "tile" / "test" / "hole"
    expected = engine(tmp_path).predict(AprilGAN.load_from_checkpoint(checkpoint), data_path=folder)
    model = april_gan(k_shot=k_shot, adapters=str(tmp_path / "gone.pth"))
    batches = engine(tmp_path).predict(model, data_path=folder, ckpt_path=checkpoint)
    for ours, theirs in zip(batches, expected, strict=True):
        assert torch.equal(ours.pred_score, theirs.pred_score)


@pytest.mark.parametrize("change", [{"stages": (4, 3, 2, 1), "memory_stages": (1,)}, {"quick_gelu": False}])
def test_checkpoint_of_other_settings_is_refused(april_gan: Build, tmp_path: Path, change: dict[str, Any]) -> None:
    engine(tmp_path).validate(april_gan(), datamodule=bottle())
    (checkpoint,) = tmp_path.glob("**/*.ckpt")
    with pytest.raises(
        ValueError, match=r"`(memory_stages|quick_gelu)` of the checkpoint is .*Use the same value for both"
    ):
        engine(tmp_path).test(april_gan(**change), datamodule=bottle(), ckpt_path=checkpoint)


def test_other_prompts_than_the_checkpoints_are_encoded_anew(april_gan: Build, tmp_path: Path) -> None:
    engine(tmp_path).validate(april_gan(), datamodule=bottle())
    (checkpoint,) = tmp_path.glob("**/*.ckpt")
    (tmp_path / "prompts.yaml").write_text("templates: ['an x-ray of a {}.']")
    own = april_gan(prompts=str(tmp_path / "prompts.yaml"))
    engine(tmp_path).test(own, datamodule=bottle(), ckpt_path=checkpoint, verbose=False)
    fresh = april_gan(prompts=str(tmp_path / "prompts.yaml"), class_name="bottle")
    fresh.setup("predict")
    assert torch.equal(own.model.text_features, fresh.model.text_features)


def test_arguments_of_any_config_library_survive_a_checkpoint(small_clip: Any, tmp_path: Path) -> None:
    """`get_model` turns lists into OmegaConf's, which a `weights_only` load would refuse."""
    arguments = {
        "backbone": str(small_clip.quick_gelu),
        "pretrained": str(small_clip.weights),
        "image_size": [96, 64],
        "stages": [4, 2],
        "adapters": str(small_clip.adapters_2),
        "k_shot": 2,
        "references": [str(file) for file in sorted((DATASET / "bottle" / "train" / "good").iterdir())[:2]],
    }
    model = get_model({"class_path": "AprilGAN", "init_args": arguments})
    engine(tmp_path).train(model, datamodule=bottle())
    (checkpoint,) = tmp_path.glob("**/*.ckpt")
    loaded = AprilGAN.load_from_checkpoint(checkpoint)
    assert loaded.hparams.stages == (4, 2)
    assert loaded.model.stages == (2, 4)
    assert loaded(torch.rand(1, 3, 40, 40)).anomaly_map.shape == (1, 96, 64)


def test_checkpoint_of_another_model_is_refused(april_gan: Build, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="must be a checkpoint that AprilGAN wrote"):
        engine(tmp_path).test(april_gan(), datamodule=bottle(), ckpt_path=tmp_path / "other.ckpt")


def test_checkpoint_of_another_clip_is_refused(april_gan: Build, tmp_path: Path, small_clip: Any) -> None:
    from safetensors.torch import load_file, save_file

    engine(tmp_path).validate(april_gan(), datamodule=bottle())
    (checkpoint,) = tmp_path.glob("**/*.ckpt")
    other = load_file(small_clip.weights)
    other["visual.proj"] = other["visual.proj"] + 1
    save_file(other, tmp_path / "other.safetensors")
    model = AprilGAN.load_from_checkpoint(checkpoint, pretrained=str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match=r"the checkpoint belongs to a CLIP with weights \w+, .*other"):
        model(torch.rand(1, 3, 96, 96))


def test_trained_checkpoint_serves_another_category(april_gan: Build, tmp_path: Path) -> None:
    trained = april_gan(adapters=None)
    engine(tmp_path / "fit", max_epochs=1).fit(trained, datamodule=auxiliary())
    (checkpoint,) = (tmp_path / "fit").glob("**/*.ckpt")
    model = april_gan()
    engine(tmp_path).test(model, datamodule=bottle(), ckpt_path=checkpoint, verbose=False)
    assert model.classes.names == ("bottle",)
    assert equal(adapters(model), adapters(trained))
    # Without class names for its images, an export speaks of an "object".
    loaded = AprilGAN.load_from_checkpoint(checkpoint)
    loaded.to_torch(tmp_path)
    assert loaded.classes.names == ("object",)


def test_continued_training_remembers_all_data(april_gan: Build, tmp_path: Path) -> None:
    engine(tmp_path / "a", max_epochs=1).fit(april_gan(adapters=None), datamodule=auxiliary(categories=["tile"]))
    (checkpoint,) = (tmp_path / "a").glob("**/*.ckpt")
    model = april_gan(adapters=None)
    data = auxiliary(categories=["metal_nut"])
    engine(tmp_path / "b", max_epochs=2).fit(model, datamodule=data, ckpt_path=checkpoint)
    assert model.made.provenance.trained_on == {"MVTecAD": ["metal_nut", "tile"]}


def test_saved_adapters_carry_their_provenance(april_gan: Build, tmp_path: Path) -> None:
    trained = april_gan(adapters=None)
    engine(tmp_path, max_epochs=1).fit(trained, datamodule=auxiliary())
    file = trained.save_adapters(tmp_path / "own.safetensors")
    model = april_gan(adapters=str(file))
    model.setup("predict")
    assert equal(adapters(model), adapters(trained))
    assert model.made.provenance.trained_on == {"MVTecAD": ["metal_nut", "tile"]}
    with pytest.raises(ValueError, match=r"trained for stages \(1, 2, 3, 4\), the model taps \(1, 2, 3\)"):
        april_gan(adapters=str(file), stages=(1, 2, 3)).setup("predict")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        trained.save_adapters(tmp_path / "own.pth")


# -- metrics ----------------------------------------------------------------------------------------


def _oracle(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-10)
    return {
        "AUROC": roc_auc_score(labels, scores),
        "F1Max": f1.max(),
        "AUPR": average_precision_score(labels, scores),
    }


@pytest.mark.parametrize("threshold_at", ["learned", "lowest", "highest"])
@pytest.mark.parametrize("k_shot", [0, 4])
def test_printed_metrics_are_those_of_the_raw_scores(
    april_gan: Build, tmp_path: Path, k_shot: int, threshold_at: str
) -> None:
    """Whatever the scale does, also where the best threshold lies at an end of the range."""
    model = april_gan(k_shot=k_shot)
    raw: list[tuple[np.ndarray, ...]] = []
    post_process, learn = model.post_processor.post_process_batch, model.post_processor.on_validation_epoch_end

    def recording(batch: ImageBatch, rows: torch.Tensor) -> None:
        fusion, score = model.post_processor.fusion, batch.pred_score
        score = fusion(score, fusion.statistic(batch.anomaly_map)) if k_shot else score
        fields = (score, batch.gt_label, batch.anomaly_map, batch.gt_mask)
        raw.append(tuple(np.asarray(field).copy() for field in fields))
        post_process(batch, rows)

    def learning(*arguments: Any) -> None:
        learn(*arguments)
        end = {"lowest": "min", "highest": "max"}.get(threshold_at)
        if end:
            model.post_processor._image_threshold.copy_(getattr(model.post_processor, f"image_{end}"))
            model.post_processor._pixel_threshold.copy_(getattr(model.post_processor, f"pixel_{end}"))

    model.post_processor.post_process_batch = recording
    model.post_processor.on_validation_epoch_end = learning
    (printed,) = engine(tmp_path).test(model, datamodule=bottle(eval_batch_size=3), verbose=False)
    scores, labels, maps, masks = (np.concatenate(field) for field in zip(*raw, strict=True))
    for name, value in _oracle(scores, labels).items():
        assert printed[f"image_{name}"] == pytest.approx(value, abs=1e-4)
    for name, value in _oracle(maps.ravel(), masks.ravel()).items():
        assert printed[f"pixel_{name}"] == pytest.approx(value, abs=1e-4)
    assert 0 < printed["pixel_AUPRO"] < 1


def test_metrics_hold_where_the_test_set_exceeds_the_validation_range(april_gan: Build, tmp_path: Path) -> None:
    model = april_gan()
    raw: list[tuple[np.ndarray, np.ndarray]] = []
    post_process = model.post_processor.post_process_batch

    def recording(batch: ImageBatch, rows: torch.Tensor) -> None:
        raw.append((np.asarray(batch.pred_score).copy(), np.asarray(batch.gt_label)))
        post_process(batch, rows)
        assert batch.pred_score.min() > 0
        assert batch.pred_score.max() < 1

    model.post_processor.post_process_batch = recording
    data = bottle(val_split_mode="from_test", val_split_ratio=0.3, seed=1, eval_batch_size=2)
    (printed,) = engine(tmp_path).test(model, datamodule=data, verbose=False)
    scores, labels = (np.concatenate(field) for field in zip(*raw, strict=True))
    assert printed["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-4)


# -- being asked without a trainer, a datamodule, a network -----------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        msg = "a network call although everything is local"
        raise AssertionError(msg)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_local_files_need_no_network(april_gan: Build, tmp_path: Path) -> None:
    model = april_gan(k_shot=2)
    engine(tmp_path).train(model, datamodule=bottle())
    (checkpoint,) = tmp_path.glob("**/*.ckpt")
    result = AprilGAN.load_from_checkpoint(checkpoint)(torch.rand(1, 3, 50, 60))
    assert result.anomaly_map.shape == (1, 96, 96)


def test_without_a_trainer(april_gan: Build) -> None:
    model = april_gan(class_name="bottle")
    model.setup("predict")
    result = model(torch.rand(2, 3, 33, 121, generator=torch.Generator().manual_seed(0)))
    assert result.pred_score.shape == result.pred_label.shape == (2,)
    assert result.anomaly_map.shape == result.pred_mask.shape == (2, 96, 96)
    assert torch.equal(result.pred_label, result.pred_score > 0.5)
    assert result.pred_label.dtype == result.pred_mask.dtype == torch.bool
    # Without calibration a score is the text probability, on anomalib's scale: within a thousandth.
    raw = model.model(model.pre_processor(torch.zeros(1, 3, 96, 96))).pred_score
    assert model(torch.zeros(1, 3, 96, 96)).pred_score.item() == pytest.approx(raw.item(), abs=1e-3)


def test_text_tower_runs_once_per_class_name(april_gan: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = april_gan(class_name="bottle")
    model.setup("predict")
    monkeypatch.setattr(model.model.backbone, "encode_text", lambda *_, **__: pytest.fail("text encoded again"))
    for _ in range(2):
        model.setup("predict")
        model(torch.rand(2, 3, 96, 96))


def test_one_vision_pass_per_image_also_few_shot(april_gan: Build) -> None:
    model = april_gan(k_shot=2, references=str(DATASET / "tile" / "train" / "good"), memory_stages=(1, 3))
    model.setup("predict")
    passes: list[int] = []
    model.model.backbone.visual.conv1.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    model(torch.rand(3, 3, 96, 96))
    assert passes == [3]


def test_predict_reads_a_folder_of_a_camera(april_gan: Build, tmp_path: Path) -> None:
    references = str(DATASET / "tile" / "train" / "good")
    model = april_gan(k_shot=2, references=references, seed=3)
    batches = engine(tmp_path).predict(model, data_path=DATASET / "tile" / "test" / "hole")
    assert [Path(batch.image_path[0]).name for batch in batches] == ["000.png", "001.png", "002.png"]
    assert all(0 < batch.pred_score.item() < 1 for batch in batches)
    assert model.classes.names == ("object",)


def test_class_name_and_references_follow_the_datamodule(april_gan: Build, tmp_path: Path) -> None:
    model = april_gan(k_shot=2)
    runner = engine(tmp_path)
    runner.test(model, datamodule=bottle(), verbose=False)
    (first,) = model.made.references.values()
    tile = MVTecAD(root=DATASET, category="tile", num_workers=0)
    runner.test(model, datamodule=tile, verbose=False)
    assert model.classes.names == ("tile",)
    assert all("/bottle/train/good/" in path for path in first)
    assert all("/tile/train/good/" in path for path in model.made.references["tile"])


def test_changed_references_are_read_again(april_gan: Build, tmp_path: Path) -> None:
    folder = tmp_path / "good"
    shutil.copytree(DATASET / "tile" / "train" / "good", folder)
    model = april_gan(k_shot=6, references=str(folder))
    model.setup("predict")
    before = model.model.few_shot.features(0)
    model.setup("predict")
    assert model.model.few_shot.features(0) is before
    shutil.copy(DATASET / "bottle" / "train" / "good" / "000.png", folder / "000.png")
    model.setup("predict")
    assert not torch.equal(model.model.few_shot.features(0), before)


def test_training_on_many_classes_and_then_a_plain_folder(april_gan: Build, tmp_path: Path) -> None:
    model = april_gan(adapters=None)
    runner = engine(tmp_path, max_epochs=1)
    runner.fit(model, datamodule=auxiliary())
    batches = runner.predict(model, data_path=DATASET / "tile" / "test" / "hole")
    assert len(batches) == 3
    assert model.classes.names == ("object",)


def test_references_without_masks_still_outline_something(april_gan: Build, tmp_path: Path) -> None:
    """Without labels, pixels are cut above what the references reach, each held out in turn."""
    references = str(DATASET / "tile" / "train" / "good")
    model = april_gan(k_shot=4, references=references)
    model.setup("predict")
    low, threshold = model.post_processor.fusion.low, model.post_processor.pixel_threshold
    assert 0 < low <= threshold < 6


def test_folder_datamodule_without_masks(april_gan: Build, tmp_path: Path) -> None:
    data = Folder(
        name="parts",
        root=DATASET / "tile",
        normal_dir="train/good",
        abnormal_dir="test/hole",
        normal_test_dir="test/good",
        num_workers=0,
    )
    (printed,) = engine(tmp_path).test(april_gan(class_name="tile"), datamodule=data, verbose=False)
    assert 0 <= printed["image_AUROC"] <= 1


def test_references_are_needed_somewhere(april_gan: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`k_shot=4` needs normal images of 'object': pass `references`"):
        engine(tmp_path).predict(april_gan(k_shot=4), data_path=DATASET / "tile" / "test" / "hole")
    with pytest.raises(ValueError, match=r"`k_shot` must be at most the 6 normal images in .*, got 7"):
        april_gan(k_shot=7, references=str(DATASET / "tile" / "train" / "good")).setup("predict")
    with pytest.raises(ValueError, match=r"`references` are given but `k_shot` is 0"):
        april_gan(references="folder")
    with pytest.raises(ValueError, match=r"`k_shot` must be 0 \(zero-shot\) or more, got -1"):
        april_gan(k_shot=-1)
    with pytest.raises(ValueError, match=r"`class_name` must name an object, got ' '"):
        april_gan(class_name=" ")


def test_untrained_adapters_are_announced(april_gan: Build, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="The adapters are untrained"):
        engine(tmp_path).predict(april_gan(adapters=None), data_path=DATASET / "tile" / "test" / "hole")


def test_anomalib_knows_the_model() -> None:
    assert "AprilGAN" in list_models(case="pascal")
    for name in ("april_gan", {"class_path": "AprilGAN"}):
        model = get_model(name)
        assert isinstance(model, AprilGAN)
        assert model.learning_type == LearningType.ZERO_SHOT
        assert sum(parameter.numel() for parameter in model.model.parameters()) == 4 * (1024 * 768 + 768)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_true_half_precision_runs(april_gan: Build, tmp_path: Path, precision: str) -> None:
    model = april_gan(k_shot=2, visualizer=False)
    (printed,) = engine(tmp_path, precision=precision).test(model, datamodule=bottle(), verbose=False)
    assert 0 <= printed["image_AUROC"] <= 1


def test_half_precision_runs_only_the_backbone_in_half(april_gan: Build, tmp_path: Path) -> None:
    full = april_gan(visualizer=False)
    half = april_gan(visualizer=False)
    (exact,) = engine(tmp_path).test(full, datamodule=bottle(), verbose=False)
    (close,) = engine(tmp_path, precision="bf16-mixed").test(half, datamodule=bottle(), verbose=False)
    assert close["pixel_AUROC"] == pytest.approx(exact["pixel_AUROC"], abs=0.02)
    assert close["pixel_AUROC"] != exact["pixel_AUROC"]
