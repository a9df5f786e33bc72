"""The frozen CLIP, which gives patch tokens of the tapped stages, image features and text features."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import shown
from ..files import is_file
from ..recipe import digest_of_tensors
from . import library, library_text
from .architecture import ClipArchitecture
from .state_dict import read_state_dict
from .weights import find_pretrained


class VisionOutput(NamedTuple):
    """One pass of the vision tower: ``image_feature`` ``(B, D)``, not normalised, and ``patch_tokens`` ``(B, L, C)``.

    These are of each of ``stages``, counted from 1 and ascending: the residual stream after the block, class token
    removed, before the last normalisation and projection.
    """

    patch_tokens: list[Tensor]
    image_feature: Tensor
    stages: tuple[int, ...]

    def tokens_of(self, stage: int) -> Tensor:
        """``(B, L, C)`` patch tokens of one tapped stage."""
        return self.patch_tokens[self.stages.index(stage)]

    @classmethod
    def cat(cls, outputs: Sequence[VisionOutput]) -> VisionOutput:
        """The outputs of several batches as one."""
        tokens = [torch.cat(stage) for stage in zip(*(output.patch_tokens for output in outputs), strict=True)]
        return cls(tokens, torch.cat([output.image_feature for output in outputs]), outputs[0].stages)


class ClipBackbone(nn.Module):
    """A frozen CLIP with tapped vision stages, always in eval mode and without gradients for its parameters.

    It takes weights in open_clip's layout, with the positional embedding at any size, and their source for the error.
    ``digest`` is over all of them as they were given: the same for every image size, precision and file format.
    ``text`` is the text tower, ``None`` where it was left out.
    """

    def __init__(self, architecture: ClipArchitecture, state_dict: dict[str, Tensor], source: str) -> None:
        super().__init__()
        self.architecture = architecture
        clip: Any = library.build_clip(architecture.name, architecture.config)
        # Files are often in half precision, in which positions cannot be resized on a CPU.
        weights = {name: value.float() if value.is_floating_point() else value for name, value in state_dict.items()}
        try:
            library.load_weights(clip, weights)
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            msg = f"`pretrained`: the weights of {source} are not those of {architecture.name}: {reason[:400]}"
            raise ValueError(msg) from error
        if not architecture.is_plain_vit:
            library.resize_tower(clip.visual, architecture.image_size)
        self.digest = digest_of_tensors(weights)
        projection = weights.get("visual.proj", torch.empty(0))
        self._projection_digest = hashlib.sha256(projection.numpy().tobytes()).hexdigest()[:16]
        self.temperature = float(clip.logit_scale.detach().exp())
        self.visual: Any = clip.visual
        self.text: Any | None = library_text.text_tower(clip)
        self._cuts_exactly: bool | None = None
        self.requires_grad_(requires_grad=False)
        self.train(mode=False)

    def train(self, mode: bool = True) -> ClipBackbone:
        """Stay in eval mode: CLIP is frozen."""
        del mode
        return super().train(mode=False)

    def without_text(self) -> ClipBackbone:
        """The same vision tower, without the text tower."""
        twin = copy.copy(self)
        vars(twin)["_modules"] = vars(self)["_modules"] | {"text": None}  # a shallow copy shares the towers' table
        return twin

    def matches(self, recorded: str) -> bool:
        """Whether a recorded ``digest`` is of these weights; version 0.1.0 hashed the image projection alone."""
        return recorded in {self.digest, self._projection_digest}

    def forward(self, images: Tensor, stages: Iterable[int]) -> VisionOutput:
        """One pass over normalised images ``(B, 3, H, W)``; ``stages`` count from 1 and ascend, or are none."""
        if tuple(images.shape[-2:]) != self.architecture.image_size:
            msg = f"`images` must be {self.architecture.image_size} pixels for this model, got {tuple(images.shape)}."
            raise ValueError(msg)
        images = images.to(next(self.visual.parameters()).dtype)
        tapped = tuple(stages)
        return VisionOutput(*library.run_vision(self.visual, images, tapped), tapped)

    @torch.no_grad()
    def encode_states(self, normal: list[str], anomalous: list[str]) -> Tensor:
        """Text features ``(D, 2)`` of sentences about good parts and about bad ones, with columns of norm 1.

        Every sentence is normalised, then averaged, then normalised (authors' prompt_ensemble.py). A sentence that is
        longer than the context is a warning, a ValueError where no other is left that tells good from bad.
        """
        self._check_length(normal, anomalous)
        features = [
            F.normalize(F.normalize(self.encode_text(sentences), dim=-1).mean(dim=0), dim=-1)
            for sentences in (normal, anomalous)
        ]
        return torch.stack(features, dim=1)

    def encode_text(self, sentences: list[str], *, cut_context: bool = True) -> Tensor:
        """Features ``(len(sentences), D)`` in fp32, not normalised; a RuntimeError without text tower.

        A causal tower that pools at the end token never looks behind it, so the context is cut to the longest sentence:
        the same features for a third of the work or less. Where a first sentence does not get the same features so, the
        context is never cut. ``cut_context=False`` measures what that saves.
        """
        if self.text is None:
            msg = "This backbone carries no text tower (an exported model): class names cannot be encoded any more."
            raise RuntimeError(msg)
        tokens = library_text.tokens_of(*self._tokenizing, tuple(sentences)).to(next(self.text.parameters()).device)
        if cut_context and self._cut_is_exact(tokens[:1]):
            cut = library_text.encode_cut_tokens(self.text, tokens)
            if cut is not None:
                return cut.float()
        return library_text.encode_tokens(self.text, tokens).float()

    def _cut_is_exact(self, tokens: Tensor) -> bool:
        """Whether a sentence gets open_clip's features also without what is behind its end; asked once."""
        if self._cuts_exactly is None and self.text is not None and len(tokens):
            cut, whole = (
                library_text.encode_cut_tokens(self.text, tokens),
                library_text.encode_tokens(self.text, tokens),
            )
            rounding = 1000 * torch.finfo(whole.dtype).eps * whole.abs().max()
            self._cuts_exactly = cut is not None and bool((cut - whole).abs().max() <= rounding)
        return bool(self._cuts_exactly)

    @property
    def _tokenizing(self) -> tuple[str | None, int, str]:
        """What a tokenizer of this text tower is made from."""
        config = self.architecture.config["text_cfg"]
        options = dict(config.get("tokenizer_kwargs") or {})
        if config.get("tokenizer_mode"):
            options["tokenizer_mode"] = config["tokenizer_mode"]
        return config.get("hf_tokenizer_name"), config.get("context_length", 77), json.dumps(options)

    def _check_length(self, normal: list[str], anomalous: list[str]) -> None:
        tokens = [library_text.tokens_of(*self._tokenizing, tuple(sentences)) for sentences in (normal, anomalous)]
        padding = int(
            library_text.tokens_of(*self._tokenizing, ("",))[0, -1]
        )  # the context of each sentence ends in it
        ends = torch.cat(tokens)[:, -1].tolist()
        full = [sentence for sentence, end in zip([*normal, *anomalous], ends, strict=True) if end != padding]
        if not full:
            return
        good, bad = ({tuple(row) for row in part.tolist()} for part in tokens)
        context = tokens[0].shape[1]
        cut = library_text.cut_words(library_text.tokenizer(*self._tokenizing), full, context)
        if not cut:
            return
        longest = max(cut, key=lambda sentence: len(cut[sentence]))
        told = (
            f"`class_name`, `prompts`: {len(cut)} sentences are longer than the {context} tokens that this CLIP "
            f"reads; of {shown(longest)} it does not read {shown(cut[longest], 300)}."
        )
        if bad <= good or good <= bad:
            msg = f"{told} Nothing tells bad parts from good ones any more: use fewer words."
            raise ValueError(msg)
        same = f" {len(good & bad)} sentences are the same for good and bad parts." if good & bad else ""
        warnings.warn(f"{told}{same} Use fewer words.", stacklevel=2)


def load_clip(architecture: ClipArchitecture, pretrained: str) -> ClipBackbone:
    """The frozen CLIP with the weights of a file, given by its path, or of an open_clip tag ("openai").

    Weights that cannot be had are a FileNotFoundError, an unknown tag or unfit weights a ValueError.
    """
    path = Path(pretrained).expanduser()
    if not is_file(path):
        if path.suffix or len(path.parts) > 1:
            msg = f"`pretrained`: no weight file {path}. Pass an existing file or an open_clip tag such as 'openai'."
            raise FileNotFoundError(msg)
        path = find_pretrained(architecture.name, pretrained)
    return ClipBackbone(architecture, read_state_dict(path, "pretrained", torchscript=True), str(path))
