"""Several processes that train one LoRA together, as accelerate's launcher starts them; without it there is one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dreammix_trt.core.errors import InputError, MissingExtraError
from dreammix_trt.core.extras import list_missing
from dreammix_trt.trainer.hardware import Hardware

if TYPE_CHECKING:
    from torch.nn import Parameter


@dataclass(frozen=True)
class Processes:
    """This process among `count` of them. Each draws the same random numbers and takes its part of every step."""

    index: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.index == 0

    def average(self, parameters: Iterable[Parameter], loss: float) -> float:
        """Replace every gradient by its mean over the processes; returns the mean of the loss."""
        if self.count == 1:
            return loss
        import torch
        from accelerate.utils import reduce

        grads = [each.grad for each in parameters if each.grad is not None]
        own = torch.tensor([loss], device=grads[0].device)
        flat = reduce(torch.cat([*(grad.reshape(-1) for grad in grads), own]), "mean")
        for grad, mean in zip(grads, flat[:-1].split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
        return float(flat[-1])

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def is_leading() -> bool:
    """Whether this process was launched as the one that speaks, or alone; asked before the others are joined."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join_processes(hardware: Hardware) -> Iterator[tuple[Processes, Hardware]]:
    """Join the processes that a launcher started, if any; gives this one's place, and the GPU that it has to itself.

    Raises InputError for a GPU by number where each process takes its own, MissingExtraError without accelerate.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(), hardware
        return
    if ":" in hardware.device:
        raise InputError(f"device is {hardware.device!r}, but several processes were launched; give --device cuda")
    if list_missing(["accelerate"]):
        raise MissingExtraError("accelerate is not installed, several GPUs need it: pip install 'dreammix-trt[train]'")
    from accelerate import PartialState

    state = PartialState(cpu=hardware.kind == "cpu")
    try:
        device = hardware.device if hardware.kind == "cpu" else f"cuda:{state.local_process_index}"
        yield Processes(state.process_index, state.num_processes), replace(hardware, device=device)
    finally:
        state.destroy_process_group()


@contextmanager
def use_threads(count: int | None) -> Iterator[int]:
    """Use `count` threads for the block, then as many as before; gives the number in use."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
