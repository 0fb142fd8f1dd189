"""How good is the embedded model? Held-out combinations through the real runtime, judged by the shipped judge.

Part "base": large masks with the default two stages, and small things in three ways (all steps local and
pasted in pixels, whole frame only, the default), share by share; the VAE's PSNR; the judge's own accuracy on real
renderings, which bounds everything else. Part "subjects": held-out subjects, a LoRA each, in held-out rooms: identity
and edits, share of parts kept, edited part right, both; trained with and without attribute captions and regular
pictures, painted with and without TAS. Intervals are 95 %, bootstrapped over subjects.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from _common import Benchmark, embedded_engine
from _micro_subjects import Verdict, bootstrap_share, judge_subject, paint_scene, train_subject

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.engine import DreamMix
from dreammix_trt.trainer.micro.captions import describe
from dreammix_trt.trainer.micro.judge import Judge, crop_of_mask, expected_reading
from dreammix_trt.trainer.micro.scoring import score
from dreammix_trt.trainer.micro.world import Scene, held_out_scenes, held_out_subjects
from dreammix_trt.trainer.recipes import SMALL

Scenes = list[tuple[Scene, np.ndarray[Any, Any]]]
LARGE = (0.5, 0.75)  # of the frame's side
SMALL_THINGS = {"small, side a fifth": (0.18, 0.22)}
WAYS: dict[str, dict[str, Any]] = {
    "local, all steps": {"lcg_fraction": 1.0},
    "whole frame": {"lcg_fraction": 0.0},
    "two stages (default)": {},
}
GOALS = {"decal": ">= 0.85", "all": ">= 0.8"}
#: how a subject is trained, and whether TAS takes the old word out of the prompt
TRAININGS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "without regular pictures": {"recipe": replace(SMALL, beta=0.0)},
    "without attribute captions": {"captioned": False},
}


def judged(judge: Judge, pictures: Iterable[np.ndarray[Any, Any]], scenes: Scenes) -> dict[str, float]:
    """Shares of right parts; the judge sees the mask's square and little more."""
    readings = judge.read([crop_of_mask(picture, mask) for picture, (_, mask) in zip(pictures, scenes, strict=True)])
    return score(readings, [expected_reading(scene.attributes) for scene, _ in scenes])


def paint(dm: DreamMix, scenes: Scenes, steps: int, **fields: Any) -> Iterable[np.ndarray[Any, Any]]:
    """Every scene's thing painted into its background."""
    for index, (scene, mask) in enumerate(scenes):
        prompt = describe(scene.attributes)
        yield paint_scene(dm, scene, mask, prompt, seed=index, num_inference_steps=steps, **fields)


def vae_psnr(dm: DreamMix, scenes: Scenes) -> tuple[float, float]:
    """Mean PSNR in dB of encode (mean) and decode: whole scenes, and inside the things' boxes."""
    whole, inside = [], []
    networks: Any = dm.networks
    for scene, _ in scenes:
        image = np.transpose(scene.image, (2, 0, 1))[None].astype(np.float32) / 127.5 - 1
        latent = networks.run("vae_encoder", image=image)["mean"]
        square = ((np.clip(networks.run("vae_decoder", latent=latent)["image"], -1, 1) - image) / 2) ** 2
        x0, y0, x1, y1 = scene.box
        whole.append(-10 * np.log10(square.mean()))
        inside.append(-10 * np.log10(square[..., y0:y1, x0:x1].mean()))
    return float(np.mean(whole)), float(np.mean(inside))


def add_shares(bench: Benchmark, name: str, shares: dict[str, float], bounds: dict[str, str] | None = None) -> None:
    """A row for each share."""
    for what, value in shares.items():
        if what != "scenes":
            bench.add(f"{name}: {what}", value, bound=(bounds or {}).get(what))


def measure_base(bench: Benchmark, judge: Judge, count: int, steps: int, threads: int) -> None:
    """The base without a subject."""
    bench.add("scenes of each kind", count, bound=">= 200")
    with embedded_engine(threads) as dm:
        side = dm.facts.native_side
        large = held_out_scenes(count, size=side, object_share=LARGE)
        small = {name: held_out_scenes(count, 91_000, side, shares) for name, shares in SMALL_THINGS.items()}
        frame, thing = vae_psnr(dm, large)
        bench.add("VAE PSNR [dB]", frame, bound=">= 34")
        bench.add("VAE PSNR in the thing's box [dB]", thing)
        for name, scenes in {"large": large, **small}.items():
            bench.add(f"{name}: share of the frame under the mask", float(np.mean([mask.mean() for _, mask in scenes])))
            real = judged(judge, (scene.image for scene, _ in scenes), scenes)
            add_shares(bench, f"the judge on real renderings, {name}", real)
        bounds = dict.fromkeys(("shape", "colour", "pattern", "foot", "top", "decal_colour"), ">= 0.95") | GOALS
        add_shares(bench, "large, two stages (default)", judged(judge, paint(dm, large, steps), large), bounds)
        for name, scenes in small.items():
            right = {}
            for way, fields in WAYS.items():
                shares = judged(judge, paint(dm, scenes, steps, **fields), scenes)
                right[way] = shares["all"]
                add_shares(bench, f"{name}, {way}", shares)
            ratio = right["local, all steps"] / max(right["whole frame"], 1 / count)
            bench.add(f"{name}: all parts right, local / whole frame", ratio, bound=">= 2")


def measure_subjects(bench: Benchmark, judge: Judge, count: int, rooms: int, steps: int, threads: int) -> None:
    """Identity and edits of held-out subjects."""
    subjects = held_out_subjects(count)
    for training, fields in TRAININGS.items():
        found: dict[bool, list[Verdict]] = {True: [], False: []}
        for number, subject in enumerate(subjects):
            with tempfile.TemporaryDirectory() as folder:
                engine = train_subject(subject, Path(folder), seed=number, threads=threads, **fields)
                with DreamMix.load(engine, threads=threads) as dm:
                    for tas in (True, False):
                        found[tas] += judge_subject(number, subject, dm, judge, rooms, steps, tas=tas)
        for tas, verdicts in found.items():
            report_verdicts(bench, f"{training}, {'with' if tas else 'without'} TAS", verdicts)


def report_verdicts(bench: Benchmark, name: str, verdicts: list[Verdict]) -> None:
    """Rows for each kind of prompt, with intervals."""
    for kind in dict.fromkeys(verdict.kind for verdict in verdicts):
        chosen = [verdict for verdict in verdicts if verdict.kind == kind]
        for field in ("right", "kept", "both", "cosine"):
            if kind == "identity" and field in ("right", "both"):
                continue
            bench.add(f"{name}, {kind}: {field}", str(bootstrap_share(chosen, field)))


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("base", "subjects"), default="base")
    parser.add_argument("--scenes", type=int, default=208)
    parser.add_argument("--subjects", type=int, default=12)
    parser.add_argument("--rooms", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    judge = Judge.load(BaseFiles.open().folder)
    bench = Benchmark("micro_quality" if given.part == "base" else "micro_subjects", threads=given.threads)
    if given.part == "base":
        measure_base(bench, judge, given.scenes, given.steps, given.threads)
    else:
        measure_subjects(bench, judge, given.subjects, given.rooms, given.steps, given.threads)
    return bench.finish(as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
