"""How far the host runs ahead of a device, and how it waits: by polling, never in the driver, never without end."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Final

from dreammix_trt.core.errors import DeviceError
from dreammix_trt.core.seam import Stream
from dreammix_trt.engine.drivers.device import Device, Mark

AHEAD: Final = 2  # steps that may be enqueued but not done
PATIENCE: Final = 300.0  # seconds without an answer of the device after which it counts as lost
_POLL: Final = 0.0002


class Pace:
    """Waiting in one stream.

    lost: whether the device stopped answering; then nothing more can be asked of it.
    """

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device, self._stream = device, stream
        self._queued: deque[Mark] = deque()
        self.lost = False

    def begin(self) -> None:
        """Forget the steps counted so far."""
        self._queued.clear()

    def count_step(self) -> None:
        """Count an enqueued step, and wait until at most `AHEAD` steps are under way."""
        self._queued.append(self._device.mark(self._stream))
        while len(self._queued) > AHEAD:
            self.wait_for(self._queued.popleft())

    def wait_for(self, mark: Mark) -> None:
        """Wait for a point in the stream. Raises DeviceError when the device does not answer."""
        started = time.monotonic()
        while not mark.has_passed():
            if time.monotonic() - started > PATIENCE:
                self.lost = True
                raise self.describe_loss()
            time.sleep(_POLL)

    def wait(self) -> None:
        """Wait until nothing in the stream is running."""
        self.wait_for(self._device.mark(self._stream))
        self._device.synchronize(self._stream)

    def wait_quietly(self) -> None:
        """Wait after a request, however it ended: guests' rooms can only be closed when nothing runs in them."""
        try:
            if not self.lost:
                self.wait()
        except Exception as error:  # the request raises its own error already, or the next request will raise one
            logging.getLogger(__name__).debug("waiting after a request: %s", error)

    def check(self) -> None:
        """Raise DeviceError for a lost device."""
        if self.lost:
            raise self.describe_loss()

    def describe_loss(self) -> DeviceError:
        """The error for a device that does not answer."""
        error = DeviceError(
            f"{self._device.name} has not answered for {PATIENCE:.0f} s; restart the program, and the driver where "
            "that does not help"
        )
        error.lost = True
        return error
