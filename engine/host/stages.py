"""What one picture needs before, between and after the sampling stages: frames, latents, features, pasting.

golden/README.md steps 2 to 7, 10, 12 and 13. A `Painter` handles one picture; `joined` makes a batch of several.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.noise import NoiseProvider
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import Schedule, Step
from dreammix_trt.engine.canvas.frames import Canvas, Frame, from_decoded
from dreammix_trt.engine.canvas.tiles import needs_tiles, run_tiled, tiles_of
from dreammix_trt.engine.host.denoiser import Conditioning, Denoiser
from dreammix_trt.engine.host.loop import Stage, Taken, sample

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


class Facts(Protocol):
    """What is asked of a base: see `dreammix_trt.engine.backends.onnxruntime.engine_set.BaseFacts`."""

    @property
    def native_side(self) -> int: ...
    @property
    def divisor(self) -> int: ...
    @property
    def scaling_factor(self) -> float: ...
    @property
    def feature_channels(self) -> int: ...


class Networks(Protocol):
    """Named networks: `EngineSet`, or another back end."""

    def __contains__(self, name: str) -> bool: ...
    def run(self, name: str, **arrays: Any) -> dict[str, npt.NDArray[Any]]: ...
    def slots(self, name: str) -> tuple[Any, ...]: ...


class Clock:
    """Seconds per phase. Phases nest; the time of an inner one counts for it alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._mark = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def _settle(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now


class Timed:
    """Networks whose calls are charged to "network:NAME" on a clock.

    ready: called before each run; it raises where the networks may not be used any more.
    """

    def __init__(self, networks: Networks, clock: Clock, ready: Callable[[], None] = lambda: None) -> None:
        self._networks, self._clock, self._ready = networks, clock, ready

    def __contains__(self, name: str) -> bool:
        return name in self._networks

    def slots(self, name: str) -> tuple[Any, ...]:
        """As the networks have them."""
        return self._networks.slots(name)

    def run(self, name: str, **arrays: Any) -> dict[str, npt.NDArray[Any]]:
        """Run and charge."""
        self._ready()
        with self._clock(f"network:{name}"):
            return self._networks.run(name, **arrays)


@dataclass(frozen=True)
class Text:
    """A stage's text for one picture: rows [negative, positive], or positive alone; (R, 77, D) and (R, Dp)."""

    tokens: F32
    pooled: F32


class Painter:
    """One picture on its way through the stages.

    texts: of the stages "lcg" and "gch". lora: network -> (P,), the subject's packed rows. frame, stage: the present
    stage's. shown: pictures of what each stage did, when it is a dictionary and not None. Raises InputError where a
    stage's frame is none that the engines take (`Canvas.work_size`).
    """

    def __init__(
        self,
        canvas: Canvas,
        request: Request,
        schedule: Schedule,
        texts: Mapping[str, Text],
        lora: Mapping[str, F32],
        noise: NoiseProvider,
        networks: Networks,
        facts: Facts,
        *,
        clock: Clock | None = None,
    ) -> None:
        self._canvas, self._request, self._schedule = canvas, request, schedule
        self._texts, self._lora, self.noise = texts, lora, noise
        self._networks, self._facts, self._clock = networks, facts, clock or Clock()
        if canvas.sizes is not None:
            for stage in {step.stage for step in schedule}:  # refused now, not after the first stage
                canvas.work_size(canvas.box(request.lcg_field if stage == "lcg" else request.gch_field))
        self._local: tuple[Frame, U8] | None = None
        self._size = (0, 0)
        self.frame: Frame
        self.stage: Stage
        self.shown: dict[str, U8] | None = None

    def start(self) -> Stage:
        """The first stage: its frame filled, and noise on the filled background."""
        local = self._schedule[0].stage == "lcg"
        with self._clock("canvas"):
            if local:
                field, dilate = self._request.lcg_field, self._request.lcg_mask_dilate
                frame = self._canvas.local_frame(field, fill=self._schedule.fills, dilate=dilate)
            else:
                frame = self._canvas.local_frame(self._request.gch_field, fill=self._schedule.fills)
        self.frame, self._size = frame, frame.size
        self._show("crop", frame.image)
        self._show("fill", frame.fill)
        label = "vae_noise_lcg_fill" if local else "vae_noise_gch_background"
        background = self._encoded(frame.background, label)
        noise = self.noise.draw("init_noise", background.shape, 0)
        latent = background + noise * np.float32(self._schedule.start_scale)
        return self._stage("lcg" if local else "gch", latent, background)

    def keeps_local(self) -> bool:
        """Whether the local stage's picture will be kept inside the mask."""
        return self._canvas.keeps_local(self._global_frame, self.frame)

    def hand_over(self, step: Step, x0: F32) -> Stage:
        """From the local stage to the global one: decode, repaste, encode, noise at the step's level (step 12)."""
        local, decoded = self.frame, self.decoded(x0)
        self._local = (local, decoded)
        with self._clock("canvas"):
            pasted = self._canvas.hand_over(local, decoded, soft=self._request.soft_blending)
            self.frame = self._global_frame
            picture = self.frame.network_input(self._canvas.cropped(pasted, self.frame))
        self._show("local result", decoded)
        self._show("handed over", pasted)
        start = self._encoded(picture, "vae_noise_switch_zG")
        background = start
        if self._request.gch_background == "original":
            background = self._encoded(self.frame.background, "vae_noise_gch_background")
        noise = self.noise.draw("renoise_switch", start.shape, 0)
        return self._stage("gch", start + np.float32(step.sigma) * noise, background)

    @cached_property
    def _global_frame(self) -> Frame:
        with self._clock("canvas"):
            return self._canvas.global_frame(self._request.gch_field)

    def finish(self, x: F32) -> U8:
        """The finished picture, uint8 (H, W, 3) of the canvas' size, from the last latent (step 13)."""
        decoded = self.decoded(x)
        self._show("last result", decoded)
        with self._clock("canvas"):
            return self._canvas.final(self.frame, decoded, local=self._local)

    def decoded(self, latent: F32) -> U8:
        """A latent (1, 4, h, w) as a picture of the present frame, uint8 (8h, 8w, 3)."""
        output = self._vae("vae_decoder", latent=latent / np.float32(self._facts.scaling_factor))
        with self._clock("canvas"):
            return from_decoded(output["image"])

    def _stage(self, name: str, latent: F32, background: F32) -> Stage:
        text = self._texts[name]
        conditioning = Conditioning(
            text=text.tokens,
            pooled=text.pooled,
            sizes=(self._size,),
            target=self._facts.native_side,
            feature=self._feature(f"vae_noise_{name}_masked"),
            lora={network: row[None] for network, row in self._lora.items()},
        )
        self.stage = Stage(latent, background, self.frame.latent_mask, conditioning)
        return self.stage

    def _feature(self, label: str) -> F32:
        """The inpaint head's addition to the UNet, (1, C, h, w); zeros for a base without a head."""
        if "inpaint_head" not in self._networks:
            return np.zeros((1, self._facts.feature_channels, *self.frame.latent_size), np.float32)
        masked = self._encoded(self.frame.masked, label)
        return self._networks.run("inpaint_head", mask=self.frame.latent_mask, masked_latent=masked)["feature"]

    def _encoded(self, image: F32, label: str) -> F32:
        """The scaled latent of (1, 3, H, W): the posterior's mean, or a sample of it where the request says so."""
        output = self._vae("vae_encoder", image=image)
        latent = output["mean"]
        if self._request.samples_vae:
            latent = latent + output["std"] * self.noise.draw(label, latent.shape, 0)
        return np.float32(self._facts.scaling_factor) * latent

    def _vae(self, name: str, **array: F32) -> dict[str, F32]:
        """Run a half of the VAE on its one input, in tiles where the frame is large."""
        ((given, values),) = array.items()
        if not needs_tiles(*self.frame.size):
            return self._networks.run(name, **array)
        tiling = tiles_of(*self.frame.latent_size)
        return run_tiled(
            lambda tile: self._networks.run(name, **{given: tile}), values, tiling, decode=name == "vae_decoder"
        )

    def _show(self, name: str, picture: U8 | None) -> None:
        if self.shown is not None and picture is not None:
            self.shown[name] = picture


def painted(painters: Sequence[Painter], schedule: Schedule, denoiser: Denoiser) -> Iterator[Taken]:
    """Run the loop over pictures with equal schedules and frame sizes as one batch, yielding after each step.

    Where the sharp local result will be kept (`Canvas.keeps_local`), the local stage goes on to sigma 0 at the
    hand-over: a prediction from the middle of the schedule still has the haze of the noise it was made from, which the
    global stage otherwise takes away. Those steps come on top and are not yielded.
    """
    noises = [painter.noise for painter in painters]

    def hand_over(step: Step, x0: F32) -> Stage:
        if any(painter.keeps_local() for painter in painters):
            rest = replace(schedule, steps=tuple(replace(each, stage="lcg") for each in schedule.steps[step.index :]))
            going_on = replace(joined([painter.stage for painter in painters]), latent=taken.x)
            *_, finished = sample(rest, denoiser, noises, going_on, hand_over)
            x0 = finished.x
        return joined([painter.hand_over(step, x0[k : k + 1]) for k, painter in enumerate(painters)])

    start = joined([painter.start() for painter in painters])
    for taken in sample(schedule, denoiser, noises, start, hand_over):
        yield taken


def joined(stages: Sequence[Stage]) -> Stage:
    """Stages of single pictures with equal latent sizes as one batch."""
    if len(stages) == 1:
        return stages[0]
    told = [stage.conditioning for stage in stages]
    conditioning = Conditioning(
        text=np.concatenate([each.text for each in told]),
        pooled=np.concatenate([each.pooled for each in told]),
        sizes=tuple(size for each in told for size in each.sizes),
        target=told[0].target,
        feature=np.concatenate([each.feature for each in told]),
        lora={name: np.concatenate([each.lora[name] for each in told]) for name in told[0].lora},
    )
    latents, backgrounds, masks = zip(*((s.latent, s.background, s.mask) for s in stages), strict=True)
    return Stage(np.concatenate(latents), np.concatenate(backgrounds), np.concatenate(masks), conditioning)
