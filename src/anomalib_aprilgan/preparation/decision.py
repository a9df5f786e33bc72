"""Bounds, thresholds and their calibration."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clip.backbone import VisionOutput
from ..data.pre_processing import sources
from ..data.references import content_digests, read_reference
from ..decision.calibration import Calibration, Thresholds, likely_good
from ..decision.post_processing import AprilGANPostProcessor
from ..inspection import check_frame
from ..network.model import RawPredictions
from ..recipe import Recipe, digest_of_tensors
from .workplace import Workplace, tiles_of

logger = logging.getLogger(__name__)

# References that are held out for the bounds of a class, at most: their extremes change little with more.
_MOST_HELD_OUT = 32


def set_bounds(place: Workplace, row: int, outputs: Sequence[VisionOutput] = ()) -> bool:
    """Bounds and thresholds of a class, unless what they rest on is what it was; returns whether they are new.

    The map statistic is bounded from below by what good parts reach: the lowest of the references, each held out in
    turn (0 for a single one). It is bounded from above by what a map reaches where every stage is certain. Pixels are
    cut above all held-out maps. What a user has fixed stays. ``outputs`` are CLIP's of the references, where known.
    """
    network, recipes, post_processor = place.network, place.made.rows[row], place.post_processor
    wanted = bounds_recipe(place, row)
    if recipes.bounds is not None and recipes.bounds.agrees(wanted):
        return False
    changed, recipes.bounds = recipes.bounds is not None, wanted
    if post_processor is not None and post_processor.fixed[row] and place.settings.calibration is None:
        if changed:
            name = place.made.classes.names[row]
            warnings.warn(
                f"What the scores of {name!r} rest on has changed; its thresholds are still the fixed ones.",
                stacklevel=2,
            )
        return False
    held_out = _held_out(place, row, outputs)
    low = min((place.fusion.statistic(raw.anomaly_map).item() for raw in held_out), default=0.0)
    maxima = torch.tensor([raw.anomaly_map.amax().item() for raw in held_out])
    good = likely_good(maxima, place.settings.remembering.allowed) if held_out else []
    highest = maxima[good].max().item() if good else None
    if post_processor is not None:
        post_processor.of_class(row).set_defaults(network.map_limit, low, highest)
    else:
        place.fusion.low[row], place.fusion.high[row] = low, network.map_limit
    return True


def calibrate(place: Workplace, calibration: Calibration, row: int) -> None:
    """Thresholds of a class from normal images, unless they are those already."""
    made, recipes, post_processor = place.made, place.made.rows[row], place.post_processor
    if post_processor is None:
        return
    name = made.classes.names[row]
    settled: dict[str, Any] = {
        "bounds": recipes.bounds,
        "rate": calibration.false_positive_rate,
        "seed": calibration.seed,
    }
    if calibration.from_references and calibration.contamination:
        settled["contamination"] = calibration.contamination
    if place.data.augmentations is not None:
        settled["augmentations"] = str(place.data.augmentations)
    try:
        files = calibration.files_of(name, made.classes.names, recipes.references)
    except (FileNotFoundError, ValueError):
        if recipes.calibration is not None and recipes.calibration.agrees(Recipe.of(**settled), "normals"):
            return  # those of a checkpoint, whose images may be gone
        raise
    wanted = Recipe.of(**settled, normals=[calibration.from_references, *content_digests(files)])
    if recipes.calibration is not None and recipes.calibration.agrees(wanted):
        return

    found = _thresholds(place, row, calibration, files, post_processor)
    post_processor.of_class(row).set_values(image_threshold=found.image, pixel_threshold=found.pixel)
    recipes.calibration = wanted
    logger.info(
        "Calibrated %s with %s normal images: image threshold %.4f, pixel threshold %.4f (raw).",
        name,
        len(files),
        found.image,
        found.pixel,
    )


def _thresholds(
    place: Workplace, row: int, calibration: Calibration, files: Sequence[Path], post_processor: AprilGANPostProcessor
) -> Thresholds:
    """Thresholds of a class from these normal images, and what held-out ones look like, noted in the post-processor."""
    scores: list[Tensor] = []
    appearances: list[Tensor] = []

    def score(image: Tensor, without: Collection[int]) -> tuple[Tensor, Tensor]:
        raw = place.predict(image.to(place.device), place.row(row), without, None)
        fused = raw.text_probability
        if post_processor.fuse_map_maximum:
            fused = place.fusion(fused, place.fusion.statistic(raw.anomaly_map), place.row(row))
        if not calibration.from_references:  # those know what they are compared with
            scores.append(fused)
            appearances.extend([] if raw.appearance is None else [raw.appearance])
        return fused[0], raw.anomaly_map.amax()

    post_processor.of_class(row).set_defaults(place.network.map_limit)  # the bounds that scores are fused with
    within, tiles = partial(_looked_at, place, row), lambda image: len(tiles_of(place, image))
    has_roi = place.network.roi is not None and place.network.roi.inside(row) is not None
    found = calibration.thresholds(files, tiles, score, within, has_roi)
    if scores:
        post_processor.of_class(row).set_good_parts(torch.cat(scores), torch.cat(appearances))
    return found


def _looked_at(place: Workplace, row: int, image: Tensor) -> Tensor:
    """A normal image ``(1, 3, H, W)`` with a mean colour in place of what lies outside its region of interest."""
    image, roi = place.augmented(image), place.network.roi
    inside = None if roi is None else roi.inside(row)
    if inside is None:
        return image
    if roi is not None:
        check_frame(roi, row, (image.shape[-2], image.shape[-1]), "a normal image")
    return torch.where(sources(inside, (image.shape[-2], image.shape[-1])).to(image.device), image, 0.5)


def bounds_recipe(place: Workplace, row: int) -> Recipe:
    """What bounds and thresholds of a class rest on."""
    settings, recipes = place.settings, place.made.rows[row]
    scorer, fused = place.network.few_shot, place.post_processor is None or place.post_processor.fuse_map_maximum
    has_bank = scorer is not None and scorer.number(row) > 0 and fused
    maps = {"image_size": settings.architecture.image_size, "smoothing_sigma": settings.smoothing_sigma}
    tiles = None if settings.tile_size is None else [settings.tile_size, settings.tile_overlap]
    accepted, allowed = recipes.accepted_contents if has_bank else [], settings.remembering.allowed
    return Recipe.of(
        adapters=digest_of_tensors(place.network.adapters.state_dict()),
        stages=settings.stages,
        text=recipes.text,
        bank=recipes.bank if has_bank else None,
        fusion=[settings.score_fusion, settings.top_share],
        tiles=tiles,
        **maps,
        **({"accepted": accepted} if accepted else {}),
        **({} if recipes.roi is None else {"roi": recipes.roi}),
        **({"contamination": allowed} if has_bank and allowed else {}),
    )


def _held_out(place: Workplace, row: int, outputs: Sequence[VisionOutput]) -> list[RawPredictions]:
    """Raw predictions of the references of a class, each held out of the memory bank in turn; none for a single one.

    Of many references, some that are evenly spread stand for all.
    """
    files = [Path(path) for path in place.made.rows[row].references]
    if place.network.few_shot is None or len(files) < 2 or not place.network.few_shot.number(row):
        return []
    if not all(file.is_file() for file in files):
        warnings.warn(
            f"The references of {place.made.classes.names[row]!r} no longer exist, so that its scores "
            "cannot be scaled by them. Documented defaults apply until a validation.",
            stacklevel=2,
        )
        return []
    chosen = {round(number) for number in np.linspace(0, len(files) - 1, min(len(files), _MOST_HELD_OUT))}
    found, start = [], 0
    for number, file in enumerate(files):
        image = place.augmented(read_reference(file)).to(place.device)
        end = start + len(tiles_of(place, image))
        if number in chosen:
            output = outputs[number] if outputs else None
            found.append(place.predict(image, place.row(row), range(start, end), output))
        start = end
    return found
