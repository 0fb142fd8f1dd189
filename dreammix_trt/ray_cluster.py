"""A Ray cluster to work on: one that runs already, or a local one of this machine's cores and GPUs.

Ray reports its use to its makers unless told not to; here it is told not to.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.extras import require_cluster

_STORE = 200 * 2**20  # bytes of shared memory of a local cluster: pictures and subject files pass through it


@contextmanager
def open_cluster(address: str | None = None, cpus: int | None = None) -> Iterator[None]:
    """Join a cluster, or start a local one, which ends with the block.

    address: of a cluster's head ("auto": the one that runs on this machine); None: start a local one.
    cpus: how many the local one hands out; None: all there are.

    Raises MissingExtraError without Ray, InputError for an address where no cluster answers.
    """
    require_cluster()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported
    import ray

    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    if address is None:
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _STORE}
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, ValueError) as error:
        raise InputError(
            f"--ray-address {address}: no Ray cluster answers there ({error}); start one with `ray start`"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def describe_need(device: str, cpus: float) -> Mapping[str, float]:
    """What one task or replica asks the cluster for: a whole GPU on "cuda", else some cores."""
    return {"num_gpus": 1, "num_cpus": 1} if device == "cuda" else {"num_cpus": cpus}
