"""Many settings of APRIL-GAN from one pass over the test images: every number of references, every draw of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback
from torch import Tensor

from ..data.references import ReferenceSource, read_reference, references_of_class
from ..lightning_model import AprilGAN
from ..network.memory_bank import MemoryBank
from ..network.scoring import fused_score, map_statistic
from ..results.table import DecisionsWriter
from .collecting import Collection


class Setting(NamedTuple):
    """Number of references, 0 for zero-shot, and the seed of their draw."""

    k_shot: int
    seed: int


class SharedPass(AprilGAN):
    """Tests several settings at once: CLIP sees every test image and every reference once.

    The tokens of a batch feed the zero-shot map and the memory bank of every setting, and are then forgotten. The
    few-shot scores are fused as published, with the bounds of the map statistic over the test images. Scores and
    maps are those of :class:`AprilGAN` with these settings one by one, raw.

    Args:
        settings: Numbers of references and seeds.
        arguments: Those of :class:`AprilGAN`, without ``k_shot`` and ``seed``; of one class and without tiles.
    """

    def __init__(
        self,
        settings: Sequence[Setting],
        **arguments: Any,  # noqa: ANN401  # those of AprilGAN
    ) -> None:
        super().__init__(**arguments, post_processor=False, evaluator=False, visualizer=False)
        self.settings = tuple(Setting(*setting) for setting in settings)
        # Takes the maps. No argument: Lightning would copy it as a hyperparameter.
        self.collection: Collection | None = None
        self.files_of_banks: list[list[str]] = []
        self._references = MemoryBank()
        self._banks: list[list[int]] = []
        self._text: list[Tensor] = []
        self._statistics: list[list[Tensor]] = [[] for _ in self.settings]

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Those of the model without its table of decisions: raw scores have no threshold."""
        callbacks = cast("Sequence[Callback]", super().configure_callbacks())
        return [callback for callback in callbacks if not isinstance(callback, DecisionsWriter)]

    def on_test_start(self) -> None:
        """Encode the class and all references."""
        super().on_test_start()
        with torch.inference_mode(mode=False), torch.no_grad():
            self._remember()

    def _remember(self) -> None:
        drawn = [self._source(setting).draw() if setting.k_shot else [] for setting in self.settings]
        files = sorted({file for draw in drawn for file in draw})
        place = {file: number for number, file in enumerate(files)}
        self._banks = [[place[file] for file in draw] for draw in drawn]
        self.files_of_banks = [[str(file) for file in draw] for draw in drawn]
        if files:
            tokens = [self.model.memory_tokens(self._prepared(file)) for file in files]
            self._references.fill([torch.cat(stage) for stage in zip(*tokens, strict=True)])

    def _source(self, setting: Setting) -> ReferenceSource:
        (name,) = self.model.class_names
        given = self.preparation.references
        given = None if given is None else references_of_class(given, name, [name])
        return ReferenceSource(*setting, given, self._datamodule)

    def _prepared(self, file: Path) -> Tensor:
        image = read_reference(file).to(self._target_device)
        return cast("Tensor", self.pre_processor(image) if self.pre_processor else image)

    def test_step(self, batch: ImageBatch) -> None:  # type: ignore[override]  # as the model's own
        """Maps of every setting, handed on; nothing is kept but a few numbers per image."""
        images = cast("Tensor", batch.image).as_subclass(Tensor)
        text, maps = self.model.infer_banks(images, self._references, self._banks)
        self._text.append(text.float().cpu())
        if self.collection is None:
            msg = "`collection` takes the maps and is not set: set it before the test."
            raise RuntimeError(msg)
        self.collection.add(batch, self._noted(maps))

    def _noted(self, maps: Iterator[Tensor]) -> Iterator[Tensor]:
        for statistics, anomaly_map in zip(self._statistics, maps, strict=True):
            statistics.append(map_statistic(anomaly_map, self.preparation.top_share).float().cpu())
            yield anomaly_map

    def scores(self) -> list[Tensor]:
        """After the test, for every setting the scores ``(N,)`` of all images."""
        text = torch.cat(self._text)
        return [
            self._fused(text, torch.cat(statistics)) if setting.k_shot else text
            for setting, statistics in zip(self.settings, self._statistics, strict=True)
        ]

    @staticmethod
    def _fused(text: Tensor, statistics: Tensor) -> Tensor:
        return fused_score(text, statistics, statistics.min(), statistics.max())
