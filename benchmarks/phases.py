"""Where does the time of a picture go? A 1024x1024 input on the embedded model, split per phase; time outside the
networks must stay below a tenth. Beside it each canvas function at a 1024x1024 working frame and its numpy/PIL twin.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from _common import Benchmark, embedded_engine, median_seconds, sample_place

from dreammix_trt.building import build

#: prints the seconds of loading, of the first picture and of the next one
FIRST_PICTURE = """
import sys, time
import numpy as np
from dreammix_trt.engine import DreamMix

image, mask = np.full((256, 256, 3), 127, np.uint8), np.zeros((256, 256), np.uint8)
mask[80:180, 80:180] = 255
marks = [time.perf_counter()]
with DreamMix.load(sys.argv[1], threads=int(sys.argv[2])) as dm:
    marks.append(time.perf_counter())
    for _ in range(2):
        dm.inpaint(image, mask, "a red mug", num_inference_steps=20, seed=1)
        marks.append(time.perf_counter())
print(*(after - before for before, after in zip(marks, marks[1:])))
"""


def picture_rows(bench: Benchmark, *, steps: int, threads: int, repeats: int) -> None:
    """Timings per phase of whole pictures (medians)."""
    image, mask = sample_place(1024)
    with embedded_engine(threads) as dm:
        dm.inpaint(image, mask, "a red striped mug", num_inference_steps=steps, seed=1)
        results, walls = [], []
        for seed in range(repeats):
            start = time.perf_counter()
            results.append(dm.inpaint(image, mask, "a red striped mug", num_inference_steps=steps, seed=seed))
            walls.append(time.perf_counter() - start)
    phases = {name: statistics.median(r.timings[name] for r in results) for name in results[0].timings}
    inside = statistics.median(sum(v for k, v in r.timings.items() if k.startswith("network:")) for r in results)
    wall = statistics.median(walls)
    for name, value in phases.items():
        bench.add(f"phase {name} [ms]", 1000 * value)
    bench.add(f"whole picture, {steps} steps, 1024x1024 input [ms]", 1000 * wall)
    bench.add(f"share outside the networks, {steps} steps", (wall - inside) / wall, bound="<= 0.10")


def kernel_rows(bench: Benchmark, *, repeats: int) -> None:
    """Each canvas function in C++ and as its twin, 1024x1024."""
    from dreammix_trt.engine import kernels, numpy_kernels

    image, mask = (np.asarray(picture) for picture in sample_place(1024))
    mask = np.ascontiguousarray(mask)
    weight = kernels.feather(mask, 32)
    rng = np.random.default_rng(0)
    shape = (1, 4, 128, 128)
    x, z, noise = (rng.standard_normal(shape, np.float32) for _ in range(3))
    eps = rng.standard_normal((2, 4, 128, 128), np.float32)
    latent = kernels.latent_mask(mask, 8)[None, None]
    tokens, remove = rng.standard_normal((77, 2048), np.float32), rng.standard_normal((2, 2048), np.float32)
    positions = np.arange(1, 8)
    step = {
        "sigma": 1.0,
        "guidance_scale": 4.0,
        "blur_alpha": 5e-4,
        "c_x": 0.7,
        "c_x0": 0.4,
        "c_dx0": 0.1,
        "c_noise": 0.3,
    }
    calls: dict[str, Callable[[Any], Any]] = {
        "crop+resize 768 -> 1024": lambda k: k.resize(image, 1024, 1024, "lanczos", (128, 896, 128, 896)),
        "fill": lambda k: k.fill(image, mask),
        "latent_mask": lambda k: k.latent_mask(mask, 8),
        "feather": lambda k: k.feather(mask, 32),
        "blend_scale": lambda k: k.blend_scale(x, z, latent, noise, 1.5),
        "guided_step (CFG, sharpness, solver)": lambda k: k.guided_step(x, eps, x, noise, **step),
        "tas_project": lambda k: k.tas_project(tokens, remove, positions),
        "paste": lambda k: k.paste(image, image, (0, 1024, 0, 1024), weight),
        "normals": lambda k: k.normals(7, 0, 0, shape),
    }
    for name, call in calls.items():
        both: dict[str, Callable[[], Any]] = {"C++": partial(call, kernels), "numpy": partial(call, numpy_kernels)}
        seconds = median_seconds(both, repeats=repeats)
        bench.add(f"kernel {name} [ms]", 1000 * seconds["C++"])
        bench.add(f"kernel {name}: numpy / C++", seconds["numpy"] / seconds["C++"])


def import_rows(bench: Benchmark, *, repeats: int, threads: int) -> None:
    """What importing costs, and a first picture in a new process."""
    probe = "import time; t=time.perf_counter(); import dreammix_trt; print(time.perf_counter()-t)"
    spent = [
        float(subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    bench.add("import dreammix_trt [s]", statistics.median(spent), bound="<= 0.15")
    with tempfile.TemporaryDirectory() as folder:
        build(out=Path(folder) / "engine")
        command = [sys.executable, "-c", FIRST_PICTURE, str(Path(folder) / "engine"), str(threads)]
        runs = [
            [
                float(word)
                for word in subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
            ]
            for _ in range(repeats + 1)  # the first one keeps sessions in the store
        ]
    load, first, later = (statistics.median(times) for times in zip(*runs[1:], strict=True))
    bench.add("load the embedded engine [s]", load, bound="<= 0.2")
    bench.add("load to first picture, 20 steps [s]", load + first)
    bench.add("load to first picture, less what a later picture takes [s]", load + first - later, bound="<= 0.4")


def main() -> int:
    """Print all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="default: the product's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    repeats = max(5, given.repeats)
    bench = Benchmark("phases", threads=given.threads)
    import_rows(bench, repeats=repeats, threads=given.threads)
    picture_rows(bench, steps=given.steps, threads=given.threads, repeats=repeats)
    kernel_rows(bench, repeats=repeats)
    return bench.finish(as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
