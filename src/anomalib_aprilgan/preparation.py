"""What a model needs before it can be called: CLIP, adapters, text features, memory bank, in this order."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from torch import Tensor, nn

from .checkpoint import Provenance, check_shapes, load_resolved_adapters, resolve_adapters
from .clip.architecture import ClipArchitecture
from .clip.backbone import load_clip
from .clip.prompts import ALIASES, PromptEnsemble
from .data.gathering import class_name_of
from .data.pre_processing import prepared
from .data.references import References, ReferenceSource, content_digests, read_reference, references_of_class
from .network.model import AprilGANModel, HeldOut
from .network.tiling import tile_positions

logger = logging.getLogger(__name__)

_FROM_CHECKPOINT = "a checkpoint"
# What checkpoints were made with that do not say it.
_EARLIER_SETTINGS = {"tile_size": None, "smoothing_sigma": 0.0, "neighbourhood": 1, "top_share": 0.0}
# What memory banks and the bounds of the fused score rest on, and nothing else.
_OF_REFERENCES = {"neighbourhood", "top_share"}


class Preparation:
    """Loads, encodes and remembers what the user asked for: each thing once, and again only for other data.

    Args:
        architecture: The CLIP to build.
        pretrained: Its weights: file or open_clip tag.
        adapters: The user's choice; ``None`` for fresh ones.
        class_names: The user's names: classes, and the words that stand for each in the prompts; else the datamodule's.
        prompts: States and templates.
        class_aliases: Whether names without words of their own are looked up among :data:`prompts.ALIASES`.
        k_shot: Number of references.
        references: The user's references; else the datamodule's training images.
        seed: Seed of their draw.
        tile_size: Side of the tiles that references are cut into; ``None`` for whole ones.
        top_share: Share of a map's pixels whose mean stands for it in the fused score; 0 for its maximum.

    Attributes:
        provenance: What the adapters were trained on and for.
        reference_paths: By class, the references that its memory bank remembers.
    """

    def __init__(
        self,
        architecture: ClipArchitecture,
        pretrained: str,
        adapters: str | None,
        class_names: Mapping[str, str] | None,
        prompts: PromptEnsemble,
        class_aliases: bool,
        k_shot: int,
        references: References | None,
        seed: int,
        tile_size: int | None = None,
        top_share: float = 0.0,
    ) -> None:
        self.architecture = architecture
        self.pretrained = pretrained
        self.adapters = adapters
        self.class_names = class_names
        self.prompts = prompts
        self.class_aliases = class_aliases
        self.k_shot = k_shot
        self.references = references
        self.seed = seed
        self.tile_size = tile_size
        self.top_share = top_share
        self.provenance = Provenance()
        self.reference_paths: dict[str, list[str]] = {}
        self._adapter_source: str | None = None
        # By class: what was drawn, and the files' state; none of the latter for what a checkpoint brought.
        self._reference_keys: dict[str, list[str]] = {}
        self._reference_contents: dict[str, list[str]] = {}
        self._words: dict[str, str] = {}
        self._fingerprint: str | None = None
        self._encode_anew = False

    def attach_backbone(self, model: AprilGANModel, device: torch.device) -> None:
        """Give the model its CLIP.

        Raises:
            FileNotFoundError: Its weights cannot be had.
            ValueError: They are not those of the architecture, or of the checkpoint that was loaded.
        """
        if model.has_backbone:
            return
        backbone = load_clip(self.architecture, self.pretrained)
        if self._fingerprint is not None and not backbone.matches(self._fingerprint):
            msg = (
                f"`pretrained`: the checkpoint belongs to a CLIP with weights {self._fingerprint}, "
                f"{self.pretrained} has weights {backbone.digest}."
            )
            raise ValueError(msg)
        model.attach_backbone(backbone.to(device))

    def load_adapters(self, model: AprilGANModel, datamodule: AnomalibDataModule | None) -> None:
        """Given adapters, unless a checkpoint brought its own; ``"auto"`` looks at the data set."""
        if self.adapters is None or self._adapter_source == _FROM_CHECKPOINT:
            return
        if datamodule is None and self._adapter_source is not None:
            return  # a plain folder goes on with what "auto" chose before
        source = resolve_adapters(self.adapters, getattr(datamodule, "name", None), self.architecture)
        if source == self._adapter_source:
            return
        state_dict, provenance = load_resolved_adapters(source)
        recorded, digest = provenance.fingerprint, model.backbone.digest
        if recorded is not None and model.backbone.matches(recorded):
            digest = recorded
        provenance.check(self.architecture, digest, model.stages, source)
        check_shapes(state_dict, model.adapters.state_dict(), source)
        model.adapters.load_state_dict(state_dict)
        self.provenance = provenance
        self._adapter_source = source
        logger.info("Adapters: %s, trained on %s", source, provenance.trained_on or "unknown data")

    def encode_classes(self, model: AprilGANModel, datamodule: AnomalibDataModule | None, *, single: bool) -> None:
        """Text features of the classes at hand; the text tower runs for new names only.

        Args:
            model: Where they go.
            datamodule: Tells the names where the user gave none.
            single: Whether the images to come do not tell their class (prediction, export).
        """
        words = self._class_words(model, datamodule, single=single)
        if words == self._words and tuple(words) == model.class_names and not self._encode_anew:
            return
        known = {} if self._encode_anew else dict(zip(model.class_names, model.text_features, strict=True))
        self._encode_anew = False
        features = [
            known[name]
            if name in known and self._words.get(name) == said
            else model.backbone.encode_states(*self.prompts.of_class(name).sentences(said))
            for name, said in words.items()
        ]
        if len(words) == len(model.class_names) == 1:
            self._rename(model.class_names[0], *words)
        model.set_classes(tuple(words), torch.stack(features))
        self._words = words
        logger.info("Class names in the prompts: %s", ", ".join(words.values()))

    def fill_memory_bank(
        self,
        model: AprilGANModel,
        datamodule: AnomalibDataModule | None,
        pre_processor: nn.Module | None,
        *,
        optional: bool,
    ) -> dict[int, HeldOut]:
        """Remember the references of every class, unless they are remembered already.

        Args:
            model: Its banks are filled.
            datamodule: Tells the references where the user gave none.
            pre_processor: From images as they are to CLIP's input.
            optional: Whether there may be none (a validation without data).

        Returns:
            For every class whose bank was filled anew, by its row, what :meth:`AprilGANModel.remember` returned.

        Raises:
            FileNotFoundError: A reference is missing.
            ValueError: A class has no references, too few, or an unreadable one.
        """
        if not self.k_shot:
            return {}
        filled = {}
        for number, name in enumerate(model.class_names):
            held_out = self._fill_one(model, number, name, datamodule, pre_processor, optional=optional)
            if held_out is not None:
                filled[number] = held_out
        return filled

    def _fill_one(
        self,
        model: AprilGANModel,
        number: int,
        name: str,
        datamodule: AnomalibDataModule | None,
        pre_processor: nn.Module | None,
        *,
        optional: bool,
    ) -> HeldOut | None:
        bank = model.memory_bank(number)
        source = self._reference_source(name, model.class_names, datamodule)
        if not source.is_available:
            if bank.k_shot or optional:
                return None
            msg = (
                f"`k_shot={self.k_shot}` needs normal images of {name!r}: pass `references`, or a datamodule with "
                "training images."
            )
            raise ValueError(msg)
        key = [source.name, str(source.k_shot), str(source.seed)]
        remembered = bank.k_shot > 0 and key == self._reference_keys.get(name)
        if remembered and name not in self._reference_contents:
            return None  # the checkpoint's: its images may be long gone
        chosen = source.draw()
        contents = [*content_digests(chosen)]
        if bank.k_shot and contents == self._reference_contents.get(name):
            return None
        device = model.text_features.device
        images = [read_reference(file).to(device) for file in chosen]
        pictures = [prepared(pre_processor, self._tiles_of(image)) for image in images]
        tiles = [len(tiles) for tiles in pictures]
        held_out = model.remember(torch.cat(pictures), number, tiles, self.top_share)
        self._reference_keys[name], self._reference_contents[name] = key, contents
        self.reference_paths[name] = [str(file) for file in chosen]
        logger.info("References of %s: %s", name, ", ".join(self.reference_paths[name]))
        return held_out

    def _reference_source(
        self, name: str, class_names: Sequence[str], datamodule: AnomalibDataModule | None
    ) -> ReferenceSource:
        """Where the references of a class come from."""
        if self.references is not None:
            given = references_of_class(self.references, name, class_names)
            return ReferenceSource(self.k_shot, self.seed, given, datamodule)
        tells = getattr(datamodule, "class_names", None)
        own = len(class_names) == 1 or (
            name in tells if tells else (datamodule is not None and class_name_of(datamodule) == name)
        )
        return ReferenceSource(
            self.k_shot, self.seed, None, datamodule if own else None, name if tells and name in tells else None
        )

    def words_of(self, class_name: str) -> str:
        """The words that stand for a class in the prompts."""
        return self._words.get(class_name, class_name)

    def number_of_tiles(self, picture: Tensor) -> int:
        """Number of images that a memory bank remembers of a reference ``(1, 3, H, W)``."""
        return len(self._tiles_of(picture))

    def _tiles_of(self, picture: Tensor) -> Tensor:
        """``(T, 3, H, W)``: the picture ``(1, 3, H, W)``, or its tiles side by side."""
        if self.tile_size is None:
            return picture
        height, width = min(self.tile_size, picture.shape[-2]), min(self.tile_size, picture.shape[-1])
        corners = tile_positions(picture.shape[-2], picture.shape[-1], self.tile_size, 0.0)
        return torch.cat([picture[..., top : top + height, left : left + width] for top, left in corners])

    def _rename(self, before: str, after: str) -> None:
        """The only class has another name now: its references are the same."""
        if before == after:
            return
        by_class: tuple[dict[str, list[str]], ...] = (
            self.reference_paths,
            self._reference_keys,
            self._reference_contents,
        )
        for entries in by_class:
            if before in entries:
                entries[after] = entries.pop(before)

    def note_training(self, model: AprilGANModel, datamodule: AnomalibDataModule | None) -> None:
        """Write down what the adapters will have seen, beside what they have seen before."""
        before = self.provenance.trained_on
        self.provenance = Provenance.of_training(
            datamodule, self.architecture, model.backbone.digest, model.stages
        ).with_earlier(before)

    def warn_of_seen_data(self, datamodule: AnomalibDataModule | None) -> None:
        """A warning that cannot be missed where the data under test trained the adapters."""
        seen = self.provenance.overlap(datamodule)
        if seen:
            rule = "!" * 100
            warnings.warn(
                f"\n{rule}\nNOT ZERO-SHOT: the adapters were trained on {seen}, which is the data under test. "
                f"The figures will be too good. Use adapters trained on other data, e.g. `adapters='auto'`.\n{rule}",
                stacklevel=2,
            )

    def to_checkpoint(self, model: AprilGANModel) -> dict[str, Any]:
        """Plain data that a checkpoint needs beside the tensors."""
        return {
            "class_names": {name: self.words_of(name) for name in model.class_names},
            "fingerprint": model.backbone.digest if model.has_backbone else self._fingerprint,
            "clip": self._clip_settings(model),
            "prompts": self.prompts.to_dict(),
            "provenance": self.provenance.to_dict(),
            "references": self.reference_paths,
            "reference_keys": self._reference_keys,
        }

    def from_checkpoint(
        self, model: AprilGANModel, learned: Mapping[str, Any], state_dict: Mapping[str, Tensor]
    ) -> None:
        """Take over what :meth:`to_checkpoint` returned, and make room in the model for the tensors.

        Args:
            model: Its classes and bank take the sizes of the checkpoint's.
            learned: What :meth:`to_checkpoint` returned.
            state_dict: The checkpoint's tensors, named from the model on.

        Raises:
            ValueError: The checkpoint belongs to another CLIP or other stages.
        """
        recorded = learned["fingerprint"]
        if model.has_backbone and recorded is not None and not model.backbone.matches(recorded):
            msg = (
                f"`pretrained`: the checkpoint belongs to a CLIP with weights {recorded}, "
                f"the model has weights {model.backbone.digest}."
            )
            raise ValueError(msg)
        few_shot = any(learned["references"].values())
        given = _EARLIER_SETTINGS | learned["clip"]
        for name, ours in self._clip_settings(model).items():
            if given[name] != ours and (name not in _OF_REFERENCES or few_shot):
                msg = f"`{name}` of the checkpoint is {given[name]}, of the model {ours}. Set them alike."
                raise ValueError(msg)
        prefix = "adapters."
        adapters = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        check_shapes(adapters, model.adapters.state_dict(), "the checkpoint")
        self._words = dict(learned["class_names"])
        model.set_classes(tuple(self._words), torch.empty_like(state_dict["text_features"]))
        for number in range(len(self._words)):
            bank = model.memory_bank(number)
            bank.tokens = torch.empty_like(state_dict[f"memory_banks.{number}.tokens"])
        self._encode_anew = learned["prompts"] != self.prompts.to_dict()
        self.provenance = Provenance.from_dict(learned["provenance"])
        self.reference_paths = learned["references"]
        for name, paths in self.reference_paths.items():
            if len(paths) != self.k_shot:
                logger.warning(
                    "The checkpoint remembers %s references of %s; `k_shot` is %s.", len(paths), name, self.k_shot
                )
        self._reference_keys = learned["reference_keys"]
        self._reference_contents = {}
        self._fingerprint = learned["fingerprint"]
        self._adapter_source = _FROM_CHECKPOINT

    def _class_words(
        self, model: AprilGANModel, datamodule: AnomalibDataModule | None, *, single: bool
    ) -> dict[str, str]:
        """The classes, and the words that stand for each in the prompts."""
        if self.class_names is not None:
            return {name: self._said(name) if name == said else said for name, said in self.class_names.items()}
        if datamodule is not None:
            class_names = getattr(datamodule, "class_names", None)
            if class_names and not single:
                return {name: self._said(name) for name in class_names}
            name = class_name_of(datamodule)
            if name != "object":
                return {name: self._said(name)}
        if len(model.class_names) == 1 or (model.class_names and not single):
            return {name: self._words.get(name, name) for name in model.class_names}  # encoded or restored before
        return {"object": "object"}

    def _said(self, name: str) -> str:
        return ALIASES.get(name, name) if self.class_aliases else name

    def _clip_settings(self, model: AprilGANModel) -> dict[str, Any]:
        """What a checkpoint's tensors rest on: other settings would give other numbers without a word."""
        return {
            "stages": list(model.stages),
            "memory_stages": list(model.memory_stages),
            "quick_gelu": self.architecture.quick_gelu,
            "image_size": list(self.architecture.image_size),
            "tile_size": self.tile_size if self.k_shot else None,  # banks remember tiles
            "smoothing_sigma": model.smoothing_sigma,
            "neighbourhood": model.neighbourhood,
            "top_share": self.top_share,
        }
