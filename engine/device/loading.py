"""Bringing an engine directory's networks onto a GPU, with the back end they were built for."""

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
    """A device, a base's networks on it, and the stream they run in; closing it closes all."""

    device: Device
    networks: DeviceNetworks
    stream: Stream

    def close(self) -> None:
        """Free the networks, then the stream, then the device and what is left on it, whatever of it fails."""
        with ExitStack() as closing:
            for each in (self.device, self.stream, self.networks):
                closing.callback(each.close)


def open_device(opened: OpenedEngine, store: Path | None = None) -> OnDevice:
    """The first GPU, and the networks of an opened engine on it. Compiled kernels are kept below the store's root.

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
    """Without weights: these come when the memory plan knows which."""
    backend = opened.passport.backend
    if backend == "onnxruntime":
        from dreammix_trt.engine.backends.onnxruntime.on_device import OnnxNetworks

        return OnnxNetworks.open(opened.parts, stream, resident=())
    from dreammix_trt.engine.backends.tensorrt.on_device import TensorRtNetworks

    return TensorRtNetworks.open(opened.parts, backend, device, cache=cache, resident=())
