"""How much faster is a picture on the CPU than with diffusers, eager and compiled, and with optimum-onnx?

Everything runs on the same weights, sizes, steps, guidance and number of threads, and in turns, so that whatever else
the machine does falls on all alike. What counts is the median of the ratios, round by round. There are two works:

"picture": the embedded model (its patched UNet), a whole picture of its own size, as ours paints at no smaller one.
Ours does more work for it (two stages, five VAE encodes); the others get no such handicap. "unet": one call of an SDXL
UNet of a fifth of the width with random weights, two rows, the text's keys and values made anew every --steps calls;
outputs are compared before anything is timed.

A number of threads has a process of its own. What is not installed, or what this processor has not, is said in a row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import Benchmark, embedded_engine, sample_place
from _cpu_peers import EAGER, HALF, PLAIN, Works, pictures, unets

#: speed over diffusers eager
GOALS = {PLAIN: ">= 2.2", HALF: ">= 3"}


def take_turns(works: Works, repeats: int) -> dict[str, list[float]]:
    """Seconds of every work in every round, after one round that does not count."""
    for work in works.values():
        work()
    rounds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            rounds[name].append(_seconds(work))
    return rounds


def report(bench: Benchmark, what: str, rounds: Mapping[str, list[float]], *, goals: bool) -> None:
    """Medians, and medians of ratios.

    goals: whether ours are held to their goals, and to be no slower than any peer.
    """
    for name, seconds in rounds.items():
        bench.add(f"{what}, {name} [s]", statistics.median(seconds))
    for ours in (name for name in rounds if name in GOALS):
        for peer in (name for name in rounds if name not in GOALS):
            ratio = statistics.median(a / b for a, b in zip(rounds[peer], rounds[ours], strict=True))
            bound = (GOALS[ours] if peer == EAGER else ">= 1") if goals else None
            bench.add(f"{what}, {ours}: times as fast as {peer}", ratio, bound=bound)


def measure(bench: Benchmark, given: argparse.Namespace, threads: int) -> None:
    """Every work at this number of threads, in this process."""
    label = f"{threads} {'thread' if threads == 1 else 'threads'}"
    with ExitStack() as opened, tempfile.TemporaryDirectory() as folder:
        for work in (work for work in given.works.split(",") if work != "share"):
            if work == "picture":
                found, absent = pictures(opened, threads, given.steps, given.size, compiled=given.compiled)
                what = f"{label}, picture of {given.size}x{given.size}, {given.steps} steps"
            else:
                found, absent = unets(opened, threads, Path(folder), given.steps, given.latent, compiled=given.compiled)
                what = f"{label}, UNet of width 0.2 at {given.latent}x{given.latent}"
            for name, why in absent.items():
                bench.add(f"{what}, {name}", f"not measured: {why}")
            report(bench, what, take_turns(found, given.repeats), goals=work == "picture" and threads > 1)


def measure_share(bench: Benchmark, given: argparse.Namespace, threads: int) -> None:
    """The share of a picture of 1024x1024 that is spent outside the networks, at 20 steps."""
    image, mask = sample_place(1024)
    with embedded_engine(threads) as dm:
        shares = []
        for seed in range(given.repeats + 1):
            start = time.perf_counter()
            timings = dm.inpaint(image, mask, "a red striped mug", num_inference_steps=20, seed=seed).timings
            wall = time.perf_counter() - start
            shares.append(1 - sum(spent for name, spent in timings.items() if name.startswith("network:")) / wall)
    bench.add(f"{threads} threads, share outside the networks, 1024x1024, 20 steps", statistics.median(shares[1:]),
              bound="<= 0.08")  # fmt: skip


def in_a_process(given: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    """The rows of a number of threads: torch compiles for the number that it finds."""
    named = {"steps": given.steps, "size": given.size, "latent": given.latent, "repeats": given.repeats}
    options = [word for name, value in named.items() for word in (f"--{name}", str(value))]
    options += ["--works", given.works, *([] if given.compiled else ["--no-compiled"])]
    command = [sys.executable, __file__, "--child", "--threads", str(threads), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def main() -> int:
    """Print and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", default="1,2", help="numbers of threads, each in a process of its own")
    parser.add_argument("--works", default="picture,unet,share", help="share: of a picture, outside the networks")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=256, help="side of the picture; 256: the embedded model's own")
    parser.add_argument("--latent", type=int, default=32, help="side of the UNet's latent")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="leave torch.compile")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    numbers = [int(number) for number in given.threads.split(",")]
    bench = Benchmark("vs_diffusers", threads=max(numbers))
    if given.child:
        measure(bench, given, numbers[0])
        sys.stdout.write(json.dumps(bench.rows) + "\n")
        return 0
    for threads in numbers:
        bench.rows += in_a_process(given, threads)
    if "share" in given.works.split(","):
        measure_share(bench, given, max(numbers))
    return bench.finish(as_json=given.json)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
