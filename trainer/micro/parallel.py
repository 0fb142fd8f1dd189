"""Two single-threaded processes that average one flat gradient: robust where oversubscribed OpenMP is not."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


@dataclass(frozen=True)
class Team:
    """This process' place among its equals."""

    rank: int
    size: int
    device: str

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def average(self, parameters: Iterable[torch.nn.Parameter], extra: list[float]) -> list[float]:
        """Replace every gradient by its mean over the team; returns the means of `extra` likewise."""
        if self.size == 1:
            return extra
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([*(g.reshape(-1) for g in grads), torch.tensor(extra)])
        dist.all_reduce(flat)
        flat /= self.size
        at = 0
        for grad in grads:
            grad.copy_(flat[at : at + grad.numel()].view_as(grad))
            at += grad.numel()
        return [float(x) for x in flat[at:]]

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def _enter(rank: int, size: int, device: str, port: int, job: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if not logging.root.handlers:  # a fresh process: what the parent set up did not travel
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    if size > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    try:
        job(Team(rank, size, device), *arguments)
    finally:
        if size > 1:
            dist.destroy_process_group()


def run_team(job: Callable[..., None], *arguments: Any, size: int, device: str) -> None:
    """Call ``job(team, *arguments)`` in `size` processes and wait; in this very process when size is 1."""
    if size == 1:
        job(Team(0, 1, device), *arguments)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    mp.spawn(_enter, (size, device, port, job, arguments), nprocs=size, join=True)  # type: ignore[no-untyped-call]


class Clock:
    """Seconds of work, carried over a resume."""

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.monotonic() - before

    def seconds(self) -> float:
        return time.monotonic() - self._start
