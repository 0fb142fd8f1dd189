"""Sessions of ONNX Runtime: what a graph was optimised to is kept, and computes what it did, to the bit."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.files import write_json
from dreammix_trt.core.store import Store, hash_files
from dreammix_trt.engine.backends import kept
from dreammix_trt.engine.backends.onnxruntime import sessions
from dreammix_trt.engine.backends.onnxruntime.engine_set import EngineSet
from dreammix_trt.engine.directory import open_engine

NAMES = ("text_encoder", "vae_encoder", "inpaint_head", "unet_kv", "unet", "vae_decoder")


@pytest.fixture(scope="module")
def parts(mug_engine: Path) -> dict[str, Path]:
    return open_engine(mug_engine).parts


@pytest.fixture(scope="module")
def unsaved(parts: dict[str, Path]) -> Iterator[EngineSet]:
    with EngineSet.load(parts, threads=1) as opened:
        yield opened


def draw_inputs(networks: EngineSet, name: str, width: int = 12) -> dict[str, np.ndarray]:
    """Inputs of a network, the weights of slots left out."""
    rng, weights = np.random.default_rng(4), networks.weights(name)
    sides = {"pictures": 1, "rows": 2, "context": 77, "h": 8, "w": width, "H": 64, "W": 8 * width}
    return {
        spec["name"]: (
            rng.integers(1, 500, shape)
            if spec["dtype"] == "int64"
            else (0.3 * rng.standard_normal(shape)).astype(np.float32)
        )
        for spec in networks.entries[name]["inputs"]
        if spec["name"] not in weights
        for shape in [[sides.get(side, side) for side in spec["shape"]]]
    }


def raise_full(*_: object) -> None:
    """In place of `Store.put`."""
    raise OSError(errno.ENOSPC, "No space left on device")


def replace_kept(shelf: Store, key: str, file: str, content: bytes) -> None:
    """Give a kept part another file, and the manifest that belongs to it."""
    folder = shelf.root / key
    (folder / file).write_bytes(content)
    (folder / "manifest.json").unlink()
    write_json(folder / "manifest.json", {"key": key, "parts": {}, "files": hash_files(folder)})


def run_all(parts: dict[str, Path], shelf: Store) -> dict[str, dict[str, np.ndarray]]:
    """The outputs of networks in a new set of sessions."""
    with EngineSet.load(parts, threads=1, shelf=shelf) as networks:
        return {name: networks.run(name, **draw_inputs(networks, name)) for name in NAMES}


def test_what_is_kept_computes_the_same_bits(parts: dict[str, Path], unsaved: EngineSet, tmp_path: Path) -> None:
    shelf = Store(tmp_path)
    kept, taken = run_all(parts, shelf), run_all(parts, shelf)
    assert [entry.name for entry in shelf.entries()] == sorted(NAMES)
    assert {(entry.kind, entry.complete) for entry in shelf.entries()} == {("session", True)}
    for name in NAMES:
        for output, wanted in unsaved.run(name, **draw_inputs(unsaved, name)).items():
            np.testing.assert_array_equal(kept[name][output], wanted, err_msg=name)
            np.testing.assert_array_equal(taken[name][output], wanted, err_msg=name)


def test_a_second_process_optimises_nothing(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, made = Store(tmp_path), []
    make = sessions._make
    monkeypatch.setattr(sessions, "_make", lambda graph, options: made.append(type(graph)) or make(graph, options))
    run_all(parts, shelf)
    assert all(issubclass(each, Path) for each in made) and len(made) == len(NAMES)
    made.clear()
    run_all(parts, shelf)
    assert made == [bytes] * len(NAMES)


def test_other_sides_versions_and_processors_have_graphs_of_their_own(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Store(tmp_path)

    def paint(width: int) -> None:
        with EngineSet.load(parts, threads=1, shelf=shelf) as networks:
            networks.run("inpaint_head", **draw_inputs(networks, "inpaint_head", width))

    for count, width in ((1, 8), (1, 8), (2, 16)):
        paint(width)
        assert len(shelf.entries()) == count
    monkeypatch.setattr(kept, "read_processor_features", lambda: ("avx9000",))
    paint(8)
    assert len(shelf.entries()) == 3
    monkeypatch.setattr(sessions.import_onnxruntime(), "__version__", "9.9")
    paint(8)
    assert len(shelf.entries()) == 4


def test_a_damaged_graph_is_made_again(
    parts: dict[str, Path], unsaved: EngineSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf, inputs = Store(tmp_path), draw_inputs(unsaved, "inpaint_head")
    expected = unsaved.run("inpaint_head", **inputs)["feature"]
    for _ in range(2):
        with EngineSet.load(parts, threads=1, shelf=shelf) as networks, caplog.at_level(logging.WARNING):
            np.testing.assert_array_equal(networks.run("inpaint_head", **inputs)["feature"], expected)
        (entry,) = shelf.entries()
        file = shelf.root / entry.key / "optimised.onnx"
        assert file.read_bytes() != b"no graph"
        file.write_bytes(b"no graph")
    assert "is damaged" in caplog.text


def test_a_store_that_cannot_be_written_costs_time_alone(
    parts: dict[str, Path], unsaved: EngineSet, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    inputs = draw_inputs(unsaved, "inpaint_head")
    with EngineSet.load(parts, threads=1, shelf=Store(tmp_path / "file" / "store")) as networks:
        found = networks.run("inpaint_head", **inputs)["feature"]
    np.testing.assert_array_equal(found, unsaved.run("inpaint_head", **inputs)["feature"])


def test_a_disk_that_fills_up_under_onnxruntime_costs_time_alone(
    parts: dict[str, Path], unsaved: EngineSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sessions._choose_options

    def choose(*given: Any, keep: Path | None = None, **more: Any) -> Any:
        return plain(*given, keep=None if keep is None else Path("/dev/full"), **more)

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(sessions, "_choose_options", choose)
    inputs, shelf = draw_inputs(unsaved, "inpaint_head"), Store(tmp_path)
    with EngineSet.load(parts, threads=1, shelf=shelf) as networks:
        found = networks.run("inpaint_head", **inputs)["feature"]
    np.testing.assert_array_equal(found, unsaved.run("inpaint_head", **inputs)["feature"])
    monkeypatch.undo()
    monkeypatch.setattr(Store, "put", raise_full)
    with EngineSet.load(parts, threads=1, shelf=shelf) as networks:
        np.testing.assert_array_equal(networks.run("inpaint_head", **inputs)["feature"], found)


def test_a_graph_that_onnxruntime_cannot_take_is_replaced(
    parts: dict[str, Path], unsaved: EngineSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf, inputs = Store(tmp_path), draw_inputs(unsaved, "inpaint_head")

    def run() -> None:
        with EngineSet.load(parts, threads=1, shelf=shelf) as networks:
            networks.run("inpaint_head", **inputs)

    run()
    (entry,) = shelf.entries()
    sound = (tmp_path / entry.key / "optimised.onnx").read_bytes()
    replace_kept(shelf, entry.key, "optimised.onnx", b"sound, but no graph")
    run()
    assert caplog.text.count("cannot be used") == 1
    assert (tmp_path / entry.key / "optimised.onnx").read_bytes() == sound
    run()
    assert caplog.text.count("cannot be used") == 1
