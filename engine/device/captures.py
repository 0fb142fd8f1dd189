"""The graphs of phases, and what became of the phases that have none.

A phase runs plainly first; what it enqueued is then captured, and from then on the graph is replayed. A back end may
say that a network cannot be captured yet, and a capture may fail. Then the phase runs plainly the next time as well and
is tried again after it, `TRIES` times in all while its room is kept. The reason is logged at the first failure of a
phase in a runtime, and counted at every one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Final

from dreammix_trt.core.errors import OutOfMemoryError
from dreammix_trt.core.seam import Stream
from dreammix_trt.engine.drivers.device import CapturedGraph, Device

TRIES: Final = 3


@dataclass(frozen=True)
class Failure:
    """Why a phase could not be captured.

    times: how often.
    reason: of the last time.
    """

    times: int
    reason: str


@dataclass(frozen=True)
class Statistics:
    """How a runtime's phases ran, since it was made.

    captured: graphs that were made.
    replayed: runs of phases as graphs.
    plain: runs of phases launch by launch: before their capture, without one, or in the room of a guest.
    failed: by the phase's name, those that could not be captured.
    """

    captured: int = 0
    replayed: int = 0
    plain: int = 0
    failed: Mapping[str, Failure] = field(default_factory=dict)


class Tally:
    """Counts for `Statistics`."""

    def __init__(self) -> None:
        self._counts = {"captured": 0, "replayed": 0, "plain": 0}
        self._failed: dict[str, Failure] = {}

    @property
    def statistics(self) -> Statistics:
        """The counts so far."""
        return Statistics(**self._counts, failed=dict(self._failed))

    def count(self, what: str) -> None:
        """Count a capture ("captured") or a run ("replayed", "plain")."""
        self._counts[what] += 1

    def fail(self, name: str, reason: str) -> None:
        """Count a failure, and log the first one of a phase.

        name: of the phase.
        """
        before = self._failed.get(name)
        self._failed[name] = Failure((before.times if before else 0) + 1, reason)
        if before is None:
            logging.getLogger(__name__).warning(
                "%s cannot be captured (%s): it runs plainly, and is tried again after each of its next %d runs",
                name,
                reason,
                TRIES - 1,
            )


class Graphs:
    """The graphs of one room, or of the text encoders."""

    def __init__(self, device: Device, tally: Tally) -> None:
        self._device, self._tally = device, tally
        self._graphs: dict[Hashable, CapturedGraph] = {}
        self._tries: dict[Hashable, int] = {}

    def play(
        self,
        phase: Hashable,
        record: Callable[[], None],
        stream: Stream,
        *,
        capture: bool,
        find_obstacle: Callable[[], str | None],
    ) -> None:
        """Do what `record` enqueues: replay its graph, or run it plainly and capture it for the next time.

        phase: decides everything that is recorded; `str` of it is its name.
        capture: whether it may be captured.
        find_obstacle: after a plain run, why what ran cannot be captured; None: it can.

        Raises what `record` raises, OutOfMemoryError, and DeviceError for a device that is lost.
        """
        graph = self._graphs.get(phase)
        self._tally.count("plain" if graph is None else "replayed")
        if graph is not None:
            graph.launch(stream)
            return
        record()
        tries = self._tries.get(phase, 0)
        if not capture or tries == TRIES:
            return
        found = find_obstacle() or self._capture(record, stream)
        if isinstance(found, str):
            self._tries[phase] = tries + 1
            self._tally.fail(str(phase), found)
        else:
            self._graphs[phase] = found
            self._tally.count("captured")

    def close(self) -> None:
        """Free the graphs. The device must be idle."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def _capture(self, record: Callable[[], None], stream: Stream) -> CapturedGraph | str:
        """What just ran plainly as a graph, or why it cannot be captured."""
        try:
            return self._device.capture(stream, record)
        except (OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # back ends report it in errors of their own
            if getattr(error, "lost", False):
                raise
            return str(error) or type(error).__name__
