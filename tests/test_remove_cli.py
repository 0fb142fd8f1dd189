"""`dreammix-trt remove`, with ASUKA's networks of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from dreammix_trt.building import build
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.request import Request
from dreammix_trt.engine.backends.onnxruntime.engine_set import EngineSet
from dreammix_trt.engine.device import loading
from dreammix_trt.engine.directory import OpenedEngine
from dreammix_trt.engine.drivers.simulated import SimulatedDevice, SimulatedNetworks
from dreammix_trt.engine.result import read_request
from dreammix_trt.painting_cli import choose_options
from tests.support.asuka import write_small_asuka
from tests.test_cli_manners import Call, call, place  # noqa: F401


@pytest.fixture(scope="module")
def engine(test_home: Path, small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    write_small_asuka(folder / "asuka", BaseFiles.open(small_base))
    build(out=folder / "engine", base=small_base, asuka=folder / "asuka")
    return folder / "engine"


def test_a_clean_plate_is_written_and_carries_its_request(engine: Path, place: Path, call: Call) -> None:  # noqa: F811
    given = ["-i", place / "image.png", "-m", place / "mask.png", "--steps", "2"]
    done = call("remove", engine, *given, "-o", place / "out.png", "--save-stages", place / "stages.png", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["images"] == [str(place / "out.png")]
    request = read_request(place / "out.png")
    assert (request.prior, request.decoder, request.prompt, request.steps) == ("alone", "asuka", "", 2)
    with Image.open(place / "image.png") as before, Image.open(place / "out.png") as after:
        assert (np.asarray(before)[:4] == np.asarray(after)[:4]).all()
    again = call("inpaint", engine, *given[:4], "--from", place / "out.png", "-o", place / "again.png")
    assert again.code == 0 and (place / "again.png").read_bytes() == (place / "out.png").read_bytes()
    paper = place / "paper.png"
    Image.new("RGB", (64, 48), "white").save(paper)
    other = call("remove", engine, *given, "-o", place / "other.png", "--prior-image", paper)
    assert other.code == 2 and "prior_image and image are of 64x48 and 64x64 pixels" in other.err


def test_what_cannot_be_is_refused_in_one_line(engine: Path, mug_engine: Path, place: Path, call: Call) -> None:  # noqa: F811
    given = ["-i", place / "image.png", "-m", place / "mask.png", "-o", place / "none.png"]
    for words, told in (
        ([mug_engine, *given], "has no asuka_prior: build it again with `--asuka FOLDER`"),
        ([engine, *given[2:]], "--image is missing"),
        ([engine, *given[:2], *given[4:]], "--mask is missing"),
        ([engine, *given, "--set", "guidance_scale=4"], "with prior 'alone' nothing is guided"),
        ([engine, *given, "--set", "feather=4", "--feather", "3"], "feather: given by --set and by an option"),
        ([engine, *given, "--set", "prompt=a mug"], "prompt is 'a mug': a removal has none"),
    ):
        done = call("remove", *words)
        assert done.code == 2 and told in done.err and not (place / "none.png").exists(), done.err


def test_on_a_gpu_a_prior_beside_the_text_has_room(place: Path) -> None:  # noqa: F811
    for prior, context in ((None, None), ("negative", None), ("concat", 4 * 77 + 256)):
        request = Request("a mug", prior=prior)  # type: ignore[arg-type]
        chosen = choose_options("cuda", None, request, place / "image.png", {"native_side": 128})
        assert chosen.get("context") == context and chosen["largest_picture"] == 64 * 64


def test_on_a_gpu_memory_is_set_aside_for_this_picture(
    engine: Path,
    place: Path,  # noqa: F811
    call: Call,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the simulated device; its clean plate is the CPU's."""
    pytest.importorskip("dreammix_trt._cpp", reason="the simulated device needs the C++ extension: pip install .")
    opened: list[SimulatedDevice] = []

    def open_device(parts: OpenedEngine, store: Path | None = None) -> loading.OnDevice:
        opened.append(SimulatedDevice())
        networks = SimulatedNetworks(opened[-1], EngineSet.load(parts.parts, 1))
        return loading.OnDevice(opened[-1], networks, opened[-1].make_stream())

    monkeypatch.setattr(loading, "open_device", open_device)
    given = ["-i", place / "image.png", "-m", place / "mask.png", "--steps", "2"]
    pictures = []
    for words in (["--threads", "1"], ["--device", "cuda"], ["--device", "cuda", "--residency", "swap"]):
        done = call("remove", engine, *given, *words, "-o", place / "plate.png", "--force")
        assert done.code == 0, done.err
        with Image.open(place / "plate.png") as picture:
            pictures.append(np.asarray(picture).astype(int))
    assert len(opened) == 2
    assert np.abs(pictures[1] - pictures[0]).max() <= 1 and (pictures[1] == pictures[2]).all()
