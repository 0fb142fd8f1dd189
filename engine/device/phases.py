"""What the phases of a batch enqueue: start, step, hand-over, finish. Everything is on the device; nothing waits.

The order is that of engine/host/painter.py, kernel for function. A phase is a plain list of launches whose arguments
never change for a room, so it can be captured as a graph. Only the phase's value decides the list: it is the key of the
graph and the only input of recording. Its `str` is its name for people.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dreammix_trt.core.axes import FACTOR
from dreammix_trt.core.networks import flag_of, kv_name
from dreammix_trt.core.schedule import Stage
from dreammix_trt.core.seam import Array, BaseFacts, Stream
from dreammix_trt.engine.canvas.geometry import fill_cascade
from dreammix_trt.engine.device.arena import Arena, Regions
from dreammix_trt.engine.device.blocks import MOST_STEPS
from dreammix_trt.engine.device.framing import Frames
from dreammix_trt.engine.device.prior import Prior
from dreammix_trt.engine.device.room import Room, RoomShape
from dreammix_trt.engine.device.texts import DeviceTexts
from dreammix_trt.engine.device.tools import CHANNELS, RoomTools
from dreammix_trt.engine.device.vae import Vae
from dreammix_trt.engine.drivers.device import Device

Latent = Literal["x", "x0"]  # after the last step, or its prediction


@dataclass(frozen=True)
class Start:
    """Picture k's first stage: frame, fill, encodings, head, noise.

    fills: whether the hole is filled from its surroundings.
    dilates: whether more than the mask is repainted.
    """

    k: int
    stage: Stage
    fills: bool
    dilates: bool

    def __str__(self) -> str:
        return f"start of picture {self.k} ({self.stage})"


@dataclass(frozen=True)
class AskPrior:
    """What ASUKA's prior expects in the hole of picture k's frame, written into its condition of a stage.

    number: of the stage, in their order.
    beside: whether it stands beside the text.
    """

    k: int
    number: int
    stage: Stage
    beside: bool

    def __str__(self) -> str:
        return f"prior of picture {self.k} ({self.stage})"


@dataclass(frozen=True)
class Attend:
    """The keys and values of the batch's text for one UNet: once in a stage, and where the UNet changes within it."""

    network: str

    def __str__(self) -> str:
        return f"keys and values for {self.network}"


@dataclass(frozen=True)
class TakeStep:
    """One whole step of the batch on one UNet, between two launches. The counter says which row it is."""

    network: str

    def __str__(self) -> str:
        return f"a step on {self.network}"


@dataclass(frozen=True)
class Seen:
    """The frame that ASUKA's decoder sees.

    which: of the "first" or the "second" stage.
    dilates: whether more than the mask is repainted there.
    """

    which: str
    dilates: bool


@dataclass(frozen=True)
class DecodeLocal:
    """Picture k's local result as a picture, kept until the end. Runs in the first stage's room.

    source: "x0": the prediction; "x": the finished latent.
    seen: for ASUKA's decoder; None: the VAE's decodes.
    """

    k: int
    source: Latent
    seen: Seen | None = None

    def __str__(self) -> str:
        return f"local result of picture {self.k}"


@dataclass(frozen=True)
class HandOver:
    """Paste, encode, add noise at the step's level. Runs in the second stage's room, after `DecodeLocal`.

    original: whether the background is the user's picture, not the pasted one.
    """

    k: int
    original: bool

    def __str__(self) -> str:
        return f"hand-over of picture {self.k}"


@dataclass(frozen=True)
class Finish:
    """The last latent as picture k's finished picture, in "out".

    second: whether the latent is the second stage's.
    keeps_local: whether only the seam is taken from it.
    seen: see `DecodeLocal`.
    """

    k: int
    second: bool
    keeps_local: bool
    seen: Seen | None = None

    def __str__(self) -> str:
        return f"finish of picture {self.k}"


Phase = Start | AskPrior | Attend | TakeStep | DecodeLocal | HandOver | Finish


def list_regions(
    device_scratch: Callable[[str, int, int, int], int], largest: RoomShape, pixels: int, *, sees: bool
) -> Regions:
    """Memory of the phases.

    device_scratch: bytes that a kernel ("fill", "distance", "step") needs, from (pictures, height, width).
    largest: the largest room.
    pixels: the most pixels of a picture.
    sees: whether there is ASUKA's decoder, which sees the frame.
    """
    pictures, (h, w), (height, width) = largest.pictures, largest.latent, largest.work
    latents = ((pictures, CHANNELS, h, w), "float32")
    size = (FACTOR * h, FACTOR * w)
    return {
        "image": ((pictures, pixels, 3), "uint8"),
        "mask": ((pictures, pixels), "uint8"),
        "weight": ((pictures, pixels), "uint8"),
        "out": ((pictures, pixels, 3), "uint8"),
        "content": ((pixels, 3), "uint8"),
        "local content": ((pixels, 3), "uint8"),
        "seam": ((pixels,), "uint8"),
        "spread mask": ((pixels,), "uint8"),
        "distances": ((device_scratch("distance", 1, pixels, 1),), "uint8"),
        "frame": ((height, width, 3), "uint8"),
        "frame mask": ((height, width), "uint8"),
        "network mask": (size, "uint8"),
        "decoded": ((pictures, *size, 3), "uint8"),
        "last decoded": ((*size, 3), "uint8"),
        "masked image": ((1, 3, *size), "float32"),
        "filling": ((device_scratch("fill", 1, height, width),), "uint8"),
        "x": latents,
        "x0": latents,
        "x in": latents,
        "background": latents,
        "picture latent": latents,
        "latent mask": ((pictures, 1, h, w), "float32"),
        "step scratch": ((device_scratch("step", pictures, h, w),), "uint8"),
        "tile moments": ((2, CHANNELS, h, w), "float32"),
        "tile image": ((3, *size), "float32"),
        **({"seen mask": ((1, *size), "float32")} if sees else {}),
        "counter": ((1,), "int32"),
        "numbers": ((MOST_STEPS + 1,), "int32"),
        "found": ((1,), "int32"),
        "deepest": ((1,), "int32"),
        "flags": ((pictures + 1,), "int32"),
    }


class Phases:
    """The phases in one room, over the arena's regions."""

    def __init__(
        self, device: Device, stream: Stream, arena: Arena, room: Room, texts: DeviceTexts, facts: BaseFacts
    ) -> None:
        self._tools, self._texts = RoomTools(device, stream, arena, room, facts), texts
        self._frames, self._vae = Frames(self._tools), Vae(self._tools)
        self._prior = Prior(self._tools, texts)

    def record(self, phase: Phase) -> None:
        """Enqueue a phase."""
        match phase:
            case Start():
                self._start(phase)
            case AskPrior():
                self._prior.ask(phase.k, phase.number, phase.stage, beside=phase.beside)
            case Attend():
                self._attend(phase.network)
            case TakeStep():
                self._take_step(phase.network)
            case DecodeLocal():
                self._decode(phase.k, phase.source, self._tools.arena["decoded"][phase.k], phase.seen)
            case HandOver():
                self._hand_over(phase)
            case Finish():
                self._finish(phase)

    def preview(self, k: int, source: Latent, seen: Seen | None) -> Array:
        """Enqueue picture k's present prediction as a picture of the frame.

        It sets no flag: looking must not change the result of a request.

        Returns "last decoded", uint8 (h, w, 3).
        """
        last = self._tools.arena["last decoded"].reshape((*self._tools.room.shape.size, 3))
        self._decode(k, source, last, seen, flag=self._tools.arena["found"])
        return last

    def _decode(self, k: int, source: Latent, out: Array, seen: Seen | None, flag: Array | None = None) -> None:
        latent = self._tools.latents(source)[k]
        if seen is None:
            self._vae.decode(k, latent, out, flag)
            return
        self._frames.show_frame(k, seen.which, self._spread_mask(k) if seen.dilates else self._tools.canvas(k, "mask"))
        self._vae.decode(k, latent, out, flag, "asuka_decoder")

    def _spread_mask(self, k: int) -> Array:
        """Picture k's mask, enlarged for the first stage."""
        mask, spread = self._tools.canvas(k, "mask"), self._tools.arena["spread mask"]
        self._frames.measure_distance("feather", mask, self._tools.record(k, "dilate_field"), spread, dilate=True)
        return spread

    def _attend(self, network: str) -> None:
        name, attended = kv_name(network), self._tools.room.attended
        self._tools.device.clear(attended, self._tools.stream)  # what aligns them is checked as well
        for call in range(len(self._tools.room.shape.calls)):
            self._tools.room.enqueue(name, self._tools.stream, call)
        self._tools.launch(
            "check_finite",
            values=attended,
            count=attended.size,
            half=attended.half,
            flags=self._tools.flag(0),
            bit=flag_of(name),
        )

    def _take_step(self, network: str) -> None:
        shape, arrays, latent = self._tools.room.shape, self._tools.room.arrays[network], self._tools.room.shape.latent
        common = {
            "counter": self._tools.arena["counter"],
            "table": self._tools.arena["steps"],
            "jobs": self._tools.arena["jobs"],
            "background": self._tools.latents("background"),
            "mask": self._tools.latent_mask(),
            "x_in": self._tools.latents("x in"),
            "x": self._tools.latents("x"),
            "most_steps": MOST_STEPS,
            "pictures": shape.pictures,
            "channels": CHANNELS,
            "height": latent[0],
            "width": latent[1],
            "rows_per_picture": shape.rows_per_picture,
            "half": arrays["sample"].half,
        }
        self._tools.launch(
            "step_before",
            **common,
            network_in=arrays["sample"],
            timestep=arrays["timestep"],
            time_ids=arrays["time_ids"],
        )
        self._predict(network)
        self._tools.launch(
            "step_after",
            **common,
            eps=arrays["eps"],
            x0=self._tools.latents("x0"),
            scratch=self._tools.arena["step scratch"],
            flags=self._tools.arena["flags"],
            bit=flag_of(network),
        )

    def _predict(self, network: str) -> None:
        """Run a UNet on all rows; where it is called twice, on every second row each time."""
        room, stream = self._tools.room, self._tools.stream
        rows, calls = room.arrays[network], room.calls[network]
        for number, call in enumerate(calls):
            places = [(k, len(calls) * k + number) for k in range(room.shape.pictures)] if len(calls) > 1 else []
            for name in ("sample", "timestep", "time_ids"):
                for k, row in places:
                    self._tools.device.copy(call[name].part(k, 1), rows[name].part(row, 1), stream)
            room.enqueue(network, stream, number)
            for k, row in places:
                self._tools.device.copy(rows["eps"].part(row, 1), call["eps"].part(k, 1), stream)

    def _start(self, phase: Start) -> None:
        k, stage = phase.k, phase.stage
        mask = self._tools.canvas(k, "mask")
        self._frames.measure_distance(
            "feather", mask, self._tools.record(k, "feather_field"), self._tools.canvas(k, "weight")
        )
        self._frames.cut_frame(k, "first", self._spread_mask(k) if phase.dilates else mask)
        if phase.fills:
            self._tools.launch(
                "fill",
                picture=self._tools.work_frame(),
                mask=self._tools.frame_mask(),
                scratch=self._tools.arena["filling"],
                height=self._tools.room.shape.work[0],
                width=self._tools.room.shape.work[1],
                cascade=fill_cascade(self._tools.facts.native_side),
            )
            self._frames.give_to_network(k, "first", self._tools.work_frame(), network=True)
        background = self._tools.latents("background")[k]
        # The first stage's background is drawn as the local stage's fill, or as the global stage's own.
        self._vae.encode(k, background, "vae_noise_lcg_fill" if stage == "lcg" else "vae_noise_gch_background")
        self._add_noise(background, k, self._tools.latents("x")[k], hand_over=False)
        self._set_condition(k, stage)

    def _hand_over(self, phase: HandOver) -> None:
        k = phase.k
        self._frames.paste(k, "first", "hand_over_sheet", self._tools.arena["decoded"][k])
        pasted = self._tools.canvas(k, "out")
        self._tools.launch(
            "cut",
            source=pasted,
            channels=3,
            cut=self._tools.record(k, "image_second"),
            tables=self._tools.arena["tables"],
            out=self._tools.work_frame(),
            mask=None,
            network=self._tools.image() if self._tools.fits else None,
            masked=None,
            half=self._tools.image().half,
            threshold=False,
            found=None,
        )
        if not self._tools.fits:
            self._frames.give_to_network(k, "second", self._tools.work_frame(), network=True)
        start, background = self._tools.latents("picture latent")[k], self._tools.latents("background")[k]
        self._vae.encode(k, start, "vae_noise_switch_zG")
        self._frames.cut_frame(k, "second", self._tools.canvas(k, "mask"))
        if phase.original:
            self._vae.encode(k, background, "vae_noise_gch_background")
        else:
            self._tools.device.copy(background, start, self._tools.stream)
        self._add_noise(start, k, self._tools.latents("x")[k], hand_over=True)
        self._set_condition(k, "gch")

    def _finish(self, phase: Finish) -> None:
        k = phase.k
        last = self._tools.arena["last decoded"]
        self._decode(k, "x", last, phase.seen)
        if phase.keeps_local:
            self._frames.place(k, "first", self._tools.arena["decoded"][k], self._tools.arena["local content"])
            self._tools.launch(
                "seam",
                mask=self._tools.canvas(k, "mask"),
                field=self._tools.record(k, "seam_field"),
                scratch=self._tools.arena["distances"],
                deepest=self._tools.arena["deepest"],
                out=self._tools.arena["seam"],
            )
        self._frames.paste(k, "second" if phase.second else "first", "final_sheet", last, seam=phase.keeps_local)

    def _set_condition(self, k: int, stage: Stage) -> None:
        """Give the UNet the stage's condition of picture k: text, and the head's feature of the masked picture."""
        room = self._tools.room
        pooled = [call["text_embeds"] for call in room.calls["unet"]]
        conditions = self._texts.rows_of(stage, room.shape, room.texts[0].dtype)
        for places, condition in zip(zip(room.texts, pooled, strict=True), conditions, strict=True):
            for place, source in zip(places, condition, strict=True):
                rows = place.shape[0] // room.shape.pictures
                self._tools.device.copy(place.part(k * rows, rows), source.part(k * rows, rows), self._tools.stream)
        feature = room.arrays["unet"]["inpaint_feature"].part(k, 1)
        head = self._tools.room.arrays.get("inpaint_head")
        if head is None:
            self._tools.device.clear(feature, self._tools.stream)
            return
        self._tools.device.copy(self._tools.image(), self._tools.masked(), self._tools.stream)
        self._vae.encode(
            k, self._tools.latents("picture latent")[k], f"vae_noise_{stage}_masked", network=head["masked_latent"]
        )
        self._tools.room.enqueue("inpaint_head", self._tools.stream)
        made = head["feature"]
        self._tools.launch(
            "check_finite",
            values=made,
            count=made.size,
            half=made.half,
            flags=self._tools.flag(k),
            bit=flag_of("inpaint_head"),
        )
        self._tools.launch(
            "convert", source=made, source_half=made.half, out=feature, out_half=feature.half, count=made.size
        )

    def _add_noise(self, latent: Array, k: int, out: Array, *, hand_over: bool) -> None:
        self._tools.launch(
            "noised", latent=latent, job=self._tools.arena["jobs"][k], hand_over=hand_over, out=out, count=latent.size
        )
