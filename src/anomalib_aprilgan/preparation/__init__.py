"""From settings and data to a ready network: CLIP, adapters, text, region of interest, references, bounds, calibration.

Each thing is made where its recipe says that it is missing or another one, and left alone otherwise.
"""

from __future__ import annotations

import warnings
from threading import RLock

import torch

from ..network.few_shot import FewShotScorer
from ..network.model import AprilGANModel
from ..settings import Settings
from .decision import bounds_recipe, calibrate, set_bounds
from .network import attach_clip, encoded, fill_memory_bank, load_adapters, set_classes, wanted_classes
from .roi import has_roi, set_roi
from .workplace import Made, Workplace

__all__ = [
    "SETTING_UP",
    "Made",
    "Workplace",
    "attach_clip",
    "encoded",
    "is_ready",
    "note_learned",
    "prepare",
    "recalibrate",
]

# Only one thread at a time makes a model ready; a lock of the model's own could be neither copied nor pickled.
SETTING_UP = RLock()


@torch.no_grad()
@torch.inference_mode(mode=False)  # what is made here outlives the loop that asks for it
def prepare(place: Workplace, stage: str, *, single: bool) -> bool:
    """Make whatever recipes say is missing for a stage, or for ``"export"``: the one door to a ready model.

    Adapters are trained without references. ``single`` says that the images to come do not tell their class. The result
    says whether bounds and thresholds are new, and not learned yet. Files that are missing raise a FileNotFoundError,
    those that do not fit a ValueError.
    """
    place.made.is_changing = True
    try:
        return _prepare(place, stage, single=single)
    finally:
        place.made.is_changing = False


def _prepare(place: Workplace, stage: str, *, single: bool) -> bool:
    settings, made = place.settings, place.made
    attach_clip(settings, made, place.network, place.device)
    load_adapters(place)
    set_classes(place, wanted_classes(place, single=single))
    place.network.to(place.device)
    if place.post_processor is not None:
        place.post_processor.to(place.device)
        place.post_processor.fuse_map_maximum = place.network.few_shot is not None and stage != "fit"
    if stage == "fit":
        return False
    renewed = False
    for row in range(len(made.classes)):
        set_roi(place, row)
        outputs = fill_memory_bank(place, row)
        renewed = set_bounds(place, row, outputs) or renewed
        if (calibration := settings.how_to_calibrate) is not None:
            calibrate(place, calibration, row)
    scorer, batch = place.network.few_shot, settings.remembering.batch_zero_shot
    if batch and scorer is not None and stage != "validate" and not _remembers(settings, made, scorer):
        msg = (
            "`batch_zero_shot` compares the image files of a test or prediction with each other, and there are none: "
            "call `Engine.test` or `Engine.predict` with them, or compare with `references_unlabelled`."
        )
        raise ValueError(msg)
    if stage in {"validate", "test"}:
        made.provenance.warn_of_seen(place.datamodule)
    if settings.adapters is None and not made.has_trained:
        warnings.warn(
            "The adapters are untrained: the maps mean nothing. Train them with `fit`, or pass `adapters`.",
            stacklevel=2,
        )
    return renewed


def is_ready(settings: Settings, made: Made, network: AprilGANModel) -> bool:
    """Whether images can be predicted as they were asked for, references included.

    Not while another thread is making things: who asks then waits for it.
    """
    has_adapters = settings.adapters is None or made.has_trained or made.adapters is not None
    if made.is_changing or not (network.has_backbone and has_adapters and len(made.classes)):
        return False
    scorer = network.few_shot
    if (settings.k_shot and scorer is None) or not has_roi(settings, made):
        return False
    return scorer is None or _remembers(settings, made, scorer)


def _remembers(settings: Settings, made: Made, scorer: FewShotScorer) -> bool:
    """Whether every class has references; where images serve each other, those that occur."""
    numbers = [scorer.number(row) for row in range(len(made.classes))]
    return any(numbers) if settings.remembering.batch_zero_shot else all(numbers)


@torch.no_grad()
@torch.inference_mode(mode=False)
def recalibrate(place: Workplace, row: int) -> None:
    """Calibrate the thresholds of a class anew after its memory bank has grown; others stay as they are.

    Where nothing was calibrated, bounds and thresholds hold on: with more good parts distances can only be lower.
    """
    recipes = place.made.rows[row]
    if recipes.bounds is None or recipes.bounds.ingredients:  # else of 0.1.0, which does not tell what they rest on
        recipes.bounds = bounds_recipe(place, row)
    if (calibration := place.settings.how_to_calibrate) is not None:
        recipes.calibration = None
        calibrate(place, calibration, row)


def note_learned(place: Workplace) -> None:
    """Write down what the bounds and thresholds rest on that validation has just learned."""
    if place.post_processor is not None:
        for row in place.post_processor.learned_rows:
            place.made.rows[row].bounds = bounds_recipe(place, row)
        place.post_processor.learned_rows = []
