"""A torch network bound to memory of others: zero-copy tensors, the caller's stream, memory that graphs can rely on."""

from __future__ import annotations

import ctypes
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

import numpy as np
import torch

from dreammix_trt.core.errors import EngineError
from dreammix_trt.core.seam import Array, Stream
from dreammix_trt.export.torch_backend.resident import Resident, turn


class TorchBound:
    """A network bound to arrays. The first `enqueue` warms it up: kernels are loaded, tried and compiled, and memory is
    taken, and it may wait; those after it do nothing of the kind, and can be captured.

    All that torch allocates in a pass lies in a pool that belongs to this object alone and lives as long
    (`torch.cuda.MemPool`, what torch's own graphs use): a captured graph has its addresses, and nobody else gets them.
    So close it after its graphs.
    """

    def __init__(self, resident: Resident, inputs: Sequence[Any], outputs: Sequence[Any], mode: str) -> None:
        self._resident, self._inputs, self._outputs = resident, tuple(inputs), tuple(outputs)
        self._run, self._compile = _compile(resident.run, mode) if mode else resident.run, bool(mode)
        self._warm, self._pool = False, None
        if resident.device.type == "cuda":
            with torch.cuda.device(resident.device):
                self._pool = torch.cuda.MemPool()

    @property
    def capturable(self) -> bool:
        """On a GPU, after one call outside: see the class. On the CPU a pass runs at once; no graph would hold it."""
        return bool(self._resident.device.type == "cuda")

    def enqueue(self, stream: Stream) -> None:
        """Run once in the stream (on the CPU: now).

        Raises EngineError when it is closed or its weights are not on the device, MemoryError.
        """
        name = self._resident.name
        if not self._resident.loaded or not self._outputs:
            remedy = "load it first" if self._outputs else "it is closed, bind it anew"
            raise EngineError(f"{name} cannot run: {remedy}")
        with turn, torch.no_grad(), memory_error(name), ExitStack() as held:
            if self._pool is not None:
                own = torch.cuda.ExternalStream(stream.handle or 0, self._resident.device)
                held.enter_context(torch.cuda.stream(own))
                if not self._warm:
                    self._warm_up()
                held.enter_context(torch.cuda.use_mem_pool(self._pool, self._resident.device))
                held.enter_context(_own_blas_workspace())
            for out, value in zip(self._outputs, self._run(*self._inputs), strict=True):
                out.copy_(value)
        self._warm = True

    def close(self) -> None:
        """Give the pool back; again does nothing."""
        self._inputs = self._outputs = ()
        with turn:
            self._run, self._pool = self._resident.run, None

    def _warm_up(self) -> None:
        """Before the first pass in the pool: trying out kernels takes memory that no later pass needs."""
        if torch.cuda.is_current_stream_capturing():
            raise EngineError(f"{self._resident.name}: run it once before a capture")
        if self._compile:
            self._run(*self._inputs)
        torch.cuda.empty_cache()  # in a pool torch may never do so itself, even when memory is short


def view_array(array: Array, device: torch.device) -> torch.Tensor:
    """A tensor over an array's memory."""
    shape, dtype = tuple(array.shape), np.dtype(array.dtype)
    if device.type == "cuda":
        tensor = torch.as_tensor(_Memory(array.pointer, shape, dtype.str), device=device)
    elif device.type == "cpu":
        memory: Any = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(array.pointer)
        tensor = torch.from_numpy(np.frombuffer(memory, dtype).reshape(shape))
    else:
        raise EngineError(f"networks on device {device.type!r} are sizes alone; nothing can run there")
    assert tensor.data_ptr() == array.pointer, "torch copied instead of looking"
    return tensor


@contextmanager
def memory_error(name: str) -> Iterator[None]:
    """torch's error, or CUDA's by way of torch, as Python's, which a caller that knows no torch can catch."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what there was memory for
        raise MemoryError(f"{name}: {error}") from error


def _compile(run: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """`run`, compiled for the shapes that it is first called with.

    Every bound network gets a code object of its own: torch counts compilations by those, and stops at eight.
    """

    def call(*given: Any) -> Any:
        return run(*given)

    own = FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
    compiled: Callable[..., Any] = torch.compile(own, mode=mode, fullgraph=True, dynamic=False)
    return compiled


class _Memory:
    """Device memory as the CUDA array interface, version 3, describes it; torch takes it without a copy."""

    def __init__(self, pointer: int, shape: tuple[int, ...], typestr: str) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


@contextmanager
def _own_blas_workspace() -> Iterator[None]:
    """Matrix products within take their scratch memory from the current pool, and leave none of it to others.

    torch keeps one workspace a stream for the whole process; were it taken from one pool and used by a graph of
    another, it could be freed under the latter. torch's own graph trees do the same.
    """
    forget = torch._C._cuda_clearCublasWorkspaces
    forget()
    try:
        yield
    finally:
        forget()
