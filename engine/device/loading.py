"""Brings an engine directory's networks onto a GPU, with the back end for which they were built."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dreammix_trt.core.seam import DeviceNetworks, Stream
from dreammix_trt.core.store import Store
from dreammix_trt.engine.directory import OpenedEngine
from dreammix_trt.engine.drivers.device import Device


@dataclass(frozen=True)
class OnDevice:
    """A device, a base's networks on it, and the stream in which they run. Closing it closes all."""

    device: Device
    networks: DeviceNetworks
    stream: Stream

    def close(self) -> None:
        """Free the networks, then the stream, then the device and what is left on it, even when one of them fails."""
        with ExitStack() as closing:
            for each in (self.device, self.stream, self.networks):
                closing.callback(each.close)


def open_device(opened: OpenedEngine, store: Path | None = None) -> OnDevice:
    """Open the first GPU and the networks of an opened engine on it.

    store: the store's folder, below which compiled kernels are kept; None: the default one.

    Raises DeviceError (no driver, one too old, another GPU), EngineError, MissingExtraError, OutOfMemoryError.
    """
    from dreammix_trt.engine.drivers.cuda import CudaDevice

    with ExitStack() as made:
        device = CudaDevice()
        made.callback(device.close)
        stream = device.make_stream()
        made.callback(stream.close)
        networks = _networks(opened, device, stream, Store(store).root / "compiled")
        made.pop_all()
    return OnDevice(device, networks, stream)


def _networks(opened: OpenedEngine, device: Device, stream: Stream, cache: Path) -> DeviceNetworks:
    """Open the networks without weights. The memory plan decides later which weights come."""
    backend = opened.passport.backend
    if backend == "onnxruntime":
        from dreammix_trt.engine.backends.onnxruntime.on_device import OnnxNetworks

        return OnnxNetworks.open(opened.parts, stream, resident=())
    from dreammix_trt.engine.backends.tensorrt.on_device import TensorRtNetworks

    return TensorRtNetworks.open(opened.parts, backend, device, cache=cache, resident=())
