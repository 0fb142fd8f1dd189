"""The picture kernels, run on the host by one thread and by several blocks of several, against the host's functions.

Threads of a block that wait for one another too little, or a window that leaves shared memory, show here as well.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreammix_trt.engine import kernels, numpy_kernels
from dreammix_trt.engine.canvas import frames as canvas
from dreammix_trt.engine.canvas.frames import Canvas
from dreammix_trt.engine.canvas.geometry import mask_bounds
from dreammix_trt.engine.device import records

Array = npt.NDArray[Any]
U8 = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]

try:
    gpu: ModuleType = importlib.import_module("dreammix_trt._cpp").gpu
except ImportError:
    pytest.skip("the C++ extension is not built here", allow_module_level=True)

PLACES = [{"blocks": 1, "threads": 1}, {"blocks": 3, "threads": 8}, {"blocks": 1, "threads": 5}]
MANY = PLACES[1]
places = pytest.mark.parametrize("place", PLACES[:2], ids=["alone", "3x8"])


def address_of(array: Array | None) -> int:
    return 0 if array is None else int(array.ctypes.data)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def draw_noise(*shape: int, seed: int = 0) -> U8:
    return rng(seed).integers(0, 256, shape, dtype=np.uint8)


def draw_blot(height: int, width: int, seed: int = 0) -> U8:
    """A mask with an uneven edge somewhere inside, grey values in it, and a few specks."""
    chance = rng(seed)
    rows, cols = np.indices((height, width))
    centre = chance.uniform(0.3, 0.7, 2) * (height, width)
    inside = ((rows - centre[0]) / (height / 4)) ** 2 + ((cols - centre[1]) / (width / 5)) ** 2 <= 1
    mask = np.where(inside, chance.integers(120, 256, (height, width)), chance.integers(0, 127, (height, width)))
    mask[tuple(chance.integers(0, side) for side in mask.shape)] = 255
    return mask.astype(np.uint8)


# ------------------------------------------------------------------------------------------------ cut


def make_cut_record(picture: U8, box: Box, size: tuple[int, int]) -> tuple[Array, npt.NDArray[np.int32]]:
    """The CUT record and its tables."""
    record, tables = np.zeros(1, records.CUT), [np.zeros(1, np.int32)]  # something before, so that offsets count
    height, width = box[1] - box[0], box[3] - box[2]
    record["height"], record["width"] = picture.shape[:2]
    record["out_height"], record["out_width"] = size
    for name, value in zip(("row0", "row1", "col0", "col1"), box, strict=True):
        record[name] = value
    record["vertically_first"] = gpu.vertically_first(height, width, *size)
    for axis, inputs, outputs in (("rows", height, size[0]), ("cols", width, size[1])):
        record[f"{axis}_at"] = -1
        if inputs != outputs:
            first, count, weights, most = gpu.resize_taps(inputs, outputs)
            record[f"{axis}_at"], record[f"{axis}_most"] = sum(map(len, tables)), most
            tables += [first, count, weights]
    return record, np.concatenate(tables)


def cut(picture: U8, box: Box, size: tuple[int, int], place: dict[str, int], **arguments: Any) -> U8:
    record, tables = make_cut_record(picture, box, size)
    channels = 1 if picture.ndim == 2 else 3
    out = np.full((*size, channels), 77, np.uint8)
    gpu.cut(
        source=address_of(picture),
        channels=channels,
        cut=address_of(record),
        tables=address_of(tables),
        out=address_of(out),
        **arguments,
        **place,
    )
    return out[:, :, 0] if picture.ndim == 2 else out


# Height, width, box, result: copies, one axis, both orders of the passes, sixteenfold both ways, single pixels.
CUTS: list[tuple[int, int, Box, tuple[int, int]]] = [
    (40, 37, (0, 40, 0, 37), (40, 37)),
    (40, 37, (3, 39, 5, 30), (36, 25)),
    (40, 37, (3, 39, 5, 30), (36, 50)),
    (40, 37, (3, 39, 5, 30), (17, 25)),
    (60, 50, (1, 59, 0, 50), (23, 31)),
    (90, 30, (2, 88, 1, 29), (19, 40)),
    (64, 96, (0, 64, 0, 96), (4, 6)),
    (5, 7, (1, 5, 1, 6), (64, 80)),
    (1, 1, (0, 1, 0, 1), (3, 5)),
    (33, 1, (0, 33, 0, 1), (1, 1)),
    (9, 65, (4, 5, 3, 62), (1, 70)),
    (700, 40, (0, 700, 0, 40), (33, 20)),
    (40, 700, (0, 40, 0, 700), (20, 33)),
    (1100, 700, (0, 1100, 0, 700), (20, 40)),  # more between the passes than shared memory holds, made in parts
    (1400, 400, (0, 1400, 0, 400), (20, 20)),
    (40, 1400, (0, 40, 0, 1400), (3, 1399)),
]


@places
@pytest.mark.parametrize(("height", "width", "box", "size"), CUTS)
def test_cut_is_the_hosts_resize(
    height: int, width: int, box: Box, size: tuple[int, int], place: dict[str, int]
) -> None:
    for picture in (draw_noise(height, width, 3), draw_noise(height, width)):
        expected = kernels.resize(picture, *size, "lanczos", box)
        np.testing.assert_array_equal(cut(picture, box, size, place), expected)


def test_the_cuts_cover_both_orders_of_passes_in_parts() -> None:
    """A part holds 16384 bytes, of tiles 16 pixels wide, or high where the pass down the columns leads."""
    longest = {False: 0, True: 0}
    for _, _, (r0, r1, c0, c1), size in CUTS:
        down_first = gpu.vertically_first(r1 - r0, c1 - c0, *size)
        if min(size) >= 16 and max(size) <= 40:
            longest[down_first] = max(longest[down_first], c1 - c0 if down_first else r1 - r0)
    assert min(longest.values()) * 16 * 3 > 16384


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_cut_of_any_size_is_the_hosts_resize(data: st.DataObject) -> None:
    sides = st.integers(1, 70)
    height, width, out_height, out_width = (data.draw(sides) for _ in range(4))
    row0, col0 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = (row0, data.draw(st.integers(row0 + 1, height)), col0, data.draw(st.integers(col0 + 1, width)))
    picture = draw_noise(height, width, 3, seed=height)
    expected = kernels.resize(picture, out_height, out_width, "lanczos", box)
    place = data.draw(st.sampled_from(PLACES))
    np.testing.assert_array_equal(cut(picture, box, (out_height, out_width), place), expected)


@places
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_cut_makes_what_the_networks_take(place: dict[str, int], dtype: Any) -> None:
    picture, size, box = draw_noise(50, 41, 3), (24, 32), (2, 49, 1, 40)
    mask = draw_noise(*size, seed=2)
    network, masked = np.full((2, 1, 3, *size), 9, dtype)
    small = cut(
        picture,
        box,
        size,
        place,
        mask=address_of(mask),
        network=address_of(network),
        masked=address_of(masked),
        half=int(dtype == np.float16),
    )
    whole = canvas.to_latent_range(small)
    # Byte for byte, with the sign of zeros.
    assert network.tobytes() == whole.astype(dtype).tobytes()
    assert masked.tobytes() == (whole * (mask < 128)).astype(dtype).tobytes()
    assert (np.signbit(masked) & (masked == 0)).any()


@places
def test_normalise_is_the_same_without_a_cut(place: dict[str, int]) -> None:
    picture, mask = draw_noise(13, 21, 3), draw_noise(13, 21, seed=1)
    for dtype in (np.float32, np.float16):
        network, masked = np.full((2, 1, 3, 13, 21), 9, dtype)
        arguments = {"height": 13, "width": 21, "half": int(dtype == np.float16), **place}
        gpu.normalise(
            picture=address_of(picture),
            mask=address_of(mask),
            network=address_of(network),
            masked=address_of(masked),
            **arguments,
        )
        whole = canvas.to_latent_range(picture)
        assert network.tobytes() == whole.astype(dtype).tobytes()
        assert masked.tobytes() == (whole * (mask < 128)).astype(dtype).tobytes()


@places
def test_a_cut_mask_is_binary_and_tells_whether_anything_is_left(place: dict[str, int]) -> None:
    mask, found = draw_blot(90, 75), np.zeros(1, np.int32)
    box, size = (0, 90, 0, 75), (33, 40)
    out = cut(mask, box, size, place, threshold=1, found=address_of(found))
    np.testing.assert_array_equal(out, canvas._to_binary(canvas._resize(mask, size, box)))
    assert found[0] == 1
    found[0] = 0
    assert not cut(np.minimum(mask, np.uint8(100)), box, size, place, threshold=1, found=address_of(found)).any()
    assert found[0] == 0


@places
@pytest.mark.parametrize("size", [(7, 5), (64, 80), (1, 1), (50, 64), (81, 31)])
def test_a_speck_that_resampling_lost_is_kept(place: dict[str, int], size: tuple[int, int]) -> None:
    mask = np.zeros((64, 80), np.uint8)
    mask[[5, 30, 63, 31], [7, 41, 79, 41]] = 128
    box = (2, 64, 3, 80)
    record, _ = make_cut_record(mask, box, size)
    found, out = np.zeros(1, np.int32), np.full(size, 3, np.uint8)
    gpu.keep_speck(
        source=address_of(mask), cut=address_of(record), found=address_of(found), out=address_of(out), **place
    )
    np.testing.assert_array_equal(out, canvas._resize_nearest(mask, size, box))
    found[0], out[:] = 1, 3
    gpu.keep_speck(
        source=address_of(mask), cut=address_of(record), found=address_of(found), out=address_of(out), **place
    )
    assert (out == 3).all()


# ------------------------------------------------------------------------------------------------ fill


def allocate_aligned(nbytes: int) -> U8:
    """Memory as a device gives it, with what was left in it."""
    memory = np.full(nbytes + 272, 0xA5, np.uint8)
    start = -int(memory.ctypes.data) % 256
    return memory[start : start + nbytes + 16]


def fill(picture: U8, mask: U8, cascade: list[tuple[int, int]], place: dict[str, int], nbytes: int | None = None) -> U8:
    height, width = mask.shape
    nbytes = nbytes or gpu.fill_scratch(height, width)
    out, scratch = picture.copy(), allocate_aligned(nbytes)
    gpu.fill(
        picture=address_of(out),
        mask=address_of(mask),
        scratch=address_of(scratch),
        height=height,
        width=width,
        cascade=cascade,
        **place,
    )
    assert (scratch[nbytes:] == 0xA5).all(), "written beyond the scratch memory"
    return out


@places
@pytest.mark.parametrize(
    ("height", "width"), [(32, 48), (31, 45), (1, 1), (1, 50), (50, 1), (2, 3), (64, 17), (9, 400), (150, 6)]
)
def test_fill_is_the_hosts(height: int, width: int, place: dict[str, int]) -> None:
    picture = draw_noise(height, width, 3)
    for seed in range(2):
        mask, cascade = draw_blot(height, width, seed), [(70, 2), (16, 2), (5, 1), (1, 1), (0, 1)]
        np.testing.assert_array_equal(fill(picture, mask, cascade, place), numpy_kernels.fill(picture, mask, cascade))


@pytest.mark.parametrize("value", [0, 126, 127, 255])
def test_fill_of_no_hole_and_of_nothing_else(value: int) -> None:
    picture, mask = draw_noise(20, 30, 3), np.full((20, 30), value, np.uint8)
    for cascade in ([(40, 1), (3, 2)], []):
        np.testing.assert_array_equal(fill(picture, mask, cascade, MANY), kernels.fill(picture, mask, cascade))


def test_fill_of_rows_too_wide_for_shared_memory() -> None:
    """Prefix sums then stand at every second, fourth, ... pixel."""
    for width in (3071, 3072, 6500, 13000):
        picture, mask = draw_noise(3, width, 3), np.zeros((3, width), np.uint8)
        mask[1, 20:-3] = 255
        cascade = [(65535, 1), (5000, 1), (300, 1), (7, 2)]
        expected = kernels.fill(picture, mask, cascade)
        np.testing.assert_array_equal(fill(picture, mask, cascade, {"blocks": 2, "threads": 4}), expected)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (200, 8), (8, 200), (100, 16), (53, 30), (39, 41), (177, 9)])
def test_scratch_serves_every_picture_of_as_many_pixels(height: int, width: int) -> None:
    """A runtime sets memory aside for its largest frame; others are smaller, but not in every side."""
    nbytes = gpu.fill_scratch(40, 40)
    picture, mask, cascade = draw_noise(height, width, 3), draw_blot(height, width), [(70, 2), (5, 1)]
    expected = kernels.fill(picture, mask, cascade)
    np.testing.assert_array_equal(fill(picture, mask, cascade, MANY, nbytes), expected)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_fill_of_any_size_and_radius_is_the_hosts(data: st.DataObject) -> None:
    height, width, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)), data.draw(st.integers(0, 99))
    cascade = data.draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), max_size=4))
    picture, mask = draw_noise(height, width, 3, seed=seed), np.zeros((height, width), np.uint8)
    row, col = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    part = mask[row : data.draw(st.integers(row + 1, height)), col : data.draw(st.integers(col + 1, width))]
    part[:] = draw_noise(*part.shape, seed=seed)
    place = data.draw(st.sampled_from(PLACES))
    result = fill(picture, mask, cascade, place)
    np.testing.assert_array_equal(result, kernels.fill(picture, mask, cascade))
    np.testing.assert_array_equal(result[mask < 127], picture[mask < 127])


def test_fill_of_a_larger_picture() -> None:
    """Several strips, parts of several pixels, and windows wider than the picture."""
    picture, mask, cascade = (
        draw_noise(200, 330, 3),
        draw_blot(200, 330),
        [(radius, 1) for radius, _ in numpy_kernels.CASCADE],
    )
    np.testing.assert_array_equal(fill(picture, mask, cascade, MANY), kernels.fill(picture, mask, cascade))


def test_fill_of_a_picture_that_lies_unaligned() -> None:
    memory, mask = draw_noise(1 + 24 * 36 * 3), draw_blot(24, 36)
    picture = memory[1:].reshape(24, 36, 3)
    expected = kernels.fill(picture, mask, [(9, 2)])
    scratch = allocate_aligned(gpu.fill_scratch(24, 36))
    gpu.fill(
        picture=address_of(picture),
        mask=address_of(mask),
        scratch=address_of(scratch),
        height=24,
        width=36,
        cascade=[(9, 2)],
        **MANY,
    )
    np.testing.assert_array_equal(picture, expected)


# ------------------------------------------------------------------------------------------------ masks


@places
def test_latent_mask_is_the_hosts(place: dict[str, int]) -> None:
    mask = np.where(draw_noise(48, 72) > 252, np.uint8(128), np.uint8(127))
    expected = kernels.latent_mask(mask, 8)
    assert 0 < expected.mean() < 1
    for dtype in (np.float32, np.float16):
        out, network = np.full(expected.shape, 9, np.float32), np.full(expected.shape, 9, dtype)
        arguments = {"height": 48, "width": 72, "factor": 8, "half": int(dtype == np.float16), **place}
        gpu.latent_mask(mask=address_of(mask), out=address_of(out), network=address_of(network), **arguments)
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(network, expected.astype(dtype))


def make_field(mask: U8, reach: int, box: Box | None = None) -> Array:
    record = np.zeros(1, records.FIELD)
    record["height"], record["width"], record["reach"] = *mask.shape, reach
    for name, value in zip(("row0", "row1", "col0", "col1"), box or (0, mask.shape[0], 0, mask.shape[1]), strict=True):
        record[name] = value
    return record


def feather(mask: U8, reach: int, place: dict[str, int], box: Box | None = None, dilate: int = 0) -> U8:
    scratch, out = np.full(mask.shape, 0xA5A5, np.uint16), np.full(mask.shape, 77, np.uint8)
    assert gpu.distance_scratch(mask.size) == scratch.nbytes
    record = make_field(mask, reach, box)
    gpu.feather(
        mask=address_of(mask),
        field=address_of(record),
        scratch=address_of(scratch),
        out=address_of(out),
        dilate=dilate,
        **place,
    )
    return out


def draw_dots(height: int, width: int, count: int, seed: int = 0) -> U8:
    mask = draw_noise(height, width, seed=seed) // 2
    mask[rng(seed).integers(0, height, count), rng(seed + 1).integers(0, width, count)] = 128
    return mask


@places
@pytest.mark.parametrize("reach", [1, 2, 9, 32, 300, 32767])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (40, 53), (3, 700), (300, 2), (64, 64)])
def test_feather_is_the_hosts(height: int, width: int, reach: int, place: dict[str, int]) -> None:
    for count in (0, 1, 4):
        mask = draw_dots(height, width, count)
        np.testing.assert_array_equal(feather(mask, reach, place), kernels.feather(mask, reach))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_feather_of_any_mask_and_box_is_the_hosts(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    mask = draw_dots(height, width, data.draw(st.integers(0, 6)), data.draw(st.integers(0, 99)))
    row, col = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = (row, data.draw(st.integers(row + 1, height)), col, data.draw(st.integers(col + 1, width)))
    near, reach = np.s_[box[0] : box[1], box[2] : box[3]], data.draw(st.integers(1, 60))
    expected = np.zeros_like(mask)
    expected[near] = kernels.feather(np.ascontiguousarray(mask[near]), reach)
    place = data.draw(st.sampled_from(PLACES))
    np.testing.assert_array_equal(feather(mask, reach, place, box), expected)


def test_feather_over_the_canvas_part_that_a_paste_can_change() -> None:
    whole = Canvas.of(draw_noise(90, 80, 3), draw_blot(90, 80), native=64)
    near = [part.indices(side)[:2] for part, side in zip(whole._near, whole.size, strict=True)]
    result = feather(whole.mask, whole.feather_width, MANY, (*near[0], *near[1]))
    np.testing.assert_array_equal(result, whole.feather)


@places
@pytest.mark.parametrize("pixels", [1, 3, 20, 260])
def test_dilated_is_the_canvas(pixels: int, place: dict[str, int]) -> None:
    for mask in (draw_dots(30, 310, 2), draw_dots(30, 310, 0), draw_blot(40, 30)):
        np.testing.assert_array_equal(feather(mask, pixels, place, dilate=1), canvas.dilate_mask(mask, pixels))


def seam(mask: U8, reach: int, place: dict[str, int]) -> U8:
    r0, r1, c0, c1 = mask_bounds(mask)
    ring = (max(r0 - 1, 0), min(r1 + 1, mask.shape[0]), max(c0 - 1, 0), min(c1 + 1, mask.shape[1]))
    record, scratch, out = (
        make_field(mask, reach, ring),
        np.zeros(mask.shape, np.uint16),
        np.full(mask.shape, 7, np.uint8),
    )
    deepest = np.full(1, -5, np.int32)
    gpu.seam(
        mask=address_of(mask),
        field=address_of(record),
        scratch=address_of(scratch),
        deepest=address_of(deepest),
        out=address_of(out),
        **place,
    )
    return out


@places
@pytest.mark.parametrize("reach", [2, 6, 32, 700])
def test_seam_is_the_canvas(reach: int, place: dict[str, int]) -> None:
    speck, whole, line = np.zeros((20, 30), np.uint8), np.full((20, 30), 255, np.uint8), np.zeros((20, 30), np.uint8)
    speck[7, 9], line[:, 4:6] = 200, 255
    square = np.zeros((64, 70), np.uint8)
    square[5:55, 3:60] = 255
    for mask in (draw_blot(50, 60), speck, whole, line, square):
        np.testing.assert_array_equal(seam(mask, reach, place), canvas.seam_weight(mask, reach))


# ------------------------------------------------------------------------------------------------ paste


def paste(whole: Canvas, content: U8, sheet: dict[str, Any], place: dict[str, int], local: U8 | None = None) -> U8:
    record, out = np.zeros(1, records.SHEET), np.full(whole.image.shape, 77, np.uint8)
    record["height"], record["width"] = whole.size
    for name, value in sheet.items():
        record[name] = value
    rim = None if local is None else whole._seam
    gpu.paste(
        original=address_of(whole.image),
        content=address_of(content),
        local=address_of(local),
        seam=address_of(rim),
        weight=address_of(whole.feather),
        sheet=address_of(record),
        out=address_of(out),
        **place,
    )
    return out


def name_sides(box: Box, prefix: str = "") -> dict[str, int]:
    return {f"{prefix}{name}": side for name, side in zip(("row0", "row1", "col0", "col1"), box, strict=True)}


@places
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("size", [(96, 120), (61, 75)])
def test_paste_is_the_canvas_hand_over(soft: bool, size: tuple[int, int], place: dict[str, int]) -> None:
    whole = Canvas.of(draw_noise(*size, 3), draw_blot(*size), native=64)
    frame = whole.first_frame(0.4, fill=False)
    picture = draw_noise(*frame.size, 3, seed=5)
    content = canvas._to_box(picture, frame.box)
    result = paste(whole, content, {**name_sides(frame.box), "soft": soft}, place)
    expected = whole.paste(frame, picture, soft=soft)
    np.testing.assert_array_equal(result, expected)
    assert (expected != whole.image).any()
    assert soft == (whole.paste(frame, picture) != expected).any()


@places
def test_paste_is_the_canvas_final_where_local_is_kept(place: dict[str, int]) -> None:
    image, mask = draw_noise(180, 200, 3), np.zeros((180, 200), np.uint8)
    mask[60:120, 70:130] = draw_blot(60, 60)
    whole = Canvas.of(image, mask, native=64)
    local, frame = whole.first_frame(0.2, fill=False), whole.global_frame()
    assert whole.keeps_local(frame, local)
    pictures = [draw_noise(*stage.size, 3, seed=seed) for seed, stage in enumerate((local, frame))]
    inside, around = canvas._to_box(pictures[0], local.box), canvas._to_box(pictures[1], frame.box)
    sheet = {**name_sides(frame.box), **name_sides(local.box, "local_"), "keeps_local": 1}
    result = paste(whole, around, sheet, place, inside)
    np.testing.assert_array_equal(result, whole.compose(frame, pictures[1], local=(local, pictures[0])))
    # The mask's values inside differ from both plain pastes: the seam took part.
    assert (result != whole.paste(frame, pictures[1])).any() and (result != image).any()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_paste_of_any_box_is_the_hosts(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    row, col = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = (row, data.draw(st.integers(row + 1, height)), col, data.draw(st.integers(col + 1, width)))
    original, weight = draw_noise(height, width, 3), draw_noise(height, width, seed=3)
    content, soft = draw_noise(box[1] - box[0], box[3] - box[2], 3, seed=4), data.draw(st.booleans())
    record, out = np.zeros(1, records.SHEET), np.zeros_like(original)
    for name, value in {"height": height, "width": width, "soft": soft, **name_sides(box)}.items():
        record[name] = value
    gpu.paste(
        original=address_of(original),
        content=address_of(content),
        weight=address_of(weight),
        sheet=address_of(record),
        out=address_of(out),
        **data.draw(st.sampled_from(PLACES)),
    )
    alpha = kernels.soft_alpha(*content.shape[:2]) if soft else None
    np.testing.assert_array_equal(out, kernels.paste(original, content, box, weight, alpha))


# ------------------------------------------------------------------------------------------------ networks' arrays


@places
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_decoded_is_the_canvas(place: dict[str, int], dtype: Any) -> None:
    image = rng().normal(0, 0.8, (1, 3, 19, 26)).astype(dtype)
    image[0, :, 0, :4] = [[-1, 1, 0, -0.0], [1 / 255, 2, -2, 60000], [0.99607843, 0.5, 0.25, -60000]]
    out, flags = np.full((19, 26, 3), 77, np.uint8), np.full(1, 3, np.int32)
    arguments = {
        "height": 19,
        "width": 26,
        "half": int(dtype == np.float16),
        "flags": address_of(flags),
        "bit": 64,
        **place,
    }
    gpu.decoded(image=address_of(image), out=address_of(out), **arguments)
    expected = canvas.from_decoded(image.astype(np.float32))
    np.testing.assert_array_equal(out, expected)
    assert flags[0] == 3
    for value in (np.nan, np.inf, -np.inf):
        broken = image.copy()
        broken[0, 1, 7, 11], flags[0] = value, 3
        gpu.decoded(image=address_of(broken), out=address_of(out), **arguments)
        assert flags[0] == 67 and out[7, 11, 1] == 0
        out[7, 11, 1] = expected[7, 11, 1]
        np.testing.assert_array_equal(out, expected)


def test_decoded_halves_of_all_bits_equal_numpys() -> None:
    """Every float16 there is, also subnormal, through the kernels' own conversion."""
    image = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    whole = np.zeros((1, 3, 256, 256), np.float16)
    whole[0, 1] = np.where(np.isfinite(image), image, 0).reshape(256, 256)
    out, flags = np.zeros((256, 256, 3), np.uint8), np.zeros(1, np.int32)
    gpu.decoded(
        image=address_of(whole), out=address_of(out), height=256, width=256, half=1, flags=address_of(flags), bit=1
    )
    np.testing.assert_array_equal(out, canvas.from_decoded(whole.astype(np.float32)))
    back = np.zeros((1, 1, 256, 256), np.float16)
    shape = {"channels": 1, "height": 256, "width": 256, "row": 0, "col": 0, "tile_height": 256, "tile_width": 256}
    source = np.where(np.isfinite(image), image, 0).astype(np.float32)
    gpu.take_tile(source=address_of(source), out=address_of(back), source_half=0, out_half=1, **shape)
    np.testing.assert_array_equal(back.ravel(), source.astype(np.float16))


@places
@pytest.mark.parametrize("source_type", [np.float32, np.float16])
@pytest.mark.parametrize("out_type", [np.float32, np.float16])
def test_tiles_are_taken_and_added(place: dict[str, int], source_type: Any, out_type: Any) -> None:
    source = rng().normal(0, 3, (1, 4, 17, 23)).astype(source_type)
    tile = np.zeros((1, 4, 9, 11), out_type)
    shape = {"channels": 4, "height": 17, "width": 23, "row": 8, "col": 12, "tile_height": 9, "tile_width": 11}
    halves = {"source_half": int(source_type == np.float16), "out_half": int(out_type == np.float16)}
    gpu.take_tile(source=address_of(source), out=address_of(tile), **shape, **halves, **place)
    np.testing.assert_array_equal(tile, source[:, :, 8:17, 12:23].astype(out_type))

    rows, cols = rng(1).random(9).astype(np.float32), rng(2).random(11).astype(np.float32)
    out = rng(3).normal(0, 1, (1, 4, 17, 23)).astype(np.float32)
    expected = out.copy()
    expected[:, :, 8:17, 12:23] += tile.astype(np.float32) * rows[:, None] * cols
    half = int(out_type == np.float16)
    gpu.add_tile(
        tile=address_of(tile),
        ramp_rows=address_of(rows),
        ramp_cols=address_of(cols),
        out=address_of(out),
        half=half,
        **shape,
        **place,
    )
    assert out.tobytes() == expected.tobytes()


# ------------------------------------------------------------------------------------------------ bad arguments


def test_arguments_that_do_not_fit_are_refused() -> None:
    memory = allocate_aligned(4096)
    here, no_field = (
        address_of(memory),
        {"mask": address_of(memory), "scratch": address_of(memory), "out": address_of(memory)},
    )
    shape = {"channels": 1, "height": 8, "width": 8, "row": 4, "col": 0, "tile_height": 5, "tile_width": 8}
    calls = [
        ("channels", lambda: gpu.cut(source=here, channels=2, cut=here, tables=here, out=here)),
        ("3 channels", lambda: gpu.cut(source=here, channels=1, cut=here, tables=here, network=here)),
        ("masked needs", lambda: gpu.cut(source=here, channels=3, cut=here, tables=here, masked=here)),
        ("one of", lambda: gpu.cut(source=here, channels=3, cut=here, tables=here)),
        ("source is 0", lambda: gpu.cut(source=0, channels=3, cut=here, tables=here, out=here)),
        ("tile", lambda: gpu.take_tile(source=here, out=here, source_half=0, out_half=0, **shape)),
        ("multiples", lambda: gpu.latent_mask(mask=here, out=here, height=9, width=8, factor=8)),
        ("radii", lambda: fill(draw_noise(2, 2, 3), draw_noise(2, 2), [(-1, 1)], MANY)),
        ("16 bytes", lambda: gpu.fill(picture=here, mask=here, scratch=here + 4, height=1, width=1, cascade=[])),
        ("field is 0", lambda: gpu.feather(field=0, **no_field)),
        ("not aligned", lambda: gpu.feather(field=here + 1, **no_field)),
        ("together", lambda: gpu.paste(original=here, content=here, local=here, weight=here, sheet=here, out=here)),
        ("blocks and threads", lambda: gpu.feather(field=here, **no_field, blocks=0)),
        ("positive", lambda: gpu.resize_taps(0, 4)),
    ]
    for words, call in calls:
        with pytest.raises(ValueError, match=words):
            call()
