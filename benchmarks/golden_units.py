"""Does the arithmetic outside the networks equal the recorded pieces (`units.npz`)? One row per group of arrays.

docs/algorithm.md, 15, says what the file is; any other file of that format can be checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dreammix_trt.core import fooocus, schedule
from dreammix_trt.core.keymap import sgm_to_diffusers
from dreammix_trt.core.request import Request
from dreammix_trt.engine import kernels, text
from dreammix_trt.engine.canvas import frames as canvas
from dreammix_trt.engine.canvas import geometry

Array = npt.NDArray[Any]
ARITHMETIC = 2e-6  # of the array's maximum
NETWORK = 1e-5

_SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
}


@dataclass(frozen=True)
class Check:
    """One comparison: the largest error, as a share of the array's maximum (bound 0: largest plain difference)."""

    array: str
    error: float
    bound: float
    passed: bool


def check_units(path: str | Path) -> list[Check]:
    """Check every array of `path` (a units.npz, its model and head beside it). Arrays nobody checks fail."""
    units = _Units(Path(path))
    rows = [row for check in _CHECKS for row in check(units)]
    return rows + [Check(f"{name} (unknown array)", float("nan"), 0.0, False) for name in units.unread()]


class _Units:
    """The arrays, and which of them were looked at."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        with np.load(path) as file:
            self._arrays: dict[str, Array] = {name: file[name] for name in file.files}
        self._read: set[str] = set()
        self.meta: dict[str, Any] = json.loads(str(self["meta_json"]))

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> Array:
        self._read.add(name)
        return self._arrays[name]

    def unread(self) -> list[str]:
        return sorted(set(self._arrays) - self._read)


def row_of(array: str, got: Array, wanted: Array, bound: float) -> Check:
    """`got` against `wanted`: bound 0 asks for equality, else the difference is a share of wanted's maximum."""
    if got.shape != wanted.shape:
        return Check(f"{array} (shape {got.shape}, expected {wanted.shape})", float("inf"), bound, False)
    if wanted.size == 0 or np.array_equal(got, wanted):
        return Check(array, 0.0, bound, True)
    if wanted.dtype.kind in "US":
        return Check(array, float((got != wanted).sum()), bound, False)
    difference = float(np.abs(got.astype(np.float64) - wanted.astype(np.float64)).max())
    error = difference if bound == 0 else difference / max(float(np.abs(wanted.astype(np.float64)).max()), 1e-30)
    return Check(array, error, bound, bool(error <= bound))


def _ints(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _read_size(values: Array) -> tuple[int, int]:
    height, width = _ints(values)
    return height, width


def _read_box(values: Array) -> tuple[int, int, int, int]:
    r0, r1, c0, c1 = _ints(values)
    return r0, r1, c0, c1


def _boxes(units: _Units) -> Iterator[Check]:
    frames = [_read_size(row) for row in units["crop_frame_hw"]]
    bounds = [(r0, r1 + 1, c0, c1 + 1) for r0, r1, c0, c1 in map(_read_box, units["crop_bbox_inclusive"])]
    first = [geometry.initial_box(box, frame) for box, frame in zip(bounds, frames, strict=True)]
    yield row_of("crop_initial_box", np.array(first), units["crop_initial_box"], 0)
    fields = [float(k) for k in units["crop_k"]]
    grown = [[geometry.grow_box(box, k, frame) for k in fields] for box, frame in zip(first, frames, strict=True)]
    yield row_of("crop_box", np.array(grown), units["crop_box"], 0)


def _sizes(units: _Units) -> Iterator[Check]:
    sizes = [geometry.reference_work_size(_read_size(row)) for row in units["resize_in_hw"]]
    yield row_of("resize_out_hw", np.array(sizes), units["resize_out_hw"], 0)
    yield row_of(
        "resize_vae_hw", np.array([geometry.floor_to_cells(size) for size in sizes]), units["resize_vae_hw"], 0
    )


def _pictures(units: _Units) -> Iterator[Check]:
    feathers = np.stack([kernels.feather(mask, 32) for mask in units["feather_mask"]])
    yield row_of("feather_out", feathers, units["feather_out"], 0)
    images, masks = units["fill_image"], units["fill_mask"]
    fills = np.stack([kernels.fill(image, mask, kernels.CASCADE) for image, mask in zip(images, masks, strict=True)])
    yield row_of("fill_out", fills, units["fill_out"], 0)
    for name, soft in (("paste_out", False), ("paste_out_soft", True)):
        pasted = [
            _paste(units["fill_image"][n], content, _read_box(units["paste_box"][n]), units["feather_out"][n], soft)
            for n, content in enumerate(units["paste_content"])
        ]
        yield row_of(name, np.stack(pasted), units[name], 0)
    yield row_of("soft_alpha_96x64", kernels.soft_alpha(96, 64), units["soft_alpha_96x64"], ARITHMETIC)


def _paste(image: Array, content: Array, box: kernels.Box, weight: Array, soft: bool) -> Array:
    height, width = box[1] - box[0], box[3] - box[2]
    if content.shape[:2] != (height, width):
        content = kernels.resize(content, height, width, "lanczos")
    return kernels.paste(image, content, box, weight, kernels.soft_alpha(height, width) if soft else None)


def _projections(units: _Units) -> Iterator[Check]:
    rows = [
        kernels.tas_project(vector[None], remove[None], [0])[0]
        for vector, remove in zip(units["orth_in"], units["orth_remove"], strict=True)
    ]
    yield row_of("orth_out", np.stack(rows), units["orth_out"], ARITHMETIC)
    out = []
    for n, case in enumerate(units.meta["tas_cases"]):
        plan = text.plan_tas(None, case["prompt"], case["words"], case["prefix"], indexing="words")
        pooled = np.zeros(1, np.float32)
        out.append(text.apply_tas(plan, units["tas_prompt_embeds"][n], pooled, units["tas_peli_embeds"][n], pooled)[0])
    yield row_of("tas_out", np.stack(out), units["tas_out"], ARITHMETIC)


def _tables(units: _Units) -> Iterator[Check]:
    sigmas, steps = np.full_like(units["sigma_table"], np.nan), units["timestep_table"]
    times = np.full_like(steps, np.nan)
    for n, count in enumerate(_ints(units["sigma_steps"])):
        sigmas[n, : count + 1] = schedule.karras_sigmas(count)
        times[n, :count] = [schedule.timestep_of(float(sigma)) for sigma in sigmas[n, :count]]
    yield row_of("sigma_table", _plain(sigmas), _plain(units["sigma_table"]), 0)
    yield row_of("timestep_table", _plain(times), _plain(steps), 0)
    yield row_of("model_sigmas_1000", np.asarray(schedule.model_sigmas()), units["model_sigmas_1000"], ARITHMETIC)
    looked_up = np.array([schedule.timestep_of(float(sigma)) for sigma in units["sigma_to_t_in"]], np.float32)
    yield row_of("sigma_to_t_out", looked_up, units["sigma_to_t_out"], 0)


def _plain(table: Array) -> Array:
    """NaN padding as -1, which compares."""
    return np.where(np.isnan(table), np.float32(-1), table)


def _counts(units: _Units) -> Iterator[Check]:
    steps = _ints(units["sigma_steps"])
    for name, values, count in (
        ("adm_scaled_step_count", "adm_end_values", _count_scaled_steps),
        ("fooocus_step_count", "fooocus_time_values", _count_patched_steps),
    ):
        got = [[count(n, float(value)) for value in units[values]] for n in steps]
        yield row_of(name, np.array(got), units[name], 0)


def _count_scaled_steps(steps: int, end: float) -> int:
    rows = schedule.make_schedule(Request(prompt="", num_inference_steps=steps, size_guidance_end=end))
    return sum(step.size_scale_positive != 1 for step in rows)


def _count_patched_steps(steps: int, share: float) -> int:
    rows = schedule.make_schedule(Request(prompt="", num_inference_steps=steps, patched_fraction=share))
    return sum(step.network == "unet" for step in rows)


def _solver(units: _Units) -> Iterator[Check]:
    for run in units.meta["solver_runs"]:
        name, count, reset = f"solver{run['index']}", run["steps"], run["history_reset_before_step"]
        local = count if reset is None else reset
        steps = schedule.make_schedule(Request(prompt="", num_inference_steps=count, lcg_steps=local))
        coefficients = np.array([(step.c_x, step.c_x0, step.c_dx0, step.c_noise) for step in steps], np.float64)
        wanted = units[f"{name}_coef_x_d_dd_noise"]
        yield row_of(f"{name}_coef_x_d_dd_noise", coefficients, wanted, ARITHMETIC)
        yield row_of(f"{name}_sigmas", schedule.karras_sigmas(count), units[f"{name}_sigmas"], 0)
        yield row_of(f"{name}_x", _solve(units, name, steps, reset), units[f"{name}_x"][1:], ARITHMETIC)


def _solve(units: _Units, name: str, steps: Iterable[schedule.Step], reset: int | None) -> Array:
    """Each step from its recorded input, through the kernel that the loop uses."""
    x, x0, noise = units[f"{name}_x"], units[f"{name}_x0"], units[f"{name}_noise"]
    out = []
    for i, step in enumerate(steps):
        stepped, _ = kernels.guided_step(
            x[i].reshape(1, 1, 2, 4),
            ((x[i] - x0[i]) / np.float32(step.sigma)).reshape(1, 1, 2, 4),
            None if i in (0, reset) else x0[i - 1].reshape(1, 1, 2, 4),
            noise[i].reshape(1, 1, 2, 4),
            sigma=step.sigma,
            guidance_scale=1.0,
            blur_alpha=0.0,
            c_x=step.c_x,
            c_x0=step.c_x0,
            c_dx0=step.c_dx0,
            c_noise=step.c_noise,
            rows_per_picture=1,
        )
        out.append(stepped.reshape(x[i].shape))
    return np.stack(out)


def _patch(units: _Units) -> Iterator[Check]:
    for case in units.meta["dequant"]:
        name, key = f"dequant{case['index']}", case["key"]
        entry = fooocus.PatchEntry(*(units[f"{name}_{part}"] for part in ("u8", "min", "max")))
        place = case["diffusers_key"] or "left_alone.bias"
        before = {place: np.zeros(entry.codes.shape, np.float32)}
        after = fooocus.apply_patch(before, {key: entry}, {key: place})[place]
        half = units[f"{name}_delta_f32"].astype(np.float16)
        if case["applied"]:
            yield row_of(f"{name}_delta_f16", after, units[f"{name}_delta_f16"].astype(np.float32), 0)
            yield row_of(f"{name}_delta_f32", entry.delta(), half.astype(np.float32), 0)
        else:
            yield row_of(f"{name} (a bias, not applied)", after, before[place], 0)


def _names(units: _Units) -> Iterator[Check]:
    config = json.loads((units.folder / "model" / "unet" / "config.json").read_text(encoding="utf-8"))
    for model, unet in (("tiny", config), ("sdxl", _SDXL)):
        names, recorded = sgm_to_diffusers(unet), units[f"keymap_{model}_sgm"]
        found = np.array([names.get(str(key), "") for key in recorded])
        yield row_of(f"keymap_{model}_diffusers", found, units[f"keymap_{model}_diffusers"], 0)
        weights = [key for key in names if key.endswith(".weight")]
        yield row_of(f"keymap_{model}_sgm (all of them)", np.array(sorted(weights)), np.sort(recorded), 0)


def _guidance(units: _Units) -> Iterator[Check]:
    yield row_of("blur_out", kernels.bilateral(units["blur_in"], units["blur_guide"]), units["blur_out"], ARITHMETIC)
    latent, x0 = units["guidance_latent"][None], units["guidance_x0_in"][None]
    out = []
    for t, sharpness in units["guidance_t_sharpness"]:
        alpha = 0.001 * float(sharpness) * (1 - float(t) / 999)
        # One sigma stands for all: guidance sees only sigma times the network's output.
        _, guided = kernels.guided_step(
            latent,
            latent - x0,
            None,
            np.zeros_like(latent),
            sigma=1.0,
            guidance_scale=1.0,
            blur_alpha=alpha,
            c_x=0.0,
            c_x0=1.0,
            c_dx0=0.0,
            c_noise=0.0,
            rows_per_picture=1,
        )
        out.append(guided[0])
    yield row_of("guidance_x0_out", np.stack(out), units["guidance_x0_out"], ARITHMETIC)


def _head(units: _Units) -> Iterator[Check]:
    masks = units["latmask_in"]
    found = np.stack([kernels.latent_mask(_binary(mask), 8) for mask in masks])
    yield row_of("latmask_out", found.astype(np.uint8), units["latmask_out"], 0)
    weight = fooocus.read_head(units.folder / "inpaint_head.pth")[units["head_channels"]]
    features = [_convolve(np.concatenate([mask[None], units["head_in_latent"]]), weight) for mask in found]
    yield row_of("head_out_ch", np.stack(features), units["head_out_ch"], NETWORK)
    picture = units["masked_image_u8"]
    height, width = picture.shape[:2]
    frame = canvas.Frame((0, height, 0, width), picture, _binary(masks[0]))
    yield row_of("masked_image_out_sub4", frame.masked[0, :, ::4, ::4], units["masked_image_out_sub4"], ARITHMETIC)


def _binary(mask: Array) -> Array:
    return np.where(mask > 127, np.uint8(255), np.uint8(0))


def _convolve(image: Array, weight: Array) -> Array:
    """3x3 convolution of (C, h, w) with edges repeated, in double precision."""
    padded = np.pad(image.astype(np.float64), ((0, 0), (1, 1), (1, 1)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    out: Array = np.einsum("chwyx,ocyx->ohw", windows, weight.astype(np.float64), optimize=True)
    return out


_CHECKS: tuple[Callable[[_Units], Iterator[Check]], ...] = (
    _boxes,
    _sizes,
    _pictures,
    _projections,
    _tables,
    _counts,
    _solver,
    _patch,
    _names,
    _guidance,
    _head,
)
