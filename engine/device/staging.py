"""Between host and device: what a batch uploads, and the pictures it brings back, in pinned memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dreammix_trt.engine.canvas.geometry import Size
from dreammix_trt.engine.device import jobs, texts
from dreammix_trt.engine.device.arena import Arena
from dreammix_trt.engine.device.jobs import Picture
from dreammix_trt.engine.device.plan import Options
from dreammix_trt.engine.device.texts import PictureTexts
from dreammix_trt.engine.drivers.device import Array, Device, Pinned

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Work:
    """One picture with all it needs: its pixels are its canvas'."""

    picture: Picture
    texts: PictureTexts


class Staging:
    """Pinned host memory beside the arena: what a batch uploads, and the pictures it brings back; `made` frees it."""

    def __init__(self, device: Device, arena: Arena, options: Options, made: ExitStack) -> None:
        self._device, self._arena = device, arena
        self._block = jobs.Block(options.pictures)
        names = (*jobs.regions(options.pictures), "image", "mask")

        def pinned(name: str) -> Pinned:
            memory = device.pinned(arena[name].nbytes)
            made.callback(memory.free)
            return memory

        self._up = {name: pinned(name) for name in names}
        self._down = {name: pinned(name) for name in ("out", "flags")}

    def upload(self, batch: Sequence[Work], facts: Any, stream: Any) -> None:
        ids = np.zeros((len(batch) * jobs.PROMPTS, 2, 77), np.int64)
        for k, work in enumerate(batch):
            for number, wanted in enumerate(work.texts.all):
                ids[k * jobs.PROMPTS + number] = wanted.ids
        plans = np.stack([texts.plan_record(work.texts.plan) for work in batch])
        for name, data in self._block.fill([work.picture for work in batch], ids, plans, facts):
            self._copy(name, self._arena[name], 0, data, stream)
        for k, work in enumerate(batch):
            canvas = work.picture.canvas
            for name, data in (("image", canvas.image), ("mask", canvas.mask)):
                each = self._arena[name].nbytes // self._arena[name].shape[0]
                flat = np.ascontiguousarray(data).reshape(-1)
                self._copy(name, self._arena[name][k], k * each, flat, stream)

    def download(self, shapes: Sequence[Size], stream: Any) -> Callable[[], tuple[npt.NDArray[np.int32], list[U8]]]:
        """Enqueue the way back; the function gives flags and pictures once the device is done."""
        out, flags = self._arena["out"], self._arena["flags"]
        each = out.nbytes // out.shape[0]
        parts = []
        for k, (height, width) in enumerate(shapes):
            part = self._down["out"].array[k * each : k * each + 3 * height * width]
            self._device.download(part, out[k].reshaped((part.nbytes,), "uint8"), stream)
            parts.append(part.reshape(height, width, 3))
        self._device.download(
            self._down["flags"].array[: flags.nbytes], flags.reshaped((flags.nbytes,), "uint8"), stream
        )
        return lambda: (
            self._down["flags"].array[: flags.nbytes].view(np.int32).copy(),
            [part.copy() for part in parts],
        )

    def _copy(self, name: str, to: Array, at: int, data: npt.NDArray[np.uint8], stream: Any) -> None:
        pinned = self._up[name].array[at : at + data.nbytes]
        pinned[:] = data
        self._device.upload(to.reshaped((data.nbytes,), "uint8"), pinned, stream)
