"""Linear layers of a vision tower in INT8, so that decisions stay what they were.

Scores follow small changes of the image feature: cosine similarities are multiplied by 100. Ranges of activations that
are fixed in advance, as post-training quantisation has them, are too coarse for that, and cut what a defect shows
beyond them. Here

- weights are rounded one input at a time, and what rounding has cost is made up for by the inputs that are left, as
  far as normal images show how inputs go together (GPTQ, arXiv:2210.17323);
- the range of activations is that of each token, and what is lost by rounding them goes through the layer too, as a
  second INT8 number.

Both products are INT8. Attention, normalisations, convolutions and all that follows the tower stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from torch import Tensor

from ..runtime.openvino_core import compiled

_LEVELS = 127  # on either side of zero
_DAMPING = 0.05  # of the mean square of an input, added to each: few images do not show all that inputs can do
_COLUMNS_AT_ONCE = 128
_BYTES_AT_ONCE = 2**29  # of products of inputs that are collected in one pass over the images


def linear_layers(tower: ov.Model) -> list[str]:
    """Names of the products with constant weights in a ``TowerGraph``, in order."""
    follows, found = {node.get_name() for node in tower.get_parameters()}, []
    for node in tower.get_ordered_ops():
        sources = [value.get_node() for value in node.input_values()]
        if not any(source.get_name() in follows for source in sources):
            continue
        follows.add(node.get_name())
        if node.get_type_name() != "MatMul" or sources[1].get_type_name() != "Constant":
            continue
        tokens, weight = (node.input_value(place).get_partial_shape() for place in (0, 1))
        if len(tokens) >= 2 and len(weight) == 2 and not node.get_attributes()["transpose_a"]:
            found.append(node.get_friendly_name())
    return found


def products_of_inputs(tower: ov.Model, layers: Sequence[str], images: Sequence[Tensor]) -> dict[str, Tensor]:
    """For each layer ``(K, K)``: the sum over all tokens of images of the products of any two of its ``K`` inputs.

    ``images`` ``(1, 3, h, w)`` are as the tower gets them.
    """
    found: dict[str, Tensor] = {}
    for together in _portions(tower, layers):
        part = tower.clone()
        nodes = {node.get_friendly_name(): node for node in part.get_ordered_ops()}
        results = []
        for name in together:
            tokens, width = nodes[name].input_value(0), _weight_of(nodes[name]).shape[1]
            flat = ops.reshape(tokens, np.array([-1, width]), special_zero=False)
            results.append(ops.result(ops.matmul(flat, flat, transpose_a=True, transpose_b=False)))
        run = compiled(ov.Model(results, part.get_parameters()))
        for image in images:
            output = run(np.ascontiguousarray(image.numpy()))
            for place, name in enumerate(together):
                found[name] = found.get(name, 0.0) + torch.from_numpy(np.array(output[place])).double()
    return found


def _portions(tower: ov.Model, layers: Sequence[str]) -> Iterable[list[str]]:
    nodes = {node.get_friendly_name(): node for node in tower.get_ordered_ops()}
    portion: list[str] = []
    room = _BYTES_AT_ONCE
    for name in layers:
        needed = 4 * _weight_of(nodes[name]).shape[1] ** 2
        if portion and needed > room:
            yield portion
            portion, room = [], _BYTES_AT_ONCE
        portion.append(name)
        room -= needed
    if portion:
        yield portion


def rounded(weight: Tensor, products: Tensor | None) -> tuple[Tensor, Tensor]:
    """INT8 weights ``(O, K)`` and their scales ``(O,)``, from weights ``(O, K)`` and ``products_of_inputs``.

    Without products every weight is rounded for itself.
    """
    left = weight.double()
    scale = (left.abs().amax(dim=1) / _LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    result = torch.empty_like(left)
    if products is None or not products.diagonal().mean() > 0:
        result = (left / scale[:, None]).round().clamp(-_LEVELS, _LEVELS)
        return result.to(torch.int8), scale.float()
    order = products.diagonal().argsort(descending=True)
    left, ordered = left[:, order], products[order][:, order].double()
    ordered = ordered + torch.eye(len(order), dtype=torch.double) * _DAMPING * products.diagonal().mean()
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(ordered)), upper=True)
    for start in range(0, len(order), _COLUMNS_AT_ONCE):
        end = min(start + _COLUMNS_AT_ONCE, len(order))
        errors = torch.empty(len(left), end - start, dtype=torch.double)
        for column in range(start, end):
            levels = (left[:, column] / scale).round().clamp(-_LEVELS, _LEVELS)
            error = (left[:, column] - levels * scale) / inverse[column, column]
            left[:, column:end] -= error[:, None] * inverse[column, column:end]
            errors[:, column - start], result[:, order[column]] = error, levels
        left[:, end:] -= errors @ inverse[start:end, end:]
    return result.to(torch.int8), scale.float()


def quantised(tower: ov.Model, layers: Sequence[str], products: dict[str, Tensor], *, activations: bool) -> ov.Model:
    """The graph with these layers in INT8; their weights alone, or the products too."""
    tower = tower.clone()
    nodes = {node.get_friendly_name(): node for node in tower.get_ordered_ops()}
    for name in layers:
        node = nodes[name]
        levels, scale = rounded(_weight_of(node), products.get(name))
        transposed = node.get_attributes()["transpose_b"]
        stored, axis = (levels, 1) if transposed else (levels.T, 0)
        whole = ops.convert(ops.constant(np.ascontiguousarray(stored.numpy())), ov.Type.f32)
        weight = ops.multiply(whole, ops.constant(scale.unsqueeze(axis).numpy()))
        build = _product_of_two if activations else _product
        result = build(node.input_value(0), weight, transposed=transposed)
        result.set_friendly_name(f"{name}/int8")
        node.output(0).replace(result.output(0))
    if not activations:  # OpenVINO would quantise activations by itself
        tower.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    return tower


def _product(tokens: ov.Output, weight: ov.Node, *, transposed: bool) -> ov.Node:
    return ops.matmul(tokens, weight, transpose_a=False, transpose_b=transposed)


def _product_of_two(tokens: ov.Output, weight: ov.Node, *, transposed: bool) -> ov.Node:
    """Tokens as two INT8 numbers each, times a weight."""

    def number(value: float) -> ov.Node:
        return ops.constant(np.float32(value))

    def eight_bit(values: ov.Node) -> ov.Node:
        return ops.fake_quantize(values, *map(number, (-1.0, 1.0, -1.0, 1.0)), 2 * _LEVELS + 1)

    largest = ops.reduce_max(ops.abs(tokens), np.array([-1]), keep_dims=True)
    largest = ops.maximum(largest, number(float(np.finfo(np.float32).tiny)))
    relative = ops.divide(tokens, largest)
    coarse = eight_bit(relative)
    fine = eight_bit(ops.multiply(ops.subtract(relative, coarse), number(2.0 * _LEVELS)))
    parts = [_product(part, weight, transposed=transposed) for part in (coarse, fine)]
    together = ops.add(parts[0], ops.multiply(parts[1], number(0.5 / _LEVELS)))
    return ops.multiply(together, largest)


def _weight_of(node: ov.Node) -> Tensor:
    """Weights ``(O, K)`` of a layer."""
    values = torch.from_numpy(np.array(node.input_value(1).get_node().data, dtype=np.float32))
    return values if node.get_attributes()["transpose_b"] else values.T
