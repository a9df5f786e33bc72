"""The network: CLIP, adapters and memory bank, from images to scores and maps (arXiv:2305.17382, fig. 1)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from .adapters import LinearAdapters
from .backbone import ClipBackbone, VisionOutput
from .memory_bank import MemoryBank
from .scoring import distance_map, nearest_normal_distance, text_logits, text_probability, text_probability_maps


class AprilGANModel(nn.Module):
    """Zero-shot and few-shot anomaly scores and maps from one vision pass per image.

    Text features are held per class name in the buffer ``text_features`` ``(N, D, 2)``, so that a
    forward pass never needs the text tower. The frozen CLIP is attached later than the rest:
    it is large, and not needed to hold, count or optimise what is learned.

    Args:
        adapters: One linear map per stage of ``stages``.
        memory_bank: Remembered normal patches of ``memory_stages``; empty for zero-shot.
        stages: Tapped blocks of the zero-shot map, ascending, counted from 1.
        memory_stages: Tapped blocks of the memory bank, ascending, counted from 1.
    """

    def __init__(
        self,
        adapters: LinearAdapters,
        memory_bank: MemoryBank,
        stages: Sequence[int],
        memory_stages: Sequence[int],
    ) -> None:
        super().__init__()
        self.adapters = adapters
        self.memory_bank = memory_bank
        self.stages = tuple(stages)
        self.memory_stages = tuple(memory_stages)
        self.class_names: tuple[str, ...] = ()
        self.register_buffer("text_features", torch.empty(0))
        self.text_features: Tensor
        self._backbone: ClipBackbone | None = None

    @property
    def backbone(self) -> ClipBackbone:
        """The frozen CLIP.

        Raises:
            RuntimeError: None was attached yet.
        """
        if self._backbone is None:
            msg = "The model has no CLIP yet: call `AprilGAN.setup('predict')` first."
            raise RuntimeError(msg)
        return self._backbone

    @property
    def has_backbone(self) -> bool:
        """Whether a CLIP was attached."""
        return self._backbone is not None

    def attach_backbone(self, backbone: ClipBackbone) -> None:
        """Give the model its frozen CLIP."""
        self._backbone = backbone

    def set_classes(self, class_names: Sequence[str], text_features: Tensor) -> None:
        """Replace the classes.

        Args:
            class_names: ``N`` names.
            text_features: ``(N, D, 2)``, unit columns: normal, anomalous.
        """
        self.class_names = tuple(class_names)
        self.text_features = text_features

    def class_index(self, class_names: Sequence[str]) -> Tensor:
        """Rows of ``text_features`` for the class names of a batch.

        Raises:
            ValueError: A name whose text was not encoded.
        """
        unknown = sorted(set(class_names) - set(self.class_names))
        if unknown:
            msg = f"`class_names` must be out of {self.class_names}, got {unknown}."
            raise ValueError(msg)
        index = [self.class_names.index(name) for name in class_names]
        return torch.tensor(index, device=self.text_features.device)

    def forward(self, images: Tensor, class_index: Tensor | None = None) -> InferenceBatch:
        """Anomaly score and map of every image.

        Args:
            images: ``(B, 3, H, W)``, resized and normalised.
            class_index: ``(B,)`` rows of ``text_features``; not needed for a model of one class.

        Returns:
            ``pred_score`` ``(B,)``, the text probability in ``[0, 1]``, and ``anomaly_map``
            ``(B, H, W)`` in ``[0, S]``, or ``[0, S + 2 S']`` with a memory bank of ``S'`` stages.
        """
        return self.infer(images, class_index)[0]

    def infer(self, images: Tensor, class_index: Tensor | None = None) -> tuple[InferenceBatch, list[Tensor]]:
        """What :meth:`forward` returns, and the probability maps it rests on, for the loss.

        Returns:
            Scores and maps, and per stage ``(B, 2, H, W)`` probabilities: normal, anomalous.
        """
        output = self.encode(images)
        size = (images.shape[-2], images.shape[-1])
        text_features = self._text_features_of(class_index)
        with _full_precision(images):
            probabilities = self._probability_maps(output, text_features, size)
            anomaly_map = _zero_shot_map(probabilities)
            if self.memory_bank.k_shot:
                anomaly_map = anomaly_map + self._memory_map(self._memory_tokens(output), size)
            pred_score = text_probability(output.image_feature.float(), text_features)
        return InferenceBatch(pred_score=pred_score, anomaly_map=anomaly_map), probabilities

    def stage_probabilities(self, images: Tensor, class_index: Tensor | None = None) -> list[Tensor]:
        """Probability maps of every stage, with gradients for the adapters.

        Args:
            images: ``(B, 3, H, W)``, resized and normalised.
            class_index: As in :meth:`forward`.

        Returns:
            Per stage ``(B, 2, H, W)``: normal, anomalous.
        """
        output = self.encode(images)
        with _full_precision(images):
            size = (images.shape[-2], images.shape[-1])
            return self._probability_maps(output, self._text_features_of(class_index), size)

    @torch.no_grad()
    def encode(self, images: Tensor) -> VisionOutput:
        """One pass of the frozen tower over the union of both stage lists."""
        output: VisionOutput = self.backbone(images, self._tapped)
        return output

    @torch.no_grad()
    def remember(self, images: Tensor) -> Tensor:
        """Fill the memory bank with normal images, one vision pass each.

        Args:
            images: ``(K, 3, H, W)``, resized and normalised.

        Returns:
            Maximum of the few-shot map of every image, the image itself held out of the bank: ``(K,)``, or
            empty where nothing can be held out (a single image) or the images may be of several classes.
        """
        size = (images.shape[-2], images.shape[-1])
        measurable = len(images) > 1 and len(self.class_names) == 1
        tokens, zero_shot_maps = [], []
        for image in torch.split(images, 1):
            output = self.encode(image)
            tokens.append(self._memory_tokens(output))
            if measurable:
                with _full_precision(image):
                    probabilities = self._probability_maps(output, self._text_features_of(None), size)
                    zero_shot_maps.append(_zero_shot_map(probabilities))
        self.memory_bank.fill([torch.cat(stage) for stage in zip(*tokens, strict=True)])
        maxima = [
            (zero_shot_map + self._memory_map(tokens[shot], size, without=shot)).amax()
            for shot, zero_shot_map in enumerate(zero_shot_maps)
        ]
        return torch.stack(maxima) if maxima else images.new_empty(0)

    @property
    def _tapped(self) -> list[int]:
        return sorted({*self.stages, *self.memory_stages})

    def _memory_tokens(self, output: VisionOutput) -> list[Tensor]:
        tokens = zip(self._tapped, output.patch_tokens, strict=True)
        return [stage_tokens for stage, stage_tokens in tokens if stage in self.memory_stages]

    def _probability_maps(self, output: VisionOutput, text_features: Tensor, size: tuple[int, int]) -> list[Tensor]:
        tokens = zip(self._tapped, output.patch_tokens, strict=True)
        features = self.adapters([stage_tokens for stage, stage_tokens in tokens if stage in self.stages])
        grid = self.backbone.architecture.grid
        return [text_probability_maps(text_logits(stage, text_features), grid, size) for stage in features]

    def _memory_map(self, patch_tokens: list[Tensor], size: tuple[int, int], *, without: int | None = None) -> Tensor:
        grid = self.backbone.architecture.grid
        remembered = self.memory_bank.stages(without=without)
        maps = [
            distance_map(nearest_normal_distance(tokens.float(), bank), grid, size)
            for tokens, bank in zip(patch_tokens, remembered, strict=True)
        ]
        return torch.stack(maps).sum(dim=0)

    def _text_features_of(self, class_index: Tensor | None) -> Tensor:
        """``(B, D, 2)``, or ``(D, 2)`` where every image is of the one class."""
        if not self.class_names:
            msg = "The model has no text features yet: call `AprilGAN.setup('predict')` first."
            raise RuntimeError(msg)
        if class_index is not None:
            return self.text_features[class_index].float()
        if len(self.class_names) > 1:
            msg = f"`class_index` is needed to choose among the classes {self.class_names}, got None."
            raise ValueError(msg)
        return self.text_features[0].float()


def _zero_shot_map(probabilities: Sequence[Tensor]) -> Tensor:
    """Anomalous probability, summed over the stages (the authors do not average)."""
    return torch.stack([maps[:, 1] for maps in probabilities]).sum(dim=0)


def _full_precision(images: Tensor) -> AbstractContextManager[object]:
    """Context in which scores and maps are computed in fp32, whatever the trainer's precision.

    A half-precision logit near 25 has steps of 1/64 to 1/8: scores would tie and maps band.
    """
    device = images.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
