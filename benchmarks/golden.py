"""Does the runtime reproduce recorded runs of the authors' code? Every array of a folder in the golden format.

    python benchmarks/golden.py FOLDER [--backend torch] [--cases case1 ...] [--json]

Three kinds of rows: what must be equal; arithmetic and networks fed with recorded inputs; the whole run with the
recorded draws. An array that nobody checks fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks._common import Benchmark  # noqa: E402
from benchmarks._golden_case import BACKENDS, Case, find_cases, networks_for, replay  # noqa: E402
from benchmarks._golden_checks import check_case  # noqa: E402
from benchmarks.golden_units import Check, check_units  # noqa: E402
from dreammix_trt.core.seam import Networks  # noqa: E402
from dreammix_trt.engine import kernels  # noqa: E402
from dreammix_trt.engine.backends.onnxruntime.engine_set import EngineSet  # noqa: E402


def main(words: Sequence[str] | None = None) -> int:
    """Print the table; 1 where an array misses its bound. words: of the command line, where it is not the process's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    parser.add_argument("--threads", type=int, default=0, help="threads to use (0: as many as the machine has)")
    parser.add_argument("folder", type=Path, help="a folder in the golden format (units.npz and/or case folders)")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0])
    parser.add_argument("--cases", nargs="*", default=[], help="folders of cases (default: all, and units.npz)")
    parser.add_argument("--no-run", action="store_true", help="only what follows from recorded inputs")
    chosen = parser.parse_args(words)
    kernels.set_threads(chosen.threads)
    bench = Benchmark("golden", threads=chosen.threads or None)
    if not chosen.cases and (chosen.folder / "units.npz").is_file():
        _add(bench, "units", check_units(chosen.folder / "units.npz"))
    for case, networks in _load_cases(find_cases(chosen.folder, chosen.cases), chosen.backend, chosen.threads or None):
        start = time.perf_counter()
        _add(bench, case.name, [*_encodings(case), *check_whole_case(case, networks, whole=not chosen.no_run)])
        if isinstance(networks, EngineSet):
            networks.close()  # its arenas have grown to this case's sizes; sessions come back when needed
        bench.add(f"{case.name}: seconds ({chosen.backend})", time.perf_counter() - start)
    return bench.finish(chosen.json)


def check_whole_case(case: Case, networks: Networks, *, whole: bool = True) -> list[Check]:
    """Every array of a case; whole False: without the run end to end."""
    return check_case(case, networks, replay(case, networks) if whole else None)


def _load_cases(cases: list[Case], backend: str, threads: int | None) -> list[tuple[Case, Networks]]:
    """Each case with its networks, shared by the cases of one model."""
    made: dict[str, Networks] = {}
    for case in cases:
        base = str(case.base)
        made[base] = made.get(base) or networks_for(case, backend, threads)
    return [(case, made[str(case.base)]) for case in cases]


def _encodings(case: Case) -> list[Check]:
    """The interchangeable files of a LoRA give the same factors (up to a rounding of the scale)."""
    rows = []
    for n, lora in enumerate(case.config["loras"]):
        first, *others = (case.loras(k)[n][0].factors.get("unet", {}) for k in range(len(lora["files"])))
        assert all(other.keys() == first.keys() for other in others)
        pairs = [(first[module], other[module]) for other in others for module in first]
        error = max((float(abs(a @ b - c @ d).max()) for (a, b), (c, d) in pairs), default=0.0)
        rows.append(Check(f"lora {n}: encodings agree", error, 1e-6, error <= 1e-6))
    return rows


def _add(bench: Benchmark, name: str, rows: list[Check]) -> None:
    for row in rows:
        bench.rows.append(
            {
                "metric": f"{name}: {row.array}",
                "value": float(f"{row.error:.3g}"),
                "bound": f"<= {row.bound:g}",
                "pass": row.passed,
            }
        )


if __name__ == "__main__":
    sys.exit(main())
