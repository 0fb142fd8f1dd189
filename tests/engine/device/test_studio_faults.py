"""The device runtime when a device hangs, a back end fails, or memory ends: what is told, and what is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.errors import DeviceError, EngineError, NotFiniteError, OutOfMemoryError
from dreammix_trt.core.networks import is_twin, twin_name
from dreammix_trt.core.subject import read_subject
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.device import pace
from dreammix_trt.engine.device.captures import Failure, Statistics
from dreammix_trt.engine.device.painter import DevicePainter
from dreammix_trt.engine.drivers.simulated import (
    SimulatedBound,
    SimulatedDevice,
    SimulatedMark,
    SimulatedNetworks,
    SimulatedPinned,
)
from tests.engine.device.test_studio_more import (
    VAES,
    assert_alike,
    let_overflow,
    make_job,
    need_more_where_not_square,
    paint_disturbed,
    paint_jobs,
)

TWINS = tuple(map(twin_name, (*VAES, "text_encoder")))


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Callable[[SimulatedDevice], None]:
    """Lets a device stop answering: no mark is passed any more, and who waits without asking waits too long."""

    def stop(device: SimulatedDevice) -> None:
        def endless(stream: Any) -> None:
            Event().wait(5)
            raise AssertionError("waited for a device that does not answer")

        monkeypatch.setattr(SimulatedMark, "has_passed", lambda self: False)
        monkeypatch.setattr(device, "synchronize", endless)
        monkeypatch.setattr(pace, "PATIENCE", 0.01)

    return stop


@pytest.mark.parametrize("what", ["preview", "add_subject", "paint", "swap"])
def test_no_wait_for_a_device_is_endless(simulated: Any, cup: Path, hang: Any, what: str) -> None:
    dm, device, _ = simulated(residency="swap" if what == "swap" else None)
    events = dm.iterate(*make_job(num_inference_steps=9)[:3])
    event = next(events)
    hang(device)
    with pytest.raises(DeviceError, match="has not answered for") as told:
        if what == "preview":
            event.preview()
        elif what == "add_subject":
            dm.add_subject(cup)
        else:
            list(events)
    assert told.value.lost and dm.studio.lost
    events.close()


def test_closing_a_runtime_whose_device_hangs_leaves_it_alone(simulated: Any, hang: Any) -> None:
    dm, device, _ = simulated()
    paint_jobs(dm, make_job())
    hang(device)
    start = len(device.record)
    dm.studio.close()
    assert dm.studio.lost
    assert not [entry for entry in device.record[start:] if entry.kind == "free"]


@pytest.mark.parametrize("what", ["add_subject", "load"])
def test_pinned_memory_and_arena_stay_when_a_device_hangs(
    simulated: Any, cup: Path, hang: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    dm, device, _ = simulated()
    before = SimulatedDevice() if what == "load" else device
    freed: list[object] = []
    monkeypatch.setattr(SimulatedPinned, "free", freed.append)
    start = len(before.record)
    hang(before)
    with pytest.raises(DeviceError, match="has not answered"):
        if what == "load":
            simulated(device=Kept(before))
        else:
            dm.add_subject(cup)
    assert not freed and not [entry for entry in before.record[start:] if entry.kind == "free"]


class Kept:
    """A device that its owner does not close."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def close(self) -> None:
        """Later."""


def test_nothing_is_freed_on_a_device_that_hangs(simulated: Any, hang: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Freeing waits for the device, so a room that is not kept stays."""

    monkeypatch.setattr(SimulatedNetworks, "workspace_bytes", need_more_where_not_square)
    dm, device, _ = simulated(shapes=1)
    paint_jobs(dm, make_job())
    events = dm.iterate(*make_job((128, 300), num_inference_steps=9)[:3])
    next(events)
    start = len(device.record)
    hang(device)
    with pytest.raises(DeviceError, match="has not answered"):
        list(events)
    assert not [entry for entry in device.record[start:] if entry.kind == "free"]


@pytest.mark.parametrize("state", ["lost", "closed"])
def test_a_runtime_that_has_ended_takes_nothing(simulated: Any, cup: Path, state: str) -> None:
    dm, _, _ = simulated()
    runtime = dm.studio
    if state == "lost":
        runtime.pace.lost = True
    else:
        runtime.close()
    subject = read_subject(next((cup / "subjects").glob("*.safetensors")))
    for use in (runtime.another, lambda: runtime.add_subject("cup", subject), lambda: next(runtime.paint([]))):
        with pytest.raises(EngineError, match="has not answered" if state == "lost" else "was closed"):
            use()
    runtime.pace.lost = False


@pytest.mark.parametrize("kind", [EngineError, RuntimeError])
def test_whatever_a_back_end_raises_while_captured_it_goes_on_plainly(
    simulated: Any,
    host: DreamMix,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Exception],
    caplog: pytest.LogCaptureFixture,
) -> None:
    dm, device, _ = simulated()
    plain = SimulatedBound.enqueue

    def enqueue(self: Any, stream: Any) -> None:
        if device._capturing is not None and self._name == "vae_encoder":
            raise kind("operation not permitted when stream is capturing")
        plain(self, stream)

    monkeypatch.setattr(SimulatedBound, "enqueue", enqueue)
    expected = paint_jobs(host, make_job())
    for _ in range(2):
        assert_alike(paint_jobs(dm, make_job()), expected)
    refused = {"start of picture 0 (lcg)", "hand-over of picture 0"}
    assert {name: failure.times for name, failure in dm.studio.statistics.failed.items()} == dict.fromkeys(refused, 2)
    for name in refused:
        assert caplog.text.count(f"{name} cannot be captured (operation not permitted") == 1


def test_statistics_tell_how_the_phases_ran(simulated: Any) -> None:
    """A first request runs plainly what a second one replays; a back end that refuses is named."""
    dm, _, _ = simulated()
    steps = make_job().request.num_inference_steps
    job = make_job(patched_fraction=1)
    paint_jobs(dm, job)
    first = dm.studio.statistics
    phases = 6  # start, keys and values, a step, local result, hand-over, finish; then the text, of two prompts
    assert first == Statistics(captured=phases + 1, replayed=2 + steps - 1, plain=phases + 1)
    paint_jobs(dm, job)
    second = dm.studio.statistics
    assert (second.captured, second.plain) == (first.captured, first.plain)
    assert second.replayed - first.replayed == phases - 2 + 2 + steps  # keys and values in both stages


def test_a_network_that_can_be_captured_only_later_is_tried_again(
    simulated: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dm, _, _ = simulated()
    plain = SimulatedBound.capturable.fget
    ready = []

    def capturable(self: Any) -> bool:
        return plain(self) and (self._name != "unet" or bool(ready))

    monkeypatch.setattr(SimulatedBound, "capturable", property(capturable))
    job = make_job(patched_fraction=1, num_inference_steps=2)
    paint_jobs(dm, job)
    (failed,) = dm.studio.statistics.failed.items()
    assert failed == (
        "a step on unet",
        Failure(2, "unet has run, and its back end says that it cannot be captured now"),
    )
    ready.append(True)
    paint_jobs(dm, job)
    assert dm.studio.statistics.failed["a step on unet"].times == 2
    assert dm.studio.statistics.captured == 7 and caplog.text.count("a step on unet cannot be captured") == 1


class Measured:
    """What networks were asked for their workspace and bound, by name; twins need more than all others."""

    LARGE = 3 << 20

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.bound: list[tuple[str, int]] = []
        bind = SimulatedNetworks.bind

        def workspace_bytes(networks: Any, name: str, sides: Any) -> int:
            self.asked.append(name)
            return self.LARGE if is_twin(name) else 1 << 16

        def bound(networks: Any, name: str, sides: Any, arrays: Any, workspace: Any = None) -> Any:
            self.bound.append((name, workspace.nbytes))
            return bind(networks, name, sides, arrays, workspace)

        monkeypatch.setattr(SimulatedNetworks, "workspace_bytes", workspace_bytes)
        monkeypatch.setattr(SimulatedNetworks, "bind", bound)


def test_a_twin_takes_nothing_before_an_overflow_and_only_weights_after_it(
    simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch)
    dm, device, networks = simulated(networks={"twins": (*VAES, "text_encoder"), "away": TWINS})
    paint_jobs(dm, make_job())
    used, kept = device.used, dm.studio.shapes
    assert measured.bound and not [name for name in measured.asked if is_twin(name)]
    assert not [name for name, _ in measured.bound if is_twin(name)] and not set(TWINS) & set(networks.loaded)
    counted = {row.name for row in dm.studio.plan.rows if is_twin(row.name)}
    assert counted == set(TWINS), "weights, as a plan counts them"
    assert dm.studio.arena["workspace"].nbytes == 1 << 16

    with monkeypatch.context() as patched:
        let_overflow(patched, "vae_decoder")
        allocated = len(device.record)
        paint_jobs(dm, make_job())
        large = [e for e in device.record[allocated:] if e.kind == "allocate" and e.name == str(Measured.LARGE)]
        assert len(large) == 2, "one for the room, one for the text encoders"
    assert {name for name, _ in measured.bound if is_twin(name)} == set(TWINS)
    assert all(nbytes == Measured.LARGE for name, nbytes in measured.bound if is_twin(name))
    assert device.used == used and dm.studio.shapes == kept, "what was bound for the twins is gone"
    assert set(TWINS) <= set(networks.loaded), "their weights stay"
    before = dm.studio.statistics
    paint_jobs(dm, make_job())
    assert dm.studio.statistics.captured == before.captured, "graphs of the usual networks are still there"


def test_a_twin_without_room_is_told_with_what_helps(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Measured(monkeypatch)
    dm, device, _ = simulated(networks={"half": True, "twins": VAES, "away": TWINS})
    expected = paint_jobs(dm, make_job())
    total = device.total
    with monkeypatch.context() as patched:
        let_overflow(patched, "vae_decoder")
        device.total = device.used + Measured.LARGE - 1
        with pytest.raises(OutOfMemoryError, match=r"no room to paint again with the float32 twins.*`--vae`") as told:
            paint_jobs(dm, make_job())
        assert "The memory plan was:" in str(told.value)
    device.total = total
    assert_alike(paint_jobs(dm, make_job()), expected)


def test_only_a_network_with_a_twin_is_worth_another_try(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the UNet spoils, the decoder passes on; its twin could not mend that."""
    dm, _, _ = simulated(networks={"half": True, "twins": VAES})
    ran = let_overflow(monkeypatch, "unet", "unet_raw")
    with pytest.raises(
        NotFiniteError, match=r"^unet gave values that are not numbers and there is no float32 twin"
    ) as told:
        paint_jobs(dm, make_job())
    assert "`dreammix-trt build --unet-precision bfloat16`" in str(told.value) and "--vae" not in str(told.value)
    assert len([name for name in ran if name in ("unet", "unet_raw")]) == make_job().request.num_inference_steps
    assert not [name for name in ran if name.endswith("_float32")]


def test_an_encoder_that_spoils_all_after_it_is_worth_another_try(
    simulated: Any, host: DreamMix, monkeypatch: pytest.MonkeyPatch
) -> None:
    dm, _, _ = simulated(networks={"half": True, "twins": VAES})
    let_overflow(monkeypatch, "vae_encoder")
    got, expected = paint_jobs(dm, make_job()), paint_jobs(host, make_job())
    assert np.abs(got[0] - expected[0]).max() <= 4


def test_texts_of_the_twins_serve_no_later_request(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed gives the same picture whatever overflowed before."""
    dm, _, _ = simulated(networks={"twins": (*VAES, "text_encoder", "text_encoder_2")})
    paint_jobs(dm, make_job())
    with monkeypatch.context() as patched:
        ran = let_overflow(patched, "vae_decoder")
        paint_jobs(dm, make_job())
        assert "text_encoder_float32" in ran
    ran = let_overflow(monkeypatch)
    paint_jobs(dm, make_job())
    assert "text_encoder" in ran and "text_encoder_float32" not in ran


def test_a_request_that_is_painted_twice_is_charged_twice(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dm, _, _ = simulated(networks={"half": True, "twins": VAES})
    attempts: list[int] = []
    plain = DevicePainter._mark

    def marked(self: Any, phase: str) -> None:
        plain(self, phase)
        attempts.append(len(self.marks))

    monkeypatch.setattr(DevicePainter, "_mark", marked)
    paint_jobs(dm, make_job())
    once = max(attempts)
    let_overflow(monkeypatch, "vae_decoder")
    paint_jobs(dm, make_job())
    assert max(attempts) == 2 * once - 1  # the first mark is where both begin


def test_a_subject_that_cannot_be_brought_changes_nothing(
    simulated: Any, host: DreamMix, cup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dm, device, _ = simulated()
    expected = paint_jobs(host, make_job(subject="mug"))

    def broken(*_: Any) -> Any:
        raise DeviceError("the copy failed")

    with monkeypatch.context() as patched:
        patched.setattr(device, "upload", broken)
        with pytest.raises(DeviceError, match="the copy failed"):
            dm.add_subject(cup, name="mug")
    assert_alike(paint_jobs(dm, make_job(subject="mug")), expected)


def test_a_second_runtime_without_room_is_told_what_helps(simulated: Any) -> None:
    dm, device, _ = simulated()
    device.total = device.used + (600 << 20)
    with pytest.raises(OutOfMemoryError, match="another runtime beside the first") as told:
        dm.another()
    helps = str(told.value).split("What helps: ")[1]
    assert "load the first with" in helps and "use one runtime alone" in helps
    assert "residency" not in helps and "close the programs" not in helps


def test_what_is_owned_is_closed_though_one_of_it_cannot(opened: Any) -> None:
    engines, tokenizers, _ = opened
    closed: list[str] = []

    class Owned:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            closed.append(self.name)
            if self.name == "networks":
                raise RuntimeError("cannot be closed")

    device = SimulatedDevice(1 << 20)
    with pytest.raises(RuntimeError, match="cannot be closed") as told:
        DreamMix.on_device(
            device, SimulatedNetworks(device, engines), tokenizers, owned=(Owned("networks"), Owned("device"))
        )
    assert closed == ["networks", "device"]
    assert isinstance(told.value.__context__, OutOfMemoryError)


def test_torchs_lack_of_memory_is_told_with_the_plan(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it comes while weights are brought, in a picture's steps, or in a preview."""
    dm, _, _ = simulated()
    expected = paint_jobs(dm, make_job())
    events = dm.iterate(*make_job()[:3])
    event = next(events)

    def full(*_: Any) -> None:
        raise MemoryError("vae_decoder: tried to allocate 20 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(SimulatedNetworks, "run", full)
        for use in (event.preview, lambda: paint_jobs(dm, make_job())):
            with pytest.raises(OutOfMemoryError, match=r"20 GiB(.|\n)*memory plan 'resident'"):
                use()
    events.close()
    with monkeypatch.context() as patched:
        patched.setattr(SimulatedNetworks, "load", full)
        with pytest.raises(OutOfMemoryError, match=r"20 GiB(.|\n)*memory plan 'resident'"):
            simulated(networks={"away": ("unet",)})
    assert_alike(paint_jobs(dm, make_job()), expected)


def test_networks_that_take_turns_are_bound_when_all_are_away(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT 11 brings what it binds for a moment, so a cancelled request's weights must not stay beside it."""
    dm, _, networks = simulated(residency="swap")
    bound: list[tuple[str, ...]] = []
    plain = SimulatedNetworks.bind

    def bind(self: Any, *arguments: Any) -> Any:
        bound.append(self.loaded)
        return plain(self, *arguments)

    monkeypatch.setattr(SimulatedNetworks, "bind", bind)
    events = dm.iterate(*make_job()[:3])
    next(events)
    events.close()
    assert networks.loaded
    bound.clear()
    paint_jobs(dm, make_job((128, 200)))
    assert bound and not any(bound)


def test_a_request_that_is_painted_twice_keeps_its_subject(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dm, _, _ = simulated(networks={"half": True, "twins": VAES})
    let_overflow(monkeypatch, "vae_decoder")
    expected = paint_jobs(dm, make_job(subject="mug"))[0]
    got = paint_disturbed(dm, make_job(subject="mug"), 0, lambda: dm.remove_subject("mug"))
    np.testing.assert_array_equal(got, expected)
