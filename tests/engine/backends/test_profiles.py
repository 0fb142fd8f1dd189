"""Shapes of engines: SDXL's numbers, their scaling, and what a request must keep to."""

from __future__ import annotations

from typing import Any

import pytest

from dreammix_trt.core.errors import InputError
from dreammix_trt.engine.backends.tensorrt.profiles import Profile, fits, profiles_for

UNET: list[dict[str, Any]] = [
    {"name": "sample", "dtype": "float16", "shape": ["rows", 4, "h", "w"]},
    {"name": "inpaint_feature", "dtype": "float16", "shape": ["pictures", 320, "h", "w"]},
    {"name": "time_ids", "dtype": "float16", "shape": ["rows", 6]},
]


def list_sizes(pictures: int, call: str = "step") -> list[tuple[tuple[int, ...], ...]]:
    """(rows, pictures) of every profile: the smallest, the usual and the largest."""
    profiles = profiles_for(UNET, pictures=pictures, shapes="static", latent_side=128, call=call)
    names = ("sample", "inpaint_feature")
    return [tuple(tuple(shape[0] for shape in profile.shapes[name]) for name in names) for profile in profiles]


def test_static_shapes_are_fixed_for_one_row_and_for_two() -> None:
    one, two = profiles_for(UNET, pictures=1, shapes="static", latent_side=128)
    for profile, rows in ((one, 1), (two, 2)):
        assert profile.shapes == {
            "sample": ((rows, 4, 128, 128),) * 3,
            "inpaint_feature": ((1, 320, 128, 128),) * 3,
            "time_ids": ((rows, 6),) * 3,
        }


def test_one_picture_and_the_full_batch_are_fixed_and_the_rest_is_a_range() -> None:
    one = [((1, 1, 1), (1, 1, 1)), ((2, 2, 2), (1, 1, 1))]
    assert list_sizes(1) == one
    assert list_sizes(2) == [*one, ((2, 2, 2), (2, 2, 2)), ((4, 4, 4), (2, 2, 2))]
    assert list_sizes(4) == [*one, ((4, 4, 4), (4, 4, 4)), ((8, 8, 8), (4, 4, 4)), ((2, 8, 8), (2, 4, 4))]


def test_a_span_of_lengths_has_profiles_of_its_own_behind_the_single_ones() -> None:
    kv = [{"name": "k", "shape": ["rows", "context", 8]}]
    profiles = profiles_for(kv, pictures=1, shapes="static", latent_side=128, contexts=(77, (78, 125)), call="stage")
    assert [tuple(shape[1] for shape in each.shapes["k"]) for each in profiles] == [(77,) * 3] * 2 + [
        (78, 101, 125)
    ] * 2
    chosen = [next(k for k, each in enumerate(profiles) if each.holds({"k": (2, rows, 8)})) for rows in (77, 78, 125)]
    assert chosen == [1, 3, 3]


@pytest.mark.parametrize("pictures", [1, 2, 3, 5])
def test_every_batch_up_to_the_largest_has_a_profile(pictures: int) -> None:
    profiles = profiles_for(UNET[:2], pictures=pictures, shapes="static", latent_side=128)
    for count in range(1, pictures + 1):
        for rows in (count, 2 * count):
            shapes = {"sample": (rows, 4, 128, 128), "inpaint_feature": (count, 320, 128, 128)}
            assert any(profile.holds(shapes) for profile in profiles), (count, rows)


def test_what_is_called_for_one_has_no_other_profile() -> None:
    assert list_sizes(4, "prompt") == [((1, 1, 1), (1, 1, 1))]
    image = [{"name": "image", "dtype": "float32", "shape": ["pictures", 3, "H", "W"]}]
    (profile,) = profiles_for(image, pictures=4, shapes="static", latent_side=128, call="vae")
    assert profile.shapes == {"image": ((1, 3, 1024, 1024),) * 3}


def test_dynamic_shapes_are_a_landscape_and_its_transpose() -> None:
    wide, *_, tall = profiles_for(UNET, pictures=1, shapes="dynamic", latent_side=128)
    assert wide.shapes["sample"] == ((1, 4, 88, 88), (1, 4, 128, 128), (1, 4, 128, 168))
    assert tall.shapes["sample"] == ((2, 4, 88, 88), (2, 4, 128, 128), (2, 4, 168, 128))


def test_pictures_are_eight_times_as_large_as_latents() -> None:
    image = [{"name": "image", "dtype": "float32", "shape": ["pictures", 3, "H", "W"]}]
    wide, tall = profiles_for(image, pictures=1, shapes="dynamic", latent_side=128)
    assert wide.shapes["image"] == ((1, 3, 704, 704), (1, 3, 1024, 1024), (1, 3, 1024, 1344))
    assert tall.shapes["image"][2] == (1, 3, 1344, 1024)


@pytest.mark.parametrize("side, step, low, high", [(128, 8, 88, 168), (64, 8, 48, 88), (16, 1, 11, 21), (8, 8, 8, 8)])
def test_sides_scale_with_the_base_and_keep_to_the_step(side: int, step: int, low: int, high: int) -> None:
    wide = profiles_for(UNET, pictures=1, shapes="dynamic", latent_side=side, step=step)[0]
    assert wide.shapes["sample"] == ((1, 4, low, low), (1, 4, side, side), (1, 4, side, high))


def test_networks_without_sides_have_one_profile() -> None:
    text = [{"name": "input_ids", "shape": ["rows", 77]}, {"name": "lora", "shape": ["pictures", 9]}]
    (profile,) = profiles_for(text, pictures=1, shapes="dynamic", latent_side=128, call="prompt")
    assert profile.shapes == {"input_ids": ((1, 77),) * 3, "lora": ((1, 9),) * 3}
    (fixed,) = profiles_for([{"name": "x", "shape": [2, 3]}], pictures=4, shapes="dynamic", latent_side=128)
    assert fixed.shapes == {"x": ((2, 3), (2, 3), (2, 3))}


def test_every_released_size_of_sdxl_fits_a_profile() -> None:
    """The size buckets SDXL was trained on that lie between 88 and 168 latent units a side."""
    profiles = profiles_for(UNET[:1], pictures=1, shapes="dynamic", latent_side=128)
    for height, width in ((1024, 1024), (896, 1152), (1152, 896), (832, 1216), (1216, 832), (768, 1344), (1344, 768)):
        h, w = height // 8, width // 8
        assert fits(h, w, 128)
        assert any(profile.holds({"sample": (2, 4, h, w)}) for profile in profiles), (h, w)


def test_the_area_is_bounded() -> None:
    assert fits(128, 128, 128) and fits(96, 168, 128) and not fits(128, 136, 128)


def test_what_a_profile_does_not_hold() -> None:
    profile = Profile({"x": ((1, 8), (2, 8), (4, 8))})
    assert profile.holds({"x": (4, 8)})
    for shapes in ({"x": (5, 8)}, {"x": (0, 8)}, {"x": (1, 9)}, {"x": (1,)}, {"y": (1, 8)}, {"x": (1, 8), "y": (1, 8)}):
        assert not profile.holds(shapes)


@pytest.mark.parametrize(
    "change, named",
    [({"pictures": 0}, "0 pictures"), ({"shapes": "any"}, "'any'"), ({"latent_side": 100}, "100"), ({"step": 0}, "0")],
)
def test_impossible_wishes_are_named(change: dict[str, Any], named: str) -> None:
    wish: dict[str, Any] = {"pictures": 1, "shapes": "static", "latent_side": 128} | change
    with pytest.raises(InputError, match=named):
        profiles_for(UNET, **wish)


def test_an_unknown_side_is_named() -> None:
    with pytest.raises(InputError, match=r"sample .* 'depth'"):
        profiles_for([{"name": "sample", "shape": ["depth"]}], pictures=1, shapes="static", latent_side=128)
