"""The canvas: geometry, both modes, and the way back into the user's picture."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.masks import read_mask
from dreammix_trt.core.pictures import read_image
from dreammix_trt.engine import kernels
from dreammix_trt.engine.canvas import frames as canvas
from dreammix_trt.engine.canvas import geometry
from dreammix_trt.engine.canvas.frames import Canvas, Frame

CASES = ("case1", "case2", "case3")


def make_scene(
    height: int = 300, width: int = 400, box: kernels.Box = (100, 160, 150, 220)
) -> tuple[canvas.U8, canvas.U8]:
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[box[0] : box[1], box[2] : box[3]] = 255
    return image, mask


def digest(picture: canvas.U8) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(picture).tobytes()).digest()


def lay_case(folder: Path) -> tuple[Canvas, Frame, Frame, dict[str, object]]:
    config = json.loads((folder / "config.json").read_text())
    picture = read_image(folder / "input.png")
    mask = read_mask(folder / "mask.png", picture)
    laid = Canvas.of(picture.rgb, mask, mode="reference", native=1024)
    local, whole = laid.first_frame(config["inpaint_respective_field"]), laid.global_frame(config["isf_global_ia"])
    return laid, local, whole, config


@pytest.mark.parametrize("case", CASES)
def test_reference_frames_equal_the_recorded_ones(golden: Path, case: str) -> None:
    laid, local, whole, _ = lay_case(golden / case)
    recorded = np.load(golden / case / "golden.npz")
    assert digest(laid.image) == recorded["input_1024_sha256"].tobytes()
    np.testing.assert_array_equal(laid.mask, recorded["mask_1024"])
    np.testing.assert_array_equal(laid.feather, recorded["feather"])
    for stage, frame in (("lcg", local), ("gch", whole)):
        assert frame.box == tuple(recorded[f"{stage}_crop_box"])
        assert frame.image.shape[:2] == tuple(recorded[f"{stage}_work_size"])
        np.testing.assert_array_equal(frame.mask, recorded[f"{stage}_crop_mask"])
        assert digest(frame.image) == recorded[f"{stage}_image_sha256"].tobytes()
        np.testing.assert_array_equal(frame.latent_mask, recorded[f"{stage}_latent_mask"])
    assert local.fill is not None
    assert digest(local.fill) == recorded["lcg_fill_sha256"].tobytes()
    assert whole.fill is None


@pytest.mark.parametrize("case", CASES)
def test_reference_pastes_equal_the_recorded_ones(golden: Path, case: str) -> None:
    folder = golden / case
    laid, local, whole, config = lay_case(folder)

    def read_recorded(name: str) -> canvas.U8:
        return np.asarray(Image.open(folder / f"{name}.png"))

    handed = laid.paste(local, read_recorded("switch_decoded_rgb"), soft=bool(config["soft_blending"]))
    np.testing.assert_array_equal(handed, read_recorded("switch_repasted_rgb"))
    arrays = np.load(folder / "golden.npz")
    if "switch_crop_rgb_sha256" in arrays:
        assert digest(laid.crop(handed, whole)) == arrays["switch_crop_rgb_sha256"].tobytes()
    last = laid.compose(whole, read_recorded("final_decoded_rgb"), local=(local, read_recorded("switch_decoded_rgb")))
    np.testing.assert_array_equal(last, read_recorded("final_image"))


def test_the_masked_input_is_grey_in_the_hole_and_background_is_filled() -> None:
    image, mask = make_scene(256, 256, (96, 160, 96, 160))
    frame = Canvas.of(image, mask, native=256).first_frame(1.0)
    hole = frame.network_mask[None, None] > 127
    assert frame.masked.shape == (1, 3, 256, 256) and frame.masked.dtype == np.float32
    assert not frame.masked[np.broadcast_to(hole, frame.masked.shape)].any()
    np.testing.assert_array_equal(frame.masked * ~hole, frame.background * ~hole)
    assert abs(float(frame.background[0, :, 128, 128].mean())) < 0.3  # noise around, blurred


def test_bytes_survive_the_latent_range() -> None:
    picture = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_array_equal(canvas.from_decoded(canvas.to_latent_range(picture)), picture)
    assert canvas.from_decoded(np.full((1, 3, 8, 8), 9, np.float32)).min() == 255


@pytest.mark.parametrize(("native", "snap"), [(128, 32), (256, 32), (1024, 64)])
def test_native_sizes_fit_the_profile(native: int, snap: int) -> None:
    sizes = geometry.profile_sizes(native, snap)
    assert (native, native) in sizes
    for h, w in sizes:
        assert h % snap == 0 and w % snap == 0
        assert h * w <= native**2
        assert 88 / 128 <= h / native <= 168 / 128 and 88 / 128 <= w / native <= 168 / 128


@pytest.mark.parametrize(
    ("size", "native", "expected"),
    [
        ((1024, 1024), 128, (128, 128)),
        ((300, 400), 128, (96, 128)),
        ((40, 40), 128, (128, 128)),
        ((1080, 1920), 1024, (768, 1344)),
        ((513, 513), 1024, (1024, 1024)),
        ((2000, 3000), 1024, (832, 1216)),
    ],
)
def test_native_work_size(size: geometry.Size, native: int, expected: geometry.Size) -> None:
    assert geometry.work_size(size, native, 32 if native == 128 else 64) == expected


def test_an_allowed_aspect_keeps_the_whole_picture() -> None:
    image, mask = make_scene(300, 400)
    assert Canvas.of(image, mask, native=128).global_frame(1.0).box == (0, 300, 0, 400)


def test_a_long_picture_is_cut_around_the_mask() -> None:
    image, mask = make_scene(200, 1000, (90, 110, 800, 840))
    r0, r1, c0, c1 = Canvas.of(image, mask, native=128).global_frame(1.0).box
    assert (r0, r1) == (0, 200) and (c1 - c0) == int(200 * 160 / 96)
    assert c0 <= 800 and 840 <= c1 <= 1000


def test_a_mask_longer_than_any_profile_stays_whole() -> None:
    image, mask = make_scene(100, 1000, (40, 60, 0, 1000))
    frame = Canvas.of(image, mask, native=128).first_frame(0.5)
    assert frame.box == (0, 100, 0, 1000)
    assert frame.size in geometry.profile_sizes(128, 32)


def test_one_pixel_works() -> None:
    laid = Canvas.of(np.full((1, 1, 3), 9, np.uint8), np.full((1, 1), 255, np.uint8), native=128)
    frame = laid.first_frame(0.5)
    assert frame.size == (128, 128) and frame.latent_mask.all()
    assert laid.compose(frame, np.full((128, 128, 3), 77, np.uint8)).tolist() == [[[77, 77, 77]]]


def test_a_speck_survives_the_way_down() -> None:
    image, mask = make_scene(2000, 2000, (1001, 1002, 700, 701))
    assert Canvas.of(image, mask, native=128).global_frame(1.0).latent_mask.sum() == 1


def test_an_empty_mask_is_refused() -> None:
    image, mask = make_scene()
    with pytest.raises(InputError, match="repaints nothing"):
        Canvas.of(image, mask // 2, native=128)


@pytest.mark.parametrize(("size", "width"), [((1024, 1024), 32), ((512, 900), 16), ((64, 64), 2), ((1, 1), 2)])
def test_feather_follows_the_short_side(size: geometry.Size, width: int) -> None:
    assert geometry.feather_width(size) == width


def test_fill_radii_follow_the_native_side() -> None:
    assert geometry.fill_cascade(1024) == list(kernels.CASCADE)
    assert [radius for radius, _ in geometry.fill_cascade(128)] == [64, 32, 16, 8, 4, 2, 1, 1]


def test_dilation_reaches_exactly_as_far_as_asked() -> None:
    _, mask = make_scene(700, 700, (350, 351, 350, 351))
    for reach in (0, 1, 3, 250, 300):
        assert geometry.mask_bounds(canvas.dilate_mask(mask, reach)) == (
            350 - reach,
            351 + reach,
            350 - reach,
            351 + reach,
        )


def test_seam_takes_the_edge_from_the_global_stage_and_the_core_from_the_local_one() -> None:
    _, mask = make_scene(200, 200, (60, 140, 60, 140))
    seam = canvas.seam_weight(mask, 10)
    assert (seam[mask == 0] == 255).all()
    assert seam[100, 100] == 0 and seam[60, 100] > 0.85 * 255
    assert (np.diff(seam[60:100, 100].astype(int)) <= 0).all()
    thin = canvas.seam_weight(make_scene(50, 50, (20, 25, 20, 25))[1], 32)
    assert thin[22, 22] == 0
    assert (canvas.seam_weight(np.full((5, 5), 255, np.uint8), 2) == 0).all()  # no edge, no seam


def test_a_coarse_global_stage_keeps_the_local_inside() -> None:
    image, mask = make_scene(512, 512, (200, 300, 200, 300))
    laid = Canvas.of(image, mask, native=128)
    local, whole = laid.first_frame(0.3), laid.global_frame(1.0)
    red, blue = np.zeros((128, 128, 3), np.uint8), np.zeros((128, 128, 3), np.uint8)
    red[..., 0], blue[..., 2] = 200, 200
    assert whole.scale > local.scale > 1
    out = laid.compose(whole, blue, local=(local, red))
    assert out[250, 250].tolist() == [200, 0, 0]
    assert out[200, 250, 2] > 180  # at the edge the global picture
    assert laid.compose(whole, blue)[250, 250].tolist() == [0, 0, 200]
    np.testing.assert_array_equal(out[mark_far(mask, laid.feather_width)], image[mark_far(mask, laid.feather_width)])


def mark_far(mask: canvas.U8, distance: int) -> np.ndarray:
    return canvas.dilate_mask(mask, distance - 1) == 0


def test_a_fine_global_stage_is_taken_whole() -> None:
    image, mask = make_scene(128, 128, (40, 80, 40, 80))
    laid = Canvas.of(image, mask, native=128)
    local, whole = laid.first_frame(0.5), laid.global_frame(1.0)
    blue = np.zeros((128, 128, 3), np.uint8)
    assert laid.compose(whole, blue, local=(local, blue + 200))[60, 60].tolist() == [0, 0, 0]


# Engines that do not take every frame


def test_a_square_engine_gets_the_square_around_the_mask() -> None:
    image, mask = make_scene(200, 1000, (90, 110, 800, 840))
    laid = Canvas.of(image, mask, native=128, sizes=[(128, 128)])
    for frame in (laid.first_frame(0.3), laid.global_frame(1.0)):
        r0, r1, c0, c1 = frame.box
        assert frame.size == (128, 128) and r1 - r0 == c1 - c0
        assert r0 <= 90 and r1 >= 110 and c0 <= 800 and c1 >= 840
    assert laid.global_frame(1.0).box == (0, 200, 720, 920), "as large as the picture has it, the mask in its middle"


def test_a_mask_longer_than_the_only_frame_is_squeezed() -> None:
    image, mask = make_scene(100, 1000, (40, 60, 100, 700))
    frame = Canvas.of(image, mask, native=128, sizes=[(128, 128)]).first_frame(0.5)
    assert frame.box == (0, 100, 100, 700) and frame.size == (128, 128)
    assert frame.mask[:, [0, -1]].any(axis=0).all()


def test_frames_are_chosen_among_the_sizes_that_there_are() -> None:
    """Boxes have aspects between those of the sizes, on either side alone too; equal aspects take the larger one."""
    image, mask = make_scene(300, 400)
    for sizes, box, size in (
        ([(64, 128)], (55, 255, 0, 400), (64, 128)),
        ([(128, 64)], (0, 300, 110, 260), (128, 64)),
        ([(64, 64), (96, 128)], (0, 300, 0, 400), (96, 128)),
        ([(64, 64), (128, 128)], (0, 300, 35, 335), (128, 128)),
    ):
        frame = Canvas.of(image, mask, native=128, sizes=sizes).global_frame(1.0)
        assert frame.size == size
        r0, r1, c0, c1 = frame.box
        assert (r1 - r0, c1 - c0) == (box[1] - box[0], box[3] - box[2]), sizes
        assert r0 <= 100 and r1 >= 160 and c0 <= 150 and c1 >= 220


def test_all_sizes_of_the_profile_are_the_same_as_none_given() -> None:
    image, mask = make_scene(300, 400)
    plain = Canvas.of(image, mask, native=128)
    given = Canvas.of(image, mask, native=128, sizes=geometry.profile_sizes(128, 32))
    for field in (0.1, 0.5, 1.0):
        assert plain.box(field) == given.box(field)
        assert plain.work_size(plain.box(field)) == given.work_size(given.box(field)) == plain.global_frame(field).size


def test_reference_mode_refuses_frames_that_the_engines_do_not_take() -> None:
    image, mask = make_scene(300, 400, (100, 220, 100, 220))
    square = Canvas.of(image, mask, mode="reference", native=128, sizes=[(128, 128)])
    assert square.global_frame(1.0).size == (128, 128)
    wide = make_scene(300, 400, (0, 20, 20, 380))[1]  # the box around it is cut off at the top
    laid = Canvas.of(image, wide, mode="reference", native=128, sizes=[(128, 128)])
    told = r"frame of \d+x\d+ pixels.*larger than any profile.*take 128x128;.*--shapes dynamic"
    with pytest.raises(InputError, match=told):
        laid.first_frame(0.2)
    size = Canvas.of(image, wide, mode="reference", native=128).first_frame(0.2).size
    others = [each for each in geometry.profile_sizes(128, 32) if each != size]
    many = Canvas.of(image, wide, mode="reference", native=128, sizes=[*others, size])
    assert many.first_frame(0.2).size == size
    with pytest.raises(InputError, match="engines take 96x96, 96x128,"):
        replace(many, sizes=tuple(others)).first_frame(0.2)


def test_many_sizes_are_told_by_their_ends() -> None:
    image, mask = make_scene(300, 400, (0, 20, 20, 380))
    sizes = geometry.profile_sizes(1024, 64)
    laid = Canvas.of(image, mask, mode="reference", native=128, sizes=sizes)
    with pytest.raises(InputError, match=rf"take 704x704 to 1344x768 \({len(sizes)} sizes\)"):
        laid.first_frame(0.2)


def test_keeping_the_local_result_is_decided_by_boxes_and_sizes() -> None:
    image, mask = make_scene(512, 512, (200, 300, 200, 300))
    laid = Canvas.of(image, mask, native=128)
    local, whole = laid.first_frame(0.3), laid.global_frame(1.0)
    assert laid.keeps_scale(whole.box, whole.size, local.box, local.size) and laid.keeps_local(whole, local)
    assert not laid.keeps_scale(local.box, local.size, whole.box, whole.size)
