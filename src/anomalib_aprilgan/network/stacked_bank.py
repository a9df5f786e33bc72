"""Memory banks of several classes in one tensor, among which a graph can choose."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clip.backbone import VisionOutput
from .bank_parts import Part
from .few_shot import Comparison, FewShotScorer
from .memory_bank import MemoryBank


def for_graph(scorer: FewShotScorer) -> FewShotScorer:
    """What an exported graph compares with, by rows that are known only when it runs.

    A ValueError where there are several classes and the scorer is no memory bank.
    """
    if len(scorer.remembered) == 1:
        return scorer
    if isinstance(scorer, MemoryBank):
        return StackedBank(scorer)
    msg = f"`class_index`: {type(scorer).__name__} cannot choose among classes in a graph. Export them one by one."
    raise ValueError(msg)


class StackedBank(FewShotScorer):
    """The memory banks of several classes side by side, of which a graph chooses by row.

    A class with fewer parts than another has its first one several times, which changes no distance.
    """

    def __init__(self, bank: MemoryBank) -> None:
        super().__init__()
        self.bank = copy.copy(bank)
        vars(self.bank)["_modules"] = vars(bank)["_modules"] | {"remembered": nn.ModuleList()}
        self.stages, self.map_limit, self.map_ceiling = bank.stages, bank.map_limit, bank.map_ceiling
        rows = range(len(bank.remembered))
        references = [bank.parts_of(row) for row in rows]
        if bank.options.lowest_share is not None and len({len(parts[0]) for parts in references}) > 1:
            msg = "`class_index`: unlabelled references of all classes must be as many, to be in one graph."
            raise ValueError(msg)
        self._stack("references", references)
        self.has_accepted = any(len(bank.accepted(row)) for row in rows)
        if self.has_accepted:  # where a class has none, nothing is nearer than its references
            self._stack("accepted", [bank.accepted_parts_of(row) or bank.parts_of(row) for row in rows])

    def _stack(self, name: str, of_rows: Sequence[Sequence[Sequence[Part]]]) -> None:
        """Keep ``(N, P, L, C)`` of every stage: ``P`` parts of each of ``N`` classes."""
        for stage in range(len(self.bank.shapes)):
            parts = [torch.stack([part.tokens for part in of_row[stage]]) for of_row in of_rows]
            if len({of_row.shape[1:] for of_row in parts}) > 1:
                msg = "`class_index`: the memory banks of all classes must be of one kind, to be in one graph."
                raise ValueError(msg)
            most = max(map(len, parts))
            padded = [torch.cat([of_row, of_row[:1].expand(most - len(of_row), -1, -1)]) for of_row in parts]
            self.register_buffer(f"{name}_{stage}", torch.stack(padded))

    def fill(self, row: int, images: Tensor, output: VisionOutput) -> None:
        """A RuntimeError: what a graph remembers is fixed."""
        del row, images, output
        msg = "What a graph remembers is fixed: fill the memory bank that it is made of."
        raise RuntimeError(msg)

    def distance_maps(
        self, images: Tensor, output: VisionOutput, rows: Tensor | None, without: Collection[int] = ()
    ) -> Tensor:
        """See the base class."""
        return self.compare(images, output, rows, without).nearest

    def compare(
        self, images: Tensor, output: VisionOutput, rows: Tensor | None, without: Collection[int] = ()
    ) -> Comparison:
        """See the base class; nothing can be held out."""
        if rows is None or without:
            msg = "A graph needs `rows`, and holds nothing out."
            raise ValueError(msg)
        size, tokens = (images.shape[-2], images.shape[-1]), self.bank.tokens_of(images, output)
        accepted = self._parts("accepted", rows) if self.has_accepted else []
        return self.bank.compare_with(tokens, self._parts("references", rows), accepted, size)

    def _parts(self, name: str, rows: Tensor) -> list[list[Tensor]]:
        """For every stage the parts ``(B, L, C)`` of the class of each image, in fp32."""
        stacks = [self.get_buffer(f"{name}_{stage}") for stage in range(len(self.bank.shapes))]
        chosen = [stack.index_select(0, rows).unbind(dim=1) for stack in stacks]
        return [
            [part if part.dtype == torch.float32 else F.normalize(part.float(), dim=-1) for part in stage]
            for stage in chosen
        ]
