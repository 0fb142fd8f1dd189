"""How much faster is our fill than the same cascade in Pillow's box blurs, at 1024x1024, and are the bytes equal?"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import numpy as np
from _common import Benchmark, median_seconds

from dreammix_trt.engine import kernels, numpy_kernels

SIDE = 1024


def picture() -> kernels.U8:
    """Smooth waves with noise: neither constant nor white."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    waves = np.stack([np.sin(x / 37 + y / 91 + c) for c in range(3)], axis=-1) * 90 + 128
    noise = np.random.default_rng(0).normal(0, 20, waves.shape)
    return (waves + noise).clip(0, 255).astype(np.uint8)


def masks() -> dict[str, kernels.U8]:
    """Holes as requests have them; the last is what a crop at 1.15 times the mask's box leaves around it."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    quarter, margin = SIDE // 4, int(SIDE * (1 - 1 / 1.15) / 2)
    holes = {
        "half-frame box": (abs(y - SIDE // 2) < quarter) & (abs(x - SIDE // 2) < quarter),
        "small ellipse": ((y - 400) / 110) ** 2 + ((x - 620) / 160) ** 2 < 1,
        "full frame / 1.15": (np.minimum(y, SIDE - 1 - y) >= margin) & (np.minimum(x, SIDE - 1 - x) >= margin),
    }
    return {name: np.where(hole, np.uint8(255), np.uint8(0)) for name, hole in holes.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=0, help="threads of our fill (0: all cores)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    kernels.set_threads(given.threads)
    bench, image = Benchmark("fill", threads=given.threads), picture()
    bench.add("kernels", kernels.BACKEND)
    for name, mask in masks().items():
        equal = np.array_equal(kernels.fill(image, mask), numpy_kernels.fill(image, mask))
        works = {"ours": partial(kernels.fill, image, mask), "pillow": partial(numpy_kernels.fill, image, mask)}
        seconds = median_seconds(works, repeats=given.repeats)
        bench.add(f"{name}: Pillow [ms]", 1000 * seconds["pillow"])
        bench.add(f"{name}: ours [ms]", 1000 * seconds["ours"])
        bench.add(f"{name}: Pillow / ours", seconds["pillow"] / seconds["ours"], bound=">= 10")
        bench.add(f"{name}: equal bytes", equal, bound="== 1")
    return bench.finish(as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
