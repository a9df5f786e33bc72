"""The network: shapes, routing by class, order of calls, precision, the few-shot part."""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_aprilgan.clip.architecture import ClipArchitecture
from anomalib_aprilgan.clip.backbone import ClipBackbone, VisionOutput, load_clip
from anomalib_aprilgan.network.adapters import LinearAdapters
from anomalib_aprilgan.network.few_shot import FewShotScorer
from anomalib_aprilgan.network.memory_bank import MemoryBank
from anomalib_aprilgan.network.model import AprilGANModel
from anomalib_aprilgan.network.scoring import neighbourhood_mean, smooth

Build = Callable[..., AprilGANModel]


def images(count: int, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def text_features(count: int) -> Tensor:
    """Close pairs, as real texts are: probabilities between the extremes."""
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(count, 40, 1, generator=generator)
    return F.normalize(torch.cat([normal, normal + 0.2 * torch.randn(count, 40, 1, generator=generator)], dim=2), dim=1)


@pytest.fixture(scope="module")
def clip(small_clip: Any) -> Callable[[tuple[int, int]], ClipBackbone]:
    @cache
    def clip(image_size: tuple[int, int]) -> ClipBackbone:
        architecture = ClipArchitecture.load(str(small_clip.gelu), image_size, None)
        return load_clip(architecture, str(small_clip.weights))

    return clip


@pytest.fixture
def build(clip: Callable[[tuple[int, int]], ClipBackbone]) -> Build:
    def build(
        stages: Sequence[int] = (1, 2, 3, 4),
        memory_stages: Sequence[int] | None = None,
        classes: int = 1,
        image_size: tuple[int, int] = (64, 64),
        neighbourhood: int = 1,
        references: Sequence[Tensor] = (),
        **options: Any,
    ) -> AprilGANModel:
        """A model of so many classes; few-shot with stages of the bank, or with references of each class."""
        torch.manual_seed(0)
        backbone, few_shot = clip(image_size), None
        if memory_stages is not None or len(references):
            few_shot = MemoryBank(backbone.architecture, memory_stages or stages, neighbourhood)
        model = AprilGANModel(LinearAdapters([64] * len(stages), 40), stages, few_shot, **options)
        model.attach_backbone(backbone)
        model.set_rows(text_features(classes), [None] * classes)
        for row, given in enumerate(references):
            remember(model, given, row)
        return model.eval()

    return build


def remember(model: AprilGANModel, references: Tensor, row: int = 0) -> None:
    scorer_of(model).fill(row, references, model.encode(references))


def scorer_of(model: AprilGANModel) -> FewShotScorer:
    assert model.few_shot is not None
    return model.few_shot


class TestPredictions:
    @pytest.mark.parametrize("stages", [(4,), (2, 4), (1, 2, 3, 4)])
    def test_shapes_and_ranges(self, build: Build, stages: tuple[int, ...]) -> None:
        raw = build(stages).predict(images(3))
        assert raw.text_probability.shape == (3,)
        assert raw.anomaly_map.shape == (3, 64, 64)
        assert 0 < raw.text_probability.min() < raw.text_probability.max() < 1
        assert 0 < raw.anomaly_map.min() < raw.anomaly_map.max() < len(stages)

    def test_image_that_is_not_square(self, build: Build) -> None:
        model = build((2, 4), (2, 4), image_size=(96, 64))
        assert model.predict(images(2, 96, 64), few_shot=False).anomaly_map.shape == (2, 96, 64)
        remember(model, images(2, 96, 64, seed=1))
        assert scorer_of(model).features(0).shape == (2, 2 * 96 * 64)
        assert model.predict(images(2, 96, 64)).anomaly_map.shape == (2, 96, 64)

    def test_map_is_the_sum_of_the_anomalous_channels(self, build: Build) -> None:
        raw = build((1, 3)).predict(images(2))
        probabilities = raw.stage_probabilities
        assert [tuple(maps.shape) for maps in probabilities] == [(2, 2, 64, 64)] * 2
        torch.testing.assert_close(raw.anomaly_map, probabilities[0][:, 1] + probabilities[1][:, 1])
        torch.testing.assert_close(probabilities[0].sum(dim=1), torch.ones(2, 64, 64))

    def test_map_and_score_written_out(self, build: Build) -> None:
        model, batch = build((2,)), images(1)
        raw, encoded = model.predict(batch), model.backbone(batch, [2])
        text, layer = model.text_features[0], model.adapters.fc[0]
        logits = torch.empty(2, 8, 8)
        for patch in range(64):
            feature = layer.weight @ encoded.patch_tokens[0][0, patch] + layer.bias
            logits[:, patch // 8, patch % 8] = 100 * text.T @ (feature / feature.norm())
        logits = F.interpolate(logits[None], (64, 64), mode="bilinear", align_corners=True)[0]
        torch.testing.assert_close(raw.anomaly_map[0], torch.sigmoid(logits[1] - logits[0]), atol=1e-4, rtol=0)
        score = 100 * text.T @ (encoded.image_feature[0] / encoded.image_feature[0].norm())
        assert raw.text_probability.item() == pytest.approx(torch.sigmoid(score[1] - score[0]).item(), abs=1e-5)

    def test_forward_gives_them_by_anomalibs_names(self, build: Build) -> None:
        model, batch, rows = build((2,), classes=2), images(2), torch.tensor([1, 0])
        out, raw = model(batch, rows), model.predict(batch, rows)
        assert torch.equal(out.pred_score, raw.text_probability)
        assert torch.equal(out.anomaly_map, raw.anomaly_map)
        assert out.pred_label is out.pred_mask is None

    def test_batch_equals_single_images(self, build: Build) -> None:
        model, batch = build(references=[images(2, seed=7)]), images(3)
        together = model.predict(batch)
        for number in range(3):
            alone = model.predict(batch[number : number + 1])
            torch.testing.assert_close(alone.anomaly_map[0], together.anomaly_map[number], atol=1e-4, rtol=0)
            torch.testing.assert_close(alone.text_probability[0], together.text_probability[number], atol=1e-5, rtol=0)

    def test_what_clip_made_of_the_images_need_not_be_made_again(self, build: Build) -> None:
        model, batch = build((2, 4), (1, 3), references=[images(2, seed=7)]), images(2)
        expected = model.predict(batch)
        output = model.encode(batch)
        assert output.stages == (1, 2, 3, 4)
        raw = model.predict(torch.zeros_like(batch), output=output)  # of the images only the size counts
        assert torch.equal(raw.anomaly_map, expected.anomaly_map)
        assert torch.equal(raw.text_probability, expected.text_probability)

    def test_stages_of_the_bank_do_not_touch_the_zero_shot_map(self, build: Build) -> None:
        batch = images(2)
        plain, union = build((2, 4)), build((2, 4), memory_stages=(1, 3))
        torch.testing.assert_close(plain.predict(batch).anomaly_map, union.predict(batch, few_shot=False).anomaly_map)

    def test_argument_is_left_alone(self, build: Build) -> None:
        batch = images(1)
        build().predict(batch)
        assert torch.equal(batch, images(1))

    def test_limits_of_the_map_are_those_of_its_parts(self, build: Build) -> None:
        assert (build((2, 4)).map_limit, build((2, 4)).map_ceiling) == (2.0, 2.0)
        few_shot = build((2, 4), (1, 2, 3))
        assert (few_shot.map_limit, few_shot.map_ceiling) == (3.5, 8.0)


class TestClasses:
    @pytest.mark.parametrize("shots", [0, 2])
    def test_mixed_batch_equals_models_of_one_class(self, build: Build, shots: int) -> None:
        batch = images(4)
        references = [images(shots, seed=20 + number) for number in range(3 if shots else 0)]
        rows = torch.tensor([2, 0, 2, 1])
        mixed = build(classes=3, references=references).predict(batch, rows)
        for number, row in enumerate(rows.tolist()):
            single = build(references=references[row : row + 1])
            single.set_rows(text_features(3)[[row]], [0])
            alone = single.predict(batch[number : number + 1])
            torch.testing.assert_close(alone.anomaly_map[0], mixed.anomaly_map[number], atol=1e-4, rtol=0)
            torch.testing.assert_close(alone.text_probability[0], mixed.text_probability[number], atol=1e-5, rtol=0)

    def test_classes_keep_their_references_where_others_join(self, build: Build) -> None:
        model = build(classes=2, references=[images(2, seed=number) for number in range(2)])
        first, second = (scorer_of(model).features(row) for row in range(2))
        model.set_rows(text_features(3), [1, None, 0])
        assert [scorer_of(model).features(row) is features for row, features in ((0, second), (2, first))] == [True] * 2
        assert scorer_of(model).number(1) == 0
        with pytest.raises(RuntimeError, match="memory bank is empty"):
            model.predict(images(1), torch.tensor([1]))

    def test_the_class_makes_a_difference(self, build: Build) -> None:
        model, batch = build(classes=3), images(1)
        scores = [model.predict(batch, torch.tensor([row])).text_probability.item() for row in range(3)]
        assert len(set(scores)) == 3

    def test_several_classes_need_rows(self, build: Build) -> None:
        with pytest.raises(ValueError, match=r"`rows` are needed to choose among 3 classes, got None"):
            build(classes=3).predict(images(1))

    def test_a_batch_without_images(self, build: Build) -> None:
        model = build(classes=2, references=[images(1, seed=number) for number in range(2)])
        encoded = model.encode(images(1))
        tokens = [of_stage[:0] for of_stage in encoded.patch_tokens]
        nothing = VisionOutput(tokens, encoded.image_feature[:0], encoded.stages)
        raw = model.predict(images(0), torch.empty(0, dtype=torch.long), output=nothing)
        assert (raw.text_probability.shape, raw.anomaly_map.shape) == ((0,), (0, 64, 64))


class TestOneRowAlone:
    def test_predicts_what_the_row_does_without_a_text_tower(self, build: Build) -> None:
        batch = images(2)
        model = build(classes=3, references=[images(2, seed=20 + number) for number in range(3)])
        expected = model.predict(batch, torch.tensor([1, 1]))
        one = model.of_rows([1])
        raw = one.predict(batch)
        torch.testing.assert_close(raw.anomaly_map, expected.anomaly_map)
        torch.testing.assert_close(raw.text_probability, expected.text_probability)
        assert one.backbone.text is None
        assert one.training == model.training

    def test_shares_tensors_and_leaves_the_whole_alone(self, build: Build) -> None:
        model = build((2,), classes=2, references=[images(1), images(1, seed=1)])
        before = {name: value.data_ptr() for name, value in model.state_dict().items()}
        one = model.of_rows([1])
        assert one.adapters is model.adapters
        assert scorer_of(one).features(0) is scorer_of(model).features(1)
        assert torch.equal(one.text_features[0], model.text_features[1])
        assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
        assert model.backbone.text is not None
        assert len(scorer_of(model).remembered) == 2

    def test_zero_shot(self, build: Build) -> None:
        assert build(classes=2).of_rows([0]).few_shot is None


class TestOrderOfCalls:
    def test_without_a_backbone(self) -> None:
        model = AprilGANModel(LinearAdapters([64] * 1, 40), (1,))
        assert not model.has_backbone
        with pytest.raises(RuntimeError, match=r"no CLIP yet: call `AprilGAN\.setup\('predict'\)` first"):
            model.predict(images(1))

    @pytest.mark.parametrize("call", ["predict", "forward", "stage_probabilities"])
    def test_without_text_features(self, build: Build, call: str) -> None:
        model = build()
        model.set_rows(torch.empty(0), [])
        with pytest.raises(RuntimeError, match=r"no text features yet: call `AprilGAN\.setup\('predict'\)` first"):
            getattr(model, call)(images(1))

    def test_without_references(self, build: Build) -> None:
        with pytest.raises(RuntimeError, match=r"memory bank is empty: call `AprilGAN\.setup` with `references`"):
            build(memory_stages=(1,)).predict(images(1))

    def test_the_only_reference_cannot_be_held_out(self, build: Build) -> None:
        model = build(references=[images(1)])
        with pytest.raises(RuntimeError, match="memory bank is empty"):
            model.predict(images(1), without=[0])


class TestTraining:
    def test_probabilities_are_those_of_inference(self, build: Build) -> None:
        model, batch = build((2, 4)), images(2)
        inferred = model.predict(batch).stage_probabilities
        for trained, other in zip(model.stage_probabilities(batch), inferred, strict=True):
            assert torch.equal(trained, other)

    def test_gradients_reach_the_adapters_alone(self, build: Build) -> None:
        model = build((2, 4)).train()
        sum(maps[:, 1].mean() for maps in model.stage_probabilities(images(2))).backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.adapters.parameters())
        assert all(parameter.grad is None for parameter in model.backbone.parameters())
        assert not model.backbone.training


class TestFewShot:
    @pytest.mark.parametrize(("stages", "memory_stages"), [((1, 2, 3, 4), None), ((2, 4), (1, 3)), ((1, 4), (4,))])
    def test_map_is_zero_shot_plus_distances(
        self, build: Build, stages: tuple[int, ...], memory_stages: tuple[int, ...] | None
    ) -> None:
        batch, references = images(2), images(3, seed=8)
        model = build(stages, memory_stages, references=[references])
        assert scorer_of(model).number(0) == 3
        zero_shot, few_shot = model.predict(batch, few_shot=False), model.predict(batch)
        tapped = memory_stages or stages
        tokens, bank = (model.backbone(given, tapped).patch_tokens for given in (batch, references))
        expected = zero_shot.anomaly_map.clone()
        for own, others in zip(tokens, bank, strict=True):
            similarity = F.cosine_similarity(own[:, :, None], others.reshape(1, 1, -1, 64), dim=-1)
            distance = (1 - similarity.amax(dim=-1)).reshape(2, 1, 8, 8)
            expected += F.interpolate(distance, (64, 64), mode="bilinear", align_corners=True)[:, 0]
        torch.testing.assert_close(few_shot.anomaly_map, expected, atol=1e-5, rtol=0)
        assert torch.equal(few_shot.text_probability, zero_shot.text_probability)

    def test_remembered_image_has_its_zero_shot_map(self, build: Build) -> None:
        batch = images(2)
        model = build(references=[batch])
        zero_shot = model.predict(batch, few_shot=False).anomaly_map
        torch.testing.assert_close(model.predict(batch).anomaly_map, zero_shot, atol=2e-5, rtol=0)

    def test_more_references_never_raise_the_map(self, build: Build) -> None:
        batch, references = images(2), images(4, seed=8)
        fewer = build(references=[references[:2]]).predict(batch).anomaly_map
        assert (build(references=[references]).predict(batch).anomaly_map <= fewer + 1e-5).all()

    @pytest.mark.parametrize("options", [{}, {"smoothing_sigma": 1.0, "neighbourhood": 3}])
    def test_holding_out_a_reference_is_a_bank_of_the_others(self, build: Build, options: dict[str, Any]) -> None:
        references = images(3, seed=8)
        model = build((2, 4), (1, 3), references=[references], **options)
        for shot in range(3):
            others = build((2, 4), (1, 3), references=[references[[row for row in range(3) if row != shot]]], **options)
            expected = others.predict(references[shot : shot + 1]).anomaly_map
            held_out = model.predict(references[shot : shot + 1], without=[shot]).anomaly_map
            torch.testing.assert_close(held_out, expected, atol=1e-5, rtol=0)
        assert scorer_of(model).number(0) == 3

    def test_holding_out_a_twin_gives_the_zero_shot_map(self, build: Build) -> None:
        image = images(1)
        model = build(references=[image.repeat(2, 1, 1, 1)])
        zero_shot = model.predict(image, few_shot=False).anomaly_map
        torch.testing.assert_close(model.predict(image, without=[1]).anomaly_map, zero_shot, atol=2e-5, rtol=0)


class TestOptions:
    def test_smoothing_is_of_the_whole_map(self, build: Build) -> None:
        references = [images(2, seed=8)]
        expected = build((2, 4), references=references).predict(images(2))
        raw = build((2, 4), references=references, smoothing_sigma=2.0).predict(images(2))
        torch.testing.assert_close(raw.anomaly_map, smooth(expected.anomaly_map, 2.0))
        assert torch.equal(raw.text_probability, expected.text_probability)

    def test_neighbourhoods_are_those_of_bank_and_image_alike(self, build: Build) -> None:
        references = images(2, seed=8)
        model = build((2, 4), (3,), neighbourhood=3, references=[references])
        tokens = neighbourhood_mean(model.backbone(references, [3]).patch_tokens[0], (8, 8), 3)
        torch.testing.assert_close(scorer_of(model).features(0), F.normalize(tokens, dim=-1).flatten(1))
        zero_shot = model.predict(references, few_shot=False).anomaly_map
        torch.testing.assert_close(model.predict(references).anomaly_map, zero_shot, atol=2e-5, rtol=0)  # seen before
        # The zero-shot map has no neighbourhoods.
        assert torch.equal(zero_shot, build((2, 4), (3,)).predict(references, few_shot=False).anomaly_map)


class TestPrecision:
    @pytest.mark.parametrize("shots", [0, 2])
    def test_scores_and_maps_are_not_quantised_under_autocast(self, build: Build, shots: int) -> None:
        model, batch = build(references=[images(shots, seed=8)] if shots else ()), images(16)
        exact = model.predict(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = model.encode(batch).patch_tokens[0]
            raw = model.predict(batch)
            assert torch.is_autocast_enabled("cpu")
        assert not torch.equal(tokens.float(), model.encode(batch).patch_tokens[0])  # the backbone did run in half
        assert raw.anomaly_map.dtype == raw.text_probability.dtype == torch.float32
        # bfloat16 has 256 values an octave.
        assert raw.anomaly_map[0].unique().numel() > 3500
        assert raw.anomaly_map[0].bfloat16().unique().numel() < 1000
        assert raw.text_probability.unique().numel() == 16
        assert not torch.equal(raw.text_probability, raw.text_probability.bfloat16().float())
        assert (raw.anomaly_map - exact.anomaly_map).abs().mean() < 0.2

    def test_training_maps_too(self, build: Build) -> None:
        model = build((2,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (maps,) = model.stage_probabilities(images(1))
        assert maps.dtype == torch.float32
        assert maps[0, 1].unique().numel() > 3500

    def test_half_precision_weights(self, build: Build) -> None:
        """Lightning's "bf16-true": everything is cast, the arithmetic of scores and maps is not."""
        model = copy.deepcopy(build(references=[images(2, seed=8)]))  # others share the backbone
        raw = model.to(torch.bfloat16).predict(images(1).to(torch.bfloat16))
        assert raw.anomaly_map.dtype == raw.text_probability.dtype == torch.float32
        assert raw.anomaly_map.unique().numel() > 3500


def test_state_dict_carries_what_was_learned(build: Build) -> None:
    batch, rows = images(2), torch.tensor([2, 1])
    model = build(classes=3, references=[images(2, seed=8 + number) for number in range(3)])
    other = build(classes=3, memory_stages=(1, 2, 3, 4))
    other.set_rows(torch.empty_like(model.text_features), [None] * 3)
    for row in range(3):
        scorer_of(other).set_features(row, torch.empty_like(scorer_of(model).features(row)))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.predict(batch, rows).anomaly_map, model.predict(batch, rows).anomaly_map)
    assert {"text_features", "few_shot.remembered.2.features", "adapters.fc.0.weight"} <= set(model.state_dict())
