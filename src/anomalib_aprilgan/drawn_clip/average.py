"""Averages weights of the small CLIP that one training led to from another.

The mean of two such models is often better than either, and costs nothing (arXiv:2203.05482).

python -m anomalib_aprilgan.drawn_clip.average fourth.safetensors fifth.safetensors --out ViT-drawn-96.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..weights import read_state_dict, write_atomically


def average(state_dicts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of every tensor, in fp16.

    Args:
        state_dicts: Weights of the same names and shapes.

    Raises:
        ValueError: The names or shapes differ.
    """
    shapes = [{name: tuple(value.shape) for name, value in weights.items()} for weights in state_dicts]
    for number, found in enumerate(shapes):
        if found != shapes[0]:
            differing = sorted(name for name, _ in found.items() ^ shapes[0].items())
            msg = f"`weights` must be of one architecture; the first and number {number + 1} differ in {differing[0]}."
            raise ValueError(msg)
    return {
        name: torch.stack([weights[name].float() for weights in state_dicts]).mean(dim=0).half().contiguous()
        for name in state_dicts[0]
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="anomalib_aprilgan.drawn_clip.average", description=__doc__)
    parser.add_argument("weights", type=Path, nargs="+", help="weight files, .safetensors")
    parser.add_argument("--out", type=Path, required=True, help="weight file to write, .safetensors")
    options = parser.parse_args(arguments)
    if options.out.suffix != ".safetensors":
        parser.error(f"--out must end in .safetensors, got {options.out.name}")
    state_dicts = [read_state_dict(path, "weights") for path in options.weights]
    content = save(average(state_dicts))
    write_atomically(options.out, lambda file: file.write(content))


if __name__ == "__main__":
    main()
