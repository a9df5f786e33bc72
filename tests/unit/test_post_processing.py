"""The scale without ties, the fusion, and what validation teaches the post-processor."""

from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from torch import Tensor

from anomalib_aprilgan.decision.post_processing import TAIL, AprilGANPostProcessor, scale_between


def scale(values: Tensor, low: float, threshold: float, high: float) -> Tensor:
    return scale_between(values, *(torch.tensor(bound, dtype=values.dtype) for bound in (low, threshold, high)))


RANGES = [(0.0, 0.3, 1.0), (-2.0, -1.9, 5.0), (0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (2.0, 2.0, 2.0), (0.0, 3.9, 4.0)]


class TestScale:
    def test_by_hand(self) -> None:
        values = torch.tensor([0.0, 0.1, 0.2, 0.6, 1.0])
        expected = torch.tensor([TAIL, (0.5 + TAIL) / 2, 0.5, 0.75 - TAIL / 2, 1 - TAIL])
        torch.testing.assert_close(scale(values, 0.0, 0.2, 1.0), expected)

    @pytest.mark.parametrize("bounds", RANGES)
    def test_strictly_increasing_within_and_beyond_the_bounds(self, bounds: tuple[float, float, float]) -> None:
        low, threshold, high = bounds
        values = torch.linspace(low - 3, high + 3, 1000, dtype=torch.float64)
        scaled = scale(values, *bounds)
        assert scaled.diff().min() > 0
        assert scaled.unique().numel() == 1000
        assert 0 < scaled.min() < scaled.max() < 1
        assert scale(torch.tensor([threshold], dtype=torch.float64), *bounds).item() == 0.5

    @pytest.mark.parametrize("bounds", RANGES)
    def test_no_ties_among_a_thousand_distinct_floats(self, bounds: tuple[float, float, float]) -> None:
        low, _, high = bounds
        values = torch.rand(1000, generator=torch.Generator().manual_seed(0)).unique() * (high - low or 1.0) + low
        assert values.unique().numel() == values.numel() > 990
        scaled = scale(values, *bounds)
        assert torch.equal(scaled.argsort(), values.argsort())
        assert scaled.unique().numel() == values.numel()

    @pytest.mark.parametrize("bounds", RANGES)
    def test_far_beyond_stays_inside_the_open_interval(self, bounds: tuple[float, float, float]) -> None:
        scaled = scale(torch.tensor([-1e3, 1e3], dtype=torch.float64), *bounds)
        assert 0 < scaled[0] < TAIL
        assert 1 - TAIL < scaled[1] < 1

    def test_continuous_and_smooth_at_the_bounds(self) -> None:
        step = 1e-6
        values = torch.tensor([1 - step, 1.0, 1 + step], dtype=torch.float64)
        before, after = scale(values, 0.0, 0.3, 1.0).diff().tolist()
        assert after == pytest.approx(before, rel=1e-2)

    def test_threshold_at_an_end_borrows_the_other_sides_slope(self) -> None:
        values = torch.tensor([-0.5, 0.0, 0.5, 1.0], dtype=torch.float64)
        torch.testing.assert_close(
            scale(values, 0.0, 0.0, 1.0),
            torch.tensor([0.25 + TAIL / 2, 0.5, 0.75 - TAIL / 2, 1 - TAIL], dtype=torch.float64),
        )
        torch.testing.assert_close(
            scale(values, 0.0, 1.0, 1.0)[1:],
            torch.tensor([TAIL, 0.25 + TAIL / 2, 0.5], dtype=torch.float64),
        )

    def test_range_of_equal_values(self) -> None:
        scaled = scale(torch.tensor([1.5, 2.0, 2.5]), 2.0, 2.0, 2.0)
        torch.testing.assert_close(scaled, torch.tensor([0.25 + TAIL / 2, 0.5, 0.75 - TAIL / 2]))

    @pytest.mark.parametrize("threshold", [-1.0, 2.0])
    def test_threshold_outside_the_range_still_lands_on_one_half(self, threshold: float) -> None:
        values = torch.linspace(-2, 3, 101, dtype=torch.float64)
        scaled = scale(values, 0.0, threshold, 1.0)
        assert scaled.diff().min() > 0
        assert ((scaled > 0.5) == (values > threshold)).all()

    def test_symmetric(self) -> None:
        values = torch.linspace(-1, 2, 31, dtype=torch.float64)
        torch.testing.assert_close(scale(values, 0.0, 0.3, 1.0), 1 - scale(-values, -1.0, -0.3, 0.0))

    def test_shape_and_arguments_are_kept(self) -> None:
        values = torch.rand(2, 3, 4)
        copy = values.clone()
        assert scale(values, 0.0, 0.4, 1.0).shape == (2, 3, 4)
        assert torch.equal(values, copy)


class TestFusion:
    def test_by_hand(self) -> None:
        post_processor = AprilGANPostProcessor(map_limit=8.0)
        maps = torch.zeros(2, 3, 3)
        maps[0, 1, 1], maps[1, 2, 0] = 8.0, 2.0
        torch.testing.assert_close(post_processor.fuse(torch.tensor([0.5, 1.0]), maps), torch.tensor([0.75, 0.625]))

    def test_bounds_of_equal_values_do_not_divide_by_zero(self) -> None:
        post_processor = AprilGANPostProcessor()
        post_processor.map_maximum_min.fill_(3.0)
        post_processor.map_maximum_max.fill_(3.0)
        fused = post_processor.fuse(torch.tensor([0.4]), torch.full((1, 2, 2), 3.0))
        assert fused.item() == pytest.approx(0.2)

    def test_forward_fuses_only_where_asked(self) -> None:
        predictions = InferenceBatch(pred_score=torch.tensor([0.2]), anomaly_map=torch.full((1, 2, 2), 4.0))
        plain = AprilGANPostProcessor(4.0)(predictions)
        fused = AprilGANPostProcessor(4.0, fuse_map_maximum=True)(predictions)
        assert plain.pred_score.item() == pytest.approx(scale(torch.tensor([0.2]), 0, 0.5, 1).item())
        assert fused.pred_score.item() == pytest.approx(scale(torch.tensor([0.6]), 0, 0.5, 1).item())
        assert not plain.pred_label.item()
        assert fused.pred_label.item()

    def test_the_mean_of_the_highest_pixels_in_place_of_the_maximum(self) -> None:
        post_processor = AprilGANPostProcessor(map_limit=8.0, top_share=0.25)
        maps = torch.zeros(1, 4, 2)
        maps[0, 1], maps[0, 3, 0] = torch.tensor([6.0, 4.0]), 1.0
        assert post_processor.fuse(torch.tensor([0.5]), maps).item() == pytest.approx(0.5 * (0.5 + 5.0 / 8.0))

    @pytest.mark.parametrize("top_share", [-0.1, 1.1, float("nan")])
    def test_share_out_of_range(self, top_share: float) -> None:
        with pytest.raises(ValueError, match=rf"`top_share` must be a share of the map in \[0, 1\].*got {top_share}"):
            AprilGANPostProcessor(top_share=top_share)

    def test_fusion_without_a_map(self) -> None:
        predictions = InferenceBatch(pred_score=torch.tensor([0.2]), anomaly_map=None)
        with pytest.raises(ValueError, match="fused from `pred_score` and `anomaly_map`, and one of them is missing"):
            AprilGANPostProcessor(fuse_map_maximum=True)(predictions)


class TestDefaults:
    def test_documented_bounds(self) -> None:
        buffers = {name: value.item() for name, value in AprilGANPostProcessor(6.0).named_buffers()}
        assert (buffers["image_min"], buffers["image_max"]) == (0.0, 1.0)
        assert (buffers["_image_threshold"], buffers["_pixel_threshold"]) == (0.5, 3.0)
        assert (buffers["pixel_min"], buffers["pixel_max"]) == (0.0, 6.0)
        assert (buffers["map_maximum_min"], buffers["map_maximum_max"]) == (0.0, 6.0)

    def test_labels_and_masks_before_validation(self) -> None:
        maps = torch.stack([torch.full((2, 2), 1.9), torch.full((2, 2), 2.1)])
        out = AprilGANPostProcessor(4.0)(InferenceBatch(pred_score=torch.tensor([0.49, 0.51]), anomaly_map=maps))
        assert out.pred_label.tolist() == [False, True]
        assert out.pred_mask.flatten(1).all(dim=1).tolist() == [False, True]
        assert ((out.anomaly_map > 0.5) == out.pred_mask.reshape(out.anomaly_map.shape)).all()

    def test_buffers_survive_a_state_dict(self) -> None:
        learned, restored = AprilGANPostProcessor(4.0), AprilGANPostProcessor(2.0)
        learned.map_maximum_min.fill_(0.7)
        restored.load_state_dict(learned.state_dict())
        assert restored.map_maximum_min.item() == pytest.approx(0.7)
        assert restored.pixel_max.item() == 4.0

    def test_fusion_is_part_of_the_checkpoint_config(self) -> None:
        assert AprilGANPostProcessor(fuse_map_maximum=True).checkpoint_config()["fuse_map_maximum"] is True

    def test_switched_off_leaves_raw_values(self) -> None:
        post_processor = AprilGANPostProcessor(4.0, enable_normalization=False, enable_thresholding=False)
        given = InferenceBatch(pred_score=torch.tensor([0.3]), anomaly_map=torch.full((1, 2, 2), 3.5))
        out = post_processor(given)
        assert out.pred_score.item() == pytest.approx(0.3)
        assert torch.equal(out.anomaly_map, given.anomaly_map)


class TestValidation:
    """The hooks as Lightning calls them, with batches made by hand."""

    @staticmethod
    def batch(scores: list[float], maxima: list[float], labels: list[int] | None) -> ImageBatch:
        maps = torch.zeros(len(scores), 4, 4)
        maps[:, 1, 2] = torch.tensor(maxima)
        masks = None
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

    @staticmethod
    def validate(post_processor: AprilGANPostProcessor, *batches: ImageBatch) -> None:
        trainer, module = SimpleNamespace(), SimpleNamespace()
        for batch in batches:
            post_processor.on_validation_batch_end(trainer, module, batch)
        post_processor.on_validation_epoch_end(trainer, module)

    def test_few_shot_bounds_and_threshold_by_hand(self) -> None:
        post_processor = AprilGANPostProcessor(8.0, fuse_map_maximum=True)
        self.validate(
            post_processor, self.batch([0.1, 0.2], [1.0, 2.0], [0, 0]), self.batch([0.6, 0.8], [5.0, 4.0], [1, 1])
        )
        assert (post_processor.map_maximum_min.item(), post_processor.map_maximum_max.item()) == (1.0, 5.0)
        # Fused: 0.05, 0.5 * (0.2 + 0.25), 0.5 * (0.6 + 1), 0.5 * (0.8 + 0.75).
        assert post_processor.image_min.item() == pytest.approx(0.05)
        assert post_processor.image_max.item() == pytest.approx(0.8)
        assert 0.225 < post_processor.image_threshold.item() <= 0.775 + 1e-6
        assert post_processor.pixel_max.item() == 5.0

    def test_zero_shot_bounds_are_those_of_the_scores(self) -> None:
        post_processor = AprilGANPostProcessor(4.0)
        self.validate(post_processor, self.batch([0.1, 0.3, 0.7], [1.0, 2.0, 3.0], [0, 0, 1]))
        assert post_processor.image_min.item() == pytest.approx(0.1)
        assert post_processor.image_max.item() == pytest.approx(0.7)
        assert post_processor.map_maximum_max.item() == 4.0

    def test_the_batch_is_scored_by_the_learned_bounds(self) -> None:
        post_processor = AprilGANPostProcessor(8.0, fuse_map_maximum=True, enable_normalization=False)
        self.validate(post_processor, self.batch([0.1, 0.8], [1.0, 5.0], [0, 1]))
        batch = self.batch([0.5], [3.0], [1])
        post_processor.post_process_batch(batch)
        assert batch.pred_score.item() == pytest.approx(0.5 * (0.5 + 0.5))

    def test_bounds_are_those_of_what_stands_for_the_map(self) -> None:
        post_processor = AprilGANPostProcessor(8.0, fuse_map_maximum=True, top_share=0.125)  # 2 of 16 pixels
        self.validate(post_processor, self.batch([0.1, 0.8], [1.0, 5.0], [0, 1]))
        assert (post_processor.map_maximum_min.item(), post_processor.map_maximum_max.item()) == (0.5, 2.5)
        assert post_processor.pixel_max.item() == 5.0
        assert post_processor.image_max.item() == pytest.approx(0.9)

    def test_classes_have_the_share_of_the_whole(self) -> None:
        post_processor = AprilGANPostProcessor(8.0, fuse_map_maximum=True, top_share=0.125)
        post_processor.set_classes(["left", "right"])
        batch = self.batch([0.1, 0.8, 0.2], [1.0, 5.0, 7.0], [0, 1, 1])
        batch.class_index = torch.tensor([0, 0, 1])
        self.validate(post_processor, batch)
        assert post_processor.of_class(0).map_maximum_max.item() == 2.5

    def test_held_out_references_bound_the_score_by_the_statistic_and_pixels_by_the_maximum(self) -> None:
        post_processor = AprilGANPostProcessor(8.0, top_share=0.01)
        post_processor.set_defaults(8.0, torch.tensor([3.0, 2.0]), torch.tensor([1.0, 1.5]))
        assert post_processor.map_maximum_min.item() == 1.0
        assert post_processor.pixel_threshold.item() == 3.0

    def test_a_second_validation_forgets_the_first(self) -> None:
        post_processor = AprilGANPostProcessor(8.0, fuse_map_maximum=True)
        self.validate(post_processor, self.batch([0.1, 0.8], [1.0, 5.0], [0, 1]))
        self.validate(post_processor, self.batch([0.3, 0.6], [2.0, 3.0], [0, 1]))
        assert (post_processor.map_maximum_min.item(), post_processor.map_maximum_max.item()) == (2.0, 3.0)
        assert post_processor.image_min.item() == pytest.approx(0.15)
        assert post_processor.image_max.item() == pytest.approx(0.8)

    def test_validation_without_data_keeps_the_defaults(self) -> None:
        post_processor = AprilGANPostProcessor(8.0, fuse_map_maximum=True)
        before = {name: value.clone() for name, value in post_processor.named_buffers()}
        self.validate(post_processor)
        assert all(torch.equal(value, before[name]) for name, value in post_processor.named_buffers())

    @pytest.mark.parametrize("labels", [None, [0, 0]])
    def test_bounds_are_not_learned_from_images_that_do_not_show_the_range(self, labels: list[int] | None) -> None:
        post_processor = AprilGANPostProcessor(8.0, fuse_map_maximum=True)
        self.validate(post_processor, self.batch([0.1, 0.8], [1.0, 5.0], labels))
        assert (post_processor.map_maximum_min.item(), post_processor.map_maximum_max.item()) == (0.0, 8.0)

    def test_scores_gathered_across_processes(self) -> None:
        """Gathering turns the lists of a torchmetrics state into tensors."""
        store = AprilGANPostProcessor()._validation_scores
        store.text_probability, store.map_maximum = torch.tensor([0.1, 0.2]), torch.tensor([1.0, 2.0])
        store.label = torch.tensor([0, 1])
        store._update_count = 1
        assert torch.equal(store.compute()[2], torch.tensor([0, 1]))
