"""A Ray cluster to work on: one that runs already, or a local one of this machine's cores and GPUs.

Ray reports its use to its makers unless told not to; here it is told not to.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.extras import require_cluster

_STORE = 200 * 2**20  # bytes of shared memory of a local cluster: pictures and subjects pass through it
_PATIENCE = 5.0  # seconds for the head of a cluster to answer
_SETTINGS = 4  # the kind of frame with which every HTTP/2 server begins, as Ray's is (RFC 9113, 3.4)
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0])


@contextmanager
def open_cluster(address: str | None = None, cpus: int | None = None) -> Iterator[None]:
    """Join a cluster, or start a local one, which ends with the block.

    address: of a cluster's head, HOST:PORT ("auto": the one that runs on this machine); None: start a local one.
    cpus: how many the local one hands out; None: all there are.

    Raises MissingExtraError without Ray, InputError for an address where no cluster answers.
    """
    require_cluster()
    if address is not None:
        _check_address(address)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # what it prints on stdout stays in its own logs
    if address is None and "ray" not in sys.modules:  # one that an app has imported has read it already
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # its ports are open to other computers
    import ray

    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _STORE}
    try:
        try:
            ray.init(address=address or "local", **options)
        except Exception as error:  # Ray raises plain ones, too
            raise InputError(_describe_silence(address, error)) from error
        yield
    finally:
        ray.shutdown()


def describe_need(device: str, cpus: float) -> Mapping[str, float]:
    """What one task or replica asks the cluster for: a whole GPU on "cuda", else some cores."""
    return {"num_gpus": 1, "num_cpus": 1} if device == "cuda" else {"num_cpus": cpus}


def list_nodes() -> list[dict[str, float]]:
    """What each living node of the cluster that is open has: "CPU" and "GPU", as far as it has any."""
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def _check_address(address: str) -> None:
    """Raise InputError for an address that is none, or where no server of Ray's kind answers.

    Ray itself would wait for minutes. Under its TLS it is left to wait.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit():
        raise InputError(f"--ray-address is {address!r}; give HOST:PORT of the cluster's head, or auto")
    if os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _PATIENCE) as there:
            there.sendall(_GREETING)
            answer = there.recv(9)
    except (OSError, OverflowError) as error:
        raise InputError(_describe_silence(address, error)) from error
    if len(answer) < 4 or answer[3] != _SETTINGS:
        raise InputError(_describe_silence(address, "another server does"))


def _describe_silence(address: str | None, error: Exception | str) -> str:
    if address is None:
        return f"no local Ray cluster could be started ({error})"
    return f"--ray-address {address}: no Ray cluster answers there ({error}); start one with `ray start`"
