"""The network: shapes, routing by class, order of calls, precision, the few-shot part."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_aprilgan.clip.architecture import ClipArchitecture
from anomalib_aprilgan.clip.backbone import load_clip
from anomalib_aprilgan.network.adapters import LinearAdapters
from anomalib_aprilgan.network.model import AprilGANModel
from anomalib_aprilgan.network.scoring import map_statistic, neighbourhood_mean, smooth

CLASSES = ("bolt", "nut", "pill")
Build = Callable[..., AprilGANModel]


def images(count: int, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def text_features(count: int) -> Tensor:
    """Close pairs, as real texts are: probabilities between the extremes."""
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(count, 40, 1, generator=generator)
    return F.normalize(torch.cat([normal, normal + 0.2 * torch.randn(count, 40, 1, generator=generator)], dim=2), dim=1)


@pytest.fixture
def build(small_clip: Any) -> Build:
    def build(
        stages: Sequence[int] = (1, 2, 3, 4),
        memory_stages: Sequence[int] | None = None,
        classes: Sequence[str] = CLASSES[:1],
        image_size: tuple[int, int] = (64, 64),
        **options: Any,
    ) -> AprilGANModel:
        torch.manual_seed(0)
        adapters = LinearAdapters(len(stages), 64, 40)
        model = AprilGANModel(adapters, stages, stages if memory_stages is None else memory_stages, **options)
        architecture = ClipArchitecture.load(str(small_clip.gelu), image_size, None)
        model.attach_backbone(load_clip(architecture, str(small_clip.weights)))
        model.set_classes(classes, text_features(len(classes)))
        return model.eval()

    return build


class TestForward:
    @pytest.mark.parametrize("stages", [(4,), (2, 4), (1, 2, 3, 4)])
    def test_shapes_and_ranges(self, build: Build, stages: tuple[int, ...]) -> None:
        out = build(stages)(images(3))
        assert out.pred_score.shape == (3,)
        assert out.anomaly_map.shape == (3, 64, 64)
        assert 0 < out.pred_score.min() < out.pred_score.max() < 1
        assert 0 < out.anomaly_map.min() < out.anomaly_map.max() < len(stages)

    def test_image_that_is_not_square(self, build: Build) -> None:
        model = build((2, 4), image_size=(96, 64))
        assert model(images(2, 96, 64)).anomaly_map.shape == (2, 96, 64)
        model.remember(images(2, 96, 64, seed=1))
        assert model.memory_bank().tokens.shape == (2, 2, 96, 64)
        assert model(images(2, 96, 64)).anomaly_map.shape == (2, 96, 64)

    def test_map_is_the_sum_of_the_anomalous_channels(self, build: Build) -> None:
        model = build((1, 3))
        out, probabilities = model.infer(images(2))
        assert [tuple(maps.shape) for maps in probabilities] == [(2, 2, 64, 64)] * 2
        torch.testing.assert_close(out.anomaly_map, probabilities[0][:, 1] + probabilities[1][:, 1])
        torch.testing.assert_close(probabilities[0].sum(dim=1), torch.ones(2, 64, 64))

    def test_map_and_score_written_out(self, build: Build) -> None:
        model, batch = build((2,)), images(1)
        out, encoded = model(batch), model.backbone(batch, [2])
        text, layer = model.text_features[0], model.adapters.fc[0]
        logits = torch.empty(2, 8, 8)
        for patch in range(64):
            feature = layer.weight @ encoded.patch_tokens[0][0, patch] + layer.bias
            logits[:, patch // 8, patch % 8] = 100 * text.T @ (feature / feature.norm())
        logits = F.interpolate(logits[None], (64, 64), mode="bilinear", align_corners=True)[0]
        torch.testing.assert_close(out.anomaly_map[0], torch.sigmoid(logits[1] - logits[0]), atol=1e-4, rtol=0)
        score = 100 * text.T @ (encoded.image_feature[0] / encoded.image_feature[0].norm())
        assert out.pred_score.item() == pytest.approx(torch.sigmoid(score[1] - score[0]).item(), abs=1e-5)

    def test_batch_equals_single_images(self, build: Build) -> None:
        model, batch = build(), images(3)
        model.remember(images(2, seed=7))
        together = model(batch)
        for number in range(3):
            alone = model(batch[number : number + 1])
            torch.testing.assert_close(alone.anomaly_map[0], together.anomaly_map[number], atol=1e-4, rtol=0)
            torch.testing.assert_close(alone.pred_score[0], together.pred_score[number], atol=1e-5, rtol=0)

    def test_stages_of_the_bank_do_not_touch_the_zero_shot_map(self, build: Build) -> None:
        batch = images(2)
        plain, union = build((2, 4)), build((2, 4), memory_stages=(1, 3))
        torch.testing.assert_close(plain(batch).anomaly_map, union(batch).anomaly_map)

    def test_argument_is_left_alone(self, build: Build) -> None:
        batch = images(1)
        build()(batch)
        assert torch.equal(batch, images(1))


class TestClasses:
    @pytest.mark.parametrize("shots", [0, 2])
    def test_mixed_batch_equals_models_of_one_class(self, build: Build, shots: int) -> None:
        batch = images(4)
        model = build(classes=CLASSES)
        references = [images(shots, seed=20 + number) for number in range(3)]
        for number in range(3 if shots else 0):
            model.remember(references[number], number)
        names = ["pill", "bolt", "pill", "nut"]
        index = model.class_index(names)
        assert index.tolist() == [2, 0, 2, 1]
        mixed = model(batch, index)
        single = build()
        for number, name in enumerate(names):
            single.set_classes([name], text_features(3)[[CLASSES.index(name)]])
            if shots:
                single.remember(references[CLASSES.index(name)])
            alone = single(batch[number : number + 1])
            torch.testing.assert_close(mixed.anomaly_map[number], alone.anomaly_map[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(mixed.pred_score[number], alone.pred_score[0], atol=1e-5, rtol=0)
            with model.only(CLASSES.index(name)):
                assert torch.equal(model(batch[number : number + 1]).anomaly_map, alone.anomaly_map)
        assert model.class_names == CLASSES

    def test_classes_keep_their_references_where_others_join(self, build: Build) -> None:
        model = build(classes=CLASSES[:2])
        for number in range(2):
            model.remember(images(2, seed=number), number)
        pill, nut = model.memory_bank(0), model.memory_bank(1)
        model.set_classes(("nut", "gear", "bolt"), text_features(3))
        assert [model.memory_bank(number) is bank for number, bank in ((0, nut), (2, pill))] == [True, True]
        assert model.memory_bank(1).k_shot == 0
        with pytest.raises(RuntimeError, match="memory bank is empty"):
            model(images(1), torch.tensor([1]))

    def test_the_class_makes_a_difference(self, build: Build) -> None:
        model, batch = build(classes=CLASSES), images(1)
        scores = [model(batch, model.class_index([name])).pred_score.item() for name in CLASSES]
        assert len(set(scores)) == 3

    def test_unknown_class(self, build: Build) -> None:
        with pytest.raises(
            ValueError, match=r"`class_names` must be out of \('bolt', 'nut', 'pill'\), got \['gear', 'rod'\]"
        ):
            build(classes=CLASSES).class_index(["nut", "rod", "gear"])

    def test_several_classes_need_an_index(self, build: Build) -> None:
        with pytest.raises(
            ValueError, match=r"`class_index` is needed to choose among the classes .*'pill'\), got None"
        ):
            build(classes=CLASSES)(images(1))


class TestOrderOfCalls:
    def test_without_a_backbone(self) -> None:
        model = AprilGANModel(LinearAdapters(1, 64, 40), (1,), (1,))
        assert not model.has_backbone
        with pytest.raises(RuntimeError, match=r"no CLIP yet: call `AprilGAN\.setup\('predict'\)` first"):
            model(images(1))

    @pytest.mark.parametrize("call", ["forward", "stage_probabilities"])
    def test_without_text_features(self, build: Build, call: str) -> None:
        model = build()
        model.set_classes([], torch.empty(0))
        with pytest.raises(RuntimeError, match=r"no text features yet: call `AprilGAN\.setup\('predict'\)` first"):
            getattr(model, call)(images(1))

    def test_the_only_reference_cannot_be_held_out(self, build: Build) -> None:
        assert [values.shape for values in build().remember(images(1))] == [(0,), (0,)]


class TestTraining:
    def test_probabilities_are_those_of_inference(self, build: Build) -> None:
        model, batch = build((2, 4)), images(2)
        for trained, inferred in zip(model.stage_probabilities(batch), model.infer(batch)[1], strict=True):
            assert torch.equal(trained, inferred)

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
        model, batch, references = build(stages, memory_stages), images(2), images(3, seed=8)
        zero_shot = model(batch)
        model.remember(references)
        assert model.memory_bank().k_shot == 3
        few_shot = model(batch)
        tapped = memory_stages or stages
        tokens, bank = (model.backbone(given, tapped).patch_tokens for given in (batch, references))
        expected = zero_shot.anomaly_map.clone()
        for own, others in zip(tokens, bank, strict=True):
            similarity = F.cosine_similarity(own[:, :, None], others.reshape(1, 1, -1, 64), dim=-1)
            distance = (1 - similarity.amax(dim=-1)).reshape(2, 1, 8, 8)
            expected += F.interpolate(distance, (64, 64), mode="bilinear", align_corners=True)[:, 0]
        torch.testing.assert_close(few_shot.anomaly_map, expected, atol=1e-5, rtol=0)
        assert torch.equal(few_shot.pred_score, zero_shot.pred_score)

    def test_remembered_image_has_its_zero_shot_map(self, build: Build) -> None:
        model, batch = build(), images(2)
        zero_shot = model(batch).anomaly_map
        model.remember(batch)
        torch.testing.assert_close(model(batch).anomaly_map, zero_shot, atol=2e-5, rtol=0)

    def test_more_references_never_raise_the_map(self, build: Build) -> None:
        model, batch, references = build(), images(2), images(4, seed=8)
        model.remember(references[:2])
        fewer = model(batch).anomaly_map
        model.remember(references)
        assert (model(batch).anomaly_map <= fewer + 1e-5).all()

    def test_held_out_maxima_are_those_of_banks_of_the_others(self, build: Build) -> None:
        model, references = build((2, 4), (1, 3)), images(3, seed=8)
        expected = []
        for shot in range(3):
            model.remember(references[[other for other in range(3) if other != shot]])
            expected.append(model(references[shot : shot + 1]).anomaly_map.amax())
        torch.testing.assert_close(model.remember(references).maxima, torch.stack(expected), atol=1e-5, rtol=0)

    def test_held_out_maxima_of_twins_are_their_zero_shot_maxima(self, build: Build) -> None:
        model, image = build(), images(1)
        zero_shot = model(image).anomaly_map.amax()
        twins = image.repeat(2, 1, 1, 1)
        torch.testing.assert_close(model.remember(twins).maxima, zero_shot.repeat(2), atol=2e-5, rtol=0)


class TestOptions:
    def test_smoothing_is_of_the_whole_map(self, build: Build) -> None:
        plain, smoothed = build((2, 4)), build((2, 4), smoothing_sigma=2.0)
        for model in (plain, smoothed):
            model.remember(images(2, seed=8))
        expected, out = plain(images(2)), smoothed(images(2))
        torch.testing.assert_close(out.anomaly_map, smooth(expected.anomaly_map, 2.0))
        assert torch.equal(out.pred_score, expected.pred_score)

    def test_neighbourhoods_are_those_of_bank_and_image_alike(self, build: Build) -> None:
        model, references = build((2, 4), (3,), neighbourhood=3), images(2, seed=8)
        zero_shot = model(references).anomaly_map
        model.remember(references)
        tokens = neighbourhood_mean(model.backbone(references, [3]).patch_tokens[0], (8, 8), 3)
        torch.testing.assert_close(model.memory_bank().tokens[0], F.normalize(tokens, dim=-1))
        torch.testing.assert_close(model(references).anomaly_map, zero_shot, atol=2e-5, rtol=0)  # seen before
        assert torch.equal(zero_shot, build((2, 4), (3,))(references).anomaly_map)  # the zero-shot map has none

    def test_held_out_values_are_those_of_the_maps_that_an_image_gets(self, build: Build) -> None:
        model, references = build((2, 4), smoothing_sigma=1.0, neighbourhood=3), images(3, seed=8)
        maps = []
        for shot in range(3):
            model.remember(references[[other for other in range(3) if other != shot]])
            maps.append(model(references[shot : shot + 1]).anomaly_map)
        held_out = model.remember(references, top_share=0.1)
        torch.testing.assert_close(held_out.maxima, torch.cat(maps).amax(dim=(1, 2)), atol=1e-5, rtol=0)
        torch.testing.assert_close(held_out.statistics, map_statistic(torch.cat(maps), 0.1), atol=1e-5, rtol=0)
        assert (held_out.statistics < held_out.maxima).all()

    def test_the_share_is_of_all_tiles_of_a_picture(self, build: Build) -> None:
        model, tiles = build((2,)), images(4, seed=8)
        model.remember(tiles[2:])
        maps = model(tiles[:2]).anomaly_map
        held_out = model.remember(tiles, tiles=[2, 2], top_share=0.01)
        assert held_out.maxima.shape == (2,)
        torch.testing.assert_close(held_out.statistics[0], map_statistic(maps.reshape(1, 128, 64), 0.01)[0])


class TestPrecision:
    @pytest.mark.parametrize("shots", [0, 2])
    def test_scores_and_maps_are_not_quantised_under_autocast(self, build: Build, shots: int) -> None:
        model, batch = build(), images(16)
        if shots:
            model.remember(images(shots, seed=8))
        exact = model(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = model.encode(batch).patch_tokens[0]
            out = model(batch)
            assert torch.is_autocast_enabled("cpu")
        assert not torch.equal(tokens.float(), model.encode(batch).patch_tokens[0])  # the backbone did run in half
        assert out.anomaly_map.dtype == out.pred_score.dtype == torch.float32
        # bfloat16 has 256 values an octave.
        assert out.anomaly_map[0].unique().numel() > 3500
        assert out.anomaly_map[0].bfloat16().unique().numel() < 1000
        assert out.pred_score.unique().numel() == 16
        assert not torch.equal(out.pred_score, out.pred_score.bfloat16().float())
        assert (out.anomaly_map - exact.anomaly_map).abs().mean() < 0.2

    def test_training_maps_too(self, build: Build) -> None:
        model = build((2,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (maps,) = model.stage_probabilities(images(1))
        assert maps.dtype == torch.float32
        assert maps[0, 1].unique().numel() > 3500

    def test_half_precision_weights(self, build: Build) -> None:
        """Lightning's "bf16-true": everything is cast, the arithmetic of scores and maps is not."""
        model = build()
        model.remember(images(2, seed=8))
        out = model.to(torch.bfloat16)(images(1).to(torch.bfloat16))
        assert out.anomaly_map.dtype == out.pred_score.dtype == torch.float32
        assert out.anomaly_map.unique().numel() > 3500


def test_state_dict_carries_what_was_learned(build: Build) -> None:
    model, other, batch = build(classes=CLASSES), build(classes=CLASSES), images(2)
    for number in range(3):
        model.remember(images(2, seed=8 + number), number)
    other.set_classes(CLASSES, torch.empty_like(model.text_features))
    for number in range(3):
        other.memory_bank(number).tokens = torch.empty_like(model.memory_bank(number).tokens)
    other.load_state_dict(model.state_dict())
    index = torch.tensor([2, 1])
    assert torch.equal(other(batch, index).anomaly_map, model(batch, index).anomaly_map)
    assert {"text_features", "memory_banks.2.tokens", "adapters.fc.0.weight"} <= set(model.state_dict())
