"""The memory bank: what it keeps, holds out, forgets, and that it travels in the state dict."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_aprilgan.clip.architecture import ClipArchitecture
from anomalib_aprilgan.clip.backbone import VisionOutput
from anomalib_aprilgan.network.bank_parts import BankOptions
from anomalib_aprilgan.network.memory_bank import MemoryBank
from anomalib_aprilgan.network.scoring import distance_map, nearest_normal_distance, neighbourhood_mean

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


def bank_with(options: BankOptions, *outputs: VisionOutput) -> MemoryBank:
    """A bank of these options with a row for each, condensed."""
    bank = MemoryBank(ARCHITECTURE, STAGES, options=options)
    bank.set_rows([None] * len(outputs))
    for row, references in enumerate(outputs):
        bank.fill(row, images(len(references.image_feature)), references)
        bank.condense(row)
    return bank


class TestBoundedBank:
    def test_keeps_patches_of_every_stage_and_their_images(self) -> None:
        given = output(6)
        bank = bank_with(BankOptions(size=5), given)
        assert set(bank.state_dict()) == {f"remembered.0.{name}" for name in ("features", "coreset", "coreset_images")}
        coreset = bank.remembered[0].get_buffer("coreset")
        sources = bank.remembered[0].get_buffer("coreset_images")
        assert (coreset.shape, sources.shape) == ((5, 10), (5, 2))
        for stage, tokens in enumerate(given.patch_tokens):
            known = F.normalize(tokens, dim=-1)
            for patch, source in zip(coreset[:, 5 * stage : 5 * stage + 5], sources[:, stage], strict=True):
                assert (known[int(source)] - patch).abs().sum(dim=-1).min() < 1e-6
        assert bank.number(0) <= 6

    def test_as_many_patches_as_there_are_are_the_whole_bank(self) -> None:
        given, seen = output(3), output(2, seed=4)
        whole, bounded = bank_of(given), bank_with(BankOptions(size=12), given)
        for without in ([], [0], [1, 2]):
            expected = whole.distance_maps(images(2), seen, None, without)
            torch.testing.assert_close(bounded.distance_maps(images(2), seen, None, without), expected)

    def test_distances_are_those_to_the_kept_patches(self) -> None:
        bank, seen = bank_with(BankOptions(size=4), output(5), output(4, seed=7)), output(3, seed=4)
        maps = bank.distance_maps(images(3), seen, torch.tensor([1, 0, 1]))
        for number, row in enumerate([1, 0, 1]):
            coreset = bank.remembered[row].get_buffer("coreset")
            expected = torch.zeros(1, 16, 16)
            for stage, tokens in enumerate(seen.patch_tokens):
                distance = nearest_normal_distance(tokens[number : number + 1], [coreset[:, 5 * stage : 5 * stage + 5]])
                expected += distance_map(distance, (2, 2), (16, 16))
            torch.testing.assert_close(maps[number], expected[0])

    def test_all_of_whose_patches_are_held_out_is_empty(self) -> None:
        with pytest.raises(RuntimeError, match="memory bank is empty"):
            bank_with(BankOptions(size=3), output(1)).distance_maps(images(1), output(1), None, [0])

    def test_more_patches_than_there_are_are_refused(self) -> None:
        with pytest.raises(ValueError, match="`memory_size` must be at most the 12 patches"):
            bank_with(BankOptions(size=13), output(3))

    def test_filling_again_forgets_the_coreset(self) -> None:
        bank = bank_with(BankOptions(size=3), output(4))
        bank.fill(0, images(2), output(2, seed=3))
        assert bank.number(0) == 2
        assert list(bank.state_dict()) == ["remembered.0.features"]

    def test_added_images_are_as_those_filled_in(self) -> None:
        given = output(5)
        bank = bank_of(shots_of(given, [0, 1]))
        bank.add(0, images(3), shots_of(given, [2, 3, 4]))
        assert torch.equal(bank.features(0), bank_of(given).features(0))


class TestHalfPrecision:
    def test_halves_the_bank_and_keeps_distances(self) -> None:
        wide = ClipArchitecture("ViT-tiny", {"vision_cfg": VISION | {"width": 64}}, (16, 16))
        given, seen = output(4, width=64), output(2, width=64, seed=3)
        banks = {}
        for dtype in ("float32", "float16"):
            banks[dtype] = MemoryBank(wide, STAGES, options=BankOptions(dtype=dtype))
            banks[dtype].set_rows([None])
            banks[dtype].fill(0, images(4), given)
        assert 2 * banks["float16"].features(0).nbytes == banks["float32"].features(0).nbytes
        maps = [bank.distance_maps(images(2), seen, None) for bank in banks.values()]
        assert maps[1].dtype == torch.float32
        torch.testing.assert_close(*maps, atol=1e-3, rtol=0)
        own = banks["float16"].distance_maps(images(4), given, None)
        assert own.max() < 1e-5  # lengths are mended, so that nothing is beyond "the same"


class TestUnlabelled:
    def test_an_image_of_the_bank_is_compared_with_the_others(self) -> None:
        given = output(5)
        bank = bank_with(BankOptions(lowest_share=0.5), given)
        maps = bank.distance_maps(images(5), given, None)
        for shot in range(5):
            others = bank_with(BankOptions(lowest_share=0.5), shots_of(given, [s for s in range(5) if s != shot]))
            expected = others.distance_maps(images(1), shots_of(given, [shot]), None)
            torch.testing.assert_close(maps[shot : shot + 1], expected)

    def test_one_image_and_no_trim_is_the_one_shot_bank(self) -> None:
        given, seen = output(1), output(3, seed=5)
        found = bank_with(BankOptions(lowest_share=1.0), given).distance_maps(images(3), seen, None)
        torch.testing.assert_close(found, bank_of(given).distance_maps(images(3), seen, None), atol=1e-6, rtol=0)

    def test_an_image_is_held_out(self) -> None:
        given, seen = output(4), output(2, seed=5)
        found = bank_with(BankOptions(lowest_share=0.4), given).distance_maps(images(2), seen, None, [1])
        others = bank_with(BankOptions(lowest_share=0.4), shots_of(given, [0, 2, 3]))
        torch.testing.assert_close(found, others.distance_maps(images(2), seen, None))


class TestAccepted:
    def test_are_remembered_apart_and_count_as_near(self) -> None:
        given, part, seen = output(2), output(1, seed=8), output(3, seed=9)
        bank, more = bank_of(given), bank_of(VisionOutput(
            [torch.cat(both) for both in zip(given.patch_tokens, part.patch_tokens, strict=True)],
            torch.zeros(3, 4),
            STAGES,
        ))  # fmt: skip
        before = bank.features(0)
        bank.accept(0, images(1), part)
        assert bank.features(0) is before
        assert bank.number(0) == 2
        found = bank.compare(images(3), seen, None)
        torch.testing.assert_close(found.nearest, more.distance_maps(images(3), seen, None))
        torch.testing.assert_close(found.references, bank_of(given).distance_maps(images(3), seen, None))
        torch.testing.assert_close(found.accepted, bank_of(part).distance_maps(images(3), seen, None))

    def test_of_one_class_leave_the_others_alone(self) -> None:
        seen = output(2, seed=9)
        bank = bank_of(output(2), output(2, seed=3))
        bank.accept(1, images(1), output(1, seed=8))
        found = bank.compare(images(2), seen, torch.tensor([0, 1]))
        assert torch.equal(found.nearest[0], found.references[0])
        assert torch.equal(found.nearest[0], found.accepted[0])
        assert not torch.equal(found.nearest[1], found.references[1])
        assert bank.compare(images(2), seen, torch.tensor([0, 0])).accepted is None

    def test_the_last_are_dropped_without_a_trace(self) -> None:
        bank = bank_of(output(2))
        before = {name: value.clone() for name, value in bank.state_dict().items()}
        bank.accept(0, images(2), output(2, seed=4))
        first = bank.accepted(0).clone()
        bank.accept(0, images(1), output(1, seed=5))
        assert len(bank.accepted(0)) == 3
        bank.drop_accepted(0, 1)
        assert torch.equal(bank.accepted(0), first)
        bank.drop_accepted(0, 2)
        after = bank.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())

    def test_new_references_leave_them_there(self) -> None:
        bank = bank_with(BankOptions(size=3), output(4))
        bank.accept(0, images(1), output(1, seed=4))
        bank.fill(0, images(2), output(2, seed=5))
        bank.condense(0)
        assert len(bank.accepted(0)) == 1


class TestRoomForACheckpoint:
    def test_is_made_for_all_that_a_bank_holds(self) -> None:
        bank, other = bank_with(BankOptions(size=3), output(4)), bank_of(None)
        bank.accept(0, images(1), output(1, seed=4))
        tensors = {name.removeprefix("remembered.0."): value for name, value in bank.state_dict().items()}
        other.make_room(0, tensors)
        other.load_state_dict(bank.state_dict())
        seen = output(2, seed=6)
        torch.testing.assert_close(
            other.distance_maps(images(2), seen, None), bank.distance_maps(images(2), seen, None)
        )

    @pytest.mark.parametrize(
        ("changed", "text"),
        [
            ({"coreset_images": None}, "a coreset and the images of its patches go together"),
            ({"coreset": torch.zeros(3, 9)}, r"a coreset must be \(M, 10\), its images \(M, 2\) from 0 up"),
            ({"coreset_images": torch.zeros(2, 2, dtype=torch.int32)}, r"a coreset must be \(M, 10\)"),
            ({"coreset_images": torch.full((3, 2), -1)}, r"a coreset must be \(M, 10\)"),
            ({"coreset_images": torch.zeros(3, 2)}, r"a coreset must be \(M, 10\)"),
            ({"accepted": torch.zeros(1, 7)}, r"`ckpt_path`: a memory bank must be \(K, 40\)"),
        ],
    )
    def test_is_refused_for_what_no_bank_of_this_tower_holds(self, changed: dict[str, Tensor], text: str) -> None:
        tensors = {
            "features": torch.empty(0),
            "coreset": torch.zeros(3, 10),
            "coreset_images": torch.zeros(3, 2, dtype=torch.int32),
        } | changed
        with pytest.raises(ValueError, match=text):
            bank_of(None).make_room(0, {name: value for name, value in tensors.items() if value is not None})
