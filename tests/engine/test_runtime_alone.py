"""The runtime in an environment that has no torch, diffusers, transformers, peft or onnx, and no compiled kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ALONE = """
import sys

class Lacking:
    names = {"torch", "diffusers", "transformers", "peft", "accelerate", "onnx", "onnxslim", "onnxscript", "polygraphy"}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Lacking())
import numpy as np
from dreammix_trt.building import build
from dreammix_trt.engine import DreamMix

image = np.full((96, 128, 3), 90, np.uint8)
mask = np.zeros((96, 128), np.uint8)
mask[20:70, 30:90] = 255
with DreamMix.load(sys.argv[1], threads=1) as dm:
    result = dm.inpaint(image, mask, "a red sks mug", substitute=["blue"], num_inference_steps=4)
build(sys.argv[2], out=sys.argv[3], name="again")
print(result.images[0].size, sorted(Lacking.names & set(sys.modules)))
"""


@pytest.mark.parametrize("kernels", ["cpp", "numpy"])
def test_it_paints_and_builds_a_subject(kernels: str, mug_engine: Path, mug_lora: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALONE, mug_engine, mug_lora, tmp_path / "again"]
    environment = {**os.environ, "DREAMMIX_KERNELS": kernels} if kernels == "numpy" else dict(os.environ)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(128, 96) []\n"
