"""What the phases of a batch enqueue: start, step, hand-over, finish. Everything is on the device; nothing waits.

The order is that of engine/host/painter.py, kernel for function. A phase is a plain list of launches whose arguments
never change for a room, so it can be captured as a graph. What decides the list is the phase's value alone: it is the
key of the graph and the only thing that recording is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dreammix_trt.core.networks import FACTOR, flag_of
from dreammix_trt.core.noise import DRAWS
from dreammix_trt.core.schedule import STAGES, Stage
from dreammix_trt.core.seam import Array, Stream
from dreammix_trt.engine.canvas.geometry import fill_cascade
from dreammix_trt.engine.device.arena import Arena, Regions
from dreammix_trt.engine.device.blocks import MOST_STEPS, PICTURE
from dreammix_trt.engine.device.room import Room, Shape
from dreammix_trt.engine.device.texts import Texts
from dreammix_trt.engine.drivers.device import Device

CHANNELS = 4  # of a latent
Latent = Literal["x", "x0"]  # after the last step, or its prediction


@dataclass(frozen=True)
class Start:
    """Picture k's first stage: frame, fill, encodings, head, noise. fills: whether the hole is filled from around.
    dilates: whether more than the mask is repainted."""

    k: int
    stage: Stage
    fills: bool
    dilates: bool


@dataclass(frozen=True)
class TakeStep:
    """One whole step of the batch on one UNet: two launches around it. The counter says which row it is."""

    network: str


@dataclass(frozen=True)
class DecodeLocal:
    """In the first stage's room: picture k's prediction (x0), or its finished latent (x), as a picture, kept until the
    end."""

    k: int
    source: Latent


@dataclass(frozen=True)
class HandOver:
    """In the second stage's room, after `DecodeLocal`: paste, encode, noise at the step's level. original: whether the
    background is the user's picture, not the pasted one."""

    k: int
    original: bool


@dataclass(frozen=True)
class Finish:
    """The last latent as picture k's finished picture, in "out". second: whether it is the second stage's. keeps_local:
    whether only the seam is taken from it."""

    k: int
    second: bool
    keeps_local: bool


Phase = Start | TakeStep | DecodeLocal | HandOver | Finish


def regions(device_scratch: Callable[[str, int, int, int], int], largest: Shape, pixels: int) -> Regions:
    """Memory of the phases, for the largest room and pictures of at most `pixels`.

    device_scratch: bytes that a kernel ("fill", "distance", "step") needs, from (pictures, height, width).
    """
    pictures, (h, w), (height, width) = largest.pictures, largest.latent, largest.work
    latents = ((pictures, CHANNELS, h, w), "float32")
    size = (FACTOR * h, FACTOR * w)
    return {
        "image": ((pictures, pixels, 3), "uint8"), "mask": ((pictures, pixels), "uint8"),
        "weight": ((pictures, pixels), "uint8"), "out": ((pictures, pixels, 3), "uint8"),
        "content": ((pixels, 3), "uint8"), "local content": ((pixels, 3), "uint8"), "seam": ((pixels,), "uint8"),
        "spread mask": ((pixels,), "uint8"), "distances": ((device_scratch("distance", 1, pixels, 1),), "uint8"),
        "frame": ((height, width, 3), "uint8"), "frame mask": ((height, width), "uint8"),
        "network mask": (size, "uint8"), "decoded": ((pictures, *size, 3), "uint8"),
        "last decoded": ((*size, 3), "uint8"), "masked image": ((1, 3, *size), "float32"),
        "filling": ((device_scratch("fill", 1, height, width),), "uint8"),
        "x": latents, "x0": latents, "x in": latents, "background": latents, "picture latent": latents,
        "latent mask": ((pictures, 1, h, w), "float32"),
        "step scratch": ((device_scratch("step", pictures, h, w),), "uint8"),
        "tile moments": ((2, CHANNELS, h, w), "float32"), "tile image": ((3, *size), "float32"),
        "counter": ((1,), "int32"), "numbers": ((MOST_STEPS + 1,), "int32"),
        "found": ((1,), "int32"), "deepest": ((1,), "int32"), "flags": ((pictures + 1,), "int32"),
    }  # fmt: skip


class Phases:
    """The phases in one room, over the arena's regions."""

    def __init__(self, device: Device, stream: Stream, arena: Arena, room: Room, texts: Texts, facts: Any) -> None:
        self._device, self._stream, self._arena, self._room = device, stream, arena, room
        self._texts, self._facts = texts, facts

    def record(self, phase: Phase) -> None:
        """Enqueue a phase."""
        match phase:
            case Start():
                self._start(phase)
            case TakeStep():
                self._take_step(phase.network)
            case DecodeLocal():
                self._decode(phase.k, self._latents(phase.source)[phase.k], self._arena["decoded"][phase.k])
            case HandOver():
                self._hand_over(phase)
            case Finish():
                self._finish(phase)

    def preview(self, k: int, source: Latent) -> Array:
        """Enqueue picture k's present prediction as a picture of the frame, in "last decoded" (uint8, h, w, 3). It sets
        no flag: looking must not change what becomes of a request."""
        last = self._arena["last decoded"].reshaped((*self._room.shape.size, 3))
        self._decode(k, self._latents(source)[k], last, flag=self._arena["found"])
        return last

    # -- the phases ---------------------------------------------------------------------------------------------------

    def _take_step(self, network: str) -> None:
        shape, arrays, latent = self._room.shape, self._room.arrays[network], self._room.shape.latent
        common = {
            "counter": self._arena["counter"], "table": self._arena["steps"], "jobs": self._arena["jobs"],
            "background": self._latents("background"), "mask": self._latent_mask(), "x_in": self._latents("x in"),
            "x": self._latents("x"), "most_steps": MOST_STEPS, "pictures": shape.pictures, "channels": CHANNELS,
            "height": latent[0], "width": latent[1], "rows_per_picture": shape.rows_per_picture,
            "half": arrays["sample"].half,
        }  # fmt: skip
        self._kernel(
            "step_before", **common, network_in=arrays["sample"], timestep=arrays["timestep"],
            time_ids=arrays["time_ids"],
        )  # fmt: skip
        self._room.enqueue(network, self._stream)
        self._kernel(
            "step_after", **common, eps=arrays["eps"], x0=self._latents("x0"), scratch=self._arena["step scratch"],
            flags=self._arena["flags"], bit=flag_of(network),
        )  # fmt: skip

    def _start(self, phase: Start) -> None:
        k, stage = phase.k, phase.stage
        mask = self._canvas(k, "mask")
        self._distance("feather", mask, self._record(k, "feather_field"), self._canvas(k, "weight"))
        if phase.dilates:
            spread = self._arena["spread mask"]
            self._distance("feather", mask, self._record(k, "dilate_field"), spread, dilate=True)
            mask = spread
        self._cut_frame(k, "first", mask)
        if phase.fills:
            self._kernel(
                "fill", picture=self._work_frame(), mask=self._frame_mask(), scratch=self._arena["filling"],
                height=self._room.shape.work[0], width=self._room.shape.work[1],
                cascade=fill_cascade(self._facts.native_side),
            )  # fmt: skip
            self._to_network(k, "first", self._work_frame(), network=True)
        background = self._latents("background")[k]
        # The first stage's background is drawn as the local stage's fill, or as the global stage's own.
        self._encode(k, background, "vae_noise_lcg_fill" if stage == "lcg" else "vae_noise_gch_background")
        self._noised(background, k, self._latents("x")[k], hand_over=False)
        self._condition(k, stage)

    def _hand_over(self, phase: HandOver) -> None:
        k = phase.k
        self._paste(k, "first", "hand_over_sheet", self._arena["decoded"][k])
        pasted = self._canvas(k, "out")
        self._kernel(
            "cut", source=pasted, channels=3, cut=self._record(k, "image_second"), tables=self._arena["tables"],
            out=self._work_frame(), mask=None, network=self._image() if self._fits else None, masked=None,
            half=self._image().half, threshold=False, found=None,
        )  # fmt: skip
        if not self._fits:
            self._to_network(k, "second", self._work_frame(), network=True)
        start, background = self._latents("picture latent")[k], self._latents("background")[k]
        self._encode(k, start, "vae_noise_switch_zG")
        self._cut_frame(k, "second", self._canvas(k, "mask"))
        if phase.original:
            self._encode(k, background, "vae_noise_gch_background")
        else:
            self._device.copy(background, start, self._stream)
        self._noised(start, k, self._latents("x")[k], hand_over=True)
        self._condition(k, "gch")

    def _finish(self, phase: Finish) -> None:
        k = phase.k
        last = self._arena["last decoded"]
        self._decode(k, self._latents("x")[k], last)
        if phase.keeps_local:
            self._place(k, "first", self._arena["decoded"][k], self._arena["local content"])
            self._kernel(
                "seam", mask=self._canvas(k, "mask"), field=self._record(k, "seam_field"),
                scratch=self._arena["distances"], deepest=self._arena["deepest"], out=self._arena["seam"],
            )  # fmt: skip
        self._paste(k, "second" if phase.second else "first", "final_sheet", last, seam=phase.keeps_local)

    # -- parts of them ------------------------------------------------------------------------------------------------

    def _cut_frame(self, k: int, which: str, mask: Array) -> None:
        """Cut picture k's frame: mask, plain picture (also for the network), and the picture with its hole masked."""
        cut, found, frame_mask = self._record(k, f"image_{which}"), self._arena["found"], self._frame_mask()
        self._device.clear(found, self._stream)
        self._kernel(
            "cut", source=mask, channels=1, cut=cut, tables=self._arena["tables"], out=frame_mask, mask=None,
            network=None, masked=None, half=False, threshold=True, found=found,
        )  # fmt: skip
        self._kernel("keep_speck", source=mask, cut=cut, found=found, out=frame_mask)
        network_mask = frame_mask
        if not self._fits:
            network_mask = self._network_mask()
            self._kernel(
                "cut", source=frame_mask, channels=1, cut=self._record(k, f"fit_{which}"), tables=self._arena["tables"],
                out=network_mask, mask=None, network=None, masked=None, half=False, threshold=True, found=None,
            )  # fmt: skip
        height, width = self._room.shape.size
        head = self._room.arrays.get("inpaint_head")
        self._kernel(
            "latent_mask", mask=network_mask, out=self._latent_mask()[k], network=head["mask"] if head else None,
            height=height, width=width, factor=FACTOR, half=head["mask"].half if head else False,
        )  # fmt: skip
        self._kernel(
            "cut", source=self._canvas(k, "image"), channels=3, cut=cut, tables=self._arena["tables"],
            out=self._work_frame(), mask=network_mask if self._fits else None,
            network=self._image() if self._fits else None, masked=self._masked() if self._fits else None,
            half=self._image().half, threshold=False, found=None,
        )  # fmt: skip
        if not self._fits:
            self._to_network(k, which, self._work_frame(), network=True, mask=network_mask)

    def _to_network(self, k: int, which: str, frame: Array, *, network: bool, mask: Array | None = None) -> None:
        """A picture of the work size as the VAE's input (and masked, where a mask is given)."""
        height, width = self._room.shape.size
        masked = None if mask is None else self._masked()
        if self._fits:
            self._kernel(
                "normalise", picture=frame, mask=mask, network=self._image(), masked=masked, height=height, width=width,
                half=self._image().half,
            )  # fmt: skip
        else:
            self._kernel(
                "cut", source=frame, channels=3, cut=self._record(k, f"fit_{which}"), tables=self._arena["tables"],
                out=None, mask=mask, network=self._image() if network else None, masked=masked,
                half=self._image().half, threshold=False, found=None,
            )  # fmt: skip

    def _condition(self, k: int, stage: Stage) -> None:
        """What the stage tells the UNet of picture k: text, and the head's feature of the masked picture."""
        rows, unet = self._room.shape.rows_per_picture, self._room.arrays["unet"]
        dtype, context = unet["encoder_hidden_states"].dtype, self._room.shape.context
        condition = self._texts.rows_of(STAGES.index(stage), context, dtype)
        for name, source in zip(("encoder_hidden_states", "text_embeds"), condition, strict=True):
            self._device.copy(unet[name].part(k * rows, rows), source.part(k * rows, rows), self._stream)
        feature = unet["inpaint_feature"].part(k, 1)
        head = self._room.arrays.get("inpaint_head")
        if head is None:
            self._device.clear(feature, self._stream)
            return
        self._device.copy(self._image(), self._masked(), self._stream)
        self._encode(k, self._latents("picture latent")[k], f"vae_noise_{stage}_masked", network=head["masked_latent"])
        self._room.enqueue("inpaint_head", self._stream)
        made = head["feature"]
        self._kernel(
            "check_finite",
            values=made,
            count=made.size,
            half=made.half,
            flags=self._flag(k),
            bit=flag_of("inpaint_head"),
        )
        self._kernel("convert", source=made, source_half=made.half, out=feature, out_half=feature.half, count=made.size)

    def _encode(self, k: int, latent: Array, draw: str, network: Array | None = None) -> None:
        """The VAE's input as a scaled latent, float32 (4, h, w), and in a network's type."""
        arrays, (h, w) = self._room.arrays["vae_encoder"], self._room.shape.latent
        mean, std = arrays["mean"], arrays["std"]
        if self._room.shape.tiling is None:
            self._room.enqueue("vae_encoder", self._stream)
        else:
            mean, std = self._encode_tiles()
        self._kernel(
            "encode_latent", mean=mean, std=std, job=self._arena["jobs"][k], latent=latent, network=None,
            scaling=self._facts.scaling_factor, draw=DRAWS[draw], channels=CHANNELS, height=h, width=w, half=mean.half,
            flags=self._flag(k), bit=flag_of("vae_encoder"),
        )  # fmt: skip
        if network is not None:
            self._convert(latent, network)

    def _decode(self, k: int, latent: Array, out: Array, flag: Array | None = None) -> None:
        """A scaled latent as a picture uint8 (h, w, 3). flag: None: picture k's."""
        arrays, (height, width) = self._room.arrays["vae_decoder"], self._room.shape.size
        image = arrays["image"]
        if self._room.shape.tiling is None:
            given = arrays["latent"]
            self._kernel(
                "scaled",
                latent=latent,
                factor=self._facts.scaling_factor,
                out=given,
                count=latent.size,
                half=given.half,
            )
            self._room.enqueue("vae_decoder", self._stream)
        else:
            image = self._decode_tiles(latent)
        self._kernel(
            "decoded", image=image, out=out, height=height, width=width, half=image.half,
            flags=flag or self._flag(k), bit=flag_of("vae_decoder"),
        )  # fmt: skip

    def _encode_tiles(self) -> tuple[Array, Array]:
        """Mean and std of the whole frame's image in "whole image", float32, from tiles."""
        arrays, tiling, (h, w) = self._room.arrays["vae_encoder"], self._room.shape.tiling, self._room.shape.latent
        assert tiling is not None
        moments = self._arena["tile moments"].reshaped((2, CHANNELS, h, w))
        self._device.clear(moments, self._stream)
        source, height, width = self._image(), *self._room.shape.size
        for number, tile in enumerate(tiling.tiles()):
            image = arrays["image"]
            self._kernel(
                "take_tile", source=source, out=image, channels=3, height=height, width=width, row=FACTOR * tile.row,
                col=FACTOR * tile.col, tile_height=FACTOR * tiling.height, tile_width=FACTOR * tiling.width,
                source_half=source.half, out_half=image.half,
            )  # fmt: skip
            self._room.enqueue("vae_encoder", self._stream)
            for part, name in enumerate(("mean", "std")):
                self._add_tile(arrays[name], number, 1, moments[part], (h, w), (tile.row, tile.col), CHANNELS)
        return moments[0], moments[1]

    def _decode_tiles(self, latent: Array) -> Array:
        """The whole frame's image, float32 (3, H, W), from tiles of a scaled latent."""
        arrays, tiling, (h, w) = self._room.arrays["vae_decoder"], self._room.shape.tiling, self._room.shape.latent
        assert tiling is not None
        height, width = self._room.shape.size
        image, unscaled = self._arena["tile image"].reshaped((3, height, width)), self._latents("x in")[0]
        self._device.clear(image, self._stream)
        self._kernel(
            "scaled", latent=latent, factor=self._facts.scaling_factor, out=unscaled, count=latent.size, half=False
        )
        for number, tile in enumerate(tiling.tiles()):
            given = arrays["latent"]
            self._kernel(
                "take_tile", source=unscaled, out=given, channels=CHANNELS, height=h, width=w, row=tile.row,
                col=tile.col, tile_height=tiling.height, tile_width=tiling.width, source_half=False,
                out_half=given.half,
            )  # fmt: skip
            self._room.enqueue("vae_decoder", self._stream)
            place = FACTOR * tile.row, FACTOR * tile.col
            self._add_tile(arrays["image"], number, FACTOR, image, (height, width), place, 3)
        return image

    def _add_tile(
        self,
        tile: Array,
        number: int,
        factor: int,
        out: Array,
        size: tuple[int, int],
        place: tuple[int, int],
        channels: int,
    ) -> None:
        rows, cols = self._room.ramps(factor)[number]
        tiling = self._room.shape.tiling
        assert tiling is not None
        self._kernel(
            "add_tile", tile=tile, ramp_rows=rows, ramp_cols=cols, out=out, channels=channels, height=size[0],
            width=size[1], row=place[0], col=place[1], tile_height=factor * tiling.height,
            tile_width=factor * tiling.width, half=tile.half,
        )  # fmt: skip

    def _paste(self, k: int, which: str, sheet: str, decoded: Array, *, seam: bool = False) -> None:
        """Put a stage's picture into its box of picture k, softened by the feather, in "out"."""
        self._place(k, which, decoded, self._arena["content"])
        self._kernel(
            "paste", original=self._canvas(k, "image"), content=self._arena["content"],
            local=self._arena["local content"] if seam else None, seam=self._arena["seam"] if seam else None,
            weight=self._canvas(k, "weight"), sheet=self._record(k, sheet), out=self._canvas(k, "out"),
        )  # fmt: skip

    def _place(self, k: int, which: str, decoded: Array, out: Array) -> None:
        self._kernel(
            "cut", source=decoded, channels=3, cut=self._record(k, f"box_{which}"), tables=self._arena["tables"],
            out=out, mask=None, network=None, masked=None, half=False, threshold=False, found=None,
        )  # fmt: skip

    def _distance(self, name: str, mask: Array, field: Array, out: Array, *, dilate: bool = False) -> None:
        self._kernel(name, mask=mask, field=field, scratch=self._arena["distances"], out=out, dilate=dilate)

    def _noised(self, latent: Array, k: int, out: Array, *, hand_over: bool) -> None:
        self._kernel(
            "noised", latent=latent, job=self._arena["jobs"][k], hand_over=hand_over, out=out, count=latent.size
        )

    def _convert(self, source: Array, out: Array) -> None:
        self._kernel("convert", source=source, source_half=source.half, out=out, out_half=out.half, count=source.size)

    def _kernel(self, name: str, **arguments: Any) -> None:
        self._device.kernel(name, self._stream, **arguments)

    # -- arrays -------------------------------------------------------------------------------------------------------

    @property
    def _fits(self) -> bool:
        """Whether the networks see the frame as it is (only the reference's own sizes may differ)."""
        return self._room.shape.work == self._room.shape.size

    def _latents(self, region: str) -> Array:
        shape = self._room.shape
        return self._arena[region].reshaped((shape.pictures, CHANNELS, *shape.latent))

    def _latent_mask(self) -> Array:
        shape = self._room.shape
        return self._arena["latent mask"].reshaped((shape.pictures, 1, *shape.latent))

    def _image(self) -> Array:
        """The frame as the VAE encoder takes it; where it goes in tiles, the whole of it."""
        image = self._room.arrays["vae_encoder"]["image"]
        if self._room.shape.tiling is None:
            return image
        return self._arena["tile image"].reshaped((1, 3, *self._room.shape.size), image.dtype)

    def _masked(self) -> Array:
        return self._arena["masked image"].reshaped((1, 3, *self._room.shape.size), self._image().dtype)

    def _work_frame(self) -> Array:
        return self._arena["frame"].reshaped((*self._room.shape.work, 3))

    def _frame_mask(self) -> Array:
        return self._arena["frame mask"].reshaped(self._room.shape.work)

    def _network_mask(self) -> Array:
        return self._arena["network mask"].reshaped(self._room.shape.size)

    def _canvas(self, k: int, region: str) -> Array:
        return self._arena[region][k]

    def _flag(self, k: int) -> Array:
        return self._arena["flags"].part(k, 1)

    def _record(self, k: int, name: str) -> Array:
        dtype, offset = PICTURE.fields[name][:2]  # type: ignore[index]
        return self._arena["records"][k].part(offset, dtype.itemsize)
