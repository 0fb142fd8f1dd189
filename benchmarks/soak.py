"""A service under four times the load that it can serve, with clients that cancel, vanish, and a worker that dies.

A real `dreammix-trt serve` runs in a process of its own on the embedded model (or on --engine). Clients of all three
APIs ask for requests of mixed subjects, sizes and steps, at a rate that was measured to be four times too much; what
the queue does not take is refused and not sent again. Every tenth cancels, every twentieth closes its connection, and
in the middle a worker's device is lost (`_soak_server`). Each finished picture is compared bit for bit with the one
that the same request gives when it is painted alone; the service's own count of ends is compared with what its clients
saw; its resident memory is read a hundred times.

Part `overhead`: what HTTP costs over the queue at 30 steps.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import httpx
import numpy as np
from _common import Benchmark
from _soak_clients import Clients, Outcome
from _soak_orders import U8, Order, Variant, draw_orders, draw_variants, write_subjects
from _soak_overhead import measure_overhead
from _soak_report import add_ends, add_memory, add_times

from dreammix_trt.core.subject import open_subject
from dreammix_trt.engine import DreamMix

ENOUGH = 2000  # orders; a shorter run proves less, and writes no results
LOAD = 4.0


def main() -> int:
    given = parse()
    with tempfile.TemporaryDirectory() as folder:
        engine = given.engine or build_engine(Path(folder))
        if given.part == "overhead":
            bench = Benchmark("soak_overhead", threads=given.threads)
            measure_overhead(bench, engine, given.threads, given.rounds)
            return bench.finish(as_json=given.json, keep=given.rounds >= 10)
        bench = Benchmark("soak", threads=given.workers)
        soak(bench, engine, Path(folder), given)
    if given.requests < ENOUGH:
        say(f"fewer than {ENOUGH} requests: no results are written")
    return bench.finish(as_json=given.json, keep=given.requests >= ENOUGH)


def soak(bench: Benchmark, engine: Path, folder: Path, given: argparse.Namespace) -> None:
    """Rows of the whole run."""
    subjects, variants = write_subjects(folder), draw_variants(given.variants)
    say(f"painting {len(variants)} requests alone")
    expected = paint_alone(engine, subjects, variants)
    with serve(engine, given.workers, given.queue) as url:
        asyncio.run(run(bench, url, subjects, Crowd(variants, expected, given.requests, given.workers > 1)))


class Crowd:
    """Who asks for what. kills: whether one of them kills a worker."""

    def __init__(self, variants: Sequence[Variant], expected: Sequence[U8], count: int, kills: bool) -> None:
        self.variants, self.expected = variants, expected
        self.orders = draw_orders(count, len(variants), kills=kills)


async def run(bench: Benchmark, url: str, subjects: dict[str, Path], crowd: Crowd) -> None:
    """Have a crowd ask a service, and tell what came of it."""
    limits = httpx.Limits(max_connections=400, max_keepalive_connections=50)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        for name, file in subjects.items():
            answer = await client.post("/v1/subjects", files={"file": file.read_bytes()}, data={"name": name})
            answer.raise_for_status()
        clients = Clients(client, crowd.variants, crowd.expected)
        rate = await measure_rate(clients, crowd)
        say(f"served {rate:.2f} requests a second; {LOAD:g} times that come now")
        clients.second = 1 / (LOAD * rate)
        before, begun = await read_ends(client), time.perf_counter()
        outcomes, samples = await send_all(client, clients, crowd.orders)
        await wait_until_idle(client)
        seconds = time.perf_counter() - begun
        after = await read_ends(client)
    for each in [each for each in outcomes if each.problem][:10]:
        say(f"order {each.order.number} ({each.order.door}, {each.order.fate}): {each.problem}")
    bench.add("requests sent", len(outcomes))
    bench.add("served before the run, requests a second", rate)
    sending, served = crowd.orders[-1].start * clients.second, sum(each.end == "done" for each in outcomes)
    bench.add("sent a second, times what was done a second in the run", len(outcomes) / sending / (served / seconds))
    bench.add("the run [s]", seconds)
    add_ends(bench, outcomes, {name: count - before.get(name, 0) for name, count in after.items()})
    add_times(bench, outcomes)
    add_memory(bench, samples, goal=len(outcomes) >= ENOUGH)


async def measure_rate(clients: Clients, crowd: Crowd) -> float:
    """Requests a second that the service finishes when some always wait. Each variant is painted once before: what is
    loaded at first use is then there."""

    async def ask(number: int, count: int) -> None:
        for k in range(number, count, 4):
            outcome = await clients.carry_out(Order(k, k % len(crowd.variants), "native", "stays", 0.0, 0.0))
            if outcome.problem or outcome.end != "done":
                raise SystemExit(f"before the run a request ended {outcome.end}: {outcome.problem}")

    count = max(len(crowd.variants), 12)
    await asyncio.gather(*(ask(number, count) for number in range(4)))
    begun = time.perf_counter()
    await asyncio.gather(*(ask(number, count) for number in range(4)))
    return count / (time.perf_counter() - begun)


async def send_all(
    client: httpx.AsyncClient, clients: Clients, orders: Sequence[Order]
) -> tuple[list[Outcome], list[tuple[float, float]]]:
    """Send orders when their time has come, however slowly they are answered. Returns also the service's memory, read
    whenever another hundredth has ended."""
    outcomes, samples, begun = list[Outcome](), list[tuple[float, float]](), time.perf_counter()

    async def carry_out(order: Order) -> None:
        await asyncio.sleep(order.start * clients.second - (time.perf_counter() - begun))
        outcomes.append(await clients.carry_out(order))
        share = len(outcomes) / len(orders)
        if not samples or share - samples[-1][0] >= 0.01:
            samples.append((share, 0.0))
            size = (await read_metrics(client))["process_resident_memory_bytes"]
            samples[[at for at, _ in samples].index(share)] = (share, size)

    await asyncio.gather(*(carry_out(order) for order in orders))
    return outcomes, samples


async def wait_until_idle(client: httpx.AsyncClient) -> None:
    """Wait until nothing waits or runs: jobs of clients that have vanished may still do."""
    while True:
        metrics = await read_metrics(client)
        if not sum(count for name, count in metrics.items() if name.startswith("dreammix_queue_")):
            await asyncio.sleep(0.2)  # an end is counted right after it
            return
        await asyncio.sleep(0.1)


async def read_ends(client: httpx.AsyncClient) -> dict[str, int]:
    """How many jobs ended in which way, as the service counts them."""
    start = "dreammix_jobs_total{"
    metrics = {name: count for name, count in (await read_metrics(client)).items() if name.startswith(start)}
    return {name.split('state="')[1].split('"')[0]: int(count) for name, count in metrics.items()}


async def read_metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """All samples of /metrics by name and labels."""
    text = (await client.get("/metrics")).raise_for_status().text
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def paint_alone(engine: Path, subjects: dict[str, Path], variants: Sequence[Variant]) -> list[U8]:
    """The picture of each request, all different."""
    with DreamMix.load(engine, threads=1) as dm:
        for name, file in subjects.items():
            dm.add_subject(open_subject(file, dm.facts.unet, name=name))
        pictures = [np.asarray(dm.inpaint(each.picture, each.mask, **each.fields).images[0]) for each in variants]
    if len({picture.tobytes() for picture in pictures}) < len(pictures):
        raise SystemExit("two requests have the same picture, so a mix-up would not be seen")
    return pictures


@contextlib.contextmanager
def serve(engine: Path, workers: int, queue: int) -> Iterator[str]:
    """`dreammix-trt serve` in a process of its own: its address."""
    script = Path(__file__).resolve().parent / "_soak_server.py"
    command = [sys.executable, str(script), str(engine), str(workers), str(queue)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.startswith("serving at "):
                    yield line.split()[2].rstrip("/")
                    break
            else:
                raise SystemExit("the service did not start")
        finally:
            process.terminate()
            rest = process.stderr.read()
            if process.wait(60) or "Traceback" in rest:
                say(f"the service ended {process.returncode}:\n{rest[-2000:]}")


def build_engine(folder: Path) -> Path:
    """The embedded model as an engine; what it is made of comes from the store."""
    from dreammix_trt.building import EngineOptions, build

    build(out=folder / "engine", engine=EngineOptions())
    return folder / "engine"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("soak", "overhead"), default="soak")
    parser.add_argument("--engine", type=Path, help="of the embedded base; default: one is built")
    parser.add_argument("--requests", type=int, default=ENOUGH)
    parser.add_argument("--variants", type=int, default=24, help="different requests; each is painted alone once")
    parser.add_argument("--workers", type=int, default=2, help="of the service, one thread each; with 1 none is killed")
    parser.add_argument("--queue", type=int, default=16, help="how many requests may wait")
    parser.add_argument("--rounds", type=int, default=30, help="overhead: turns of HTTP and the queue")
    parser.add_argument("--threads", type=int, default=1, help="overhead: of the painter")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    least = {"requests": 20, "variants": 2, "workers": 1, "queue": 1, "rounds": 2, "threads": 1}
    for name, bound in least.items():
        if getattr(given, name) < bound:
            parser.error(f"--{name} is {getattr(given, name)}; it must be at least {bound}")
    return given


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
