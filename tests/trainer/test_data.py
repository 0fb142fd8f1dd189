"""What a view promises."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dreammix_trt.trainer.data import (
    Photograph,
    box_of,
    draw_view,
    latent_mask,
    random_hole,
)


@given(
    width=st.integers(8, 90), height=st.integers(8, 90), corner=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    extent=st.tuples(st.floats(0, 1), st.floats(0, 1)), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_view_shows_the_whole_subject_under_its_hole(
    width: int, height: int, corner: tuple[float, float], extent: tuple[float, float], seed: int
) -> None:
    x0, y0 = int(corner[0] * (width - 1)), int(corner[1] * (height - 1))
    x1, y1 = x0 + 1 + int(extent[0] * (width - x0 - 1)), y0 + 1 + int(extent[1] * (height - y0 - 1))
    subject = np.zeros((height, width), bool)
    subject[y0:y1, x0:x1] = True
    image = np.where(subject, 255, 0).astype(np.uint8)[..., None].repeat(3, 2)
    view = draw_view(np.random.default_rng(seed), Photograph(image, subject, "x"), 32)
    assert view.image.shape == (32, 32, 3)
    assert view.hole.shape == (32, 32)
    assert view.hole.any()
    assert view.sharp_side >= max(x1 - x0, y1 - y0)
    touches_edge = x0 == 0 or y0 == 0 or x1 == width or y1 == height
    if not touches_edge and max(x1 - x0, y1 - y0) >= 4:  # nothing of the subject lies outside the hole
        assert view.image[..., 0][~view.hole].max(initial=0) < 200


def test_equal_seeds_draw_equal_views() -> None:
    subject = np.zeros((30, 40), bool)
    subject[8:20, 10:25] = True
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    photograph = Photograph(image, subject, "00.png")
    first, second, other = (draw_view(np.random.default_rng(seed), photograph, 64) for seed in (1, 1, 2))
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.hole, second.hole)
    assert not np.array_equal(first.hole, other.hole)


def test_random_holes_cover_the_subject_and_grow_as_the_reference_says() -> None:
    subject = np.zeros((128, 128), bool)
    subject[50:80, 40:80] = True
    ratios = []
    for seed in range(40):
        hole = random_hole(np.random.default_rng(seed), subject)
        assert (hole & subject).sum() == subject.sum()
        x0, y0, x1, _ = box_of(hole)
        ratios.append((x1 - x0) / 40)
        assert x0 <= 40
        assert y0 <= 50
    assert 1.05 < min(ratios) < 1.3
    assert 1.6 < max(ratios) < 2.6


def test_a_latent_cell_counts_when_any_pixel_is_masked() -> None:
    hole = np.zeros((16, 24), bool)
    hole[7, 8] = True
    assert latent_mask(hole).tolist() == [[0, 1, 0], [0, 0, 0]]


def test_the_share_of_crops_is_what_was_asked_for() -> None:
    subject = np.zeros((100, 100), bool)
    subject[45:55, 45:55] = True
    photograph = Photograph(np.zeros((100, 100, 3), np.uint8), subject, "x")
    for share in (0.0, 0.3, 1.0):
        sides = [draw_view(np.random.default_rng(seed), photograph, 32, share).sharp_side for seed in range(200)]
        crops = np.mean([side <= 22 for side in sides])  # 1.2 to 2.2 of the subject's 10; a whole one has 90 or more
        assert crops == share or abs(crops - share) < 0.1
