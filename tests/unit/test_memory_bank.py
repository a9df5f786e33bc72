"""The memory bank: what it keeps, holds out, forgets, and that it travels in the state dict."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_aprilgan.clip.architecture import ClipArchitecture
from anomalib_aprilgan.clip.backbone import VisionOutput
from anomalib_aprilgan.network.memory_bank import MemoryBank
from anomalib_aprilgan.network.scoring import distance_map, neighbourhood_mean

STAGES = (1, 3)
VISION = {"patch_size": 8, "width": 5, "layers": 3}
ARCHITECTURE = ClipArchitecture("ViT-tiny", {"vision_cfg": VISION}, (16, 16))  # 2 x 2 patches


def output(shots: int = 3, width: int = 5, seed: int = 0, patches: int = 4) -> VisionOutput:
    generator = torch.Generator().manual_seed(seed)
    tokens = [7 * torch.randn(shots, patches, width, generator=generator) for _ in STAGES]
    return VisionOutput(tokens, torch.zeros(shots, 4), STAGES)


def images(count: int) -> Tensor:
    return torch.zeros(count, 3, 16, 16)


def bank_of(*outputs: VisionOutput | None, neighbourhood: int = 1) -> MemoryBank:
    """A bank with a row for each; ``None`` for a class without references."""
    bank = MemoryBank(ARCHITECTURE, STAGES, neighbourhood)
    bank.set_rows([None] * len(outputs))
    for row, references in enumerate(outputs):
        if references is not None:
            bank.fill(row, images(len(references.image_feature)), references)
    return bank


def shots_of(given: VisionOutput, shots: list[int]) -> VisionOutput:
    return VisionOutput([tokens[shots] for tokens in given.patch_tokens], given.image_feature[shots], given.stages)


def test_rows_keep_their_directions_at_unit_length() -> None:
    narrow = ClipArchitecture("ViT-tiny", {"vision_cfg": VISION | {"width": 2}}, (8, 16))
    bank = MemoryBank(narrow, (2,))
    bank.set_rows([None])
    bank.fill(0, images(1), VisionOutput([torch.tensor([[[3.0, 4.0], [0.0, -2.0]]])], torch.zeros(1, 2), (2,)))
    torch.testing.assert_close(bank.banks_of(bank.features(0)), [torch.tensor([[[0.6, 0.8], [0.0, -1.0]]])])
    assert bank.number(0) == 1


def test_stages_come_image_by_image() -> None:
    given = output()
    bank = bank_of(given)
    assert bank.features(0).shape == (3, 2 * 4 * 5)
    remembered = bank.banks_of(bank.features(0))
    for stage, of_stage in zip(given.patch_tokens, remembered, strict=True):
        for raw, kept in zip(stage, of_stage, strict=True):
            for patch, row in zip(raw, kept, strict=True):
                torch.testing.assert_close(row, patch / patch.norm())


def test_only_its_own_stages_count() -> None:
    given = output()
    more = VisionOutput([given.patch_tokens[0], torch.full((3, 4, 5), 9.0), given.patch_tokens[1]], given[1], (1, 2, 3))
    assert torch.equal(bank_of(more).features(0), bank_of(given).features(0))


@pytest.mark.parametrize("neighbourhood", [1, 3])
def test_maps_match_loops(neighbourhood: int) -> None:
    remembered, seen = output(seed=1), output(2, seed=2)
    maps = bank_of(remembered, neighbourhood=neighbourhood).distance_maps(images(2), seen, None)
    expected = torch.zeros(2, 16, 16)
    for stage in STAGES:
        both = [given.tokens_of(stage) for given in (remembered, seen)]
        bank, tokens = (neighbourhood_mean(given, (2, 2), neighbourhood) for given in both)
        for number in range(2):
            nearest = [
                min(1 - F.cosine_similarity(patch, other, dim=0) for other in bank.reshape(-1, 5))
                for patch in tokens[number]
            ]
            expected[number] += distance_map(torch.stack(nearest)[None], (2, 2), (16, 16))[0]
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=0)
    assert maps.max() > 0.1


@pytest.mark.parametrize("without", [{0}, {1}, {2}, {0, 2}])
def test_holding_some_out(without: set[int]) -> None:
    references, seen = output(), output(2, seed=4)
    rest = bank_of(shots_of(references, [shot for shot in range(3) if shot not in without]))
    bank = bank_of(references)
    held_out = bank.distance_maps(images(2), seen, None, without)
    assert torch.equal(held_out, rest.distance_maps(images(2), seen, None))
    assert not torch.equal(held_out, bank.distance_maps(images(2), seen, None))
    assert bank.number(0) == 3


def test_the_only_reference_cannot_be_held_out() -> None:
    with pytest.raises(RuntimeError, match="memory bank is empty"):
        bank_of(output(1)).distance_maps(images(1), output(1), None, [0])


def test_more_references_never_raise_the_map() -> None:
    references, seen = output(5), output(2, seed=4)
    maps = [
        bank_of(shots_of(references, [*range(shots)])).distance_maps(images(2), seen, None) for shots in range(1, 6)
    ]
    assert all((more <= fewer).all() for fewer, more in pairwise(maps))


def test_what_is_remembered_is_no_distance_away_and_the_opposite_at_the_ceiling() -> None:
    given = VisionOutput([torch.randn(1, 1, 5).repeat(1, 4, 1) for _ in STAGES], torch.zeros(1, 4), STAGES)
    bank = bank_of(given)
    assert bank.distance_maps(images(1), given, None).abs().max() < 1e-5
    opposite = VisionOutput([-tokens for tokens in given.patch_tokens], given.image_feature, STAGES)
    maps = bank.distance_maps(images(1), opposite, None)
    torch.testing.assert_close(maps, torch.full((1, 16, 16), bank.map_ceiling))
    assert (bank.map_limit, bank.map_ceiling) == (1.0, 4.0)


def test_every_image_is_compared_with_its_class() -> None:
    references, seen = [output(2, seed=6), output(1, seed=7)], output(3, seed=8)
    maps = bank_of(*references).distance_maps(images(3), seen, torch.tensor([1, 0, 1]))
    for number, row in enumerate([1, 0, 1]):
        alone = bank_of(references[row]).distance_maps(images(1), shots_of(seen, [number]), None)
        torch.testing.assert_close(maps[number], alone[0])


def test_a_batch_without_images() -> None:
    nothing = output(0)
    rows = torch.empty(0, dtype=torch.long)
    assert bank_of(output(), output()).distance_maps(images(0), nothing, rows).shape == (0, 16, 16)


def test_filling_again_forgets() -> None:
    bank = bank_of(output(), output(2, seed=3))
    again = output(shots=1, seed=5)
    bank.fill(0, images(1), again)
    assert [bank.number(row) for row in range(2)] == [1, 2]
    expected = [F.normalize(tokens, dim=-1) for tokens in again.patch_tokens]
    torch.testing.assert_close(bank.banks_of(bank.features(0)), expected)


def test_empty_bank_says_which_call_fills_it() -> None:
    empty = bank_of(None, output())
    assert [empty.number(row) for row in range(2)] == [0, 3]
    with pytest.raises(RuntimeError, match=r"memory bank is empty: call `AprilGAN.setup`"):
        empty.features(0)
    with pytest.raises(RuntimeError, match=r"memory bank is empty: call `AprilGAN.setup`"):
        empty.distance_maps(images(2), output(2), torch.tensor([1, 0]))


def test_travels_in_the_state_dict_and_through_casts() -> None:
    bank, other = bank_of(output()), bank_of(None)
    other.set_features(0, torch.empty_like(bank.features(0)))
    other.load_state_dict(bank.state_dict())
    assert list(bank.state_dict()) == ["remembered.0.features"]
    assert torch.equal(other.features(0), bank.features(0))
    halved = bank_of(output()).half().distance_maps(images(2), output(2, seed=4), None)
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, bank.distance_maps(images(2), output(2, seed=4), None), atol=5e-3, rtol=0)


def test_half_precision_tokens_are_normalised_in_fp32_and_carry_no_gradient() -> None:
    given = output()
    half = VisionOutput([stage.to(torch.bfloat16).requires_grad_() for stage in given.patch_tokens], given[1], STAGES)
    bank = bank_of(half)
    assert bank.features(0).dtype == torch.float32
    assert not bank.features(0).requires_grad
    torch.testing.assert_close(bank.features(0).unflatten(1, (2, 4, 5)).norm(dim=-1), torch.ones(3, 2, 4))


def test_arguments_are_left_alone() -> None:
    given, seen = output(), output(2, seed=4)
    bank_of(given, neighbourhood=3).distance_maps(images(2), seen, None)
    for one, other in ((given, output()), (seen, output(2, seed=4))):
        assert all(torch.equal(a, b) for a, b in zip(one.patch_tokens, other.patch_tokens, strict=True))


def test_stages_of_other_widths_and_grids() -> None:
    architecture = ClipArchitecture.load("RN50", (64, 32), None)
    bank = MemoryBank(architecture, (1, 4))
    assert [(shape.width, shape.grid) for shape in bank.shapes] == [(256, (16, 8)), (2048, (2, 1))]
    tokens = [torch.randn(2, 128, 256), torch.randn(2, 2, 2048)]
    seen = VisionOutput(tokens, torch.zeros(2, 4), (1, 4))
    bank.set_rows([None])
    bank.fill(0, torch.zeros(2, 3, 64, 32), seen)
    assert bank.features(0).shape == (2, 128 * 256 + 2 * 2048)
    maps = bank.distance_maps(torch.zeros(2, 3, 64, 32), seen, None)
    assert maps.shape == (2, 64, 32)
    assert maps.abs().max() < 1e-5
    assert bank.distance_maps(torch.zeros(2, 3, 64, 32), seen, None, without=[0])[0].min() > 0.5
    with pytest.raises(ValueError, match=r"`ckpt_path`: a memory bank must be \(K, 36864\) for this tower"):
        bank.check_features(torch.zeros(2, 5))
