"""The command ``bench``: run times side by side."""

from __future__ import annotations

import json
import re

import pytest

from anomalib_aprilgan import command as command_line

from ..conftest import SmallClip

ENGINES = ["torch", "torch-bf16", "onnxruntime", "openvino"]


@pytest.mark.thorough
def test_engines_are_measured_side_by_side(small_clip: SmallClip, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--backbone", str(small_clip.quick_gelu), "--image_size", "96", "--k_shot", "2"]
    given += ["--engines", *ENGINES, "--batch_sizes", "1", "3", "--rounds", "3", "--json"]
    assert command_line.main(["bench", *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["engine"], one["batch_size"]) for one in found] == [
        (name, size) for size in (1, 3) for name in ENGINES
    ]
    for one in found:
        assert 0.0 < one["p50"] <= one["p95"]
        assert one["throughput"] > 0.0
        is_torch = one["engine"].startswith("torch")
        assert (one["roofline"] is not None) == is_torch == (one["megabytes"] is None)
        assert is_torch or 50.0 < one["megabytes"] < 2000.0
        assert one["engine"] != "torch" or one["ratio"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "torch", "tensorrt"], "--engines must be some of torch, .*, got tensorrt"),
        (["--batch_sizes", "1", "0"], "--batch_sizes must be at least 1, got 0"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--k_shot", "-1"], "--k_shot must be at least 0, got -1"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--backbone", "ViT-Z"], "`backbone`"),
        (["--image_size", "0"], "`image_size`"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line.main(["bench", *arguments])
    assert ended.value.code == 2
    assert re.search(message, capfd.readouterr().err)
