"""Pictures in memory: what arrays, tensors, bytes and open files mean, and what is refused."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.sources import as_bytes, as_picture_array

RNG = np.random.default_rng(3)
RGB = RNG.integers(0, 256, (6, 9, 3), np.uint8)
RGBA = np.dstack([RGB, RGB[..., 0]])
GREY = RGB[..., 1]


def read(source: Any) -> np.ndarray:
    array = as_picture_array(source, "image")
    assert array is not None and array.dtype == np.uint8 and array.flags.c_contiguous
    return array


ORDERS = {
    "HW": (GREY, GREY),
    "HW1": (GREY[..., None], GREY),
    "1HW": (GREY[None], GREY),
    "11HW": (GREY[None, None], GREY),
    "HWC": (RGB, RGB),
    "CHW": (RGB.transpose(2, 0, 1), RGB),
    "1HWC": (RGB[None], RGB),
    "1CHW": (RGB.transpose(2, 0, 1)[None], RGB),
    "HWA": (RGBA, RGBA),
    "AHW": (RGBA.transpose(2, 0, 1), RGBA),
    "mirrored": (RGB[:, ::-1], RGB[:, ::-1]),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_arrays_and_tensors_of_every_order_and_type(order: str, dtype: Any, kind: str) -> None:
    given, expected = ORDERS[order]
    values: Any = given if dtype == np.uint8 else (given / 255).astype(dtype)
    if kind == "torch":
        values = pytest.importorskip("torch").from_numpy(np.ascontiguousarray(values))
    np.testing.assert_array_equal(read(values), expected)


def test_the_axis_of_channels_where_both_ends_could_be_it() -> None:
    torch = pytest.importorskip("torch")
    both = RNG.integers(0, 256, (3, 5, 4), np.uint8)
    np.testing.assert_array_equal(read(both), both)
    np.testing.assert_array_equal(read(torch.from_numpy(both)), both.transpose(1, 2, 0)[..., :3])


def test_what_torch_makes_on_the_way() -> None:
    """Tensors with gradients, of bfloat16, transposed, and masks of bool."""
    torch = pytest.importorskip("torch")
    values = torch.from_numpy(GREY / 255)
    np.testing.assert_array_equal(read(values.requires_grad_()), GREY)
    np.testing.assert_array_equal(read(values.detach().T), GREY.T)
    near = read(values.detach().to(torch.bfloat16)).astype(int)
    assert np.abs(near - GREY).max() <= 1
    np.testing.assert_array_equal(read(values > 0.5), np.where(GREY > 127, 255, 0))


def test_floats_round_to_the_nearest_level_and_half_is_white_in_a_mask() -> None:
    np.testing.assert_array_equal(read(np.array([[0.0, 0.4999, 0.5, 1.0 + 1e-6, -1e-6]])), [[0, 127, 128, 255, 0]])
    np.testing.assert_array_equal(read(np.array([[True, False]])), [[255, 0]])


class OnGpu:
    """A tensor of another library, on a GPU."""

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("never asked for")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


class Elsewhere(OnGpu):
    """A tensor whose library cannot give it away."""

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("of another layout")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class OnHost:
    """A tensor of a library that only speaks DLPack."""

    def __dlpack__(self, **options: Any) -> Any:
        return RGB.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return RGB.__dlpack_device__()


def test_dlpack_of_any_library() -> None:
    np.testing.assert_array_equal(read(OnHost()), RGB)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (np.full((4, 4), np.nan), "NaN"),
        (np.array([[0.5, np.inf]]), "NaN or infinity"),
        (np.array([[0.5, 200.0]]), r"0\.5 to 200; they must be 0\.\.1, with 1\.0 as white: divide them by 255"),
        (np.array([[0.0, 1.9]]), "scale or clip"),
        (np.array([[-1.0, 1.0]]), r"-1 to 1.*: give \(x \+ 1\) / 2"),
        (np.array([[-3.0, 999.0]]), "scale or clip"),
        (RGB.astype(np.int64), r"int64 array: give uint8 values 0\.\.255 \(a\.astype"),
        (RGB.astype(np.uint16), "uint16 array"),
        (RGB.astype(np.complex64), "complex64"),
        (np.stack([RGB, RGB]), r"\(2, 6, 9, 3\), which is 2 pictures: give one, such as x\[0\]"),
        (np.zeros((5, 5, 2), np.uint8), r"\(5, 5, 2\)"),
        (np.zeros(5, np.uint8), r"\(5,\)"),
        (np.zeros((0, 5), np.uint8), r"\(0, 5\)"),
        (np.zeros((0, 5, 5, 3), np.uint8), r"\(0, 5, 5, 3\)"),
        (OnGpu(), r"OnGpu on a GPU: .*\.cpu\(\)"),
        (Elsewhere(), "Elsewhere that numpy cannot read .of another layout"),
    ],
)
def test_what_is_refused(bad: Any, said: str) -> None:
    with pytest.raises(InputError, match=rf"^image .*{said}"):
        as_picture_array(bad, "image")


def test_a_tensor_without_numbers_is_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(InputError, match=r"torch\.Tensor on a GPU|torch\.Tensor that numpy cannot read"):
        as_picture_array(torch.zeros(4, 4, device="meta"), "image")


@pytest.mark.parametrize("other", ["a.png", Path("a.png"), b"x", io.BytesIO(), Image.new("L", (2, 2)), [[1]], None])
def test_what_is_no_array(other: Any) -> None:
    assert as_picture_array(other, "image") is None


class Upload:
    """Something with a `read` that is no file."""

    def read(self) -> list[int]:
        return []


def test_bytes_and_open_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    for data in (b"12345", bytearray(b"12345"), memoryview(b"12345"), io.BytesIO(b"12345")):
        assert as_bytes(data, "image") == b"12345"
    with (tmp_path / "x").open("rb") as file:
        file.read()  # as a web framework leaves it that has looked at the type
        assert as_bytes(file, "image") == as_bytes(file, "image") == b"12345"
    with pytest.raises(InputError, match=r"image is a file that cannot be read: .*closed"):
        as_bytes(file, "image")
    with (tmp_path / "x").open() as text, pytest.raises(InputError, match="open as text: open it with mode 'rb'"):
        as_bytes(text, "image")
    with pytest.raises(InputError, match=r"image has a read\(\) that gives list"):
        as_bytes(Upload(), "image")
    for other in ("a.png", tmp_path, Image.new("L", (2, 2)), RGB):
        assert as_bytes(other, "image") is None


def test_a_pipe_is_read_from_where_it_stands() -> None:
    command = [sys.executable, "-c", "import sys; sys.stdout.write('12345')"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert as_bytes(process.stdout, "image") == b"12345"
