"""Replicas of engines on Ray Serve, in a cluster that is open: started, reached, and ended. Only here Serve is known.

Serve's own HTTP proxies are off: clients come in by our own door.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dreammix_trt.core.errors import DreamMixError, EngineError, InputError
from dreammix_trt.core.subject import Subject
from dreammix_trt.service.loading import Loading
from dreammix_trt.service.remote import RemoteEngine, ReplicaDied
from dreammix_trt.service.replicas import Desk, Painter
from dreammix_trt.service.wire import Guest, Item, Order

#: seconds for which a request waits for the replica that has its subject, while that is busy; Ray's own default is 1
_PATIENCE = "0.1"
_TRIES = 3  # to load an engine, before it counts as one that cannot be


@dataclass(frozen=True)
class Bounds:
    """How many replicas an engine has: so many at least, and at most when more requests come."""

    least: int
    most: int

    @classmethod
    def read(cls, text: str) -> Bounds:
        """From "N" or "MIN:MAX". Raises InputError."""
        found = re.fullmatch(r"(\d{1,4})(?::(\d{1,4}))?", text, re.ASCII)
        bounds = cls(int(found[1]), int(found[2] or found[1])) if found else cls(0, 0)
        if not 1 <= bounds.least <= bounds.most <= 1000:
            raise InputError(f"--ray-replicas is {text!r}; give a number from 1, or MIN:MAX, as in 1:4")
        return bounds


@contextmanager
def open_fleet(
    loadings: Mapping[str, Loading],
    bounds: Bounds,
    need: Mapping[str, float],
    *,
    owned: bool,
    seconds: float,
    tells: bool,
) -> Iterator[dict[str, RemoteEngine]]:
    """Start the replicas of engines, by their names, and end them with the block. A Ray cluster is open.

    bounds: of each engine.
    need: what one replica asks the cluster for.
    owned: whether the cluster is ours alone, so that Serve as a whole is ended.
    seconds: the longest that a request runs: a replica that is to go gets so long to finish it.
    tells: whether the log may quote requests.

    Raises what an engine's loading raised, and InputError for a cluster that is too small.
    """
    os.environ.setdefault("RAY_SERVE_MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT_S", _PATIENCE)  # before Serve is imported
    import ray
    from ray import serve

    _check_room(ray.cluster_resources(), need, bounds.least * len(loadings))  # type: ignore[no-untyped-call]
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(proxy_location="Disabled", logging_config=quiet)
    desk: Any = ray.remote(Desk).options(num_cpus=0, max_restarts=-1).remote()
    mark, apps = secrets.token_hex(4), list[str]()
    try:
        engines = {}
        for name, loading in loadings.items():
            apps.append(f"dreammix-{name}-{mark}")
            scale: dict[str, Any] = {"num_replicas": bounds.least}
            if bounds.most > bounds.least:
                scale = {
                    "autoscaling_config": {
                        "min_replicas": bounds.least,
                        "max_replicas": bounds.most,
                        "target_ongoing_requests": loading.workers,
                    }
                }
            deployment: Any = serve.deployment(
                Painter,
                **scale,
                max_ongoing_requests=loading.workers,
                ray_actor_options=dict(need),
                graceful_shutdown_wait_loop_s=0.1,
                graceful_shutdown_timeout_s=seconds,
                max_constructor_retry_count=_TRIES,
                logging_config=quiet,
            )
            engines[name] = RemoteEngine(_start(deployment, loading, desk, apps[-1]), tells)
        yield engines
    finally:
        for app in apps:
            serve.delete(app)
        ray.kill(desk)
        if owned:
            serve.shutdown()  # type: ignore[no-untyped-call]


def _check_room(there: Mapping[str, float], need: Mapping[str, float], replicas: int) -> None:
    for key, name in (("num_gpus", "GPU"), ("num_cpus", "CPU")):
        if need.get(key, 0) * replicas > there.get(name, 0):
            raise InputError(
                f"--ray-replicas: {replicas} replicas take {need[key] * replicas:g} {name}s, and the cluster has "
                f"{there.get(name, 0):g}: ask for fewer, or start more nodes before the service"
            )


def _start(deployment: Any, loading: Loading, desk: Any, app: str) -> _RayLink:
    """Start an engine's replicas, and wait for the first ones."""
    import ray
    from ray import serve

    try:
        handle = serve.run(deployment.bind(loading, desk, app), name=app, route_prefix=None)
    except RuntimeError as error:
        report: DreamMixError | None = ray.get(desk.take_report.remote(app))
        raise report or EngineError(f"{loading.path}: Ray Serve could not start its replicas ({error})") from error
    return _RayLink(handle, desk)


class _RayLink:
    """See `remote.Link`."""

    def __init__(self, handle: Any, desk: Any) -> None:
        self._handle, self._desk = handle, desk

    def paint(self, order: Order, guests: Sequence[Guest], subject: str) -> _RayStream:
        """Have a request painted."""
        handle = self._handle.options(stream=True, method_name="paint", multiplexed_model_id=subject)
        return _RayStream(handle.remote(order, guests))

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of any replica."""
        with _deaths():
            return self._handle.options(method_name=method).remote(*arguments).result()

    def share(self, subject: Subject) -> Any:
        """Put a subject into Ray's store."""
        import ray

        return ray.put(subject)

    def ask_preview(self, id: str, whole: bool) -> None:
        """Have the next step shown."""
        self._desk.ask_preview.remote(id, whole)

    def forget(self, id: str) -> None:
        """The order has ended."""
        self._desk.forget.remote(id)

    def take_report(self, id: str) -> DreamMixError | None:
        """Why its replica has ended."""
        import ray

        try:
            report: DreamMixError | None = ray.get(self._desk.take_report.remote(id), timeout=2)
        except ray.exceptions.RayError:
            return None
        return report


class _RayStream:
    """See `remote.Stream`."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def __iter__(self) -> Iterator[Item]:
        with _deaths():
            yield from self._response

    def cancel(self) -> None:
        """Stop it."""
        self._response.cancel()


@contextmanager
def _deaths() -> Iterator[None]:
    """Ray's errors as ours."""
    from ray import exceptions
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except (exceptions.TaskCancelledError, exceptions.RayTaskError, RayServeException) as error:
        raise EngineError(f"Ray Serve could not have it painted ({type(error).__name__})") from error
    except exceptions.RayError as error:
        raise ReplicaDied(type(error).__name__) from error
