"""What a result rests on: versions, hardware, checksums of weights."""

from __future__ import annotations

import hashlib
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

_PACKAGES = ("anomalib-aprilgan", "anomalib", "lightning", "torch", "torchvision", "open_clip_torch", "timm", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of the packages that results rest on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware() -> dict[str, Any]:
    """Of this machine, without its name."""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def now() -> str:
    """Date and time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 over names and values of all parameters: the same for the same weights, whatever file they came in."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
