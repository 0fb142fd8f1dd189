"""Subjects of tokens on random weights: enrolled from pictures, painted on the host, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from dreammix_trt.building import build
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.token_adapter import TokenAdapter
from dreammix_trt.engine import DreamMix
from tests.engine.conftest import make_scene
from tests.support.tokens import write_small_adapter

FEW: dict[str, Any] = {"num_inference_steps": 3, "seed": 2}


@pytest.fixture(scope="module")
def adapter(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenAdapter:
    return write_small_adapter(tmp_path_factory.mktemp("adapter") / "small.safetensors", BaseFiles.open(small_base))


@pytest.fixture(scope="module")
def engine(test_home: Path, small_base: Path, adapter: TokenAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokens") / "engine"
    build(out=out, base=small_base, tokens=adapter.file)
    return out


def test_enrol(engine: Path) -> None:
    image, mask = make_scene()
    with DreamMix.load(engine, threads=1) as dm:
        subject = dm.enroll(image, mask, class_name="mug")
        print(subject, subject.tokens.rows.shape, subject.kind)
        plain = dm.inpaint(image, mask, "a mug", subject="", **FEW)
        with_ = dm.inpaint(image, mask, "a mug", **FEW)
        zero = dm.inpaint(image, mask, "a mug", token_weight=0, **FEW)
        print(with_.warnings, with_.origin)
        assert (np.asarray(plain.images[0]) == np.asarray(zero.images[0])).all()
        assert (np.asarray(plain.images[0]) != np.asarray(with_.images[0])).any()
