"""What a model is while it is exported: without text tower, and of one class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from anomalib.models.components import AnomalibModule

from .decision.post_processing import AprilGANPostProcessor
from .network.model import AprilGANModel


@contextmanager
def without_text_tower(network: AprilGANModel) -> Iterator[None]:
    """Text features stay, what they were encoded with is left out, for as long as the context lasts."""
    backbone = network.backbone
    text, backbone.text = backbone.text, None
    try:
        yield
    finally:
        backbone.text = text


@contextmanager
def of_one_class(module: AnomalibModule, network: AprilGANModel, default_class: str | None) -> Iterator[None]:
    """One class with its bounds and thresholds, for as long as the context lasts.

    A graph has one input, the image, so that anomalib's inferencers can run it.

    Args:
        module: Its post-processor is changed.
        network: Its network.
        default_class: Which of several classes.

    Raises:
        ValueError: There are several and none is chosen.
    """
    known = network.class_names
    if len(known) == 1:
        yield
        return
    if default_class is None:
        msg = f"An exported model is of one class: set `default_class` to one of {known}, and export once for each."
        raise ValueError(msg)
    number, post_processor = known.index(default_class), module.post_processor
    if isinstance(post_processor, AprilGANPostProcessor):
        module.post_processor = post_processor.of_class(number)
    try:
        with network.only(number):
            yield
    finally:
        module.post_processor = post_processor
