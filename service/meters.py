"""What an operator watches, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from dreammix_trt.engine.requests import Statistics, Ticket
from dreammix_trt.engine.result import Result

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Meters:
    """The numbers of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor time, open files of this process
        labels = ("engine",)
        self._ends = Counter("dreammix_jobs", "Jobs that ended, by how", (*labels, "state"), registry=self.registry)
        self._errors = Counter("dreammix_errors", "Jobs that ended with an error", ("kind",), registry=self.registry)
        self._waits = Histogram(
            "dreammix_wait_seconds",
            "From acceptance to the first step",
            labels,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._runs = Histogram(
            "dreammix_run_seconds", "From start to end of a job", labels, buckets=_SECONDS, registry=self.registry
        )
        self._steps = Histogram("dreammix_step_seconds", "Of one step", buckets=_SECONDS, registry=self.registry)
        self._phases = Histogram(
            "dreammix_phase_seconds", "Of one phase of a job", ("phase",), buckets=_SECONDS, registry=self.registry
        )

    def watch(
        self, statistics: Callable[[], dict[str, tuple[int, Statistics]]], kept: Callable[[], tuple[int, int]]
    ) -> None:
        """Read these whenever somebody asks.

        statistics: the workers and statistics of each engine's queue, by its name.
        kept: how many finished jobs are remembered, and the bytes of their pictures.
        """
        self.registry.register(_Now(statistics, kept))

    def note_step(self, seconds: float) -> None:
        """A step took so long."""
        self._steps.observe(seconds)

    def note_end(self, engine: str, ticket: Ticket, result: Result | None, kind: str | None) -> None:
        """A job has ended. kind: of its error; None: it has a result."""
        self._ends.labels(engine, ticket.state).inc()
        self._waits.labels(engine).observe(ticket.waited)
        if kind is not None:
            self._errors.labels(kind).inc()
        if result is not None:
            self._runs.labels(engine).observe(ticket.ran)
            for phase, seconds in result.timings.items():
                self._phases.labels(phase).observe(seconds)

    def to_text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _Now(Collector):
    """Gauges that are read when somebody asks."""

    def __init__(
        self, statistics: Callable[[], dict[str, tuple[int, Statistics]]], kept: Callable[[], tuple[int, int]]
    ) -> None:
        self._statistics, self._kept = statistics, kept

    def describe(self) -> Iterator[Metric]:
        """Nothing before the first question."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The gauges now."""
        waiting = GaugeMetricFamily("dreammix_queue_waiting", "Requests that wait", labels=("engine",))
        running = GaugeMetricFamily("dreammix_queue_running", "Requests that run", labels=("engine",))
        workers = GaugeMetricFamily("dreammix_workers", "Painters that serve, without lost ones", labels=("engine",))
        for name, (serving, state) in self._statistics().items():
            workers.add_metric((name,), serving)
            waiting.add_metric((name,), state.waiting)
            running.add_metric((name,), state.running)
        count, size = self._kept()
        yield workers
        yield waiting
        yield running
        yield GaugeMetricFamily("dreammix_results_kept", "Finished jobs in memory", value=count)
        yield GaugeMetricFamily("dreammix_results_bytes", "Bytes of their pictures", value=size)
