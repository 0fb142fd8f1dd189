"""The context of one GPU: where calls are made, from any thread."""

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
    """Of the index-th GPU. One capture at a time in each thread; closed: no call is made any more."""

    def __init__(self, bindings: Bindings, index: int, name: str) -> None:
        self.bindings, self.name, self.closed = bindings, name, False
        self._index, self._thread = index, threading.local()

    @property
    def runtime(self) -> Any:
        """`cuda.bindings.runtime`."""
        return self.bindings.runtime

    def make_current(self) -> None:
        """Calls may come from any thread, and others in this process may have chosen another device in it."""
        if self.closed:
            raise DeviceError(f"the {self.name} is used after it was closed")
        self.bindings.call(self.runtime.cudaSetDevice, self._index)

    def call(self, name: str, *arguments: Any) -> Any:
        """What a runtime function gives, called here. Raises DeviceError or OutOfMemoryError."""
        self.make_current()
        return self.bindings.call(getattr(self.runtime, name), *arguments)

    def call_quietly(self, name: str, *arguments: Any) -> None:
        """A call on the way out: what goes wrong is logged."""
        try:
            self.call(name, *arguments)
        except DeviceError as error:
            _LOG.warning("closing the %s: %s", self.name, error)

    @contextmanager
    def enter_capture(self) -> Iterator[None]:
        """This thread captures within the block."""
        self._thread.capturing = True
        try:
            yield
        finally:
            self._thread.capturing = False

    def check_outside_capture(self, what: str) -> None:
        """Raise DeviceError where this thread captures; what: that is not allowed then."""
        if getattr(self._thread, "capturing", False):
            raise DeviceError(f"{what} is not allowed within a capture")


def handle_of(stream: Stream) -> int:
    """Raises DeviceError for a stream of another kind of device."""
    handle = stream.handle
    if handle is None:
        raise DeviceError("the stream is none of a GPU")
    return handle
