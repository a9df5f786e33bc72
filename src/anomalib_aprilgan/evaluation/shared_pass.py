"""Many settings of APRIL-GAN from one pass over the test images: every number of references, every draw of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback
from torch import Tensor

from ..building import build_scorer
from ..clip.backbone import VisionOutput
from ..data.pre_processing import prepared
from ..data.references import References, ReferenceSource, read_reference, references_of_class
from ..decision.fusion import ScoreFusion, map_statistic
from ..lightning_model import AprilGAN
from ..network.memory_bank import MemoryBank
from ..results.table import DecisionsWriter
from ..running import datamodule_of, plain_images
from .collecting import Collection
from .cost import measure_cost
from .many_banks import predict_banks


class Setting(NamedTuple):
    """Number of references, 0 for zero-shot, and the seed of their draw."""

    k_shot: int
    seed: int


class SharedPass(AprilGAN):
    """Tests several settings at once: CLIP sees every test image and every reference once.

    The tokens of a batch feed the zero-shot map and the memory bank of every setting, and are then forgotten. The
    few-shot scores are fused as published, with the bounds of the map statistic over the test images. Scores and
    maps are those of ``AprilGAN`` with these settings one by one, raw.

    Args:
        shots: Numbers of references and seeds.
        references: Folder or list of reference images; else drawn from the datamodule's training images.
        arguments: The others of ``AprilGAN``, without ``k_shot`` and ``seed``; of one class and without tiles.
    """

    def __init__(
        self,
        shots: Sequence[Setting],
        references: References | None = None,
        **arguments: Any,  # noqa: ANN401  # those of AprilGAN
    ) -> None:
        super().__init__(**arguments, post_processor=False, evaluator=False, visualizer=False)
        self.shots = tuple(Setting(*setting) for setting in shots)
        # Takes the maps. No argument: Lightning would copy it as a hyperparameter.
        self.collection: Collection | None = None
        self.files_of_banks: list[list[str]] = []
        self._given = references
        bank = build_scorer(self.settings, self.pre_processor)
        if not isinstance(bank, MemoryBank):
            msg = f"`few_shot={self.settings.few_shot!r}` has no memory bank whose references could be shared."
            raise TypeError(msg)
        self._bank = bank
        self.model.few_shot = self._bank  # taps its stages
        self._banks: list[list[int]] = []
        self._text: list[Tensor] = []
        self._statistics: list[list[Tensor]] = [[] for _ in self.shots]
        self.costs: dict[int, tuple[float, float]] = {}
        self._first: Tensor | None = None

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Those of the model without its table of decisions: raw scores have no threshold."""
        callbacks = super().configure_callbacks()
        given = [callbacks] if isinstance(callbacks, Callback) else callbacks
        return [callback for callback in given if not isinstance(callback, DecisionsWriter)]

    def on_test_start(self) -> None:
        """Encode the class and all references."""
        super().on_test_start()
        drawn = [self._source(setting).draw() if setting.k_shot else [] for setting in self.shots]
        files = sorted({file for draw in drawn for file in draw})
        place = {file: number for number, file in enumerate(files)}
        self._banks = [[place[file] for file in draw] for draw in drawn]
        self.files_of_banks = [[str(file) for file in draw] for draw in drawn]
        if files:
            images = torch.cat([self._prepared(file) for file in files])
            outputs = [self.model.encode(image) for image in torch.split(images, 1)]
            self._bank.fill(0, images, VisionOutput.cat(outputs))

    def _source(self, setting: Setting) -> ReferenceSource:
        (name,) = self.classes.names
        given = None if self._given is None else references_of_class(self._given, name, [name])
        return ReferenceSource(*setting, given, datamodule_of(self))

    def _prepared(self, file: Path) -> Tensor:
        return prepared(self.pre_processor, read_reference(file).to(self.device))

    def test_step(self, batch: ImageBatch) -> None:  # type: ignore[override]  # as the model's own
        """Maps of every setting, handed on; nothing is kept but a few numbers per image."""
        if self.collection is None:
            msg = "`collection` takes the maps and is not set: set it before the test."
            raise RuntimeError(msg)
        images = plain_images(batch)
        if self._first is None:
            self._first = images[:1].clone()
        text, maps = predict_banks(self.model, self._bank, images, self._banks)
        self._text.append(text.float().cpu())
        self.collection.add(batch, self._noted(maps))

    def _noted(self, maps: Iterator[Tensor]) -> Iterator[Tensor]:
        for statistics, anomaly_map in zip(self._statistics, maps, strict=True):
            statistics.append(map_statistic(anomaly_map, self.settings.top_share).float().cpu())
            yield anomaly_map

    def on_test_end(self) -> None:
        """Measure what one image costs with each number of references, as a model with these alone takes it."""
        super().on_test_end()
        everything = {file for bank in self._banks for file in bank}
        for setting, bank in zip(self.shots, self._banks, strict=True):
            if setting.k_shot not in self.costs and self._first is not None:
                run = partial(self.model.predict, self._first, without=everything - set(bank), few_shot=bool(bank))
                context = self.trainer.precision_plugin.forward_context()
                self.costs[setting.k_shot] = measure_cost(run, self.device, context)

    def scores(self) -> list[Tensor]:
        """After the test, for every setting the scores ``(N,)`` of all images."""
        text, fusion = torch.cat(self._text), ScoreFusion(self.settings.score_fusion, self.settings.top_share)
        return [
            fused_over_test_set(fusion, text, torch.cat(statistics)) if setting.k_shot else text
            for setting, statistics in zip(self.shots, self._statistics, strict=True)
        ]


def fused_over_test_set(fusion: ScoreFusion, text_probability: Tensor, statistic: Tensor) -> Tensor:
    """Few-shot scores as published: the bounds of the map statistic are those over the test images.

    Args:
        fusion: Its bounds are replaced.
        text_probability: ``(N,)`` of all test images.
        statistic: ``(N,)``, raw.

    Returns:
        ``(N,)`` in ``[0, 1]``.
    """
    fusion.low, fusion.high = statistic.min()[None], statistic.max()[None]
    fused: Tensor = fusion(text_probability, statistic)
    return fused
