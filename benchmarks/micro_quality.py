"""How good is the embedded model? Held-out scenes through the real runtime, judged by the shipped classifier.

Large masks with the default two stages; small objects (the mask covers about a tenth of the frame) in three ways: all
steps local and pasted in pixels, whole frame only, and the default. Plus the VAE's PSNR and the judge's own accuracy on
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
from dreammix_trt.trainer.micro.judge import Judge
from dreammix_trt.trainer.micro.world import Scene, held_out_scenes

LARGE, SMALL = (64.0, 96.0), (26.0, 36.0)
WAYS: dict[str, dict[str, Any]] = {
    "local, all steps": {"lcg_fraction": 1.0},
    "whole frame": {"lcg_fraction": 0.0},
    "two stages (default)": {},
}


def crop(image: np.ndarray[Any, Any], box: tuple[int, int, int, int]) -> np.ndarray[Any, Any]:
    """The object's box with a tenth of margin, as the judge was trained on."""
    x0, y0, x1, y1 = box
    margin = max(1, round(0.1 * max(x1 - x0, y1 - y0)))
    height, width = image.shape[:2]
    return image[max(0, y0 - margin) : min(height, y1 + margin), max(0, x0 - margin) : min(width, x1 + margin)]


def score(judge: Judge, pairs: Iterable[tuple[np.ndarray[Any, Any], Scene]]) -> dict[str, float]:
    """Shares of right answers: shape, colour, pattern, all three."""
    right = []
    for image, scene in pairs:
        wanted = (scene.attributes.shape, scene.attributes.colour, scene.attributes.pattern)
        hits = [got == want for got, want in zip(judge.attributes(crop(image, scene.box)), wanted, strict=True)]
        right.append([*hits, all(hits)])
    return dict(zip(("shape", "colour", "pattern", "all"), np.mean(right, axis=0).tolist(), strict=True))


def paint(
    dm: Any, scenes: list[tuple[Scene, Any]], steps: int, **fields: Any
) -> Iterable[tuple[np.ndarray[Any, Any], Scene]]:
    """Every scene's object painted into its background."""
    for index, (scene, mask) in enumerate(scenes):
        prompt = describe(scene.attributes)
        picture = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))
        result = dm.inpaint(
            Image.fromarray(scene.background), picture, prompt, seed=index, num_inference_steps=steps, **fields
        )
        yield np.asarray(result.images[0]), scene


def vae_psnr(dm: Any, scenes: list[tuple[Scene, Any]]) -> float:
    """Mean PSNR in dB of encode (mean) and decode on whole scenes."""
    values = []
    for scene, _ in scenes:
        image = np.transpose(scene.image, (2, 0, 1))[None].astype(np.float32) / 127.5 - 1
        latent = dm.networks.run("vae_encoder", image=image)["mean"]
        decoded = np.clip(dm.networks.run("vae_decoder", latent=latent)["image"], -1, 1)
        values.append(-10 * np.log10(np.mean(((decoded - image) / 2) ** 2)))
    return float(np.mean(values))


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
    small = held_out_scenes(given.scenes, seed=91_000, object_size=SMALL)
    bench = Benchmark("micro_quality", threads=given.threads)
    bench.add("scenes of each kind", given.scenes, bound=">= 200")
    bench.add("small: mean share of the frame under the mask", float(np.mean([mask.mean() for _, mask in small])))
    with embedded_engine(given.threads) as dm:
        bench.add("VAE PSNR [dB]", vae_psnr(dm, large), bound=">= 30")
        for name, scenes in (("large", large), ("small", small)):
            for what, value in score(judge, ((scene.image, scene) for scene, _ in scenes)).items():
                bench.add(f"the judge on real renderings, {name}: {what}", value)
        bounds = {"shape": ">= 0.85", "colour": ">= 0.95", "pattern": ">= 0.70"}
        for what, value in score(judge, paint(dm, large, given.steps)).items():
            bench.add(f"large, two stages (default): {what}", value, bound=bounds.get(what))
        everything = {}
        for way, fields in WAYS.items():
            shares = score(judge, paint(dm, small, given.steps, **fields))
            everything[way] = shares["all"]
            for what, value in shares.items():
                bench.add(f"small, {way}: {what}", value)
    ratio = everything["local, all steps"] / max(everything["whole frame"], 1 / given.scenes)
    bench.add("small, all three right: local / whole frame", ratio, bound=">= 2")
    return bench.finish(as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
