"""Slots' weights on the device: what is merged, from where, and that a subject that comes back gives the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.axes import Tensor
from dreammix_trt.core.errors import DeviceError, EngineError, FileFormatError, InputError
from dreammix_trt.core.merging import merge_slot, sum_products
from dreammix_trt.core.seam import Array
from dreammix_trt.core.slots import Slot
from dreammix_trt.core.subject import NOBODY, Role, Subject
from dreammix_trt.engine.device import slot_layout
from dreammix_trt.engine.device.arena import Arena
from dreammix_trt.engine.device.records import MERGE
from dreammix_trt.engine.device.transfers import Uploads
from dreammix_trt.engine.device.weights import DeviceWeights
from dreammix_trt.engine.drivers.simulated import SimulatedDevice
from tests.engine.device.test_number_kernels import to_eighths

FLOAT8 = "float8_e4m3fn"


def list_slots(name: str) -> tuple[Slot, ...]:
    """A layer of its own, and three in one input: side by side in a UNet, else one below the other and transposed."""
    alone = Slot.of(f"{name}.to_out.0", 32, 48)
    if name in ("unet", "unet_raw"):
        stacked = [Slot(f"{name}.to_{part}", 16, 32, "qkv", 32 * n, 96) for n, part in enumerate("qkv")]
    else:
        stacked = [Slot(f"{name}.to_{part}", 16, 32, "qkv", 512 * n, 16, True) for n, part in enumerate("qkv")]
    odd = Slot.of(f"{name}.odd", 7, 5)
    return (alone, *stacked, odd)


def wait_for(mark: Any) -> None:
    assert mark.has_passed()


class Networks:
    """Networks as far as their slots go.

    types: network -> type of its weights.
    """

    def __init__(self, types: Mapping[str, str]) -> None:
        self.types, rng = dict(types), np.random.default_rng(0)
        self.held = {
            name: {
                key: rng.standard_normal(shape).astype(np.float16 if dtype == FLOAT8 else dtype)
                for key, shape in self.shapes(name).items()
            }
            for name, dtype in types.items()
        }

    def shapes(self, name: str) -> dict[str, tuple[int, int]]:
        alone, q, *_, odd = list_slots(name)
        return {alone.weight: (32, 48), "qkv": (96, 16) if q.flipped else (16, 96), odd.weight: (7, 5)}

    def __contains__(self, name: str) -> bool:
        return name in self.types

    def slots(self, name: str) -> tuple[Any, ...]:
        slots = list_slots(name)
        return tuple(slot._replace(scale=0.5) for slot in slots) if self.types[name] == FLOAT8 else slots

    def weights(self, name: str) -> Mapping[str, np.ndarray]:
        return self.held[name]

    def inputs(self, name: str) -> tuple[Tensor, ...]:
        own = Tensor("sample", "float16", ("rows", 4, "h", "w"))
        return (own, *(Tensor(key, self.types[name], shape) for key, shape in self.shapes(name).items()))


def make_subject(
    name: str, seed: int, rank: int = 3, modules: int = 5, networks: tuple[str, ...] = ("unet",)
) -> Subject:
    """A subject that touches the first slots of networks."""
    rng = np.random.default_rng(seed)
    factors = {
        network: {
            slot.module: (
                rng.standard_normal((slot.inputs, rank)).astype(np.float32),
                rng.standard_normal((rank, slot.outputs)).astype(np.float32),
            )
            for slot in list_slots(network)[:modules]
        }
        for network in networks
    }
    return Subject(name, "sks", "mug", factors)


@dataclass
class Made:
    """What a test works with."""

    device: SimulatedDevice
    weights: DeviceWeights
    networks: Networks

    def enter(self, role: Role, names: Sequence[str]) -> None:
        self.weights.enter(self.weights.choose(role), names)

    def read(self, name: str) -> dict[str, np.ndarray]:
        """A network's merged weights, as they are now."""
        return {key: self.device.view(array).copy() for key, array in self.weights.arrays(name).items()}

    def expect(self, name: str, subject: Subject | None, scale: float = 1.0) -> dict[str, np.ndarray]:
        """Pristine weights with a subject's product added in float32, rounded once."""
        found, dtype = {}, self.networks.types[name]
        for key, weight in self.networks.weights(name).items():
            wide = weight.astype(np.float32)
            for slot in self.networks.slots(name):
                pair = subject.factors.get(name, {}).get(slot.module) if subject else None
                if slot.weight == key and pair is not None:
                    view = Slot(*slot[:7]).view(wide)
                    view[...] = view + sum_products(pair[0], pair[1] * np.float32(scale))
            found[key] = to_eighths(wide * np.float32(2)) if dtype == FLOAT8 else wide.astype(dtype)
        return found

    def check(self, name: str, subject: Subject | None, scale: float = 1.0) -> None:
        for key, wanted in self.expect(name, subject, scale).items():
            np.testing.assert_array_equal(self.read(name)[key], wanted, err_msg=f"{name} {key}")


@pytest.fixture
def make() -> Iterator[Callable[..., Made]]:
    with ExitStack() as stack:

        def make_weights(
            types: Mapping[str, str],
            *,
            pristine: Any = "device",
            turns: bool = False,
            subjects: int = 4,
            threads: tuple[int, int] = (1, 1),
            late: bool = False,
            factors: int | None = None,
        ) -> Made:
            device = stack.enter_context(SimulatedDevice(threads=threads, late=late))
            stream, networks = device.make_stream(), Networks(types)
            given: Any = networks
            slotted = slot_layout.list_slotted(given)
            regions: dict[str, Any] = dict(slot_layout.list_tables(slotted, subjects))
            if factors is not None:
                regions["factors"] = ((factors,), "uint8")
            sizes = slot_layout.measure_weights(slotted, turns=turns, pristine=pristine)
            arena = Arena(device, {**regions, **{name: ((size,), "uint8") for name, size in sizes.items()}})
            uploads = Uploads(device, stream, wait_for, stack, size=1 << 12)
            weights = DeviceWeights(device, stream, given, slotted, arena, uploads, turns=turns, pristine=pristine)
            return Made(device, weights, networks)

        yield make_weights


TYPES = {"unet_kv": "float16", "unet": "float16", "unet_raw": "float32", "text_encoder": "float32"}
EIGHTS = {"unet_kv": "float16", "unet": FLOAT8, "unet_raw": FLOAT8}
ways = pytest.mark.parametrize(
    "way", [{"pristine": "device"}, {"pristine": "host"}, {"pristine": "host", "turns": True}], ids=str
)


@ways
@pytest.mark.parametrize("types", [TYPES, EIGHTS], ids=["floats", "eighths"])
@pytest.mark.parametrize("how", [{}, {"threads": (2, 8)}, {"late": True}], ids=str)
def test_every_slot_is_merged_and_comes_back_to_the_bit(make: Any, way: Any, types: Any, how: Any) -> None:
    made = make(types, **way, **how)
    parts = tuple(name for name in types if name != "unet_kv")
    subjects = {
        name: make_subject(name, seed, networks=parts, modules=n) for name, seed, n in (("a", 1, 5), ("b", 2, 2))
    }
    for name, subject in subjects.items():
        made.weights.add(name, subject)
    for role in (NOBODY, Role("a"), Role("b"), Role("a"), Role("a", 0.5), Role("b", 0.0), Role("", 0.7), Role("a")):
        for name in types:
            made.enter(role, [name])
            made.device.synchronize(made.device.make_stream())
            made.check(name, subjects.get(role.name) if role.scale else None, role.scale)


def test_a_swap_writes_what_the_last_and_the_present_subject_touch_alone(make: Any) -> None:
    made = make({"unet": "float16"})
    slots = list_slots("unet")
    made.weights.add(
        "a", replace(make_subject("a", 1), factors={"unet": dict([*make_subject("a", 1).factors["unet"].items()][:1])})
    )
    second = {slot.module: make_subject("b", 2).factors["unet"][slot.module] for slot in slots[2:3]}
    made.weights.add("b", replace(make_subject("b", 2), factors={"unet": second}))
    made.enter(Role("a"), ["unet"])
    arrays = made.weights.arrays("unet")
    made.device.view(arrays["unet.odd.weight"])[...] = 7  # nobody touches it
    before = replace(made.weights.count)
    made.enter(Role("b"), ["unet"])
    count = made.weights.count
    assert (made.device.view(arrays["unet.odd.weight"]) == 7).all()
    assert (count.launches - before.launches, count.slots - before.slots) == (1, 2)
    assert count.written - before.written == 2 * (32 * 48 + 16 * 32)
    assert count.read - before.read == 2 * (32 * 48 + 16 * 32) + 4 * 3 * (16 + 32)
    assert count.uploaded - before.uploaded == 2 * MERGE.itemsize
    start = len(made.device.record)
    made.enter(Role("b"), ["unet"])
    assert len(made.device.record) == start  # it is there already


def test_from_the_host_only_touched_inputs_come_again(make: Any) -> None:
    made = make({"unet": "float16"}, pristine="host")
    made.weights.add("a", make_subject("a", 1, modules=1))
    made.weights.add("b", make_subject("b", 2, modules=2))
    before = made.weights.count.uploaded
    made.enter(Role("a"), ["unet"])
    assert made.weights.count.uploaded - before == 2 * 32 * 48 + MERGE.itemsize
    before = made.weights.count.uploaded
    made.enter(Role("b"), ["unet"])
    assert made.weights.count.uploaded - before == 2 * (32 * 48 + 16 * 96) + 2 * MERGE.itemsize
    before = made.weights.count.uploaded
    made.enter(NOBODY, ["unet"])
    assert made.weights.count.uploaded - before == 2 * (32 * 48 + 16 * 96)  # and no launch
    made.check("unet", None)


def test_with_everything_on_the_device_a_swap_only_enqueues(make: Any) -> None:
    made = make({"unet": "float16"}, late=True)
    for name, seed in (("a", 1), ("b", 2)):
        made.weights.add(name, make_subject(name, seed))
    made.enter(Role("a"), ["unet"])
    made.device.synchronize(made.device.make_stream())
    start = len(made.device.record)
    made.enter(Role("b"), ["unet"])
    assert [(entry.kind, entry.name) for entry in made.device.record[start:]] == [
        ("upload", ""),
        ("mark", ""),
        ("kernel", "merge_weights"),
    ]
    assert made.device.transferred["downloaded"] == 0


@ways
def test_a_subject_larger_than_the_room_for_factors_is_merged_in_pieces(make: Any, way: Any) -> None:
    subject = make_subject("large", 3, rank=40, networks=("unet", "text_encoder"))
    sizes = [4 * 40 * (slot.inputs + slot.outputs) for slot in list_slots("unet")]
    made = make({"unet": "float16", "text_encoder": "float16"}, factors=max(sizes) + 512, **way)
    made.weights.add("large", subject)
    made.weights.add("small", make_subject("small", 4, rank=1))
    assert made.weights.resident == ("small",)
    before = made.weights.count.launches
    made.enter(Role("large"), ["unet"])
    assert made.weights.count.launches - before == 4
    made.check("unet", subject)
    assert made.weights.resident == ()
    made.enter(Role("small"), ["unet"])
    made.check("unet", make_subject("small", 4, rank=1))
    made.enter(Role("large"), ["unet"])
    made.check("unet", subject)


def test_the_least_recently_used_subjects_leave(make: Any) -> None:
    each = sum(4 * 8 * (slot.inputs + slot.outputs) for slot in list_slots("unet"))
    made = make({"unet": "float32"}, factors=2 * each + 100)
    subjects = {name: make_subject(name, seed, rank=8) for seed, name in enumerate("abc")}
    for name, subject in subjects.items():
        made.weights.add(name, subject)
    assert made.weights.resident == ("b", "c")
    for name in "abcacb":
        made.enter(Role(name), ["unet"])
        made.check("unet", subjects[name])
    assert made.weights.resident == ("c", "b")
    made.weights.remove("b")
    assert made.weights.resident == ("c",)


def test_a_slot_whose_factors_never_fit_is_refused(make: Any) -> None:
    made = make({"unet": "float32"}, factors=4 * 8 * 80)
    made.weights.add("a", make_subject("a", 1, rank=8))
    with pytest.raises(
        InputError, match=r"unet\.to_out\.0 in unet take 2\.8 KiB and this runtime has 2\.5 KiB.*`subjects`"
    ):
        made.weights.add("a", make_subject("a", 2, rank=9))
    made.enter(Role("a"), ["unet"])
    made.check("unet", make_subject("a", 1, rank=8))


@ways
def test_a_subject_that_was_replaced_or_removed_leaves_nothing(make: Any, way: Any) -> None:
    made = make({"unet": "float16", "unet_raw": "float16"}, **way)
    made.weights.add("a", make_subject("a", 1))
    made.enter(Role("a"), ["unet"])
    made.weights.add("a", make_subject("a", 2, modules=2))
    made.enter(Role("a"), ["unet"])
    made.check("unet", make_subject("a", 2, modules=2))
    made.weights.remove("a")
    with pytest.raises(EngineError, match="'a' was removed"):
        made.enter(Role("a"), ["unet"])
    made.enter(NOBODY, ["unet"])
    made.check("unet", None)


def test_a_subject_of_another_base_is_refused_and_the_earlier_one_stays(make: Any) -> None:
    made = make({"unet": "float16"})
    made.weights.add("a", make_subject("a", 1))
    foreign = Subject(
        "a", "sks", "mug", {"unet": {"unet.to_q": (np.ones((9, 2), np.float32), np.ones((2, 32), np.float32))}}
    )
    with pytest.raises(FileFormatError, match="do not fit"):
        made.weights.add("a", foreign)
    made.enter(Role("a"), ["unet"])
    made.check("unet", make_subject("a", 1))
    made.weights.add(
        "b", Subject("b", "sks", "mug", {"text_encoder": {"x": (np.ones((9, 2), np.float32),) * 2}})
    )  # not here


@ways
@pytest.mark.parametrize("types", [TYPES, EIGHTS], ids=["floats", "eighths"])
def test_whatever_fails_the_next_subject_is_whole(
    make: Any, way: Any, types: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every upload and every launch in turn; what had been enqueued before stays."""
    made = make(types, **way)
    subjects = {name: make_subject(name, seed, networks=("unet",)) for name, seed in (("a", 1), ("b", 2))}
    for name, subject in subjects.items():
        made.weights.add(name, subject)
    names = ["unet_kv", "unet"]
    for at in range(8):
        made.enter(Role("a"), names)
        left = [at]

        def fail_late(plain: Any, left: list[int] = left) -> Any:
            def call(*given: Any, **named: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise DeviceError("boom")
                return plain(*given, **named)

            return call

        with monkeypatch.context() as patched:
            for method in ("upload", "launch_kernel"):
                patched.setattr(made.device, method, fail_late(getattr(made.device, method)))
            with suppress(DeviceError):
                made.enter(Role("b"), names)
        for role in (Role("b"), NOBODY):
            made.enter(role, names)
            made.check("unet", subjects.get(role.name))
            made.check("unet_kv", None)
    assert left[0] > 0  # the last round had no failure


def test_phases_that_take_turns_bring_their_own_weights(make: Any) -> None:
    made = make(TYPES, pristine="host", turns=True)
    made.weights.add("a", make_subject("a", 1, networks=("unet", "unet_raw")))
    for group in (["text_encoder"], ["unet_kv", "unet"], ["unet_raw"], ["unet_kv", "unet"], ["text_encoder"]):
        made.enter(Role("a"), group)
        for name in group:
            made.check(name, make_subject("a", 1, networks=("unet", "unet_raw")))
    start = len(made.device.record)
    made.enter(Role("a"), ["text_encoder"])
    assert len(made.device.record) == start


def test_slots_that_do_not_fill_their_input_are_refused() -> None:
    class Gaps(Networks):
        def slots(self, name: str) -> tuple[Any, ...]:
            return super().slots(name)[:3]

    networks: Any = Gaps({"unet": "float16"})
    with pytest.raises(EngineError, match=r"slots fill 1024 numbers of qkv \[16, 96\]"):
        slot_layout.list_slotted(networks)


def test_the_oracle_is_the_hosts_kernel() -> None:
    """`Made.expect` adds the same product as core/merging.py."""
    slot, rng = Slot("m", 6, 4, "m.weight", 0, 6, True), np.random.default_rng(0)
    weight, out = rng.standard_normal((4, 6)).astype(np.float16), np.zeros((4, 6), np.float16)
    a, b = rng.standard_normal((6, 2)).astype(np.float32), rng.standard_normal((2, 4)).astype(np.float32)
    merge_slot(weight, out, slot, a, b)
    np.testing.assert_array_equal(out, (weight.astype(np.float32) + sum_products(a, b).T).astype(np.float16))


def test_uploads_of_any_size_arrive() -> None:
    rng = np.random.default_rng(0)
    for late in (False, True):
        with ExitStack() as made, SimulatedDevice(late=late) as device:
            stream = device.make_stream()
            uploads = Uploads(device, stream, wait_for, made, size=16)
            memory = device.allocate(4096)
            for sizes in ((1,), (16,), (17, 0, 3), (64, 5, 100), (32,)):
                parts = [rng.integers(0, 256, size, np.uint8) for size in sizes]
                array = Array(memory.pointer, (sum(sizes),), "uint8")
                uploads.send(array, iter(parts))
                device.synchronize(stream)
                np.testing.assert_array_equal(device.view(array), np.concatenate(parts))


def test_weights_beyond_fp8_are_told_with_the_subject_and_its_strength(make: Any, caplog: Any) -> None:
    made = make({"unet_kv": FLOAT8, "unet": FLOAT8, "unet_raw": "float16"})
    made.weights.add("mug", make_subject("mug", 1, modules=2, networks=("unet", "unet_raw")))
    for role in (Role("mug"), Role("mug", 0.0), NOBODY):
        made.weights.check_range(role)
    assert not caplog.records
    for scale in (20.0, 60.0, 200.0):
        subject, cut = make_subject("mug", 1, modules=2), {}
        for slot in made.networks.slots("unet")[:2]:
            a, b = (each.astype(np.float64) for each in subject.factors["unet"][slot.module])
            whole = Slot(*slot[:7]).view(made.networks.weights("unet")[slot.weight]) + a @ b * scale
            cut[slot.module] = int((np.abs(whole) > 448 * 0.5).sum())
        layers, count = sum(map(bool, cut.values())), sum(cut.values())
        caplog.clear()
        made.weights.check_range(Role("mug", scale))
        assert bool(caplog.records) == bool(count)
        if count:
            assert f"subject 'mug' at strength {scale:g}: {count} weights in {layers} layers" in caplog.text
            made.enter(Role("mug", scale), ["unet"])
            codes = made.read("unet")
            held = sum(int(((code & 0x7F) == 0x7E).sum()) for code in codes.values())
            assert held >= count  # what rounds to the largest as well
    assert count > 100
