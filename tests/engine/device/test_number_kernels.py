"""The number kernels of the device runtime against the host's kernels: on the host by one thread and by several (there
a missing barrier shows), and on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.merging import sum_products
from dreammix_trt.core.networks import flag_of
from dreammix_trt.core.noise import DRAWS, SeededNoise, normals
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import Schedule, Step, make_schedule
from dreammix_trt.core.seam import Array, BaseFacts
from dreammix_trt.core.slots import Slot
from dreammix_trt.engine import kernels
from dreammix_trt.engine.device.blocks import make_steps
from dreammix_trt.engine.device.records import JOB, MERGE, MERGE_KINDS
from dreammix_trt.engine.host.denoiser import Conditioning, FakeDenoiser
from dreammix_trt.engine.host.sampling import StageInputs, Taken
from dreammix_trt.engine.prompts import weigh_text
from tests.support.host import sample

gpu = pytest.importorskip("dreammix_trt._cpp").gpu
GROUPS = [(1, 1), (3, 8), (2, 32), pytest.param("gpu", marks=pytest.mark.gpu)]
HALVES = [False, True]
SEEDS = (2**63 + 12345, 7, 2**32 + 1)
BIT = flag_of("unet")

halves = pytest.mark.parametrize("half", HALVES, ids=["float", "half"])


@pytest.fixture
def cuda(gpu: None) -> Iterator[Any]:
    """The first GPU."""
    from dreammix_trt.engine.drivers.cuda import CudaDevice

    with CudaDevice() as device:
        yield device


@pytest.fixture(params=GROUPS, ids=str)
def group(request: pytest.FixtureRequest) -> Any:
    """Where a kernel runs: blocks and threads of the host, or a GPU."""
    return request.getfixturevalue("cuda") if request.param == "gpu" else request.param


def launch(name: str, group: Any = (1, 1), **arguments: Any) -> None:
    """Run a kernel; arrays stand for their pointers, None for no array."""
    if not isinstance(group, tuple):
        return launch_on(group, name, arguments)
    given = {key: find_address(value) for key, value in arguments.items()}
    return getattr(gpu, name)(**given, blocks=group[0], threads=group[1])  # type: ignore[no-any-return]


def launch_on(device: Any, name: str, arguments: dict[str, Any]) -> None:
    """On a GPU, with copies of the arrays, whose contents come back."""
    arrays = {find_address(value): value for value in arguments.values() if isinstance(value, np.ndarray)}
    with ExitStack() as stack:
        stream, there = device.make_stream(), {}
        stack.callback(stream.close)
        for at, array in arrays.items():
            memory = stack.enter_context(device.allocate(array.nbytes))
            there[at] = Array(memory.pointer, (array.nbytes,), "uint8")
            device.upload(there[at], array.reshape(-1).view(np.uint8), stream)
        given = {
            key: there[find_address(each)] if isinstance(each, np.ndarray) else each for key, each in arguments.items()
        }
        device.launch_kernel(name, stream, **given)
        for at, array in arrays.items():
            device.download(array.reshape(-1).view(np.uint8), there[at], stream)
        device.synchronize(stream)


def find_address(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return 0 if value is None else value
    assert value.flags.c_contiguous
    return value.ctypes.data


def draw_random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


def dtype_of(half: bool) -> Any:
    return np.float16 if half else np.float32


FACTS = BaseFacts(native_side=1024, divisor=8, scaling_factor=1.0, feature_channels=2)


def make_rows(schedule: Schedule, size: tuple[int, int] = (72, 144)) -> np.ndarray:
    """STEP records of a schedule. size: what the UNet is told, in pixels."""
    return make_steps(schedule, size, FACTS)


class Device:
    """Memory of one batch, and its steps as a captured graph replays them: nothing but the counter changes."""

    def __init__(self, schedule: Schedule, stage: StageInputs, seeds: Any, group: Any, half: bool) -> None:
        count, _, h, w = self.shape = stage.latent.shape
        self.group, self.half, self.rows = group, half, stage.conditioning.rows_per_picture
        self.counter, self.flags = np.zeros(1, np.int32), np.zeros(count, np.int32)
        self.table = np.stack([make_rows(schedule, size) for size in stage.conditioning.sizes])
        self.jobs = np.zeros(count, JOB)
        for job, seed in zip(self.jobs, seeds, strict=True):
            job["seed"], job["blends_output"], job["start_scale"] = seed, schedule.blends_output, schedule.start_scale
        self.x, self.background, self.mask = stage.latent.copy(), stage.background, stage.mask
        self.x_in, self.x0 = np.full(self.shape, np.nan, np.float32), np.full(self.shape, np.nan, np.float32)
        self.network_in = np.full((count * self.rows, 4, h, w), np.nan, dtype_of(half))
        self.eps = np.full_like(self.network_in, np.nan)
        self.timestep, self.time_ids = (
            np.zeros(count * self.rows, np.float32),
            np.ones((count * self.rows, 6), np.float32),
        )
        self.scratch = np.full(gpu.step_scratch(count, 4, h, w) // 8 + 1, np.nan)

    def _launch(self, name: str, **arguments: Any) -> None:
        count, channels, h, w = self.shape
        launch(
            name,
            self.group,
            counter=self.counter,
            table=self.table,
            jobs=self.jobs,
            x=self.x,
            x_in=self.x_in,
            background=self.background,
            mask=self.mask,
            most_steps=self.table.shape[1],
            pictures=count,
            channels=channels,
            height=h,
            width=w,
            rows_per_picture=self.rows,
            half=int(self.half),
            **arguments,
        )

    def run_before(self) -> None:
        self._launch("step_before", network_in=self.network_in, timestep=self.timestep, time_ids=self.time_ids)

    def run_after(self) -> None:
        self._launch("step_after", eps=self.eps, x0=self.x0, scratch=self.scratch, flags=self.flags, bit=BIT)


class Halved:
    """A denoiser whose inputs and outputs are float16."""

    def __init__(self, half: bool) -> None:
        self.fake, self.dtype = FakeDenoiser(), dtype_of(half)

    def __call__(self, latents: Any, step: Step, told: Conditioning) -> Any:
        return (
            self.fake(latents.astype(self.dtype).astype(np.float32), step, told).astype(self.dtype).astype(np.float32)
        )


def make_stage(count: int, guided: bool, size: tuple[int, int]) -> StageInputs:
    h, w = size
    rows = count * (2 if guided else 1)
    sizes = tuple((8 * h + 16 * k, 8 * w) for k in range(count))
    told = Conditioning(
        np.zeros((rows, 77, 2), np.float32),
        np.zeros((rows, 2), np.float32),
        sizes,
        1024,
        np.zeros((count, 2, h, w), np.float32),
        {},
    )
    background, mask = draw_random(count, 4, h, w), (draw_random(count, 1, h, w, seed=1) < 0.3).astype(np.float32)
    mask[:, :, 0] = 0.25  # weights, not only switches
    return StageInputs(np.zeros_like(background), background, mask, told)


def run_both_ways(
    request: Request, count: int, group: Any, half: bool, size: tuple[int, int] = (9, 18)
) -> tuple[list[Taken], list[Taken], Device]:
    """Every step by the host's loop and by the device's kernels."""
    schedule, seeds = make_schedule(request), SEEDS[:count]
    noises, stage, denoiser = (
        [SeededNoise(seed) for seed in seeds],
        make_stage(count, request.guided, size),
        Halved(half),
    )
    one = (1, *stage.latent.shape[1:])
    first = np.concatenate([noise.draw("init_noise", one) for noise in noises])
    stage = replace(stage, latent=stage.background + np.float32(schedule.start_scale) * first)

    def hand_over(step: Step, x0: Any) -> StageInputs:
        fresh = np.concatenate([noise.draw("renoise_switch", one) for noise in noises])
        return replace(stage, latent=x0 + np.float32(step.sigma) * fresh)

    host = list(sample(schedule, denoiser, noises, stage, hand_over))
    device, taken = Device(schedule, stage, seeds, group, half), []
    for step in schedule:
        if step.index == schedule.hand_over_index:
            device.jobs["hand_over_sigma"] = step.sigma
            for k in range(count):
                launch(
                    "noised",
                    group,
                    latent=device.x0[k],
                    job=device.jobs[k : k + 1],
                    hand_over=1,
                    out=device.x[k],
                    count=device.x[k].size,
                )
            device.x0[:] = np.nan
        device.run_before()
        assert device.counter[0] == step.index and set(device.timestep) == {np.float32(step.timestep)}
        np.testing.assert_allclose(device.time_ids, stage.conditioning.time_ids(step), rtol=1e-6)
        eps = denoiser(device.network_in.astype(np.float32), step, stage.conditioning)
        device.eps[:] = eps
        device.run_after()
        taken.append(Taken(step, device.x_in.copy(), device.x0.copy(), device.x.copy(), stage))
    assert device.counter[0] == len(schedule) and not device.flags.any()
    return host, taken, device


def find_largest_error(host: list[Taken], device: list[Taken]) -> float:
    pairs = [(getattr(a, n), getattr(b, n)) for a, b in zip(host, device, strict=True) for n in ("x_in", "x0", "x")]
    return float(max(np.abs(a - b).max() / np.abs(a).max() for a, b in pairs))


SHARP = Request("", num_inference_steps=6, sharpness=100)
PATHS = {
    "plain": replace(SHARP, sharpness=0),
    "sharp": SHARP,
    "rescaled": replace(SHARP, sharpness=0, guidance_rescale=0.7),
    "sharp and rescaled": replace(SHARP, guidance_rescale=0.4),
    "unguided": replace(SHARP, guidance_scale=1.0),
    "blends output": replace(SHARP, blend_output=True, sharpness=0),
    "one stage": replace(SHARP, lcg_steps=0),
    "fixed blend noise": replace(SHARP, blend_noise="fixed", sharpness=0),
    "euler": replace(SHARP, sampler="euler", guidance_scale=1.0, sharpness=0),
    "lcm": replace(SHARP, sampler="lcm", guidance_scale=1.0, sharpness=0),
    "lcm blends output": replace(SHARP, sampler="lcm", guidance_scale=1.0, blend_output=True),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("path", list(PATHS))
def test_a_whole_schedule_is_the_hosts(path: str, count: int, group: Any) -> None:
    host, device, _ = run_both_ways(PATHS[path], count, group, half=False)
    assert find_largest_error(host, device) <= 1e-5


@pytest.mark.parametrize("path", ["sharp and rescaled", "unguided"])
def test_half_precision_networks(path: str, group: Any) -> None:
    host, device, _ = run_both_ways(PATHS[path], 1, group, half=True)
    assert find_largest_error(host[:1], device[:1]) <= 1e-5
    assert find_largest_error(host, device) <= 2e-3  # a number on the edge between two halves falls to either side


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (8, 16), (17, 3), (20, 33)], ids=str)
def test_any_latent_size(size: tuple[int, int]) -> None:
    """Tiles that end early, and windows that are reflected more than once."""
    request = replace(SHARP, num_inference_steps=2, guidance_rescale=0.5)
    host, device, _ = run_both_ways(request, 2, (2, 8), half=False, size=size)
    assert find_largest_error(host, device) <= 1e-5


def test_results_do_not_hang_on_timing(group: Any) -> None:
    """Bit for bit the same, whoever comes first; sums are made in one order."""
    runs = [run_both_ways(PATHS["sharp and rescaled"], 2, group, half=False)[1] for _ in range(3)]
    assert all(np.array_equal(run[-1].x, runs[0][-1].x) for run in runs)


def test_pictures_of_a_batch_have_their_own_rows_and_are_as_alone() -> None:
    """Different seeds, sharpness and rescaling side by side; each picture equals itself in a batch of one."""
    requests = [PATHS["sharp"], PATHS["rescaled"], PATHS["plain"]]
    schedules, stage = [make_schedule(request) for request in requests], make_stage(3, True, (9, 18))
    stage = replace(stage, latent=draw_random(3, 4, 9, 18, seed=9))
    batch = Device(schedules[0], stage, SEEDS, (1, 1), half=False)
    sizes = stage.conditioning.sizes
    batch.table = np.stack([make_rows(schedule, size) for schedule, size in zip(schedules, sizes, strict=True)])
    batch.counter[0], batch.x0[:], batch.eps[:] = 2, draw_random(3, 4, 9, 18), draw_random(6, 4, 9, 18)
    history = batch.x0.copy()
    batch.run_before()
    batch.run_after()
    for k, schedule in enumerate(schedules):
        told = replace(stage.conditioning, text=stage.conditioning.text[:2], sizes=stage.conditioning.sizes[k : k + 1])
        one = (stage.latent[k : k + 1], stage.background[k : k + 1].copy(), stage.mask[k : k + 1].copy())
        alone = Device(schedule, StageInputs(*one, told), SEEDS[k : k + 1], (1, 1), half=False)
        alone.counter[0], alone.x0[:], alone.eps[:] = 2, history[k], batch.eps[2 * k : 2 * k + 2]
        alone.run_before()
        alone.run_after()
        assert np.array_equal(alone.network_in, batch.network_in[2 * k : 2 * k + 2])
        assert np.array_equal(alone.time_ids, batch.time_ids[2 * k : 2 * k + 2])
        np.testing.assert_allclose(alone.x[0], batch.x[k], rtol=0, atol=1e-6 * np.abs(alone.x).max())
        np.testing.assert_allclose(alone.x0[0], batch.x0[k], rtol=0, atol=1e-6 * np.abs(alone.x0).max())


@halves
@pytest.mark.parametrize("row", [0, 1])
def test_what_is_not_finite_is_flagged_for_its_picture(row: int, half: bool, group: Any) -> None:
    stage = make_stage(3, True, (9, 18))
    device = Device(make_schedule(PATHS["sharp"]), stage, SEEDS, group, half)
    device.run_before()
    device.eps[:], device.flags[:] = 0.1, [0, 1, 2]
    device.eps[2 + row, 3, 8, 17] = np.inf if row else np.nan
    device.run_after()
    assert device.flags.tolist() == [0, 1 | BIT, 2] and device.counter[0] == 1
    assert np.isfinite(device.x[[0, 2]]).all()


def test_a_prediction_beyond_float32_is_flagged() -> None:
    device = Device(make_schedule(PATHS["plain"]), make_stage(1, True, (9, 18)), SEEDS[:1], (1, 1), half=False)
    device.run_before()
    device.eps[:] = 3e38
    device.eps[0] = -3e38
    device.run_after()
    assert device.flags[0] == BIT


def test_a_replay_too_many_stays_within_the_table() -> None:
    device = Device(make_schedule(PATHS["plain"]), make_stage(1, True, (9, 18)), SEEDS[:1], (1, 1), half=False)
    device.counter[0] = 6
    device.run_before()
    assert device.timestep[0] == device.table[0, -1]["timestep"]


@halves
@pytest.mark.parametrize("samples", [False, True])
def test_posteriors(samples: bool, half: bool, group: Any) -> None:
    h, w, seed, flags = 5, 7, SEEDS[0], np.zeros(1, np.int32)
    mean, std = draw_random(4, h, w).astype(dtype_of(half)), np.abs(draw_random(4, h, w, seed=2)).astype(dtype_of(half))
    latent, out = np.empty((4, h, w), np.float32), np.empty((4, h, w), dtype_of(half))
    job = np.zeros(1, JOB)
    job["seed"], job["samples_vae"] = seed, samples
    arguments = dict(
        mean=mean,
        std=std,
        job=job,
        latent=latent,
        scaling=0.13025,
        draw=DRAWS["vae_noise_switch_zG"],
        channels=4,
        height=h,
        width=w,
        half=int(half),
        flags=flags,
        bit=32,
    )
    launch("encode_latent", group, network=out, **arguments)
    value = mean.astype(np.float32)
    if samples:
        value = value + std.astype(np.float32) * normals(seed, DRAWS["vae_noise_switch_zG"], 0, value.shape)
    np.testing.assert_allclose(latent, np.float32(0.13025) * value, rtol=1e-6, atol=1e-6)
    assert np.array_equal(out, latent.astype(out.dtype)) and flags[0] == 0
    mean[3, 4, 6] = np.nan
    launch("encode_latent", group, network=None, **arguments)
    assert flags[0] == 32


@pytest.mark.parametrize("hand_over", [0, 1])
@pytest.mark.parametrize("count", [1, 6, 4 * 35])
def test_start_and_hand_over_noise(count: int, hand_over: int, group: Any) -> None:
    latent, job = draw_random(count), np.zeros(1, JOB)
    job["seed"], job["start_scale"], job["hand_over_sigma"] = SEEDS[0], 14.65, 3.5
    drawn = normals(SEEDS[0], DRAWS["renoise_switch" if hand_over else "init_noise"], 0, (count,))
    wanted = latent + np.float32(3.5 if hand_over else 14.65) * drawn
    launch("noised", group, latent=latent, job=job, hand_over=hand_over, out=latent, count=count)
    np.testing.assert_allclose(latent, wanted, rtol=1e-6, atol=3e-5)


EDGES = np.array(
    [0, -0.0, 1e-8, 2.98e-8, 2.99e-8, 6.1e-5, 6.09e-5, 65504, 65519.9, 65520, 1e30, -np.inf, np.inf], np.float32
)


def test_every_half_and_the_edges_between_them(group: Any) -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    as_float, back = np.empty(65536, np.float32), np.empty(65536, np.float16)
    launch("convert", group, source=every, source_half=1, out=as_float, out_half=0, count=65536)
    assert np.array_equal(as_float, every.astype(np.float32), equal_nan=True)
    launch("convert", group, source=as_float, source_half=0, out=back, out_half=1, count=65536)
    numbers = ~np.isnan(every)
    assert (
        np.array_equal(back[numbers].view(np.uint16), every[numbers].view(np.uint16)) and np.isnan(back[~numbers]).all()
    )
    finite = np.sort(every[np.isfinite(every)]).astype(np.float64)
    between = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    tried = np.concatenate(
        [EDGES, between, np.nextafter(between, np.float32(1)), np.nextafter(between, np.float32(-1))]
    )
    rounded = np.empty(len(tried), np.float16)
    launch("convert", group, source=tried, source_half=0, out=rounded, out_half=1, count=len(tried))
    with np.errstate(over="ignore"):
        assert np.array_equal(rounded.view(np.uint16), tried.astype(np.float16).view(np.uint16))


@halves
def test_scaled(half: bool, group: Any) -> None:
    latent, out = draw_random(4, 5, 3), np.empty((4, 5, 3), dtype_of(half))
    launch("scaled", group, latent=latent, factor=0.13025, out=out, count=60, half=int(half))
    assert np.array_equal(out, (latent / np.float32(0.13025)).astype(out.dtype))


@halves
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_finite(bad: float, half: bool, group: Any) -> None:
    values, flags = draw_random(1001).astype(dtype_of(half)), np.array([2], np.int32)
    for place, wanted in ((None, 2), (1000, 6)):
        if place is not None:
            values[place] = bad
        launch("check_finite", group, values=values, count=1001, half=int(half), flags=flags, bit=4)
        assert flags[0] == wanted


@halves
def test_join_text(half: bool, group: Any) -> None:
    first, second = draw_random(2 * 77, 6).astype(dtype_of(half)), draw_random(2 * 77, 10).astype(dtype_of(half))
    out, flags = np.empty((2 * 77, 16), np.float32), np.zeros(1, np.int32)
    arguments = dict(
        first=first,
        second=second,
        out=out,
        rows=154,
        first_width=6,
        second_width=10,
        half=int(half),
        flags=flags,
        first_bit=1,
        second_bit=2,
    )
    launch("join_text", group, **arguments)
    assert np.array_equal(out, np.concatenate([first, second], axis=1).astype(np.float32)) and flags[0] == 0
    second[150, 9] = np.inf
    launch("join_text", group, **arguments)
    assert flags[0] == 2
    first[0, 5] = np.nan
    launch("join_text", group, **arguments)
    assert flags[0] == 3


def test_weigh_text(group: Any) -> None:
    """Each encoder's numbers by its own weights, as the host weighs them; rows of weight 1 to the bit."""
    tokens, empty = draw_random(77, 16), draw_random(77, 16, seed=4)
    weights = np.where(draw_random(2, 77, seed=5) > 0.5, draw_random(2, 77, seed=6), 1).astype(np.float32)
    wanted = weigh_text(tokens, empty, weights, (6, 10))
    plain = np.repeat(weights, (6, 10), axis=0).T == 1
    assert plain.any() and not plain.all() and np.array_equal(wanted[plain], tokens[plain])
    launch("weigh_text", group, tokens=tokens, empty=empty, weights=weights, rows=77, first_width=6, width=16)
    assert np.array_equal(tokens, wanted)


@pytest.mark.parametrize(
    ("unwanted", "positions"),
    [([3], [5, 6]), ([1, 2, 9], [4]), ([0, 1, 0], [2, 11, 2]), ([], [3]), ([2], []), ([12, -1, 3], [5, 99])],
    ids=str,
)
def test_tas(unwanted: list[int], positions: list[int], group: Any) -> None:
    """Also repeated rows, a row of zeros, and rows that do not exist, which are passed over."""
    rows, width = 12, 37
    tokens, removed = draw_random(rows, width), draw_random(rows, width, seed=4)
    removed[9] = 0
    plan = np.full(2 + 2 * rows, -7, np.int32)
    plan[0], plan[1] = len(unwanted), len(positions)
    plan[2 : 2 + len(unwanted)], plan[2 + rows : 2 + rows + len(positions)] = unwanted, positions
    there = [[k for k in listed if 0 <= k < rows] for listed in (unwanted, positions)]
    wanted = kernels.tas_project(tokens, removed[there[0]].reshape(-1, width), np.array(there[1], np.int64))
    launch("tas", group, tokens=tokens, removed=removed, plan=plan, rows=rows, width=width)
    np.testing.assert_allclose(tokens, wanted, rtol=0, atol=1e-6)


EIGHTHS = np.array([(code >> 3 or 1, code & 7, code >> 3 > 0) for code in range(127)])  # of e4m3: all positive ones
VALUES = (EIGHTHS[:, 1] / 8 + EIGHTHS[:, 2]) * 2.0 ** (EIGHTHS[:, 0] - 7)


def to_eighths(values: np.ndarray) -> np.ndarray:
    """The e4m3 codes nearest to float32 values, of two the even one; beyond the largest the largest."""
    size = np.minimum(np.abs(values.astype(np.float64)), VALUES[-1])
    below = np.clip(np.searchsorted(VALUES, size, side="right") - 1, 0, 125)
    over, under = VALUES[below + 1] - size, size - VALUES[below]
    code = np.where((over < under) | ((over == under) & (below % 2 == 1)), below + 1, below)
    return np.where(np.isnan(values), 0x7F, code | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


class Merging:
    """Slots in one block of memory, which moves to the device as a whole. Addresses are counted from its beginning."""

    def __init__(self, size: int = 1 << 18) -> None:
        self.memory, self.end = np.zeros(size, np.uint8), 64
        self.records: list[tuple[float, ...]] = []

    def put(self, values: np.ndarray, aside: int = 0) -> int:
        """Place values. aside: bytes by which they miss a multiple of 16."""
        start = -(-self.end // 16) * 16 + aside
        self.end = start + values.nbytes
        self.memory[start : self.end] = values.reshape(-1).view(np.uint8)
        return start

    def view(self, start: int, like: np.ndarray) -> np.ndarray:
        return self.memory[start : start + like.nbytes].view(like.dtype).reshape(like.shape)

    def run(self, group: Any) -> int:
        """Launch the kernel. Returns how many tasks there were."""
        table = np.array(self.records, MERGE)
        if isinstance(group, tuple):
            args = self._place(table, self.memory.ctypes.data)
            launch("merge_weights", group, slots=table, **args)
            return args["tasks"]
        with ExitStack() as stack:
            stream = group.make_stream()
            stack.callback(stream.close)
            there, slots = (stack.enter_context(group.allocate(each.nbytes)) for each in (self.memory, table))
            args = self._place(table, there.pointer)
            arrays = [Array(each.pointer, (each.nbytes,), "uint8") for each in (there, slots)]
            for array, values in zip(arrays, (self.memory, table.view(np.uint8)), strict=True):
                group.upload(array, values, stream)
            group.launch_kernel("merge_weights", stream, slots=arrays[1], **args)
            group.download(self.memory, arrays[0], stream)
            group.synchronize(stream)
        return args["tasks"]

    def _place(self, table: np.ndarray, base: int) -> dict[str, int]:
        for name in ("source", "target", "left", "right"):
            table[name] += np.uint64(base)
        return {"count": len(table), "tasks": gpu.plan_merges(table=table.ctypes.data, count=len(table))}


@pytest.mark.parametrize("kind", MERGE_KINDS, ids=lambda kind: kind[1])
def test_merged_weights_are_the_hosts_to_the_bit(kind: tuple[str, str], group: Any) -> None:
    """Sizes and places that are aligned and such that are not, parts of wider inputs, ranks, strengths, in place."""
    check_merges(kind, group, 1 << 18, [
        (19, 48, 5, 48, 0, False),
        (64, 128, 8, 128, 0, True),
        (33, 48, 4, 144, 0, False),
        (7, 13, 3, 13, 0, False),
        (9, 32, 2, 33, 0, True),
        (8, 32, 3, 32, np.dtype(kind[0]).itemsize, False),
        (16, 64, 0, 64, 0, False),
        (1, 1, 1, 1, 0, False),
        (300, 16, 17, 16, 0, False),
    ])  # fmt: skip


@pytest.mark.parametrize("kind", MERGE_KINDS, ids=lambda kind: kind[1])
def test_slots_of_many_tasks_are_merged_among_small_ones(kind: tuple[str, str], group: Any) -> None:
    sizes = [(5, 16, 2, 16, 0, False), (301, 513, 3, 520, 0, False), (7, 13, 3, 13, 0, True)]
    tasks = check_merges(kind, group, 1 << 24, [*sizes, (640, 640, 8, 1920, 0, False), (9, 32, 2, 33, 0, False)])
    assert tasks > 3 + 2 * 2  # both large ones have several


def check_merges(
    kind: tuple[str, str], group: Any, memory: int, sizes: Sequence[tuple[int, int, int, int, int, bool]]
) -> int:
    """Merge slots in one launch, and compare them with the host's.

    memory: bytes for all of them.
    sizes: rows, columns, rank, stride, bytes off alignment, whether in place; of each slot.

    Returns how many tasks they were.
    """
    merging, wanted = Merging(memory), []
    source_type, eighths = np.dtype(kind[0]), kind[1] not in ("float16", "float32")
    for number, (rows, columns, rank, stride, aside, in_place) in enumerate(sizes):
        weight = (draw_random(rows, stride, seed=number) * 3).astype(source_type)
        left, right = draw_random(rows, rank, seed=number + 50), draw_random(rank, columns, seed=number + 90)
        out = np.full(weight.shape, 7, np.uint8 if eighths else source_type)
        at = merging.put(weight, aside)
        to = at if in_place and not eighths else merging.put(out, aside if not eighths else 0)
        factors = [merging.put(left), merging.put(right)]
        scales = (0.75, 1.5, 4.0 if eighths else 1.0)
        merging.records.append((at, to, *factors, stride, rows, columns, rank, MERGE_KINDS[kind], 0, *scales))
        before = weight.copy() if to == at else out
        slot = Slot("m", rows, columns, "m", 0, stride)
        scaled = left * np.float32(0.75), right * np.float32(1.5)
        if eighths:
            wide = weight[:, :columns].astype(np.float32) + sum_products(*scaled)
            before[:, :columns] = to_eighths(wide * np.float32(4))
        else:
            kernels.merge_weight(weight, before, slot, *scaled)
        wanted.append((to, before))
    tasks = merging.run(group)
    for to, values in wanted:
        np.testing.assert_array_equal(merging.view(to, values), values)
    return tasks


def test_eighths_are_the_nearest_ones(group: Any) -> None:
    """Every code, the middles between neighbours, what is beside them, the smallest, the largest and beyond."""
    middles = (VALUES[1:] + VALUES[:-1]) / 2
    near = np.concatenate(
        [np.nextafter(each.astype(np.float32), np.float32(to)) for each in (VALUES, middles) for to in (0, 9e9)]
    )
    edges = [447.9, 448, 449, 463.99, 464, 465, 480, 1e30, np.inf, np.nan, 2.0**-10, 2.0**-11, 1e-40, 0]
    values = np.concatenate([VALUES, middles, near, edges, draw_random(500) * 100, draw_random(500) / 100]).astype(
        np.float32
    )
    values = np.concatenate([values, -values, np.zeros(-2 * len(values) % 16, np.float32)])
    for half in (False, True):  # what float16 holds goes in as it is; the rest as the product of factors
        merging, rows = Merging(), len(values) // 16
        with np.errstate(over="ignore"):
            given = values.astype(np.float16).reshape(rows, 16) if half else np.zeros((rows, 16), np.float16)
        out, one = np.zeros((rows, 16), np.uint8), np.ones((1, 1), np.float32)
        for n in range(rows):
            left, right = merging.put(one), merging.put(values[16 * n : 16 * n + 16])
            places = (merging.put(given[n]), merging.put(out[n]))
            merging.records.append((*places, left, right, 16, 1, 16, 0 if half else 1, 2, 0, 1, 1, 1))
        merging.run(group)
        got = np.concatenate([merging.view(int(record[1]), out[0]) for record in merging.records])
        wanted = to_eighths(np.float32(0) + (given.astype(np.float32).ravel() if half else values))
        finite = ~np.isnan(values)
        np.testing.assert_array_equal(got[finite], wanted[finite])
        assert (got[~finite] & 0x7F == 0x7F).all()


def test_tables_of_slots_are_checked() -> None:
    merging = Merging()
    at, to = merging.put(np.ones((2, 4), np.float32)), merging.put(np.ones((2, 4), np.float32))
    good = np.array([(at, to, 0, 0, 4, 2, 4, 0, 0, 0, 1, 1, 1)], MERGE)
    assert gpu.plan_merges(table=good.ctypes.data, count=1) == 1
    for name, value, text in (
        ("source", 0, "missing"), ("rank", 3, "no factors"), ("rank", -1, "no factors"), ("kind", 3, "kind"),
        ("rows", 0, "positive"), ("stride", 3, "stride"),
    ):  # fmt: skip
        wrong = good.copy()
        wrong[name] = value
        with pytest.raises(ValueError, match=text):
            gpu.plan_merges(table=wrong.ctypes.data, count=1)


def test_a_tables_tasks_are_numbered_by_slot() -> None:
    """Aligned slots take tiles of 32 numbers, others of 4, and 256 tiles are one task."""
    sizes = [(64, 128), (1000, 1280), (31, 33)]
    table = np.array([(4096, 8192, 0, 0, columns, rows, columns, 0, 1, 0, 1, 1, 1) for rows, columns in sizes], MERGE)
    assert gpu.plan_merges(table=table.ctypes.data, count=3) == 1 + 157 + 2
    assert list(table["first"]) == [0, 1, 158]


def test_wrong_arguments_are_refused() -> None:
    array = np.zeros(64, np.float32)
    good = dict(latent=array, factor=1.0, out=array, count=4, half=0)
    launch("scaled", **good)
    for wrong in (dict(latent=None), dict(count=0), dict(count=-1), dict(half=2), dict(out=array.ctypes.data + 1)):
        with pytest.raises(ValueError, match=r"missing|positive|half|aligned"):
            launch("scaled", **{**good, **wrong})
    for wrong_group in ((0, 1), (1, 65)):
        with pytest.raises(ValueError, match="blocks and threads"):
            launch("scaled", wrong_group, **good)
    with pytest.raises(ValueError, match="4 channels"):
        gpu.step_scratch(1, 16, 8, 8)


def test_a_stream_without_a_gpu_says_so() -> None:
    """Without kernels in the build, or without a driver; a machine with a GPU runs it."""
    array = np.ones(4, np.float32)
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a GPU here")
    with pytest.raises(RuntimeError, match="CUDA"):
        gpu.scaled(latent=array.ctypes.data, factor=1.0, out=array.ctypes.data, count=4, half=0, stream=0)
