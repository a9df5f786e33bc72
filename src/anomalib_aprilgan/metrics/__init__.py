"""Metrics of images and pixels: exact, in bounded memory, and for anomalib's ``Evaluator``."""

from .exact import METRICS, measure
from .of_batches import AUPRO, ChallengeF1Max, PublishedAUPRO
from .streaming import StreamingMetrics

__all__ = ["AUPRO", "METRICS", "ChallengeF1Max", "PublishedAUPRO", "StreamingMetrics", "measure"]
