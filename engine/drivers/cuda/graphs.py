"""Captured work of a stream, as a graph on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dreammix_trt.core.seam import Stream
from dreammix_trt.engine.drivers.cuda.context import handle_of
from dreammix_trt.engine.drivers.cuda.resources import Belongings, Owned


class CudaGraph(Owned):
    """An instantiated graph, uploaded to the device."""

    kind = "graph"

    def launch(self, stream: Stream) -> None:
        """Enqueue all of it."""
        self._belongings.context.call("cudaGraphLaunch", self._live, handle_of(stream))

    def close(self) -> None:
        """Free it. A launch that is under way must have ended."""
        self._give_back()

    def _destroy(self, runtime: Any, handle: Any) -> Any:
        return runtime.cudaGraphExecDestroy(handle)


def capture(belongings: Belongings, stream: Stream, record: Callable[[], None]) -> CudaGraph:
    """See `CudaDevice.capture`."""
    context = belongings.context
    context.check_outside_capture("another capture")
    handle, runtime = handle_of(stream), context.runtime
    context.call("cudaStreamBeginCapture", handle, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    with context.enter_capture():
        try:
            record()
        except BaseException:
            _discard(runtime, handle)
            raise
    template = context.call("cudaStreamEndCapture", handle)
    try:
        graph = CudaGraph(belongings, context.call("cudaGraphInstantiate", template, 0))
    finally:
        runtime.cudaGraphDestroy(template)
    try:
        context.call("cudaGraphUpload", graph._live, handle)
    except BaseException:
        graph.close()
        raise
    return graph


def _discard(runtime: Any, handle: int) -> None:
    """End a capture that failed."""
    error, template = runtime.cudaStreamEndCapture(handle)
    if error == runtime.cudaError_t.cudaSuccess and template is not None:
        runtime.cudaGraphDestroy(template)
    runtime.cudaGetLastError()
