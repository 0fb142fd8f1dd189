"""The device runtime where it is easily wrong: unlike jobs, what is left open, what fails, what is shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.errors import DeviceError, EngineError, InputError, NotFiniteError, OutOfMemoryError
from dreammix_trt.core.request import Request
from dreammix_trt.core.subject import read_subject
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.device import memory_plan, needs, pace, residency, studio
from dreammix_trt.engine.device.memory_plan import Options, plan_memory
from dreammix_trt.engine.dreammix import Job
from dreammix_trt.engine.drivers.simulated import SimulatedDevice, SimulatedMark, SimulatedNetworks
from tests.engine.conftest import make_scene

VAES = ("vae_encoder", "vae_decoder")
STEPS = 3


def make_job(size: tuple[int, int] = (128, 128), number: int = 0, **fields: Any) -> Job:
    return Job(
        *make_scene(*size, seed=number), Request(**{"prompt": "a sks mug", "num_inference_steps": STEPS, **fields})
    )


def paint_jobs(dm: DreamMix, *jobs: Job) -> list[np.ndarray]:
    return [np.asarray(result.images[0]).astype(int) for result in dm.inpaint_batch(jobs)]


def paint_disturbed(dm: DreamMix, job: Job, at: int, disturb: Callable[[], Any]) -> np.ndarray:
    """Paint a job, and call `disturb` after step `at`, before the next one."""
    events = dm.iterate(job.image, job.mask_image, job.request)
    for _ in range(at + 1):
        assert next(events).result is None
    disturb()
    *_, last = events
    assert last.result is not None
    return np.asarray(last.result.images[0]).astype(int)


def assert_alike(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= 1 and np.mean(one != other) < 1e-3


@pytest.fixture(scope="module")
def hosts(host: DreamMix, cup: Path) -> DreamMix:
    """The host with both subjects."""
    host.add_subject(cup)
    return host


# ---------------------------------------------------------------------------------------------------- batches


def test_results_come_in_the_order_of_the_jobs(simulated: Any, hosts: DreamMix) -> None:
    dm, _, _ = simulated(pictures=2)
    jobs = [
        make_job(number=1),
        make_job((128, 192), 2),
        make_job(number=3),
        make_job((100, 100), 4),
        make_job((140, 200), 5),
    ]
    assert_alike(paint_jobs(dm, *jobs), paint_jobs(hosts, *jobs))


@pytest.mark.parametrize("subject", ["cup", "mug", None])
def test_unlike_pictures_share_a_batch(simulated: Any, hosts: DreamMix, cup: Path, subject: str | None) -> None:
    """Sizes, seeds, prompts with and without TAS, the fewest texts, each batch size; and unlike subjects, in turn."""
    dm, device, _ = simulated(pictures=3, subjects=1, texts=1)
    dm.add_subject(cup)
    jobs = [
        make_job((120, 120), 1, seed=(1 << 64) - 2, subject="cup", prompt="a blue sks mug", substitute=("blue",)),
        make_job((128, 128), 2, subject="", negative_prompt=None, prompt="hello"),
        make_job((124, 124), 3, gch_background="intermediate", soft_blending=True, vae_sample=True, lcg_mask_dilate=7),
    ]
    if subject is not None:
        jobs = [job._replace(request=job.request.replace(subject=subject)) for job in jobs]
    expected = paint_jobs(hosts, *jobs)
    start = len(device.record)
    assert_alike(paint_jobs(dm, *jobs), expected)
    unets = [entry for entry in device.record[start:] if entry.kind == "work" and entry.name in ("unet", "unet_raw")]
    assert len(unets) == STEPS * (3 if subject is None else 1)
    assert_alike(paint_jobs(dm, *jobs[1:]), expected[1:])
    assert_alike(paint_jobs(dm, jobs[0]), expected[:1])
    assert_alike(paint_jobs(dm, *jobs[::-1]), expected[::-1])


def test_a_batch_keeps_the_first_pictures_stages(simulated: Any, host: DreamMix) -> None:
    dm, _, _ = simulated(pictures=2)
    shown = [
        each.inpaint(
            *make_scene(), "a sks mug", num_inference_steps=STEPS, num_images_per_prompt=2, keep_stages=True
        ).stages
        for each in (dm, host)
    ]
    for name in ("local result", "last result"):
        assert np.abs(np.asarray(shown[0][name]).astype(int) - np.asarray(shown[1][name])).max() <= 1


def test_a_picture_too_long_for_its_tables_is_refused_before_anything_is_painted(simulated: Any) -> None:
    dm, device, _ = simulated(pictures=2, largest_picture=300_000)
    image, mask = np.zeros((1, 300_000, 3), np.uint8), np.full((1, 300_000), 255, np.uint8)
    start = len(device.record)
    with pytest.raises(InputError, match=r"300000x1.*resampling tables"):
        dm.inpaint_batch([make_job(), Job(image, mask, Request("a sks mug"))])
    assert len(device.record) == start


def test_a_reference_frame_the_networks_cannot_take_is_refused(simulated: Any) -> None:
    dm, device, _ = simulated()
    start = len(device.record)
    with pytest.raises(InputError, match="multiples of"):
        paint_jobs(dm, make_job(mode="reference", reference_resize=(131, 257)))
    assert len(device.record) == start


# ---------------------------------------------------------------------------------------------------- rooms


def need_more_where_not_square(self: Any, name: str, sides: Any) -> int:
    """A `workspace_bytes` with which rooms of such frames bring memory of their own."""
    return 1 << 16 if sides.height == sides.width else 1 << 20


def test_one_kept_shape_serves_requests_of_two(simulated: Any, host: DreamMix) -> None:
    dm, _, _ = simulated(shapes=1)
    expected = paint_jobs(host, make_job((256, 312)))
    for _ in range(3):
        assert_alike(paint_jobs(dm, make_job((256, 312))), expected)
    assert dm.studio.shapes == 1


def test_a_shape_that_wants_more_workspace_than_the_largest_gets_it(
    simulated: Any, host: DreamMix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimulatedNetworks, "workspace_bytes", need_more_where_not_square)
    dm, device, _ = simulated(shapes=1)
    used = device.used
    assert_alike(paint_jobs(dm, make_job((128, 300))), paint_jobs(host, make_job((128, 300))))
    dm.studio.rooms.close()
    assert device.used == used


# ---------------------------------------------------------------------------------------------------- left open


def test_the_last_preview_of_a_shape_that_is_not_kept(simulated: Any, host: DreamMix) -> None:
    dm, _, _ = simulated(shapes=1)
    paint_jobs(dm, make_job())
    for whole in (True, False):  # the picture is larger than its global frame: both stages are in it
        shown = [
            [np.asarray(event.preview(whole)).astype(int) for event in each.iterate(*make_job((200, 120))[:3])]
            for each in (dm, host)
        ]
        assert_alike(*shown)


def test_a_preview_is_of_its_own_step_or_refused(simulated: Any) -> None:
    dm, _, _ = simulated()
    events = dm.iterate(*make_job()[:3])
    first = next(events)
    next(events)
    with pytest.raises(EngineError, match="preview of step 0 is gone"):
        first.preview()


def test_a_request_begun_meanwhile_takes_over(simulated: Any) -> None:
    dm, _, _ = simulated(shapes=1)
    expected = paint_jobs(dm, make_job((128, 192)), make_job((200, 120)))
    left, other = dm.iterate(*make_job((128, 192))[:3]), dm.iterate(*make_job((200, 120))[:3])
    next(left)
    event = next(other)
    with pytest.raises(EngineError, match="another request"):
        next(left)
    *_, event = other
    assert_alike([np.asarray(event.result.images[0]).astype(int)], expected[1:])


def test_an_iteration_left_open_does_not_touch_what_is_closed(simulated: Any) -> None:
    dm, device, _ = simulated()
    events = dm.iterate(*make_job()[:3])
    event = next(events)
    dm.close()
    start = len(device.record)
    with pytest.raises(EngineError, match="closed"):
        next(events)
    with pytest.raises(EngineError, match="gone"):
        event.preview()
    assert device.used == 0 and len(device.record) == start


def test_texts_of_a_request_that_was_left_are_not_trusted(
    simulated: Any, host: DreamMix, monkeypatch: pytest.MonkeyPatch
) -> None:
    dm, _, _ = simulated()
    with monkeypatch.context() as patched:
        let_overflow(patched, "text_encoder")
        events = dm.iterate(*make_job()[:3])
        next(events)
        events.close()
    assert_alike(paint_jobs(dm, make_job()), paint_jobs(host, make_job()))


# ---------------------------------------------------------------------------------------------------- failures


def let_overflow(monkeypatch: pytest.MonkeyPatch, *names: str, on: Any = lambda: True) -> list[str]:
    """Lets networks give NaN; the names of all that run."""
    ran: list[str] = []
    plain = SimulatedNetworks.run

    def run(self: Any, network: str, arrays: Any) -> None:
        ran.append(network)
        plain(self, network, arrays)
        if network in names and on():
            for tensor in self.outputs(network):
                self._device.view(arrays[tensor.name])[...] = np.nan

    monkeypatch.setattr(SimulatedNetworks, "run", run)
    return ran


@pytest.mark.parametrize("error", [DeviceError("boom"), OutOfMemoryError("none left")])
def test_a_failure_anywhere_harms_no_later_request(
    simulated: Any, monkeypatch: pytest.MonkeyPatch, error: DeviceError
) -> None:
    dm, device, _ = simulated(shapes=1)
    expected, used = paint_jobs(dm, make_job((128, 192))), device.used
    plain, calls = SimulatedNetworks.run, [0]

    def run(self: Any, name: str, arrays: Any) -> None:
        calls[0] -= 1
        if calls[0] == 0:
            raise error
        plain(self, name, arrays)

    monkeypatch.setattr(SimulatedNetworks, "run", run)
    for at in range(1, 14, 3):
        calls[0] = at
        with pytest.raises(type(error)):
            paint_jobs(dm, make_job((128, 192), prompt=f"a sks mug {at}"))
        calls[0] = 0
        assert_alike(paint_jobs(dm, make_job((128, 192))), expected)
        assert device.used == used


def test_a_subject_that_was_merged_halfway_is_merged_again(
    simulated: Any, cup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dm, device, _ = simulated()
    dm.add_subject(cup)
    expected = paint_jobs(dm, make_job(subject="mug"), make_job(subject="cup"))
    launch = device.launch_kernel

    def failing(name: str, *given: Any, **named: Any) -> Any:
        launch(name, *given, **named)
        if name == "merge_weights":
            raise DeviceError("boom")

    with monkeypatch.context() as patched:
        patched.setattr(device, "launch_kernel", failing)
        with pytest.raises(DeviceError, match="boom"):
            paint_jobs(dm, make_job(subject="mug"))
    assert_alike(paint_jobs(dm, make_job(subject="cup"), make_job(subject="mug")), expected[::-1])


def test_a_runtime_that_cannot_be_made_leaves_nothing(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OutOfMemoryError("no memory")

    monkeypatch.setattr(studio, "DeviceTexts", full)
    engines, tokenizers, subjects = opened
    with SimulatedDevice() as device:
        with pytest.raises(OutOfMemoryError):
            DreamMix.on_device(
                device, SimulatedNetworks(device, engines), tokenizers, subjects, Options(largest_picture=4096)
            )
        assert device.used == 0


def test_a_device_that_does_not_answer_counts_as_lost_at_once(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dm, _, _ = simulated()
    events = dm.iterate(*make_job(num_inference_steps=9)[:3])
    next(events)
    asked: list[float] = []
    with monkeypatch.context() as patched:
        patched.setattr(SimulatedMark, "has_passed", lambda self: bool(asked.append(0.0)))
        patched.setattr(pace, "PATIENCE", 0.01)
        with pytest.raises(DeviceError, match="not answered") as told:
            list(events)
        assert told.value.lost
        first = len(asked)
        with pytest.raises(DeviceError, match="not answered"):
            paint_jobs(dm, make_job())
        dm.studio.close()
        assert len(asked) == first  # nobody waits a second time


def test_looking_does_not_change_what_becomes_of_a_request(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dm, _, _ = simulated()
    looking = [False]
    let_overflow(monkeypatch, "vae_decoder", on=lambda: looking[0])
    for event in dm.iterate(*make_job()[:3]):
        looking[0] = True
        event.preview()
        looking[0] = False
    assert event.result is not None


# ---------------------------------------------------------------------------------------------------- twins, sharing


@pytest.mark.parametrize("strategy", ["resident", "swap"])
def test_a_twin_there_is_no_room_for_stays_away(
    simulated: Any, host: DreamMix, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    def cut(*arguments: Any, **named: Any) -> Any:
        return replace(
            plan_memory(*arguments, **named), safe=("vae_decoder_float32",), without=("vae_encoder_float32",)
        )

    monkeypatch.setattr(needs, "plan_memory", cut)
    let_overflow(monkeypatch, "vae_decoder")
    dm, _, networks = simulated(networks={"half": True, "twins": VAES}, residency=strategy)
    assert np.abs(paint_jobs(dm, make_job())[0] - paint_jobs(host, make_job())[0]).max() <= 4
    assert "vae_encoder_float32" not in networks.loaded and "vae_encoder_float32" not in networks.bound


@pytest.mark.parametrize("name", ["unet", "text_encoder_2"])
def test_twins_that_take_other_weights_are_not_used(simulated: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    dm, _, networks = simulated(networks={"half": True, "twins": (name, *VAES)})
    assert f"{name}_float32" not in networks.loaded
    with monkeypatch.context() as patched:
        let_overflow(patched, "vae_decoder")
        assert paint_jobs(dm, make_job())[0].any()  # with the twins that can stand in
    assert f"{name}_float32" not in networks.bound
    let_overflow(monkeypatch, name)
    with pytest.raises(NotFiniteError, match=name):
        paint_jobs(dm, make_job(prompt="another sks mug"))


def test_another_runtime_leaves_the_firsts_weights_alone(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    let_overflow(monkeypatch, "vae_decoder")
    dm, _, networks = simulated(networks={"half": True, "twins": VAES})
    expected = paint_jobs(dm, make_job())
    there = networks.loaded
    with dm.another() as second:
        assert second.studio.plan.strategy == "resident" and networks.loaded == there
        assert_alike(paint_jobs(dm, make_job()), expected)
        assert_alike(paint_jobs(second, make_job()), expected)


def test_networks_that_take_turns_or_have_one_stream_are_not_shared(simulated: Any) -> None:
    swapping, _, _ = simulated(residency="swap")
    with pytest.raises(EngineError, match="take turns"):
        swapping.another()
    dm, device, networks = simulated()
    networks.serves = lambda stream: False
    used = device.used
    with pytest.raises(EngineError, match="one stream"):
        dm.another()
    assert device.used == used


def test_weights_are_charged_to_the_request_that_waited_for_them(
    simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(1, 10_000))
    monkeypatch.setattr(residency.time, "perf_counter", lambda: float(next(now)))
    dm, _, _ = simulated(residency="swap")
    spent = []
    for _ in range(3):
        paint_jobs(dm, make_job(prompt="a sks mug"))
        spent.append(dm.studio.timings["weights"])
    assert spent[1] == spent[2] <= spent[0]


# ---------------------------------------------------------------------------------------------------- tiles


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Frames with a side above 130 pixels go through the VAE in tiles of 64."""
    from dreammix_trt.engine.canvas import tiles

    monkeypatch.setattr(tiles, "ABOVE", 130)
    monkeypatch.setattr(tiles.tiles_of, "__kwdefaults__", {"side": 8, "overlap": 3})
    yield


def test_large_frames_go_through_the_vae_in_tiles(simulated: Any, host: DreamMix, small_tiles: None) -> None:
    dm, device, _ = simulated(pictures=2)
    jobs = [make_job((100, 320), number, seed=number, vae_sample=True) for number in range(2)]
    expected = paint_jobs(host, *jobs)
    for _ in range(2):  # plainly, then as graphs
        start = len(device.record)
        assert_alike(paint_jobs(dm, *jobs), expected)
    assert [entry for entry in device.record[start:] if entry.name == "add_tile" and entry.graph is not None]
    events = dm.iterate(*jobs[0][:3])
    for event in events:
        event.preview()
    assert_alike([np.asarray(event.result.images[0]).astype(int)], expected[:1])


def test_replacing_a_subject_changes_the_next_picture(simulated: Any, hosts: DreamMix, cup: Path) -> None:
    dm, _, _ = simulated(subjects=1)
    paint_jobs(dm, make_job(subject="mug"))
    file = next((cup / "subjects").glob("*.safetensors"))
    assert read_subject(file).name == "cup"
    dm.add_subject(file, name="mug")
    assert_alike(paint_jobs(dm, make_job(subject="mug")), paint_jobs(hosts, make_job(subject="cup")))


@pytest.mark.parametrize("how", ["replaced", "removed"])
@pytest.mark.parametrize("way", ["resident", "host", "swap"])
def test_a_request_under_way_keeps_its_subject(
    simulated: Any, cup: Path, monkeypatch: pytest.MonkeyPatch, how: str, way: str
) -> None:
    """Its subject is replaced or removed after each step in turn; the picture is that of an undisturbed request."""
    if way == "host":
        monkeypatch.setattr(memory_plan, "_CHOICES", (("resident", "host"),))
    dm, _, _ = simulated(residency="swap" if way == "swap" else "resident")
    assert dm.studio is not None and dm.studio.plan.pristine == ("device" if way == "resident" else "host")
    mug, job = dm._roster.subjects[0], make_job(subject="mug")
    expected = paint_jobs(dm, job)[0]
    dm.add_subject(cup, "mug")
    other = paint_jobs(dm, job)[0]
    assert not np.array_equal(other, expected)
    for disturbed in range(STEPS - 1):
        dm._roster.add(mug, "mug")
        disturb = (lambda: dm.add_subject(cup, "mug")) if how == "replaced" else lambda: dm.remove_subject("mug")
        np.testing.assert_array_equal(paint_disturbed(dm, job, disturbed, disturb), expected)
        if how == "replaced":
            np.testing.assert_array_equal(paint_jobs(dm, job)[0], other)


def test_a_subject_of_the_second_unet_alone_is_told_where_that_is_not_loaded(
    simulated: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dm, _, _ = simulated(residency="one-unet")
    mug = dm._roster.subjects[0]
    dm._roster.add(replace(mug, factors={"unet_raw": mug.factors["unet"]}), "raw")
    result = dm.inpaint_batch([make_job(subject="raw")])[0]
    assert "subject 'raw' acts on the second UNet alone" in caplog.text
    caplog.clear()
    np.testing.assert_array_equal(
        np.asarray(result.images[0]), np.asarray(dm.inpaint_batch([make_job(subject="")])[0].images[0])
    )
    dm.inpaint_batch([make_job(subject="mug")])
    assert "second UNet" not in caplog.text
