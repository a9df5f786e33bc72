"""From settings to the parts of a model, and parts of the user's that do not go with other arguments."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.data.pre_processing import AprilGANPreProcessor
from anomalib_aprilgan.decision.post_processing import AprilGANPostProcessor
from anomalib_aprilgan.network.memory_bank import MemoryBank

Build = Callable[..., AprilGAN]


def test_network_of_the_settings(april_gan: Build) -> None:
    model = april_gan(stages=(1, 3), memory_stages=(2,), k_shot=2, neighbourhood=3, smoothing_sigma=1.5)
    network = model.model
    assert (network.stages, network.smoothing_sigma) == ((1, 3), 1.5)
    assert [tuple(layer.weight.shape) for layer in network.adapters.fc] == [(40, 64), (40, 64)]
    assert isinstance(network.few_shot, MemoryBank)
    assert (network.few_shot.stages, network.few_shot.neighbourhood) == ((2,), 3)


def test_zero_shot_has_no_scorer(april_gan: Build) -> None:
    assert april_gan().model.few_shot is None


@pytest.mark.parametrize(("adapters", "trained"), [(None, True), ("a.pth", False)])
def test_only_fresh_adapters_are_trained(april_gan: Build, adapters: str | None, trained: bool) -> None:
    parameters = list(april_gan(adapters=adapters).model.parameters())
    assert {parameter.requires_grad for parameter in parameters} == {trained}


def test_default_parts(april_gan: Build) -> None:
    model = april_gan(top_share=0.1, score_fusion="map")
    assert isinstance(model.pre_processor, AprilGANPreProcessor)
    assert tuple(model.pre_processor.image_size) == (96, 96)
    assert not model.pre_processor.tiled
    assert april_gan(tile_size=96).pre_processor.tiled
    assert isinstance(model.post_processor, AprilGANPostProcessor)
    assert (model.post_processor.fusion.top_share, model.post_processor.fusion.rule) == (0.1, "map")


def test_parts_of_the_user_are_taken_as_they_are(april_gan: Build) -> None:
    given = {
        "pre_processor": AprilGANPreProcessor((96, 96), tiled=True),
        "post_processor": AprilGANPostProcessor(top_share=0.1, score_fusion="text"),
    }
    model = april_gan(tile_size=96, top_share=0.1, score_fusion="text", **given)
    assert model.pre_processor is given["pre_processor"]
    assert model.post_processor is given["post_processor"]
    none = april_gan(pre_processor=False, post_processor=False)
    assert none.pre_processor is none.post_processor is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"pre_processor": AprilGANPreProcessor((96, 96)), "tile_size": 96}, r"pass `AprilGANPreProcessor\(..., til"),
        ({"pre_processor": AprilGANPreProcessor((96, 96), tiled=True)}, r"`pre_processor` and `tile_size` do not go"),
        ({"pre_processor": PreProcessor(), "tile_size": 96}, r"`pre_processor` and `tile_size` do not go together"),
        ({"post_processor": PostProcessor(), "calibration": "good"}, r"`calibration` sets the thresholds of an April"),
        ({"post_processor": False, "calibration": "good"}, r"`calibration` sets the thresholds of an AprilGANPostP"),
        ({"post_processor": AprilGANPostProcessor(), "top_share": 0.1}, r"pass `AprilGANPostProcessor\(top_share="),
        ({"post_processor": AprilGANPostProcessor(), "score_fusion": "map"}, r"`AprilGANPostProcessor\(score_fusion="),
    ],
)
def test_parts_that_do_not_go_with_other_arguments(april_gan: Build, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        april_gan(**arguments)


def test_fresh_adapters_start_from_the_seed(april_gan: Build) -> None:
    def weights(seed: int) -> torch.Tensor:
        return april_gan(adapters=None, seed=seed).model.adapters.fc[0].weight

    torch.manual_seed(1)
    first, state = weights(0), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(3), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the user's generator is as it was
