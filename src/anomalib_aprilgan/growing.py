"""Memory banks that grow by what the line has taught: false alarms join, escaped defects tell what they would cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .clip.backbone import VisionOutput
from .data.references import OneClass, content_digests, list_references, read_reference
from .files import is_file
from .network.memory_bank import MemoryBank
from .network.model import AprilGANModel
from .preparation import SETTING_UP, Made, Workplace, attach_clip, encoded, is_ready, recalibrate
from .recipe import Acceptance, RowRecipes
from .settings import Settings


@dataclass(frozen=True)
class Accepted:
    """A good part that was to join a memory bank.

    ``was_known`` says that the bank had it before. Scores are those before and after, 0.5 being the threshold.
    """

    file: str
    was_known: bool
    score_before: float
    score_after: float


@dataclass(frozen=True)
class Rejected:
    """A defect that escaped, and what catching it would take.

    Attributes:
        file: Its path.
        score: Its score, 0.5 being the threshold.
        is_caught: Whether it is anomalous as things are.
        threshold: The highest ``image_threshold`` for ``set_values`` at which it is caught, raw.
        good_parts_flagged: Share of the calibration's held-out good parts that this threshold flags; ``None`` where
            thresholds were not calibrated with such parts.
    """

    file: str
    score: float
    is_caught: bool
    threshold: float
    good_parts_flagged: float | None


class Growing:
    """Mix-in with what grows a model's memory banks, and takes it back."""

    settings: Settings
    made: Made
    model: AprilGANModel

    def accept(self, files: OneClass, class_name: str | None = None) -> list[Accepted]:
        """Have good parts that were flagged join the memory bank of a class, and calibrate its thresholds anew.

        Thresholds are found from the images that they were calibrated with, which must be there; without
        ``calibration`` they stay as they are. Parts that the bank has already change nothing. Either all parts join or,
        after an error, none. ``undo_accept`` takes the last call back.

        Args:
            files: A folder, a file or a list of image files.
            class_name: The class; not needed where there is one.

        Returns:
            An entry for each file.

        Raises:
            FileNotFoundError: A file is missing, or an image that the thresholds were calibrated with.
            ValueError: A file cannot be read, the class is unknown, or the model has no memory bank of verified parts.
        """
        place, row = self._growable(class_name)
        paths = list_references(files, "files")
        images, contents = [read_reference(path, "files") for path in paths], content_digests(paths)
        recipes, before = place.made.rows[row], self._scores(images, row)
        known = {*_contents_of(recipes), *recipes.accepted_contents}
        first = {content: number for number, content in reversed([*enumerate(contents)])}
        new = [number for number, content in enumerate(contents) if content not in known and first[content] == number]
        if new:
            joining = [(str(paths[number]), contents[number], images[number]) for number in new]
            with _all_or_nothing(place, row):
                _join(place, row, joining)
        after = self._scores(images, row) if new else before
        rows = zip(paths, range(len(paths)), before, after, strict=True)
        return [Accepted(str(path), number not in new, *scores) for path, number, *scores in rows]

    def undo_accept(self, class_name: str | None = None) -> Acceptance:
        """Take the last ``accept`` back, of a class or of all: every buffer is bit by bit what it was before.

        Raises:
            ValueError: Nothing was accepted, or the class is unknown.
        """
        rows = range(len(self.made.rows)) if class_name is None else [self._row_of(class_name)]
        accepted = [(self.made.rows[row].accepted[-1].when, row) for row in rows if self.made.rows[row].accepted]
        bank = self.model.few_shot
        if not accepted or not isinstance(bank, MemoryBank):
            of_class = "" if class_name is None else f" for {class_name!r}"
            msg = f"`undo_accept`: nothing was accepted{of_class}, so that there is nothing to take back."
            raise ValueError(msg)
        row = max(accepted)[1]
        recipes = self.made.rows[row]
        if recipes.accepted[-1].parts > len(bank.accepted(row)):
            msg = (
                "`undo_accept`: the history tells of more parts than the memory bank holds; the checkpoint is damaged."
            )
            raise ValueError(msg)
        acceptance = recipes.accepted.pop()
        bank.drop_accepted(row, acceptance.parts)
        place = Workplace.of(self, None)
        _restore_values(place, row, acceptance.values)
        earlier = RowRecipes.from_dict(acceptance.recipes)
        recipes.bounds, recipes.calibration = earlier.bounds, earlier.calibration
        return acceptance

    def reject(self, files: OneClass, class_name: str | None = None) -> list[Rejected]:
        """Tell at which threshold escaped defects would have been caught, and how many good parts it would flag.

        Nothing changes: ``model.post_processor.of_class(class_name).set_values(image_threshold=...)`` sets it.

        Args:
            files: A folder, a file or a list of image files.
            class_name: The class; not needed where there is one.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file cannot be read, or the class is unknown.
        """
        place, row = self._inspectable(class_name)
        post_processor = place.post_processor
        if post_processor is None:
            msg = "`reject` is about the thresholds of an AprilGANPostProcessor, and the model has another one."
            raise ValueError(msg)
        good = post_processor.of_class(row).good_parts()[0].cpu().numpy()
        found = []
        for path in list_references(files, "files"):
            score, label, raw = self._judged(read_reference(path, "files"), row)
            threshold = np.nextafter(np.float32(raw), np.float32(-np.inf))
            share = float((good > threshold).mean()) if len(good) else None
            found.append(Rejected(str(path), score, label, float(threshold), share))
        return found

    def _inspectable(self, class_name: str | None) -> tuple[Workplace, int]:
        """What a ready model works with, and the row of a class."""
        module: Any = self
        with SETTING_UP:
            attach_clip(self.settings, self.made, self.model, module.device)
        if not is_ready(self.settings, self.made, self.model):
            module.make_ready("predict", is_named=True)
        module.to(module.device)
        return Workplace.of(self, None), self._row_of(class_name)

    def _row_of(self, class_name: str | None) -> int:
        """Row of a class, or of the one that images are of which tell none; a ValueError where there is no such."""
        classes = self.made.classes
        if class_name is None:
            return int(classes.rows_for(None, 1, torch.device("cpu"))[0])
        if class_name not in classes.names:
            msg = f"`class_name` must be one of {', '.join(classes.names)}, got {class_name!r}."
            raise ValueError(msg)
        return classes.names.index(class_name)

    def _growable(self, class_name: str | None) -> tuple[Workplace, int]:
        settings = self.settings
        if not settings.k_shot or settings.remembering.is_unlabelled:
            kind = "unlabelled images" if settings.remembering.is_unlabelled else "no references (`k_shot` is 0)"
            msg = f"`accept` adds to a memory bank of verified good parts, and this model compares with {kind}."
            raise ValueError(msg)
        place, row = self._inspectable(class_name)
        if not isinstance(self.model.few_shot, MemoryBank):
            msg = f"`accept` is for `few_shot='memory_bank'`, and the model has {settings.few_shot!r}."
            raise ValueError(msg)
        return place, row

    def _scores(self, images: Sequence[Tensor], row: int) -> list[float]:
        return [self._judged(image, row)[0] for image in images]

    @torch.no_grad()
    def _judged(self, image: Tensor, row: int) -> tuple[float, bool, float]:
        """Score, decision and raw score of an image ``(1, 3, H, W)``."""
        module: Any = self
        predict: Callable[..., Any] = module.predict
        place = Workplace.of(self, None)
        rows, raw = place.row(row), predict(image.to(place.device), place.row(row))
        statistic = place.fusion.statistic(raw.anomaly_map)
        post_processor = place.post_processor
        if post_processor is None:
            score = place.fusion(raw.text_probability, statistic, rows).item()
            return score, score > 0.5, score
        used = statistic if post_processor.fuse_map_maximum else None
        scores, labels = post_processor.decide_scores(raw.text_probability, used, rows)
        fused = post_processor.fused(raw.text_probability, used, rows)
        return scores.item(), bool(labels) if labels is not None else scores.item() > 0.5, fused.item()


@torch.no_grad()
def _join(place: Workplace, row: int, parts: Sequence[tuple[str, str, Tensor]]) -> None:
    """Add good parts, each a path, a digest of its content and an image, to the bank of a class, and write it down."""
    recipes, bank, number = place.made.rows[row], place.network.few_shot, 0
    held = _values_of(place, row)
    earlier = {"bounds": recipes.bounds, "calibration": recipes.calibration}
    for together, outputs in encoded(place, [image for _, _, image in parts], row):
        number += len(together)
        if isinstance(bank, MemoryBank):
            bank.accept(row, together, VisionOutput.cat(outputs))
    changed: dict[str, list[float]] = {}
    recipes.accepted.append(
        Acceptance(
            when=datetime.now(UTC).isoformat(),
            files=[file for file, _, _ in parts],
            contents=[content for _, content, _ in parts],
            parts=number,
            values=changed,
            recipes={name: None if recipe is None else asdict(recipe) for name, recipe in earlier.items()},
        )
    )
    recalibrate(place, row)
    now = _values_of(place, row)
    changed |= {name: value for name, value in held.items() if value != now[name]}


def _contents_of(recipes: RowRecipes) -> Sequence[str]:
    """Digests of the references; where an earlier version did not note them, of those that are still there."""
    return recipes.contents or content_digests([Path(file) for file in recipes.references if is_file(Path(file))])


@contextmanager
def _all_or_nothing(place: Workplace, row: int) -> Iterator[None]:
    """Leave a class as it was where the block ends with an error."""
    bank, recipes = place.network.few_shot, place.made.rows[row]
    held = _values_of(place, row)
    before = recipes.bounds, recipes.calibration, list(recipes.accepted)
    length = len(bank.accepted(row)) if isinstance(bank, MemoryBank) else 0
    try:
        yield
    except BaseException:
        recipes.bounds, recipes.calibration, recipes.accepted = before
        if isinstance(bank, MemoryBank):
            bank.drop_accepted(row, len(bank.accepted(row)) - length)
        _restore_values(place, row, held)
        raise


def _values_of(place: Workplace, row: int) -> dict[str, list[float]]:
    """What is calibrated of a class, by name; numbers as they are, so that nothing is lost."""
    post_processor = place.post_processor
    if post_processor is None:
        return {"low": [place.fusion.low[row].item()], "high": [place.fusion.high[row].item()]}
    values = post_processor.of_class(row)
    scores, appearances = values.good_parts()
    return {
        **{name: [value] for name, value in values.values().items()},
        "fixed": [float(post_processor.fixed[row])],
        "scores": scores.tolist(),
        "appearances": appearances.flatten().tolist(),
        "width": [float(appearances.shape[1])],
    }


def _restore_values(place: Workplace, row: int, held: Mapping[str, list[float]]) -> None:
    """Set what ``_values_of`` returned of a class, or a part of it."""
    post_processor, given = place.post_processor, dict(held)
    if post_processor is None:
        place.fusion.low[row], place.fusion.high[row] = given["low"][0], given["high"][0]
        return
    values = post_processor.of_class(row)
    scores, appearances = values.good_parts()
    scores = torch.tensor(given.pop("scores")) if "scores" in given else scores
    (width,) = given.pop("width", [float(appearances.shape[1])])
    if "appearances" in given:
        flat = torch.tensor(given.pop("appearances"))
        appearances = flat.view(-1, int(width)) if len(flat) else torch.empty(0, 0)
    fixed = given.pop("fixed", [float(post_processor.fixed[row])])
    values.take({name: value for name, (value,) in given.items()})
    values.set_good_parts(scores, appearances)
    post_processor.fixed[row] = bool(fixed[0])
