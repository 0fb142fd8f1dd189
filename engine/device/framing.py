"""Frames on a device: cut from the user's picture, given to the networks, pasted back."""

from __future__ import annotations

from dreammix_trt.core.axes import FACTOR
from dreammix_trt.core.seam import Array
from dreammix_trt.engine.device.tools import RoomTools


class Frames:
    """In one room. which: the framing of the "first" or "second" stage."""

    def __init__(self, tools: RoomTools) -> None:
        self._tools = tools

    def cut_frame(self, k: int, which: str, mask: Array) -> None:
        """Cut picture k's frame: mask, plain picture (also for the network), and the picture with its hole masked."""
        cut, found, frame_mask = (
            self._tools.record(k, f"image_{which}"),
            self._tools.arena["found"],
            self._tools.frame_mask(),
        )
        self._tools.device.clear(found, self._tools.stream)
        self._tools.launch(
            "cut",
            source=mask,
            channels=1,
            cut=cut,
            tables=self._tools.arena["tables"],
            out=frame_mask,
            mask=None,
            network=None,
            masked=None,
            half=False,
            threshold=True,
            found=found,
        )
        self._tools.launch("keep_speck", source=mask, cut=cut, found=found, out=frame_mask)
        network_mask = frame_mask
        if not self._tools.fits:
            network_mask = self._tools.network_mask()
            self._tools.launch(
                "cut",
                source=frame_mask,
                channels=1,
                cut=self._tools.record(k, f"fit_{which}"),
                tables=self._tools.arena["tables"],
                out=network_mask,
                mask=None,
                network=None,
                masked=None,
                half=False,
                threshold=True,
                found=None,
            )
        height, width = self._tools.room.shape.size
        head = self._tools.room.arrays.get("inpaint_head")
        self._tools.launch(
            "latent_mask",
            mask=network_mask,
            out=self._tools.latent_mask()[k],
            network=head["mask"] if head else None,
            height=height,
            width=width,
            factor=FACTOR,
            half=head["mask"].half if head else False,
        )
        self._tools.launch(
            "cut",
            source=self._tools.canvas(k, "image"),
            channels=3,
            cut=cut,
            tables=self._tools.arena["tables"],
            out=self._tools.work_frame(),
            mask=network_mask if self._tools.fits else None,
            network=self._tools.image() if self._tools.fits else None,
            masked=self._tools.masked() if self._tools.fits else None,
            half=self._tools.image().half,
            threshold=False,
            found=None,
        )
        if not self._tools.fits:
            self.give_to_network(k, which, self._tools.work_frame(), network=True, mask=network_mask)

    def give_to_network(self, k: int, which: str, frame: Array, *, network: bool, mask: Array | None = None) -> None:
        """A picture of the work size as the VAE's input (and masked, where a mask is given)."""
        height, width = self._tools.room.shape.size
        masked = None if mask is None else self._tools.masked()
        if self._tools.fits:
            self._tools.launch(
                "normalise",
                picture=frame,
                mask=mask,
                network=self._tools.image(),
                masked=masked,
                height=height,
                width=width,
                half=self._tools.image().half,
            )
        else:
            self._tools.launch(
                "cut",
                source=frame,
                channels=3,
                cut=self._tools.record(k, f"fit_{which}"),
                tables=self._tools.arena["tables"],
                out=None,
                mask=mask,
                network=self._tools.image() if network else None,
                masked=masked,
                half=self._tools.image().half,
                threshold=False,
                found=None,
            )

    def paste(self, k: int, which: str, sheet: str, decoded: Array, *, seam: bool = False) -> None:
        """Put a stage's picture into its box of picture k, softened by the feather, in "out"."""
        self.place(k, which, decoded, self._tools.arena["content"])
        self._tools.launch(
            "paste",
            original=self._tools.canvas(k, "image"),
            content=self._tools.arena["content"],
            local=self._tools.arena["local content"] if seam else None,
            seam=self._tools.arena["seam"] if seam else None,
            weight=self._tools.canvas(k, "weight"),
            sheet=self._tools.record(k, sheet),
            out=self._tools.canvas(k, "out"),
        )

    def place(self, k: int, which: str, decoded: Array, out: Array) -> None:
        self._tools.launch(
            "cut",
            source=decoded,
            channels=3,
            cut=self._tools.record(k, f"box_{which}"),
            tables=self._tools.arena["tables"],
            out=out,
            mask=None,
            network=None,
            masked=None,
            half=False,
            threshold=False,
            found=None,
        )

    def measure_distance(self, name: str, mask: Array, field: Array, out: Array, *, dilate: bool = False) -> None:
        self._tools.launch(name, mask=mask, field=field, scratch=self._tools.arena["distances"], out=out, dilate=dilate)
