"""From raw predictions to decisions: defaults, rows, validation, and metrics that see no ties."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from anomalib_aprilgan.classes import Classes
from anomalib_aprilgan.decision.post_processing import AprilGANPostProcessor
from anomalib_aprilgan.decision.scale import Bounds, scaled

CLASSES = Classes.of({"left": "left", "right": "right"})


def batch_of(scores: list[float], maxima: list[float] | None = None, labels: list[int] | None = None) -> ImageBatch:
    """Maps with one pixel above zero, which is the defect where the label says so."""
    maps, masks = torch.zeros(len(scores), 4, 4), None
    maps[:, 1, 2] = torch.tensor(scores if maxima is None else maxima)
    if labels is not None:
        masks = torch.zeros(len(scores), 4, 4, dtype=torch.uint8)
        masks[:, 1, 2] = torch.tensor(labels)
    return ImageBatch(
        image=torch.zeros(len(scores), 3, 4, 4),
        pred_score=torch.tensor(scores),
        anomaly_map=maps,
        gt_label=None if labels is None else torch.tensor(labels),
        gt_mask=masks,
    )


def raw(scores: list[float], maxima: list[float]) -> InferenceBatch:
    batch = batch_of(scores, maxima)
    return InferenceBatch(pred_score=batch.pred_score, anomaly_map=batch.anomaly_map)


def of_classes(classes: Classes = CLASSES, **options: Any) -> AprilGANPostProcessor:
    built = AprilGANPostProcessor(8.0, **options)
    built.set_rows(classes, [None] * len(classes), 8.0, 8.0)
    return built


def validate(post_processor: AprilGANPostProcessor, *batches: ImageBatch, rows: list[int] | None = None) -> None:
    """The hooks as Lightning calls them."""
    module = SimpleNamespace() if rows is None else SimpleNamespace(rows_of=lambda _: torch.tensor(rows))
    for batch in batches:
        post_processor.on_validation_batch_end(SimpleNamespace(), module, batch)
    post_processor.on_validation_epoch_end(SimpleNamespace(), module)


def values_of(post_processor: AprilGANPostProcessor) -> list[dict[str, float]]:
    return [post_processor.of_class(row).values() for row in range(len(post_processor.fixed))]


class TestForward:
    def test_fuses_only_where_asked(self) -> None:
        predictions = InferenceBatch(pred_score=torch.tensor([0.2]), anomaly_map=torch.full((1, 2, 2), 4.0))
        plain = AprilGANPostProcessor(4.0)(predictions)
        fused = AprilGANPostProcessor(4.0, fuse_map_maximum=True)(predictions)
        torch.testing.assert_close(plain.pred_score, torch.tensor([0.2]))
        torch.testing.assert_close(fused.pred_score, torch.tensor([0.6]))
        assert not plain.pred_label.item()
        assert fused.pred_label.item()

    def test_the_mean_of_the_highest_pixels_in_place_of_the_maximum(self) -> None:
        post_processor = AprilGANPostProcessor(8.0, True, False, top_share=0.25)
        maps = torch.zeros(1, 4, 2)
        maps[0, 1], maps[0, 3, 0] = torch.tensor([6.0, 4.0]), 1.0
        out = post_processor(InferenceBatch(pred_score=torch.tensor([0.5]), anomaly_map=maps))
        assert out.pred_score.item() == pytest.approx(0.5 * (0.5 + 5.0 / 8.0))

    @pytest.mark.parametrize(
        ("option", "text"),
        [({"top_share": 1.1}, r"`top_share` must be a share"), ({"score_fusion": "sum"}, r"`score_fusion` must be")],
    )
    def test_arguments_of_the_fusion(self, option: dict[str, Any], text: str) -> None:
        with pytest.raises(ValueError, match=text):
            AprilGANPostProcessor(**option)

    @pytest.mark.parametrize(("score", "anomaly_map"), [(torch.tensor([0.2]), None), (None, torch.zeros(1, 2, 2))])
    def test_fusion_of_something_missing(self, score: Tensor | None, anomaly_map: Tensor | None) -> None:
        with pytest.raises(ValueError, match="fused from `pred_score` and `anomaly_map`, and one of them is missing"):
            AprilGANPostProcessor(fuse_map_maximum=True)(InferenceBatch(pred_score=score, anomaly_map=anomaly_map))

    def test_without_a_map_where_nothing_is_fused(self) -> None:
        out = AprilGANPostProcessor()(InferenceBatch(pred_score=torch.tensor([0.7]), anomaly_map=None))
        assert out.anomaly_map is out.pred_mask is None
        assert out.pred_label.item()

    def test_scores_run_over_all_that_maps_can_lead_to(self) -> None:
        # A map limit of 4 is expected, 12 is possible: a fused score of up to 2.
        post_processor = AprilGANPostProcessor(4.0, fuse_map_maximum=True)
        post_processor.set_rows(Classes.of({"nut": "nut"}), [None], 4.0, 12.0)
        out = post_processor(raw([0.5, 1.0, 1.0], [4.0, 10.0, 12.0]))
        assert out.pred_score.diff().min() > 0
        assert out.pred_score[-1].item() == 1.0
        assert out.anomaly_map.amax(dim=(1, 2)).tolist() == sorted(set(out.anomaly_map.amax(dim=(1, 2)).tolist()))


class TestDefaults:
    def test_documented_bounds(self) -> None:
        assert AprilGANPostProcessor(6.0).values() == {
            "image_min": 0.0, "image_threshold": 0.5, "image_max": 1.0, "pixel_min": 0.0, "pixel_threshold": 3.0,
            "pixel_max": 6.0, "map_maximum_min": 0.0, "map_maximum_max": 6.0,
        }  # fmt: skip

    def test_labels_and_masks_before_validation(self) -> None:
        maps = torch.stack([torch.full((2, 2), 1.9), torch.full((2, 2), 2.1)])
        out = AprilGANPostProcessor(4.0)(InferenceBatch(pred_score=torch.tensor([0.49, 0.51]), anomaly_map=maps))
        assert out.pred_label.tolist() == [False, True]
        assert out.pred_mask.flatten(1).all(dim=1).tolist() == [False, True]
        assert ((out.anomaly_map > 0.5) == out.pred_mask.reshape(out.anomaly_map.shape)).all()

    def test_values_survive_a_state_dict(self) -> None:
        learned, restored = AprilGANPostProcessor(4.0), AprilGANPostProcessor(2.0)
        learned.set_values(map_maximum_min=0.7)
        restored.load_state_dict(learned.state_dict())
        assert restored.values() == learned.values()
        assert restored.values()["map_maximum_min"] == pytest.approx(0.7)
        assert restored.fixed.tolist() == [True]

    def test_fusion_is_part_of_the_checkpoint_config(self) -> None:
        assert AprilGANPostProcessor(fuse_map_maximum=True).checkpoint_config()["fuse_map_maximum"] is True

    def test_values_follow_the_map_limit_until_they_are_learned_or_fixed(self) -> None:
        post_processor = AprilGANPostProcessor(4.0)
        post_processor.set_rows(Classes.of({"nut": "nut"}), [None], 4.0, 4.0)
        post_processor.set_rows(Classes.of({"nut": "nut"}), [0], 6.0, 12.0)
        assert post_processor.values() == AprilGANPostProcessor(6.0).values()
        post_processor.set_values(pixel_threshold=1.0)
        post_processor.set_rows(Classes.of({"nut": "nut"}), [0], 8.0, 16.0)
        assert post_processor.values()["pixel_threshold"] == 1.0


class TestSwitchedOff:
    def test_normalisation_and_thresholds_leave_raw_values(self) -> None:
        post_processor = AprilGANPostProcessor(4.0, enable_normalization=False, enable_thresholding=False)
        given = InferenceBatch(pred_score=torch.tensor([0.3]), anomaly_map=torch.full((1, 2, 2), 3.5))
        out = post_processor(given)
        assert out.pred_score.item() == pytest.approx(0.3)
        assert torch.equal(out.anomaly_map, given.anomaly_map)
        assert out.pred_label is out.pred_mask is None

    def test_raw_values_are_cut_at_the_raw_thresholds(self) -> None:
        post_processor = AprilGANPostProcessor(4.0, enable_normalization=False)
        post_processor.set_values(image_threshold=0.95, pixel_threshold=3.0)
        given = raw([0.627, 0.96], [2.9, 3.1])
        out = post_processor(given)
        assert torch.equal(out.pred_score, given.pred_score)
        assert torch.equal(out.anomaly_map, given.anomaly_map)
        assert out.pred_label.tolist() == [False, True]
        assert out.pred_mask.flatten(1).any(dim=1).tolist() == [False, True]
        torch.testing.assert_close(post_processor.normalized_image_threshold, torch.tensor([0.95]))
        torch.testing.assert_close(post_processor.normalized_pixel_threshold, torch.tensor([3.0]))

    def test_the_decision_does_not_depend_on_the_scale(self) -> None:
        on, off = AprilGANPostProcessor(4.0), AprilGANPostProcessor(4.0, enable_normalization=False)
        for post_processor in (on, off):
            post_processor.set_values(image_threshold=0.4, pixel_threshold=1.5)
            post_processor.of_class(0).image_sensitivity = 0.7
        given = raw(torch.linspace(0, 1, 50).tolist(), torch.linspace(0, 4, 50).tolist())
        assert torch.equal(on(given).pred_label, off(given).pred_label)
        assert torch.equal(on(given).pred_mask, off(given).pred_mask)


class TestRows:
    def test_every_image_by_the_values_of_its_class(self) -> None:
        post_processor = of_classes(fuse_map_maximum=True)
        post_processor.of_class("left").set_values(image_threshold=0.2, map_maximum_max=4.0, pixel_threshold=1.0)
        post_processor.of_class("right").set_values(image_threshold=0.7, pixel_max=5.0)
        scores, maxima, rows = [0.1, 0.5, 0.9, 0.4], [1.0, 2.0, 7.0, 4.5], [1, 0, 1, 0]
        out = post_processor(raw(scores, maxima), torch.tensor(rows))
        for number, row in enumerate(rows):
            alone = post_processor.of_row(row)(raw(scores[number : number + 1], maxima[number : number + 1]))
            assert all(torch.equal(one[0], other[number]) for one, other in zip(alone, out, strict=True))

    def test_scale_by_hand(self) -> None:
        post_processor = of_classes()
        post_processor.of_class("right").set_values(pixel_min=1.0, pixel_threshold=2.0, pixel_max=3.0)
        out = post_processor(raw([0.5, 0.5], [2.5, 2.5]), torch.tensor([0, 1]))
        expected = [
            scaled(torch.tensor(2.5), Bounds(*map(torch.tensor, (*learned, 0.0, 8.0))))
            for learned in ((0.0, 4.0, 8.0), (1.0, 2.0, 3.0))
        ]
        assert out.anomaly_map[:, 1, 2].tolist() == [value.item() for value in expected]

    @pytest.mark.parametrize("options", [{}, {"fuse_map_maximum": True}, {"fuse_map_maximum": True, "top_share": 0.1}])
    def test_a_batch_without_images(self, options: dict[str, Any]) -> None:
        post_processor, nothing = of_classes(**options), torch.empty(0, dtype=torch.long)
        out = post_processor(InferenceBatch(pred_score=torch.empty(0), anomaly_map=torch.empty(0, 4, 4)), rows=nothing)
        assert [tuple(value.shape) for value in out] == [(0,), (0,), (0, 4, 4), (0, 4, 4)]
        batch = SimpleNamespace(pred_score=torch.empty(0), anomaly_map=torch.empty(0, 4, 4))
        batch.update = vars(batch).update
        post_processor.post_process_batch(batch, nothing)
        assert (batch.pred_label.shape, batch.pred_mask.shape) == ((0,), (0, 4, 4))

    def test_several_classes_need_rows(self) -> None:
        with pytest.raises(ValueError, match=r"`rows` are needed to choose among the classes \('left', 'right'\)"):
            of_classes()(raw([0.5], [1.0]))

    @pytest.mark.parametrize("call", ["values", "set_values"])
    def test_several_classes_have_values_of_their_own(self, call: str) -> None:
        text = r"Every class has its own values: ask `of_class` for one of left, right\."
        with pytest.raises(ValueError, match=text):
            getattr(of_classes(), call)()

    def test_what_is_fixed_before_classes_are_known_holds_for_all(self) -> None:
        post_processor = AprilGANPostProcessor(4.0)
        post_processor.set_values(image_threshold=0.9)
        post_processor.of_class(0).image_sensitivity = 0.4
        post_processor.set_rows(CLASSES, [None, None], 8.0, 16.0)
        assert [values["image_threshold"] for values in values_of(post_processor)] == pytest.approx([0.9, 0.9])
        assert post_processor.fixed.tolist() == [True, True]
        assert [post_processor.of_class(row).image_sensitivity for row in range(2)] == [0.4, 0.4]
        validate(post_processor, batch_of([0.1, 0.2], labels=[0, 1]), rows=[0, 1])
        assert [values["image_threshold"] for values in values_of(post_processor)] == pytest.approx([0.9, 0.9])

    def test_values_are_kept_moved_and_dropped_by_class(self) -> None:
        post_processor = of_classes()
        post_processor.of_class("left").set_values(image_threshold=0.3)
        post_processor.of_class("right").take({"image_threshold": 0.6, "map_maximum_min": 1.0})
        post_processor.set_rows(Classes.of({"right": "right", "top": "top", "left": "left"}), [1, None, 0], 8.0, 8.0)
        thresholds = [values["image_threshold"] for values in values_of(post_processor)]
        assert thresholds == pytest.approx([0.6, 0.5, 0.3])
        assert [values["map_maximum_min"] for values in values_of(post_processor)] == [1.0, 0.0, 0.0]
        assert post_processor.fixed.tolist() == [False, False, True]

    def test_setting_the_same_rows_again_changes_nothing(self) -> None:
        post_processor = of_classes()
        validate(post_processor, batch_of([0.1, 0.8, 0.3], labels=[0, 1, 1]), rows=[0, 0, 1])
        before = values_of(post_processor)
        post_processor.set_rows(CLASSES, [0, 1], 8.0, 8.0)
        assert values_of(post_processor) == before

    def test_one_row_alone_leaves_the_whole_alone(self) -> None:
        post_processor = of_classes()
        post_processor.of_class("right").set_values(image_threshold=0.7)
        post_processor.of_class("right").image_sensitivity = 0.9
        one = post_processor.of_row(1)
        assert one.values() == post_processor.of_class("right").values()
        assert one.of_class("right").image_sensitivity == 0.9
        one.set_values(image_threshold=0.1)
        assert post_processor.of_class("right").values()["image_threshold"] == pytest.approx(0.7)


class TestValidation:
    def test_few_shot_bounds_and_threshold_by_hand(self) -> None:
        post_processor = AprilGANPostProcessor(8.0, fuse_map_maximum=True)
        validate(post_processor, batch_of([0.1, 0.2], [1.0, 2.0], [0, 0]), batch_of([0.6, 0.8], [5.0, 4.0], [1, 1]))
        values = post_processor.values()
        assert (values["map_maximum_min"], values["map_maximum_max"]) == (1.0, 5.0)
        # Fused: 0.05, 0.5 * (0.2 + 0.25), 0.5 * (0.6 + 1), 0.5 * (0.8 + 0.75).
        assert values["image_min"] == pytest.approx(0.05)
        assert values["image_max"] == pytest.approx(0.8)
        assert 0.225 < values["image_threshold"] <= 0.775 + 1e-6
        assert values["pixel_max"] == 5.0
        assert post_processor.learned_rows == [0]

    def test_zero_shot_bounds_are_those_of_the_scores(self) -> None:
        post_processor = AprilGANPostProcessor(4.0)
        validate(post_processor, batch_of([0.1, 0.3, 0.7], [1.0, 2.0, 3.0], [0, 0, 1]))
        values = post_processor.values()
        assert (values["image_min"], values["image_max"]) == pytest.approx((0.1, 0.7))
        assert values["map_maximum_max"] == 4.0

    def test_the_batch_is_scored_by_the_learned_bounds(self) -> None:
        post_processor = AprilGANPostProcessor(8.0, fuse_map_maximum=True, enable_normalization=False)
        validate(post_processor, batch_of([0.1, 0.8], [1.0, 5.0], [0, 1]))
        batch = batch_of([0.5], [3.0], [1])
        post_processor.post_process_batch(batch)
        assert batch.pred_score.item() == pytest.approx(0.5 * (0.5 + 0.5))

    def test_bounds_are_those_of_what_stands_for_the_map(self) -> None:
        post_processor = AprilGANPostProcessor(8.0, fuse_map_maximum=True, top_share=0.125)  # 2 of 16 pixels
        validate(post_processor, batch_of([0.1, 0.8], [1.0, 5.0], [0, 1]))
        values = post_processor.values()
        assert (values["map_maximum_min"], values["map_maximum_max"]) == (0.5, 2.5)
        assert values["pixel_max"] == 5.0
        assert values["image_max"] == pytest.approx(0.9)

    def test_every_class_learns_from_its_own_images(self) -> None:
        post_processor = of_classes(fuse_map_maximum=True, top_share=0.125)
        validate(post_processor, batch_of([0.1, 0.8, 0.2, 0.4], [1.0, 5.0, 7.0, 3.0], [0, 1, 1, 0]), rows=[0, 0, 1, 1])
        bounds = [(values["map_maximum_min"], values["map_maximum_max"]) for values in values_of(post_processor)]
        assert bounds == [(0.5, 2.5), (1.5, 3.5)]
        assert post_processor.learned_rows == [0, 1]

    def test_a_class_without_images_keeps_its_values(self) -> None:
        post_processor = of_classes()
        before = values_of(post_processor)[1]
        validate(post_processor, batch_of([0.1, 0.8], labels=[0, 1]), rows=[0, 0])
        assert values_of(post_processor)[1] == before
        assert post_processor.learned_rows == [0]

    def test_what_is_fixed_is_not_changed(self) -> None:
        post_processor = of_classes(fuse_map_maximum=True)
        post_processor.of_class("left").set_values(image_threshold=0.9)
        before = values_of(post_processor)
        validate(post_processor, batch_of([0.1, 0.8, 0.2, 0.4], [1.0, 5.0, 7.0, 3.0], [0, 1, 1, 0]), rows=[0, 0, 1, 1])
        assert values_of(post_processor)[0] == before[0]
        assert values_of(post_processor)[1] != before[1]
        assert post_processor.learned_rows == [1]

    def test_a_second_validation_forgets_the_first(self) -> None:
        post_processor = AprilGANPostProcessor(8.0, fuse_map_maximum=True)
        validate(post_processor, batch_of([0.1, 0.8], [1.0, 5.0], [0, 1]))
        validate(post_processor, batch_of([0.3, 0.6], [2.0, 3.0], [0, 1]))
        values = post_processor.values()
        assert (values["map_maximum_min"], values["map_maximum_max"]) == (2.0, 3.0)
        assert (values["image_min"], values["image_max"]) == pytest.approx((0.15, 0.8))

    def test_validation_without_data_keeps_the_defaults(self) -> None:
        post_processor = AprilGANPostProcessor(8.0, fuse_map_maximum=True)
        before = {name: value.clone() for name, value in post_processor.named_buffers()}
        validate(post_processor)
        assert all(torch.equal(value, before[name]) for name, value in post_processor.named_buffers())

    @pytest.mark.parametrize("labels", [None, [0, 0]])
    def test_bounds_are_not_learned_from_images_that_do_not_show_the_range(self, labels: list[int] | None) -> None:
        post_processor = AprilGANPostProcessor(8.0, fuse_map_maximum=True)
        validate(post_processor, batch_of([0.1, 0.8], [1.0, 5.0], labels))
        values = post_processor.values()
        assert (values["map_maximum_min"], values["map_maximum_max"]) == (0.0, 8.0)

    def test_in_inference_mode(self) -> None:
        post_processor = of_classes(fuse_map_maximum=True)
        with torch.inference_mode():
            validate(post_processor, batch_of([0.1, 0.8], [1.0, 5.0], [0, 1]), rows=[0, 0])
        assert values_of(post_processor)[0]["map_maximum_max"] == 5.0


@pytest.mark.parametrize("fuse_map_maximum", [False, True])
def test_close_validation_defects_do_not_tie_what_lies_beyond_them(fuse_map_maximum: bool) -> None:
    post_processor = AprilGANPostProcessor(1.0, fuse_map_maximum)
    post_processor.set_rows(Classes.of({"nut": "nut"}), [None], 1.0, 4.0)
    validate(post_processor, batch_of([0.20, 0.25, 0.30, 0.35, 0.7000, 0.7003], labels=[0, 0, 0, 0, 1, 1]))
    batch, labels = batch_of([0.71, 0.72, 0.80, 0.90, 0.95]), torch.tensor([0, 0, 1, 1, 1])
    assert binary_auroc(batch.pred_score, labels).item() == 1.0
    post_processor.post_process_batch(batch)
    assert batch.pred_score.diff().min() > 0
    assert binary_auroc(batch.pred_score, labels).item() == 1.0
