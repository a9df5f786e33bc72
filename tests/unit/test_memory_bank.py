"""The memory bank: what it keeps, holds out, forgets, and that it travels in the state dict."""

import pytest
import torch
from torch import Tensor

from anomalib_aprilgan.network.memory_bank import MemoryBank


def tokens(stages: int = 2, shots: int = 3, patches: int = 4, width: int = 5, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [7 * torch.randn(shots, patches, width, generator=generator) for _ in range(stages)]


def filled(**shape: int) -> MemoryBank:
    bank = MemoryBank()
    bank.fill(tokens(**shape))
    return bank


def test_rows_keep_their_directions_at_unit_length() -> None:
    bank = MemoryBank()
    bank.fill([torch.tensor([[[3.0, 4.0], [0.0, -2.0]]])])
    torch.testing.assert_close(bank.tokens, torch.tensor([[[[0.6, 0.8], [0.0, -1.0]]]]))
    assert bank.k_shot == 1


def test_stages_come_image_by_image() -> None:
    given = tokens()
    remembered = filled().stages()
    assert [len(stage) for stage in remembered] == [3, 3]
    for stage, images in zip(given, remembered, strict=True):
        for raw, kept in zip(stage, images, strict=True):
            for patch, row in zip(raw, kept, strict=True):
                torch.testing.assert_close(row, patch / patch.norm())


@pytest.mark.parametrize("without", [{0}, {1}, {2}, {0, 2}])
def test_holding_some_out(without: set[int]) -> None:
    bank = filled()
    everything, rest = bank.stages(), bank.stages(without=without)
    for stage, kept in zip(everything, rest, strict=True):
        expected = [image for shot, image in enumerate(stage) if shot not in without]
        assert len(kept) == 3 - len(without)
        assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


def test_filling_again_forgets() -> None:
    bank = filled()
    bank.fill(tokens(shots=1, seed=5))
    assert bank.k_shot == 1
    torch.testing.assert_close(bank.tokens, torch.nn.functional.normalize(torch.stack(tokens(shots=1, seed=5)), dim=-1))


def test_empty_bank_says_which_call_fills_it() -> None:
    empty = MemoryBank()
    assert empty.k_shot == 0
    with pytest.raises(RuntimeError, match=r"memory bank is empty: call `AprilGAN.setup`"):
        empty.stages()


def test_travels_in_the_state_dict_and_through_casts() -> None:
    bank, other = filled(), MemoryBank()
    other.tokens = torch.empty_like(bank.tokens)
    other.load_state_dict(bank.state_dict())
    assert list(bank.state_dict()) == ["tokens"]
    assert all(torch.equal(a, b) for a, b in zip(other.stages()[1], bank.stages()[1], strict=True))
    assert filled().half().stages()[0][0].dtype == torch.float32


def test_half_precision_tokens_are_normalised_in_fp32_and_carry_no_gradient() -> None:
    given = [stage.to(torch.bfloat16).requires_grad_() for stage in tokens()]
    bank = MemoryBank()
    bank.fill(given)
    assert bank.tokens.dtype == torch.float32
    assert not bank.tokens.requires_grad
    torch.testing.assert_close(bank.tokens.norm(dim=-1), torch.ones(2, 3, 4))


def test_arguments_are_left_alone() -> None:
    given = tokens()
    MemoryBank().fill(given)
    assert all(torch.equal(a, b) for a, b in zip(given, tokens(), strict=True))
