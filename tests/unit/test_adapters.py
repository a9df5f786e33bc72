"""The linear maps: their arithmetic, names and precision."""

import pytest
import torch

from anomalib_aprilgan.network.adapters import LinearAdapters


def tokens(stages: int, width: int = 6, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 5, width, generator=generator).to(dtype) for _ in range(stages)]


def test_by_hand() -> None:
    adapters = LinearAdapters([2] * 1, 3)
    with torch.no_grad():
        adapters.fc[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
        adapters.fc[0].bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    (features,) = adapters([torch.tensor([[[3.0, 4.0]]])])
    assert features.tolist() == [[[3.0, 9.0, 6.0]]]


def test_each_stage_has_its_own_map() -> None:
    torch.manual_seed(0)
    adapters = LinearAdapters([6] * 3, 4)
    given = tokens(3)
    for number, features in enumerate(adapters(given)):
        layer = adapters.fc[number]
        slow = torch.stack(
            [torch.stack([layer.weight @ patch + layer.bias for patch in image]) for image in given[number]]
        )
        torch.testing.assert_close(features, slow, atol=1e-6, rtol=1e-5)
    assert adapters.fc[0].weight.ne(adapters.fc[1].weight).any()


def test_the_map_is_affine() -> None:
    adapters = LinearAdapters([6] * 1, 4)
    (one,), (other,) = tokens(1), tokens(1)
    other = other.flip(1)
    zero = adapters([torch.zeros_like(one)])[0]
    torch.testing.assert_close(
        adapters([one + other])[0], adapters([one])[0] + adapters([other])[0] - zero, atol=1e-6, rtol=1e-5
    )


def test_names_are_the_authors_and_shapes_follow_the_widths() -> None:
    shapes = {name: tuple(value.shape) for name, value in LinearAdapters([6] * 2, 4).state_dict().items()}
    assert shapes == {"fc.0.weight": (4, 6), "fc.0.bias": (4,), "fc.1.weight": (4, 6), "fc.1.bias": (4,)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_are_mapped_in_fp32(dtype: torch.dtype) -> None:
    adapters = LinearAdapters([6] * 2, 4)
    half = tokens(2, dtype=dtype)
    for features, expected in zip(adapters(half), adapters([stage.float() for stage in half]), strict=True):
        assert features.dtype == torch.float32
        assert torch.equal(features, expected)


def test_half_precision_weights_are_used_in_fp32() -> None:
    adapters = LinearAdapters([6] * 1, 4).to(torch.bfloat16)
    (features,) = adapters(tokens(1))
    assert features.dtype == torch.float32
    assert features.unique().numel() == features.numel()


@pytest.mark.parametrize("given", [1, 3])
def test_another_number_of_stages_is_refused(given: int) -> None:
    with pytest.raises(ValueError, match="zip"):
        LinearAdapters([6] * 2, 4)(tokens(given))


def test_gradients_reach_every_layer() -> None:
    adapters = LinearAdapters([6] * 2, 4)
    sum(features.square().sum() for features in adapters(tokens(2))).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapters.parameters())
