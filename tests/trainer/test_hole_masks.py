"""Holes: the same seed gives the same ones, in the shares and sizes that are promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from dreammix_trt.trainer import hole_masks
from dreammix_trt.trainer.hole_masks import (
    LEAST_AREA,
    MOST_PATCHES,
    SHARES,
    choose_kind,
    draw_box,
    draw_hole,
    draw_kind,
    draw_outline,
    draw_strokes,
    place_object,
    top_up,
    touched_patches,
)

Mask = NDArray[np.bool_]


def corner() -> Mask:
    """A silhouette that looks like none of the outlines: an L."""
    mask = np.zeros((40, 30), bool)
    mask[5:35, 5:10] = True
    mask[30:35, 5:25] = True
    return mask


@pytest.mark.parametrize("objects", [(), (corner(),)], ids=["outlines", "given"])
def test_the_seed_decides_the_holes(objects: tuple[Mask, ...]) -> None:
    first, again, other = (
        [draw_hole(rng, 64, objects) for _ in range(20)]
        for rng in (np.random.default_rng(3), np.random.default_rng(3), np.random.default_rng(4))
    )
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(np.array_equal(one, two) for one, two in zip(first, other, strict=True))


def test_kinds_come_in_their_shares() -> None:
    rng, count = np.random.default_rng(0), 20_000
    found = Counter(choose_kind(rng) for _ in range(count))
    assert sum(SHARES.values()) == pytest.approx(1)
    assert SHARES["shape"] + SHARES["shape and strokes"] == 0.5 and SHARES["strokes"] == 0.4
    for kind, share in SHARES.items():
        assert found[kind] / count == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize(("side", "patches"), [(64, 16), (96, 8)])
@pytest.mark.parametrize("objects", [(), (corner(),)], ids=["outlines", "given"])
def test_holes_are_neither_too_small_nor_too_large(objects: tuple[Mask, ...], side: int, patches: int) -> None:
    rng = np.random.default_rng(1)
    holes = [draw_hole(rng, side, objects, patches=patches) for _ in range(300)]
    areas = np.array([hole.mean() for hole in holes])
    assert all(hole.shape == (side, side) and hole.dtype == np.bool_ for hole in holes)
    assert areas.min() >= LEAST_AREA
    assert max(touched_patches(hole, patches).mean() for hole in holes) <= MOST_PATCHES
    assert 0.15 < np.median(areas) < 0.4 and areas.max() > 0.5, "both small and large ones"


def test_what_a_kind_promises_is_kept_where_no_try_fits() -> None:
    """A hair can cover no tenth of a picture, however it is placed: an oval serves."""
    hair = np.zeros((400, 400), bool)
    hair[:, 200] = True
    rng = np.random.default_rng(5)
    for _ in range(20):
        assert draw_hole(rng, 64, (hair,)).mean() >= LEAST_AREA


@pytest.mark.parametrize("draw", [draw_strokes, draw_box, draw_outline])
def test_every_kind_marks_something_of_a_picture(draw: Callable[[np.random.Generator, int], Mask]) -> None:
    rng = np.random.default_rng(2)
    areas = np.array([draw(rng, 64).mean() for _ in range(200)])
    assert areas.min() > 0 and areas.max() < 1 and areas.std() > 0.05


def test_boxes_and_all_but_boxes_are_equally_frequent() -> None:
    rng = np.random.default_rng(0)
    outside = 0
    for _ in range(400):
        hole = draw_box(rng, 64)
        inner = ~hole if hole[[0, 0, -1, -1], [0, -1, 0, -1]].sum() >= 3 else hole
        outside += inner is not hole
        rows, columns = inner.any(1), inner.any(0)
        assert inner.sum() == rows.sum() * columns.sum(), "a rectangle"
    assert 160 < outside < 240


def test_a_shape_joined_by_strokes_has_both(monkeypatch: pytest.MonkeyPatch) -> None:
    left, top = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    left[:, :10], top[:10] = True, True
    monkeypatch.setattr(hole_masks, "draw_outline", lambda *_: left)
    monkeypatch.setattr(hole_masks, "draw_strokes", lambda *_: top)
    rng = np.random.default_rng(0)
    assert np.array_equal(draw_kind(rng, "shape and strokes", 64), left | top)
    assert np.array_equal(draw_kind(rng, "shape", 64), left)
    assert np.array_equal(draw_kind(rng, "strokes", 64), top)


def test_a_given_silhouette_keeps_its_form() -> None:
    """It stays an L: about as much of its box is filled as before, where the picture does not cut it."""
    rng, silhouette = np.random.default_rng(0), corner()
    inner = [mask for _ in range(100) if _is_inside(mask := place_object(rng, silhouette, 128))]
    shares = [mask.sum() / np.prod([np.ptp(np.nonzero(mask)[axis]) + 1 for axis in (0, 1)]) for mask in inner]
    assert len(inner) > 20 and min(shares) > 0.2 and max(shares) < 0.55  # 0.42 where it is not turned
    lengths = [max(np.ptp(np.nonzero(mask)[axis]) for axis in (0, 1)) for mask in inner]
    assert min(lengths) < 40 and max(lengths) > 60


def _is_inside(mask: Mask) -> bool:
    edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return bool(mask.any()) and not edge.any()


@pytest.mark.parametrize("patches", [16, 8])
def test_patches_are_topped_up_exactly(patches: int) -> None:
    rng = np.random.default_rng(0)
    added = np.zeros((patches, patches))
    for _ in range(100):
        hole = draw_hole(rng, 64, patches=patches)
        full = top_up(rng, hole, patches=patches)
        assert touched_patches(full, patches).sum() == 0.75 * patches * patches
        assert (full >= hole).all()
        more = full & ~hole
        cells = touched_patches(more, patches)
        assert not (cells & touched_patches(hole, patches)).any(), "what the hole touches gets nothing"
        assert more.sum() == cells.sum() * (64 // patches) ** 2, "whole patches"
        added += cells
    assert (added > 0).all(), "any patch may be the one"


def test_a_hole_that_touches_too_many_patches_is_refused() -> None:
    hole = np.zeros((64, 64), bool)
    hole[::4, ::4] = True
    with pytest.raises(ValueError, match="touches 256 of 256 patches, more than 192"):
        top_up(np.random.default_rng(0), hole)
