"""What a model needs before it can be called: CLIP, adapters, text features, memory bank, in this order."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from torch import Tensor, nn

from .backbone import ClipArchitecture, load_clip
from .checkpoint import Provenance, check_shapes, load_resolved_adapters, resolve_adapters
from .prompts import PromptEnsemble
from .references import References, ReferenceSource, contents_of, read_reference
from .torch_model import AprilGANModel

logger = logging.getLogger(__name__)

_FROM_CHECKPOINT = "a checkpoint"


class Preparation:
    """Loads, encodes and remembers what the user asked for: each thing once, and again only for other data.

    Args:
        architecture: The CLIP to build.
        pretrained: Its weights: file or open_clip tag.
        adapters: The user's choice; ``None`` for fresh ones.
        class_name: The user's name of the object; else the datamodule's.
        prompts: States and templates.
        k_shot: Number of references.
        references: The user's references; else the datamodule's training images.
        seed: Seed of their draw.

    Attributes:
        provenance: What the adapters were trained on and for.
        reference_paths: The references that the memory bank remembers.
    """

    def __init__(
        self,
        architecture: ClipArchitecture,
        pretrained: str,
        adapters: str | None,
        class_name: str | None,
        prompts: PromptEnsemble,
        k_shot: int,
        references: References | None,
        seed: int,
    ) -> None:
        self.architecture = architecture
        self.pretrained = pretrained
        self.adapters = adapters
        self.class_name = class_name
        self.prompts = prompts
        self.k_shot = k_shot
        self.references = references
        self.seed = seed
        self.provenance = Provenance()
        self.reference_paths: list[str] = []
        self._adapter_source: str | None = None
        self._restored_reference_key: list[str] | None = None
        self._reference_key: list[str] | None = None
        self._reference_contents: list[str] | None = None
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
        if self._fingerprint not in {None, backbone.fingerprint}:
            msg = (
                f"`pretrained`: the checkpoint belongs to a CLIP with weights {self._fingerprint}, "
                f"{self.pretrained} has weights {backbone.fingerprint}."
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
        provenance.check(self.architecture, model.backbone.fingerprint, model.stages, source)
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
        names = self._class_names(model, datamodule, single=single)
        if names == model.class_names and not self._encode_anew:
            return
        known = {} if self._encode_anew else dict(zip(model.class_names, model.text_features, strict=True))
        self._encode_anew = False
        features = [
            known[name] if name in known else model.backbone.encode_states(*self.prompts.sentences(name))
            for name in names
        ]
        model.set_classes(names, torch.stack(features))
        logger.info("Class names in the prompts: %s", ", ".join(names))

    def fill_memory_bank(
        self,
        model: AprilGANModel,
        datamodule: AnomalibDataModule | None,
        pre_processor: nn.Module | None,
        *,
        optional: bool,
    ) -> Tensor | None:
        """Remember the references, unless they are remembered already.

        Args:
            model: Its bank is filled.
            datamodule: Tells the references where the user gave none.
            pre_processor: From images as they are to CLIP's input.
            optional: Whether there may be none (a validation without data).

        Returns:
            Where the bank was filled anew, what :meth:`AprilGANModel.remember` returned; else ``None``.

        Raises:
            FileNotFoundError: A reference is missing.
            ValueError: There are no references, too few, or an unreadable one.
        """
        if not self.k_shot:
            return None
        source = ReferenceSource(self.k_shot, self.seed, self.references, datamodule)
        if not source.is_available:
            if model.memory_bank.k_shot or optional:
                return None
            msg = (
                f"`k_shot={self.k_shot}` needs normal images: pass `references`, or a datamodule with training images."
            )
            raise ValueError(msg)
        class_names = getattr(datamodule, "class_names", ())
        if len(class_names) > 1 and self.class_name is None:
            msg = (
                f"`k_shot={self.k_shot}`: a memory bank holds one class, the datamodule has {class_names}. "
                "Inspect one class at a time."
            )
            raise ValueError(msg)
        filled = model.memory_bank.k_shot > 0
        if filled and source.key == self._restored_reference_key:
            return None  # the checkpoint's: its images may be long gone
        chosen = source.draw()
        contents = contents_of(chosen)
        if filled and contents == self._reference_contents:
            return None
        pre_process = pre_processor or nn.Identity()
        images = torch.cat([pre_process(read_reference(file).to(model.text_features.device)) for file in chosen])
        held_out_maxima = model.remember(images)
        self._restored_reference_key = None
        self._reference_key, self._reference_contents = source.key, contents
        self.reference_paths = [str(file) for file in chosen]
        logger.info("References: %s", ", ".join(self.reference_paths))
        return held_out_maxima

    def note_training(self, model: AprilGANModel, datamodule: AnomalibDataModule | None) -> None:
        """Write down what the adapters will have seen, beside what they have seen before."""
        before = self.provenance.trained_on
        self.provenance = Provenance.of_training(
            datamodule, self.architecture, model.backbone.fingerprint, model.stages
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
            "class_names": list(model.class_names),
            "fingerprint": model.backbone.fingerprint if model.has_backbone else self._fingerprint,
            "clip": self._clip_settings(model),
            "prompts": self._prompt_lists(),
            "provenance": self.provenance.to_dict(),
            "references": self.reference_paths,
            "reference_key": self._restored_reference_key or self._reference_key,
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
        if model.has_backbone and learned["fingerprint"] not in {None, model.backbone.fingerprint}:
            msg = (
                f"`pretrained`: the checkpoint belongs to a CLIP with weights {learned['fingerprint']}, "
                f"the model has weights {model.backbone.fingerprint}."
            )
            raise ValueError(msg)
        ours = self._clip_settings(model)
        for name, theirs in learned["clip"].items():
            if theirs != ours[name]:
                msg = f"`{name}` of the checkpoint is {theirs}, of the model {ours[name]}. Set them alike."
                raise ValueError(msg)
        prefix = "adapters."
        adapters = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        check_shapes(adapters, model.adapters.state_dict(), "the checkpoint")
        model.set_classes(learned["class_names"], torch.empty_like(state_dict["text_features"]))
        model.memory_bank.tokens = torch.empty_like(state_dict["memory_bank.tokens"])
        if model.memory_bank.k_shot != self.k_shot:
            logger.warning(
                "The checkpoint remembers %s references; `k_shot` is %s.", model.memory_bank.k_shot, self.k_shot
            )
        self._encode_anew = learned["prompts"] != self._prompt_lists()
        self.provenance = Provenance.from_dict(learned["provenance"])
        self.reference_paths = learned["references"]
        self._restored_reference_key = learned["reference_key"]
        self._fingerprint = learned["fingerprint"]
        self._adapter_source = _FROM_CHECKPOINT

    def _class_names(
        self, model: AprilGANModel, datamodule: AnomalibDataModule | None, *, single: bool
    ) -> tuple[str, ...]:
        if self.class_name is not None:
            return (self.class_name,)
        if datamodule is not None:
            class_names = getattr(datamodule, "class_names", None)
            if class_names and not single:
                return tuple(class_names)
            if datamodule.category:
                return (datamodule.category,)
        if len(model.class_names) == 1 or (model.class_names and not single):
            return model.class_names  # what was encoded or restored before
        return ("object",)

    def _clip_settings(self, model: AprilGANModel) -> dict[str, Any]:
        """What a checkpoint's tensors rest on: other settings would give other numbers without a word."""
        return {
            "stages": list(model.stages),
            "memory_stages": list(model.memory_stages),
            "quick_gelu": self.architecture.quick_gelu,
            "image_size": list(self.architecture.image_size),
        }

    def _prompt_lists(self) -> dict[str, list[str]]:
        return {name: list(entries) for name, entries in vars(self.prompts).items()}
