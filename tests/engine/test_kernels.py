"""The kernels: both back ends against recorded arrays, Pillow and each other, and their properties."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, __version__

from dreammix_trt.core import noise
from dreammix_trt.core.merging import merge_slot
from dreammix_trt.core.slots import Slot
from dreammix_trt.engine import kernels, numpy_kernels

TOLERANCE = 2e-6

try:
    _cpp: ModuleType | None = importlib.import_module("dreammix_trt._cpp")
except ImportError:
    _cpp = None

needs_cpp = pytest.mark.skipif(_cpp is None, reason="the C++ extension is not built here")


@pytest.fixture(params=["numpy", "cpp"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`kernels` on each back end in turn."""
    if request.param == "cpp" and _cpp is None:
        pytest.skip("the C++ extension is not built here")
    monkeypatch.setattr(kernels, "_impl", numpy_kernels if request.param == "numpy" else _cpp)
    return kernels


@pytest.fixture(scope="session")
def units(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "units.npz") as arrays:
        return dict(arrays)


def measure_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference as a share of the largest value."""
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def draw_latents(*shape: int, seed: int = 0) -> np.ndarray:
    return rng(seed).standard_normal(shape).astype(np.float32)


# ---- against the recorded arrays


def test_golden_fill(both, units):
    for image, mask, expected in zip(units["fill_image"], units["fill_mask"], units["fill_out"], strict=True):
        assert np.array_equal(both.fill(image, mask), expected)


def test_golden_feather(both, units):
    for mask, expected in zip(units["feather_mask"], units["feather_out"], strict=True):
        assert np.array_equal(both.feather(mask), expected)


def test_golden_latent_mask(both, units):
    for mask, expected in zip(units["latmask_in"], units["latmask_out"], strict=True):
        assert np.array_equal(both.latent_mask(mask), expected)


def test_golden_paste(both, units):
    assert np.array_equal(both.soft_alpha(96, 64), units["soft_alpha_96x64"])
    for n, box in enumerate(units["paste_box"]):
        size = (box[1] - box[0], box[3] - box[2])
        content = both.resize(units["paste_content"][n], *size)
        arguments = (units["fill_image"][n], content, tuple(box), units["feather_out"][n])
        assert np.array_equal(both.paste(*arguments), units["paste_out"][n])
        assert np.array_equal(both.paste(*arguments, both.soft_alpha(*size)), units["paste_out_soft"][n])


def test_golden_bilateral(both, units):
    assert measure_error(both.bilateral(units["blur_in"], units["blur_guide"]), units["blur_out"]) < TOLERANCE


def test_golden_blur_guidance(both, units):
    x, x0 = units["guidance_latent"][None], units["guidance_x0_in"][None]
    for (t, sharpness), expected in zip(units["guidance_t_sharpness"], units["guidance_x0_out"], strict=True):
        alpha = 0.001 * sharpness * (1 - t / 999)
        _, got = both.guided_step(x, x - x0, None, x, rows_per_picture=1, **step(sigma=1.0, blur_alpha=alpha))
        assert measure_error(got, expected[None]) < TOLERANCE


def test_golden_projection(both, units):
    for token, remove, expected in zip(units["orth_in"], units["orth_remove"], units["orth_out"], strict=True):
        assert measure_error(both.tas_project(token[None], remove[None], [0])[0], expected) < TOLERANCE


def test_golden_attribute_removal(both, units):
    for n, case in enumerate(json.loads(str(units["meta_json"]))["tas_cases"]):
        first = 1 + len(case["prefix"].split())
        removed = units["tas_peli_embeds"][n][first : first + len(case["words"])]
        positions = 1 + np.arange(len(case["prompt"].split()))
        got = both.tas_project(units["tas_prompt_embeds"][n], removed, positions)
        assert measure_error(got, units["tas_out"][n]) < TOLERANCE


def test_golden_solver(both, units):
    for run in json.loads(str(units["meta_json"]))["solver_runs"]:
        values = {key: units[f"solver{run['index']}_{key}"] for key in ("x", "x0", "noise", "coef_x_d_dd_noise")}
        before = None
        for i, (c_x, c_x0, c_dx0, c_noise) in enumerate(values["coef_x_d_dd_noise"]):
            if i == run["history_reset_before_step"]:
                before = None
            x, x0 = values["x"][i].astype(np.float32), values["x0"][i].astype(np.float32)
            row = step(sigma=1.0, c_x=c_x, c_x0=c_x0, c_dx0=c_dx0, c_noise=c_noise)
            got, x0_got = both.guided_step(
                x, x - x0, before, values["noise"][i].astype(np.float32), rows_per_picture=1, **row
            )
            assert np.abs(x0_got - x0).max() < TOLERANCE * np.abs(x).max()  # x0 was sent through x - (x - x0)
            assert measure_error(got, values["x"][i + 1].astype(np.float32)) < TOLERANCE
            before = x0


# ---- against Pillow, plain formulas and each other


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_resize_equals_pillow(data):
    side = st.integers(1, 40)
    height, width, out_h, out_w = (data.draw(side) for _ in range(4))
    channels = data.draw(st.sampled_from([0, 1, 3, 4]))
    name = data.draw(st.sampled_from(["lanczos", "bicubic", "bilinear"]))
    r0, c0 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = (r0, data.draw(st.integers(r0 + 1, height)), c0, data.draw(st.integers(c0 + 1, width)))
    image = rng(height * width).integers(0, 256, (height, width, channels) if channels else (height, width), np.uint8)
    got = kernels.resize(image, out_h, out_w, name, box)
    assert np.array_equal(got, numpy_kernels.resize(image, out_h, out_w, name, box))


@pytest.mark.skipif(int(__version__.split(".")[0]) < 13, reason="the order of passes is that of Pillow 13")
@pytest.mark.parametrize("size", [(64, 64), (20, 90), (90, 20), (50, 40), (33, 7), (10, 34), (96, 33), (70, 90)])
@pytest.mark.parametrize("name", ["lanczos", "bicubic", "bilinear"])
def test_resize_takes_its_passes_in_pillows_order(both, size, name):
    image = rng(1).integers(0, 2, (70, 33, 3), np.uint8) * np.uint8(255)
    expected = Image.fromarray(image).crop((2, 1, 31, 68)).resize(size[::-1], Image.Resampling[name.upper()])
    assert np.array_equal(both.resize(image, *size, name, (1, 68, 2, 31)), np.asarray(expected))


def test_resize_to_the_same_size_copies(both):
    image = rng().integers(0, 256, (9, 8, 3), np.uint8)
    copy = both.resize(image, 9, 8)
    assert np.array_equal(copy, image) and not np.shares_memory(copy, image)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2)), max_size=3),
    st.floats(0, 1),
)
def test_fill_equals_pillows_box_blurs(height, width, cascade, share):
    random = rng(height * 31 + width)
    image = random.integers(0, 256, (height, width, 3), np.uint8)
    mask = np.where(random.random((height, width)) < share, random.integers(126, 256), 0).astype(np.uint8)
    filled = kernels.fill(image, mask, cascade)
    assert np.array_equal(filled, numpy_kernels.fill(image, mask, cascade))
    assert np.array_equal(filled[mask < 127], image[mask < 127])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 40), st.integers(0, 3))
def test_feather_is_the_chebyshev_distance(height, width, reach, points):
    random = rng(height * 21 + width)
    mask = np.zeros((height, width), np.uint8)
    mask[random.integers(0, height, points), random.integers(0, width, points)] = 128
    rows, columns = np.mgrid[0:height, 0:width]
    distance = np.full((height, width), 10**6)
    for r, c in np.argwhere(mask):
        distance = np.minimum(distance, np.maximum(abs(rows - r), abs(columns - c)))
    expected = np.clip(256 * (reach - distance) // reach, 0, 255)
    for got in (kernels.feather(mask, reach), numpy_kernels.feather(mask, reach)):
        assert np.array_equal(got, expected)


def test_latent_mask_takes_any_touched_pixel(both):
    mask = np.zeros((16, 24), np.uint8)
    mask[7, 8] = 128
    mask[8, 23] = 127
    assert both.latent_mask(mask).tolist() == [[0, 1, 0], [0, 0, 0]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_paste_leaves_pixels_without_weight_alone(seed):
    random = rng(seed)
    original = random.integers(0, 256, (20, 30, 3), np.uint8)
    weight = random.choice(np.array([0, 0, 3, 128, 255], np.uint8), (20, 30))
    content = random.integers(0, 256, (11, 12, 3), np.uint8)
    pasted = kernels.paste(original, content, (4, 15, 6, 18), weight)
    assert np.array_equal(pasted[weight == 0], original[weight == 0])
    inside = np.zeros_like(weight, bool)
    inside[4:15, 6:18] = True
    assert np.array_equal(pasted[inside & (weight == 255)], content[(weight == 255)[4:15, 6:18]])
    assert np.array_equal(pasted, numpy_kernels.paste(original, content, (4, 15, 6, 18), weight))


def step(**changes: float) -> dict[str, float]:
    plain = dict(sigma=1.3, guidance_scale=4.0, blur_alpha=0.0, c_x=0.2, c_x0=0.7, c_dx0=0.3, c_noise=0.5)
    return plain | changes


def test_blend_scale_is_its_formula(both):
    x, background, draw = (draw_latents(2, 4, 5, 6, seed=i) for i in range(3))
    mask = (draw_latents(2, 1, 5, 6, seed=3) > 0).astype(np.float32)
    x_in, rows = both.blend_scale(x, background, mask, draw, 2.5)
    expected = x * mask + (background + 2.5 * draw) * (1 - mask)
    assert measure_error(x_in, expected) < TOLERANCE
    assert measure_error(rows, np.repeat(expected, 2, axis=0) / np.sqrt(2.5**2 + 1)) < TOLERANCE
    inside = np.broadcast_to(mask == 1, x.shape)
    assert np.array_equal(x_in[inside], x[inside])


def test_guided_step_is_its_formula(both):
    x, before, draw = (draw_latents(3, 4, 8, 9, seed=i) for i in range(3))
    eps = draw_latents(6, 4, 8, 9, seed=4)
    x_out, x0 = both.guided_step(x, eps, before, draw, **step())
    negative, positive = eps[0::2].astype(np.float64), eps[1::2].astype(np.float64)
    wanted = x - 1.3 * (negative + 4.0 * (positive - negative))
    assert measure_error(x0, wanted) < TOLERANCE
    assert measure_error(x_out, 0.2 * x + 0.7 * wanted + 0.3 * (wanted - before) + 0.5 * draw) < TOLERANCE


def test_guidance_of_one_row_needs_no_negative(both):
    x, eps, draw = (draw_latents(2, 4, 8, 8, seed=i) for i in range(3))
    one = both.guided_step(x, eps, None, draw, rows_per_picture=1, **step(blur_alpha=0.2))
    two = both.guided_step(x, np.repeat(eps, 2, axis=0), None, draw, **step(blur_alpha=0.0, guidance_scale=1.0))
    blurred = both.guided_step(x, np.repeat(eps, 2, axis=0), None, draw, **step(blur_alpha=0.2, guidance_scale=1.0))
    assert measure_error(one[1], blurred[1]) < TOLERANCE
    assert measure_error(one[1], two[1]) > 1e-3


def test_a_full_rescale_gives_the_spread_of_the_positive_row(both):
    x, eps = draw_latents(1, 4, 8, 8), draw_latents(2, 4, 8, 8, seed=1)
    _, x0 = both.guided_step(x, eps, None, x, guidance_rescale=1.0, **step())
    assert np.isclose((x - x0).std(), (1.3 * eps[1]).std(), rtol=1e-5)


def test_bilateral_keeps_constants_and_small_planes(both):
    constant = np.full((1, 4, 9, 7), 3.0, np.float32)
    assert np.allclose(both.bilateral(constant, draw_latents(1, 4, 9, 7)), 3.0, rtol=1e-6)
    for shape in ((1, 4, 1, 1), (1, 4, 2, 5), (2, 3, 6, 1)):
        e, guide = draw_latents(*shape), draw_latents(*shape, seed=1)
        assert measure_error(both.bilateral(e, guide), numpy_kernels.bilateral(e, guide)) < TOLERANCE


def test_tas_projection_is_orthogonal_and_touches_nothing_else(both):
    tokens, direction = draw_latents(10, 64), draw_latents(1, 64, seed=1)
    got = both.tas_project(tokens, direction, [2, 3, 7])
    assert np.abs(got[[2, 3, 7]] @ direction[0]).max() < 1e-5
    others = [0, 1, 4, 5, 6, 8, 9]
    assert np.array_equal(got[others], tokens[others])
    assert np.array_equal(both.tas_project(tokens, np.zeros((1, 64), np.float32), [2]), tokens)


@needs_cpp
def test_both_back_ends_agree_on_latents(monkeypatch):
    x, before, draw = (draw_latents(2, 4, 24, 40, seed=i) * 5 for i in range(3))
    eps, mask = draw_latents(4, 4, 24, 40, seed=5), (draw_latents(2, 1, 24, 40, seed=6) > 0).astype(np.float32)
    results = []
    for implementation in (numpy_kernels, _cpp):
        monkeypatch.setattr(kernels, "_impl", implementation)
        results.append(
            [
                *kernels.blend_scale(x, before, mask, draw, 7.0),
                *kernels.guided_step(x, eps, before, draw, guidance_rescale=0.4, **step(sigma=7.0, blur_alpha=0.3)),
                kernels.bilateral(x, before),
                kernels.normals(2**63 + 5, 3, 17, (1, 4, 9, 11)),
            ]
        )
    for ours, theirs in zip(*results, strict=True):
        assert measure_error(ours, theirs) < TOLERANCE


@needs_cpp
def test_philox_in_cpp_gives_the_same_integers():
    counters = rng().integers(0, 1 << 32, (50, 4), np.uint64).astype(np.uint32)
    key = (0x89ABCDEF, 0x01234567)
    expected = noise.philox(counters, key)
    assert [_cpp.philox(tuple(int(word) for word in row), key) for row in counters] == [tuple(row) for row in expected]


@needs_cpp
def test_results_do_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(kernels, "_impl", _cpp)
    image = rng().integers(0, 256, (300, 280, 3), np.uint8)
    mask = np.zeros((300, 280), np.uint8)
    mask[20:290, 30:250] = 255
    values, cascade = draw_latents(1, 4, 64, 64), [(40, 1), (5, 2)]

    def run_everything() -> list[np.ndarray]:
        return [
            kernels.fill(image, mask, cascade),
            kernels.resize(image, 400, 410),
            kernels.paste(image, image, (0, 300, 0, 280), mask),
            kernels.bilateral(values, values),
            kernels.normals(1, 2, 3, (50_000,)),
        ]

    try:
        kernels.set_threads(1)
        alone = run_everything()
        kernels.set_threads(5)
        assert all(np.array_equal(a, b) for a, b in zip(alone, run_everything(), strict=True))
        answers: list[list[np.ndarray]] = []
        workers = [threading.Thread(target=lambda: answers.append(run_everything())) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(answers) == 3
        assert all(np.array_equal(a, b) for answer in answers for a, b in zip(alone, answer, strict=True))
    finally:
        kernels.set_threads(0)


# ---- arguments and the choice of back end

IMAGE = np.zeros((8, 8, 3), np.uint8)
PLANE = np.zeros((8, 8), np.uint8)
LATENT = np.zeros((1, 4, 2, 2), np.float32)

BAD_CALLS = {
    "dtype": lambda: kernels.feather(PLANE.astype(np.float32)),
    "a list": lambda: kernels.feather([[0]]),
    "no pixels": lambda: kernels.feather(PLANE[:0]),
    "feather width": lambda: kernels.feather(PLANE, 0),
    "image rank": lambda: kernels.resize(IMAGE[None], 4, 4),
    "empty output": lambda: kernels.resize(IMAGE, 0, 4),
    "filter": lambda: kernels.resize(IMAGE, 4, 4, "nearest"),
    "box outside": lambda: kernels.resize(IMAGE, 4, 4, "lanczos", (0, 9, 0, 8)),
    "box empty": lambda: kernels.resize(IMAGE, 4, 4, "lanczos", (3, 3, 0, 8)),
    "mask size": lambda: kernels.fill(IMAGE, PLANE[:4]),
    "radius": lambda: kernels.fill(IMAGE, PLANE, [(-1, 1)]),
    "factor": lambda: kernels.latent_mask(PLANE, 3),
    "latent mask": lambda: kernels.blend_scale(LATENT, LATENT, LATENT, LATENT, 1.0),
    "latent shapes": lambda: kernels.bilateral(LATENT, LATENT[:, :3]),
    "eps rows": lambda: kernels.guided_step(LATENT, LATENT, None, LATENT, **step()),
    "row count": lambda: kernels.guided_step(LATENT, LATENT, None, LATENT, rows_per_picture=3, **step()),
    "width": lambda: kernels.tas_project(LATENT[0, 0], LATENT[0, 0, :, :1], [0]),
    "position": lambda: kernels.tas_project(LATENT[0, 0], LATENT[0, 0], [2]),
    "content size": lambda: kernels.paste(IMAGE, IMAGE, (0, 4, 0, 4), PLANE),
    "alpha size": lambda: kernels.paste(IMAGE, IMAGE, (0, 8, 0, 8), PLANE, LATENT[0, 0]),
    "seed": lambda: kernels.normals(-1, 0, 0, (1,)),
    "threads": lambda: kernels.set_threads(-1),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_arguments_are_refused(both, call):
    with pytest.raises(ValueError, match=r"\w"):
        call()


@needs_cpp
def test_the_extension_itself_refuses_what_would_leave_an_array():
    with pytest.raises(ValueError, match="box"):
        _cpp.resize(IMAGE, 4, 4, "lanczos", (0, 9, 0, 8))
    with pytest.raises(ValueError, match="mask"):
        _cpp.fill(IMAGE, PLANE[:4], [(1, 1)])
    with pytest.raises(ValueError, match="position"):
        _cpp.tas_project(LATENT[0, 0], LATENT[0, 0], np.array([-1]))
    with pytest.raises(ValueError, match="eps"):
        _cpp.guided_step(LATENT, LATENT, None, LATENT, **step())


def test_arrays_of_any_layout_are_taken(both):
    image = rng().integers(0, 256, (8, 10, 3), np.uint8)
    flipped = image[:, ::-1]
    assert np.array_equal(both.resize(flipped, 5, 6), both.resize(np.ascontiguousarray(flipped), 5, 6))


def test_a_missing_extension_is_said_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "dreammix_trt._cpp", None)
    monkeypatch.delenv("DREAMMIX_KERNELS", raising=False)
    with caplog.at_level(logging.WARNING):
        assert kernels._choose() is numpy_kernels
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "C++ extension is missing" in caplog.text
    assert "a few pixels may differ by one level of 256" in caplog.text


def test_numpy_can_be_forced(monkeypatch, caplog):
    monkeypatch.setenv("DREAMMIX_KERNELS", "numpy")
    with caplog.at_level(logging.WARNING):
        assert kernels._choose() is numpy_kernels
    assert not caplog.records


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("slot", [(70, 130, 0, 130, False), (40, 33, 7, 90, False), (40, 33, 7, 90, True)], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 5, 64])
@needs_cpp
def test_both_merge_the_same_bits(rank: int, slot: tuple[int, int, int, int, bool], half: bool) -> None:
    inputs, outputs, at, stride, flipped = slot
    place = Slot("x", inputs, outputs, "w", at, stride, flipped)
    pristine = (
        rng(1)
        .standard_normal(at + stride * (outputs if flipped else inputs))
        .astype(np.float16 if half else np.float32)
    )
    a, b = (
        rng(2 + n).standard_normal(shape).astype(np.float32)
        for n, shape in enumerate(((inputs, rank), (rank, outputs)))
    )
    found, expected = pristine.copy(), pristine.copy()
    kernels.merge_weight(pristine, found, place, a, 0.1 * b)
    merge_slot(pristine, expected, place, a, np.float32(0.1) * b)
    np.testing.assert_array_equal(found, expected)
    outside = np.ones(pristine.size, bool)
    place.view(outside)[...] = False
    assert np.array_equal(found[outside], pristine[outside]), "what lies between the rows is not its own"
    assert (found != pristine).any() == (rank > 0)


def test_merging_refuses_what_does_not_fit(both: ModuleType) -> None:
    slot, weight = Slot.of("x", 4, 3), np.zeros((4, 3), np.float32)
    a, b = np.ones((4, 2), np.float32), np.ones((2, 3), np.float32)
    both.merge_weight(weight, weight.copy(), slot, a, b)
    for pristine, out, place, message in (
        (weight.astype(np.float64), weight, slot, "pristine must be"),
        (weight, weight.astype(np.float16), slot, "out is not like pristine"),
        (weight, weight[:3], slot, "out is not like pristine"),
        (weight, weight, slot._replace(at=1), "x is not in"),
        (weight, weight, slot._replace(stride=2), "rows of 3 numbers are 2 apart"),
        (weight, weight, slot._replace(inputs=5), "are not the factors of 5 -> 3"),
    ):
        with pytest.raises(ValueError, match=message):
            both.merge_weight(pristine, out.copy(), place, a, b)
