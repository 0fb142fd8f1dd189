"""Subjects of tokens on a device, with random weights: enrolled and painted as on the host, mixed with a LoRA's."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from dreammix_trt.building import build
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import EngineError, FileFormatError, InputError, NotFiniteError, OutOfMemoryError
from dreammix_trt.core.networks import names_of_group
from dreammix_trt.core.subject import Subject
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.device import tokens as device_tokens
from dreammix_trt.engine.device.arena import measure_regions
from dreammix_trt.engine.device.memory_plan import Options
from dreammix_trt.engine.device.needs import Needs
from dreammix_trt.engine.dreammix import Job
from dreammix_trt.engine.drivers.simulated import SimulatedDevice, SimulatedNetworks
from tests.engine.backends.test_tensorrt_on_device import BOTH
from tests.engine.conftest import make_scene
from tests.engine.device.test_loading import loaded  # noqa: F401
from tests.engine.device.test_studio import Overflowing, list_between
from tests.engine.test_tokens import draw_object
from tests.support.asuka import write_small_asuka
from tests.support.tokens import write_small_adapter

STEPS = 3
PRIOR = 16  # rows of the small prior
PROMPT = "a red sks mug"
BOTH_KINDS = {"subject": "mug", "token_subject": "cup"}


@pytest.fixture(scope="module")
def mug_engine(test_home: Path, small_base: Path, mug_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The neighbours' engine, with ASUKA's networks and a token adapter."""
    folder, base = tmp_path_factory.mktemp("tokens"), BaseFiles.open(small_base)
    louder = {f"alignment.{name}.weight": lambda weight: 30 * weight for name in ("context", "pooled")}
    write_small_asuka(folder / "asuka", base, changes=louder)
    adapter = write_small_adapter(folder / "adapter.safetensors", base)
    build(mug_lora, base=small_base, out=folder / "engine", name="mug", asuka=folder / "asuka", tokens=adapter.file)
    return folder / "engine"


@pytest.fixture(scope="module")
def enrolled(host: DreamMix) -> list[Subject]:
    """Two subjects of tokens, which the host knows as well."""
    return [host.enroll(*draw_object(seed), class_name=name) for seed, name in enumerate(("cup", "ball"))]


@pytest.fixture
def both(simulated: Any, enrolled: list[Subject]) -> Any:
    """Makes a runtime on the simulated device that knows the LoRA "mug", and "cup" and "ball" of tokens."""

    def make(**given: Any) -> Any:
        made = simulated(**given)
        for subject in enrolled:
            made[0].add_subject(subject)
        return made

    return make


def paint(dm: DreamMix, prompt: str = PROMPT, size: tuple[int, int] = (128, 128), **fields: Any) -> np.ndarray:
    given = {"num_inference_steps": STEPS, "seed": 3, "subject": "cup", **fields}
    result = dm.inpaint(*make_scene(*size), prompt, **given)
    return np.stack([np.asarray(picture) for picture in result.images]).astype(int)


def assert_alike(got: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(got - wanted).max() <= 1 and np.mean(got != wanted) < 1e-3


# -- painting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"token_count": 1},
        {"token_count": 48, "guidance_scale": 1.0},
        {"token_weight": 0.4, "num_images_per_prompt": 2, "size": (60, 90)},
        {"prompt": "a red mug on a wooden table, " * 5, "token_count": 5, "negative_prompt": "blurry"},
        BOTH_KINDS,
        {**BOTH_KINDS, "subject_scale": 0.3, "substitute": ("blue",)},
        {**BOTH_KINDS, "subject_scale": 0.0},
        {"prior": "concat", "token_count": 7, "num_images_per_prompt": 2, **BOTH_KINDS},
        {"prior": "alone", "guidance_scale": 1.0, "token_count": 9},
        {"prior": "negative", "token_count": 3, "num_images_per_prompt": 2},
    ],
    ids=str,
)
def test_the_pictures_are_the_hosts(both: Any, host: DreamMix, fields: dict[str, Any]) -> None:
    dm, _, _ = both(pictures=2)
    wanted = paint(host, **fields)
    for _ in range(2):  # plainly, then as graphs
        assert_alike(paint(dm, **fields), wanted)
    assert np.abs(paint(dm, **{**fields, "token_subject": "", "subject_scale": 1.0}) - wanted).max() > 3


@pytest.mark.parametrize("residency", ["resident", "one-unet", "swap"])
def test_subjects_of_both_kinds_take_turns_to_the_bit(both: Any, host: DreamMix, residency: str) -> None:
    dm, _, _ = both(residency=residency)
    raw = {"patched_fraction": 1.0} if residency == "one-unet" else {}
    casts = [{"subject": "cup"}, {"subject": "mug"}, BOTH_KINDS, {"subject": ""}]
    first = [paint(dm, **cast, **raw) for cast in casts]
    for cast, picture in zip(casts, first, strict=True):
        assert_alike(picture, paint(host, **cast, **raw))
    for number in (0, 2, 1, 0):
        np.testing.assert_array_equal(paint(dm, **casts[number], **raw), first[number])
    assert len({picture.tobytes() for picture in first}) == len(casts)


def test_without_weight_it_is_the_picture_without_tokens(both: Any, simulated: Any, cup: Path) -> None:
    dm, _, _ = both()
    none = paint(dm, subject="")
    np.testing.assert_array_equal(paint(dm, token_weight=0.0), none)
    np.testing.assert_array_equal(paint(dm, token_subject=""), none)
    np.testing.assert_array_equal(
        paint(dm, subject="mug", token_subject="cup", token_weight=0.0), paint(dm, subject="mug")
    )
    assert (paint(dm) != none).any()


def test_to_another_of_tokens_no_weight_moves(both: Any) -> None:
    dm, device, _ = both()
    paint(dm)
    launches, start = dm.studio.weights.count.launches, len(device.record)
    got = paint(dm, subject="ball")
    assert dm.studio.weights.count.launches == launches
    assert "merge_weights" not in {entry.name for entry in device.record[start:]}
    kinds = Counter(entry.kind for entry in list_between(device, start))
    assert not kinds.keys() & {"upload", "download", "allocate", "pinned", "free", "synchronize"}
    assert (got != paint(dm)).any()


def test_subjects_of_tokens_share_a_batch(both: Any, host: DreamMix) -> None:
    dm, device, _ = both(pictures=3)
    names = ("cup", "ball", "cup")
    given = [{"subject": name, "seed": seed, "token_weight": 1 - seed / 4} for seed, name in enumerate(names)]
    given += [{"subject": "mug"}, BOTH_KINDS, {"subject": "cup", "token_count": 3}]
    few = {"num_inference_steps": STEPS, "seed": 9}
    jobs = [Job(*make_scene(seed=k), host.request(PROMPT, **{**few, **each})) for k, each in enumerate(given)]
    start = len(device.record)
    got, wanted = dm.inpaint_batch(jobs), host.inpaint_batch(jobs)
    steps = [entry for entry in device.record[start:] if entry.name == "step_after"]
    assert len(steps) == (1 + 3) * len(wanted[0].schedule), "one batch of three, and three alone"
    for one, other in zip(got, wanted, strict=True):
        assert_alike(*(np.asarray(each.images[0]).astype(int) for each in (one, other)))


def test_half_networks_stay_near_the_host(both: Any, host: DreamMix) -> None:
    dm, _, _ = both(networks={"half": True})
    for fields in ({}, BOTH_KINDS):
        got, wanted = paint(dm, **fields), paint(host, **fields)
        assert np.abs(got - wanted).max() <= 5 and (got != wanted).any()


def test_twins_paint_after_an_overflow(both: Any, host: DreamMix, caplog: Any) -> None:
    class Once(Overflowing):
        """The first call overflows, those of the twin do not."""

        def run(self, name: str, **arrays: Any) -> dict[str, Any]:
            outputs = super().run(name, **arrays)
            self.on = self.on and name != self.name
            return outputs

    dm, _, _ = both(runner=lambda engines: Once(engines, "vae_encoder"), networks={"twins": ("vae_encoder",)})
    assert_alike(paint(dm), paint(host))
    assert "painting again in float32" in caplog.text


def test_a_changed_subject_beside_tokens_is_stacked_anew(both: Any, host: DreamMix) -> None:
    dm, _, _ = both()
    before = paint(dm, **BOTH_KINDS)
    subject = dm._roster._subjects["mug"]
    dm.add_subject(replace(subject, scale=0.5 * subject.scale), "mug")
    assert (paint(dm, **BOTH_KINDS) != before).any()
    dm.add_subject(subject, "mug")
    np.testing.assert_array_equal(paint(dm, **BOTH_KINDS), before)
    for scale in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):  # more than are kept
        paint(dm, **BOTH_KINDS, subject_scale=scale, num_inference_steps=1)
    np.testing.assert_array_equal(paint(dm, **BOTH_KINDS), before)


# -- enrolling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residency", ["resident", "one-unet", "swap"])
def test_a_device_enrols_the_hosts_rows(simulated: Any, host: DreamMix, enrolled: Any, residency: str) -> None:
    dm, device, _ = simulated(residency=residency)
    paint(dm, subject="mug", **({"patched_fraction": 1.0} if residency == "one-unet" else {}))
    used = device.used
    found = dm.enroll(*draw_object(0), class_name="cup")
    assert device.used == used, "no memory is left, and none beside the plan's was taken"
    assert found.tokens is not None and found.source_sha256 == enrolled[0].source_sha256
    wanted = enrolled[0].tokens.rows
    np.testing.assert_allclose(found.tokens.rows, wanted, atol=1e-3 * np.abs(wanted).max())
    photos, masks = zip(*(draw_object(seed) for seed in (0, 1)), strict=True)
    pooled = [each.enroll(list(photos), list(masks), class_name="cup", name="pair").tokens for each in (dm, host)]
    np.testing.assert_allclose(pooled[0].rows, pooled[1].rows, atol=1e-3 * np.abs(wanted).max())
    assert_alike(*(paint(each, subject="pair", patched_fraction=1.0) for each in (dm, host)))
    host.remove_subject("pair")


def find_shares(rows: np.ndarray, wanted: np.ndarray) -> float:
    """Of how many rows another list has its like, in whatever order: near-equal scores may change places."""
    nearest = np.abs(rows[:, None] - wanted[None]).max(-1).min(1)
    return float(np.mean(nearest <= 0.02 * np.abs(wanted).max()))


def test_half_networks_enrol_nearly_the_same(simulated: Any, enrolled: Any) -> None:
    dm, _, _ = simulated(networks={"half": True})
    rows = dm.enroll(*draw_object(0), class_name="cup").tokens.rows
    assert find_shares(rows, enrolled[0].tokens.rows) >= 0.9
    assert find_shares(rows, enrolled[1].tokens.rows) < 0.5, "another object has other rows"


def test_nothing_is_bound_beyond_the_enrolment_and_weights_are_the_bases(both: Any) -> None:
    dm, device, networks = both()
    picture = paint(dm, subject="mug")
    start, bound = len(device.record), len(networks.bound)
    dm.enroll(*draw_object(0), class_name="cup", name="dish")
    ran = [entry.name for entry in device.record[start:] if entry.kind == "work"]
    assert ran == [*names_of_group("text"), "unet_kv", "vae_encoder", *names_of_group("tokens")]
    assert networks.bound[bound:] == ran
    assert not [entry for entry in device.record[start:] if entry.kind in ("allocate", "capture")]
    np.testing.assert_array_equal(paint(dm, subject="mug"), picture)
    np.testing.assert_array_equal(paint(dm, subject="dish"), paint(dm, subject="cup"))


def test_under_swap_an_enrolment_holds_one_network_at_a_time(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dm, _, networks = simulated(residency="swap")
    seen: list[tuple[str, tuple[str, ...]]] = []
    run = SimulatedNetworks.run

    def watch(self: SimulatedNetworks, name: str, arrays: Any) -> None:
        seen.append((name, networks.loaded))
        run(self, name, arrays)

    monkeypatch.setattr(SimulatedNetworks, "run", watch)
    dm.enroll(*draw_object(0), class_name="cup")
    assert len(seen) == 7 and all(held == (name,) for name, held in seen)


def test_a_paused_batch_gives_way(both: Any) -> None:
    dm, _, _ = both()
    events = dm.iterate(*make_scene(), dm.request(PROMPT, subject="mug", num_inference_steps=STEPS, seed=3))
    next(events)
    dm.enroll(*draw_object(0), class_name="cup", name="dish")
    with pytest.raises(EngineError, match="has begun another request"):
        list(events)
    assert_alike(paint(dm, subject="dish"), paint(dm, subject="cup"))


@pytest.mark.parametrize("backend", BOTH)
def test_plans_enrol_and_paint_any_number_of_a_span(
    loaded: Any,  # noqa: F811
    host: DreamMix,
    enrolled: Any,
    backend: str,
) -> None:
    dm, _ = loaded(backend, contexts=(77, (78, 125)), residency="resident")
    assert dm.studio.contexts == tuple(range(77, 126))
    found = dm.enroll(*draw_object(0), class_name="cup")
    wanted = enrolled[0].tokens.rows
    np.testing.assert_allclose(found.tokens.rows, wanted, atol=1e-3 * np.abs(wanted).max())
    dm.add_subject(enrolled[0])
    for count in (1, 24, 48):
        assert_alike(*(paint(each, token_count=count) for each in (dm, host)))
    assert_alike(*(paint(each, subject="mug") for each in (dm, host)))


@pytest.mark.parametrize("backend", BOTH)
def test_plans_of_single_lengths_name_the_span(loaded: Any, enrolled: Any, backend: str) -> None:  # noqa: F811
    dm, _ = loaded(backend, contexts=(77, 101), residency="resident")
    dm.add_subject(enrolled[0])
    paint(dm)
    with pytest.raises(
        InputError, match=r"condition has 82 rows, and these engines take 77, 101; .*--context 77,82,101`"
    ):
        paint(dm, token_count=5)


def test_plans_without_the_texts_own_length_cannot_enrol(both: Any) -> None:
    dm, _, _ = both(networks={"lengths": (101,)})
    with pytest.raises(
        InputError, match=r"class as a condition of 77 rows, and these engines take 101; .*--context 77,101`"
    ):
        dm.enroll(*draw_object(0), class_name="cup")
    assert paint(dm).any()


# -- memory -----------------------------------------------------------------------------------------------------------


def test_the_plan_counts_networks_factors_and_arrays(both: Any) -> None:
    dm, device, networks = both(context=77, pictures=2)
    studio = dm.studio
    assert studio.arena.nbytes == sum(measure_regions(studio.needs.list_regions(studio.plan)).values())
    rows = {row.name: row.bytes for row in studio.plan.rows}
    assert all(rows[name] == 1 << 20 and name in str(studio.plan) for name in names_of_group("tokens"))
    used = device.used
    paint(dm, token_count=48, num_images_per_prompt=2, prior="negative", **BOTH_KINDS)
    assert device.used == used, "48 rows have room beside the text that was asked for"
    without = Needs(networks, studio.options)
    assert studio.needs.most_context == without.most_context + 48 == 77 + 48
    more, less = (measure_regions(needs.shared)["factors"] for needs in (studio.needs, without))
    assert more > less
    config = studio.adapter.config
    lent = device_tokens.measure(networks, config)
    assert lent >= 4 * config.cells * config.width
    assert measure_regions(studio.needs.shared)["keys and values"] >= lent
    assert "mug" in studio.weights.resident and "" not in studio.weights.resident


def test_a_second_runtime_has_the_adapter_too(both: Any, enrolled: Any) -> None:
    dm, _, _ = both()
    with dm.another() as other:
        np.testing.assert_array_equal(paint(other), paint(dm))
        other.enroll(*draw_object(1), class_name="ball")
        assert_alike(paint(other, subject="ball"), paint(dm, subject="ball"))


# -- faults -----------------------------------------------------------------------------------------------------------


def test_an_overflow_while_enrolling_is_named_or_met_by_the_twin(simulated: Any, enrolled: Any) -> None:
    dm, _, _ = simulated(runner=lambda engines: Overflowing(engines, "token_proj"))
    with pytest.raises(NotFiniteError, match=r"token_proj gave .* while enrolling: build with another token adapter"):
        dm.enroll(*draw_object(0), class_name="cup")
    assert "cup" not in dm.subjects and paint(dm, subject="mug").any()

    class Once(Overflowing):
        def run(self, name: str, **arrays: Any) -> dict[str, Any]:
            outputs = super().run(name, **arrays)
            self.on = self.on and name != self.name
            return outputs

    made = {"runner": lambda engines: Once(engines, "vae_encoder"), "networks": {"twins": ("vae_encoder",)}}
    again, _, networks = simulated(**made)
    rows = again.enroll(*draw_object(0), class_name="cup").tokens.rows
    np.testing.assert_allclose(rows, enrolled[0].tokens.rows, atol=1e-3 * np.abs(rows).max())
    assert "vae_encoder_float32" in networks.bound


def test_memory_that_is_short_leaves_the_runtime_usable(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dm, device, networks = both()
    wanted = paint(dm)
    monkeypatch.setattr(networks, "workspace_bytes", lambda name, sides: device.total)
    with pytest.raises(OutOfMemoryError, match=r"(?s)were asked for.*The memory plan was"):
        dm.enroll(*draw_object(0), class_name="cup", name="dish")
    monkeypatch.undo()
    np.testing.assert_array_equal(paint(dm), wanted)


def test_slots_are_needed_for_the_adapter(simulated: Any, enrolled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedNetworks, "slots", lambda self, name: ())
    monkeypatch.setattr(SimulatedNetworks, "weights", lambda self, name: {})
    device = SimulatedDevice()
    with pytest.raises(FileFormatError, match="built with --no-slots"):
        simulated(device=device)[0].add_subject(enrolled[0])


def test_an_engine_without_an_adapter_says_how_to_build_it(simulated: Any, enrolled: Any) -> None:
    dm, device, networks = simulated()
    options = Options(largest_picture=128 * 128)
    with DreamMix.on_device(device, networks, dm.tokenizers, (), options) as plain:
        with pytest.raises(EngineError, match=r"no token adapter.*`dreammix-trt build --tokens ADAPTER`"):
            plain.enroll(*draw_object(0), class_name="cup")
        with pytest.raises(FileFormatError, match=r"and this engine has none"):
            plain.add_subject(enrolled[0])


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def test_on_a_gpu_it_enrols_and_paints_what_the_host_does(
    gpu: None, mug_engine: Path, host: DreamMix, enrolled: Any
) -> None:
    from dreammix_trt.core.onnx_runtime import import_onnxruntime

    if "CUDAExecutionProvider" not in import_onnxruntime().get_available_providers():
        pytest.skip("ONNX Runtime has no CUDA provider here")
    with DreamMix.load(mug_engine, device="cuda") as dm:
        rows = dm.enroll(*draw_object(0), class_name="cup").tokens.rows
        assert find_shares(rows, enrolled[0].tokens.rows) >= 0.9
        for subject in enrolled:
            dm.add_subject(subject)
        first = paint(dm)
        for fields in ({}, {"token_count": 5}, BOTH_KINDS):
            assert np.abs(paint(dm, **fields) - paint(host, **fields)).max() <= 6
        np.testing.assert_array_equal(paint(dm), first)
