"""The frozen CLIP: patch tokens of the tapped stages, image feature, text features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import library
from .architecture import ClipArchitecture
from .state_dict import digest_of, read_state_dict
from .weights import find_pretrained


class VisionOutput(NamedTuple):
    """What one pass of the vision tower gives.

    Attributes:
        patch_tokens: Per tapped stage ``(B, L, C)``, ascending: the residual stream after the
            block, class token removed, before the last normalisation and projection.
        image_feature: ``(B, D)``, not normalised.
    """

    patch_tokens: list[Tensor]
    image_feature: Tensor


class ClipBackbone(nn.Module):
    """A frozen CLIP with tapped vision stages.

    Parameters never require gradients and the module stays in eval mode through ``train()``.

    Args:
        architecture: What to build.
        state_dict: Weights in open_clip's layout, positional embedding at any size.
        source: Where the weights came from, for the error.

    Attributes:
        digest: Hash over all weights as they were given: the same at every image size and precision, and for
            every file format.
        text: The text tower; ``None`` where it was left out.

    Raises:
        ValueError: The weights are not those of this architecture.
    """

    def __init__(self, architecture: ClipArchitecture, state_dict: dict[str, Tensor], source: str) -> None:
        super().__init__()
        self.architecture = architecture
        clip = library.build_clip(architecture.name, architecture.config)
        # Files are often in half precision, in which positions cannot be resized on a CPU.
        weights = {name: value.float() if value.is_floating_point() else value for name, value in state_dict.items()}
        try:
            if "logit_scale" in weights:
                weights["logit_scale"] = weights["logit_scale"].reshape(clip.logit_scale.shape)
            library.load_weights(clip, weights)
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            msg = f"`pretrained`: the weights of {source} are not those of {architecture.name}: {reason[:400]}"
            raise ValueError(msg) from error
        self.digest = digest_of(weights)
        projection = weights["visual.proj"].contiguous().numpy()
        self._projection_digest = hashlib.sha256(projection.tobytes()).hexdigest()[:16]
        self.visual = clip.visual
        clip.visual = None  # the rest of it is the text tower
        self.text: Any | None = clip
        self.requires_grad_(requires_grad=False)
        self.train(mode=False)

    def train(self, mode: bool = True) -> ClipBackbone:
        """Stay in eval mode: CLIP is frozen."""
        del mode
        return super().train(mode=False)

    def matches(self, recorded: str) -> bool:
        """Whether these are the weights that a file or checkpoint was made with.

        Args:
            recorded: A :attr:`digest`, or the "fingerprint" that version 0.1.0 recorded: a hash of the image
                projection alone.
        """
        return recorded in {self.digest, self._projection_digest}

    def forward(self, images: Tensor, stages: Iterable[int]) -> VisionOutput:
        """One pass of the vision tower.

        Args:
            images: ``(B, 3, H, W)``, resized and normalised.
            stages: Blocks to tap, counted from 1, in ascending order; none for the image feature alone.

        Returns:
            Patch tokens and image feature.

        Raises:
            ValueError: The images have another size than the architecture.
        """
        if tuple(images.shape[-2:]) != self.architecture.image_size:
            msg = f"`images` must be {self.architecture.image_size} pixels for this model, got {tuple(images.shape)}."
            raise ValueError(msg)
        images = images.to(self.visual.conv1.weight.dtype)
        return VisionOutput(*library.run_vision(self.visual, images, tuple(stages)))

    @torch.no_grad()
    def encode_states(self, normal: list[str], anomalous: list[str]) -> Tensor:
        """Text features of a class: every sentence normalised, averaged, normalised (authors' prompt_ensemble.py).

        Args:
            normal: Sentences about a good part.
            anomalous: Sentences about a bad part.

        Returns:
            ``(D, 2)``, unit columns: normal, anomalous.

        Raises:
            RuntimeError: The text tower was left out.
        """
        features = [
            F.normalize(F.normalize(self.encode_text(sentences), dim=-1).mean(dim=0), dim=-1)
            for sentences in (normal, anomalous)
        ]
        return torch.stack(features, dim=1)

    def encode_text(self, sentences: list[str], *, cut_context: bool = True) -> Tensor:
        """Text features of sentences, in fp32.

        A causal tower that pools at the end token never looks behind it, so the context is cut to
        the longest sentence: the same features for a third of the work or less.

        Args:
            sentences: What to encode.
            cut_context: Whether to cut; off only to measure what it saves.

        Returns:
            ``(len(sentences), D)``, not normalised.

        Raises:
            RuntimeError: The text tower was left out.
        """
        text = self.text
        if text is None:
            msg = "This backbone carries no text tower (an exported model): class names cannot be encoded any more."
            raise RuntimeError(msg)
        config = self.architecture.config["text_cfg"]
        options = json.dumps(config.get("tokenizer_kwargs") or {})
        tokenize = library.tokenizer(config.get("hf_tokenizer_name"), config.get("context_length", 77), options)
        tokens = tokenize(sentences).to(text.positional_embedding.device)
        ends = None  # a tower that pools elsewhere
        if text.text_pool_type in {"argmax", "eos"}:  # CLIP's own end token is the highest of all
            ends = (tokens if text.text_pool_type == "argmax" else (tokens == text.text_eos_id).int()).argmax(dim=-1)
        length = tokens.shape[1]
        if cut_context and text.attn_mask is not None and ends is not None:
            length = int(ends.max()) + 1
        tokens = tokens[:, :length]
        embedded = text.token_embedding(tokens) + text.positional_embedding[:length]
        mask = None if text.attn_mask is None else text.attn_mask[:length, :length]
        stream = text.ln_final(library.run_text_blocks(text, embedded, mask))
        if ends is None:
            pooled: Tensor = stream[:, 0 if text.text_pool_type == "first" else -1]
        else:
            pooled = stream[torch.arange(len(stream), device=stream.device), ends]
        projection: Tensor | nn.Linear | None = text.text_projection
        if projection is not None:
            pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return pooled.float()


def load_clip(architecture: ClipArchitecture, pretrained: str) -> ClipBackbone:
    """The frozen CLIP with the weights of a file or an open_clip tag.

    Args:
        architecture: What to build.
        pretrained: Path of a weight file, or a tag of open_clip ("openai").

    Raises:
        FileNotFoundError: The file is missing, or the tag's weights cannot be had.
        ValueError: Unknown tag, or a file that is damaged or fits another architecture.
    """
    path = Path(pretrained).expanduser()
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            msg = f"`pretrained`: no weight file {path}. Pass an existing file or an open_clip tag such as 'openai'."
            raise FileNotFoundError(msg)
        path = find_pretrained(architecture.name, pretrained)
    return ClipBackbone(architecture, read_state_dict(path, "pretrained", torchscript=True), str(path))


def random_weights(architecture: ClipArchitecture, seed: int) -> dict[str, Tensor]:
    """Weights of a CLIP that has learned nothing: open_clip's initialisation, repeatable.

    No random generator of the caller moves, on no device.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every accelerator, too
        return dict(library.build_clip(architecture.name, architecture.config).state_dict())
