"""Two processes together learn and measure what one does alone, also of classes that only one of them sees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..conftest import DATASET, SmallClip
from . import two_ranks
from .two_ranks import CASES, CATEGORIES, evaluate


@pytest.mark.thorough
def test_two_processes_are_as_one(small_clip: SmallClip, tmp_path: Path) -> None:
    arguments = {
        "backbone": str(small_clip.quick_gelu),
        "pretrained": str(small_clip.weights),
        "image_size": 96,
        "stages": [1, 2, 3, 4],
        "adapters": str(small_clip.adapters_4),
        "outputs": ["report", "coco", "masks"],
    }
    command = [sys.executable, two_ranks.__file__, json.dumps(arguments), str(DATASET), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    for number, (k_shot, images) in enumerate(CASES):
        alone = evaluate(arguments, k_shot, images, str(DATASET), str(tmp_path), devices=1)
        assert {f"{kind}_AUROC/{name}" for kind in ("image", "val_pixel") for name in CATEGORIES} < alone[
            "metrics"
        ].keys()
        assert len(first[number]["banks"]) == (len(CATEGORIES) if k_shot else 0)
        for bank, own in zip(first[number]["banks"], alone["banks"], strict=True):
            assert torch.equal(bank, own)
            assert bank.numel() > 0
        assert first[number]["regions"] == alone["regions"]
        assert len(alone["regions"]) > 20
        masks, maps = map(int, alone["regions"][-2])
        assert masks == maps >= images  # those of both cases lie in one folder
        assert alone["regions"][-1] == ["True"]
        for rank in (first[number], second[number]):
            assert rank["metrics"] == pytest.approx(alone["metrics"], abs=1e-6)
            for name in CATEGORIES:
                assert rank["values"][name] == pytest.approx(alone["values"][name], abs=1e-6)
            for bank, others in zip(rank["banks"], first[number]["banks"], strict=True):
                assert torch.equal(bank, others)
