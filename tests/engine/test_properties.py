"""What holds for every picture, mask and vector."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from dreammix_trt.engine import kernels
from dreammix_trt.engine.canvas import frames as canvas
from dreammix_trt.engine.canvas import geometry

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def masks(draw: st.DrawFn, most: int = 200) -> canvas.U8:
    """A mask with one white rectangle."""
    height, width = draw(st.integers(1, most)), draw(st.integers(1, most))
    r0, c0 = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    r1, c1 = draw(st.integers(r0 + 1, height)), draw(st.integers(c0 + 1, width))
    mask = np.zeros((height, width), np.uint8)
    mask[r0:r1, c0:c1] = 255
    return mask


def draw_vectors(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def measure_distances(mask: canvas.U8) -> npt.NDArray[np.int64]:
    """Chebyshev distance to a rectangular mask."""
    r0, r1, c0, c1 = geometry.mask_bounds(mask)
    rows, cols = np.arange(mask.shape[0])[:, None], np.arange(mask.shape[1])[None]
    down = np.maximum(np.maximum(r0 - rows, rows - r1 + 1), 0)
    return np.maximum(down, np.maximum(np.maximum(c0 - cols, cols - c1 + 1), 0))


@SETTINGS
@given(masks(), st.floats(0, 1))
def test_reference_boxes_lie_in_the_frame_and_span_the_field(mask: canvas.U8, field: float) -> None:
    r0, r1, c0, c1 = geometry.crop_box(mask, field, threshold=0)
    assert 0 <= r0 < r1 <= mask.shape[0] and 0 <= c0 < c1 <= mask.shape[1]
    assert r1 - r0 >= field * mask.shape[0] and c1 - c0 >= field * mask.shape[1]


@SETTINGS
@given(masks(), st.floats(0, 1), st.sampled_from([(128, 32), (1024, 32)]))
def test_native_boxes_lie_in_the_picture_and_contain_the_mask(
    mask: canvas.U8, field: float, base: tuple[int, int]
) -> None:
    laid = canvas.Canvas.of(np.zeros((*mask.shape, 3), np.uint8), mask, native=base[0], divisor=base[1])
    r0, r1, c0, c1 = laid.box(field)
    top, bottom, left, right = geometry.mask_bounds(mask)
    assert 0 <= r0 <= top and bottom <= r1 <= mask.shape[0]
    assert 0 <= c0 <= left and right <= c1 <= mask.shape[1]


@SETTINGS
@given(masks(), st.floats(0, 1))
def test_frames_for_one_square_are_that_square_and_contain_the_mask(mask: canvas.U8, field: float) -> None:
    """Square boxes wherever the picture is large enough for one around the mask."""
    laid = canvas.Canvas.of(np.zeros((*mask.shape, 3), np.uint8), mask, native=64, divisor=32, sizes=[(64, 64)])
    r0, r1, c0, c1 = laid.box(field)
    top, bottom, left, right = geometry.mask_bounds(mask)
    assert 0 <= r0 <= top and bottom <= r1 <= mask.shape[0]
    assert 0 <= c0 <= left and right <= c1 <= mask.shape[1]
    if max(bottom - top, right - left) <= min(mask.shape):
        assert r1 - r0 == c1 - c0
    for frame in (laid.first_frame(field, fill=False), laid.global_frame(field)):
        assert frame.size == (64, 64) == frame.image.shape[:2] and frame.box == (r0, r1, c0, c1)


@SETTINGS
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([(128, 32), (256, 32), (1024, 64)]))
def test_native_work_sizes_are_those_of_the_profile(height: int, width: int, base: tuple[int, int]) -> None:
    assert geometry.work_size((height, width), *base) in geometry.profile_sizes(*base)


@SETTINGS
@given(st.integers(1, 1024), st.floats(1, 2), st.booleans(), st.sampled_from([(128, 32), (256, 32), (1024, 64)]))
def test_reference_work_sizes_settle(short: int, aspect: float, tall: bool, base: tuple[int, int]) -> None:
    """For all crops a square frame can have; longer ones may make the reference's rounding go to and fro."""
    size = (int(short * aspect), short) if tall else (short, int(short * aspect))
    assert geometry.size_class(geometry.reference_work_size(size, *base), base[1]) == base[0]


@SETTINGS
@given(masks(), st.integers(1, 60))
def test_feather_falls_with_distance(mask: canvas.U8, width: int) -> None:
    weight, distance = kernels.feather(mask, width), measure_distances(mask)
    assert (weight[distance == 0] == 255).all() and not weight[distance >= width].any()
    along = [int(weight[distance == d].max()) for d in range(int(distance.max()) + 1) if (distance == d).any()]
    assert along == sorted(along, reverse=True)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(masks(120), st.floats(0, 1), st.integers(0, 2**32), st.booleans())
def test_far_pixels_stay_bit_for_bit(mask: canvas.U8, field: float, seed: int, soft: bool) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*mask.shape, 3), np.uint8)
    laid = canvas.Canvas.of(image, mask, native=128, divisor=32)
    local, whole = laid.first_frame(field, fill=False), laid.global_frame(1.0)
    pictures = [rng.integers(0, 256, (*frame.size, 3), np.uint8) for frame in (local, whole)]
    far = measure_distances(mask) >= laid.feather_width
    handed = laid.paste(local, pictures[0], soft=soft)
    for kept in ((local, pictures[0]), None):
        final = laid.compose(whole, pictures[1], local=kept)
        np.testing.assert_array_equal(final[far], image[far])
    np.testing.assert_array_equal(handed[far], image[far])


@SETTINGS
@given(masks(), st.integers(1, 40))
def test_the_seam_is_a_share(mask: canvas.U8, width: int) -> None:
    seam = canvas.seam_weight(mask, width)
    assert seam.dtype == np.uint8 and (seam[mask == 0] == 255).all()


@SETTINGS
@given(st.integers(0, 2**32), st.integers(2, 64), st.integers(1, 6))
def test_nothing_of_the_direction_is_left(seed: int, width: int, rows: int) -> None:
    tokens, remove = draw_vectors(seed, rows, width), draw_vectors(seed + 1, 1, width)
    out = kernels.tas_project(tokens, remove, range(rows))
    lengths = np.linalg.norm(tokens, axis=1) * np.linalg.norm(remove)
    assert (np.abs(out.astype(np.float64) @ remove[0]) <= 1e-5 * lengths + 1e-6).all()
    np.testing.assert_allclose(kernels.tas_project(out, remove, range(rows)), out, atol=1e-5)
    np.testing.assert_array_equal(kernels.tas_project(tokens, np.zeros_like(remove), range(rows)), tokens)


@SETTINGS
@given(st.integers(0, 2**32), st.floats(0, 15))
def test_blend_takes_one_side_at_the_ends_of_the_mask(seed: int, sigma: float) -> None:
    x, background, noise = (draw_vectors(seed + n, 1, 4, 5, 6) for n in range(3))
    ones = np.ones((1, 1, 5, 6), np.float32)
    inside, scaled = kernels.blend_scale(x, background, ones, noise, sigma)
    np.testing.assert_array_equal(inside, x)
    np.testing.assert_allclose(scaled[1], x[0] / np.sqrt(sigma**2 + 1), rtol=1e-5, atol=1e-7)
    outside, _ = kernels.blend_scale(x, background, ones * 0, noise, sigma)
    np.testing.assert_allclose(outside, background + np.float32(sigma) * noise, rtol=1e-5, atol=1e-5)
