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


def take_step(
    loss: torch.Tensor, optimiser: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler
) -> None:
    """One step of a small training in one process, which needs neither a team nor a checkpoint."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    schedule.step()


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

    loss_of: called with the step, gives this process' loss.
    work: where ``<name>.ckpt`` is kept, from which a later call goes on, and ``<name>.json`` with what was run.
    precision: with bfloat16 `loss_of` runs under autocast (weights and their updates stay float32).
    on_timer: called by the leader with the averaged state every timer_seconds.
    """
    run = _Run(team, name, module, plan, work)
    run.resume()
    team.wait()
    run.seconds = run.clock.seconds()
    last_save = last_timer = run.seconds
    while (progress := run.progress()) < 1:
        run.descend(loss_of, precision, progress)
        if not team.leads:
            continue
        run.note(progress)
        if run.seconds - last_save > plan.checkpoint_seconds:
            last_save = run.seconds
            run.save()
        if on_timer is not None and run.seconds - last_timer > timer_seconds:
            last_timer = run.seconds
            on_timer(run.average)
    if team.leads:
        run.write_record()
    return run.average


class _Run:
    """One training as it stands.

    step: the next one. average: the state averaged over the steps. seconds: as the team's processes agree.
    """

    def __init__(self, team: Team, name: str, module: torch.nn.Module, plan: Plan, work: Path) -> None:
        self.step, self.seconds, self.clock = 0, 0.0, Clock()
        self.average = {key: value.detach().clone() for key, value in module.state_dict().items()}
        self._team, self._name, self._module, self._plan, self._work = team, name, module, plan, work
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(
            self._parameters,
            lr=plan.lr,
            betas=(0.9, 0.99),
            weight_decay=plan.weight_decay,
            fused=team.device == "cpu",
        )
        self._start, self._smooth = 0, 0.0
        self._history: list[dict[str, float]] = []

    def progress(self) -> float:
        """From 0 to 1, when it is over."""
        return max(self.step / self._plan.steps, self.seconds / self._plan.limit_seconds)

    def descend(self, loss_of: Callable[[int], torch.Tensor], precision: torch.dtype, progress: float) -> None:
        """One step of the optimiser, with the gradients of all processes."""
        plan = self._plan
        rate = plan.lr * min(1.0, (self.step + 1) / plan.warmup)
        for group in self._optimiser.param_groups:
            group["lr"] = rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        self._optimiser.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(self._team.device).type, precision, enabled=precision != torch.float32):
            loss = loss_of(self.step)
        loss.backward()  # type: ignore[no-untyped-call]
        value, self.seconds = self._team.average(self._parameters, [float(loss.detach()), self.clock.seconds()])
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimiser.step()
        decay = min(plan.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for key, current in self._module.state_dict().items():
                if current.dtype.is_floating_point:
                    self.average[key].lerp_(current, 1 - decay)
        self.step += 1
        self._smooth = value if self.step == self._start + 1 else 0.98 * self._smooth + 0.02 * value

    def note(self, progress: float) -> None:
        """Tell now and then how it goes, and remember it."""
        if self.step % 100 and self.step != self._start + 10:
            return
        self._history.append({"step": self.step, "seconds": round(self.seconds, 1), "loss": round(self._smooth, 5)})
        log.info(
            "%s: step %d, %.0f s, loss %.5f, progress %.3f", self._name, self.step, self.seconds, self._smooth, progress
        )

    def save(self) -> None:
        """Write the checkpoint."""
        held = {
            "module": self._module.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
            "history": self._history,
        }
        save_atomic(held, self._checkpoint)

    def resume(self) -> None:
        """Go on from the checkpoint, where there is one."""
        if not self._checkpoint.exists():
            return
        saved: dict[str, Any] = torch.load(self._checkpoint, map_location=self._team.device, weights_only=True)
        self._module.load_state_dict(saved["module"])
        self._optimiser.load_state_dict(saved["optimiser"])
        self.average, self._history = saved["average"], saved["history"]
        self.step = self._start = saved["step"]
        self.clock = Clock(saved["seconds"])
        log.info("%s: resumed at step %d", self._name, self.step)

    def write_record(self) -> None:
        """Write what was run."""
        record = {
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "loss": round(self._smooth, 5),
            "lr": self._plan.lr,
            "history": self._history,
        }
        (self._work / f"{self._name}.json").write_text(json.dumps(record))

    @property
    def _checkpoint(self) -> Path:
        return self._work / f"{self._name}.ckpt"
