"""Adapters for others: a file with its provenance, or a repository of the Hugging Face hub with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCardData

from .clip.hub import ADAPTERS_FILE, CARD_FILE, SCHEME, push
from .network.model import AprilGANModel
from .preparation.workplace import Made
from .provenance import Provenance, save_adapters, serialized

_USE = """```python
from anomalib_aprilgan import AprilGAN

model = AprilGAN({arguments})
```"""


class Sharing:
    """Mix-in that gives a model's adapters away."""

    model: AprilGANModel
    made: Made

    def save_adapters(self, path: str | Path) -> Path:
        """Write adapters and provenance to a ``.safetensors`` file, to be given as ``adapters`` elsewhere."""
        return save_adapters(Path(path), self.model.adapters.state_dict(), self.made.provenance)

    def push_adapters(
        self,
        repository: str,
        metrics: Mapping[str, float] | None = None,
        license_id: str | None = None,
        *,
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Push adapters and a model card to the Hugging Face hub, to be given as ``adapters`` elsewhere.

        Args:
            repository: ``owner/name``, created where it is missing.
            metrics: What the adapters reach, by name, for the card: what ``Engine.test`` returns, for example.
            license_id: The hub's identifier of the adapters' licence, such as ``"mit"``. Unset, the card names none.
            private: Whether a new repository is private.
            token: Access token; else the one that ``hf auth login`` has stored.

        Returns:
            ``hf://owner/name@commit``.

        Raises:
            ValueError: ``repository`` is not ``owner/name``, or the adapters are untrained.
            ConnectionError: The hub is out of reach, or refuses.
        """
        if not self.made.has_trained and self.made.adapters is None:
            msg = "`push_adapters`: the model has no trained adapters. Train or load them, or call `setup('predict')`."
            raise ValueError(msg)
        provenance = self.made.provenance
        files = {
            ADAPTERS_FILE: serialized(self.model.adapters.state_dict(), provenance),
            CARD_FILE: model_card(repository, provenance, metrics or {}, license_id).encode(),
        }
        return push(repository, files, private=private, token=token)


def model_card(repository: str, provenance: Provenance, metrics: Mapping[str, float], license_id: str | None) -> str:
    """The ``README.md`` of adapters on the hub: how to use them, and what is known of them."""
    tags = ["anomalib", "anomaly-detection", "zero-shot", "few-shot", "clip"]
    data = ModelCardData(license=license_id, library_name="anomalib", pipeline_tag="image-segmentation", tags=tags)
    header = data.to_yaml().strip()
    known = {
        "CLIP": provenance.backbone,
        "weights of CLIP (digest)": provenance.fingerprint,
        "activation": {None: None, True: "QuickGELU", False: "GELU"}[provenance.quick_gelu],
        "stages": provenance.stages and ", ".join(map(str, provenance.stages)),
        "image size": provenance.image_size and " x ".join(map(str, provenance.image_size)) + " pixels",
        "trained on": "; ".join(_data_set(*entry) for entry in provenance.trained_on.items()),
        "versions": ", ".join(f"{name} {number}" for name, number in provenance.versions.items()),
        "licence": license_id,
    }
    rows = [f"| {name} | {value or 'not stated'} |" for name, value in known.items()]
    size = provenance.image_size
    side = size[0] if size and len({*size}) == 1 else size
    arguments: dict[str, object] = {"backbone": provenance.backbone, "stages": provenance.stages, "image_size": side}
    arguments = {name: value for name, value in arguments.items() if value} | {"adapters": f"{SCHEME}{repository}"}
    use = _USE.format(arguments=", ".join(f"{name}={value!r}" for name, value in arguments.items()))
    parts = [
        f"---\n{header}\n---",
        f"# {repository}",
        "Linear adapters of APRIL-GAN ([arXiv:2305.17382](https://arxiv.org/abs/2305.17382)), zero- and few-shot "
        "anomaly detection with CLIP, for the anomalib model of the package `anomalib-aprilgan`. CLIP is not included.",
        use,
        "\n".join(["| | |", "|---|---|", *rows]),
    ]
    if metrics:
        lines = [f"| {name} | {value:.4f} |" for name, value in metrics.items()]
        parts.append(
            "\n".join(["## Measured by those who trained them", "", "| metric | value |", "|---|---|", *lines])
        )
    parts.append("Figures on data that the adapters were trained on are not zero-shot; the package warns of it.")
    return "\n\n".join(parts) + "\n"


def _data_set(name: str, categories: list[str]) -> str:
    return f"{name} ({', '.join(categories)})" if categories else name
