"""Rounding to INT8, and graphs with INT8 layers."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
import torch
import torch.nn.functional as F
from openvino import opset13 as ops

from anomalib_aprilgan.deployment.int8 import linear_layers, products_of_inputs, quantised, rounded
from anomalib_aprilgan.runtime.inferencer import resized
from anomalib_aprilgan.runtime.openvino_core import compiled


def correlated(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, width // 8, generator=generator)
    return few @ torch.randn(width // 8, width, generator=generator) + 0.1 * torch.randn(
        tokens, width, generator=generator
    )


class TestRounded:
    @pytest.mark.parametrize(("outputs", "inputs"), [(5, 8), (40, 64), (24, 200)])
    def test_levels_and_scales(self, outputs: int, inputs: int) -> None:
        weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))
        levels, scale = rounded(weight, None)
        assert levels.dtype == torch.int8
        assert levels.abs().max() <= 127
        assert ((levels * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()

    @pytest.mark.parametrize(("outputs", "inputs"), [(40, 64), (24, 200), (16, 300)])
    def test_what_inputs_show_makes_outputs_nearer(self, outputs: int, inputs: int) -> None:
        weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))
        shown, others = correlated(2500, inputs).split([2000, 500])
        products = (shown.T @ shown).double()
        errors = []
        for known in (None, products):
            levels, scale = rounded(weight, known)
            assert levels.abs().max() <= 127
            errors.append((others @ (levels * scale[:, None] - weight).T).norm().item())
        assert errors[1] < 0.6 * errors[0]

    def test_weights_and_inputs_of_zero(self) -> None:
        levels, scale = rounded(torch.zeros(3, 4), torch.zeros(4, 4).double())
        assert not levels.any()
        assert scale.isfinite().all()
        products = torch.diag(torch.tensor([1.0, 0.0, 2.0, 0.0])).double()
        levels, scale = rounded(torch.ones(3, 4), products)
        assert (levels * scale[:, None]).sub(1.0).abs().max() < 0.02


def tower(weight: np.ndarray, *, transposed: bool) -> ov.Model:
    images = ops.parameter([-1, 3, -1], ov.Type.f32, "tower_input")
    images.output(0).set_names({"tower_input"})
    product = ops.matmul(images, ops.constant(weight), transpose_a=False, transpose_b=transposed)
    attention = ops.matmul(product, product, transpose_a=False, transpose_b=True)
    results = [ops.result(product), ops.result(attention)]
    return ov.Model(results, [images])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activations", [False, True])
def test_layers_in_int8(transposed: bool, activations: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((48, 20)).astype(np.float32)
    model = tower(weight.T.copy() if transposed else weight, transposed=transposed)
    layers = linear_layers(model)
    assert len(layers) == 1  # no product of two activations
    images = [correlated(3, 48, seed)[None] * 10.0**seed for seed in range(3)]
    products = products_of_inputs(model, layers, images)
    expected = sum((image[0].T @ image[0]).double() for image in images)
    torch.testing.assert_close(products[layers[0]], expected, rtol=1e-4, atol=1e-2)
    small = quantised(model, layers, products, activations=activations)
    run, before = (compiled(one) for one in (small, model))
    for image in images:  # whatever their range
        exact, found = before(image.numpy())[0], run(image.numpy())[0]
        assert 0 < np.linalg.norm(found - exact) < 0.01 * np.linalg.norm(exact)
    zeros = np.zeros((1, 3, 48), dtype=np.float32)
    assert not run(zeros)[0].any()
    sizes = [
        sum(node.get_byte_size() for node in one.get_ops() if node.get_type_name() == "Constant")
        for one in (small, model)
    ]
    assert sizes[0] < 0.35 * sizes[1]


@pytest.mark.parametrize("size", [(7, 9), (20, 5), (96, 96), (200, 31)])
def test_maps_are_resized_as_torch_does(size: tuple[int, int]) -> None:
    plane = torch.rand(24, 24, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(plane[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(resized(plane.numpy(), size), expected.numpy(), atol=1e-5)
