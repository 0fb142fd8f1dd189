"""Requests with ASUKA on random weights: what reaches the networks, and what comes back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from dreammix_trt.building import build
from dreammix_trt.core.asuka_pictures import shrink_for_prior
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.request import Request
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.host.denoiser import Conditioning, EngineDenoiser
from dreammix_trt.engine.host.prior import PriorRows, add_prior
from dreammix_trt.engine.result import read_request
from tests.engine.conftest import make_scene
from tests.support.asuka import write_small_asuka

FEW: dict[str, Any] = {"num_inference_steps": 3, "seed": 2}
PATCHES = 16  # of the small prior


@pytest.fixture(scope="module")
def dm(test_home: Path, small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DreamMix]:
    place = tmp_path_factory.mktemp("asuka")
    write_small_asuka(place / "asuka", BaseFiles.open(small_base))
    build(out=place / "engine", base=small_base, asuka=place / "asuka")
    with DreamMix.load(place / "engine", threads=1) as opened:
        yield opened


@dataclass
class Spy:
    """Networks that remember the inputs of every call."""

    inner: Any
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def run(self, name: str, **arrays: Any) -> dict[str, Any]:
        self.calls.append((name, arrays))
        found: dict[str, Any] = self.inner.run(name, **arrays)
        return found

    def __contains__(self, name: str) -> bool:
        return name in self.inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arrays for called, arrays in self.calls if called == name]


@pytest.fixture
def spy(dm: DreamMix, monkeypatch: pytest.MonkeyPatch) -> Spy:
    watched = Spy(dm.runtime.networks)
    monkeypatch.setattr(dm.runtime, "networks", watched)
    return watched


def test_the_decoder_sees_picture_and_mask_at_both_decodes(dm: DreamMix, spy: Spy) -> None:
    image, mask = make_scene()
    plain = dm.inpaint(image, mask, "a mug", **FEW)
    assert not spy.of("asuka_decoder")
    spy.calls.clear()
    result = dm.inpaint(image, mask, "a mug", decoder="asuka", **FEW)
    seen = spy.of("asuka_decoder")
    assert len(seen) == 2 and not spy.of("vae_decoder")
    for arrays in seen:
        height, width = (8 * side for side in arrays["latent"].shape[2:])
        assert arrays["image"].shape == (1, 3, height, width) and arrays["mask"].shape == (1, 1, height, width)
        assert set(np.unique(arrays["mask"])) == {0, 1} and np.abs(arrays["image"]).max() <= 1
    whole = seen[-1]["image"][0].transpose(1, 2, 0) * 127.5 + 127.5
    np.testing.assert_allclose(whole, image, atol=0.51)  # the frame of the last decode is the picture
    assert (np.asarray(result.images[0]) != np.asarray(plain.images[0])).any()
    assert read_request(result.to_bytes("png")).decoder == "asuka"


def test_the_prior_sees_the_known_pixels_of_each_stage_s_frame(dm: DreamMix, spy: Spy) -> None:
    image, mask = make_scene()
    dm.inpaint(image, mask, "a mug", prior="negative", **FEW)
    first, last = spy.of("asuka_prior")
    expected = shrink_for_prior(image, mask, 16)
    np.testing.assert_array_equal(last["image"], expected[0])
    np.testing.assert_array_equal(last["mask"], expected[1])
    assert (first["mask"] != last["mask"]).any()


@pytest.mark.parametrize(("prior", "lengths"), [("negative", [77, PATCHES]), ("concat", [77, 77 + PATCHES])])
def test_rows_of_the_condition(prior: Any, lengths: list[int], dm: DreamMix, spy: Spy) -> None:
    image, mask = make_scene()
    dm.inpaint(image, mask, "a mug", prior=prior, **FEW)
    texts = [arrays["encoder_hidden_states"] for name, arrays in spy.calls if name in ("unet_kv", "unet_raw_kv")]
    assert sorted({text.shape[1] for text in texts}) == sorted(lengths)
    rows = {text.shape[1]: len(text) for text in texts}
    assert rows == ({77: 1, PATCHES: 1} if prior == "negative" else {77: 2, 77 + PATCHES: 2})
    assert len(spy.of("asuka_prior")) == (2 if prior == "negative" else 1)  # concat: in the last stage alone


def test_removal_is_the_prior_alone_without_guidance_or_subject(dm: DreamMix, spy: Spy) -> None:
    image, mask = make_scene()
    result = dm.remove(image, mask, **FEW)
    request = result.request
    assert (request.prior, request.decoder, request.guided, request.subject) == ("alone", "asuka", False, "")
    assert {arrays["encoder_hidden_states"].shape[:2] for arrays in spy.of("unet_kv")} == {(1, PATCHES)}
    assert all(len(arrays["sample"]) == 1 for arrays in spy.of("unet"))
    np.testing.assert_array_equal(np.asarray(result.images[0])[:8], image[:8])


def test_another_picture_for_the_prior(dm: DreamMix, spy: Spy) -> None:
    """Blank paper, as the authors advise where the prior copies a neighbour."""
    image, mask = make_scene()
    paper = np.full_like(image, 255)
    plain = dm.remove(image, mask, **FEW)
    spy.calls.clear()
    blank = dm.remove(image, mask, prior_image=paper, **FEW)
    stages = spy.of("asuka_prior")
    assert any("prior_image is no part of the request" in warning for warning in blank.warnings)
    assert len(stages) == 2
    for seen in stages:
        np.testing.assert_allclose(seen["image"][np.repeat(seen["mask"], 3, 1) == 0], 1, atol=1e-5)
    assert (np.asarray(plain.images[0]) != np.asarray(blank.images[0])).any()


def test_the_negative_rows_are_predicted_apart_and_meet_again() -> None:
    """The same as two calls, in the order negative, positive; times and sizes are each row's own."""
    seen: list[dict[str, Any]] = []

    class Networks:
        def __contains__(self, name: str) -> bool:
            return True

        def run(self, name: str, **arrays: Any) -> dict[str, Any]:
            if name.endswith("_kv"):
                return {"k": arrays["encoder_hidden_states"].sum(1)}
            seen.append(arrays)
            return {"eps": arrays["sample"] + arrays["k"].mean() + arrays["text_embeds"].mean()}

    rng = np.random.default_rng(0)
    text, pooled = rng.standard_normal((2, 7, 4), np.float32), rng.standard_normal((2, 3), np.float32)
    rows = PriorRows(rng.standard_normal((1, 5, 4), np.float32), rng.standard_normal((1, 3), np.float32))
    plain = Conditioning(text, pooled, ((64, 64),), 64, np.zeros((1, 2, 8, 8), np.float32))
    made = add_prior(plain, Request("a mug", prior="negative", prior_weight=0.5), rows)
    assert made.rows_per_picture == 2
    latents = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
    step = _a_step()
    eps = EngineDenoiser(Networks())(latents, step, made)  # type: ignore[arg-type]
    wanted = [0.5 * rows.context[0].sum(0).mean() + 0.5 * rows.pooled.mean(), text[1].sum(0).mean() + pooled[1].mean()]
    np.testing.assert_allclose(eps, latents + np.array(wanted, np.float32)[:, None, None, None], rtol=1e-5)
    assert len(seen) == 2
    np.testing.assert_array_equal(np.concatenate([each["time_ids"] for each in seen]), plain.time_ids(step))


def _a_step() -> Any:
    from dreammix_trt.core.schedule import make_schedule

    return make_schedule(Request("a mug", num_inference_steps=4), raw_unet=True)[0]


def test_a_weight_of_nearly_nothing_is_the_empty_condition() -> None:
    """Zeros, as SDXL's empty prompt is: keys and values of any number of them add nothing."""
    rows = PriorRows(np.ones((1, 5, 4), np.float32), np.ones((1, 3), np.float32))
    plain = Conditioning(np.ones((1, 7, 4), np.float32), np.ones((1, 3), np.float32), ((8, 8),), 8, np.zeros(0))
    made = add_prior(plain, Request("", prior="alone", guidance_scale=1, prior_weight=1e-30), rows)
    assert np.abs(made.text).max() < 1e-29 and np.abs(made.pooled).max() < 1e-29


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"decoder": "taesd"}, "decoder is 'taesd'; allowed: 'vae' or 'asuka'"),
        ({"prior": "positive"}, "prior is 'positive'; allowed: 'negative' or 'concat' or 'alone'"),
        ({"prior_weight": 0}, "prior_weight is 0; allowed: a number above 0 up to 2"),
        ({"prior": "alone"}, "guidance_scale is 4, but with prior 'alone' nothing is guided; give 1"),
        ({"prior": "negative", "guidance_scale": 1.0}, "guidance_scale is 1 and switches guidance off"),
    ],
)
def test_what_no_request_can_be(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Request("a mug", **fields)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prior_weight": 0.5}, "prior_weight is 0.5 and does nothing: there is no prior"),
        ({"prior": "negative", "negative_prompt": "a mug"}, "negative_prompt does nothing: prior 'negative' stands"),
        ({"prior": "alone", "guidance_scale": 1.0}, "prompt does nothing: prior 'alone' stands in the place of all"),
    ],
)
def test_words_that_do_nothing_are_named(fields: Any, told: str, dm: DreamMix) -> None:
    image, mask = make_scene()
    assert any(told in each for each in dm.inpaint(image, mask, "a mug", **fields, **FEW).warnings)


def test_an_engine_without_the_parts_says_how_to_build_it(host: DreamMix) -> None:
    image, mask = make_scene()
    with pytest.raises(InputError, match=r"has no asuka_prior: build it again with `--asuka FOLDER`"):
        host.remove(image, mask)
    with pytest.raises(InputError, match=r"decoder is 'asuka', but .* has no asuka_decoder: build it again"):
        host.inpaint(image, mask, "a sks mug", decoder="asuka")


def test_a_picture_for_the_prior_must_be_looked_at_and_fit(dm: DreamMix) -> None:
    image, mask = make_scene()
    with pytest.raises(InputError, match="prior_image is given, but prior is None"):
        dm.inpaint(image, mask, "a mug", prior_image=image)
    with pytest.raises(InputError, match=r"prior_image and image are of 10x10 and 128x128 pixels"):
        dm.remove(image, mask, prior_image=Image.new("RGB", (10, 10)))
