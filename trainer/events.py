"""TensorBoard events: the loss and the learning rate of every step, and pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dreammix_trt.core.errors import InputError, MissingExtraError
from dreammix_trt.core.extras import list_missing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class Events:
    """What one run tells TensorBoard. Use it as a context manager, or call `close`.

    The first step that is told is where this run begins: what an earlier one told in the same folder of that step or a
    later one counts no more. So a training that is resumed goes on, and one that begins anew begins anew. Until then
    nothing is written, so processes that do not lead write nothing.

    Events that fail are reported once; the training goes on.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises MissingExtraError without `tensorboard`, InputError for a folder that is a file."""
        if list_missing(["tensorboard.summary"]):  # an own folder called tensorboard is found as a package, too
            raise MissingExtraError(
                "tensorboard is not installed, --tensorboard needs it: pip install 'dreammix-trt[train,tensorboard]'"
            )
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"--tensorboard {self.folder} is a file; name a folder for the events")
        self._writer: SummaryWriter | None = None
        self._failed = False

    def add_step(self, step: int, loss: float, rate: float) -> None:
        """A step of the optimizer. step: its number, from 1. rate: its learning rate."""

        def add(writer: SummaryWriter) -> None:
            writer.add_scalar("loss", loss, step)
            writer.add_scalar("learning_rate", rate, step)

        self._write(step, add)

    def add_picture(self, step: int, name: str, file: Path) -> None:
        """A picture file, as of after so many steps. name: of what it shows, the same at other steps."""

        def add(writer: SummaryWriter) -> None:
            with Image.open(file) as image:
                writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

        self._write(step, add)

    def _write(self, step: int, add: Callable[[SummaryWriter], None]) -> None:
        if self._failed:
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.folder), purge_step=step)
            add(self._writer)
            self._writer.flush()  # each step, in less than a millisecond: a kill leaves no gap before the checkpoint
        except OSError as error:
            self._failed = True
            log.warning("%s: no events from step %d on: %s", self.folder, step, error)

    def close(self) -> None:
        """Close the file."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.close()
        except OSError as error:
            if not self._failed:
                log.warning("%s: the last events are lost: %s", self.folder, error)

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
