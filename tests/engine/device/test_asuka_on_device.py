"""ASUKA on the device, with random weights: the host's pictures, in an order a GPU can keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from dreammix_trt.building import build
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError, NotFiniteError
from dreammix_trt.core.networks import names_of_group
from dreammix_trt.core.removal import REMOVAL
from dreammix_trt.core.schedule import STAGES
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.device.arena import measure_regions
from dreammix_trt.engine.device.memory_plan import Options
from dreammix_trt.engine.device.needs import Needs
from dreammix_trt.engine.dreammix import Job
from dreammix_trt.engine.drivers.simulated import RecordEntry, SimulatedDevice, SimulatedNetworks
from tests.engine.backends.test_tensorrt_on_device import BOTH
from tests.engine.conftest import make_scene
from tests.engine.device.test_loading import loaded  # noqa: F401
from tests.engine.device.test_studio import Overflowing, list_between
from tests.support.asuka import write_small_asuka

STEPS = 4
ROWS = 16  # of the small prior
LONG = "a red sks mug on a wooden table, " * 4
ALL: dict[str, Any] = {"prior": "negative", "decoder": "asuka"}


@pytest.fixture(scope="module")
def mug_engine(test_home: Path, small_base: Path, mug_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The neighbours' engine, with ASUKA's networks."""
    folder = tmp_path_factory.mktemp("asuka")
    louder = {f"alignment.{name}.weight": lambda weight: 30 * weight for name in ("context", "pooled")}
    write_small_asuka(folder / "asuka", BaseFiles.open(small_base), changes=louder)
    build(mug_lora, base=small_base, out=folder / "engine", name="mug", asuka=folder / "asuka")
    return folder / "engine"


def make_request(dm: DreamMix, fields: dict[str, Any]) -> Any:
    given = {"num_inference_steps": STEPS, "seed": 3, "prompt": "a red sks mug", **fields}
    return dm.request(given.pop("prompt"), **given)


def paint(dm: DreamMix, size: tuple[int, int] = (128, 128), seen: Any = None, **fields: Any) -> np.ndarray:
    result = dm.inpaint(*make_scene(*size), make_request(dm, fields), prior_image=seen)
    return np.stack([np.asarray(picture) for picture in result.images]).astype(int)


def assert_alike(got: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(got - wanted).max() <= 1 and np.mean(got != wanted) < 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"decoder": "asuka"},
        {"decoder": "asuka", "lcg_steps": 0},
        {"decoder": "asuka", "lcg_steps": STEPS, "lcg_mask_dilate": 5},
        {"decoder": "asuka", "lcg_mask_dilate": 7, "gch_background": "intermediate"},
        {"decoder": "asuka", "size": (256, 312)},
        {"decoder": "asuka", "size": (60, 90), "lcg_field": 0.8},
        {"decoder": "asuka", "mode": "reference"},
        {"prior": "negative"},
        {"prior": "negative", "prior_weight": 0.4, "substitute": ("blue",), "sharpness": 8.0, "guidance_rescale": 0.7},
        {"prior": "negative", "prompt": LONG, "sampler": "euler", "guidance_scale": 1.5, "size": (256, 312)},
        {"prior": "negative", "mode": "reference", "decoder": "asuka", "num_images_per_prompt": 2},
        {"prior": "concat"},
        {"prior": "concat", "guidance_scale": 1.0, "lcg_mask_dilate": 5, "lcg_steps": STEPS},
        {
            "prior": "concat",
            "prompt": LONG,
            "prior_weight": 1.6,
            "negative_prompt": "blurry",
            "num_images_per_prompt": 3,
        },
        {"prior": "concat", "lcg_steps": 0, "decoder": "asuka"},
        {**REMOVAL, "prompt": ""},
        {**REMOVAL, "prompt": "", "prior_weight": 1e-3, "num_images_per_prompt": 2},
        {**REMOVAL, "prompt": "", "lcg_fraction": 0.5, "patched_fraction": 0.7, "size": (60, 90)},
    ],
    ids=str,
)
def test_the_pictures_are_the_hosts(simulated: Any, host: DreamMix, fields: dict[str, Any]) -> None:
    dm, _, _ = simulated(pictures=2)
    wanted = paint(host, **fields)
    for _ in range(2):  # plainly, then as graphs
        assert_alike(paint(dm, **fields), wanted)
    plain = {**fields, "prior": None, "prior_weight": 1.0, "decoder": "vae"}
    assert np.abs(paint(dm, **plain) - wanted).max() > 3, "ASUKA changes nothing"


@pytest.mark.parametrize("residency", ["resident", "one-unet", "swap"])
def test_every_residency_paints_it(simulated: Any, host: DreamMix, residency: str) -> None:
    dm, _, _ = simulated(residency=residency, pictures=2)
    raw = {"patched_fraction": 1.0} if residency == "one-unet" else {}
    for fields in ({**ALL, **raw}, {"prior": "concat", "decoder": "asuka", **raw}):
        assert_alike(paint(dm, num_images_per_prompt=2, **fields), paint(host, num_images_per_prompt=2, **fields))
    assert_alike(paint(dm, prompt="", **REMOVAL), paint(host, prompt="", **REMOVAL))


def test_under_swap_a_phase_has_only_what_the_plan_counts(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dm, _, networks = simulated(residency="swap")
    seen: set[tuple[str, ...]] = set()
    run = SimulatedNetworks.run

    def watch(self: SimulatedNetworks, name: str, arrays: Any) -> None:
        seen.add(networks.loaded)
        run(self, name, arrays)

    monkeypatch.setattr(SimulatedNetworks, "run", watch)
    paint(dm, **ALL)
    assert {("asuka_prior",), ("asuka_decoder",)} <= seen
    most = max(len(names) for names in seen) << 20  # every network's weights count as a MiB
    assert most <= next(row.bytes for row in dm.studio.plan.rows if row.name == "weights")
    groups = [set(names_of_group(group)) for group in ("text", "picture", "unet", "unet_raw", "asuka")]
    assert all(any(set(names) <= group for group in groups) for names in seen)


@pytest.mark.parametrize("backend", BOTH)
def test_plans_that_were_built_for_the_lengths_paint_it(
    loaded: Any,  # noqa: F811
    host: DreamMix,
    backend: str,
) -> None:
    """Two pictures: each half of their rows has an address that TensorRT takes, and a profile that holds it."""
    dm, _ = loaded(backend, contexts=(ROWS, 77, 77 + ROWS), pictures=2, residency="resident")
    assert dm.studio.contexts == (ROWS, 77, 77 + ROWS)
    for fields in (ALL, {"prior": "concat"}, {**REMOVAL, "prompt": ""}):
        assert_alike(*(paint(each, num_images_per_prompt=2, **fields) for each in (dm, host)))


def test_half_networks_stay_near_the_host(simulated: Any, host: DreamMix) -> None:
    dm, _, _ = simulated(networks={"half": True})
    for fields in ({**ALL, "lcg_steps": STEPS}, {"prior": "concat"}):  # a random decoder's picture is noise to encode
        got, wanted = paint(dm, **fields), paint(host, **fields)
        assert np.abs(got - wanted).max() <= 5 and (got != wanted).any()


def test_another_picture_for_the_prior(simulated: Any, host: DreamMix) -> None:
    dm, _, _ = simulated()
    paper = np.full((128, 128, 3), 255, np.uint8)
    for fields in ({**REMOVAL, "prompt": ""}, {"prior": "negative"}):
        got = paint(dm, seen=paper, **fields)
        assert_alike(got, paint(host, seen=paper, **fields))
        assert (got != paint(dm, **fields)).any()


def test_pictures_of_one_batch_have_their_own_prior_and_weight(simulated: Any, host: DreamMix) -> None:
    dm, _, _ = simulated(pictures=3)
    jobs = []
    for number, prior_image in enumerate((None, make_scene(seed=9)[0], None)):
        fields = {**ALL, "prior_weight": 0.5 + 0.5 * number, "seed": number, "lcg_mask_dilate": 2 * number}
        job = Job(*make_scene(seed=number), make_request(host, fields))
        jobs.append(job._replace(prior_image=prior_image))
    for got, wanted in zip(dm.inpaint_batch(jobs), host.inpaint_batch(jobs), strict=True):
        assert_alike(np.asarray(got.images[0]).astype(int), np.asarray(wanted.images[0]).astype(int))


def test_what_a_batch_must_share(simulated: Any) -> None:
    dm, _, _ = simulated(pictures=2)
    kinds = [{}, {"prior": "negative"}, {"prior": "concat"}, {"decoder": "asuka"}, {**ALL, "prior_weight": 0.1}, ALL]
    works = [dm._lay_out(Job(*make_scene(), make_request(dm, fields))) for fields in kinds]
    assert len({shape for each in works for shape in each.shapes}) == 5  # the weight is data
    with pytest.raises(InputError, match="stages, prior and decoder"):
        next(dm.runtime.paint([each.works[0] for each in works[:2]]))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Frames with a side above 130 pixels go through the VAE in tiles of 64."""
    from dreammix_trt.engine.canvas import tiles

    monkeypatch.setattr(tiles, "ABOVE", 130)
    monkeypatch.setattr(tiles.tiles_of, "__kwdefaults__", {"side": 8, "overlap": 3})
    yield


@pytest.mark.parametrize("half", [False, True])
def test_tiles_hold_latent_picture_and_mask(simulated: Any, host: DreamMix, small_tiles: None, half: bool) -> None:
    dm, device, _ = simulated(networks={"half": half}, pictures=2)
    fields = {"decoder": "asuka", "size": (100, 320), "num_images_per_prompt": 2, "lcg_mask_dilate": 3}
    wanted = paint(host, **fields)
    for _ in range(2):
        start = len(device.record)
        assert np.abs(paint(dm, **fields) - wanted).max() <= (8 if half else 1)
    taken = [entry for entry in device.record[start:] if entry.name == "take_tile" and entry.graph is not None]
    places = [entry.arrays["out"] for entry in taken]
    assert {place.shape[1] for place in places} == {1, 3, 4}
    assert np.abs(paint(dm, **{**fields, "decoder": "vae"}) - wanted).max() > 8


def test_previews_are_the_hosts(simulated: Any, host: DreamMix) -> None:
    dm, _, _ = simulated()
    events = [each.iterate(*make_scene(200, 120), make_request(each, ALL)) for each in (dm, host)]
    for one, other in zip(*events, strict=True):
        for whole in (True, False):
            shown, wanted = (np.asarray(event.preview(whole)).astype(int) for event in (one, other))
            assert np.abs(shown - wanted).max() <= 1
    assert_alike(*(np.asarray(event.result.images[0]).astype(int) for event in (one, other) if event.result))


def test_stages_are_shown_as_they_were_decoded(simulated: Any, host: DreamMix) -> None:
    dm, _, _ = simulated()
    results = [each.inpaint(*make_scene(), make_request(each, ALL), keep_stages=True).stages for each in (dm, host)]
    for name in ("local result", "last result"):
        assert_alike(*(np.asarray(stages[name]).astype(int) for stages in results))


# -- what is enqueued -------------------------------------------------------------------------------------------------


def test_nothing_crosses_to_the_host_and_nothing_waits(simulated: Any, host: DreamMix) -> None:
    """Weights and pictures are data: another request replays the graphs of the first."""
    dm, device, _ = simulated()
    paint(dm, **ALL)
    start = len(device.record)
    other: dict[str, Any] = {**ALL, "prior_weight": 1.7, "seed": 8, "guidance_scale": 2.0, "num_inference_steps": 5}
    assert_alike(paint(dm, seen=make_scene(seed=4)[0], **other), paint(host, seen=make_scene(seed=4)[0], **other))
    kinds = Counter(entry.kind for entry in list_between(device, start))
    assert not kinds.keys() & {"upload", "download", "allocate", "pinned", "free", "capture", "synchronize"}
    again = [entry.name for entry in device.record[start:] if entry.kind == "work"]
    assert Counter(again)["asuka_prior"] == Counter(again)["asuka_decoder"] == 2 and "vae_decoder" not in again
    assert not [entry for entry in device.record[start:] if entry.kind in ("capture", "allocate")]


def list_step(device: SimulatedDevice, start: int) -> list[RecordEntry]:
    """What the last step enqueued."""
    entries = [entry for entry in device.record[start:] if entry.kind not in ("launch", "mark")]
    last = max(k for k, entry in enumerate(entries) if entry.name == "step_after")
    first = max(k for k, entry in enumerate(entries[:last]) if entry.name == "step_before")
    return entries[first : last + 1]


def test_a_step_of_two_calls_is_two_launches_copies_and_two_runs(simulated: Any) -> None:
    dm, device, _ = simulated(pictures=2)
    for _ in range(2):
        start = len(device.record)
        paint(dm, num_images_per_prompt=2, **ALL)
    step = list_step(device, start)
    assert len({entry.graph for entry in step}) == 1
    assert Counter((entry.kind, entry.name) for entry in step) == {
        ("kernel", "step_before"): 1,
        ("copy", ""): 2 * 2 * 4,  # pictures, calls, three inputs and an output
        ("work", "unet"): 2,
        ("kernel", "step_after"): 1,
    }
    for fields in ({"prior": "concat"}, {**REMOVAL, "prompt": ""}):
        start = len(device.record)
        paint(dm, **fields)
        assert [entry.name for entry in list_step(device, start)][::2] == ["step_before", "step_after"]


def test_what_attends_runs_for_both_lengths_once_a_stage(simulated: Any) -> None:
    dm, device, _ = simulated()
    start = len(device.record)
    result = dm.inpaint(*make_scene(), make_request(dm, {"prior": "negative"}))
    stages = {(step.stage, step.network) for step in result.schedule}
    ran = Counter(entry.name for entry in device.record[start:] if entry.kind == "work")
    assert ran["unet_kv"] + ran["unet_raw_kv"] == 2 * len(stages) and ran["unet"] + ran["unet_raw"] == 2 * STEPS


def test_a_removal_needs_no_text_encoder(simulated: Any) -> None:
    dm, device, _ = simulated()
    start = len(device.record)
    dm.remove(*make_scene(), num_inference_steps=2)
    ran = Counter(entry.name for entry in device.record[start:] if entry.kind == "work")
    assert "text_encoder" not in ran and ran["asuka_prior"] == 2  # once a stage
    assert {"prior", "start", "loop", "finish"} <= dm.studio.timings.keys()


# -- memory -----------------------------------------------------------------------------------------------------------


def test_the_plan_counts_all_that_they_take(simulated: Any) -> None:
    dm, device, networks = simulated(pictures=2, context=200)
    studio = dm.studio
    assert studio.arena.nbytes == sum(measure_regions(studio.needs.list_regions(studio.plan)).values())
    rows = {row.name: row.bytes for row in studio.plan.rows}
    assert rows["asuka_prior"] == rows["asuka_decoder"] == 1 << 20
    used = device.used
    for fields in (ALL, {"prior": "concat", "decoder": "asuka"}, {**REMOVAL, "prompt": ""}):
        paint(dm, num_images_per_prompt=2, **fields)
    assert device.used == used, "no more than the plan's was allocated"
    without = Needs(_Without(networks), studio.options)  # type: ignore[arg-type]
    assert not [name for name in without.shared if "asuka" in name or "prior" in name or "negative" in name]
    more = {name: region for name, region in studio.needs.shared.items() if name not in without.shared}
    assert {"asuka_decoder picture", "seen mask", "prior pictures", "prior tokens", "negative text"} <= more.keys()
    assert more["prior pictures"][0] == (2, len(STAGES), 4, 16, 16)


class _Without:
    """The networks of a base that lacks ASUKA's."""

    def __init__(self, networks: Any) -> None:
        self._networks = networks

    def __contains__(self, name: str) -> bool:
        return name in self._networks and not name.startswith("asuka")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._networks, name)


def test_both_lengths_have_room_for_keys_and_values_at_the_longest_text(simulated: Any, host: DreamMix) -> None:
    """A prior as long as all memory is set aside for, beside a text of that length."""
    dm, _, _ = simulated(context=77, pictures=2)
    needs = dm.studio.needs
    longest = replace(needs.largest, against=77, context=77)
    assert {sides.rows for sides in longest.calls} == {2}
    dm.studio.rooms.enter(longest)
    assert_alike(paint(dm, num_images_per_prompt=2, **ALL), paint(host, num_images_per_prompt=2, **ALL))


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_prior_that_overflows_is_named(simulated: Any) -> None:
    broken: list[Overflowing] = []
    dm, _, _ = simulated(runner=lambda engines: broken.append(Overflowing(engines, "asuka_prior")) or broken[-1])
    for fields in ({"prior": "negative"}, {"prior": "concat"}, {**REMOVAL, "prompt": ""}):
        with pytest.raises(NotFiniteError, match=r"asuka_prior gave .*another ASUKA folder"):
            paint(dm, **fields)
    assert paint(dm, decoder="asuka").any(), "who does not ask it is not concerned"
    broken[0].on = False
    assert paint(dm, **ALL).any()


def test_a_decoder_that_overflows_is_replaced_by_its_twin(simulated: Any, host: DreamMix, caplog: Any) -> None:
    class Twinned(Overflowing):
        """The first call overflows, those of the twin do not."""

        def run(self, name: str, **arrays: Any) -> dict[str, Any]:
            outputs = super().run(name, **arrays)
            self.on = self.on and name != self.name
            return outputs

    made = {"runner": lambda engines: Twinned(engines, "asuka_decoder")}
    dm, _, _ = simulated(**made, networks={"twins": ("asuka_decoder", "vae_encoder", "vae_decoder"), "half": True})
    got = paint(dm, **ALL, lcg_steps=STEPS)
    assert "asuka_decoder gave values that are not numbers in float16" in caplog.text
    assert np.abs(got - paint(host, **ALL, lcg_steps=STEPS)).max() <= 5
    alone, _, _ = simulated(runner=lambda engines: Overflowing(engines, "asuka_decoder"))
    with pytest.raises(NotFiniteError, match=r"asuka_decoder gave .*no float32 twin"):
        paint(alone, **ALL)
    assert paint(alone).any(), "the VAE's own decodes"


def test_lengths_that_do_not_fit_are_refused_with_the_remedy(simulated: Any) -> None:
    dm, _, _ = simulated(networks={"lengths": (77,)})
    with pytest.raises(InputError, match=r"condition has 16 rows, and these engines take 77.*--context 16,77"):
        paint(dm, prior="negative")
    with pytest.raises(InputError, match=r"condition has 93 rows.*--context 77,93"):
        paint(dm, prior="concat")
    assert paint(dm, decoder="asuka").any()
    clean, _, _ = simulated(networks={"lengths": (ROWS, 154)})
    assert paint(clean, prompt="", **REMOVAL).any(), "a removal needs no length for a text"
    with pytest.raises(InputError, match=r"condition has 170 rows.*--context 16,154,170"):
        paint(clean, prior="concat")
    small, _, _ = simulated(context=80)
    with pytest.raises(InputError, match=r"condition has 93 rows, .*loaded for 80.*context=93"):
        paint(small, prior="concat")
    exact, _, _ = simulated(networks={"lengths": (77, 77 + ROWS)})
    assert paint(exact, prior="concat").any()


def test_an_engine_without_the_parts_says_how_to_build_it(simulated: Any) -> None:
    dm, device, _ = simulated()
    without = SimulatedNetworks(device, _Without(dm.studio.shared._runner))
    options = Options(largest_picture=128 * 128)
    with DreamMix.on_device(device, without, dm.tokenizers, (), options) as plain:
        with pytest.raises(InputError, match=r"has no asuka_prior: build it again with `--asuka FOLDER`"):
            plain.remove(*make_scene())
        with pytest.raises(InputError, match=r"decoder is 'asuka', but .* has no asuka_decoder: build it again"):
            paint(plain, decoder="asuka", prompt="a mug")
        assert paint(plain, prompt="a mug").any()


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def test_on_a_gpu_it_paints_what_the_host_paints(gpu: None, mug_engine: Path, host: DreamMix) -> None:
    from dreammix_trt.core.onnx_runtime import import_onnxruntime

    if "CUDAExecutionProvider" not in import_onnxruntime().get_available_providers():
        pytest.skip("ONNX Runtime has no CUDA provider here")
    with DreamMix.load(mug_engine, device="cuda") as dm:
        for fields in (ALL, {"prior": "concat", "decoder": "asuka"}, {**REMOVAL, "prompt": ""}):
            assert np.abs(paint(dm, **fields) - paint(host, **fields)).max() <= 6
