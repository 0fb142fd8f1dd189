"""E4M3 by numpy against two implementations that are not ours."""

from __future__ import annotations

import numpy as np
import pytest

from dreammix_trt.core.float8 import LARGEST, from_e4m3, scale_for, to_e4m3

ml_dtypes = pytest.importorskip("ml_dtypes")
CODES = np.arange(256, dtype=np.uint8)


def ml_codes(values: np.ndarray) -> np.ndarray:
    """The codes by ml_dtypes, which does not saturate; so we clip before."""
    clipped = np.clip(values.astype(np.float32), -LARGEST, LARGEST)
    return clipped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def test_every_code_is_the_number_that_others_read() -> None:
    theirs = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(from_e4m3(CODES), theirs)
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(from_e4m3(CODES), torch.from_numpy(CODES).view(torch.float8_e4m3fn).float().numpy())


def test_every_number_finds_its_own_code() -> None:
    finite = CODES[CODES & 0x7F != 0x7F]
    np.testing.assert_array_equal(to_e4m3(from_e4m3(finite)), finite)
    assert to_e4m3(np.array([np.nan, -np.nan], np.float32)).tolist() in ([0x7F, 0xFF], [0xFF, 0x7F])


def test_ties_go_to_the_even_code_and_their_neighbours_do_not() -> None:
    numbers = from_e4m3(np.arange(0x7F, dtype=np.uint8))
    ties = ((numbers[1:].astype(np.float64) + numbers[:-1]) / 2).astype(np.float32)
    assert (to_e4m3(ties) % 2 == 0).all()
    around = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))])
    for values in (around, -around):
        np.testing.assert_array_equal(to_e4m3(values), ml_codes(values))


def test_any_float_becomes_the_code_that_others_give() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], np.float32([0, -0.0, 2**-10, 2**-11, 1e-40, 464, 480, 3e38])])
    np.testing.assert_array_equal(to_e4m3(values), ml_codes(values))


def test_what_is_too_large_saturates() -> None:
    values = np.float32([449, 1e30, np.inf, -500, -np.inf])
    assert from_e4m3(to_e4m3(values)).tolist() == [448, 448, 448, -448, -448]


@pytest.mark.parametrize("headroom", [1.0, 2.0])
def test_a_scale_is_the_smallest_power_of_two_that_holds_the_largest(headroom: float) -> None:
    for largest in (0.05, 0.3, 1.0, 448.0, 448.1, 1234.5):
        scale = scale_for(largest, headroom)
        assert np.log2(scale) == round(np.log2(scale))
        assert headroom * largest / scale <= LARGEST < 2 * headroom * largest / scale
    assert scale_for(0.0) == 1.0
    assert scale_for(1e-30) == 2.0**-14
