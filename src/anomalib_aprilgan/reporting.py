"""What a run of a model leaves, and how a region of interest looks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback
from PIL import Image

from .components import mend_optimizer_of_command_line
from .data.reading import display_image
from .data.reading_hooks import ReadingHooks
from .preparation.roi import roi_for_image
from .results.drawing import draw_roi
from .results.metric_inputs import MetricInputs
from .results.outputs import Outputs
from .results.table import DecisionsWriter
from .running import callbacks_of

_SIDE = 1024  # pixels of a drawing, at most


class Reporting:
    """Mix-in with the callbacks of a model, and drawings of its regions of interest."""

    table: DecisionsWriter
    outputs: Outputs
    metric_inputs: MetricInputs
    reading_hooks: ReadingHooks

    @property
    def own_callbacks(self) -> list[object]:
        """The callbacks that this model brings to a run, and takes with it when the run ends."""
        model: Any = self
        parts = [model.pre_processor, model.post_processor, model.evaluator, model.visualizer]
        written = [*self.outputs.before_table, *self.outputs.report, self.table]
        return [*parts, *written, self.metric_inputs, self.metric_inputs.after]

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """The callbacks that anomalib wants, the reading of images, and what writes results unless it is given."""
        model: Any = self
        mend_optimizer_of_command_line(model)
        own = AnomalibModule.configure_callbacks(model)
        given = callbacks_of(model)
        tables = [callback for callback in given if isinstance(callback, DecisionsWriter)] or [self.table]
        kinds = {type(callback) for callback in given}
        files, reports = (
            [callback for callback in wanted if type(callback) not in kinds]
            for wanted in (self.outputs.before_table, self.outputs.report)
        )
        own = [*(own if isinstance(own, Sequence) else [own]), self.metric_inputs, self.metric_inputs.after]
        # A row of the table before the drawing: where there is a drawing, there is a row. Regions before both, and the
        # report, which is made from all files, after them.
        return [*files, *tables, *own, *reports, self.reading_hooks]

    def draw_roi(self, image: str | Path, class_name: str | None = None) -> Image.Image:
        """A sample image with the region of interest of its class: what is not looked at is dark and gray.

        What is outlined is what the network looks at; see ``roi`` of ``AprilGAN`` for the border.

        Args:
            image: Its file.
            class_name: The class; not needed where there is one.

        Raises:
            FileNotFoundError: The image or the mask is missing.
            ValueError: The image is of another size than the region, or the class has no region.
        """
        model: Any = self
        inside = roi_for_image(model.settings, model.made, model.model, Path(image), class_name)
        return draw_roi(display_image(str(image), _SIDE), inside)
