"""CLIP, adapters, text features and memory banks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..classes import Classes, classes_of_files
from ..clip.backbone import VisionOutput, load_clip
from ..clip.hub import is_on_hub
from ..clip.prompts import ALIASES
from ..clip.vision_tower import load_tower
from ..data.listing import class_name_of
from ..data.pre_processing import describe, prepared
from ..data.reading import UnreadableImageError
from ..data.references import (
    ReferenceSource,
    content_digests,
    draw_references,
    read_reference,
    references_of_class,
)
from ..inspection import check_frame, masks_of_tiles
from ..network.few_shot import FewShotScorer
from ..network.memory_bank import VisionMemoryBank
from ..network.model import AprilGANModel
from ..network.roi import within
from ..provenance import check_shapes, digest_of_adapters, load_resolved_adapters, resolve_adapters
from ..recipe import Recipe, RowRecipes, digest
from ..remembering import LEAST_UNLABELLED, Remembering
from ..settings import Settings
from .workplace import Made, Workplace, tiles_of

logger = logging.getLogger(__name__)

# Of the one class that nothing tells.
_OBJECT = "object"
# References that go through CLIP before any of them is forgotten, at most.
_ENCODED_TOGETHER = 16


def attach_clip(settings: Settings, made: Made, network: AprilGANModel, device: torch.device) -> None:
    """Give the network its CLIP; a ValueError where it is not that of the checkpoint that was loaded."""
    _attach_tower(settings, made, network, device)
    if network.has_backbone:
        return
    backbone = load_clip(settings.architecture, settings.pretrained)
    if made.clip is not None and not backbone.matches(made.clip):
        msg = (
            f"`pretrained`: the checkpoint belongs to a CLIP with weights {made.clip}, "
            f"{settings.pretrained} has weights {backbone.digest}."
        )
        raise ValueError(msg)
    network.attach_backbone(backbone.to(device))


def _attach_tower(settings: Settings, made: Made, network: AprilGANModel, device: torch.device) -> None:
    """Give the memory bank its vision tower, where it has one; a ValueError where it is not that of the checkpoint."""
    bank, architecture = network.few_shot, settings.memory_tower
    if architecture is None or not isinstance(bank, VisionMemoryBank):
        return
    tower = bank.tower or load_tower(architecture, settings.memory_pretrained)
    if made.memory_tower not in {None, tower.digest}:
        msg = (
            f"`memory_pretrained`: the checkpoint's memory bank was made with weights {made.memory_tower}, "
            f"{settings.memory_pretrained or architecture.name} has weights {tower.digest}."
        )
        raise ValueError(msg)
    made.memory_tower = tower.digest
    if bank.tower is None:
        bank.attach_tower(tower.to(device))


def load_adapters(place: Workplace) -> None:
    """Given adapters, unless a checkpoint brought its own; ``"auto"`` looks at the data set."""
    settings, made, network = place.settings, place.made, place.network
    if settings.adapters is None or made.has_trained:
        return
    if place.datamodule is None and made.adapters is not None:
        return  # a plain folder goes on with what "auto" chose before
    if is_on_hub(settings.adapters) and made.adapters is not None:
        return  # its branch may have moved since
    source = resolve_adapters(settings.adapters, place.datamodule, settings.architecture)
    wanted = Recipe.of(file=digest_of_adapters(source))
    if made.adapters == wanted:
        return
    state_dict, provenance = load_resolved_adapters(source)
    provenance.check(network.backbone, settings.stages, source)
    check_shapes(state_dict, network.adapters.state_dict(), source)
    network.adapters.load_state_dict(state_dict)
    made.provenance, made.adapters = provenance, wanted
    logger.info("Adapters: %s, trained on %s", source, provenance.trained_on or "unknown data")


def wanted_classes(place: Workplace, *, single: bool) -> Classes:
    """The classes at hand: the user's, else the datamodule's, else those known before.

    There is a single one where the images to come do not tell their class (prediction, export).
    """
    settings, known = place.settings, place.made.classes

    def words_for(name: str) -> str:
        return ALIASES.get(name, name) if settings.class_aliases else name

    if settings.words is not None:
        words = {name: words_for(name) if name == given else given for name, given in settings.words.items()}
        return Classes.of(words, settings.default_class)
    several: Sequence[str] = getattr(place.datamodule, "class_names", None) or ()
    if several and not single:
        return Classes.of({name: words_for(name) for name in several})
    name = _OBJECT if several or place.datamodule is None else class_name_of(place.datamodule)
    if name == _OBJECT and (len(known) == 1 or (len(known) and not single)):
        return known  # encoded or restored before
    return Classes.of({name: words_for(name)})


def set_classes(place: Workplace, wanted: Classes) -> None:
    """Rows for these classes, and their text features; the text tower runs for new sentences only."""
    made, network = place.made, place.network
    kept = made.classes.kept_in(wanted)
    rows, features = [], []
    for name, words, source in zip(wanted.names, wanted.words, kept, strict=True):
        normal, anomalous = place.settings.prompts.of_class(name).sentences(words)
        recipe = Recipe.of(clip=clip_recipe(place), normal=normal, anomalous=anomalous)
        row = RowRecipes() if source is None else made.rows[source]
        if source is not None and row.text is not None and row.text.agrees(recipe):
            features.append(network.text_features[source])
        else:
            features.append(network.backbone.encode_states(normal, anomalous))
        row.text = recipe
        rows.append(row)
    if wanted != made.classes:
        logger.info("Class names in the prompts: %s", ", ".join(wanted.words))
    network.set_rows(torch.stack(features), kept)
    place.own_fusion.set_rows(kept, network.map_limit)
    if place.post_processor is not None:
        place.post_processor.set_rows(wanted, kept, network.map_limit, network.map_ceiling)
    made.classes, made.rows = wanted, rows


def fill_memory_bank(place: Workplace, row: int) -> list[VisionOutput]:
    """Remember the references of a class, unless they are already; returns CLIP's output of those new and untiled.

    Raises:
        FileNotFoundError: A reference is missing.
        ValueError: The class has no references, too few, or an unreadable one.
    """
    recipes, scorer = place.made.rows[row], place.network.few_shot
    if scorer is None or not place.settings.k_shot:
        return []
    if place.settings.remembering.batch_zero_shot:
        return _fill_from_batch(place, row, scorer)
    name, source = place.made.classes.names[row], _reference_source(place, row)
    settled = _bank_recipe(place, row)
    remembered = recipes.bank is not None and recipes.bank.agrees(settled, "references", "preparing", "augmentations")
    asked = f"{source.name} {source.k_shot} {source.seed}" if source.is_available else ""
    if not source.is_available:
        if remembered and scorer.number(row):
            return []
        msg = (
            f"`k_shot={place.settings.k_shot}` needs normal images of {name!r}: pass `references`, or a datamodule "
            "with training images."
        )
        raise ValueError(msg)
    try:
        files = source.draw()
    except (FileNotFoundError, ValueError):
        if remembered and scorer.number(row) and asked == recipes.asked:
            return []  # those of a checkpoint, whose images may be gone
        raise
    contents = content_digests(files)
    wanted = _bank_recipe(place, row, contents)
    outputs: list[VisionOutput] = []
    if recipes.bank is None or not scorer.number(row) or not recipes.bank.agrees(wanted):
        outputs = _remember(place, row, (read_reference(file) for file in files))
        if recipes.bounds is not None and not recipes.bounds.ingredients:
            recipes.bounds = None  # of a checkpoint of 0.1.0, which does not tell what they rest on
    recipes.bank, recipes.asked = wanted, asked
    recipes.references, recipes.contents = [str(file) for file in files], list(contents)
    logger.info("References of %s: %s", name, ", ".join(recipes.references))
    return outputs


def encoded(place: Workplace, images: Iterable[Tensor], row: int) -> Iterator[tuple[Tensor, list[VisionOutput]]]:
    """Normal images ``(1, 3, H, W)`` of a class, or their tiles, some at a time, as the network sees them, encoded."""
    side_by_side = _ENCODED_TOGETHER if place.settings.tile_size is None else 1
    given = (_as_seen(place, place.augmented(image), row) for image in images)
    while group := list(islice(given, side_by_side)):
        together = torch.cat(group)
        yield together, [place.network.encode(image) for image in torch.split(together, 1)]


def _as_seen(place: Workplace, image: Tensor, row: int) -> Tensor:
    """A normal image ``(1, 3, H, W)``, or its tiles, resized, normalised, and within its region of interest."""
    ready, roi = prepared(place.pre_processor, tiles_of(place, image)), place.network.roi
    if roi is None or (inside := roi.inside(row)) is None:
        return ready
    check_frame(roi, row, (image.shape[-2], image.shape[-1]), "a normal image")
    tiled = place.settings.tile_size is not None
    return within(ready, masks_of_tiles(tiles_of(place, inside[None, None])[:, 0], ready) if tiled else inside[None])


def _remember(place: Workplace, row: int, images: Iterable[Tensor]) -> list[VisionOutput]:
    """Fill the bank of a class; returns CLIP's output where the images are few and untiled, else nothing."""
    scorer = place.network.few_shot
    if scorer is None:
        return []
    fill, outputs, number = scorer.fill, list[VisionOutput](), 0
    with scorer.unchanged_on_error(row):
        for together, of_group in encoded(place, images, row):
            fill(row, together, VisionOutput.cat(of_group))
            fill, number = scorer.add, number + len(of_group)
            outputs = [*outputs, *of_group] if number <= _ENCODED_TOGETHER else []
        scorer.condense(row)
    return outputs if place.settings.tile_size is None else []


def _fill_from_batch(place: Workplace, row: int, scorer: FewShotScorer) -> list[VisionOutput]:
    """Remember the images under inspection that are of a class; a ValueError where they are none or too few."""
    settings, classes, recipes = place.settings, place.made.classes, place.made.rows[row]
    name = None if place.datamodule is None else class_name_of(place.datamodule)
    found = classes_of_files(classes, [file.path for file in place.data.files], name, place.data.root)
    named = [file.class_name or told for file, told in zip(place.data.files, found, strict=True)]
    rows = classes.rows(named) if len(classes) > 1 else [0] * len(named)
    paths = sorted(Path(file.path) for file, own in zip(place.data.files, rows, strict=True) if own == row)
    if not paths:
        return []
    drawn = draw_references(paths, min(settings.k_shot, len(paths)), settings.seed, "the data")
    asked = digest(" ".join(content_digests(drawn)).encode())
    wanted = _bank_recipe(place, row)
    if scorer.number(row) and asked == recipes.asked and recipes.bank is not None and recipes.bank.agrees(wanted):
        return []
    readable: list[Path] = []
    with scorer.unchanged_on_error(row):
        outputs = _remember(place, row, _readable(drawn, readable))
        if len(readable) < LEAST_UNLABELLED:
            msg = (
                f"`batch_zero_shot` compares the images of {classes.names[row]!r} with each other, and needs at least "
                f"{LEAST_UNLABELLED} that can be read; got {len(readable)}."
            )
            raise ValueError(msg)
    recipes.bank, recipes.asked, recipes.references = wanted, asked, [str(file) for file in readable]
    return outputs


def _readable(files: Sequence[Path], readable: list[Path]) -> Iterator[Tensor]:
    """The images that can be read; their files are added to ``readable``."""
    for file in files:
        with suppress(UnreadableImageError):  # reported where the image itself is inspected
            image = read_reference(file)
            readable.append(file)
            yield image


def clip_recipe(place: Workplace) -> Recipe:
    """What everything that CLIP encodes rests on."""
    architecture = place.settings.architecture
    return Recipe.of(weights=place.network.backbone.digest, quick_gelu=architecture.quick_gelu)


def _bank_recipe(place: Workplace, row: int, references: Sequence[str] = ()) -> Recipe:
    settings, tower, roi = place.settings, place.settings.memory_tower, place.made.rows[row].roi
    settled = settings.remembering.settled
    of_tower = {} if tower is None else {"tower": [tower.name, tower.image_size, place.made.memory_tower]}
    return Recipe.of(
        **of_tower,
        clip=clip_recipe(place),
        image_size=settings.architecture.image_size,
        scorer=[settings.few_shot, settings.memory_stages, settings.neighbourhood],
        tile_size=settings.tile_size,
        preparing=[describe(place.pre_processor), place.precision],
        augmentations=None if place.data.augmentations is None else str(place.data.augmentations),
        references=references,
        number=settings.k_shot,
        **({} if settled == Remembering().settled else {"remembering": settled}),
        **({} if roi is None else {"roi": roi}),
    )


def _reference_source(place: Workplace, row: int) -> ReferenceSource:
    """Where the references of a class come from."""
    settings, classes, datamodule = place.settings, place.made.classes, place.datamodule
    name = classes.names[row]
    if settings.references is not None:
        given = references_of_class(settings.references, name, classes.names)
        return ReferenceSource(settings.k_shot, settings.seed, given, datamodule)
    tells: Any = getattr(datamodule, "class_names", None)
    told = tells or ([] if datamodule is None else [class_name_of(datamodule)])
    own = name in told or (len(classes) == 1 and not tells)
    of_class = name if tells and name in tells else None
    return ReferenceSource(settings.k_shot, settings.seed, None, datamodule if own else None, of_class)
