"""How many replicas a rate of requests needs: measured service times and a simulated line.

Service times come from benchmarks/results/soak.json (quantiles of what the soak measured), or from --seconds: a file
with one time a line, such as `ran` of your own jobs. The line is M/G/k (`_queue_model`): Poisson arrivals, one line in
front of k replicas that paint one request at a time. That is a service with k workers; behind a proxy that gives each
request to the least busy of k services it is close to it, and behind one that does not look it is too hopeful.

    python benchmarks/capacity.py --rate 0.5 --rate 2 --wait 5

`--check` runs a real `RequestQueue` on the embedded model and compares the waits with those that are predicted for the
same arrivals: with the very service times of the run, and with times drawn from them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from _common import RESULTS, Benchmark
from _queue_model import Capacity, Floats, draw_arrivals, draw_service, is_enough, plan, simulate
from _soak_orders import draw_variants
from _soak_report import SERVICE
from soak import build_engine, say

from dreammix_trt.engine import DreamMix, RequestQueue

REPLAYS = 200


def main() -> int:
    given = parse()
    if given.check:
        bench = Benchmark("capacity", threads=given.workers)
        check(bench, given)
        return bench.finish(as_json=given.json, keep=given.arrivals >= 60)
    try:
        measured = read_seconds(given.seconds) if given.seconds else read_soak(given.soak)
    except (OSError, ValueError, KeyError) as error:
        say(f"no service times ({error}): run benchmarks/soak.py, or give --seconds FILE")
        return 2
    tables = {rate: plan(rate, measured, given.wait, given.queue) for rate in given.rate}
    if given.json:
        rows = [spell_row(rate, row, given.wait) for rate, table in tables.items() for row in table]
        sys.stdout.write(json.dumps({"service mean [s]": float(np.mean(measured)), "rows": rows}) + "\n")
        return 0
    sys.stdout.write(write_tables(tables, measured, given.wait))
    return 0


def read_soak(path: Path) -> Floats:
    """The quantiles of the service times of a soak's results."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    found = [row["value"] for row in rows if row["metric"] == SERVICE]
    if not found:
        raise ValueError(f"{path} has no row {SERVICE!r}")
    return check_seconds(found[0].split(), path)


def read_seconds(path: Path) -> Floats:
    """The times of a file with one in each line."""
    return check_seconds(path.read_text(encoding="utf-8").split(), path)


def check_seconds(words: Sequence[str], path: Path) -> Floats:
    """Words as seconds. Raises ValueError for others than positive numbers."""
    seconds = np.array([float(word) for word in words], np.float64)
    if len(seconds) < 2 or not np.isfinite(seconds).all() or (seconds <= 0).any():
        raise ValueError(f"{path} must have two positive numbers of seconds or more")
    return seconds


def spell_row(rate: float, row: Capacity, longest: float) -> dict[str, float | bool | None]:
    """A row as JSON values."""
    waits = {share: row.waits.find(share) for share in (50, 99)}  # without end where the line grows for ever
    facts = {f"wait p{share} [s]": round(wait, 4) if np.isfinite(wait) else None for share, wait in waits.items()}
    return {
        "rate": rate, "replicas": row.servers, "busy": round(row.busy, 4), **facts,
        "refused": round(row.waits.refused, 5), "enough": is_enough(row, longest),
    }  # fmt: skip


def write_tables(tables: dict[float, list[Capacity]], measured: Floats, longest: float) -> str:
    """The plan of each rate."""
    lines = [f"service: mean {np.mean(measured):.3g} s, p99 {np.percentile(measured, 99):.3g} s"]
    for rate, rows in tables.items():
        lines += ["", f"{rate:g} requests a second, p99 of the wait {longest:g} s at most",
                  "replicas   busy  wait p50 [s]  wait p99 [s]  refused"]  # fmt: skip
        for row in rows:
            waits = row.waits
            mark = "  enough" if is_enough(row, longest) else ""
            lines.append(
                f"{row.servers:8d}  {row.busy:5.2f}  {waits.find(50):12.3g}  {waits.find(99):12.3g}  "
                f"{waits.refused:7.2%}{mark}"
            )
    return "\n".join(lines) + "\n"


def check(bench: Benchmark, given: argparse.Namespace) -> None:
    """Rows of the real line against the simulated one."""
    with tempfile.TemporaryDirectory() as folder:
        engine = given.engine or build_engine(Path(folder))
        painters = [DreamMix.load(engine, threads=1) for _ in range(given.workers)]
        with RequestQueue(painters, waiting=10_000, owned=True) as queue:
            arrivals, waited, ran = measure_line(queue, given.busy, given.workers, given.arrivals)
    bench.add("workers", given.workers)
    bench.add("arrivals", len(arrivals))
    bench.add("busy, as it came out", float(ran.sum() / (arrivals[-1] + waited[-1] + ran[-1]) / given.workers))
    bench.add("service, mean [s]", float(ran.mean()))
    compare(bench, arrivals, waited, ran, given.workers)


def measure_line(queue: RequestQueue, busy: float, workers: int, count: int) -> tuple[Floats, Floats, Floats]:
    """Arrivals, waits and service times, in seconds, of requests that come at random, so that workers are that busy."""
    variants = draw_variants(12)
    fields = [{name: value for name, value in each.fields.items() if name != "subject"} for each in variants]

    def submit(k: int):  # type: ignore[no-untyped-def]
        each = variants[k % len(variants)]
        return queue.submit(each.picture, each.mask, **fields[k % len(variants)])

    for _ in range(2):  # the first round opens what is used; the second measures
        warm = [submit(k) for k in range(len(variants))]
        for ticket in warm:
            ticket.result()
    rate = busy * workers / float(np.mean([ticket.ran for ticket in warm]))
    planned, begun, arrivals, tickets = draw_arrivals(rate, count, np.random.default_rng(5)), time.monotonic(), [], []
    for k, at in enumerate(planned):
        time.sleep(max(0.0, at - (time.monotonic() - begun)))
        arrivals.append(time.monotonic() - begun)
        tickets.append(submit(k))
    for ticket in tickets:
        ticket.result()
    waited, ran = (np.array([getattr(ticket, name) for ticket in tickets]) for name in ("waited", "ran"))
    return np.array(arrivals), waited, ran


def compare(bench: Benchmark, arrivals: Floats, waited: Floats, ran: Floats, workers: int) -> None:
    """Rows of measured waits over predicted ones."""
    rng = np.random.default_rng(6)
    drawn = [simulate(arrivals, draw_service(ran, len(ran), rng), workers).seconds for _ in range(REPLAYS)]
    exact = simulate(arrivals, ran, workers).seconds
    for name, find in (("mean", np.mean), ("p99", lambda seconds: np.percentile(seconds, 99))):
        measured = float(find(waited))
        bench.add(f"wait, {name}, measured [s]", measured)
        for how, value in (
            ("its service times", float(find(exact))),
            ("drawn ones", float(np.mean([find(each) for each in drawn]))),
        ):
            bench.add(f"wait, {name}, predicted with {how} [s]", value)
            bench.add(f"off by, {name}, {how}", abs(measured / value - 1), bound="<= 0.15")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, action="append", help="requests a second; may be given repeatedly")
    parser.add_argument("--wait", type=float, default=5.0, help="the longest wait in p99, in seconds")
    parser.add_argument("--queue", type=int, help="room in the line, all replicas together; default: any number")
    parser.add_argument("--soak", type=Path, default=RESULTS / "soak.json", help="results with service times")
    parser.add_argument("--seconds", type=Path, help="a file of service times, in place of those")
    parser.add_argument("--check", action="store_true", help="compare with a real line")
    parser.add_argument("--engine", type=Path, help="check: of the embedded base; default: one is built")
    parser.add_argument("--workers", type=int, default=1, help="check: painters, one thread each")
    parser.add_argument("--busy", type=float, default=0.7, help="check: how busy they are meant to be")
    parser.add_argument("--arrivals", type=int, default=120, help="check: requests")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    given.rate = given.rate or ([] if given.check else [1.0])
    for name in ("rate", "wait", "workers", "arrivals", "queue"):
        values = getattr(given, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not value > 0:
                parser.error(f"--{name} is {value}; it must be positive")
    if not 0 < given.busy < 1:
        parser.error(f"--busy is {given.busy}; it must be between 0 and 1")
    return given


if __name__ == "__main__":
    sys.exit(main())
