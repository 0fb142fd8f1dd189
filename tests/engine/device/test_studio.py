"""The whole runtime on the simulated device: the same pictures as the host, in an order a GPU can keep."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.errors import DeviceError, EngineError, InputError, NotFiniteError, OutOfMemoryError
from dreammix_trt.core.request import Request
from dreammix_trt.core.seam import Array
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.device.records import MERGE
from dreammix_trt.engine.dreammix import Job
from dreammix_trt.engine.drivers.simulated import RecordEntry, SimulatedDevice
from tests.engine.conftest import make_scene

STEPS = 6


def paint_pixels(dm: DreamMix, size: tuple[int, int] = (128, 128), **fields: Any) -> np.ndarray:
    image, mask = make_scene(*size)
    fields = {"num_inference_steps": STEPS, "seed": 3, "prompt": "a red sks mug", **fields}
    return np.stack([np.asarray(picture) for picture in dm.inpaint(image, mask, **fields).images])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"substitute": ("blue",)},
        {"lcg_steps": 0},
        {"lcg_steps": STEPS},
        {"guidance_scale": 1.0},
        {"negative_prompt": None},
        {"gch_background": "intermediate", "soft_blending": True},
        {"vae_sample": True, "blend_noise": "fixed"},
        {"guidance_rescale": 0.7, "blend_output": True, "sharpness": 8.0},
        {"sharpness": 0.0, "strength": 0.6, "lcg_mask_dilate": 5},
        {"sampler": "euler", "guidance_scale": 1.5},
        {"sampler": "lcm", "num_inference_steps": 4, "subject": ""},
        {"mode": "reference"},
        {"size": (256, 312)},
        {"size": (256, 312), "feather": 21},
        {"size": (60, 90), "lcg_field": 0.8},
        {"num_images_per_prompt": 2},
    ],
    ids=str,
)
def test_the_pictures_are_the_hosts(simulated: Any, host: DreamMix, fields: dict[str, Any]) -> None:
    dm, _, _ = simulated()
    got, expected = paint_pixels(dm, **fields).astype(int), paint_pixels(host, **fields).astype(int)
    assert np.abs(got - expected).max() <= 1
    assert np.mean(got != expected) < 1e-3


def test_half_networks_stay_near_the_host(simulated: Any, host: DreamMix) -> None:
    dm, _, _ = simulated(networks={"half": True})
    got, expected = paint_pixels(dm).astype(int), paint_pixels(host).astype(int)
    assert np.abs(got - expected).max() <= 4
    assert (got != expected).any()  # float16 was really between


def list_between(device: SimulatedDevice, start: int = 0) -> list[RecordEntry]:
    """What was enqueued from the last upload to the first download after `start`."""
    entries = device.record[start:]
    uploads = [k for k, entry in enumerate(entries) if entry.kind == "upload"]
    downloads = [k for k, entry in enumerate(entries) if entry.kind == "download"]
    return entries[uploads[-1] + 1 : downloads[0]]


def test_nothing_crosses_to_the_host_and_nothing_waits(simulated: Any) -> None:
    dm, device, _ = simulated()
    paint_pixels(dm)
    start = len(device.record)
    paint_pixels(dm, seed=4)
    kinds = Counter(entry.kind for entry in list_between(device, start))
    assert not kinds.keys() & {"upload", "download", "allocate", "pinned", "free", "capture", "synchronize"}
    attends = 3  # the raw UNet's in the local stage, both in the global one
    assert kinds["launch"] == 1 + attends + STEPS + 2 + 1  # start, ..., steps, both halves of the hand-over, finish


def test_keys_and_values_are_made_once_for_each_stage_and_unet(simulated: Any) -> None:
    dm, device, _ = simulated()
    for _ in range(2):  # plainly, then replayed
        start = len(device.record)
        result = dm.inpaint(*make_scene(), "a red sks mug", num_inference_steps=STEPS, seed=3)
        wanted, before = [], None
        for step in result.schedule:
            if (step.stage, step.network) != before:
                wanted.append(f"{step.network}_kv")
            wanted.append(step.network)
            before = step.stage, step.network
        ran = [entry.name for entry in device.record[start:] if entry.kind == "work" and entry.name.startswith("unet")]
        assert ran == wanted and len(wanted) == STEPS + 3


@pytest.mark.parametrize("name", ["unet_kv", "unet_raw_kv"])
def test_keys_and_values_that_overflow_are_told(simulated: Any, name: str) -> None:
    broken: list[Overflowing] = []
    dm, _, _ = simulated(runner=lambda engines: broken.append(Overflowing(engines, name)) or broken[-1])
    with pytest.raises(NotFiniteError, match=f"^{name} gave"):
        paint_pixels(dm)
    broken[0].on = False
    assert paint_pixels(dm).any()


def test_a_step_is_two_launches_around_the_network(simulated: Any) -> None:
    dm, device, _ = simulated()
    paint_pixels(dm)
    start = len(device.record)
    paint_pixels(dm, seed=5, prompt="another sks mug")
    steps: dict[int | None, list[str]] = {}
    launched = Counter(entry.graph for entry in list_between(device, start) if entry.kind == "launch")
    for entry in list_between(device, start):
        if entry.graph is not None and entry.kind != "launch":
            steps.setdefault(entry.graph, []).append(entry.name)
    whole = [names for graph, names in steps.items() if "step_before" in names for _ in range(launched[graph])]
    assert len(whole) == 2 * STEPS or len(whole) == STEPS
    assert {tuple(names[:3]) for names in steps.values() if "step_before" in names} == {
        ("step_before", "unet", "step_after"),
        ("step_before", "unet_raw", "step_after"),
    }


def test_graphs_serve_any_picture_prompt_seed_subject_and_number_of_steps(
    simulated: Any, host: DreamMix, cup: Path
) -> None:
    dm, device, _ = simulated()
    dm.add_subject(cup)
    paint_pixels(dm)
    start = len(device.record)
    other: dict[str, Any] = {
        "size": (120, 120),
        "seed": 1 << 40,
        "prompt": "a photo of a sks mug on grass",
        "num_inference_steps": 9,
        "guidance_scale": 2.0,
        "substitute": ("blue",),
    }
    with DreamMix.load(cup, threads=1) as cups:
        expected = paint_pixels(cups, **other)
    assert np.abs(paint_pixels(dm, subject="cup", **other).astype(int) - expected).max() <= 1
    assert not [entry for entry in device.record[start:] if entry.kind == "capture"]


@pytest.mark.parametrize("way", ["device", "host", "swap"])
def test_swapping_subjects_and_back_is_exact(simulated: Any, host: DreamMix, cup: Path, way: str) -> None:
    """Wherever the base's own weights are. Beside them a swap is a table and one launch, and nothing is captured."""
    options: dict[str, Any] = {"networks": {"half": True}, "residency": "swap" if way == "swap" else "resident"}
    dm, device, networks = simulated(**options)
    if way == "host":
        dm, device, networks = simulated(device=SimulatedDevice(dm.studio.plan.needed - 1), **options)
    dm.add_subject(cup)
    pictures = {}
    for subject in ("mug", "cup", "", "mug"):
        start, before = len(device.record), replace(dm.studio.weights.count)
        pixels = paint_pixels(dm, subject=subject)
        assert (pictures.setdefault(subject, pixels) == pixels).all()
    assert dm.studio.plan.pristine == ("device" if way == "device" else "host")
    assert len({each.tobytes() for each in pictures.values()}) == 3
    assert np.abs(pixels.astype(int) - paint_pixels(host, subject="mug")).max() <= 4
    count, sizes = dm.studio.weights.count, {name: weight.nbytes for name, weight in networks.weights("unet").items()}
    if way == "device":
        assert count.launches - before.launches == 1
        assert count.uploaded - before.uploaded == (count.slots - before.slots) * MERGE.itemsize
        kinds = [(entry.kind, entry.name) for entry in device.record[start:] if entry.kind != "mark"]
        assert kinds.index(("kernel", "merge_weights")) == kinds.index(("upload", "")) + 1
        assert not [kind for kind, _ in kinds if kind in ("capture", "allocate", "pinned", "free")]
    elif way == "host":
        assert 0 < count.uploaded - before.uploaded < 2 * sum(sizes.values())


def _writes(entry: RecordEntry, region: Array) -> bool:
    targets = [array for name, array in entry.arrays.items() if name in ("to", "out")]
    return any(region.pointer <= array.pointer < region.pointer + region.nbytes for array in targets)


def test_the_merged_weights_never_move_and_nothing_but_the_merge_writes_them(simulated: Any, cup: Path) -> None:
    dm, device, _ = simulated()
    dm.add_subject(cup)
    assert dm.studio is not None
    arrays = dict(dm.studio.weights.arrays("unet"))
    start = len(device.record)
    for subject in ("mug", "cup"):
        paint_pixels(dm, subject=subject)
    assert dm.studio.weights.arrays("unet") == arrays
    assert all(room.arrays["unet"].items() >= arrays.items() for room in dm.studio.rooms._kept.values())
    whole = dm.studio.arena["unet slots"]
    assert not [entry for entry in device.record[start:] if _writes(entry, whole)]


def test_a_batch_has_one_subject_and_each_is_merged_once(simulated: Any, cup: Path) -> None:
    image, mask = make_scene()
    request = Request("a red sks mug", num_inference_steps=STEPS, seed=3)
    together, device, _ = simulated(pictures=2)
    alone, _, _ = simulated()
    for dm in (together, alone):
        dm.add_subject(cup)
    order = [("mug", 3), ("cup", 8), ("mug", 4), ("", 1), ("cup", 9)]
    jobs = [Job(image, mask, request.replace(subject=name, seed=seed)) for name, seed in order]
    assert together.studio is not None
    start, before = len(device.record), together.studio.weights.count.launches
    both = [np.asarray(result.images[0]).astype(int) for result in together.inpaint_batch(jobs)]
    unets = [entry for entry in device.record[start:] if entry.kind == "work" and entry.name in ("unet", "unet_raw")]
    assert len(unets) == 3 * STEPS  # the mugs in each call, then the cups, then the one without a subject
    assert together.studio.weights.count.launches - before == 3
    singly = [np.asarray(result.images[0]).astype(int) for result in alone.inpaint_batch(jobs)]
    for got, expected in zip(both, singly, strict=True):
        assert np.abs(got - expected).max() <= 1
    works = [together._lay_out(job).works[0] for job in jobs[:2]]
    with pytest.raises(InputError, match="one subject at one strength"):
        next(together.runtime.paint(works))


def test_strengths_are_the_hosts(simulated: Any, host: DreamMix) -> None:
    """One at a time, and several strengths of one subject asked for at once."""
    dm, _, _ = simulated(subjects=1)
    scales = (1.0, 0.5, 0.0, 2.0, 1.0)
    expected = [paint_pixels(host, subject="mug", subject_scale=scale).astype(int) for scale in scales]
    got = [paint_pixels(dm, subject="mug", subject_scale=scale).astype(int) for scale in scales]
    for one, other in zip(got, expected, strict=True):
        assert np.abs(one - other).max() <= 1
    np.testing.assert_array_equal(got[0], got[4])
    np.testing.assert_array_equal(got[2], paint_pixels(dm, subject="").astype(int))
    assert len({each.tobytes() for each in got}) == 4
    together, _, _ = simulated(pictures=2, subjects=1)
    image, mask = make_scene()
    request = Request("a red sks mug", num_inference_steps=STEPS, seed=3, subject="mug")
    results = together.inpaint_batch([Job(image, mask, request.replace(subject_scale=scale)) for scale in scales[:4]])
    singly = dm.inpaint_batch([Job(image, mask, request.replace(subject_scale=scale)) for scale in scales[:4]])
    for result, alone in zip(results, singly, strict=True):
        difference = np.asarray(result.images[0]).astype(int) - np.asarray(alone.images[0])
        assert np.abs(difference).max() <= 1


def test_a_removed_subject_leaves_the_device(simulated: Any, host: DreamMix, cup: Path) -> None:
    dm, _, _ = simulated(subjects=2)
    first = paint_pixels(dm, subject="mug", subject_scale=0.5)
    dm.add_subject(cup)
    second = paint_pixels(dm, subject="cup")
    dm.remove_subject("mug")
    assert dm.studio is not None and dm.studio.weights.resident == ("cup",)
    np.testing.assert_array_equal(paint_pixels(dm), second)  # the default now
    with pytest.raises(InputError, match="loaded are: 'cup'"):
        paint_pixels(dm, subject="mug")
    dm.remove_subject("cup")
    assert not dm.studio.weights.resident
    assert np.abs(paint_pixels(dm).astype(int) - paint_pixels(host, subject="")).max() <= 1
    dm.add_subject(cup, "mug")  # another one of the first one's name
    np.testing.assert_array_equal(paint_pixels(dm), second)
    assert not np.array_equal(paint_pixels(dm, subject_scale=0.5), first)


def test_a_count_is_painted_in_batches_and_equals_its_seeds(simulated: Any, host: DreamMix) -> None:
    dm, _, _ = simulated(pictures=2)
    got, expected = (paint_pixels(each, num_images_per_prompt=3).astype(int) for each in (dm, host))
    assert got.shape[0] == 3
    assert np.abs(got - expected).max() <= 1


def test_events_tell_each_step_and_preview_it(simulated: Any, host: DreamMix) -> None:
    dm, _, _ = simulated()
    image, mask = make_scene()
    told = []
    for one, other in zip(
        *(each.iterate(image, mask, "a red sks mug", num_inference_steps=STEPS) for each in (dm, host)), strict=True
    ):
        assert (one.index, one.total, one.stage, one.picture) == (other.index, other.total, other.stage, other.picture)
        for whole in (True, False):
            seen, wanted = (np.asarray(event.preview(whole)).astype(int) for event in (one, other))
            assert np.abs(seen - wanted).max() <= 1
        told.append(one.index)
    assert told == list(range(STEPS)) and one.result is not None
    assert {"text", "start", "loop", "hand over", "finish", "download"} <= one.result.timings.keys()


def test_leaving_the_iteration_stops_the_work_and_harms_nothing(simulated: Any) -> None:
    dm, device, _ = simulated()
    whole = paint_pixels(dm)
    image, mask = make_scene(seed=9)
    start = len(device.record)
    for event in dm.iterate(image, mask, "a green sks mug", num_inference_steps=STEPS):
        if event.index == 1:
            break
    del event
    gc.collect()
    unets = [entry for entry in device.record[start:] if entry.kind == "work" and entry.name in ("unet", "unet_raw")]
    assert len(unets) == 2
    assert (paint_pixels(dm) == whole).all()


class Overflowing:
    """Host networks of which one gives infinities, unless asked as its float32 twin."""

    def __init__(self, runner: Any, name: str) -> None:
        self._runner, self.name, self.on = runner, name, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def __contains__(self, name: str) -> bool:
        return name in self._runner

    def run(self, name: str, **arrays: Any) -> dict[str, Any]:
        outputs = self._runner.run(name, **arrays)
        if name == self.name and self.on:
            for value in outputs.values():
                value[..., :1] = np.inf
        return outputs


@pytest.mark.parametrize("name", ["vae_encoder", "vae_decoder", "unet", "text_encoder_2", "inpaint_head"])
def test_a_network_without_a_twin_that_overflows_is_named(simulated: Any, name: str) -> None:
    broken: list[Overflowing] = []
    dm, _, _ = simulated(runner=lambda engines: broken.append(Overflowing(engines, name)) or broken[-1])
    with pytest.raises(NotFiniteError, match=f"{name}.*there is no float32 twin"):
        paint_pixels(dm)
    broken[0].on = False
    assert paint_pixels(dm).any()


class Twinned(Overflowing):
    """The plain network overflows, its twin does not."""

    def __init__(self, runner: Any, name: str) -> None:
        super().__init__(runner, name)
        self.calls: list[str] = []


def test_an_overflow_is_painted_again_in_float32(
    simulated: Any, host: DreamMix, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreammix_trt.engine.drivers.simulated import SimulatedNetworks

    plain = SimulatedNetworks.run

    def run(self: Any, name: str, arrays: Any) -> None:
        plain(self, name, arrays)
        if name == "vae_decoder":
            self._device.view(arrays["image"])[...] = np.nan

    monkeypatch.setattr(SimulatedNetworks, "run", run)
    dm, _, networks = simulated(networks={"half": True, "twins": ("vae_encoder", "vae_decoder")})
    got = paint_pixels(dm).astype(int)
    assert np.abs(got - paint_pixels(host)).max() <= 4
    assert "vae_decoder_float32" in networks.bound
    assert "vae_decoder gave values that are not numbers" in caplog.text


@pytest.mark.parametrize("strategy", ["swap", "one-unet"])
def test_weights_leave_when_the_plan_says_so(simulated: Any, host: DreamMix, strategy: str) -> None:
    dm, device, _ = simulated(residency=strategy)
    expected = paint_pixels(host, **({"patched_fraction": 1.0} if strategy == "one-unet" else {})).astype(int)
    assert np.abs(paint_pixels(dm) - expected).max() <= 1
    if strategy == "one-unet":
        image, mask = make_scene()
        assert dm.inpaint(image, mask, "a sks mug", num_inference_steps=1).request.patched_fraction == 1
    if strategy == "swap":
        assert not [entry for entry in device.record if entry.kind == "capture"]
        assert dm.studio is not None and dm.studio.timings["weights"] >= 0


def test_too_little_memory_is_told_with_the_plan(simulated: Any) -> None:
    with pytest.raises(OutOfMemoryError, match=r"memory plan(.|\n)*workspace"):
        simulated(device=SimulatedDevice(64 << 20))


def test_a_request_that_finds_no_memory_leaves_the_runtime_usable(
    simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dm, _, networks = simulated()
    before = paint_pixels(dm)
    bind = networks.bind

    def full(*arguments: Any, **named: Any) -> Any:
        raise OutOfMemoryError("the device has no memory left")

    monkeypatch.setattr(networks, "bind", full)
    with pytest.raises(OutOfMemoryError, match=r"no memory left\n.*plan"):
        paint_pixels(dm, size=(200, 120))
    monkeypatch.setattr(networks, "bind", bind)
    assert (paint_pixels(dm) == before).all()


def test_shapes_beyond_the_kept_ones_run_uncaptured(simulated: Any, host: DreamMix) -> None:
    dm, device, _ = simulated(shapes=2)
    sizes = [(128, 128), (128, 192), (200, 120)]
    for size in sizes:
        paint_pixels(dm, size=size)
    assert dm.studio is not None and dm.studio.shapes == 2
    start = len(device.record)
    assert np.abs(paint_pixels(dm, size=(128, 128)).astype(int) - paint_pixels(host, size=(128, 128))).max() <= 1
    assert [entry for entry in device.record[start:] if entry.kind == "launch"]


def test_bad_requests_are_refused_before_anything_is_uploaded(simulated: Any) -> None:
    dm, device, _ = simulated(largest_picture=130 * 130)
    start = len(device.record)
    for side, fields, text in (
        (140, {}, "largest_picture=19600"),
        (120, {"subject": "teapot"}, "'teapot'"),
        (120, {"noise": object()}, "device='cpu'"),
        (120, {"substitute": ("x",), "prompt": "a mug"}, "'sks'"),
        (120, {"prompt": "a sks mug " * 400}, "tokens long"),
    ):
        with pytest.raises(InputError, match=text):
            dm.inpaint(*make_scene(side, side), **{"prompt": "a sks mug", **fields})
    assert len(device.record) == start


def test_a_closed_runtime_gives_everything_back(simulated: Any) -> None:
    dm, device, _ = simulated()
    paint_pixels(dm)
    dm.close()
    dm.close()
    assert device.used == 0
    with pytest.raises(EngineError, match="closed"):
        paint_pixels(dm)


def test_two_runtimes_share_a_device(simulated: Any) -> None:
    dm, _, _ = simulated()
    with dm.another() as second:
        both = list(
            zip(
                *(each.iterate(*make_scene(), "a sks mug", num_inference_steps=STEPS) for each in (dm, second)),
                strict=True,
            )
        )
    first, other = (np.asarray(event.result.images[0]) for event in both[-1])
    assert (first == other).all()


def test_work_that_runs_as_late_as_it_may_paints_the_same(simulated: Any, cup: Path) -> None:
    """What the host writes, reads and gives back meanwhile is its own: no copy under way sees it."""
    late, _, _ = simulated(device=SimulatedDevice(late=True), pictures=2)
    now, _, _ = simulated(pictures=2)
    for dm in (late, now):
        dm.add_subject(cup, "cup")
    requests: list[dict[str, Any]] = [
        {},
        {"seed": 4, "subject": "cup", "prompt": "a green sks cup"},
        {"size": (96, 160), "substitute": ("blue",)},
        {"num_images_per_prompt": 3},
        {"gch_background": "intermediate"},
    ]
    for fields in requests:
        image, mask = make_scene(seed=9)
        for event in late.iterate(image, mask, "a green sks mug", num_inference_steps=STEPS):
            if event.index == 1:
                break
        del event
        assert (paint_pixels(late, **fields) == paint_pixels(now, **fields)).all(), fields
    image, mask = make_scene()
    shown = [
        [np.asarray(event.preview()) for event in dm.iterate(image, mask, "a red sks mug", num_inference_steps=STEPS)]
        for dm in (late, now)
    ]
    for one, other in zip(*shown, strict=True):
        np.testing.assert_array_equal(one, other)


def test_pinned_memory_is_read_late_and_other_memory_at_once() -> None:
    with SimulatedDevice(late=True) as device:
        stream, pinned, memory = device.make_stream(), device.allocate_pinned(8), device.allocate(8)
        array, plain = Array(memory.pointer, (8,), "uint8"), np.full(8, 7, np.uint8)
        device.upload(array, plain, stream)
        plain[:] = 8
        device.synchronize(stream)
        assert (device.view(array) == 7).all()
        device.upload(array, pinned.array, stream)
        pinned.array[:] = 9
        mark = device.mark(stream)
        assert (device.view(array) == 7).all() and mark.has_passed() and (device.view(array) == 9).all()
        graph = device.capture(stream, lambda: device.clear(array, stream))
        graph.launch(stream)
        with pytest.raises(DeviceError, match="under way"):
            graph.close()
        device.synchronize(stream)
        graph.close()
        assert not device.view(array).any()


def test_kernels_of_many_threads_paint_the_same(simulated: Any) -> None:
    fields: dict[str, Any] = {"num_inference_steps": 2, "guidance_rescale": 0.5, "substitute": ("blue",)}
    plain, _, _ = simulated()
    threaded, _, _ = simulated(device=SimulatedDevice(threads=(2, 4)))
    got, expected = paint_pixels(threaded, **fields).astype(int), paint_pixels(plain, **fields).astype(int)
    assert np.abs(got - expected).max() <= 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device": "cuda:1"}, "allowed: cpu, cuda"),
        ({"device": "cuda", "pictures": 0}, "pictures is 0"),
        ({"device": "cuda", "residency": "offload"}, "residency is 'offload'"),
        ({"device": "cuda", "picture": 1}, "there is no option 'picture'"),
        ({"residency": "swap"}, "needs device='cuda'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_opened(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        DreamMix.load("no such engine", **options)
