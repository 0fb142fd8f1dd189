from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.tensors import Weights, open_tensors, read_places, write_tensors

ARRAYS = {
    "half": np.linspace(-2, 2, 30, dtype=np.float16).reshape(5, 6),
    "single": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "double": np.linspace(0, 1, 7),
    "scalar": np.full((), 3.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


def write_raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_tensors_of_the_reference_library_are_read(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(ARRAYS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    weights = open_tensors(tmp_path / "a.safetensors")
    assert weights.metadata == {"format": "pt"} and set(weights) == set(ARRAYS) and len(weights) == len(ARRAYS)
    for name, array in ARRAYS.items():
        value = weights[name]
        assert value.dtype == np.float32 and value.flags.c_contiguous and value.flags.writeable and value.flags.owndata
        assert np.array_equal(value, array.astype(np.float32)) and weights.shape(name) == array.shape
        assert weights.dtype(name) == array.dtype.name


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_every_float_torch_writes_is_widened(tmp_path: Path, kind: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {name: torch.randn(shape).to(getattr(torch, dtype)) for name, shape in {"a": (3, 5), "b": ()}.items()}
    path = tmp_path / f"x.{kind}"
    if kind == "bin":  # a view of a larger storage, transposed
        tensors["c"] = torch.randn(6, 8).to(getattr(torch, dtype))[1:4, ::2].T
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    found = open_tensors(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert np.array_equal(found[name], tensor.float().numpy()) and found.dtype(name) == dtype


def test_torch_files_give_their_state_dict(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    layer = torch.nn.Linear(3, 2)
    torch.save({"state_dict": layer.state_dict(), "epoch": 3, "ids": torch.arange(4)}, tmp_path / "a.ckpt")
    torch.save({**layer.state_dict(), "ids": torch.arange(4), "parameter": layer.bias}, tmp_path / "b.pt")
    assert set(open_tensors(tmp_path / "a.ckpt")) == {"weight", "bias"}
    found = open_tensors(tmp_path / "b.pt")
    assert np.array_equal(found["parameter"], layer.bias.detach().numpy())
    with pytest.raises(FileFormatError, match=r"b\.pt: tensor 'ids' is stored as int64"):
        found["ids"]
    torch.save({"state_dict": {}, "callbacks": pytest.ExitCode.OK}, tmp_path / "c.ckpt")
    with pytest.raises(FileFormatError, match=r"which a dict of tensors never does"):
        open_tensors(tmp_path / "c.ckpt")
    torch.save(layer.state_dict(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(FileFormatError, match=r"in torch's old format"):
        open_tensors(tmp_path / "old.bin")


def test_opening_costs_the_header_and_reading_one_tensor(tmp_path: Path) -> None:
    size, count = 1 << 20, 16
    zeros = np.zeros(size, np.float16)
    path = tmp_path / "big.safetensors"
    write_tensors(path, {f"t{n}": ("float16", (size,)) for n in range(count)}, lambda name: zeros)
    tracemalloc.start()
    weights = open_tensors(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    for name in weights:
        weights[name]
    assert tracemalloc.get_traced_memory()[1] < 1.5 * 4 * size
    tracemalloc.stop()


def test_views_and_changes_are_taken_when_read() -> None:
    source = {"a": np.arange(12, dtype=np.float16).reshape(4, 3), "b": np.ones(2, np.float32)}
    weights = Weights.of(source)
    views = weights.arrange({"low": ("a", lambda x: x[:2]), "flipped": ("a", np.transpose), "b": ("b", None)})
    assert {name: views.shape(name) for name in views} == {"low": (2, 3), "flipped": (3, 4), "b": (2,)}
    assert np.array_equal(views["flipped"], source["a"].T) and views["flipped"].flags.c_contiguous
    twice = views.change({"low": lambda x: x + 1}).change({"low": lambda x: x * 10, "b": lambda x: x - 1})
    assert np.array_equal(twice["low"], (source["a"][:2] + 1) * 10) and twice["b"].tolist() == [0, 0]
    renamed = twice.rename(lambda name: None if name == "b" else f"new.{name}")
    assert set(renamed.strip_prefix("new.")) == {"low", "flipped"}
    assert np.array_equal(renamed["new.low"], twice["low"])
    assert views["low"][0, 0] == 0 and source["a"][0, 0] == 0
    weights["b"][:] = 7  # a reader's own copy
    assert weights["b"].tolist() == [1, 1]
    both = Weights.join([renamed, weights])
    assert set(both) == {"new.low", "new.flipped", "a", "b"} and np.array_equal(both["new.low"], twice["low"])


def test_wrong_changes_are_refused() -> None:
    weights = Weights.of({"a": np.ones((2, 2), np.float32)})
    with pytest.raises(KeyError, match="no tensors z"):
        weights.change({"z": lambda x: x})
    with pytest.raises(ValueError, match=r"made \(2,\) of \(2, 2\)"):
        weights.change({"a": lambda x: x[0]})["a"]
    with pytest.raises(FileFormatError, match="'a', once changed, holds NaN"):
        weights.change({"a": lambda x: x * np.float32(np.inf)})["a"]
    with pytest.raises(ValueError, match="the same name"):
        Weights.of({"a": np.ones(1), "b": np.ones(1)}).rename(lambda name: "c")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_values_that_are_not_finite_are_named(tmp_path: Path, bad: float, dtype: str) -> None:
    from safetensors.numpy import save_file

    values = np.zeros((3, 3), dtype)
    values[1, 2] = bad
    save_file({"good": np.ones(1, np.float32), "bad.weight": values}, tmp_path / "w.safetensors")
    weights = open_tensors(tmp_path / "w.safetensors")
    assert weights["good"].tolist() == [1]
    with pytest.raises(FileFormatError, match=r"w\.safetensors: tensor 'bad\.weight' holds NaN or infinite"):
        weights["bad.weight"]


def test_truncated_and_broken_files_are_found_at_opening(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    good = write_raw_file(tmp_path / "good.safetensors", {"a": entry}, bytes(8)).read_bytes()
    assert open_tensors(tmp_path / "good.safetensors")["a"].tolist() == [0, 0]
    for cut in (len(good) - 1, 30, 9, 8, 3, 0):
        (tmp_path / "cut.safetensors").write_bytes(good[:cut])
        with pytest.raises(FileFormatError, match=r"cut\.safetensors: truncated"):
            open_tensors(tmp_path / "cut.safetensors")
    wrong: list[Any] = [
        b"not json",
        [1, 2],
        {"a": 3},
        {"a": {}},
        {"a": {**entry, "shape": [3]}},
        {"a": {**entry, "shape": [-2]}},
        {"a": {**entry, "data_offsets": [8, 0]}},
        {"a": {**entry, "data_offsets": [-8, 0]}},
    ]
    for header in wrong:
        path = write_raw_file(tmp_path / "wrong.safetensors", header, bytes(8))
        with pytest.raises(FileFormatError, match=r"wrong\.safetensors: not a safetensors file, or damaged"):
            open_tensors(path)
    with pytest.raises(FileFormatError, match="a directory"):
        open_tensors(tmp_path)
    with pytest.raises(FileFormatError, match="no such file"):
        open_tensors(tmp_path / "none")


def test_a_file_that_changes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": ("float32", (4,))}, lambda name: np.ones(4))
    weights = open_tensors(path)
    write_tensors(path, {"a": ("float32", (8,))}, lambda name: np.ones(8))
    with pytest.raises(FileFormatError, match=r"a\.safetensors: changed while"):
        weights["a"]
    path.unlink()
    with pytest.raises(FileFormatError, match=r"a\.safetensors: cannot be read"):
        weights["a"]


def test_written_files_are_read_by_the_reference_library(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    path = tmp_path / "w.safetensors"
    wanted = {name: (array.dtype.name, array.shape) for name, array in ARRAYS.items()}
    wanted["half"] = ("float16", (5, 6))
    read: list[str] = []
    write_tensors(path, wanted, lambda name: (read.append(name), ARRAYS[name])[1], {"made": "here"})
    found = load_file(path)
    assert sorted(read) == sorted(ARRAYS) and open_tensors(path).metadata == {"made": "here"}
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


def test_strided_arrays_are_written_in_order(tmp_path: Path) -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_tensors(tmp_path / "t.safetensors", {"t": ("float16", (4, 3))}, lambda name: matrix.T)
    assert np.array_equal(open_tensors(tmp_path / "t.safetensors")["t"], matrix.T)


def test_places_are_aligned_where_sizes_allow(tmp_path: Path) -> None:
    shapes = {"odd": (3,), "even": (32,), "large": (64, 5), "eight": (4,), "one": (1,), "twin": (32, 3)}
    path = tmp_path / "p.safetensors"
    numbers = {name: np.random.default_rng(1).standard_normal(shape) for name, shape in shapes.items()}
    write_tensors(path, {name: ("float16", shape) for name, shape in shapes.items()}, lambda name: numbers[name])
    places, data = read_places(path), path.read_bytes()
    for name, (dtype, shape, offset, length) in places.items():
        assert (dtype, shape, length) == ("float16", shapes[name], 2 * int(np.prod(shape)))
        assert offset % min(64, length & -length) == 0, name
        assert data[offset : offset + length] == numbers[name].astype(np.float16).tobytes()
    assert all(places[name][2] % 64 == 0 for name in ("even", "large", "twin"))


def test_bfloat16_is_rounded_as_torch_does(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    numbers = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    numbers[:3] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8)  # ties
    write_tensors(tmp_path / "b.safetensors", {"b": ("bfloat16", (4096,))}, lambda name: numbers)
    assert np.array_equal(
        open_tensors(tmp_path / "b.safetensors")["b"], torch.tensor(numbers).bfloat16().float().numpy()
    )


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("float16", 70000.0, r"'big' reaches 70000, too large for float16"),
        ("bfloat16", 3.4e38, r"too large for bfloat16"),
        ("float32", 1e39, r"too large for float32"),
        ("float16", np.nan, r"'big' holds NaN"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_and_nothing_is_left(
    tmp_path: Path, dtype: str, value: float, message: str
) -> None:
    with pytest.raises(FileFormatError, match=message):
        write_tensors(tmp_path / "o.safetensors", {"big": (dtype, (2,))}, lambda name: np.array([1, value]))
    with pytest.raises(ValueError, match="announced"):
        write_tensors(tmp_path / "o.safetensors", {"big": (dtype, (3,))}, lambda name: np.zeros(2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [0, 10**30], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        [],
    ],
)
def test_headers_that_make_no_sense(tmp_path: Path, entry: Any) -> None:
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(FileFormatError, match=r"x\.safetensors: not a safetensors file, or damaged"):
        open_tensors(tmp_path / "x.safetensors")


def test_a_header_nested_too_deeply(tmp_path: Path) -> None:
    text = b"[" * 100_000
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(FileFormatError, match="not a safetensors file, or damaged"):
        open_tensors(tmp_path / "x.safetensors")
