"""What HTTP costs over the queue behind it: the same request to both, in turns, in one process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
from _common import Benchmark
from _soak_orders import decode, draw_variants, encode
from _soak_report import find_interval

from dreammix_trt.engine import DreamMix
from dreammix_trt.service.app import make_app
from dreammix_trt.service.running import Server
from dreammix_trt.service.served import Served
from dreammix_trt.service.settings import Settings

STEPS: Final = 30
QUEUE: Final = "queue"
WRITTEN: Final = "queue and PNG"  # what an app does that sends the picture on
HTTP: Final = "http"
Cost = tuple[float, float]  # seconds of the clock and of the processor


def measure_overhead(bench: Benchmark, engine: Path, threads: int, rounds: int, steps: int = STEPS) -> None:
    """Rows of what POST, events and GET of a picture take beyond `RequestQueue.submit(...).result()`."""
    variant = draw_variants(1)[0]
    fields = {**variant.fields, "num_inference_steps": steps}
    fields.pop("subject")
    with (
        serve_here(DreamMix.load(engine, threads=threads)) as (served, url),
        httpx.Client(base_url=url, timeout=600) as client,
    ):
        image, mask = encode(variant.picture), encode(variant.mask)
        request = served.make_request(fields)

        def submit() -> Any:
            return np.asarray(served.queue.submit(image, mask, request).result().images[0])

        def write() -> Any:
            return served.queue.submit(image, mask, request).result().to_bytes("png")

        def post() -> Any:
            return ask(client, image, mask, fields)

        if not np.array_equal(submit(), post()):
            raise SystemExit("HTTP and the queue painted different pictures")
        add_turns(bench, take_turns({QUEUE: submit, WRITTEN: write, HTTP: post}, rounds), steps)


def ask(client: httpx.Client, image: bytes, mask: bytes, fields: dict[str, Any]) -> Any:
    """A job, its events and its picture, as an array."""
    files = {"image": image, "mask": mask}
    job = client.post("/v1/jobs", files=files, data={"request": json.dumps(fields)}).raise_for_status().json()
    client.get(job["links"]["events"], params={"previews": 0}).raise_for_status()
    return decode(client.get(job["links"]["images"][0]).raise_for_status().content)


def take_turns(works: Mapping[str, Callable[[], object]], rounds: int) -> list[dict[str, Cost]]:
    """What each work cost in each round; every other round runs them in the opposite order."""
    found = []
    for number in range(rounds):
        costs = {}
        for name in list(works)[:: -1 if number % 2 else 1]:
            clock, processor = time.perf_counter(), time.process_time()
            works[name]()
            costs[name] = (time.perf_counter() - clock, time.process_time() - processor)
        found.append(costs)
    return found


def add_turns(bench: Benchmark, turns: list[dict[str, Cost]], steps: int) -> None:
    """Rows of ratios, round by round."""
    bench.add("steps", steps)
    bench.add("rounds", len(turns))
    for which, unit in enumerate(("clock", "processor, both ends")):
        for name in turns[0]:
            bench.add(f"{name}, median [s, {unit}]", float(np.median([turn[name][which] for turn in turns])))
        for name in (QUEUE, WRITTEN):
            bound = "<= 0.03" if name == QUEUE and unit == "clock" else None
            median, low, high = find_interval([turn[HTTP][which] / turn[name][which] - 1 for turn in turns])
            bench.add(f"http over {name}, median of the rounds' ratios less 1, {unit}", median, bound=bound)
            bench.add(f"http over {name}, its 95 % interval, {unit}", f"{low:.4f} to {high:.4f}")


@contextmanager
def serve_here(painter: Any) -> Iterator[tuple[Served, str]]:
    """A service in a thread of this process, which closes the painter at its end: its engine and its address."""
    settings, began = Settings(port=0), threading.Event()
    served = Served("here", [painter], timeout=None)
    server = Server(make_app([served], settings), settings, 5.0, lambda address: began.set())
    thread = threading.Thread(target=server.serve_to_end)
    thread.start()
    try:
        if not began.wait(60):
            raise SystemExit("the service did not start")
        yield served, server.address.rstrip("/")
    finally:
        server.should_exit = True
        thread.join()
