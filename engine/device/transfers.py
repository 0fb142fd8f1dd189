"""Transfers between host and device through pinned memory: what a batch uploads, and the pictures that it downloads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.seam import Array, BaseFacts, Stream
from dreammix_trt.engine.canvas.geometry import Size
from dreammix_trt.engine.device.arena import Arena
from dreammix_trt.engine.device.blocks import Picture, fill_block
from dreammix_trt.engine.drivers.device import Device, Pinned

U8 = npt.NDArray[np.uint8]


class Transfers:
    """Pinned host memory beside the arena. `made` frees it.

    blocks: the arena's regions that a batch's records fill.
    """

    def __init__(self, device: Device, arena: Arena, blocks: Sequence[str], made: ExitStack) -> None:
        self._device, self._arena = device, arena

        def pin(name: str) -> Pinned:
            memory = device.allocate_pinned(arena[name].nbytes)
            made.callback(memory.free)
            return memory

        self._up = {name: pin(name) for name in (*blocks, "image", "mask")}
        self._down = {name: pin(name) for name in ("out", "flags")}

    def upload(self, batch: Sequence[Picture], facts: BaseFacts, stream: Stream) -> None:
        """Enqueue the upload of a batch: records, pictures and masks."""
        for name, data in fill_block(batch, facts):
            self._copy(name, self._arena[name], 0, data, stream)
        for k, picture in enumerate(batch):
            canvas = picture.work.canvas
            for name, pixels in (("image", canvas.image), ("mask", canvas.mask)):
                each = self._arena[name].nbytes // self._arena[name].shape[0]
                flat = np.ascontiguousarray(pixels).reshape(-1)
                self._copy(name, self._arena[name][k], k * each, flat, stream)

    def download(self, sizes: Sequence[Size], stream: Stream) -> Callable[[], tuple[npt.NDArray[np.int32], list[U8]]]:
        """Enqueue the download of a batch.

        sizes: (height, width) of each picture.

        Returns a function that gives flags and pictures once the device is done.
        """
        out, flags = self._arena["out"], self._arena["flags"]
        each = out.nbytes // out.shape[0]
        parts = []
        for k, (height, width) in enumerate(sizes):
            part = self._down["out"].array[k * each : k * each + 3 * height * width]
            self._device.download(part, out[k].reshape((part.nbytes,), "uint8"), stream)
            parts.append(part.reshape(height, width, 3))
        words = self._down["flags"].array[: flags.nbytes]
        self._device.download(words, flags.reshape((flags.nbytes,), "uint8"), stream)
        return lambda: (words.view(np.int32).copy(), [part.copy() for part in parts])

    def _copy(self, name: str, to: Array, at: int, data: U8, stream: Stream) -> None:
        pinned = self._up[name].array[at : at + data.nbytes]
        pinned[:] = data
        self._device.upload(to.reshape((data.nbytes,), "uint8"), pinned, stream)
