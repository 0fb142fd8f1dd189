"""The context of one GPU: calls are made in it, from any thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dreammix_trt.core.errors import DeviceError
from dreammix_trt.core.seam import Stream
from dreammix_trt.engine.drivers.cuda.bindings import Bindings

_LOG = logging.getLogger(__name__)


class Context:
    """The context of the index-th GPU. One capture at a time in each thread.

    closed: whether it refuses calls.
    """

    def __init__(self, bindings: Bindings, index: int, name: str) -> None:
        self.bindings, self.name, self.closed = bindings, name, False
        self._index, self._thread = index, threading.local()

    @property
    def runtime(self) -> Any:
        """`cuda.bindings.runtime`."""
        return self.bindings.runtime

    def make_current(self) -> None:
        """Choose this device in the present thread, where other code may have chosen another one."""
        if self.closed:
            raise DeviceError(f"the {self.name} is used after it was closed")
        self.bindings.call(self.runtime.cudaSetDevice, self._index)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a runtime function on this device and return its result. Raises DeviceError or OutOfMemoryError."""
        self.make_current()
        return self.bindings.call(getattr(self.runtime, name), *arguments)

    def call_quietly(self, name: str, *arguments: Any) -> None:
        """Call a runtime function while closing. An error is logged."""
        try:
            self.call(name, *arguments)
        except DeviceError as error:
            _LOG.warning("closing the %s: %s", self.name, error)

    @contextmanager
    def enter_capture(self) -> Iterator[None]:
        """Note that this thread captures within the block."""
        self._thread.capturing = True
        try:
            yield
        finally:
            self._thread.capturing = False

    def check_outside_capture(self, what: str) -> None:
        """Raise DeviceError where this thread captures.

        what: the action that is not allowed then.
        """
        if getattr(self._thread, "capturing", False):
            raise DeviceError(f"{what} is not allowed within a capture")


def handle_of(stream: Stream) -> int:
    """The stream's handle. Raises DeviceError for a stream of another kind of device."""
    handle = stream.handle
    if handle is None:
        raise DeviceError("the stream does not belong to a GPU")
    return handle
