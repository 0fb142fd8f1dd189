"""Frames on a device: cut from the user's picture, given to the networks, pasted back."""

from __future__ import annotations

from typing import Any

from dreammix_trt.core.axes import FACTOR
from dreammix_trt.core.seam import Array
from dreammix_trt.engine.device.tools import RoomTools


class Frames:
    """Frames in one room. `which` is the framing of the "first" or the "second" stage, `k` the picture's number."""

    def __init__(self, tools: RoomTools) -> None:
        self._tools = tools

    def cut_frame(self, k: int, which: str, mask: Array) -> None:
        """Cut picture k's frame: mask, plain picture (also for the network), and the picture with its hole masked.

        mask: uint8 (H, W) of the canvas.
        """
        tools = self._tools
        network_mask = self._cut_mask(k, which, mask)
        self._give_latent_mask(k, network_mask)
        cut, picture, frame = tools.record(k, f"image_{which}"), tools.canvas(k, "image"), tools.work_frame()
        if tools.fits:  # all in one launch
            image, masked = tools.image(), tools.masked()
            self._cut(
                cut, picture, channels=3, out=frame, mask=network_mask, network=image, masked=masked, half=image.half
            )
        else:
            self._cut(cut, picture, channels=3, out=frame)
            self.give_to_network(k, which, frame, network=True, mask=network_mask)

    def show_frame(self, k: int, which: str, mask: Array) -> None:
        """Cut picture k's frame for ASUKA's decoder: the plain picture and the mask, into `RoomTools.seen`.

        mask: uint8 (H, W) of the canvas.
        """
        tools = self._tools
        network_mask, (image, seen) = self._cut_mask(k, which, mask), tools.seen()
        height, width = tools.room.shape.size
        whole = {"out": None if seen.half else seen, "network": seen if seen.half else None}
        tools.launch("latent_mask", mask=network_mask, **whole, height=height, width=width, factor=1, half=seen.half)
        cut, picture = tools.record(k, f"image_{which}"), tools.canvas(k, "image")
        if tools.fits:
            self._cut(cut, picture, channels=3, network=image, half=image.half)
        else:
            self._cut(cut, picture, channels=3, out=tools.work_frame())
            fit = tools.record(k, f"fit_{which}")
            self._cut(fit, tools.work_frame(), channels=3, network=image, half=image.half)

    def give_to_network(self, k: int, which: str, frame: Array, *, network: bool, mask: Array | None = None) -> None:
        """Give a picture of the work size to the VAE as its input.

        network: whether the plain picture is wanted.
        mask: where given, the picture with its hole masked is made as well.
        """
        tools = self._tools
        height, width = tools.room.shape.size
        image, masked = tools.image(), None if mask is None else tools.masked()
        if tools.fits:
            tools.launch(
                "normalise",
                picture=frame,
                mask=mask,
                network=image,
                masked=masked,
                height=height,
                width=width,
                half=image.half,
            )
        else:
            cut = tools.record(k, f"fit_{which}")
            wanted = image if network else None
            self._cut(cut, frame, channels=3, mask=mask, network=wanted, masked=masked, half=image.half)

    def paste(self, k: int, which: str, sheet: str, decoded: Array, *, seam: bool = False) -> None:
        """Put a stage's picture into its box of picture k, softened by the feather, in "out".

        sheet: the record that describes the paste.
        seam: whether only the seam is taken from it, and the inside from "local content".
        """
        tools = self._tools
        self.place(k, which, decoded, tools.arena["content"])
        tools.launch(
            "paste",
            original=tools.canvas(k, "image"),
            content=tools.arena["content"],
            local=tools.arena["local content"] if seam else None,
            seam=tools.arena["seam"] if seam else None,
            weight=tools.canvas(k, "weight"),
            sheet=tools.record(k, sheet),
            out=tools.canvas(k, "out"),
        )

    def place(self, k: int, which: str, decoded: Array, out: Array) -> None:
        """Bring a stage's picture to the size of its box."""
        self._cut(self._tools.record(k, f"box_{which}"), decoded, channels=3, out=out)

    def measure_distance(self, name: str, mask: Array, field: Array, out: Array, *, dilate: bool = False) -> None:
        """Weigh pixels by their distance from a mask.

        name: the kernel.
        field: the record that describes the distances.
        dilate: write the grown mask in place of weights.
        """
        self._tools.launch(name, mask=mask, field=field, scratch=self._tools.arena["distances"], out=out, dilate=dilate)

    def _cut_mask(self, k: int, which: str, mask: Array) -> Array:
        """Cut the mask of picture k's frame without losing a speck. Returns it at the networks' size."""
        tools = self._tools
        cut, found, frame_mask = tools.record(k, f"image_{which}"), tools.arena["found"], tools.frame_mask()
        tools.device.clear(found, tools.stream)
        self._cut(cut, mask, channels=1, out=frame_mask, threshold=True, found=found)
        tools.launch("keep_speck", source=mask, cut=cut, found=found, out=frame_mask)
        if tools.fits:
            return frame_mask
        network_mask = tools.network_mask()
        self._cut(tools.record(k, f"fit_{which}"), frame_mask, channels=1, out=network_mask, threshold=True)
        return network_mask

    def _give_latent_mask(self, k: int, mask: Array) -> None:
        """Bring a mask to the latents' size, also for the inpaint head where it exists."""
        tools = self._tools
        height, width = tools.room.shape.size
        head = tools.room.arrays.get("inpaint_head")
        tools.launch(
            "latent_mask",
            mask=mask,
            out=tools.latent_mask()[k],
            network=head["mask"] if head else None,
            height=height,
            width=width,
            factor=FACTOR,
            half=head["mask"].half if head else False,
        )

    def _cut(self, cut: Array, source: Array, **wanted: Any) -> None:
        """Cut and resize a part of `source` as the record `cut` describes.

        wanted: the kernel's other arguments.
        """
        self._tools.launch("cut", source=source, cut=cut, tables=self._tools.arena["tables"], **wanted)
