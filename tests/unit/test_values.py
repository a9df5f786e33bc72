"""Values and sensitivities of one class, and that they touch no other."""

from types import SimpleNamespace

import pytest
import torch
from anomalib.data import InferenceBatch

from anomalib_aprilgan.classes import Classes
from anomalib_aprilgan.decision.post_processing import AprilGANPostProcessor
from anomalib_aprilgan.decision.values import BUFFERS

CLASSES = Classes.of({"nut": "nut", "tile": "tile", "wood": "wood"})


def post_processor(**options: float) -> AprilGANPostProcessor:
    built = AprilGANPostProcessor(4.0, **options)
    built.set_rows(CLASSES, [None] * 3, 4.0, 8.0)
    return built


@pytest.mark.parametrize("name", BUFFERS)
def test_every_value_is_read_and_set_by_its_name(name: str) -> None:
    built = post_processor()
    built.of_class("tile").set_values(**{name: 0.25})
    defaults = post_processor().of_class("tile").values()
    assert built.of_class("tile").values() == defaults | {name: 0.25}
    assert built.of_class(1).values()[name] == 0.25
    assert built.of_class("nut").values() == built.of_class("wood").values() == defaults


def test_setting_fixes_and_taking_does_not() -> None:
    built = post_processor()
    built.of_class("nut").take({"image_threshold": 0.25})
    built.of_class("tile").set_values(image_threshold=0.75)
    assert built.fixed.tolist() == [False, True, False]
    assert built.get_buffer("_image_threshold").tolist() == [0.25, 0.75, 0.5]


def test_defaults_by_hand() -> None:
    built = post_processor()
    view = built.of_class("tile")
    view.set_values(**dict.fromkeys(BUFFERS, 0.125))
    view.set_defaults(6.0)
    expected = {
        "image_min": 0.0, "image_threshold": 0.5, "image_max": 1.0, "pixel_min": 0.0, "pixel_threshold": 3.0,
        "pixel_max": 6.0, "map_maximum_min": 0.0, "map_maximum_max": 6.0,
    }  # fmt: skip
    assert view.values() == expected
    assert not built.fixed.any()
    view.set_defaults(6.0, 1.5, 2.5)  # what held-out references show
    assert view.values() == expected | {"map_maximum_min": 1.5, "pixel_threshold": 2.5}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_must_be_finite(value: float) -> None:
    built = post_processor()
    with pytest.raises(ValueError, match=r"must be finite numbers for some of image_min, .*got image_threshold="):
        built.of_class("nut").set_values(pixel_threshold=1.0, image_threshold=value)
    assert built.of_class("nut").values() == post_processor().of_class("nut").values()
    assert not built.fixed.any()


def test_unknown_value() -> None:
    with pytest.raises(ValueError, match=r"some of image_min, .*map_maximum_max, got threshold=0\.5"):
        post_processor().of_class("nut").set_values(threshold=0.5)


@pytest.mark.parametrize("name", ["gear", 3, -1])
def test_unknown_class(name: str | int) -> None:
    with pytest.raises(ValueError, match=rf"`name` must be one of nut, tile, wood, got {name!r}\."):
        post_processor().of_class(name)


class TestSensitivities:
    def test_of_a_class_stay_set(self) -> None:
        built = post_processor(image_sensitivity=0.6)
        built.of_class("tile").image_sensitivity = 0.9
        built.of_class("wood").pixel_sensitivity = 0.2
        assert [built.of_class(row).image_sensitivity for row in range(3)] == [0.6, 0.9, 0.6]
        assert [built.of_class(row).pixel_sensitivity for row in range(3)] == [0.5, 0.5, 0.2]
        built.of_class("nut")  # looking at another class does not put them back
        assert built.of_class("tile").image_sensitivity == 0.9

    def test_decide_the_images_of_their_class(self) -> None:
        built = post_processor()
        built.of_class("tile").image_sensitivity = 0.9
        built.of_class("wood").pixel_sensitivity = 0.9
        given = InferenceBatch(pred_score=torch.full((3,), 0.2), anomaly_map=torch.full((3, 2, 2), 0.8))
        out = built(given, torch.tensor([0, 1, 2]))
        assert out.pred_label.tolist() == [False, True, False]
        assert out.pred_mask[:, 0, 0].tolist() == [False, False, True]

    def test_survive_a_validation_and_a_checkpoint(self) -> None:
        built, restored = post_processor(), post_processor()
        built.of_class("tile").image_sensitivity = 0.9
        built.on_validation_epoch_end(SimpleNamespace(), SimpleNamespace())
        restored.load_checkpoint_config(built.checkpoint_config())
        restored.make_room(CLASSES, 4.0, 8.0)
        restored.load_state_dict(built.state_dict())
        assert [restored.of_class(row).image_sensitivity for row in range(3)] == [0.5, 0.9, 0.5]

    def test_belong_to_the_class_and_not_to_the_row(self) -> None:
        built = post_processor()
        built.of_class("tile").image_sensitivity = 0.9
        built.set_rows(Classes.of({"tile": "tile", "gear": "gear", "nut": "nut"}), [1, None, 0], 4.0, 8.0)
        assert [built.of_class(name).image_sensitivity for name in ("tile", "nut")] == [0.9, 0.5]

    def test_of_the_whole_hold_for_new_classes(self) -> None:
        built = post_processor(image_sensitivity=0.7)
        built.set_rows(Classes.of({"gear": "gear", "nut": "nut"}), [None, 0], 4.0, 8.0)
        assert [built.of_class(row).image_sensitivity for row in range(2)] == [0.7, 0.7]

    def test_of_one_class_do_not_pass_to_a_new_one(self) -> None:
        built = post_processor()
        built.of_class("nut").image_sensitivity = 0.9
        built.set_rows(Classes.of({"nut": "nut", "gear": "gear"}), [0, None], 4.0, 8.0)
        assert [built.of_class(name).image_sensitivity for name in ("nut", "gear")] == [0.9, 0.5]
