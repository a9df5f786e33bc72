"""What a run writes beside the table of decisions and the drawings, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback

from ..checks import check_choice, check_int, check_list
from .region_files import CocoWriter, MapWriter, MaskWriter, RegionsWriter
from .report import ReportWriter

# By the name that `outputs` takes.
OUTPUTS: dict[str, Any] = {
    "regions": RegionsWriter,
    "coco": CocoWriter,
    "masks": MaskWriter,
    "maps": MapWriter,
    "report": ReportWriter,
}
# What a report is made from.
_OF_REPORT = ("regions", "maps")


class Outputs:
    """The callbacks that write what was asked for.

    Args:
        names: Some of ``OUTPUTS``; a report brings regions and maps with it.
        min_area: Regions of fewer pixels of the image file are left out.
    """

    def __init__(self, names: Sequence[str] | None, min_area: int) -> None:
        given = [] if names is None else check_list("outputs", names, f"a list of {', '.join(OUTPUTS)}")
        self.names = [check_choice("outputs", name, OUTPUTS) for name in given]
        check_int("min_area", min_area, 0, hint=" pixels")
        wanted = {*self.names, *(_OF_REPORT if "report" in self.names else ())}
        self.before_table: list[Callback] = [
            kind(min_area=min_area) for name, kind in OUTPUTS.items() if name in wanted and name != "report"
        ]
        self.report: list[Callback] = [ReportWriter()] if "report" in wanted else []
