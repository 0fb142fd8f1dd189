"""The phases of one picture on the host (docs/algorithm.md, 3 to 9)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.asuka_pictures import shrink_for_prior
from dreammix_trt.core.networks import kind_of
from dreammix_trt.core.noise import NoiseProvider
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import Schedule, Stage, Step
from dreammix_trt.core.seam import BaseFacts, Networks
from dreammix_trt.engine.canvas.frames import Canvas, Frame, from_decoded
from dreammix_trt.engine.canvas.tiles import needs_tiles, run_tiled, tiles_of
from dreammix_trt.engine.host.clock import PhaseClock
from dreammix_trt.engine.host.denoiser import Conditioning, Denoiser
from dreammix_trt.engine.host.prior import PriorRows, add_prior
from dreammix_trt.engine.host.sampling import StageInputs, Taken, take_step
from dreammix_trt.engine.host.texts import Text
from dreammix_trt.engine.host.weights import WeightsOf
from dreammix_trt.engine.painting import Preview, prior_in

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Sitting:
    """One picture to paint, and everything that it is painted with.

    prior_image: what ASUKA's prior sees in place of the picture, uint8 of the canvas' size; None: the picture.
    texts: of the stages "lcg" and "gch".
    weights: network -> the weights that the subject changes.
    noise: its random numbers.
    """

    canvas: Canvas
    request: Request
    schedule: Schedule
    texts: Mapping[str, Text]
    weights: WeightsOf
    noise: NoiseProvider
    prior_image: U8 | None = None


class HostPainter:
    """See `engine.painting.Painter`.

    shown: collects pictures of what each stage did; None: they are not wanted.
    taken: the last step.
    """

    def __init__(
        self,
        sitting: Sitting,
        networks: Networks,
        facts: BaseFacts,
        denoiser: Denoiser,
        *,
        clock: PhaseClock | None = None,
        shown: dict[str, U8] | None = None,
        looking: Networks | None = None,
    ) -> None:
        self.schedule = sitting.schedule
        self.shown = shown
        self.taken: Taken | None = None
        self.stage: StageInputs
        self.frame: Frame
        self._sitting, self._canvas, self._request = sitting, sitting.canvas, sitting.request
        self._networks, self._facts, self._denoiser, self._clock = networks, facts, denoiser, clock or PhaseClock()
        self._looking = looking or networks
        self._first_size = (0, 0)
        self._local: tuple[Frame, U8] | None = None
        self._before: Taken | None = None

    # -- the phases ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Frame, fill, encodings, head; then noise on the filled background."""
        stage = self.schedule[0].stage
        with self._clock("canvas"):
            field, dilate = self._request.field_of(stage), self._request.dilate_of(stage)
            self.frame = self._canvas.first_frame(field, fill=self.schedule.fills, dilate=dilate)
        self._first_size = self.frame.size
        self._show("crop", self.frame.image)
        self._show("fill", self.frame.fill)
        label = "vae_noise_lcg_fill" if stage == "lcg" else "vae_noise_gch_background"
        background = self._encode(self.frame.background, label)
        noise = self._sitting.noise.draw("init_noise", background.shape, 0)
        self._enter(stage, background + noise * np.float32(self.schedule.start_scale), background)

    def step(self, step: Step) -> None:
        """Carry out one row of the schedule."""
        with self._clock("loop"):
            keeps, noises = self.schedule.blends_output, [self._sitting.noise]
            self.taken = self._before = take_step(step, self.stage, self._before, self._denoiser, noises, keeps)

    def hand_over(self, step: Step) -> None:
        """Decode, paste, encode, add noise at the step's level."""
        assert self.taken is not None
        local, decoded = self.frame, self._decode(self.taken.x if self.keeps_local else self.taken.x0)
        self._local = (local, decoded)
        with self._clock("canvas"):
            pasted = self._canvas.paste(local, decoded, soft=self._request.soft_blending)
            self.frame = self._global_frame
            picture = self.frame.network_input(self._canvas.crop(pasted, self.frame))
        self._show("local result", decoded)
        self._show("handed over", pasted)
        start = self._encode(picture, "vae_noise_switch_zG")
        background = start
        if self._request.gch_background == "original":
            background = self._encode(self.frame.background, "vae_noise_gch_background")
        noise = self._sitting.noise.draw("renoise_switch", start.shape, 0)
        self._enter("gch", start + np.float32(step.sigma) * noise, background)

    def finish(self) -> list[U8]:
        """The finished picture, uint8 (H, W, 3) of the canvas' size, from the last latent."""
        assert self.taken is not None
        decoded = self._decode(self.taken.x)
        self._show("last result", decoded)
        with self._clock("canvas"):
            return [self._canvas.compose(self.frame, decoded, local=self._local)]

    def open_preview(self) -> Preview:
        """A function that shows the last prediction; after the next step it still shows the same one."""
        assert self.taken is not None
        taken, frame, local = self.taken, self.frame, self._local

        def preview(_: int, whole: bool) -> U8:
            decoded = self._decode(taken.x0, frame, self._looking)
            return self._canvas.compose(frame, decoded, local=local) if whole else decoded

        return preview

    @cached_property
    def keeps_local(self) -> bool:
        """Whether the local stage's picture is kept inside the mask."""
        return self._canvas.keeps_local(self._global_frame, self.frame)

    # -- parts of them ------------------------------------------------------------------------------------------------

    @cached_property
    def _global_frame(self) -> Frame:
        with self._clock("canvas"):
            return self._canvas.global_frame(self._request.field_of("gch"))

    def _enter(self, name: Stage, latent: F32, background: F32) -> None:
        """Begin a stage: collect what the UNet gets in it."""
        text = self._sitting.texts[name]
        conditioning = Conditioning(
            text=text.tokens,
            pooled=text.pooled,
            sizes=(self._first_size,),
            target=self._facts.native_side,
            feature=self._make_feature(f"vae_noise_{name}_masked"),
            weights=self._sitting.weights,
        )
        if prior_in(name, self._request, self.schedule) is not None:
            conditioning = add_prior(conditioning, self._request, self._ask_prior(), text.appended)
        self.stage = StageInputs(latent, background, self.frame.latent_mask, conditioning)
        self._before = None

    def _ask_prior(self) -> PriorRows:
        """What ASUKA's prior expects in the frame's hole, as a condition."""
        frame, seen = self.frame, self._sitting.prior_image
        picture = frame.image if seen is None else self._canvas.crop(seen, frame)
        with self._clock("canvas"):
            assert self._facts.prior_side is not None
            image, mask = shrink_for_prior(picture, frame.mask, self._facts.prior_side)
        output = self._networks.run("asuka_prior", image=image, mask=mask)
        return PriorRows(output["context"], output["pooled"])

    def _make_feature(self, label: str) -> F32:
        """The inpaint head's addition to the UNet, (1, C, h, w); zeros for a base without a head."""
        if "inpaint_head" not in self._networks:
            return np.zeros((1, self._facts.feature_channels, *self.frame.latent_size), np.float32)
        masked = self._encode(self.frame.masked, label)
        return self._networks.run("inpaint_head", mask=self.frame.latent_mask, masked_latent=masked)["feature"]

    def _encode(self, image: F32, label: str) -> F32:
        """The scaled latent of (1, 3, H, W): the posterior's mean, or a sample of it where the request asks for one."""
        output = self._run_vae("vae_encoder", self.frame, self._networks, image=image)
        latent = output["mean"]
        if self._request.samples_vae:
            latent = latent + output["std"] * self._sitting.noise.draw(label, latent.shape, 0)
        return np.float32(self._facts.scaling_factor) * latent

    def _decode(self, latent: F32, frame: Frame | None = None, networks: Networks | None = None) -> U8:
        """A latent (1, 4, h, w) as a picture of a frame, uint8 (8h, 8w, 3).

        frame: None: the present one.
        networks: None: those that painting uses.
        """
        unscaled = latent / np.float32(self._facts.scaling_factor)
        where, used = frame or self.frame, networks or self._networks
        if self._request.decoder == "asuka":
            image, mask = where.network_input(where.image), (where.network_mask > 127).astype(np.float32)[None, None]
            picture = self._run_vae("asuka_decoder", where, used, latent=unscaled, image=image, mask=mask)["picture"]
        else:
            picture = self._run_vae("vae_decoder", where, used, latent=unscaled)["image"]
        with self._clock("canvas"):
            return from_decoded(picture)

    def _run_vae(self, name: str, frame: Frame, networks: Networks, **arrays: F32) -> dict[str, F32]:
        """Run a half of the VAE, in tiles where the frame is large."""
        assert kind_of(name).call == "vae"
        if not needs_tiles(*frame.size):
            return networks.run(name, **arrays)
        tiling = tiles_of(*frame.latent_size)
        return run_tiled(lambda tiles: networks.run(name, **tiles), arrays, tiling)

    def _show(self, name: str, picture: U8 | None) -> None:
        if self.shown is not None and picture is not None:
            self.shown[name] = picture
