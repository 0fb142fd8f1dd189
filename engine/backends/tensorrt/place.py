"""Where a base's networks run: the package's runtime on one device."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreammix_trt.core.errors import DeviceError, EngineError
from dreammix_trt.core.seam import Stream
from dreammix_trt.engine.backends.tensorrt.compiled import Shelf
from dreammix_trt.engine.backends.tensorrt.package import Package
from dreammix_trt.engine.drivers.device import Device


@dataclass
class PlanPlace:
    """What all networks of a base share.

    stream: for setting up contexts.
    cache: folder that keeps compiled kernels; None: they are not kept.
    lock: held while a context is made or runs for the first time, or weights are loaded or unloaded.
    shelf: what was compiled for the networks.
    """

    trt: Any
    package: Package
    runtime: Any
    device: Device
    stream: Stream
    cache: Path | None
    lock: threading.RLock = field(default_factory=threading.RLock)
    shelf: Shelf = field(init=False)

    def __post_init__(self) -> None:
        self.shelf = Shelf(self.cache, self.gpu, str(self.trt.__version__))

    def check(self) -> None:
        """Raise EngineError after `close`; else make the device current in this thread."""
        if self.runtime is None:
            raise EngineError("these networks are closed; open them again")
        self.device.synchronize(self.stream)

    def close(self) -> None:
        """Drop the runtime. Again does nothing."""
        if self.runtime is not None:
            self.runtime = None
            self.stream.close()

    @property
    def gpu(self) -> tuple[str, str]:
        return self.device.name, self.device.capability


def handle_of(stream: Stream) -> int:
    """The stream's handle, as the package takes it. Raises DeviceError for a stream of another kind of device."""
    if stream.handle is None:
        raise DeviceError("TensorRT runs in CUDA streams only; this device has none")
    return stream.handle
