"""Every recorded array of a case against ours: exact pieces, arithmetic and networks from recorded inputs, end to end.

Bounds are those of docs/algorithm.md, 15.1; errors are shares of the recorded array's maximum.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from benchmarks._golden_case import Case, Run, pictures
from benchmarks.golden_units import Check, row_of
from dreammix_trt.core.networks import kv_name
from dreammix_trt.core.schedule import Schedule, Step, make_schedule
from dreammix_trt.core.seam import Networks
from dreammix_trt.core.subject import Role
from dreammix_trt.engine import kernels
from dreammix_trt.engine.canvas.frames import Canvas, Frame, from_decoded
from dreammix_trt.engine.host.weights import HostWeights
from dreammix_trt.engine.jobs import lay_canvas
from dreammix_trt.engine.text import Tokenizer, apply_tas, elimination_text, plan_tas

Array = npt.NDArray[Any]
StageName = Literal["lcg", "gch"]
ARITHMETIC, HEAD, UNET, VAE, WHOLE = 2e-6, 1e-5, 1e-4, 2e-3, 2e-3
LEVELS, STRAY_PIXELS = 2, 1e-3  # the final picture: within 2 levels but for one pixel in a thousand


def check_case(case: Case, networks: Networks, run: Run | None) -> list[Check]:
    """All rows of a case; run: our end-to-end run, or None to compare from recorded inputs only."""
    checks = _Checks(case, networks)
    parts = (checks.frames, checks.tables, checks.text, checks.networks, checks.arithmetic, checks.pasting)
    rows = [row for part in parts for row in part()]
    if run is not None:
        rows += _whole(case, run)
    # hashes of what passed through a network cannot be met by another computation; the pictures are compared instead
    rest = {name for name in case.unread if not name.endswith(("_rgb_sha256", "final_image_sha256"))}
    if run is not None:
        rows += [Check(f"{name} (unknown array)", float("nan"), 0.0, False) for name in sorted(rest)]
    return group_rows(rows)


def group_rows(rows: list[Check]) -> list[Check]:
    """One row for the arrays of all steps: the largest error."""
    found: dict[str, list[Check]] = {}
    for row in rows:
        found.setdefault(re.sub(r"_step\d\d+$", " (all steps)", row.array), []).append(row)
    worst = {name: max(of, key=lambda row: (not row.passed, row.error)) for name, of in found.items()}
    return [Check(name, row.error, row.bound, row.passed) for name, row in worst.items()]


class _Checks:
    """What follows from recorded inputs alone."""

    def __init__(self, case: Case, networks: Networks) -> None:
        self.case, self.run, self.has = case, networks.run, networks
        self.base, self.request = case.base, case.request
        self.schedule: Schedule = make_schedule(self.request)
        self.canvas: Canvas = lay_canvas(*pictures(case), self.request, self.base)
        self.names: tuple[StageName, ...] = ("lcg", "gch") if "gch_z_bg" in case else ("lcg",)
        self.of_stage: dict[StageName, Frame] = {
            "lcg": self.canvas.first_frame(self.request.lcg_field, fill=self.schedule.fills),
            "gch": self.canvas.global_frame(self.request.gch_field),
        }
        self._features: dict[str, Array] = {}
        weights = HostWeights(networks)
        weights.add("golden", case.subject)
        self.weights = weights.use(Role("golden"))

    def _row(self, name: str, got: Array, bound: float, label: str = "") -> Iterator[Check]:
        if name in self.case:
            yield row_of(label or name, got, self.case[name], bound)

    def _picture(self, name: str, picture: Array | None) -> Iterator[Check]:
        """A picture known by a subset of its pixels, its hash and its sums."""
        if picture is None:
            return
        digest = np.frombuffer(hashlib.sha256(np.ascontiguousarray(picture).tobytes()).digest(), np.uint8)
        yield from self._row(f"{name}_sub4", picture[::4, ::4], 0)
        yield from self._row(f"{name}_sha256", digest, 0)
        yield from self._row(f"{name}_sum", picture.reshape(-1, 3).sum(0, dtype=np.int64), 0)

    def frames(self) -> Iterator[Check]:
        """Stretching, boxes, sizes, masks, fill, feather."""
        yield from self._picture("input_1024", self.canvas.image)
        yield from self._row("mask_1024", self.canvas.mask, 0)
        yield from self._row("feather", self.canvas.feather, 0)
        for s in self.names:
            frame = self.of_stage[s]
            yield from self._row(f"{s}_crop_box", np.array(frame.box), 0)
            yield from self._row(f"{s}_work_size", np.array(frame.image.shape[:2]), 0)
            yield from self._row(f"{s}_crop_mask", frame.mask, 0)
            yield from self._picture(f"{s}_image", frame.image)
            yield from self._row(f"{s}_latent_mask", frame.latent_mask.astype(np.uint8), 0)
        fill = self.of_stage["lcg"].fill
        yield from self._picture("lcg_fill", fill)
        if fill is not None and "lcg_fill_crop256" in self.case:
            top, left = (int(place) for place in self.case["lcg_fill_crop256_origin"])
            yield from self._row("lcg_fill_crop256", fill[top : top + 256, left : left + 256], 0)

    def tables(self) -> Iterator[Check]:
        """What the schedule decides."""
        height, width = self.of_stage["lcg"].size
        side = self.base.native_side
        scales = [(step.size_scale_negative, step.size_scale_positive) for step in self.schedule]
        ids = [[(height * s, width * s, 0, 0, side, side) for s in pair] for pair in scales]
        yield from self._row("sigmas", self.schedule.sigmas, 0)
        yield from self._row("timesteps", self.schedule.timesteps, 0)
        yield from self._row("unet_timesteps", self.schedule.timesteps, 0)
        yield from self._row("unet_is_fooocus", np.array([step.network == "unet" for step in self.schedule]), 0)
        if "time_ids" in self.case:  # without guidance only the positive row need be recorded
            rows = self.case["time_ids"].shape[1]
            yield from self._row("time_ids", np.array(ids, np.float32)[:, -rows:], 0)

    def text(self) -> Iterator[Check]:
        """The encoders, and TAS on the recorded embeddings."""
        tokens, pooled = self._encode(self.request.prompt)
        yield from self._row("prompt_embeds_raw", tokens[None], HEAD)
        yield from self._row("pooled_raw", pooled[None], HEAD)
        if self.request.negative_prompt is None:
            other = np.zeros_like(tokens), np.zeros_like(pooled)
        else:
            other = self._encode(self.request.negative_prompt)
        yield from self._row("negative_prompt_embeds", other[0][None], HEAD)
        yield from self._row("negative_pooled", other[1][None], HEAD)
        less = self.case["prompt_embeds_raw"][0], self.case["pooled_raw"][0]
        if self.request.substitute:
            prefix, words = self.request.substitute_prefix or "", self.request.substitute
            removed = self._encode(elimination_text(prefix, words))
            yield from self._row("peli_embeds", removed[0][None], HEAD)
            yield from self._row("peli_pooled", removed[1][None], HEAD)
            plan = plan_tas(None, self.request.prompt, words, prefix, "words", self.case.subject.token)
            less = apply_tas(plan, *less, self.case["peli_embeds"][0], self.case["peli_pooled"][0])
        for s in self.names:
            told = less[1] if f"pooled_{s}" in self.request.tas_stages else self.case["pooled_raw"][0]
            for name, negative, positive in (
                ("text", "negative_prompt_embeds", less[0]),
                ("pooled", "negative_pooled", told),
            ):
                guided = len(self.case[f"{s}_unet_{name}"]) == 2
                rows = [self.case[negative][0], positive] if guided else [positive]
                yield from self._row(f"{s}_unet_{name}", np.stack(rows), ARITHMETIC)

    def _encode(self, prompt: str) -> tuple[Array, Array]:
        outputs = []
        for encoder, folder in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
            ids = Tokenizer.load(self.base.folder / folder).encode(prompt, truncate=True)[None]
            outputs.append(self.run(encoder, input_ids=ids, **self.weights(encoder)))
        return np.concatenate([output["hidden"][0] for output in outputs], -1), outputs[1]["pooled"][0]

    def networks(self) -> Iterator[Check]:
        """Encoder, head, UNets and decoder, each from recorded inputs."""
        if "vae_mean_lcg_fill" in self.case:
            local = self.run("vae_encoder", image=self.of_stage["lcg"].background)
            yield from self._row("vae_mean_lcg_fill", local["mean"], VAE)
            yield from self._row("vae_std_lcg_fill", local["std"], VAE)
        masked = self.run("vae_encoder", image=self.of_stage["lcg"].masked)
        yield from self._row("vae_mean_lcg_masked", masked["mean"], VAE)
        repasted = self.case.picture("switch_repasted_rgb")
        if "gch" in self.names and repasted is not None:
            frame = self.of_stage["gch"]
            moments = self.run("vae_encoder", image=frame.network_input(self.canvas.crop(repasted, frame)))
            yield from self._row("vae_mean_switch_zG", moments["mean"], VAE)
            yield from self._row("vae_std_switch_zG", moments["std"], VAE)
            mean = self.run("vae_encoder", image=frame.background)["mean"]
            yield from self._row("vae_mean_gch_background", mean, VAE)
        for s in self.names:
            feature = self._feature(s)[0]
            if "head_feature_channels" in self.case:
                shown = feature[self.case["head_feature_channels"]]
                yield from self._row(f"{s}_head_feature_ch", shown, HEAD)
            exact = feature.astype(np.float64)
            yield from self._row(f"{s}_head_feature_sum", exact.sum((1, 2)), HEAD)
            yield from self._row(f"{s}_head_feature_abssum", np.abs(exact).sum((1, 2)), HEAD)
        for i in self.case["unet_output_steps"]:
            yield from self._unet(self.schedule[int(i)])

    def _feature(self, s: str) -> Array:
        if s not in self._features:
            mask, latent = self.case[f"{s}_latent_mask"].astype(np.float32), self.case[f"vae_latent_{s}_masked"]
            self._features[s] = self.run("inpaint_head", mask=mask, masked_latent=latent)["feature"]
        return self._features[s]

    def _unet(self, step: Step) -> Iterator[Check]:
        at, s = f"step{step.index:02d}", step.stage
        text = self.case[f"{s}_unet_text"]
        rows = len(text)
        scaled = self.case[f"x_in_{at}"] / np.float32(np.sqrt(step.sigma**2 + 1))
        feature = self._feature(s)
        attends = kv_name(step.network)
        attended = self.run(attends, encoder_hidden_states=text, **self.weights(attends))
        eps = self.run(
            step.network,
            sample=np.repeat(scaled, rows, 0),
            timestep=np.full(rows, step.timestep, np.float32),
            text_embeds=self.case[f"{s}_unet_pooled"],
            time_ids=self.case["time_ids"][step.index][-rows:],
            inpaint_feature=feature if step.network == "unet" else np.zeros_like(feature),
            **attended,
            **self.weights(step.network),
        )["eps"]
        if rows == 2:
            yield from self._row(f"unet_uncond_{at}", eps[:1], UNET)
        yield from self._row(f"unet_cond_{at}", eps[-1:], UNET)

    def arithmetic(self) -> Iterator[Check]:
        """The loop between the networks, each step from its recorded inputs."""
        case, factor = self.case, np.float32(self.base.scaling_factor)
        draws = case.noise.arrays
        for label, name in (("lcg_fill", "lcg_z_bg"), ("switch_zG", "switch_zG")):
            if f"vae_std_{label}" in case:
                spread = case[f"vae_std_{label}"] * draws[f"vae_noise_{label}"] if self.request.samples_vae else 0
                yield from self._row(name, factor * (case[f"vae_mean_{label}"] + spread), ARITHMETIC)
        start = case["lcg_z_bg"] + draws["init_noise"] * np.float32(self.schedule.start_scale)
        yield from self._row("initial_latent", start, ARITHMETIC)
        switch = self.schedule.hand_over_index
        if switch is not None and "gch_initial_latent" in case:
            again = case["switch_zG"] + np.float32(self.schedule[switch].sigma) * draws["renoise_switch"]
            yield from self._row("gch_initial_latent", again, ARITHMETIC)
        for step in self.schedule:
            yield from self._step(step, switch)
        yield from self._row("final_latent", case[f"x0_step{len(self.schedule) - 1:02d}"], 0)

    def _step(self, step: Step, switch: int | None) -> Iterator[Check]:
        case, draws, i, s = self.case, self.case.noise.arrays, step.index, step.stage
        at, first = f"step{i:02d}", i in (0, switch)
        before = "gch_initial_latent" if i and first else "initial_latent" if first else f"x_out_step{i - 1:02d}"
        mask = case[f"{s}_latent_mask"].astype(np.float32)
        blended, _ = kernels.blend_scale(case[before], case[f"{s}_z_bg"], mask, draws[step.blend_draw[0]], step.sigma)
        yield from self._row(f"x_in_{at}", blended, ARITHMETIC)
        x_in, x0 = case[f"x_in_{at}"], case[f"x0_{at}"]
        if f"unet_cond_{at}" in case:
            yield from self._check_guidance(step, x_in)
        previous = None if first else case[f"x0_step{i - 1:02d}"]
        noise = draws[step.solver_draw[0]] if step.solver_draw else np.zeros_like(x_in)
        solved, _ = _take_step(step, x_in, (x_in - x0) / np.float32(step.sigma), previous, noise, rows=1, blur=0.0)
        yield from self._row(f"x_out_{at}", solved, ARITHMETIC)

    def _check_guidance(self, step: Step, x_in: Array) -> Iterator[Check]:
        at, case = f"step{step.index:02d}", self.case
        positive, nothing = case[f"unet_cond_{at}"], np.zeros_like(x_in)
        before = _take_step(step, x_in, positive, None, nothing, rows=1, blur=0.0)[1]
        yield from self._row(f"x0_cond_preblur_{at}", before, ARITHMETIC)
        after = _take_step(step, x_in, positive, None, nothing, rows=1, blur=step.blur_alpha)[1]
        yield from self._row(f"x0_cond_postblur_{at}", after, ARITHMETIC)
        guided, eps = self.request.guided, positive
        if guided:
            eps = np.concatenate([case[f"unet_uncond_{at}"], positive])
        x0 = _take_step(step, x_in, eps, None, nothing, rows=2 if guided else 1, blur=step.blur_alpha)[1]
        yield from self._row(f"x0_{at}", x0, ARITHMETIC)

    def pasting(self) -> Iterator[Check]:
        """The decoder on recorded latents, and pasting on recorded pictures."""
        case, last = self.case, len(self.schedule) - 1
        switch = self.schedule.hand_over_index
        if switch is not None:
            decoded, repasted = case.picture("switch_decoded_rgb"), case.picture("switch_repasted_rgb")
            if decoded is not None and repasted is not None:
                yield _levels("switch_decoded_rgb", self._decode(case[f"x0_step{switch - 1:02d}"]), decoded)
                pasted = self.canvas.paste(self.of_stage["lcg"], decoded, soft=self.request.soft_blending)
                yield row_of("switch_repasted_rgb", pasted, repasted, 0)
                yield from self._picture("switch_crop_rgb", self.canvas.crop(repasted, self.of_stage["gch"]))
        decoded, final = case.picture("final_decoded_rgb"), case.picture("final_image")
        if decoded is not None and final is not None:
            yield _levels("final_decoded_rgb", self._decode(case[f"x0_step{last:02d}"]), decoded)
            yield row_of(
                "final_image", self.canvas.compose(self.of_stage[self.schedule[last].stage], decoded), final, 0
            )

    def _decode(self, latent: Array) -> Array:
        return from_decoded(self.run("vae_decoder", latent=latent / np.float32(self.base.scaling_factor))["image"])


def _take_step(
    step: Step, x_in: Array, eps: Array, previous: Array | None, noise: Array, *, rows: int, blur: float
) -> tuple[Array, Array]:
    return kernels.guided_step(
        x_in,
        eps,
        previous,
        noise,
        sigma=step.sigma,
        guidance_scale=step.guidance_scale,
        blur_alpha=blur,
        c_x=step.c_x,
        c_x0=step.c_x0,
        c_dx0=step.c_dx0,
        c_noise=step.c_noise,
        guidance_rescale=step.guidance_rescale,
        rows_per_picture=rows,
    )


def _levels(name: str, got: Array, wanted: Array) -> Check:
    """Decoded bytes: the largest difference in levels, at most 1."""
    error = float(np.abs(got.astype(np.int32) - wanted.astype(np.int32)).max())
    return Check(name, error, 1.0, error <= 1)


def _whole(case: Case, run: Run) -> Iterator[Check]:
    """Our run with the recorded draws against every latent and picture of the recorded run."""

    def row(name: str, got: Array) -> Iterator[Check]:
        if name in case:
            yield row_of(f"end to end: {name}", got, case[name], WHOLE)

    encoded = iter(run.calls.of("vae_encoder"))
    moments = {"lcg_fill": next(encoded)[2], "lcg_masked": next(encoded)[2]}
    if len(run.stages) == 2:
        moments |= {name: next(encoded)[2] for name in ("switch_zG", "gch_background", "gch_masked")}
    for name, got in moments.items():
        yield from row(f"vae_mean_{name}", got["mean"])
    for s, stage, head in zip(("lcg", "gch"), run.stages, run.calls.of("inpaint_head"), strict=False):
        yield from row(f"{s}_z_bg", stage.background)
        yield from row(f"vae_latent_{s}_masked", head[1]["masked_latent"])
        yield from row(f"{s}_unet_text", stage.conditioning.text)
        yield from row(f"{s}_unet_pooled", stage.conditioning.pooled)
        yield from row("initial_latent" if s == "lcg" else "gch_initial_latent", stage.latent)
    if len(run.stages) == 2 and run.schedule.hand_over_index is not None:
        sigma = np.float32(run.schedule[run.schedule.hand_over_index].sigma)
        yield from row("switch_zG", run.stages[1].latent - sigma * case.noise.arrays["renoise_switch"])
    for taken, (_, told, output) in zip(run.taken, run.calls.of("unet", "unet_raw"), strict=True):
        at, i = f"step{taken.step.index:02d}", taken.step.index
        yield from row(f"x_in_{at}", taken.x_in)
        yield from row(f"unet_uncond_{at}", output["eps"][:1])
        yield from row(f"unet_cond_{at}", output["eps"][-1:])
        yield from row(f"x0_{at}", taken.x0)
        yield from row(f"x_out_{at}", taken.x)
        yield row_of("end to end: time_ids", told["time_ids"], case["time_ids"][i][-len(told["time_ids"]) :], 0)
    yield from row("final_latent", run.taken[-1].x0)
    for name, picture in (
        ("switch_decoded_rgb", run.shown.get("local result")),
        ("switch_repasted_rgb", run.shown.get("handed over")),
        ("final_decoded_rgb", run.shown.get("last result")),
        ("final_image", run.final),
    ):
        recorded = case.picture(name)
        if picture is not None and recorded is not None:
            stray = float((np.abs(picture.astype(np.int32) - recorded.astype(np.int32)).max(-1) > LEVELS).mean())
            label = f"end to end: {name}, share of pixels off by > {LEVELS}"
            yield Check(label, stray, STRAY_PIXELS, stray <= STRAY_PIXELS)
