"""Launches kernels in one room, and returns the room's arrays in the shapes that kernels take."""

from __future__ import annotations

from typing import Any

from dreammix_trt.core.seam import Array, BaseFacts, Stream
from dreammix_trt.engine.device.arena import Arena
from dreammix_trt.engine.device.blocks import PICTURE
from dreammix_trt.engine.device.room import Room
from dreammix_trt.engine.drivers.device import Device

CHANNELS = 4  # of a latent


class RoomTools:
    """Views of the arena at a room's shape, and launching. `k` is a picture's number."""

    def __init__(self, device: Device, stream: Stream, arena: Arena, room: Room, facts: BaseFacts) -> None:
        self.device, self.stream, self.arena, self.room, self.facts = device, stream, arena, room, facts

    def launch(self, name: str, **arguments: Any) -> None:
        self.device.launch_kernel(name, self.stream, **arguments)

    def convert(self, source: Array, out: Array) -> None:
        """Copy an array into another one's type."""
        self.launch("convert", source=source, source_half=source.half, out=out, out_half=out.half, count=source.size)

    @property
    def fits(self) -> bool:
        """Whether the networks see the frame unchanged (only the reference's own sizes may differ)."""
        return self.room.shape.work == self.room.shape.size

    def latents(self, region: str) -> Array:
        shape = self.room.shape
        return self.arena[region].reshape((shape.pictures, CHANNELS, *shape.latent))

    def latent_mask(self) -> Array:
        shape = self.room.shape
        return self.arena["latent mask"].reshape((shape.pictures, 1, *shape.latent))

    def image(self) -> Array:
        """The frame as the VAE encoder takes it; where it runs in tiles, the whole frame."""
        image = self.room.arrays["vae_encoder"]["image"]
        if self.room.shape.tiling is None:
            return image
        return self.arena["tile image"].reshape((1, 3, *self.room.shape.size), image.dtype)

    def masked(self) -> Array:
        return self.arena["masked image"].reshape((1, 3, *self.room.shape.size), self.image().dtype)

    def seen(self) -> tuple[Array, Array]:
        """The frame's picture and mask as ASUKA's decoder takes them; where it runs in tiles, the whole frame's."""
        arrays, size = self.room.arrays["asuka_decoder"], self.room.shape.size
        if self.room.shape.tiling is None:
            return arrays["image"], arrays["mask"]
        image = self.arena["masked image"].reshape((1, 3, *size), arrays["image"].dtype)
        return image, self.arena["seen mask"].reshape((1, 1, *size), arrays["mask"].dtype)

    def work_frame(self) -> Array:
        return self.arena["frame"].reshape((*self.room.shape.work, 3))

    def frame_mask(self) -> Array:
        return self.arena["frame mask"].reshape(self.room.shape.work)

    def network_mask(self) -> Array:
        return self.arena["network mask"].reshape(self.room.shape.size)

    def canvas(self, k: int, region: str) -> Array:
        return self.arena[region][k]

    def flag(self, k: int) -> Array:
        return self.arena["flags"].part(k, 1)

    def record(self, k: int, name: str) -> Array:
        dtype, offset = PICTURE.fields[name][:2]  # type: ignore[index]
        return self.arena["records"][k].part(offset, dtype.itemsize)
