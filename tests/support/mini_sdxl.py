"""Reduced-width SDXL checkpoints in the formats people hold, and a build of one that exports nothing.

`MINI` has SDXL's three levels; `SMALL` has two, for tests that only need every kind of layer once. Native side 64 in a
folder; a single file does not say it and counts as SDXL's 1024.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import _sdxl_files as files

Config = dict[str, Any]


def mini_configs() -> dict[str, Config]:
    """Widths 32/64/128, one layer a block, one transformer layer, two text layers; 21 MB in float16."""
    configs = files.sdxl_configs(0.1, depth=1, side=64)
    return {**configs, "unet": {**configs["unet"], "layers_per_block": 1}}


def small_configs() -> dict[str, Config]:
    """Two levels, 32 and 64 wide, attention in the second; a VAE of one layer a block."""
    configs = copy.deepcopy(mini_configs())
    configs["unet"] |= {
        "block_out_channels": [32, 64],
        "attention_head_dim": [1, 1],
        "transformer_layers_per_block": [1, 1],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    }
    configs["vae"] |= {"layers_per_block": 1, "block_out_channels": [32, 32, 32, 64]}
    return configs


class Checkpoint(NamedTuple):
    """What a user holds: the base, a folder with tokenizers, patch and head."""

    configs: dict[str, Config]
    base: Path
    tokenizer: Path
    patch: Path
    head: Path

    def given(self, **changes: Any) -> dict[str, Any]:
        """As arguments of `build`."""
        return {"base": self.base, "tokenizer": self.tokenizer, "patch": self.patch, "head": self.head, **changes}


def write_single(folder: Path, configs: dict[str, Config]) -> Checkpoint:
    """A single-file checkpoint with tokenizers, a v26-shaped patch and its head."""
    base = files.write_single_file(folder / "base.safetensors", configs)
    files.write_tokenizers(folder / "tokenizers", configs)
    patch = files.write_patch(folder / "v26.fooocus.patch", configs)
    head = files.write_head(folder / "head.pth", configs)
    return Checkpoint(configs, base, folder / "tokenizers", patch, head)


def trace_once(monkeypatch: Any, traces: dict[str, Path], scratch: Path) -> None:
    """Let builds trace a kind of graph once and copy it afterwards: tracing takes seconds, and has tests of its own.

    traces: what is traced already, by the graph's name, precision, form and slots; shared by many tests.
    """
    import json
    import shutil

    from dreammix_trt.building import parts

    def copied(network: Any, folder: Path) -> None:
        told = network.describe()
        key = json.dumps([network.graph, told, {k: v.get("padding") for k, v in network.configs.items()}], default=str)
        if key not in traces:
            traces[key] = scratch / f"{len(traces)}"
            traces[key].mkdir(parents=True)
            parts_write_graph(network, traces[key])
        shutil.copytree(traces[key], folder, dirs_exist_ok=True)

    parts_write_graph = parts.write_graph
    monkeypatch.setattr(parts, "write_graph", copied)
