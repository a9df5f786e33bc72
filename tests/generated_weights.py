"""Random weights where anomalib's models would download theirs, small where the model leaves a choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
from anomalib.models.image.anomalyvfm import torch_model as anomalyvfm
from anomalib.models.image.winclip import torch_model as winclip

WINCLIP = Path(__file__).parent / "data" / "ViT-generated-240.json"


def generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the rest of a test; figures of these models mean nothing."""
    create = timm.create_model

    def without_weights(name: str, **arguments: Any) -> Any:
        return create(name, **arguments | {"pretrained": False})

    monkeypatch.setattr(timm, "create_model", without_weights)
    winclip.open_clip.add_model_config(WINCLIP)  # type: ignore[attr-defined]
    monkeypatch.setattr(winclip, "BACKBONE", WINCLIP.stem)
    monkeypatch.setattr(winclip, "PRETRAINED", None)
    monkeypatch.setattr(anomalyvfm, "hf_hub_download", lambda **_: "")
    monkeypatch.setattr(anomalyvfm, "load_file", lambda _: {})
    monkeypatch.setattr(anomalyvfm.AnomalyVFMModel, "load_state_dict", lambda *_: None)
