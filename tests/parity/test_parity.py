"""Everything the method computes, against recorded outputs of the authors' code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.data.utils import read_image, read_mask
from anomalib.engine import Engine
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.clip.architecture import ClipArchitecture
from anomalib_aprilgan.clip.backbone import load_clip
from anomalib_aprilgan.clip.prompts import PromptEnsemble
from anomalib_aprilgan.data.multi_category import mosaic
from anomalib_aprilgan.data.pre_processing import resize_mask
from anomalib_aprilgan.decision.post_processing import AprilGANPostProcessor
from anomalib_aprilgan.network.losses import adapter_loss, dice_loss, focal_loss

GOLDEN = Path(__file__).parent / "golden"
DATASET = GOLDEN / "dataset"
CATEGORIES = ("bottle", "metal_nut", "tile")
PER_CATEGORY = 11
ACTIVATIONS = ("quickgelu", "gelu")

# The project's tolerances for fp32 on CPU, from preprocessed images and from files.
TOKENS, TEXT, MAPS, SCORES, ADAPTERS = 2e-5, 1e-6, 1e-4, 1e-5, 1e-6
MAPS_FROM_FILES, MEAN_FROM_FILES = 0.02, 1e-3


@pytest.fixture(scope="module")
def preprocessed() -> dict[str, Tensor]:
    arrays = np.load(GOLDEN / "preprocessed_96.npz")
    mask = np.unpackbits(arrays["mask"], axis=-1)
    return {"test": _tensor(arrays["test"]), "train": _tensor(arrays["train"]), "mask": _tensor(mask)}


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    arrays = {key: _tensor(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}
    if "map_zero" not in arrays:  # the few-shot runs share the zero-shot part
        arrays["map_zero"] = _case("quickgelu_f1234_zero")[1]["map_zero"]
    return json.loads((GOLDEN / f"{name}.json").read_text()), arrays


def _max_difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours.double() - theirs.double()).abs().max().item()


def _model(april_gan: Callable[..., AprilGAN], small_clip: Any, case: dict[str, Any], **overrides: Any) -> AprilGAN:
    return april_gan(
        backbone=str(small_clip.quick_gelu if "quick" in case["model"] else small_clip.gelu),
        image_size=case["image_size"],
        stages=case["features_list"],
        adapters=str(small_clip.adapters_4 if len(case["features_list"]) == 4 else small_clip.adapters_2),
        memory_stages=case.get("few_shot_features"),
        **overrides,
    )


def test_prompts_and_tokens_are_the_authors() -> None:
    recorded = json.loads((GOLDEN / "prompts.json").read_text())
    tokens = np.load(GOLDEN / "token_ids.npz")
    import open_clip

    for category in CATEGORIES:
        normal, anomalous = PromptEnsemble().sentences(category)
        assert normal == recorded[category]["normal"]
        assert anomalous == recorded[category]["abnormal"]
        assert np.array_equal(open_clip.tokenize(normal).numpy(), tokens[f"{category}_normal"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_text_features(small_clip: Any, activation: str) -> None:
    config = small_clip.quick_gelu if activation == "quickgelu" else small_clip.gelu
    backbone = load_clip(ClipArchitecture.load(str(config), (96, 96), None), str(small_clip.weights))
    recorded = np.load(GOLDEN / f"text_features_{activation}.npz")
    for category in CATEGORIES:
        features = backbone.encode_states(*PromptEnsemble().sentences(category))
        assert _max_difference(features, _tensor(recorded[category])) < TEXT


@pytest.mark.parametrize("size", [48, 64, 96])
def test_positional_embedding_is_resized_as_theirs(small_clip: Any, size: int) -> None:
    backbone = load_clip(ClipArchitecture.load(str(small_clip.gelu), (size, size), None), str(small_clip.weights))
    recorded = _tensor(np.load(GOLDEN / "pos_embed.npz")[f"resized_{size}"])
    assert _max_difference(backbone.visual.positional_embedding, recorded) < 1e-6


@pytest.mark.parametrize("name", ["quickgelu_f1234_zero", "quickgelu_f24_fs13_k4", "gelu_f1234_k4"])
def test_tokens_maps_and_scores_from_preprocessed_images(
    april_gan: Callable[..., AprilGAN], small_clip: Any, preprocessed: dict[str, Tensor], name: str
) -> None:
    case, recorded = _case(name)
    for number, category in enumerate(CATEGORIES):
        chosen = slice(PER_CATEGORY * number, PER_CATEGORY * (number + 1))
        model = _model(april_gan, small_clip, case, class_name=category)
        model.setup("predict")
        images = preprocessed["test"][chosen]
        tapped = sorted({*case["features_list"], *(case.get("few_shot_features") or [])})
        output = model.model.backbone(images, tapped)
        assert _max_difference(output.image_feature, recorded["image_features_raw"][chosen]) < TOKENS
        for key, stages in (("", case["features_list"]), ("_fs", case.get("few_shot_features"))):
            for stage_number, stage in enumerate(stages or []):
                for row, index in enumerate(case["detail_index"]):
                    if f"detail_patch_tokens{key}" in recorded and chosen.start <= index < chosen.stop:
                        ours = output.tokens_of(stage)[index - chosen.start]
                        theirs = recorded[f"detail_patch_tokens{key}"][row, stage_number, 1:]
                        assert _max_difference(ours, theirs) < TOKENS
        with torch.no_grad():
            prediction = model.model(images)
        assert _max_difference(prediction.anomaly_map, recorded["map_zero"][chosen]) < MAPS
        assert _max_difference(prediction.pred_score, recorded["pr_sp_zero"][chosen]) < SCORES


@pytest.mark.parametrize("name", ["quickgelu_f1234_k4", "quickgelu_f24_fs13_k4", "gelu_f1234_k4"])
def test_few_shot_maps_and_fused_scores(
    april_gan: Callable[..., AprilGAN],
    small_clip: Any,
    preprocessed: dict[str, Tensor],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through anomalib's Engine, the test set as validation set: the authors' score, before and after the scale."""
    case, recorded = _case(name)
    train_images = json.loads((GOLDEN / "preprocessed_96.json").read_text())["train"]
    for number, category in enumerate(CATEGORIES):
        chosen = slice(PER_CATEGORY * number, PER_CATEGORY * (number + 1))
        references = case["k_shot_files"][4 * number : 4 * (number + 1)]
        images = preprocessed["test"][chosen]
        labels = torch.tensor(["/good/" not in image for image in case["images"][chosen]])
        raw, scaled = [], []
        for store, normalised in ((raw, False), (scaled, True)):
            post_processor = AprilGANPostProcessor(enable_normalization=normalised)
            model = _model(
                april_gan,
                small_clip,
                case,
                class_name=category,
                k_shot=len(references),
                references=[str(DATASET / file) for file in references],
                pre_processor=False,
                post_processor=post_processor,
                visualizer=False,
            )
            # What the authors' own pre-processing makes of the references, in place of ours.
            monkeypatch.setattr(
                "anomalib_aprilgan.preparation.network.read_reference",
                lambda file: preprocessed["train"][[train_images.index(file.relative_to(DATASET).as_posix())]],
            )
            monkeypatch.setattr(
                "anomalib_aprilgan.preparation.decision.read_reference", lambda _: torch.zeros(1, 3, 96, 96)
            )
            loader = DataLoader([0], collate_fn=lambda _, i=images, y=labels: ImageBatch(image=i.clone(), gt_label=y))
            engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1)
            engine.test(model, dataloaders=loader)
            (batch,) = engine.predict(model, dataloaders=[loader])
            store.append(batch)
        theirs = recorded["map_zero"][chosen] + recorded["map_fs"][chosen]
        assert _max_difference(raw[0].anomaly_map, theirs) < MAPS
        assert _max_difference(raw[0].pred_score, recorded["pr_sp_final"][chosen]) < SCORES
        assert torch.equal(scaled[0].pred_score.argsort(), recorded["pr_sp_final"][chosen].argsort())


@pytest.mark.parametrize("name", ["quickgelu_f1234_k4", "quickgelu_f1234_native64_k1", "gelu_f1234_k4"])
def test_maps_from_image_files(april_gan: Callable[..., AprilGAN], small_clip: Any, name: str) -> None:
    case, recorded = _case(name)
    shots = case["k_shot"]
    for number, category in enumerate(CATEGORIES):
        chosen = slice(PER_CATEGORY * number, PER_CATEGORY * (number + 1))
        references = [str(DATASET / file) for file in case["k_shot_files"][shots * number : shots * (number + 1)]]
        model = _model(april_gan, small_clip, case, class_name=category, k_shot=shots, references=references)
        model.setup("predict")
        images = [read_image(DATASET / file, as_tensor=True) for file in case["images"][chosen]]
        with torch.no_grad():
            prediction = model.model(torch.cat([model.pre_processor(image[None]) for image in images]))
        difference = (prediction.anomaly_map - recorded["map_zero"][chosen] - recorded["map_fs"][chosen]).abs()
        assert difference.max() < MAPS_FROM_FILES
        assert difference.mean() < MEAN_FROM_FILES


def test_masks_are_resized_as_theirs(preprocessed: dict[str, Tensor]) -> None:
    files = json.loads((GOLDEN / "preprocessed_96.json").read_text())["test"]
    compared = 0
    for file, recorded in zip(files, preprocessed["mask"], strict=True):
        if "/good/" in file:
            assert not recorded.any()
            continue
        mask = read_mask(DATASET / file.replace("test", "ground_truth").replace(".png", "_mask.png"), as_tensor=True)
        assert torch.equal(resize_mask(mask.as_subclass(Tensor), (96, 96)), recorded)
        compared += 1
    assert compared == 21


@pytest.mark.parametrize("tag", ["b4", "b4_nonsquare", "b1_batch_kept", "b4_empty_mask", "b4_saturated"])
def test_losses_and_gradients(tag: str) -> None:
    arrays = np.load(GOLDEN / "losses.npz")
    values = json.loads((GOLDEN / "losses.json").read_text())["values"][tag]
    logits = _tensor(arrays[f"{tag}_logits"]).requires_grad_()
    target = _tensor(arrays[f"{tag}_target"]).squeeze(1)
    probabilities = logits.softmax(dim=1)
    focal, dice = focal_loss(probabilities, target), dice_loss(probabilities[:, 1], target)
    assert focal.item() == pytest.approx(values["focal"], abs=1e-6)
    assert dice.item() == pytest.approx(values["dice"], abs=1e-6)
    adapter_loss([probabilities], target).backward()
    assert _max_difference(logits.grad, _tensor(arrays[f"{tag}_grad"])) < 1e-6


def test_losses_of_probabilities_that_do_not_sum_to_one() -> None:
    arrays = np.load(GOLDEN / "losses.npz")
    values = json.loads((GOLDEN / "losses.json").read_text())["values"]["raw"]
    probabilities, target = _tensor(arrays["raw_prob"]), _tensor(arrays["raw_target"])
    assert focal_loss(probabilities, target).item() == pytest.approx(values["focal"], abs=1e-6)
    assert dice_loss(probabilities[:, 1], target).item() == pytest.approx(values["dice"], abs=1e-6)


def test_adapters_after_recorded_training_steps(
    april_gan: Callable[..., AprilGAN], small_clip: Any, preprocessed: dict[str, Tensor]
) -> None:
    steps = json.loads((GOLDEN / "train_b4.json").read_text())["steps"]
    recorded = {key: _tensor(value) for key, value in np.load(GOLDEN / "train_b4.npz").items()}
    files = json.loads((GOLDEN / "preprocessed_96.json").read_text())["test"]
    model = april_gan(adapters=None, class_name="bottle")
    model.setup("fit")
    names = PromptEnsemble()
    features = [model.model.backbone.encode_states(*names.sentences(category)) for category in CATEGORIES]
    model.model.set_rows(torch.stack(features), [None] * len(features))
    model.model.adapters.load_state_dict({k.removeprefix("init/"): v for k, v in recorded.items() if "init/" in k})
    optimizer = model.configure_optimizers()
    for number, step in enumerate(steps[:6], start=1):
        index = [files.index(image) for image in step["images"]]
        maps = model.model.stage_probabilities(
            preprocessed["test"][index], torch.tensor([CATEGORIES.index(name) for name in step["cls_name"]])
        )
        target = preprocessed["mask"][index]
        assert focal_loss(maps[0], target).item() == pytest.approx(step["focal"][0], abs=1e-4)
        loss = adapter_loss(maps, target)
        assert loss.item() == pytest.approx(step["total"], rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number in {1, 6}:
            for name, parameter in model.model.adapters.state_dict().items():
                assert _max_difference(parameter, recorded[f"after{number}/{name}"]) < ADAPTERS


@pytest.mark.parametrize("category", CATEGORIES)
def test_mosaic_of_recorded_picks(category: str) -> None:
    picks = json.loads((GOLDEN / "mosaic" / "mosaic.json").read_text())[category]["picks"]
    images = [read_image(DATASET / category / "test" / pick, as_tensor=True) for pick in picks]
    masks = [
        torch.zeros(image.shape[-2:], dtype=torch.uint8)
        if pick.startswith("good")
        else read_mask(DATASET / category / "ground_truth" / pick.replace(".png", "_mask.png"), as_tensor=True)
        for image, pick in zip(images, picks, strict=True)
    ]
    image, mask = mosaic(images, masks)
    assert torch.equal(image, read_image(GOLDEN / "mosaic" / f"{category}_image.png", as_tensor=True))
    assert torch.equal(mask, read_mask(GOLDEN / "mosaic" / f"{category}_mask.png", as_tensor=True))
