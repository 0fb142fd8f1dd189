"""Marks in a stream: events, which are reused."""

from __future__ import annotations

import threading
from typing import Any

from dreammix_trt.core.seam import Stream
from dreammix_trt.engine.drivers.cuda.context import Context, handle_of
from dreammix_trt.engine.drivers.device import Mark


class Marks:
    """The events of one device."""

    def __init__(self, context: Context) -> None:
        self._context, self._lock = context, threading.Lock()
        self._events: list[Any] = []
        self._spare: dict[bool, list[Any]] = {False: [], True: []}

    def make(self, stream: Stream, timed: bool) -> CudaMark:
        """Make a mark at the present end of a stream."""
        self._context.check_outside_capture("a mark")
        handle = handle_of(stream)
        try:
            event = self._spare[timed].pop()
        except IndexError:
            event = self._new_event(timed)
        mark = CudaMark(self, event, timed)
        self._context.call("cudaEventRecord", event, handle)
        return mark

    def has_passed(self, event: Any) -> bool:
        """Whether the work before an event is done. An error of that work is raised."""
        context, runtime = self._context, self._context.runtime
        context.check_outside_capture("asking for a mark")
        context.make_current()
        (error,) = runtime.cudaEventQuery(event)
        if error == runtime.cudaError_t.cudaErrorNotReady:
            return False
        if error != runtime.cudaError_t.cudaSuccess:
            raise context.bindings.explain_failure("cudaEventQuery", error)
        return True

    def seconds_between(self, earlier: Any, later: Any) -> float:
        """Device time between two events that have passed."""
        milliseconds: float = self._context.call("cudaEventElapsedTime", earlier, later)
        return milliseconds / 1000

    def put_back(self, event: Any, timed: bool) -> None:
        """Take back an event that nobody needs. Makes no call: this may run in any thread, within a capture."""
        self._spare[timed].append(event)

    def close(self) -> None:
        """Destroy all events."""
        for event in self._events:
            self._context.call_quietly("cudaEventDestroy", event)

    def _new_event(self, timed: bool) -> Any:
        runtime = self._context.runtime
        flags = runtime.cudaEventDefault if timed else runtime.cudaEventDisableTiming
        event = self._context.call("cudaEventCreateWithFlags", flags)
        with self._lock:
            self._events.append(event)
        return event


class CudaMark:
    """A recorded event. It is spare again when nobody holds the mark."""

    def __init__(self, marks: Marks, event: Any, timed: bool) -> None:
        self._marks, self._event, self._timed = marks, event, timed

    def has_passed(self) -> bool:
        """Whether the work before it is done. An error of that work is raised."""
        return self._marks.has_passed(self._event)

    def seconds_since(self, earlier: Mark) -> float:
        """Device time since an earlier mark, with a resolution of about half a microsecond.

        Raises ValueError unless both have passed and were made with timed=True.
        """
        if not (isinstance(earlier, CudaMark) and earlier._timed and self._timed):
            raise ValueError("time is measured between two marks made with timed=True")
        if not (self.has_passed() and earlier.has_passed()):
            raise ValueError("time is measured between two marks that have passed; synchronize first")
        return self._marks.seconds_between(earlier._event, self._event)

    def __del__(self) -> None:
        self._marks.put_back(self._event, self._timed)
