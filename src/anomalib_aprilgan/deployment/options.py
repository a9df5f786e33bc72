"""What exports are asked to do beyond anomalib's own arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import check_bool, check_share, shown
from ..data.references import References
from ..settings import plain_paths


@dataclass(frozen=True)
class ExportOptions:
    """Options of exports, as the argument ``export_options`` of a model has them.

    Attributes:
        class_index: Whether all classes go into one graph, with the row of each image as a second input,
            ``class_index``; else the default class, or the only one.
        images: Normal images that a compressed model is compared with the original on, given like ``references``.
        max_flips: Share of their decisions in ``[0, 1]`` that compression may change; more are an error.
    """

    class_index: bool = False
    images: References | None = None
    max_flips: float | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> ExportOptions:
        """Options from plain data; an error names an entry that is unknown or out of range."""
        known = ("class_index", "images", "max_flips")
        if given is not None and not isinstance(given, Mapping):
            msg = f"`export_options` must be a mapping with some of {', '.join(known)}, got {shown(given)}."
            raise TypeError(msg)
        options = dict(given or {})
        unknown = [str(name) for name in options if name not in known]
        if unknown:
            msg = f"`export_options` must be some of {', '.join(known)}, got {', '.join(unknown)}."
            raise ValueError(msg)
        max_flips = options.get("max_flips")
        return cls(
            check_bool("export_options.class_index", options.get("class_index", False)),
            plain_paths(options.get("images"), "export_options.images"),
            None if max_flips is None else check_share("export_options.max_flips", max_flips),
        )
