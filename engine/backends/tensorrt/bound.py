"""A network bound to arrays: one context. Where the weights cannot go without it, it goes and comes back with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dreammix_trt.core.errors import EngineError
from dreammix_trt.core.seam import Stream
from dreammix_trt.engine.backends.tensorrt.callbacks import collect_messages
from dreammix_trt.engine.backends.tensorrt.engine import Binding
from dreammix_trt.engine.backends.tensorrt.place import handle_of
from dreammix_trt.engine.backends.tensorrt.plans import explain_failure
from dreammix_trt.engine.drivers.device import Device

if TYPE_CHECKING:
    from dreammix_trt.engine.backends.tensorrt.network import PlanNetwork


class TensorRtBound:
    """A network with its shapes and addresses fixed: one context."""

    def __init__(self, network: PlanNetwork, device: Device, binding: Binding) -> None:
        self._network, self._device, self._binding = network, device, binding
        self._context: Any = None
        self._ran = self._capturable = self._closed = False

    @property
    def capturable(self) -> bool:
        """False before the first `enqueue`, and again after the weights were unloaded.

        Where the package says no, it is asked again after the next run.
        """
        return self._capturable

    def enqueue(self, stream: Stream) -> None:
        """Run once in the stream. The first run must be outside any capture: it sets up the context.

        Raises EngineError after `close` and while the weights are unloaded, and the error that fits the package's
        messages where it fails.
        """
        handle = handle_of(stream)
        if self._closed:
            raise EngineError(f"{self._network.name}: closed; bind it again")
        if self._context is None or not self._network.loaded:
            raise EngineError(f"{self._network.name}: its weights are unloaded; load them first")
        self._device.enqueue_work(self._network.name, stream, lambda: self._start(handle))

    def close(self) -> None:
        """Free the context. The arrays belong to their owner. The stream must be idle."""
        with self._network.lock:
            self._context = None
            self._closed, self._capturable = True, False
            if self in self._network.bound:
                self._network.bound.remove(self)

    def renew(self) -> None:
        """Make the context where it does not exist."""
        if self._context is None:
            self._context = self._network.make_context(self._binding)

    def lapse(self, *, whole: bool) -> None:
        """Note that the weights go: the next run is a first run.

        whole: whether the context goes as well.
        """
        self._ran = self._capturable = False
        if whole:
            self._context = None

    def _start(self, handle: int) -> None:
        """Run. The first time alone: kernels are compiled, and networks of one structure share them."""
        if self._ran:
            self._run(handle)
            return
        with self._network.lock:
            self._run(handle)
            self._ran = True
            self._network.keep_compiled()

    def _run(self, handle: int) -> None:
        context = self._context
        with collect_messages() as messages:
            try:
                done = context.execute_async_v3(handle)
            except RuntimeError as error:
                messages.append(("ERROR", str(error)))
                done = False
        if not done:
            raise explain_failure(f"{self._network.name} cannot be run", messages)
        if not self._capturable:  # so no capture is under way
            self._capturable = not self._network.jit or bool(context.is_stream_capturable(handle))
