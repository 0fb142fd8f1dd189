"""Weights, chunks and the feather: the device paints the host's pictures, and says the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.errors import InputError
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.dreammix import Job
from tests.engine.conftest import make_scene

LONG = "a red sks mug on a wooden table, " * 12
WEIGHED = "a (red:1.6) sks mug, [wooden] table++"


def paint(dm: DreamMix, prompt: str, **fields: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    result = dm.inpaint(*make_scene(), prompt, **{"num_inference_steps": 2, "seed": 3, **fields})
    return np.asarray(result.images[0]).astype(int), result.warnings


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        (WEIGHED, {}),
        (WEIGHED, {"substitute": ("blue",), "negative_prompt": "(blurry:1.4)"}),
        (WEIGHED, {"guidance_scale": 1.0}),
        (LONG, {}),
        (LONG, {"substitute": ("blue",), "lcg_steps": 1}),
        (f"{LONG} {WEIGHED} BREAK (x:0.5)", {"negative_prompt": "blurry BREAK (bad:2)", "substitute": ("blue",)}),
        (LONG, {"truncate_prompt": True}),
        ("a red skz mug <lora:x:1>", {}),
        ("a red sks mug", {"feather": 0}),
        ("a red sks mug", {"feather": 25}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_pictures_and_warnings_are_the_hosts(
    simulated: Any, host: DreamMix, prompt: str, fields: dict[str, Any]
) -> None:
    dm, _, _ = simulated(texts=1)
    (got, said), (wanted, expected) = paint(dm, prompt, **fields), paint(host, prompt, **fields)
    assert np.abs(got - wanted).max() <= 1 and said == expected
    assert (np.abs(wanted - paint(host, "a red sks mug")[0]).max() > 2) or prompt == "a red sks mug"


def test_kept_prompts_do_not_mix_up_their_weights(simulated: Any, host: DreamMix) -> None:
    dm, _, _ = simulated()
    prompts = ["a red sks mug", "a (red:2) sks mug", "a red sks mug", "a (red:0.2) sks mug", LONG, "a (red:2) sks mug"]
    for prompt in prompts:
        assert np.abs(paint(dm, prompt)[0] - paint(host, prompt)[0]).max() <= 1


def test_a_batch_holds_pictures_of_one_length(simulated: Any, host: DreamMix) -> None:
    dm, _, _ = simulated(pictures=2)
    image, mask = make_scene()
    fields: dict[str, Any] = {"num_inference_steps": 2, "substitute": ["blue"]}
    prompts = [WEIGHED, LONG, "a red sks mug", f"{LONG} (x:1.4)"]
    jobs = [Job(image, mask, host.request(prompt, seed=k, **fields)) for k, prompt in enumerate(prompts)]
    for got, wanted in zip(dm.inpaint_batch(jobs), host.inpaint_batch(jobs), strict=True):
        pixels = (np.asarray(each.images[0]).astype(int) for each in (got, wanted))
        assert np.abs(next(pixels) - next(pixels)).max() <= 1


def test_built_lengths_decide_what_fits(simulated: Any, host: DreamMix) -> None:
    dm, _, _ = simulated(networks={"lengths": (77, 154)})
    assert np.abs(paint(dm, LONG)[0] - paint(host, LONG)[0]).max() <= 1
    with pytest.raises(InputError, match=r"154 fit.*--context 77,154,231`"):
        paint(dm, LONG * 2)
    short, _, _ = simulated(networks={"lengths": (77,)})
    with pytest.raises(InputError, match=r"77 fit.*truncate_prompt.*--context 77,154`"):
        paint(short, LONG)


def test_a_longer_engine_fills_up_with_empty_chunks(simulated: Any, host: DreamMix) -> None:
    dm, _, _ = simulated(networks={"lengths": (231,)})
    assert np.abs(paint(dm, LONG)[0] - paint(host, f"{LONG} BREAK .")[0]).max() > 0  # a third chunk, but another one
    assert paint(dm, LONG)[0].shape == (128, 128, 3)
