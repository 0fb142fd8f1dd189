"""Training of the judge on rendered scenes (see judge.py for how it runs)."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional

from dreammix_trt.trainer.micro import world
from dreammix_trt.trainer.micro.judge import FACTS_FILE, SIDE, WEIGHTS_FILE, Judge, crop_around

log = logging.getLogger(__name__)
_CHANNELS = (3, 16, 32, 48, 64)
_GROUPS = (len(world.SHAPES), len(world.COLOURS), len(world.PATTERNS))


class Classifier(torch.nn.Module):  # type: ignore[misc]
    """Four 3x3 convolutions with pooling, one hidden layer, three heads in one: 0.15 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        for layer in range(4):
            self.add_module(f"conv{layer}", torch.nn.Conv2d(_CHANNELS[layer], _CHANNELS[layer + 1], 3, padding=1))
        self.hidden = torch.nn.Linear(_CHANNELS[-1] * (SIDE // 16) ** 2, 96)
        self.out = torch.nn.Linear(96, sum(_GROUPS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in range(4):
            x = functional.max_pool2d(functional.relu(self.get_submodule(f"conv{layer}")(x)), 2)
        logits: torch.Tensor = self.out(functional.relu(self.hidden(x.flatten(1))))
        return logits


def _draw_crop(rng: np.random.Generator, image: world.Picture, box: world.Box) -> world.Picture:
    """A crop as an evaluation would take it: looser or tighter, off centre, sometimes soft."""
    x0, y0, x1, y1 = box
    side = max(x1 - x0, y1 - y0)
    dx, dy = (round(side * rng.uniform(-0.07, 0.07)) for _ in range(2))
    crop = crop_around(image, (x0 + dx, y0 + dy, x1 + dx, y1 + dy), rng.uniform(0.0, 0.35))
    if rng.random() < 0.4:
        soft = int(rng.uniform(20, 48))
        crop = world.resize(crop, soft, soft)
    return world.resize(np.ascontiguousarray(crop), SIDE, SIDE)


def train_classifier(work: Path, steps: int, seed: int) -> None:
    """Read ``images_square.npy`` and ``facts_square.npy``; write the weights (fp16) and their held-out accuracy."""
    images, facts = np.load(work / "images_square.npy", "r"), np.load(work / "facts_square.npy")
    rows = np.nonzero(facts[:, 8] == 0)[0]
    torch.manual_seed(seed)
    model = Classifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=max(steps, 4), pct_start=0.1)
    rng = np.random.default_rng([seed, 21])
    for step in range(steps):
        chosen = rng.choice(rows, 64)
        crops = np.stack([_draw_crop(rng, images[r], tuple(int(x) for x in facts[r, 3:7])) for r in chosen])  # type: ignore[arg-type]
        x = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = x + torch.randn_like(x) * 0.05 * torch.rand(len(x), 1, 1, 1)
        truth = torch.from_numpy(facts[chosen, :3].astype(np.int64))
        parts = model(x).split(_GROUPS, 1)
        loss = torch.stack([functional.cross_entropy(part, truth[:, n]) for n, part in enumerate(parts)]).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            log.info("classifier: step %d, loss %.4f", step + 1, float(loss))
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, work / WEIGHTS_FILE)
    (work / FACTS_FILE).write_text("{}")
    judge = Judge.load(work)
    accuracy = {"large": measure(judge, (60.0, 100.0)), "small": measure(judge, (20.0, 32.0))}
    record = {"input": [SIDE, SIDE, 3], "shapes": world.SHAPES, "colours": world.COLOURS, "patterns": world.PATTERNS}
    (work / FACTS_FILE).write_text(
        json.dumps(record | {"steps": steps, "held_out_accuracy": accuracy}, indent=1) + "\n"
    )
    log.info("classifier: %s", accuracy)


def measure(judge: Judge, object_size: tuple[float, float], count: int = 256) -> dict[str, float]:
    """Accuracy on renders nobody trained on; object_size in pixels of a 128 view."""
    scenes = [scene for scene, _ in world.held_out_scenes(count, seed=5, object_size=object_size)]
    named = judge.attributes_of([np.ascontiguousarray(crop_around(s.image, s.box)) for s in scenes])
    truth = [(s.attributes.shape, s.attributes.colour, s.attributes.pattern) for s in scenes]
    hits = np.array([[a == b for a, b in zip(x, y, strict=True)] for x, y in zip(named, truth, strict=True)])
    return {
        "shape": float(hits[:, 0].mean()),
        "colour": float(hits[:, 1].mean()),
        "pattern": float(hits[:, 2].mean()),
        "all": float(hits.all(1).mean()),
        "scenes": count,
    }
