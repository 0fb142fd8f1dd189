"""Random weights for the metrics' networks: what others' code made of the same is recorded in the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def fill_weights(make: Callable[[], Any], seed: int) -> Any:
    """A state dict for the module that `make` makes: random, and the same on every machine."""
    import torch

    with torch.device("meta"):
        module = make()
    rng = np.random.default_rng(seed)
    state = {}
    for name, old in sorted(module.state_dict().items()):
        shape = tuple(old.shape)
        if name.endswith("num_batches_tracked"):
            values = np.zeros(shape, np.int64)
        elif name.endswith(("running_var", "bn.weight")):
            values = rng.random(shape, np.float32) + np.float32(0.5)
        elif len(shape) < 2:
            values = (rng.random(shape, np.float32) - np.float32(0.5)) * np.float32(0.2)
        else:
            values = (rng.random(shape, np.float32) - np.float32(0.5)) * np.float32((24 / np.prod(shape[1:])) ** 0.5)
        state[name] = torch.from_numpy(values)
    return state


def draw_pictures() -> tuple[Any, Any]:
    """Two pictures of (64, 80), uint8, the second one the first with noise."""
    rng = np.random.default_rng(11)
    coarse = rng.integers(0, 256, (8, 10, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return coarse, np.clip(coarse + rng.normal(0, 20, coarse.shape), 0, 255).astype(np.uint8)


def write_lpips(folder: Path) -> tuple[Path, Path]:
    """AlexNet's and LPIPS' weights as files, as torchvision and lpips name them."""
    import torch

    from dreammix_trt.evaluation.metrics.lpips import make_alexnet

    rng = np.random.default_rng(5)
    state = fill_weights(make_alexnet, 4)
    state["classifier.1.bias"] = torch.zeros(3)  # the file has what is not used, too
    heads = {
        f"lin{k}.model.1.weight": torch.from_numpy(rng.random((1, width, 1, 1), np.float32))
        for k, width in enumerate((64, 192, 384, 256, 256))
    }
    torch.save(state, folder / "alexnet.pth")
    torch.save(heads, folder / "heads.pth")
    return folder / "alexnet.pth", folder / "heads.pth"
