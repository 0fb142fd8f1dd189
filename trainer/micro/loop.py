"""One training loop for every stage: steps or wall clock, whichever comes first, always with a full LR cool-down."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreammix_trt.trainer.micro.parallel import Clock, Team

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a stage may spend. progress = max(step / steps, seconds / limit); the LR falls to 2 % over it."""

    steps: int
    limit_seconds: float
    lr: float
    warmup: int = 100
    ema: float = 0.999
    weight_decay: float = 0.01
    checkpoint_seconds: float = 60.0


def save_atomic(value: object, path: Path) -> None:
    temporary = path.with_name(path.name + ".part")
    torch.save(value, temporary)
    os.replace(temporary, path)


def _average_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def train(
    team: Team,
    name: str,
    module: torch.nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    plan: Plan,
    work: Path,
    precision: torch.dtype = torch.float32,
    on_timer: Callable[[dict[str, torch.Tensor]], None] | None = None,
    timer_seconds: float = 360.0,
) -> dict[str, torch.Tensor]:
    """Train `module`'s parameters that require a gradient; returns the averaged (EMA) state.

    loss_of(step) gives this process' loss; with precision bfloat16 it runs under autocast (weights and their updates
    stay float32). Checkpoints to ``work/<name>.ckpt`` and resumes from there. The leader calls on_timer(averaged state)
    every timer_seconds and writes ``work/<name>.json`` with what was run.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=plan.lr, betas=(0.9, 0.99), weight_decay=plan.weight_decay, fused=team.device == "cpu"
    )
    average = _average_weights(module)
    path, start, clock, history = work / f"{name}.ckpt", 0, Clock(), list[dict[str, float]]()
    if path.exists():
        saved: dict[str, Any] = torch.load(path, map_location=team.device, weights_only=True)
        module.load_state_dict(saved["module"])
        optimiser.load_state_dict(saved["optimiser"])
        average, start, history = saved["average"], saved["step"], saved["history"]
        clock = Clock(saved["seconds"])
        log.info("%s: resumed at step %d", name, start)
    team.wait()
    seconds = clock.seconds()
    last_save = last_timer = seconds
    smooth = 0.0
    step = start
    while True:
        progress = max(step / plan.steps, seconds / plan.limit_seconds)
        if progress >= 1:
            break
        rate = plan.lr * min(1.0, (step + 1) / plan.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(team.device).type, precision, enabled=precision != torch.float32):
            loss = loss_of(step)
        loss.backward()  # type: ignore[no-untyped-call]
        value, seconds = team.average(parameters, [float(loss.detach()), clock.seconds()])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        decay = min(plan.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, current in module.state_dict().items():
                if current.dtype.is_floating_point:
                    average[key].lerp_(current, 1 - decay)
        step += 1
        smooth = value if step == start + 1 else 0.98 * smooth + 0.02 * value
        if team.leads and (step % 100 == 0 or step == start + 10):
            history.append({"step": step, "seconds": round(seconds, 1), "loss": round(smooth, 5)})
            log.info("%s: step %d, %.0f s, loss %.5f, progress %.3f", name, step, seconds, smooth, progress)
        if team.leads and seconds - last_save > plan.checkpoint_seconds:
            last_save = seconds
            save_atomic(
                {
                    "module": module.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "average": average,
                    "step": step,
                    "seconds": seconds,
                    "history": history,
                },
                path,
            )
        if team.leads and on_timer is not None and seconds - last_timer > timer_seconds:
            last_timer = seconds
            on_timer(average)
    if team.leads:
        record = {
            "steps": step,
            "seconds": round(seconds, 1),
            "loss": round(smooth, 5),
            "lr": plan.lr,
            "history": history,
        }
        (work / f"{name}.json").write_text(json.dumps(record))
    return average
