"""Several processes, as accelerate starts them: two on the CPU learn what one does with twice the batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

for _name in ("torch", "diffusers", "transformers", "peft", "accelerate"):
    pytest.importorskip(_name, reason="the trainer needs its extra")

from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.errors import InputError  # noqa: E402
from dreammix_trt.core.lora import read_lora  # noqa: E402
from dreammix_trt.trainer.hardware import Hardware  # noqa: E402
from dreammix_trt.trainer.processes import Processes, join_processes  # noqa: E402
from dreammix_trt.trainer.recipes import SMALL  # noqa: E402
from tests.support.training import train  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_processes_share_each_step(base: BaseFiles, photos: Path, tmp_path: Path) -> None:
    # the launcher of several GPUs; accelerate's own for CPUs needs MPI
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0 --mixed_precision no"
    options = "--steps 2 --batch 2 --beta 0 --learning-rate 0.01 --threads 1 --checkpoint-every 1 --json"
    command = [
        sys.executable,
        *launch.split(),
        "--num_machines",
        "1",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        "1",
    ]
    command += ["-m", "dreammix_trt", "train", str(photos), "--class-name", "mug", "-o", str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, "--base", str(base.folder), *options.split()],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2, "one of them speaks"
    recipe = replace(SMALL, batch=2, accumulate=2, beta=0.0)
    one = train(photos, tmp_path / "one", base, recipe=recipe, steps=2)
    card = json.loads((tmp_path / "two" / "subject.json").read_text())
    assert card["settings"]["processes"] == 2
    assert card["losses"]["last"] == pytest.approx(one.loss, rel=1e-5)
    loras = [read_lora(tmp_path / name).factors["unet"] for name in ("one", "two")]
    for module, pair in loras[0].items():
        for expected, found in zip(pair, loras[1][module], strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-4)


def test_a_gpu_by_number_is_none_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with join_processes(Hardware()) as (processes, hardware):
        assert processes == Processes() and processes.leads and hardware == Hardware()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(InputError, match=r"cuda:1.*several processes.*--device cuda"),
        join_processes(Hardware("cuda:1")),
    ):
        pass
