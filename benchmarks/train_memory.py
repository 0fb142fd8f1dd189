"""Does the trainer's memory plan hold? Steps on a reduced-width SDXL on the CPU, their measured peak against the plan.

Each case runs in a process of its own: the peak of its resident memory less what it held before the model was made.
Freed memory goes back to the system at once there, so that the peak is that of the tensors. Last come the plans of SDXL
itself for GPUs, which nothing here measures.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from _common import Benchmark
from _sdxl_files import sdxl_configs

from dreammix_trt.core.errors import InputError
from dreammix_trt.trainer.memory_plan import GIB, TrainingPlan, plan_training

MIB = 1 << 20
CASES = {
    "float32": ("float32", False),
    "float32, checkpointing": ("float32", True),
    "bfloat16": ("bfloat16", False),
    "bfloat16, checkpointing": ("bfloat16", True),
}
RANK, STEPS = 4, 2
#: GPU -> memory that a program gets of it, GiB: what NVIDIA's driver shows as total less half a GiB for a desktop
CARDS = {24: 23.0, 16: 15.3, 12: 11.3, 8: 7.3}
#: settings of plans for SDXL at 1024 x 1024; the paper's and the reference's batch is 1, four of which make a step
PLANS: dict[str, dict[str, Any]] = {
    "24 GB: bfloat16": {},
    "24 GB: bfloat16, a step of one picture": {"accumulate": 1},
    "24 GB: bfloat16, batch 2 x 2": {"batch": 2, "accumulate": 2},
    "24 GB: float32, as the reference": {"precision": "float32"},
    "16 GB: bfloat16": {},
    "12 GB: bfloat16, checkpointing": {"checkpointing": True},
    "12 GB: bfloat16, checkpointing, adamw8bit": {"checkpointing": True, "optimizer": "adamw8bit"},
    "12 GB: bfloat16, checkpointing, batch 4": {"checkpointing": True, "batch": 4, "accumulate": 1},
    "8 GB: bfloat16, checkpointing": {"checkpointing": True},
}
USUAL: dict[str, Any] = {
    "precision": "bfloat16", "batch": 1, "accumulate": 4, "rank": RANK, "checkpointing": False, "optimizer": "adamw",
    "side": 1024,
}  # fmt: skip
GOAL = "24 GB: bfloat16"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=float, default=0.2, help="of the UNet; 1: SDXL itself")
    parser.add_argument("--side", type=int, default=512, help="of the picture in pixels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.child:
        sys.stdout.write(json.dumps(measure(given.width, given.side, given.threads, *CASES[given.child])))
        return 0
    bench = Benchmark("train_memory", given.threads)
    for name in given.case or CASES:
        compare(bench, name, given)
    add_plans(bench)
    return bench.finish(as_json=given.json)


def compare(bench: Benchmark, name: str, given: argparse.Namespace) -> None:
    """The rows of one case: plan, measurement, their ratio."""
    precision, checkpointing = CASES[name]
    changed = {"precision": precision, "checkpointing": checkpointing, "accumulate": 1, "side": given.side}
    plan = plan_training(base_of(given.width), **(USUAL | changed), device="cpu")
    measured = run_child(name, given)
    planned = plan.training_bytes
    bench.add(f"{name}: planned [MiB]", planned / MIB)
    bench.add(f"{name}: of that assumed, not counted [MiB]", plan.workspace / MIB)
    bench.add(f"{name}: of that kept for the backward pass [MiB]", plan.activations / MIB)
    bench.add(f"{name}: measured [MiB]", measured["peak"] / MIB)
    bench.add(f"{name}: |measured / planned - 1|", abs(measured["peak"] / planned - 1), bound="<= 0.15")
    bench.add(f"{name}: measured / counted", measured["peak"] / (planned - plan.workspace))
    bench.add(f"{name}: a step [s]", measured["seconds"])


def base_of(width: float) -> Any:
    """What the plan asks of a base: its configs and the divisor of its sides."""
    return SimpleNamespace(configs=sdxl_configs(width), divisor=32)


def run_child(name: str, given: argparse.Namespace) -> dict[str, float]:
    """Measure a case in a process whose freed memory goes back at once."""
    words = ["--child", name, "--width", given.width, "--side", given.side, "--threads", given.threads]
    command = [sys.executable, str(Path(__file__).resolve()), *map(str, words)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(width: float, side: int, threads: int, precision: str, checkpointing: bool) -> dict[str, float]:
    """Take steps as training does; {"peak": bytes above those before the model was made, "seconds": of a step}."""
    import time

    import torch
    from diffusers import UNet2DConditionModel

    from dreammix_trt.trainer.meta_step import add_lora, compute_loss, make_inputs

    torch.set_num_threads(threads)
    dtype = getattr(torch, precision)

    def take_steps(config: dict[str, Any], pixels: int, count: int) -> tuple[int, float]:
        before = resident("VmRSS")
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
            add_lora(unet, dtype, RANK, checkpointing=checkpointing, fused=True)
        unet.to_empty(device="cpu")
        for value in unet.parameters():
            torch.nn.init.normal_(value, std=0.02)
        trained = [value for value in unet.parameters() if value.requires_grad]
        for value in trained:
            value.grad = torch.zeros_like(value)
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        inputs, added = make_inputs(config, 1, pixels, torch.float32, "cpu")
        started = time.perf_counter()
        for step in range(count):
            if step == count - 1:
                gc.collect()
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
                started = time.perf_counter()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = compute_loss(unet, inputs, added)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        return resident("VmHWM") - before, time.perf_counter() - started

    take_steps(sdxl_configs(0.1, depth=1)["unet"], 64, 1)  # what libraries allocate once
    gc.collect()
    peak, seconds = take_steps(sdxl_configs(width)["unet"], side, STEPS)
    return {"peak": peak, "seconds": seconds}


def resident(what: str) -> int:
    """Bytes of this process by /proc: VmRSS now, VmHWM at the peak."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) << 10


def add_plans(bench: Benchmark) -> None:
    """SDXL itself at 1024 x 1024 on the cards that people own: calculated."""
    base = base_of(1.0)
    for name, changed in PLANS.items():
        plan = plan_training(base, **(USUAL | changed))
        card = int(name.partition(" ")[0])
        bench.add(f"calculated, {name} [GiB]", plan.total_bytes / GIB, bound=f"<= {CARDS[card]}")
        bench.add(f"calculated, {name}: fits, by its own check", fits(plan, CARDS[card]), bound="== 1")
        bench.add(f"calculated, {name}: a step [TFLOP]", plan.flops / 1e12)
        goal = "<= 20" if name == GOAL else None
        bench.add(f"calculated, {name}: 1,000 steps on an RTX 4090 [min]", plan.minutes(1000), bound=goal)


def fits(plan: TrainingPlan, gib: float) -> bool:
    """Whether the plan's own check lets it pass on a GPU with so much memory in all."""
    try:
        plan.check(int(gib * GIB) - plan.context)
    except InputError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
