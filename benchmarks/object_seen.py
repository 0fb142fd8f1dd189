"""Can the metric `object_seen` tell a thing in a hole from an empty room? Renderings of which everything is known.

Holes are filled with what a model may paint there. A thing: as rendered, warped, smeared, and half transparent. No
thing: the empty room itself, blurred, in shifted colours, smeared, warped, and the room's other side in a mirror, which
is empty but the wrong wall, and may bring its clutter. Bounds are searched on things of the training world, and their
accuracy is measured on held-out combinations, in other rooms.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, Final

import numpy as np
from _common import Benchmark
from PIL import Image, ImageFilter

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.evaluation.metrics.seen import FAR, SHARE, measure_distances
from dreammix_trt.trainer.micro import world
from dreammix_trt.trainer.micro.judge import HEADS, Judge, crop_of_mask

SIDE: Final = 160
THINGS: Final = ("thing", "thing warped", "thing smeared")
GHOST: Final = "thing half transparent"  # people differ about it, so it is reported and decides nothing
EMPTY: Final = ("empty", "blurred", "colours shifted", "smeared", "warped", "mirrored")
DISTANCES: Final = (30, 40, 50, 60, 70, 80)
SHARES: Final = tuple(np.arange(0.05, 0.45, 0.01).round(2))


def fill_hole(rng: np.random.Generator, scene: world.Scene) -> dict[str, world.Picture]:
    """Every filling as a whole picture, of which the hole counts."""
    thing, room = scene.image, scene.background
    soft = Image.fromarray(room).filter(ImageFilter.BoxBlur(3))
    return {
        "thing": thing,
        "thing warped": _warp(rng, thing),
        "thing smeared": _smear(thing),
        GHOST: np.asarray((thing.astype(np.float32) + room) / 2, np.uint8),
        "empty": room,
        "blurred": np.asarray(soft),
        "colours shifted": np.asarray(np.clip(room + rng.normal(0, 8, 3), 0, 255), np.uint8),
        "smeared": _smear(room),
        "warped": _warp(rng, room),
        "mirrored": np.ascontiguousarray(room[:, ::-1]),
    }


def _warp(rng: np.random.Generator, picture: world.Picture, strength: float = 0.09) -> world.Picture:
    """Bent by a smooth random field, whose deviation is half of this share of the side."""
    side = picture.shape[0]
    rows, columns = np.mgrid[:side, :side]
    for axis in (rows, columns):
        field = Image.fromarray(rng.normal(0, strength * side / 2, (6, 6)).astype(np.float32))
        axis += np.rint(np.asarray(field.resize((side, side), Image.Resampling.BICUBIC))).astype(int)
    return picture[np.clip(rows, 0, side - 1), np.clip(columns, 0, side - 1)]


def _smear(picture: world.Picture, cells: int = 18) -> world.Picture:
    small = Image.fromarray(picture).resize((cells, cells), Image.Resampling.BOX)
    return np.asarray(small.resize(picture.shape[1::-1], Image.Resampling.BICUBIC))


def measure_fillings(count: int, *, held_out: bool) -> tuple[dict[str, Any], dict[str, list[world.Picture]]]:
    """Filling -> shares of the hole beyond each distance, float (count, distances); and what the judge would see."""
    rng = np.random.default_rng([91, int(held_out)])
    shares: dict[str, list[list[float]]] = {}
    crops: dict[str, list[world.Picture]] = {}
    for _ in range(count):
        what = world.random_attributes(rng, held_out=held_out)
        scene = world.render_scene(rng, what, SIDE, float(rng.uniform(0.3, 0.7)) * SIDE)
        mask = world.draw_mask(rng, scene.box, SIDE, SIDE)
        for name, filling in fill_hole(rng, scene).items():
            picture = np.where(mask[..., None], filling, scene.background)
            distances = measure_distances(picture, scene.background, mask)
            shares.setdefault(name, []).append([float((distances > far).mean()) for far in DISTANCES])
            crops.setdefault(name, []).append(crop_of_mask(picture, mask))
    return {name: np.array(rows) for name, rows in shares.items()}, crops


def see(shares: Any, far: float, share: float) -> Any:
    """In which of the fillings a thing is seen, bool (count,)."""
    return shares[:, DISTANCES.index(int(far))] > share


def rate(seen: dict[str, Any]) -> float:
    """The mean of two shares: of things that are seen, and of empty holes where none is; each filling counts once."""
    things, empty = (float(np.mean([seen[name].mean() for name in names])) for names in (THINGS, EMPTY))
    return (things + 1 - empty) / 2


def ask_judge(crops: dict[str, list[world.Picture]], sure: float = 0.9) -> dict[str, Any]:
    """Where the judge alone is so sure of a shape, bool (count,) a filling."""
    judge, known = Judge.load(BaseFiles.open().folder), np.array([word != "unclear" for word in HEADS["shape"]])
    seen = {}
    for name, pictures in crops.items():
        scores = judge.scores(pictures)[0]["shape"]
        odds = np.exp(scores - scores.max(1, keepdims=True))
        seen[name] = odds[:, known].max(1) / odds.sum(1) > sure
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=200, help="of each half")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    bench = Benchmark("object_seen")
    learnt, _ = measure_fillings(given.scenes, held_out=False)

    def rate_there(far: float, share: float) -> float:
        return rate({name: see(shares, far, share) for name, shares in learnt.items()})

    tried = {(far, share): rate_there(far, share) for far in DISTANCES for share in SHARES}
    best = max(tried, key=lambda bounds: tried[bounds])
    bench.add("best bounds: levels, share", ", ".join(f"{each:g}" for each in best))
    bench.add("accuracy where they were searched", tried[best])
    bench.add("accuracy of the metric's bounds there", rate_there(FAR, SHARE))
    others, crops = measure_fillings(given.scenes, held_out=True)
    seen = {name: see(shares, FAR, SHARE) for name, shares in others.items()}
    bench.add(f"accuracy on {given.scenes} held-out scenes", rate(seen), bound=">= 0.95")
    for name in (*THINGS, GHOST, *EMPTY):
        bench.add(f"seen: {name}", float(seen[name].mean()))
    judged = ask_judge(crops)
    bench.add("accuracy of the judge alone", rate(judged))
    for name in (*THINGS, *EMPTY):
        bench.add(f"named by the judge: {name}", float(judged[name].mean()))
    return bench.finish(as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
