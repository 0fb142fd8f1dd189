"""Noise is a pure function of (seed, draw, step, element)."""

from __future__ import annotations

import numpy as np
import pytest

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.noise import DRAWS, ReplayNoise, SeededNoise, normals, philox

FULL = 0xFFFFFFFF

#: Published known answers of Philox4x32-10 (Random123): counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert tuple(philox(np.array([counter], np.uint32), key)[0]) == expected


def test_normals_are_what_the_module_says():
    """Element 6 of (seed, draw, step) by hand: block 1, third of its four numbers."""
    seed, draw, step = 0x0123456789ABCDEF, 5, 9
    words = philox(np.array([[1, 0, step, draw]], np.uint32), (0x89ABCDEF, 0x01234567))[0].astype(np.float64)
    u2, u3 = (words[2:] + 0.5) / 2**32
    assert normals(seed, draw, step, (7,))[6] == np.float32(np.sqrt(-2 * np.log(u2)) * np.cos(2 * np.pi * u3))


def test_normals_look_normal_and_do_not_repeat():
    sample = normals(1, 2, 3, (100_000,)).astype(np.float64)
    assert abs(sample.mean()) < 0.015
    assert abs(sample.std() - 1) < 0.01
    assert abs((sample**4).mean() - 3) < 0.1
    for other in (normals(2, 2, 3, (100,)), normals(1, 3, 3, (100,)), normals(1, 2, 4, (100,))):
        assert not np.any(other == sample[:100].astype(np.float32))


def test_elements_do_not_depend_on_the_shape():
    long = normals(7, 0, 0, (4, 5, 5))
    assert np.array_equal(normals(7, 0, 0, (3,)), long.reshape(-1)[:3])
    assert normals(7, 0, 0, ()).shape == ()
    assert normals(7, 0, 0, (0, 4)).shape == (0, 4)


@pytest.mark.parametrize("arguments", [(-1, 0, 0), (1 << 64, 0, 0), (0, 1 << 32, 0), (0, 0, -1)])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(InputError, match="must lie in"):
        normals(*arguments, (1,))


def test_seeded_noise_draws_by_label_and_step():
    noise = SeededNoise(11)
    assert np.array_equal(noise.draw("init_noise", (1, 4, 2, 2)), normals(11, DRAWS["init_noise"], 0, (1, 4, 2, 2)))
    third = noise.draw("blend_noise_step03", (8,), 3)
    assert np.array_equal(third, normals(11, DRAWS["blend_noise"], 3, (8,)))
    assert not np.array_equal(third, noise.draw("solver_noise_step03", (8,), 3))


def test_seeded_noise_refuses_other_labels_and_steps():
    with pytest.raises(InputError, match="unknown"):
        SeededNoise(0).draw("blent_noise_step03", (1,), 3)
    with pytest.raises(InputError, match="names step 3"):
        SeededNoise(0).draw("blend_noise_step03", (1,), 4)


def test_draw_numbers_stay_what_they_are():
    """A changed number would change what every saved seed means."""
    assert list(DRAWS.values()) == list(range(9))
    assert list(DRAWS)[:4] == ["init_noise", "blend_noise", "solver_noise", "renoise_switch"]


def test_replayed_noise_is_the_recorded_one():
    recorded = np.arange(8.0).reshape(1, 4, 1, 2)
    noise = ReplayNoise({"init_noise": recorded})
    drawn = noise.draw("init_noise", recorded.shape)
    assert drawn.dtype == np.float32 and np.array_equal(drawn, recorded)
    drawn[:] = 0
    assert np.array_equal(noise.draw("init_noise", recorded.shape), recorded)
    with pytest.raises(InputError, match="recorded are init_noise"):
        noise.draw("blend_noise_step00", (1,), 0)
    with pytest.raises(InputError, match="shape"):
        noise.draw("init_noise", (1, 4, 2, 2))
