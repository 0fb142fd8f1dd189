"""The runtime on the embedded model: what a user may give, what comes back, and which bits must be equal."""

from __future__ import annotations

import gc
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from dreammix_trt.core.errors import EngineError, FileFormatError, InputError
from dreammix_trt.core.lora import read_lora
from dreammix_trt.core.noise import SeededNoise
from dreammix_trt.core.passport import Passport
from dreammix_trt.core.request import Request
from dreammix_trt.core.subject import Subject, read_subject, subject_from_loras, write_subject
from dreammix_trt.engine import DreamMix, FakeDenoiser
from dreammix_trt.engine.dreammix import Job, read_request, save
from dreammix_trt.engine.imprint import Origin, find_version
from tests.conftest import write_lora
from tests.support.tiny_model import random_factors, write_tiny_lora

STEPS = 4
RNG = np.random.default_rng(8)
PIXELS = RNG.integers(0, 255, (150, 200, 3), np.uint8)
IMAGE, MASK = Image.fromarray(PIXELS), Image.fromarray(np.pad(np.full((50, 60), 255, np.uint8), ((40, 60), (60, 80))))
FAR = np.pad(np.zeros((50 + 10, 60 + 10), bool), ((35, 55), (55, 75)), constant_values=True)


@pytest.fixture(scope="module")
def dm(mug_engine: Path) -> Iterator[DreamMix]:
    with DreamMix.load(mug_engine, threads=1) as loaded:
        yield loaded


class Noted:
    """A base's networks, some of them hidden, and what each was run with."""

    def __init__(self, networks: Any, *hidden: str) -> None:
        self.networks, self.hidden = networks, hidden
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def __contains__(self, name: str) -> bool:
        return name in self.networks and name not in self.hidden

    def slots(self, name: str) -> tuple[Any, ...]:
        return tuple(self.networks.slots(name))

    def weights(self, name: str) -> Any:
        return self.networks.weights(name)

    def run(self, name: str, **arrays: Any) -> dict[str, Any]:
        assert name in self
        self.seen.append((name, arrays))
        return dict(self.networks.run(name, **arrays))

    def list_calls(self, *names: str) -> list[dict[str, Any]]:
        return [arrays for name, arrays in self.seen if name in names]


@pytest.fixture(scope="module")
def cup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another subject of the same base, with a word of its own."""
    folder = tmp_path_factory.mktemp("cup")
    lora = read_lora(write_lora(folder / "lora", seed=9, scale=0.3))
    write_subject(folder / "cup.safetensors", subject_from_loras([(lora, 1.0, "patched")], "cup", "zyx", "cup"))
    return folder / "cup.safetensors"


def paint(dm: DreamMix, prompt: str | Request = "a red sks mug", **fields: Any) -> np.ndarray:
    if not isinstance(prompt, Request):
        fields = {"num_inference_steps": STEPS, "seed": 5, **fields}
    return np.asarray(dm.inpaint(IMAGE, MASK, prompt, **fields).images[0])


def test_far_pixels_stay_and_marked_ones_change(dm: DreamMix) -> None:
    out = paint(dm)
    assert out.shape == PIXELS.shape
    np.testing.assert_array_equal(out[FAR], PIXELS[FAR])
    assert (out[50:80, 70:110] != PIXELS[50:80, 70:110]).mean() > 0.9


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_the_result_is_of_the_inputs_kind(dm: DreamMix, mode: str) -> None:
    image = IMAGE.convert(mode)
    out = dm.inpaint(image, MASK.convert("1"), "a mug", num_inference_steps=1).images[0]
    assert out.size == IMAGE.size
    assert out.mode == {"L": "L", "RGBA": "RGBA", "P": "RGB", "1": "L"}[mode]


def test_the_same_request_gives_the_same_bytes(dm: DreamMix) -> None:
    first = paint(dm)
    assert paint(dm).tobytes() == first.tobytes()
    assert paint(dm, seed=6).tobytes() != first.tobytes()


def test_no_seed_draws_one_and_says_which(dm: DreamMix) -> None:
    request = dm.request("a mug", num_inference_steps=1, seed=None, num_images_per_prompt=2)
    results = [*dm.inpaint_batch([Job(IMAGE, MASK, request)] * 2), dm.inpaint(IMAGE, MASK, request)]
    assert len({result.seeds for result in results}) == 3
    for result in results:
        assert result.request.seed is not None
        assert result.seeds == (result.request.seed, result.request.seed + 1)
        for image, seed in zip(result.images, result.seeds, strict=True):
            again = paint(dm, request.replace(seed=seed, num_images_per_prompt=1))
            np.testing.assert_array_equal(np.asarray(image), again)


def test_picture_k_of_a_count_is_seed_plus_k_alone(dm: DreamMix) -> None:
    result = dm.inpaint(IMAGE, MASK, "a mug", num_inference_steps=STEPS, seed=5, num_images_per_prompt=3)
    assert result.seeds == (5, 6, 7)
    for image, seed in zip(result.images, result.seeds, strict=True):
        assert np.asarray(image).tobytes() == paint(dm, "a mug", seed=seed).tobytes()


def test_a_batch_equals_its_requests_alone(dm: DreamMix) -> None:
    requests = [
        Request("a red sks mug", num_inference_steps=STEPS, seed=1),
        Request("a blue bowl", num_inference_steps=STEPS - 1, subject="", seed=2, num_images_per_prompt=2),
        Request("a mug", num_inference_steps=STEPS, lcg_steps=0, guidance_scale=1.0),
    ]
    results = dm.inpaint_batch([Job(IMAGE, MASK, request) for request in requests])
    assert [len(result.images) for result in results] == [1, 2, 1]
    for request, result in zip(requests, results, strict=True):
        assert np.asarray(result.images[0]).tobytes() == paint(dm, request).tobytes()
    with pytest.raises(InputError, match="is 10x10"):
        dm.inpaint_batch([Job(IMAGE, MASK, requests[0]), Job(IMAGE, MASK.resize((10, 10)), requests[0])])


def test_swapping_subjects_and_back_is_exact(mug_engine: Path, cup: Path) -> None:
    with DreamMix.load(mug_engine, threads=1) as dm:
        first = paint(dm)
        assert dm.add_subject(cup) == "cup" and dm.subjects == ("mug", "cup")
        other = paint(dm, subject="cup")
        assert other.tobytes() != first.tobytes()
        assert paint(dm, subject="mug").tobytes() == first.tobytes()
        assert paint(dm, subject="").tobytes() not in (first.tobytes(), other.tobytes())
        assert paint(dm).tobytes() == first.tobytes()  # the first one stays the default
        with pytest.raises(InputError, match="'mug', 'cup'"):
            paint(dm, subject="teapot")


@pytest.mark.parametrize(
    ("prompt", "subject", "told"),
    [
        ("a red zyx cup", None, True),
        ("a red sks mug", None, False),
        ("a red zyx cup", "cup", False),
        ("a sks mug and a zyx cup", None, False),
    ],
)
def test_a_prompt_that_speaks_of_another_subject_is_told(
    mug_engine: Path, cup: Path, prompt: str, subject: str | None, told: bool
) -> None:
    with DreamMix.load(mug_engine, threads=1) as dm:
        dm.add_subject(cup)
        result = dm.inpaint(IMAGE, MASK, prompt, subject=subject, num_inference_steps=2)
    assert any("choose with subject='cup'" in warning for warning in result.warnings) == told, result.warnings


def test_a_subject_replaced_under_its_name_leaves_nothing_behind(mug_engine: Path, cup: Path) -> None:
    with DreamMix.load(mug_engine, threads=1) as dm:
        paint(dm)
        dm.add_subject(cup)
        wanted = paint(dm, subject="cup")
        assert dm.add_subject(cup, name="mug") == "mug"
        assert paint(dm, subject="mug").tobytes() == wanted.tobytes()


def test_a_subject_has_a_strength(mug_engine: Path, cup: Path) -> None:
    """0 is nobody's factors under the subject's word, 1 the subject, s a subject whose factors were multiplied."""
    with DreamMix.load(mug_engine, threads=1) as dm:
        dm.add_subject(cup)
        full, nobody = paint(dm, "a zyx cup", subject="cup"), paint(dm, "a zyx cup", subject="")
        np.testing.assert_array_equal(paint(dm, "a zyx cup", subject="cup", subject_scale=1), full)
        np.testing.assert_array_equal(paint(dm, "a zyx cup", subject="cup", subject_scale=0), nobody)
        weak = paint(dm, "a zyx cup", subject="cup", subject_scale=0.7)
        assert len({weak.tobytes(), full.tobytes(), nobody.tobytes()}) == 3
        subject = read_subject(cup)
        factors = {
            network: {module: (a, b * np.float32(0.7)) for module, (a, b) in modules.items()}
            for network, modules in subject.factors.items()
        }
        times = DreamMix.on_host(dm.networks, dm.facts, dm.tokenizers, [replace(subject, factors=factors)])
        np.testing.assert_array_equal(paint(times, "a zyx cup"), weak)
        write_subject(cup.with_name("dimmed.safetensors"), replace(subject, name="dimmed", scale=0.7))
        dm.add_subject(cup.with_name("dimmed.safetensors"))
        dimmed = paint(dm, "a zyx cup", subject="dimmed", subject_scale=1.3)
        np.testing.assert_array_equal(paint(dm, "a zyx cup", subject="cup", subject_scale=0.7 * 1.3), dimmed)
        np.testing.assert_array_equal(paint(dm, "a zyx cup", subject="cup"), full)


def test_one_subject_after_the_other_and_back_has_the_same_bits(mug_engine: Path, cup: Path) -> None:
    with DreamMix.load(mug_engine, threads=1) as dm:
        dm.add_subject(cup)
        one, nobody, other, again, nobody_again = (paint(dm, subject=name) for name in ("mug", "", "cup", "mug", ""))
    np.testing.assert_array_equal(again, one)
    np.testing.assert_array_equal(nobody_again, nobody)
    assert len({each.tobytes() for each in (one, nobody, other)}) == 3


def test_a_lora_of_a_high_rank_is_the_sum_of_its_parts(dm: DreamMix, cup: Path, tmp_path: Path) -> None:
    """The same change as 30 columns of a thirtieth each: pictures agree but for rounding."""
    subject = read_subject(cup)
    factors = {
        network: {module: (np.tile(a, 30), np.tile(b, (30, 1)) / np.float32(30)) for module, (a, b) in modules.items()}
        for network, modules in subject.factors.items()
    }
    assert max(a.shape[1] for modules in factors.values() for a, _ in modules.values()) >= 120
    plain, wide = (
        DreamMix.on_host(dm.networks, dm.facts, dm.tokenizers, [each])
        for each in (subject, replace(subject, factors=factors))
    )
    one, other = (np.asarray(paint(each, "a zyx cup"), np.int16) for each in (plain, wide))
    assert np.abs(one - other).max() <= 1 and (one != np.asarray(paint(dm, "a zyx cup", subject=""))).any()


def test_keys_and_values_are_made_once_in_a_stage_for_each_unet(dm: DreamMix) -> None:
    noted = Noted(dm.networks)
    fresh = DreamMix.on_host(noted, dm.facts, dm.tokenizers)
    result = fresh.inpaint(IMAGE, MASK, "a mug", num_inference_steps=8, patched_fraction=0.7)
    assert {step.network for step in result.schedule} == {"unet", "unet_raw"}
    assert len(noted.list_calls("unet", "unet_raw")) > 8, "the local stage runs on to its end, on the raw UNet"
    assert len(noted.list_calls("unet_kv")) == len(noted.list_calls("unet_raw_kv")) == 2


def test_a_strength_of_nobody_is_refused(dm: DreamMix) -> None:
    for scale in (-0.1, 2.1, float("nan"), "1"):
        with pytest.raises(InputError, match=r"subject_scale is .*from 0 to 2"):
            paint(dm, subject_scale=scale)
    with pytest.raises(InputError, match=r"subject_scale is 0\.5, but no subject is drawn"):
        paint(dm, subject="", subject_scale=0.5)
    merged = DreamMix.on_host(dm.networks, dm.facts, dm.tokenizers, [Subject("pot", "sks", "pot")])
    with pytest.raises(InputError, match=r"subject_scale is 0, but subject 'pot' is baked into the weights"):
        paint(merged, subject_scale=0)


def test_a_subject_may_be_given_as_a_value_and_is_listed(mug_engine: Path) -> None:
    with DreamMix.load(mug_engine, threads=1) as dm:
        (mug,) = dm.list_subjects()
        assert dm.add_subject(mug, "twin", token="ohwx") == "twin"
        assert [(each.name, each.token) for each in dm.list_subjects()] == [("mug", mug.token), ("twin", "ohwx")]
        assert all(each.factors.keys() == mug.factors.keys() for each in dm.list_subjects())


def test_a_removed_subject_is_gone_and_the_next_is_the_default(mug_engine: Path, cup: Path) -> None:
    with DreamMix.load(mug_engine, threads=1) as dm:
        mug = paint(dm, subject_scale=0.5)
        dm.add_subject(cup)
        other = paint(dm, subject="cup")
        begun = dm.iterate(IMAGE, MASK, "a red sks mug", num_inference_steps=STEPS, seed=5, subject_scale=0.5)
        next(begun)
        waiting = dm.iterate(IMAGE, MASK, "a red sks mug", num_inference_steps=STEPS)
        dm.remove_subject("mug")
        *_, last = begun  # what has begun goes on
        assert last.result is not None and np.asarray(last.result.images[0]).tobytes() == mug.tobytes()
        with pytest.raises(EngineError, match="subject 'mug' was removed before the request was painted"):
            next(waiting)
        assert dm.subjects == ("cup",)
        np.testing.assert_array_equal(paint(dm), other)
        for use in (lambda: dm.remove_subject("mug"), lambda: paint(dm, subject="mug")):
            with pytest.raises(InputError, match="is 'mug'; loaded are: 'cup'"):
                use()
        dm.remove_subject("cup")
        assert dm.subjects == ()
        with pytest.raises(InputError, match="loaded are: none"):
            dm.remove_subject("cup")
        paint(dm)  # nobody
        assert dm.add_subject(mug_engine) == "mug"
        np.testing.assert_array_equal(paint(dm, subject_scale=0.5), mug)


def test_a_removed_subjects_merged_weights_are_freed(mug_engine: Path) -> None:
    with DreamMix.load(mug_engine, threads=1) as dm:
        paint(dm)
        merged = dm._roster._runtime._weights._merged.values()  # type: ignore[attr-defined]
        held = [weakref.ref(array) for arrays in merged for array in arrays.values()]
        assert held and all(ref() is not None for ref in held)
        del merged
        dm.remove_subject("mug")
        gc.collect()
        assert not [ref for ref in held if ref() is not None]
        paint(dm)


def test_what_is_no_subject_is_refused(dm: DreamMix, tmp_path: Path) -> None:
    (tmp_path / "notes.safetensors").write_bytes(b"no")
    with pytest.raises(FileFormatError, match=r"notes\.safetensors"):
        dm.add_subject(tmp_path / "notes.safetensors")
    with pytest.raises(FileFormatError, match=r"notes\.safetensors"):
        dm.add_subject(tmp_path)
    with pytest.raises(FileFormatError, match="no such"):
        dm.add_subject(tmp_path / "absent")
    (tmp_path / "engine/subjects").mkdir(parents=True)
    with pytest.raises(EngineError, match="engine holds no subject"):
        dm.add_subject(tmp_path / "engine")
    other = {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k": (32, 32)}
    with pytest.raises(FileFormatError, match=r"other\.safetensors: .*this LoRA is for another base"):
        dm.add_subject(write_tiny_lora(tmp_path / "other.safetensors", random_factors(other)))
    assert dm.subjects == ("mug",)


def test_of_an_engines_subjects_all_are_added_or_none(dm: DreamMix, cup: Path, tmp_path: Path) -> None:
    (tmp_path / "two/subjects").mkdir(parents=True)
    shutil.copy(cup, tmp_path / "two/subjects/a.safetensors")
    write_subject(tmp_path / "two/subjects/b.safetensors", Subject("baked", "sks", "cup"))
    with pytest.raises(FileFormatError, match="subject baked is merged into the weights"):
        dm.add_subject(tmp_path / "two")
    assert dm.subjects == ("mug",)


def test_a_lora_file_is_a_subject(dm: DreamMix, mug_engine: Path, mug_lora: Path, tmp_path: Path) -> None:
    """As the trainer leaves it, in a folder, and as kohya's scripts write it, with their word for it."""
    kohya = {}
    for name, values in load_file(mug_lora / "pytorch_lora_weights.safetensors").items():
        network, _, module = name.partition(".")
        module, _, side = module.partition(".lora.")
        flat = f"lora_{network}_{module.replace('.', '_')}"
        kohya[f"{flat}.lora_{side}"] = values
        kohya[f"{flat}.alpha"] = np.array(4.0, np.float32)
    save_file(kohya, tmp_path / "v1.safetensors", {"ss_tag_frequency": '{"10_ohwx tea pot": {"ohwx tea pot": 3}}'})
    with DreamMix.load(mug_engine, threads=1) as fresh:
        assert fresh.add_subject(tmp_path / "v1.safetensors") == "tea-pot"
        assert fresh.add_subject(mug_lora, name="my mug", token="zwx") == "my mug"
        pot = paint(fresh, "a red ohwx pot", subject="tea-pot", substitute=["red"], guidance_scale=1.0)
        mug = paint(fresh, "a red zwx pot", subject="my mug", substitute=["red"], guidance_scale=1.0)
        assert pot.shape == mug.shape == PIXELS.shape
        same = [paint(fresh, "a mug", subject=name) for name in ("tea-pot", "my mug")]
        np.testing.assert_array_equal(*same)
        built, nobody = paint(dm, "a mug"), paint(dm, "a mug", subject="")  # from a file of 16 bits
        off = np.abs(same[0].astype(int) - built)
        assert off.mean() < 0.1 * np.abs(nobody.astype(int) - built).mean()
        for subject, other in (("tea-pot", "zwx"), ("my mug", "ohwx")):
            with pytest.raises(InputError):  # TAS wants the subject's own word
                paint(fresh, f"a red {other} pot", subject=subject, substitute=["red"])


def test_iterating_tells_each_step_and_previews_it(dm: DreamMix) -> None:
    request = Request("a mug", num_inference_steps=STEPS, num_images_per_prompt=2)
    events = list(dm.iterate(IMAGE, MASK, request))
    assert [event.index for event in events] == list(range(2 * STEPS))
    assert {event.total for event in events} == {2 * STEPS}
    assert [event.picture for event in events] == [0] * STEPS + [1] * STEPS
    assert [event.stage for event in events[:STEPS]] == ["lcg", "lcg", "lcg", "gch"]
    assert [event.result is None for event in events] == [True] * (2 * STEPS - 1) + [False]
    height, width = events[1].taken.x0.shape[2:]
    assert events[1].preview(whole=False).size == (8 * width, 8 * height)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("fields", [{}, {"lcg_fraction": 1.0}, {"lcg_steps": 0}], ids=str)
def test_a_preview_is_of_the_whole_picture(dm: DreamMix, mode: str, fields: dict[str, Any]) -> None:
    image = IMAGE.convert(mode)
    given = np.asarray(image).astype(int)
    shown, changed = [], np.zeros(FAR.shape, bool)
    for event in dm.iterate(image, MASK, "a red sks mug", num_inference_steps=STEPS, **fields):
        preview = event.preview()
        assert (preview.size, preview.mode) == (IMAGE.size, mode)
        shown.append(np.asarray(preview).astype(int))
        np.testing.assert_array_equal(shown[-1][FAR], given[FAR])
        changed |= (shown[-1] != given).reshape(*FAR.shape, -1).any(axis=-1)
    assert changed[50:80, 70:110].mean() > 0.9
    assert event.result is not None
    np.testing.assert_array_equal(shown[-1], np.asarray(event.result.images[0]))  # nothing is left to be predicted
    assert len({each.tobytes() for each in shown}) == STEPS


def test_leaving_the_iteration_cancels(mug_engine: Path) -> None:
    with DreamMix.load(mug_engine, threads=1) as dm:
        fake = FakeDenoiser()
        dm = DreamMix.on_host(dm.networks, dm.facts, dm.tokenizers, denoiser=fake)
        for event in dm.iterate(IMAGE, MASK, "a mug", num_inference_steps=STEPS):
            if event.index == 1:
                break
        assert [step.index for step in fake.steps] == [0, 1]


def test_bad_input_is_refused_before_the_first_step(dm: DreamMix) -> None:
    with pytest.raises(InputError, match="no field smapler"):
        dm.iterate(IMAGE, MASK, "a mug", smapler="euler")
    with pytest.raises(InputError, match="guidance_scale is nan"):
        dm.iterate(IMAGE, MASK, "a mug", guidance_scale=float("nan"))
    with pytest.raises(InputError, match="repaints nothing"):
        dm.iterate(IMAGE, Image.new("L", IMAGE.size), "a mug")
    with pytest.raises(InputError, match="152 tokens long"):
        dm.iterate(IMAGE, MASK, "mug " * 150, mode="reference")
    with pytest.raises(InputError, match="'sks'"):
        dm.iterate(IMAGE, MASK, "a red mug", substitute=["blue"])
    with pytest.raises(InputError, match="1 providers for 2 pictures"):
        dm.iterate(IMAGE, MASK, "a mug", num_images_per_prompt=2, noise=SeededNoise(1))


def test_a_long_prompt_is_cut_when_told(dm: DreamMix) -> None:
    assert paint(dm, "mug " * 150, truncate_prompt=True).tobytes() == paint(dm, "mug " * 75).tobytes()


def test_noise_can_be_given(dm: DreamMix) -> None:
    own = paint(dm, seed=1, noise=SeededNoise(77))
    np.testing.assert_allclose(own.astype(int), paint(dm, seed=77).astype(int), atol=1)
    assert np.abs(own.astype(int) - paint(dm, seed=1)).max() > 8


def test_texts_are_encoded_once(dm: DreamMix) -> None:
    prompt = "a green sks mug never asked for before"
    ran = dm.inpaint(IMAGE, MASK, prompt, num_inference_steps=1).timings
    assert "network:text_encoder" in ran
    assert "network:text_encoder" not in dm.inpaint(IMAGE, MASK, prompt, num_inference_steps=1, seed=9).timings
    assert "network:text_encoder" in dm.inpaint(IMAGE, MASK, prompt, num_inference_steps=1, subject="").timings


def test_timings_are_disjoint_and_name_the_networks(dm: DreamMix) -> None:
    start = time.perf_counter()
    timings = dm.inpaint(IMAGE, MASK, "a mug", num_inference_steps=STEPS).timings
    assert 0 < sum(timings.values()) <= time.perf_counter() - start
    assert {"read", "canvas", "text", "loop", "write", "network:unet", "network:vae_decoder"} <= set(timings)


@pytest.mark.parametrize(
    "fields",
    [
        {"lcg_fraction": 0.0}, {"lcg_fraction": 1.0}, {"substitute": ["blue"]}, {"negative_prompt": None},
        {"guidance_scale": 1.0}, {"patched_fraction": 0.3}, {"soft_blending": True}, {"vae_sample": True},
        {"sampler": "euler"}, {"sampler": "lcm"}, {"sampler": "lcm", "guidance_scale": 1.0},
        {"gch_background": "intermediate"}, {"blend_noise": "fixed"}, {"blend_output": True}, {"lcg_mask_dilate": 12},
        {"guidance_rescale": 0.7}, {"sharpness": 0.0}, {"strength": 0.5}, {"gch_field": 0.8}, {"lcg_field": 0.9},
        {"substitute": ["blue"], "tas_stages": ["tokens_lcg", "tokens_gch", "pooled_lcg", "pooled_gch"]},
    ],
    ids=str,
)  # fmt: skip
def test_every_parameter_matters_and_keeps_far_pixels(dm: DreamMix, fields: dict[str, Any]) -> None:
    out = paint(dm, **fields)
    np.testing.assert_array_equal(out[FAR], PIXELS[FAR])
    assert out.tobytes() != paint(dm).tobytes()


def test_reference_mode_gives_the_size_it_worked_on(dm: DreamMix) -> None:
    result = dm.inpaint(IMAGE, MASK, "a red sks mug", mode="reference", num_inference_steps=2, substitute=["blue"])
    assert result.images[0].size == (128, 128)
    small = dm.inpaint(IMAGE, MASK, "a mug", mode="reference", num_inference_steps=2, reference_resize=(96, 160))
    assert small.images[0].size == (160, 96)


def test_a_tiny_and_an_odd_picture(dm: DreamMix) -> None:
    one = dm.inpaint(np.zeros((1, 1, 3), np.uint8), np.full((1, 1), 255, np.uint8), "a mug", num_inference_steps=1)
    assert one.images[0].size == (1, 1)
    mask = np.zeros((37, 400), np.uint8)
    mask[:, 390:] = 255
    odd = dm.inpaint(RNG.integers(0, 255, (37, 400, 3), np.uint8), mask, "a mug", num_inference_steps=2)
    assert odd.images[0].size == (400, 37)


def test_a_picture_carries_its_request_and_makes_it_again(dm: DreamMix, mug_engine: Path, tmp_path: Path) -> None:
    result = dm.inpaint(IMAGE, MASK, "a red sks müg", num_inference_steps=2, seed=3, num_images_per_prompt=2)
    for suffix in ("png", "jpg", "webp"):
        save(result, tmp_path / f"b.{suffix}", index=1)
    request = read_request(tmp_path / "b.png")
    assert request == result.request.replace(seed=4, num_images_per_prompt=1)
    assert paint(dm, request).tobytes() == np.asarray(Image.open(tmp_path / "b.png")).tobytes()
    (tmp_path / "r.json").write_text(request.to_json())
    assert read_request(tmp_path / "r.json") == request
    assert read_request(tmp_path / "b.jpg") == read_request(tmp_path / "b.webp") == request
    passport = Passport.read(mug_engine)
    (entry,) = passport.subjects
    wanted = Origin(find_version(), passport.base["name"], passport.base_key, "mug", entry.source_sha256)
    assert result.origin == wanted and entry.source_sha256 and passport.base_key
    assert dm.inpaint(IMAGE, MASK, "a mug", subject="", num_inference_steps=1).origin.subject == ""
    save(result, tmp_path / "silent.png", metadata=False)
    for name in ("silent.png", "absent.png"):
        with pytest.raises(InputError, match=name):
            read_request(tmp_path / name)
    with pytest.raises(InputError, match="picture format"):
        save(result, tmp_path / "b.tga")
    assert not list(tmp_path.glob("*.tga"))


def test_stages_are_kept_when_asked_for(dm: DreamMix) -> None:
    kept = dm.inpaint(IMAGE, MASK, "a mug", num_inference_steps=STEPS, keep_stages=True).stages
    assert list(kept) == ["crop", "fill", "local result", "handed over", "last result"]
    assert kept["handed over"].size == IMAGE.size
    assert dm.inpaint(IMAGE, MASK, "a mug", num_inference_steps=1).stages == {}


@pytest.mark.parametrize("substitute", [(), ("blue",)])
def test_without_guidance_nothing_runs_for_the_negative_prompt(dm: DreamMix, substitute: tuple[str, ...]) -> None:
    for guidance, rows in ((1.0, 1), (4.0, 2)):
        noted = Noted(dm.networks)
        fresh = DreamMix.on_host(noted, dm.facts, dm.tokenizers)
        fields = {"num_inference_steps": STEPS, "guidance_scale": guidance, "substitute": substitute}
        fresh.inpaint(IMAGE, MASK, "a red sks mug", negative_prompt="a table", **fields)
        assert {len(arrays["sample"]) for arrays in noted.list_calls("unet", "unet_raw")} == {rows}
        attended = [name for name in dm.networks.entries["unet"]["inputs"] if name["name"].endswith(".key")]
        assert attended
        for each in attended:
            assert {len(arrays[each["name"]]) for arrays in noted.list_calls("unet", "unet_raw")} == {rows}
        assert {len(arrays["encoder_hidden_states"]) for arrays in noted.list_calls("unet_kv", "unet_raw_kv")} == {rows}
        assert len(noted.list_calls("text_encoder")) == rows + len(substitute)


FEW: dict[str, Any] = {"sampler": "lcm", "guidance_scale": 1.0, "num_inference_steps": 3}


def test_a_base_says_what_it_was_made_for(dm: DreamMix) -> None:
    few = DreamMix.on_host(dm.networks, dm.facts, dm.tokenizers, defaults=FEW)
    assert few.request("a mug", seed=4) == Request("a mug", seed=4, **FEW)
    assert few.request("a mug", num_inference_steps=2, sampler="euler").sampler == "euler"
    assert dm.request("a mug") == Request("a mug") and dm.defaults == {}
    result = few.inpaint(IMAGE, MASK, "a mug", num_inference_steps=2)
    assert result.request == Request("a mug", **{**FEW, "num_inference_steps": 2})
    assert result.schedule.timesteps.tolist() == [999, 499]
    given = Request("a mug", num_inference_steps=2)
    assert few.inpaint(IMAGE, MASK, given, seed=1).request == given.replace(seed=1)
    with pytest.raises(InputError, match="no field sed"):
        few.request("a mug", sed=1)
    with pytest.raises(TypeError):
        few.defaults["seed"] = 1  # type: ignore[index]


@pytest.mark.parametrize(
    ("defaults", "named"),
    [({"sampler": "ddim"}, "sampler is 'ddim'"), ({"smapler": "lcm"}, "no field smapler"), ([4], "mapping")],
)
def test_defaults_that_no_request_takes_are_refused(dm: DreamMix, defaults: Any, named: str) -> None:
    with pytest.raises(EngineError, match=f"base's request defaults cannot be used.*{named}"):
        DreamMix.on_host(dm.networks, dm.facts, dm.tokenizers, defaults=defaults)


def test_defaults_are_read_from_the_base(mug_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Facts:
        native_side, divisor, scaling_factor, feature_channels, defaults = 128, 8, 0.13025, 32, FEW

    monkeypatch.setattr("dreammix_trt.engine.backends.onnxruntime.engine_set.read_facts", lambda folder: Facts())
    with DreamMix.load(mug_engine, threads=1) as few:
        assert few.defaults == FEW


def test_a_base_of_one_unet_runs_every_step_on_it(dm: DreamMix) -> None:
    noted = Noted(dm.networks, "unet_raw")
    alone = DreamMix.on_host(noted, dm.facts, dm.tokenizers)
    result = alone.inpaint(IMAGE, MASK, "a mug", num_inference_steps=STEPS, patched_fraction=0.2)
    assert {step.network for step in result.schedule} == {"unet"}
    assert len(noted.list_calls("unet")) >= STEPS
    assert all(arrays["inpaint_feature"].any() for arrays in noted.list_calls("unet"))
    both = dm.inpaint(IMAGE, MASK, "a mug", num_inference_steps=STEPS, patched_fraction=0.2)
    assert {step.network for step in both.schedule} == {"unet", "unet_raw"}


class Overflowing(Noted):
    """Networks of which one gives values that are not numbers, from its n-th call on; its twin does not."""

    def __init__(self, networks: Any, bad: str, first: int) -> None:
        super().__init__(networks)
        self.bad, self.first = bad, first

    def __contains__(self, name: str) -> bool:
        return name == f"{self.bad}_float32" or super().__contains__(name)

    def run(self, name: str, **arrays: Any) -> dict[str, Any]:
        outputs = super().run(name, **arrays) if name in self.networks else {}
        if name == f"{self.bad}_float32":
            return dict(self.networks.run(self.bad, **arrays))
        if name == self.bad and len(self.list_calls(name)) > self.first:
            return {key: np.full_like(value, np.nan) for key, value in outputs.items()}
        return outputs


@pytest.mark.parametrize(("bad", "first"), [("vae_encoder", 0), ("vae_decoder", 0), ("vae_decoder", 1)])
def test_a_twin_rescues_a_picture_wherever_it_was_lost(dm: DreamMix, bad: str, first: int) -> None:
    """Before the first step, at the hand-over, at the end: the events come to their end, the picture is the same."""
    rescued = DreamMix.on_host(Overflowing(dm.networks, bad, first), dm.facts, dm.tokenizers)
    events = list(rescued.iterate(IMAGE, MASK, "a red sks mug", num_inference_steps=6, seed=7, subject=""))
    plain = list(dm.iterate(IMAGE, MASK, "a red sks mug", num_inference_steps=6, seed=7, subject=""))
    assert events[-1].index == events[-1].total - 1 == plain[-1].index
    assert events[-1].result is not None and plain[-1].result is not None
    assert np.array_equal(np.asarray(events[-1].result.images[0]), np.asarray(plain[-1].result.images[0]))


def test_looking_does_not_lose_a_picture(dm: DreamMix) -> None:
    """A preview that overflows shows what it shows; the request goes on."""
    networks = Overflowing(dm.networks, "vae_decoder", 10**9)
    fresh = DreamMix.on_host(networks, dm.facts, dm.tokenizers)
    done = None
    for event in fresh.iterate(IMAGE, MASK, "a mug", num_inference_steps=3, lcg_fraction=1.0):
        if event.index == 0:
            networks.first = 0
            with np.errstate(invalid="ignore"):
                event.preview()
            networks.first = 10**9
        done = event.result
    assert done is not None


def test_a_closed_engine_is_not_used_again(mug_engine: Path, cup: Path) -> None:
    dm = DreamMix.load(mug_engine, threads=1)
    begun = dm.iterate(IMAGE, MASK, "a mug", num_inference_steps=STEPS)
    event = next(begun)
    dm.close()
    dm.close()
    uses: list[Callable[[], Any]] = [
        lambda: paint(dm),
        lambda: dm.iterate(IMAGE, MASK, "a mug"),
        lambda: dm.inpaint_batch([Job(IMAGE, MASK, Request("a mug"))]),
        lambda: dm.add_subject(cup),
        lambda: next(begun),
        event.preview,
        dm.__enter__,
    ]
    for use in uses:
        with pytest.raises(EngineError, match="this engine was closed"):
            use()
    assert not dm.networks._opened  # type: ignore[attr-defined]
