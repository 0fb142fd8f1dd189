"""Transfers between host and device through pinned memory: what a batch uploads and downloads, weights and factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.seam import Array, BaseFacts, Stream
from dreammix_trt.engine.canvas.geometry import Size
from dreammix_trt.engine.device.arena import Arena
from dreammix_trt.engine.device.blocks import Picture, fill_block
from dreammix_trt.engine.drivers.device import Device, Mark, Pinned

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


class Uploads:
    """Uploads from any host memory, through two pinned pieces that take turns: one is filled while the other is copied.

    wait_for: waits for a point in the stream.
    made: frees the pinned memory; nothing may be under way then.
    size: bytes of a piece.
    """

    def __init__(
        self,
        device: Device,
        stream: Stream,
        wait_for: Callable[[Mark], None],
        made: ExitStack,
        size: int = 8 << 20,
    ) -> None:
        self._device, self._stream, self._wait_for = device, stream, wait_for
        self._pieces: list[Pinned] = []
        for _ in range(2):
            self._pieces.append(device.allocate_pinned(size))
            made.callback(self._pieces[-1].free)
        self._marks: list[Mark | None] = [None, None]
        self._doubtful = [False, False]  # whether a copy may be under way that no mark ends
        self._next = 0

    def send(self, to: Array, parts: Iterable[npt.NDArray[np.uint8]]) -> None:
        """Enqueue the upload of parts, one after the other, to a region. Waits only for pieces that are under way."""
        region, at, filled = to.reshape((to.nbytes,), "uint8"), 0, 0
        for part in parts:
            start = 0
            while start < len(part):
                piece = self._open_piece() if not filled else self._pieces[self._next].array
                count = min(len(part) - start, len(piece) - filled)
                piece[filled : filled + count] = part[start : start + count]
                start, filled = start + count, filled + count
                if filled == len(piece):
                    at, filled = self._close_piece(region, at, filled), 0
        if filled:
            self._close_piece(region, at, filled)

    def _open_piece(self) -> npt.NDArray[np.uint8]:
        """The next piece, once nothing reads it any more."""
        if self._doubtful[self._next]:
            self._wait_for(self._device.mark(self._stream))
            self._doubtful[self._next], self._marks[self._next] = False, None
        mark = self._marks[self._next]
        if mark is not None:
            self._wait_for(mark)
        return self._pieces[self._next].array

    def _close_piece(self, region: Array, at: int, filled: int) -> int:
        """Copy a filled piece to the region. Returns where the next goes."""
        self._doubtful[self._next] = True
        self._device.upload(region.part(at, filled), self._pieces[self._next].array[:filled], self._stream)
        self._marks[self._next] = self._device.mark(self._stream)
        self._doubtful[self._next] = False
        self._next = 1 - self._next
        return at + filled
