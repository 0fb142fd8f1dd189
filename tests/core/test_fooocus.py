from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.fooocus import PatchEntry, apply_patch, read_head, read_patch
from dreammix_trt.core.tensors import Weights

NAMES = {"diffusion_model.a.weight": "x.weight", "diffusion_model.a.bias": "x.bias"}


def entry(shape: tuple[int, ...], low: Any, high: Any) -> PatchEntry:
    codes = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
    return PatchEntry(codes, np.asarray(low, np.float16), np.asarray(high, np.float16))


def state() -> dict[str, Any]:
    return {"x.weight": np.ones((2, 3), np.float32), "x.bias": np.ones(2, np.float32), "y": np.ones(1, np.float32)}


def test_dequantisation_matches_the_recorded_one(golden: Path) -> None:
    units = np.load(golden / "units.npz")
    numbers = [number for number in range(20) if f"dequant{number}_delta_f16" in units]
    assert len(numbers) >= 4
    for number in numbers:
        codes, low, high = (units[f"dequant{number}_{part}"] for part in ("u8", "min", "max"))
        delta = PatchEntry(codes, low, high).delta()
        assert np.array_equal(delta, units[f"dequant{number}_delta_f16"].astype(np.float32))


def test_reads_what_torch_saved(golden: Path) -> None:
    torch = pytest.importorskip("torch")
    truth = torch.load(golden / "tiny.fooocus.patch", weights_only=True)
    patch = read_patch(golden / "tiny.fooocus.patch")
    assert list(patch) == list(truth)
    for key, (codes, low, high) in truth.items():
        assert np.array_equal(patch[key].codes, codes.numpy())
        assert np.array_equal(patch[key].low, low.numpy()) and np.array_equal(patch[key].high, high.numpy())


def test_a_strided_head_is_read_as_a_view(golden: Path) -> None:
    torch = pytest.importorskip("torch")
    stored = torch.load(golden / "inpaint_head.pth", weights_only=True)["head"]
    assert not stored.is_contiguous()
    head = read_head(golden / "inpaint_head.pth")
    assert head.flags.c_contiguous and head.dtype == np.float32
    assert np.array_equal(head, stored.float().numpy())


@pytest.mark.parametrize("biases", [False, True])
def test_apply_takes_any_subset_and_biases_only_when_told(biases: bool) -> None:
    patch = {
        "diffusion_model.a.weight": entry((2, 3), [[-1.0], [0.0]], [[1.0], [2.0]]),
        "diffusion_model.a.bias": entry((2,), 0.5, 0.5),
    }
    base = state()
    patched = apply_patch(base, patch, NAMES, biases=biases, alpha=2.0)
    low = np.array([[-1.0], [0.0]], np.float32)
    expected = 1 + 2 * (np.arange(6, dtype=np.float32).reshape(2, 3) / 255 * 2 + low)
    np.testing.assert_allclose(patched["x.weight"], expected, atol=2e-3)
    assert patched["x.bias"].tolist() == ([2.0, 2.0] if biases else [1.0, 1.0])
    assert patched["y"].tolist() == [1.0] and base["x.weight"].min() == 1.0


def test_unknown_names_and_other_widths_are_listed() -> None:
    with pytest.raises(FileFormatError, match=r"diffusion_model\.z\.weight"):
        apply_patch(state(), {"diffusion_model.z.weight": entry((2, 3), 0, 1)}, NAMES)
    with pytest.raises(FileFormatError, match=r"\(4, 3\) against \(2, 3\)"):
        apply_patch(state(), {"diffusion_model.a.weight": entry((4, 3), 0, 1)}, NAMES)


def test_the_count_of_what_is_applied_is_told(caplog: pytest.LogCaptureFixture) -> None:
    patch = {"diffusion_model.a.weight": entry((2, 3), 0, 1), "diffusion_model.a.bias": entry((2,), 0, 1)}
    with caplog.at_level("INFO"):
        apply_patch(state(), patch, NAMES)
    assert "1 tensors applied, 1 biases skipped; 1 of the UNet's 3 are not in the patch" in caplog.text


class Unread(Weights):
    """Weights that must not be read."""

    def __getitem__(self, name: str) -> Any:
        raise AssertionError(f"{name} was read")


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a patch of 960 tensors on 1680 reads their names; a tensor is read when it is used."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    names = {f"diffusion_model.l{n}.{part}": f"m{n}.{part}" for n in range(840) for part in ("weight", "bias")}
    shapes = {key: (4, 3) if key.endswith("weight") else (4,) for key in names}
    chosen = list(names)[::-1][:960]
    saved = {}
    for number, key in enumerate(chosen):
        spread = (4, *(1,) * (len(shapes[key]) - 1)) if number % 2 else ()
        low = rng.normal(-1, 0.1, spread).astype(np.float16)
        saved[key] = (rng.integers(0, 256, shapes[key], np.uint8), low, low + np.float16(2))
    torch.save(
        {key: tuple(map(torch.from_numpy, map(np.asarray, parts))) for key, parts in saved.items()},
        tmp_path / "v26.fooocus.patch",
    )
    raw = {name: np.ones(shapes[key], np.float32) for key, name in names.items()}
    monkeypatch.setattr(PatchEntry, "delta", lambda self: pytest.fail("a delta was computed"))
    patch = read_patch(tmp_path / "v26.fooocus.patch")
    patched = apply_patch(Unread(Weights.of(raw)._tensors), patch, names, biases=True)
    monkeypatch.undo()
    patched = apply_patch(Weights.of(raw), patch, names, biases=True)
    assert len(patch) == 960 and len(patched) == 1680
    for key, name in names.items():
        delta = PatchEntry(*saved[key]).delta() if key in saved else np.zeros(shapes[key], np.float32)
        assert np.array_equal(patched[name], 1 + delta), key


def test_a_damaged_range_is_named(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    key = "diffusion_model.a.weight"
    broken = torch.tensor(float("nan")).half()
    torch.save({key: (torch.zeros(2, 3, dtype=torch.uint8), broken, broken)}, tmp_path / "x.patch")
    with pytest.raises(FileFormatError, match=r"x\.patch: tensor 'diffusion_model\.a\.weight' holds NaN"):
        apply_patch(state(), read_patch(tmp_path / "x.patch"), NAMES)["x.weight"]
    torch.save({key: (torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(3).half(), broken)}, tmp_path / "x.patch")
    with pytest.raises(FileFormatError, match=r"ranges of shape \(3,\) and \(\), which do not fit"):
        read_patch(tmp_path / "x.patch")


def write_torch_file(path: Path, value: Any, storages: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("f/data.pkl", value if isinstance(value, bytes) else pickle.dumps(value, 2))
        for key, data in (storages or {}).items():
            archive.writestr(f"f/data/{key}", data)
    return path


def pickle_tensor(count: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A hand-written pickle of {"head": tensor}, as torch would write it."""

    def text(name: str) -> bytes:
        return b"X" + len(name).to_bytes(4, "little") + name.encode()

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"J" + value.to_bytes(4, "little", signed=True) for value in values) + b"t"

    storage = (
        b"(" + text("storage") + b"ctorch\nHalfStorage\n" + text("0") + text("cpu") + f"I{count}\n".encode() + b"tQ"
    )
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + f"I{offset}\n".encode() + numbers(shape) + numbers(stride)
    )
    return b"\x80\x02}" + text("head") + tensor + b"\x89}tRs."


def test_the_hand_written_pickle_is_what_torch_means(tmp_path: Path) -> None:
    halves = np.arange(90, dtype=np.float16)
    path = write_torch_file(
        tmp_path / "h.pth", pickle_tensor(90, 45, (1, 5, 3, 3), (45, 9, 3, 1)), {"0": halves.tobytes()}
    )
    assert read_head(path).ravel().tolist() == list(range(45, 90))


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [((1, 5, 3, 3), (45, 9, 3, 1), 46), ((1, 5, 3, 3), (45, 9, 3, -1), 45), ((9000, 5, 3, 3), (0, 9, 3, 1), 0)],
)
def test_a_view_outside_its_storage_is_refused(
    tmp_path: Path, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    path = write_torch_file(tmp_path / "h.pth", pickle_tensor(90, offset, shape, stride), {"0": bytes(180)})
    with pytest.raises(FileFormatError, match="reaches outside"):
        read_head(path)


def test_a_short_storage_is_refused(tmp_path: Path) -> None:
    path = write_torch_file(tmp_path / "h.pth", pickle_tensor(90, 0, (1, 5, 3, 3), (45, 9, 3, 1)), {"0": bytes(100)})
    with pytest.raises(FileFormatError, match="storage 0 holds 50 numbers, expected 90"):
        read_head(path)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


@pytest.mark.parametrize("payload", [Evil(), {"head": Evil()}, OrderedDict(head=io.BytesIO)])
def test_a_pickle_that_wants_to_run_code_is_refused(
    tmp_path: Path, payload: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileFormatError, match="which a dict of tensors never does"):
        read_head(write_torch_file(tmp_path / "evil.pth", payload))
    assert "executed" not in capsys.readouterr().out


def test_a_pickle_cannot_reach_into_what_it_is_given(tmp_path: Path) -> None:
    """BUILD sets attributes of any object a pickle holds; a tensor's place in the file must not be among them."""
    tensor = pickle_tensor(90, 0, (1, 5, 3, 3), (45, 9, 3, 1))
    build = tensor.removesuffix(b"s.") + pickle.dumps({"shape": (9000, 5, 3, 3), "offset": 10**9}, 2)[2:-1] + b"bs."
    halves = np.arange(90, dtype=np.float16)
    path = write_torch_file(tmp_path / "h.pth", build, {"0": halves.tobytes()})
    assert read_head(path).ravel().tolist() == list(range(45))


def test_compressed_and_displaced_storages_are_refused(tmp_path: Path) -> None:
    whole = pickle_tensor(90, 0, (1, 5, 3, 3), (45, 9, 3, 1))
    with zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("f/data.pkl", whole)
        archive.writestr("f/data/0", bytes(180))
    with pytest.raises(FileFormatError, match="is compressed"):
        read_head(tmp_path / "z.pth")
    path = write_torch_file(tmp_path / "h.pth", whole, {"0": bytes(180)})
    data = bytearray(path.read_bytes())
    data[data.find(b"PK\x03\x04", 4)] = 0
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="damaged"):
        read_head(path)


def test_files_of_other_formats_say_so(tmp_path: Path, golden: Path) -> None:
    with pytest.raises(FileFormatError, match="no such file"):
        read_patch(tmp_path / "none.patch")
    (tmp_path / "text.patch").write_text("hello")
    with pytest.raises(
        FileFormatError, match=r"text\.patch.*truncated, or neither a safetensors file nor one written by torch\.save"
    ):
        read_patch(tmp_path / "text.patch")
    whole = (golden / "tiny.fooocus.patch").read_bytes()
    (tmp_path / "cut.patch").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileFormatError, match="truncated"):
        read_patch(tmp_path / "cut.patch")
    with pytest.raises(FileFormatError, match="is this a"):
        read_patch(golden / "inpaint_head.pth")
    with pytest.raises(FileFormatError, match="inpaint head"):
        read_head(golden / "tiny.fooocus.patch")
    with pytest.raises(FileFormatError, match="expected a dict"):
        read_head(write_torch_file(tmp_path / "list.pth", [1, 2]))
