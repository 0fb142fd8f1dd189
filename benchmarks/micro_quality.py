"""How good is the embedded model? Held-out scenes through the real runtime, judged by the shipped classifier.

Large masks with the default two stages; small objects of two sizes in three ways: all steps local and pasted in pixels,
whole frame only, and the default. Plus the VAE's PSNR and the judge's own accuracy on
real renderings, which bounds everything else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from _common import Benchmark, embedded_engine
from PIL import Image

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.trainer.micro.captions import describe
from dreammix_trt.trainer.micro.judge import Judge, crop_around
from dreammix_trt.trainer.micro.world import Scene, held_out_scenes

LARGE = (64.0, 96.0)
#: object sides in pixels of 128: as in the first study of this model, and so that the mask is a tenth of the frame
SMALL = {"small, side a tenth": (11.0, 15.0), "small, 20..28 px": (20.0, 28.0), "small, mask a tenth": (30.0, 38.0)}
WAYS: dict[str, dict[str, Any]] = {
    "local, all steps": {"lcg_fraction": 1.0},
    "whole frame": {"lcg_fraction": 0.0},
    "two stages (default)": {},
}


def score(judge: Judge, pairs: Iterable[tuple[np.ndarray[Any, Any], tuple[Scene, Any]]]) -> dict[str, float]:
    """Shares of right answers: shape, colour, pattern, all three. The judge sees the mask's square, little more."""
    right = []
    for image, (scene, mask) in pairs:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        seen = np.ascontiguousarray(crop_around(image, box, 0.02))
        wanted = (scene.attributes.shape, scene.attributes.colour, scene.attributes.pattern)
        hits = [got == want for got, want in zip(judge.attributes(seen), wanted, strict=True)]
        right.append([*hits, all(hits)])
    return dict(zip(("shape", "colour", "pattern", "all"), np.mean(right, axis=0).tolist(), strict=True))


def paint(
    dm: Any, scenes: list[tuple[Scene, Any]], steps: int, **fields: Any
) -> Iterable[tuple[np.ndarray[Any, Any], tuple[Scene, Any]]]:
    """Every scene's object painted into its background."""
    for index, (scene, mask) in enumerate(scenes):
        prompt = describe(scene.attributes)
        picture = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))
        result = dm.inpaint(
            Image.fromarray(scene.background), picture, prompt, seed=index, num_inference_steps=steps, **fields
        )
        yield np.asarray(result.images[0]), (scene, mask)


def vae_psnr(dm: Any, scenes: list[tuple[Scene, Any]]) -> float:
    """Mean PSNR in dB of encode (mean) and decode on whole scenes."""
    values = []
    for scene, _ in scenes:
        image = np.transpose(scene.image, (2, 0, 1))[None].astype(np.float32) / 127.5 - 1
        latent = dm.networks.run("vae_encoder", image=image)["mean"]
        decoded = np.clip(dm.networks.run("vae_decoder", latent=latent)["image"], -1, 1)
        values.append(-10 * np.log10(np.mean(((decoded - image) / 2) ** 2)))
    return float(np.mean(values))


def add_shares(bench: Benchmark, name: str, shares: dict[str, float], bounds: dict[str, str] | None = None) -> None:
    """A row for each share."""
    for what, value in shares.items():
        bench.add(f"{name}: {what}", value, bound=(bounds or {}).get(what))


def main() -> int:
    """Print the accuracy table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=208)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    judge = Judge.load(BaseFiles.open().folder)
    large = held_out_scenes(given.scenes, object_size=LARGE)
    small = {name: held_out_scenes(given.scenes, seed=91_000, object_size=sizes) for name, sizes in SMALL.items()}
    bench = Benchmark("micro_quality", threads=given.threads)
    bench.add("scenes of each kind", given.scenes, bound=">= 200")
    with embedded_engine(given.threads) as dm:
        bench.add("VAE PSNR [dB]", vae_psnr(dm, large), bound=">= 30")
        for name, scenes in {"large": large, **small}.items():
            bench.add(
                f"{name}: mean share of the frame under the mask", float(np.mean([mask.mean() for _, mask in scenes]))
            )
            add_shares(
                bench, f"the judge on real renderings, {name}", score(judge, ((s.image, (s, m)) for s, m in scenes))
            )
        bounds = {"shape": ">= 0.85", "colour": ">= 0.95", "pattern": ">= 0.70"}
        add_shares(bench, "large, two stages (default)", score(judge, paint(dm, large, given.steps)), bounds)
        for name, scenes in small.items():
            right = {}
            for way, fields in WAYS.items():
                shares = score(judge, paint(dm, scenes, given.steps, **fields))
                right[way] = shares["all"]
                add_shares(bench, f"{name}, {way}", shares)
            ratio = right["local, all steps"] / max(right["whole frame"], 1 / given.scenes)
            bench.add(f"{name}: all three right, local / whole frame", ratio, bound=">= 2")
    return bench.finish(as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
