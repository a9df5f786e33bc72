"""Which patches stand for all: spread as far as can be, the same for the same seed."""

import psutil
import pytest
import torch
import torch.nn.functional as F
from anomalib.models.components import KCenterGreedy

from anomalib_aprilgan.network.coreset import coreset_indices
from anomalib_aprilgan.running import seeded


def clusters(number: int = 6, each: int = 40, width: int = 16) -> torch.Tensor:
    """Patches in tight groups, far from each other, the first of them by far the largest."""
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(number, width, generator=generator), dim=1)
    sizes = [each * 10, *[each] * (number - 1)]
    parts = [
        centre + 0.01 * torch.randn(size, width, generator=generator)
        for centre, size in zip(centres, sizes, strict=True)
    ]
    return F.normalize(torch.cat(parts), dim=1)


def test_every_group_is_there_however_small() -> None:
    patches = clusters()
    chosen = coreset_indices(patches, 6, seed=0)
    groups = {0 if index < 400 else 1 + (index - 400) // 40 for index in chosen.tolist()}
    assert groups == set(range(6))


def test_the_farthest_patch_is_nearer_than_by_a_random_choice() -> None:
    patches = F.normalize(torch.randn(800, 24, generator=torch.Generator().manual_seed(1)), dim=1)
    patches[:600] = F.normalize(patches[:1] + 0.05 * patches[:600], dim=1)

    def radius(indices: torch.Tensor) -> float:
        return float((1 - patches @ patches[indices].T).amin(dim=1).amax())

    random = torch.randperm(800, generator=torch.Generator().manual_seed(0))[:100]
    assert radius(coreset_indices(patches, 100, seed=0)) < 0.9 * radius(random)


def test_a_seed_is_a_choice_and_other_generators_are_left_alone() -> None:
    patches = clusters(each=10)
    before = torch.random.get_rng_state()
    first, again, other = (coreset_indices(patches, 20, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(set(first.tolist())) == 20
    assert first.tolist() == sorted(first.tolist())


def test_as_many_as_there_are_are_all() -> None:
    assert coreset_indices(clusters(each=2), 30, seed=0).tolist() == list(range(30))


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`memory_size` must be at most the 30 patches .*, got 31. Ask for"):
        coreset_indices(clusters(each=2), 31, seed=0)


def test_patches_are_those_that_anomalib_chooses() -> None:
    patches = F.normalize(torch.randn(500, 24, generator=torch.Generator().manual_seed(2)), dim=1)
    with seeded(5):
        theirs = KCenterGreedy(patches, 60.5 / 500)
        theirs.model.random_state = 5
        expected = sorted(theirs.select_coreset_idxs())
    assert coreset_indices(patches, 60, seed=5).tolist() == expected


def test_memory_stays_that_of_the_patches() -> None:
    """As large as copies of them are kept on a common allocator's heap."""
    patches = F.normalize(torch.randn(14_400, 96, generator=torch.Generator().manual_seed(2)), dim=1)
    coreset_indices(patches, 10, seed=0)
    before = psutil.Process().memory_info().rss
    coreset_indices(patches, 300, seed=0)
    assert psutil.Process().memory_info().rss - before < 50 * patches.nbytes
