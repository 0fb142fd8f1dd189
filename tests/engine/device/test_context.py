"""Conditions longer than the text: rows appended by a plan, equal on the device and on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.subject import NOBODY
from dreammix_trt.engine import DreamMix, jobs
from dreammix_trt.engine.drivers.simulated import SimulatedNetworks
from dreammix_trt.engine.prompts import plan_prompts
from tests.engine.conftest import make_scene

EXTRA = 5


@pytest.fixture
def appending(host: DreamMix, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Plans get "rows" appended token rows, drawn from the request's seed."""
    width = next(
        tensor["shape"][-1]
        for tensor in host.networks.entries["unet_kv"]["inputs"]
        if tensor["name"] == "encoder_hidden_states"
    )
    chosen = {"rows": EXTRA}

    def lay_rows(_tokens: Any, request: Any) -> Any:
        count = chosen["rows"]
        rng = np.random.default_rng(request.seed)
        return rng.standard_normal((2 if request.guided else 1, count, width)).astype(np.float32) if count else None

    monkeypatch.setattr(jobs, "lay_rows", lay_rows)
    return chosen


def paint(dm: DreamMix, seed: int = 3, **fields: Any) -> np.ndarray:
    image, mask = make_scene()
    fields = {"num_inference_steps": 4, "seed": seed, **fields}
    return np.asarray(dm.inpaint(image, mask, "a red sks mug", **fields).images[0]).astype(int)


@pytest.mark.parametrize("fields", [{}, {"guidance_scale": 1.0}, {"substitute": ("blue",), "lcg_steps": 2}], ids=str)
def test_appended_rows_paint_the_hosts_pictures(
    simulated: Any, host: DreamMix, appending: dict[str, int], fields: dict[str, Any]
) -> None:
    dm, _, _ = simulated(context=77 + EXTRA)
    got, wanted = paint(dm, **fields), paint(host, **fields)
    assert np.abs(got - wanted).max() <= 1
    appending["rows"] = 0
    plain = paint(dm, **fields)
    assert np.abs(plain - wanted).max() > 8, "the appended rows change nothing"
    assert np.abs(plain - paint(host, **fields)).max() <= 1


def test_lengths_keep_graphs_of_their_own(simulated: Any, host: DreamMix, appending: dict[str, int]) -> None:
    dm, _, _ = simulated(context=77 + EXTRA)
    for rows in (EXTRA, 0, EXTRA, 2):
        appending["rows"] = rows
        assert np.abs(paint(dm, seed=rows) - paint(host, seed=rows)).max() <= 1
    assert dm.studio is not None and dm.studio.shapes == 3


def test_a_length_that_memory_is_not_set_aside_for_is_refused(simulated: Any, appending: dict[str, int]) -> None:
    dm, _, _ = simulated(context=77)
    with pytest.raises(InputError, match=r"condition has 82 rows.*loaded for 77.*context=82"):
        paint(dm)


def test_a_length_that_the_engines_lack_is_refused(
    simulated: Any, appending: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimulatedNetworks, "contexts", lambda self: (77, 101))
    dm, _, _ = simulated()
    with pytest.raises(InputError, match=r"condition has 82 rows.*take 77, 101.*--context 77,82,101"):
        paint(dm)
    appending["rows"] = 101 - 77
    paint(dm)


def test_rows_must_be_as_many_as_the_condition_has(host: DreamMix) -> None:
    request = host.request("a mug", guidance_scale=1.0)
    with pytest.raises(InputError, match="2 rows of appended tokens for a condition of 1 rows"):
        plan_prompts(host.tokenizers, request, NOBODY, "sks", np.zeros((2, 1, 8), np.float32))
