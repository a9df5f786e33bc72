"""The arguments of the memory bank: how much it keeps, and whether its images may be defective."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import check_bool, check_choice, check_int, check_number, shown
from .network.bank_parts import DTYPES, BankOptions

# Unlabelled images that are compared with each other, at least, and the share of them that may be defective, at most.
LEAST_UNLABELLED, _MOST_CONTAMINATION = 3, 0.5
# Images under inspection that are compared with each other where `k_shot` does not say how many.
_BATCH_SHOTS = 64


@dataclass(frozen=True)
class Remembering:
    """What the user asked for; the arguments are described in ``anomalib_aprilgan.AprilGAN``."""

    memory_size: int | None = None
    memory_dtype: str = "float32"
    references_unlabelled: bool = False
    batch_zero_shot: bool = False
    lowest_share: float = 0.3
    contamination: float = 0.3

    def __post_init__(self) -> None:
        """Raise if arguments are out of range."""
        if self.memory_size is not None:
            check_int("memory_size", self.memory_size, 1, hint=" patches of every stage")
        check_choice("memory_dtype", self.memory_dtype, DTYPES)
        check_bool("references_unlabelled", self.references_unlabelled)
        check_bool("batch_zero_shot", self.batch_zero_shot)
        expected = "a share of the references in (0, 1]"
        if not 0.0 < check_number("lowest_share", self.lowest_share, expected) <= 1.0:
            msg = f"`lowest_share` must be {expected}, got {self.lowest_share}."
            raise ValueError(msg)
        expected = f"the share of the references that may be defective, in [0, {_MOST_CONTAMINATION}]"
        if not 0.0 <= check_number("contamination", self.contamination, expected) <= _MOST_CONTAMINATION:
            msg = f"`contamination` must be {expected}, got {self.contamination}."
            raise ValueError(msg)

    @property
    def is_unlabelled(self) -> bool:
        """Whether images of the memory bank may be defective."""
        return self.references_unlabelled or self.batch_zero_shot

    @property
    def allowed(self) -> float:
        """Share of the references that thresholds take for defective: none of verified ones."""
        return self.contamination if self.is_unlabelled else 0.0

    @property
    def settled(self) -> dict[str, object]:
        """What a memory bank rests on, by argument; ``lowest_share`` is ``None`` where it has no part."""
        return {
            "memory_size": self.memory_size,
            "memory_dtype": self.memory_dtype,
            "references_unlabelled": self.references_unlabelled,
            "batch_zero_shot": self.batch_zero_shot,
            "lowest_share": self.lowest_share if self.is_unlabelled else None,
        }

    def shots(self, k_shot: int) -> int:
        """Number of images to remember, where the user asked for ``k_shot``."""
        return _BATCH_SHOTS if self.batch_zero_shot and k_shot == 0 else k_shot

    def bank_options(self, seed: int) -> BankOptions:
        """How much the memory bank keeps, and how it compares."""
        lowest_share = self.lowest_share if self.is_unlabelled else None
        return BankOptions(self.memory_size, self.memory_dtype, lowest_share, seed)

    def check(self, few_shot: str, tile_size: int | None, k_shot: int, *, has_references: bool) -> None:
        """Raise a ValueError unless these arguments go together with others."""
        asked = {
            "memory_size": self.memory_size is not None,
            "memory_dtype": self.memory_dtype != "float32",
            "references_unlabelled": self.references_unlabelled,
            "batch_zero_shot": self.batch_zero_shot,
        }
        for name in (name for name, is_asked in asked.items() if is_asked):
            if few_shot != "memory_bank":
                msg = f"`{name}` is for `few_shot='memory_bank'`, got {shown(few_shot)}."
                raise ValueError(msg)
            if not k_shot:
                msg = f"`{name}` is about references, and `k_shot` is 0. Set `k_shot` to the number of them to use."
                raise ValueError(msg)
        if self.is_unlabelled:
            self._check_unlabelled(tile_size, k_shot, has_references=has_references)

    def _check_unlabelled(self, tile_size: int | None, k_shot: int, *, has_references: bool) -> None:
        name = "references_unlabelled" if self.references_unlabelled else "batch_zero_shot"
        clashes = {
            "`batch_zero_shot`, which has no references": self.references_unlabelled and self.batch_zero_shot,
            "`memory_size`: patches are compared with whole images": self.memory_size is not None,
            "`tile_size`: patches are compared with whole images": tile_size is not None,
            "`references`: the images under inspection are compared with each other": (
                self.batch_zero_shot and has_references
            ),
        }
        for other in (text for text, is_given in clashes.items() if is_given):
            msg = f"`{name}` does not go together with {other}. Leave one of them out."
            raise ValueError(msg)
        if k_shot < LEAST_UNLABELLED:
            msg = (
                f"`k_shot` must be at least {LEAST_UNLABELLED} for `{name}`, got {k_shot}: among fewer images nothing "
                "tells a defect from what is normal."
            )
            raise ValueError(msg)
