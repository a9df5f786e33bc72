"""The arguments of the memory bank: ranges, and what does not go together."""

from typing import Any

import pytest

from anomalib_aprilgan.network.bank_parts import BankOptions
from anomalib_aprilgan.remembering import Remembering


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"memory_size": 0}, ValueError, "`memory_size` must be at least 1 patches of every stage, got 0"),
        ({"memory_size": 2.0}, TypeError, "`memory_size` must be an int, got 2.0"),
        ({"memory_dtype": "float64"}, ValueError, "`memory_dtype` must be one of float32, float16, got 'float64'"),
        ({"references_unlabelled": "yes"}, TypeError, "`references_unlabelled` must be true or false, got 'yes'"),
        ({"batch_zero_shot": 1}, TypeError, "`batch_zero_shot` must be true or false, got 1"),
        ({"lowest_share": 0.0}, ValueError, r"`lowest_share` must be a share of the references in \(0, 1\], got 0.0"),
        ({"lowest_share": 1.5}, ValueError, r"`lowest_share` must be a share of the references in \(0, 1\], got 1.5"),
        ({"lowest_share": float("nan")}, ValueError, "`lowest_share` must be .*, got nan"),
        ({"contamination": 0.6}, ValueError, r"`contamination` must be .* may be defective, in \[0, 0.5\], got 0.6"),
        ({"contamination": -0.1}, ValueError, "`contamination` must be .*, got -0.1"),
        ({"contamination": None}, TypeError, "`contamination` must be .*, got None"),
    ],
)
def test_ranges(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Remembering(**arguments)


@pytest.mark.parametrize(
    ("arguments", "others", "text"),
    [
        ({"memory_size": 9}, {"few_shot": "texture"}, "`memory_size` is for `few_shot='memory_bank'`, got 'texture'"),
        ({"memory_dtype": "float16"}, {"k_shot": 0}, "`memory_dtype` is about references, and `k_shot` is 0. Set"),
        ({"references_unlabelled": True}, {"k_shot": 0}, "`references_unlabelled` is about references, and `k_shot`"),
        (
            {"references_unlabelled": True},
            {"k_shot": 2},
            "at least 3 for `references_unlabelled`, got 2",
        ),
        ({"batch_zero_shot": True}, {"k_shot": 2}, "`k_shot` must be at least 3 for `batch_zero_shot`, got 2"),
        (
            {"batch_zero_shot": True},
            {"has_references": True},
            "does not go together with `references`",
        ),
        ({"references_unlabelled": True}, {"tile_size": 64}, "does not go together with `tile_size`: patches are"),
        ({"references_unlabelled": True, "memory_size": 9}, {}, "does not go together with `memory_size`"),
        ({"references_unlabelled": True, "batch_zero_shot": True}, {}, "does not go together with `batch_zero_shot`"),
    ],
)
def test_what_does_not_go_together(arguments: dict[str, Any], others: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"few_shot": "memory_bank", "tile_size": None, "k_shot": 4, "has_references": False}
    with pytest.raises(ValueError, match=text):
        Remembering(**arguments).check(**(given | others))


def test_what_goes_together_is_let_through() -> None:
    for asked in (
        Remembering(),
        Remembering(memory_size=9, memory_dtype="float16"),
        Remembering(batch_zero_shot=True, memory_dtype="float16"),
        Remembering(references_unlabelled=True),
    ):
        asked.check("memory_bank", None, 3, has_references=False)
    Remembering().check("texture", 64, 0, has_references=False)


def test_images_under_inspection_are_bounded_where_nothing_is_said() -> None:
    batch = Remembering(batch_zero_shot=True)
    assert [batch.shots(0), batch.shots(5), Remembering().shots(0)] == [64, 5, 0]


def test_the_share_counts_for_unlabelled_references_alone() -> None:
    assert Remembering(lowest_share=0.2).bank_options(3) == BankOptions(seed=3)
    assert Remembering(lowest_share=0.2, references_unlabelled=True).bank_options(0).lowest_share == 0.2
    assert [Remembering().allowed, Remembering(batch_zero_shot=True).allowed] == [0.0, 0.3]
    assert Remembering().settled["lowest_share"] is None
