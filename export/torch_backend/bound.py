"""Binds a torch network to the caller's memory: zero-copy tensors, the caller's stream, stable memory for graphs."""

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
    """A network bound to arrays.

    The first `enqueue` warms it up: it loads, tries and compiles kernels, allocates memory and may wait. Later calls do
    none of this, so they can be captured.

    Everything that torch allocates in a pass is in a pool that belongs to this object and lives as long as it does
    (`torch.cuda.MemPool`, as torch's own graphs use). A captured graph has these addresses, and nothing else gets them.
    So close this object after its graphs.
    """

    def __init__(self, resident: Resident, inputs: Sequence[Any], outputs: Sequence[Any], mode: str) -> None:
        """resident: the network's weights.

        inputs, outputs: tensors over the caller's memory, in call order.
        mode: of torch.compile; "": not compiled.
        """
        self._resident, self._inputs, self._outputs = resident, tuple(inputs), tuple(outputs)
        self._run, self._compile = _compile(resident.run, mode) if mode else resident.run, bool(mode)
        self._warm, self._pool = False, None
        if resident.device.type == "cuda":
            with torch.cuda.device(resident.device):
                self._pool = torch.cuda.MemPool()

    @property
    def capturable(self) -> bool:
        """Whether this is on a GPU: capture after one call outside. On the CPU a pass runs at once."""
        return bool(self._resident.device.type == "cuda")

    def enqueue(self, stream: Stream) -> None:
        """Run once in the stream (on the CPU: now).

        Raises EngineError when it is closed or its weights are not on the device, MemoryError.
        """
        name = self._resident.name
        if not self._resident.loaded or not self._outputs:
            remedy = "load it first" if self._outputs else "it is closed, bind it anew"
            raise EngineError(f"{name} cannot run: {remedy}")
        with turn, torch.no_grad(), translate_memory_errors(name), ExitStack() as held:
            if self._pool is not None:
                own = torch.cuda.ExternalStream(stream.handle or 0, self._resident.device)
                held.enter_context(torch.cuda.stream(own))
                if not self._warm:
                    self._warm_up()
                held.enter_context(torch.cuda.use_mem_pool(self._pool, self._resident.device))
                held.enter_context(_use_own_blas_workspace())
            for out, value in zip(self._outputs, self._run(*self._inputs), strict=True):
                out.copy_(value)
        self._warm = True

    def close(self) -> None:
        """Give the pool back. Closing again does nothing."""
        self._inputs = self._outputs = ()
        with turn:
            self._run, self._pool = self._resident.run, None

    def _warm_up(self) -> None:
        """Warm up before the first pass in the pool: trying kernels takes memory that no later pass needs."""
        if torch.cuda.is_current_stream_capturing():
            raise EngineError(f"{self._resident.name}: run it once before a capture")
        if self._compile:
            self._run(*self._inputs)
        torch.cuda.empty_cache()  # in a pool torch never does this itself, even when memory is short


def view_array(array: Array, device: torch.device) -> torch.Tensor:
    """Make a tensor over the memory of an array.

    device: where the array is.

    Raises EngineError for a device without memory.
    """
    shape, dtype = tuple(array.shape), np.dtype(array.dtype)
    if device.type == "cuda":
        tensor = torch.as_tensor(_Memory(array.pointer, shape, dtype.str), device=device)
    elif device.type == "cpu":
        memory: Any = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(array.pointer)
        tensor = torch.from_numpy(np.frombuffer(memory, dtype).reshape(shape))
    else:
        raise EngineError(f"networks on device {device.type!r} are sizes alone; nothing can run there")
    assert tensor.data_ptr() == array.pointer, "torch copied the memory instead of viewing it"
    return tensor


@contextmanager
def translate_memory_errors(name: str) -> Iterator[None]:
    """Turn an out-of-memory error of torch or CUDA into MemoryError, which callers can catch without torch.

    name: of the network, for the message.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        traceback.clear_frames(error.__traceback__)  # its frames still hold tensors
        raise MemoryError(f"{name}: {error}") from error


def _compile(run: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """Compile `run` for the shapes of its first call.

    Every bound network gets its own code object, because torch counts compilations per code object and stops at eight.
    """

    def call(*given: Any) -> Any:
        return run(*given)

    own = FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
    compiled: Callable[..., Any] = torch.compile(own, mode=mode, fullgraph=True, dynamic=False)
    return compiled


class _Memory:
    """Device memory with the CUDA array interface, version 3, which torch takes without a copy."""

    def __init__(self, pointer: int, shape: tuple[int, ...], typestr: str) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


@contextmanager
def _use_own_blas_workspace() -> Iterator[None]:
    """Let matrix products in the block take their scratch memory from the current pool, and release it afterwards.

    torch keeps one workspace per stream for the whole process. If it came from one pool and a graph of another pool
    used it, it could be freed while that graph needs it. torch's own graph trees do the same as this.
    """
    forget = torch._C._cuda_clearCublasWorkspaces
    forget()
    try:
        yield
    finally:
        forget()
