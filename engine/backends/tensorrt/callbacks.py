"""What TensorRT calls back while it builds and runs: loggers, error recorder, progress monitor, writer.

The packages ignore exceptions of a callback, Ctrl-C and a full disk included, and report success nevertheless. So
nothing here raises: errors are kept for the caller, who asks for them.

**Building and running have loggers of their own.** A logger written in Python takes the GIL for every message, also for
the hundreds that nobody wants, so a thread inside TensorRT would wait for whoever runs Python. Building takes one
(`get_logger`): its warnings are wanted. Running takes the package's own, in C++ (`get_quiet_logger`), and an error
recorder (`get_recorder`): errors, and nothing else, go to the recorder and to no logger, so they reach our messages.
Runtime, engine and context each get the recorder. Two answers reach the logger alone, so they are asked of a
runtime with the listener, which does nothing else: whether it starts, and whether a plan fits
(`plans.check_validity`). Tried on TensorRT-RTX 1.7.1: every runtime and every builder of a process keeps the logger it
was made with, in whatever order they are made.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

from dreammix_trt.engine.backends.tensorrt.kernel_list import MARK

LOGGER = logging.getLogger(__name__)
NOTICEABLE = 0.002
Events = queue.SimpleQueue[tuple[float, str] | None]


class Heard(threading.local):
    """What the package says in this thread; None: nobody collects it.

    messages: (severity, text), warnings and errors.
    lists: the builder's lists of kernels.
    """

    messages: list[tuple[str, str]] | None = None
    lists: list[str] | None = None


HEARD = Heard()


@contextlib.contextmanager
def collect_messages() -> Iterator[list[tuple[str, str]]]:
    """Collect the package's messages of this thread within the block: (severity, text), warnings and errors."""
    before, HEARD.messages = HEARD.messages, []
    try:
        yield HEARD.messages
    finally:
        HEARD.messages = before


def hear(severity: str, text: str) -> None:
    """Give a message to the collector of this thread."""
    LOGGER.debug("%s: %s", severity, text)
    if HEARD.messages is not None:
        HEARD.messages.append((severity, text))


@functools.cache
def get_logger(trt: Any) -> Any:
    """The logger for building. A warning or error goes to the collector of the thread in which it arises."""

    class Listener(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity.name not in ("INFO", "VERBOSE"):
                hear(severity.name, message)
            elif HEARD.lists is not None and MARK in message:
                HEARD.lists.append(message)

    return Listener()


@functools.cache
def get_quiet_logger(trt: Any) -> Any:
    """The logger for running, the package's own. It prints errors that no recorder takes, and nothing else."""
    return trt.Logger(trt.Logger.ERROR)


@functools.cache
def get_recorder(trt: Any) -> Any:
    """What takes errors while running. An error goes to the collector of the thread in which it arises.

    It keeps none itself: the packages ask a recorder for its number of errors, and never for one that was told.
    """

    class Recorder(trt.IErrorRecorder):
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self.told = 0

        def report_error(self, code: Any, text: str) -> bool:
            self.told += 1
            hear("ERROR", text)
            return True  # whoever met the error stops

        def num_errors(self) -> int:
            return self.told

        def get_num_errors(self) -> int:  # by this name the bindings call it
            return self.told

        def get_error_code(self, index: int) -> Any:
            return trt.ErrorCodeTRT.UNSPECIFIED_ERROR

        def get_error_desc(self, index: int) -> str:
            return "told when it arose"

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self.told = 0

    return Recorder()


def make_monitor(trt: Any, events: Events, cancelled: threading.Event) -> Any:
    """Make a monitor that puts the builder's progress on a queue.

    cancelled: once it is set, the monitor stops the build at the next step.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps, self.reported = BuildSteps(), -1.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.report(self.steps.start(phase_name, parent_phase, num_steps), phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.report(self.steps.complete(phase_name, step), phase_name)
            return not cancelled.is_set()

        def report(self, fraction: float, phase: str) -> None:
            if fraction >= self.reported + NOTICEABLE:  # a large network has a hundred thousand steps
                self.reported = fraction
                events.put((fraction, phase))

        def phase_finish(self, phase_name: str) -> None:
            self.steps.finish(phase_name)

    return Monitor()


class BuildSteps:
    """Turns nested phases of a number of steps each into one fraction in 0..1 that never falls."""

    def __init__(self) -> None:
        self._phases: dict[str, list[Any]] = {}  # name -> [parent, steps, done]
        self._reached, self._lock = 0.0, threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> float:
        with self._lock:
            self._phases[name] = [parent, max(1, steps), 0]
            return self._find_fraction(name)

    def complete(self, name: str, step: int) -> float:
        with self._lock:
            if name in self._phases:
                self._phases[name][2] = step + 1
            return self._find_fraction(name)

    def finish(self, name: str) -> None:
        with self._lock:
            self._phases.pop(name, None)

    def _find_fraction(self, name: str | None) -> float:
        fraction = 0.0
        while name is not None and name in self._phases:
            name, steps, done = self._phases[name]
            fraction = min(1.0, (done + fraction) / steps)
        self._reached = max(self._reached, fraction)
        return self._reached


def make_writer(trt: Any, stream: BinaryIO) -> Any:
    """Make a writer that takes the plan in pieces. It keeps the first error, as the builder ignores exceptions."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: BaseException | None = None

        def write(self, data: bytes) -> int:
            if self.error is None:
                try:
                    stream.write(data)
                    return len(data)
                except BaseException as error:
                    self.error = error
            return 0

    return Writer()
