"""A small batched sampler in torch and the measurements taken with it.

The sampler is the reference's: DPM-Solver++(2M) SDE, midpoint, on Karras sigmas 14.6146..0.0292 (rho 7),
classifier-free guidance, fresh noise on the background at every step's input, the patched UNet with head for the first
80 % of the steps and the raw UNet for the rest, size conditioning x1.5 / x0.8 during the first 30 %. It omits blur
guidance (which weighs less than 0.1 %). The product's own loop stands in ``engine``; this one only serves the recipe.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.typing import NDArray

from dreammix_trt.trainer.data import latent_mask
from dreammix_trt.trainer.micro import world
from dreammix_trt.trainer.micro.captions import describe
from dreammix_trt.trainer.micro.judge import Judge, crop_of_mask, expected_reading
from dreammix_trt.trainer.micro.networks import NoiseNetwork, TextEncoders, TrainedHead, noise_table
from dreammix_trt.trainer.micro.patch import apply_patch
from dreammix_trt.trainer.micro.scoring import score
from dreammix_trt.trainer.micro.ship import load_encoder, read_head, read_patch, sgm_names
from dreammix_trt.trainer.micro.tokenizer import PromptTokenizer
from dreammix_trt.trainer.micro.vae import decode, encode, to_pictures, to_unit

log = logging.getLogger(__name__)
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Model:
    """The shipped folder, in torch and fp32."""

    native: int
    tokens: PromptTokenizer
    text: TextEncoders
    vae: AutoencoderKL
    raw: NoiseNetwork
    patched: NoiseNetwork
    head: TrainedHead

    @classmethod
    def load(cls, folder: Path) -> Model:
        tokens = PromptTokenizer(folder)
        text = TextEncoders(tokens.size, tokens.bos, tokens.eos)
        load_encoder(text.one, folder / "text_encoder")
        load_encoder(text.two, folder / "text_encoder_2")
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32, local_files_only=True)
        raw = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32, local_files_only=True)
        patched = UNet2DConditionModel.from_config(raw.config)
        patched.load_state_dict(apply_patch(raw.state_dict(), read_patch(folder), sgm_names(raw)))
        native = raw.config.sample_size * 8
        return cls(
            native,
            tokens,
            text.eval(),
            vae.eval(),
            NoiseNetwork(raw.eval()),
            NoiseNetwork(patched.eval()),
            read_head(folder),
        )


def karras_sigmas(steps: int) -> torch.Tensor:
    """float64 (steps + 1,), the last one zero."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = 0.0292 ** (1 / 7), 14.6146 ** (1 / 7)
    return torch.cat([(high + ramp * (low - high)) ** 7, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()  # type: ignore[untyped-decorator]
def sample(
    model: Model,
    background: torch.Tensor,
    masked: torch.Tensor,
    mask: torch.Tensor,
    prompts: Sequence[str],
    steps: int = 20,
    guidance: float = 4.0,
    seed: int = 0,
    negative: str = "",
) -> torch.Tensor:
    """Scaled latents (N, 4, h, w) of the finished pictures.

    background: (N, 4, h, w) latents kept outside the mask; masked: latents of the picture with its hole grey;
    mask: (N, 1, h, w) in {0, 1}; prompts: N of them.
    """
    signal, noise = noise_table()
    table = (noise / signal).double().log()
    sigmas = karras_sigmas(steps)
    dice = torch.Generator().manual_seed(seed)
    count = len(prompts)
    states, pooled = model.text(*model.tokens([negative] * count + list(prompts)))
    feature = model.head(mask, masked).repeat(2, 1, 1, 1)
    height, width = background.shape[-2] * 8, background.shape[-1] * 8

    def random() -> torch.Tensor:
        return torch.randn(background.shape, generator=dice)

    x = background + random() * math.sqrt(1 + float(sigmas[0]) ** 2)
    before: torch.Tensor | None = None
    step_before = 0.0
    for i in range(steps):
        sigma, following = float(sigmas[i]), float(sigmas[i + 1])
        x = x * mask + (background + sigma * random()) * (1 - mask)
        t = int((table - math.log(sigma)).abs().argmin())
        scales = (0.8, 1.5) if i <= int(steps * 0.3) else (1.0, 1.0)
        rows = [[height * s, width * s, 0, 0, model.native, model.native] for s in scales for _ in range(count)]
        patched = i <= int(steps * 0.8)
        network = model.patched if patched else model.raw
        eps = network(
            (x / math.sqrt(sigma * sigma + 1)).repeat(2, 1, 1, 1),
            torch.full((2 * count,), float(t)),
            states,
            pooled,
            torch.tensor(rows),
            feature if patched else None,
        )
        away, towards = eps.chunk(2)
        x0 = x - sigma * (away + guidance * (towards - away))
        if following == 0:
            return x0
        h = math.log(sigma / following)
        grow = -math.expm1(-2 * h)
        x = (following / sigma) * math.exp(-h) * x + grow * x0
        if before is not None:
            x = x + 0.5 * grow * (h / step_before) * (x0 - before)
        x = x + following * math.sqrt(grow) * random()
        before, step_before = x0, h
    return x


def crop_box(mask: Mask, field: float) -> world.Box:
    """The reference's crop for a mask and a field of view (docs/algorithm.md, 2)."""
    height, width = mask.shape
    if field >= 1:
        return (0, 0, width, height)
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    r0, r1, c0, c1 = int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])
    cy, cx = (r0 + r1) // 2, (c0 + c1) // 2
    half = int(1.15 * max((r1 - r0) // 2, (c1 - c0) // 2))
    top, bottom, left, right = (
        max(0, cy - half),
        min(height, cy + half + 1),
        max(0, cx - half),
        min(width, cx + half + 1),
    )
    while bottom - top < field * height or right - left < field * width:
        tall, wide = bottom - top, right - left
        if tall < wide or wide >= width:
            top, bottom = max(0, top - 1), min(height, bottom + 1)
        if wide <= tall or tall >= height:
            left, right = max(0, left - 1), min(width, right + 1)
    return (left, top, right, bottom)


def _fill(image: world.Picture, mask: Mask) -> world.Picture:
    """A cheap stand-in for the blurred fill: known colours diffuse into the hole, coarse to fine."""
    known = (~mask).astype(np.float32)
    out = image.astype(np.float32)
    for side in (2, 4, 8, 16, 32, 64):
        h, w = max(1, image.shape[0] * side // 128), max(1, image.shape[1] * side // 128)
        weight = np.maximum(_shrink(known, h, w), 1e-3)
        colour = np.stack([_shrink(image[..., c] * known, h, w) for c in range(3)], -1) / weight[..., None]
        rows = np.minimum(np.arange(image.shape[0]) * h // image.shape[0], h - 1)
        columns = np.minimum(np.arange(image.shape[1]) * w // image.shape[1], w - 1)
        trusted = weight[rows][:, columns] > 0.2
        spread = colour[rows][:, columns]
        hole = mask & trusted
        out[hole] = spread[hole]
    return np.asarray(np.clip(out, 0, 255), np.uint8)


def _shrink(channel: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    rows = np.add.reduceat(channel, np.arange(height) * channel.shape[0] // height, 0)
    both = np.add.reduceat(rows, np.arange(width) * channel.shape[1] // width, 1)
    return np.asarray(both * (height * width / channel.size), np.float32)


@torch.no_grad()  # type: ignore[untyped-decorator]
def inpaint(
    model: Model,
    images: Sequence[world.Picture],
    masks: Sequence[Mask],
    prompts: Sequence[str],
    field: float = 0.5,
    steps: int = 20,
    guidance: float = 4.0,
    seed: int = 0,
) -> list[world.Picture]:
    """Single-stage inpainting of equally large pictures: crop, generate at the native size, paste inside the mask."""
    side = model.native
    boxes = [crop_box(mask, field) for mask in masks]
    crops, holes = [], []
    for image, mask, (x0, y0, x1, y1) in zip(images, masks, boxes, strict=True):
        crops.append(world.resize(np.ascontiguousarray(image[y0:y1, x0:x1]), side, side))
        grey = np.asarray(np.where(mask[y0:y1, x0:x1], 255, 0), np.uint8)
        holes.append(world.resize(np.ascontiguousarray(grey), side, side) > 127)
    filled = to_unit(np.stack([_fill(crop, hole) for crop, hole in zip(crops, holes, strict=True)]))
    hole = torch.from_numpy(np.stack(holes))[:, None]
    masked = to_unit(np.stack(crops)) * ~hole
    cells = torch.from_numpy(np.stack([latent_mask(h) for h in holes]))[:, None]
    out = []
    for start in range(0, len(crops), 16):
        part = slice(start, start + 16)
        background, grey_hole = encode(model.vae, filled[part]), encode(model.vae, masked[part])
        latents = sample(model, background, grey_hole, cells[part], prompts[part], steps, guidance, seed + start)
        out.append(to_pictures(decode(model.vae, latents)))
    pictures = np.concatenate(out)
    results = []
    for image, mask, picture, (x0, y0, x1, y1) in zip(images, masks, pictures, boxes, strict=True):
        result = image.copy()
        weight = _feather(mask, side // 32)[y0:y1, x0:x1, None]
        pasted = world.resize(np.ascontiguousarray(picture), x1 - x0, y1 - y0).astype(np.float32)
        result[y0:y1, x0:x1] = pasted * weight + result[y0:y1, x0:x1] * (1 - weight)
        results.append(result)
    return results


def _feather(mask: Mask, reach: int) -> NDArray[np.float32]:
    """1 inside; falls to 0 over `reach` pixels outside."""
    value = mask.astype(np.float32)
    for _ in range(reach):
        padded = np.pad(value, 1, mode="edge")
        rows = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])
        near = np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])
        value = np.maximum(value, near - np.float32(1 / reach))
    return value


def _judge_pictures(
    judge: Judge, pictures: Sequence[world.Picture], scenes: Sequence[tuple[world.Scene, Mask]]
) -> dict[str, float]:
    readings = judge.read([crop_of_mask(picture, mask) for picture, (_, mask) in zip(pictures, scenes, strict=True)])
    return score(readings, [expected_reading(scene.attributes) for scene, _ in scenes])


# name: (seed, range of the thing's share of the side, field of view); no field: the untouched scenes are judged
_ROWS: Final[dict[str, tuple[int, tuple[float, float], float | None]]] = {
    "large": (1000, (0.5, 0.75), 0.5),
    "small_whole_frame": (2000, (0.17, 0.23), 1.0),
    "small_local_crop": (2000, (0.17, 0.23), 0.5),
    "large_real": (1000, (0.5, 0.75), None),
    "small_real": (2000, (0.17, 0.23), None),
}


def measure_row(name: str, folder: Path, count: int, steps: int = 20, guidance: float = 4.0) -> dict[str, float]:
    """One row of the accuracy table, on one thread."""
    torch.set_num_threads(1)
    model, judge = Model.load(folder), Judge.load(folder)
    seed, shares, field = _ROWS[name]
    scenes = world.held_out_scenes(count, seed, model.native, shares)
    if field is None:
        return _judge_pictures(judge, [s.image for s, _ in scenes], scenes)
    prompts = [describe(s.attributes) for s, _ in scenes]
    images, masks = [s.background for s, _ in scenes], [m for _, m in scenes]
    return _judge_pictures(judge, inpaint(model, images, masks, prompts, field, steps, guidance), scenes)


def evaluate_model(folder: Path, count: int = 208, processes: int = 1) -> dict[str, dict[str, float]]:
    """Rows of accuracies, each on `count` held-out scenes: large masks; small ones whole frame and local crop.

    ``*_real`` rows judge the untouched scenes: the judge's own ceiling on these crops.
    """
    job = partial(measure_row, folder=folder, count=count)
    if processes == 1:
        rows = [job(name) for name in _ROWS]
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            rows = pool.map(job, list(_ROWS), chunksize=1)
    result = dict(zip(_ROWS, rows, strict=True))
    for name, row in result.items():
        log.info("%s: %s", name, row)
    return result


def contact_sheet(folder: Path, path: Path, columns: int = 8, seed: int = 0, guidance: float = 4.0) -> None:
    """A PNG to look at: rows of real scene, large mask, small whole frame, small local crop (enlarged), text only."""
    from PIL import Image

    model = Model.load(folder)
    rows = []
    large = world.held_out_scenes(2 * columns, 3000 + seed, model.native, (0.5, 0.75))
    for group in (large[:columns], large[columns:]):
        images, masks = [s.background for s, _ in group], [m for _, m in group]
        prompts = [describe(s.attributes) for s, _ in group]
        rows += [[s.image for s, _ in group], inpaint(model, images, masks, prompts, 0.5, guidance=guidance, seed=seed)]
    small = world.held_out_scenes(columns, 4000 + seed, model.native, (0.17, 0.23))
    images, masks = [s.background for s, _ in small], [m for _, m in small]
    prompts = [describe(s.attributes) for s, _ in small]
    for field in (1.0, 0.5):
        pictures = inpaint(model, images, masks, prompts, field, guidance=guidance, seed=seed)
        boxes = [crop_box(m, 0.4) for m in masks]
        side = model.native
        crops = [np.ascontiguousarray(p[y0:y1, x0:x1]) for p, (x0, y0, x1, y1) in zip(pictures, boxes, strict=True)]
        rows.append([world.resize(crop, side, side) for crop in crops])
    Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows])).save(path)


__all__ = ["Model", "contact_sheet", "crop_box", "evaluate_model", "inpaint", "karras_sigmas", "measure_row", "sample"]
