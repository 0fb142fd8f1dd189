"""The command line as a user meets it: real processes on the embedded model, exit codes, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dreammix_trt.cli import app
from dreammix_trt.core.errors import InputError
from dreammix_trt.engine import Options, read_request
from dreammix_trt.engine.backends.onnxruntime.engine_set import EngineSet
from dreammix_trt.engine.device import loading
from dreammix_trt.engine.device.loading import OnDevice
from dreammix_trt.engine.device.studio import Studio
from dreammix_trt.engine.directory import OpenedEngine
from dreammix_trt.engine.drivers.simulated import SimulatedDevice, SimulatedNetworks
from tests.support.chat_server import free_url, say, serve

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dreammix_trt", *(str(argument) for argument in arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False, timeout=300)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with image.png and mask.png."""
    folder = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(60, 220, (6, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    mask = np.zeros((96, 128), np.uint8)
    mask[30:70, 40:90] = 255
    Image.fromarray(picture).save(folder / "image.png")
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def inpaint(engine: Path, place: Path, *more: str | Path, out: str = "out.png") -> subprocess.CompletedProcess[str]:
    return run(
        "inpaint",
        engine,
        "--image",
        place / "image.png",
        "--mask",
        place / "mask.png",
        "--out",
        place / out,
        "--prompt",
        "a red sks mug",
        "--steps",
        "3",
        *more,
    )


def test_a_picture_is_made_and_made_again_from_its_own_metadata(mug_engine: Path, place: Path) -> None:
    done = inpaint(
        mug_engine, place, "--substitute", "blue", "--seed", "5", "--count", "2", "--save-stages", place / "stages.png"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    again = run(
        "inpaint",
        mug_engine,
        "--image",
        place / "image.png",
        "--mask",
        place / "mask.png",
        "--from",
        place / "out-2.png",
        "--out",
        place / "again.png",
    )
    assert again.returncode == 0, again.stderr
    assert (place / "again.png").read_bytes() == (place / "out-2.png").read_bytes()
    with Image.open(place / "out-1.png") as picture, Image.open(place / "stages.png") as stages:
        assert picture.size == (128, 96)
        assert stages.width > 600


def test_words_are_found_and_said(
    mug_lora: Path, small_base: Path, mug_engine: Path, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "attributes.json").write_text('{"class_name": "mug", "attributes": {"colour": ["blue"]}}')
    engine = tmp_path / "engine"
    built = run(
        *("build", "--base", small_base, "--lora", mug_lora, "--attributes", tmp_path / "attributes.json"),
        *("-o", engine, "--json"),
    )
    assert json.loads(built.stdout)["subjects"][0]["attributes"] == {"colour": ["blue"]}, built.stderr
    assert "colour: blue" in run("inspect", engine).stdout
    done = inpaint(engine, place, "--substitute", "auto", "--json", out="auto.png")
    assert json.loads(done.stdout)["substitute"] == ["blue"], done.stderr
    assert done.stderr.count("warning: substitute: 'blue' of colour 'blue' is taken out: the prompt says 'red'") == 1
    refused = inpaint(engine, place, "--substitute", "auto", "--substitute", "green", out="x.png")
    assert refused.returncode == 2 and "'green' is given, too; leave one of them" in refused.stderr
    with serve(say('{"words": []}')) as script:
        words = ["--substitute", "auto", "--endpoint", script.url, "--model", "llm"]
        asked = inpaint(engine, place, *words, "--json", out="asked.png")
    assert json.loads(asked.stdout)["substitute"] == [], asked.stderr
    assert "nothing is taken out: llm says" in asked.stderr and "10 tokens read and 3 written" in asked.stderr
    assert "image" not in json.dumps(script.asked), "no picture leaves the machine"
    down = inpaint(engine, place, "--substitute", "auto", "--endpoint", free_url(), "--model", "llm", out="x.png")
    assert down.returncode == 69 and "cannot be reached" in down.stderr and "without --endpoint" in down.stderr
    assert not (place / "x.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--endpoint", "http://127.0.0.1:9/v1", "--model", "llm"], "give that, too, or leave --endpoint"),
        (["--substitute", "auto", "--model", "llm"], "--model: only with --endpoint URL"),
        (["--substitute", "auto", "--endpoint", "http://127.0.0.1:9/v1"], "--model is missing"),
    ],
)
def test_options_of_an_endpoint_need_each_other(words: list[str], said: str, mug_engine: Path, place: Path) -> None:
    common = ["-i", str(place / "image.png"), "-m", str(place / "mask.png"), "-p", "a red sks mug", "-o", "x.png"]
    done = CliRunner().invoke(app, ["inpaint", str(mug_engine), *common, *words])
    assert isinstance(done.exception, InputError) and said in str(done.exception)


def test_the_mask_may_be_the_pictures_transparency(mug_engine: Path, place: Path, tmp_path: Path) -> None:
    with Image.open(place / "image.png") as image, Image.open(place / "mask.png") as mask:
        erased = image.convert("RGB")
        erased.putalpha(mask.point(lambda value: 255 - value))
        erased.save(tmp_path / "erased.png")
    common = ["inpaint", mug_engine, "--image", tmp_path / "erased.png", "--out", tmp_path / "out.png"]
    more = ["--prompt", "a red sks mug", "--steps", "2"]
    done = run(*common, *more, "--mask-from-alpha")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out.png") as out:
        assert out.mode == "RGBA" and np.asarray(out)[30:70, 40:90, 3].min() == 255
    missing = run(*common, *more)
    assert missing.returncode == 2 and "--mask is missing" in missing.stderr and "--mask-from-alpha" in missing.stderr
    both = run(*common, *more, "--mask-from-alpha", "--mask", place / "mask.png")
    assert both.returncode == 2 and "exclude each other" in both.stderr


def test_json_is_all_that_stands_on_stdout(mug_engine: Path, place: Path) -> None:
    done = inpaint(mug_engine, place, "--json", "--prompt", "a (red skz mug", out="json.png")
    record = json.loads(done.stdout)
    assert record["images"] == [str(place / "json.png")]
    assert record["seeds"] == [0]
    assert record["timings"]["network:unet"] > 0
    assert ["'(' is never closed" in record["warnings"][0], "'skz'" in record["warnings"][1]] == [True, True]
    for warning in record["warnings"]:
        assert done.stderr.count(f"warning: {warning}") == 1


def test_inspect_reads_like_a_passport(mug_engine: Path) -> None:
    done = run("inspect", mug_engine, "--verify")
    assert done.returncode == 0, done.stderr
    for word in ("micro-sdxl", "onnxruntime", "mug", "vae_decoder", "every file agrees"):
        assert word in done.stdout
    assert json.loads(run("inspect", mug_engine, "--json").stdout)["backend"] == "onnxruntime"


BAD: dict[str, tuple[list[str], str]] = {
    "no such image": (["--image", "{place}/nowhere.png"], "nowhere.png"),
    "not an image": (["--image", "{place}/text.png"], "text.png"),
    "mask of another size": (["--mask", "{place}/small.png"], "64x48"),
    "empty mask": (["--mask", "{place}/black.png"], "repaints nothing"),
    "no subject token": (["--prompt", "a red mug", "--substitute", "blue"], "sks"),
    "too long": (["--prompt", "a red sks mug " * 40, "--mode", "reference"], "162 tokens"),
    "feather out of range": (["--set", "feather=5000"], "feather is 5000"),
    "not finite": (["--guidance-scale", "nan"], "guidance_scale"),
    "out of range": (["--set", "lcg_fraction=1.5"], "lcg_fraction"),
    "unknown field": (["--set", "lambda=0.7"], "lambda"),
    "unknown subject": (["--subject", "teapot"], "teapot"),
    "unknown format": (["--out", "{place}/bad.xyz"], ".xyz"),
    "a directory as output": (["--out", "{place}"], "format"),
    "given twice": (["--guidance-scale", "3", "--set", "guidance_scale=2"], "guidance_scale"),
    "beyond all numbers": (["--set", "sharpness=" + "9" * 500], "sharpness"),
    "no such folder": (["--out", "{place}/none/bad.png"], "none"),
    "from what is no request": (["--from", "{place}/image.png"], "image.png"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_leaves_nothing(name: str, mug_engine: Path, place: Path) -> None:
    (place / "text.png").write_text("no picture")
    Image.new("L", (64, 48), 255).save(place / "small.png")
    Image.new("L", (128, 96), 0).save(place / "black.png")
    options, told = BAD[name]
    before = {file.name for file in place.iterdir()}
    done = inpaint(mug_engine, place, *(option.format(place=place) for option in options), out="bad.png")
    assert done.returncode == 2, done.stderr
    assert told in re.sub(r"\s+", " ", done.stderr)
    assert "Traceback" not in done.stderr
    assert {file.name for file in place.iterdir()} == before


def test_a_prompt_that_is_too_long_is_cut_only_when_told(mug_engine: Path, place: Path) -> None:
    long = "a red sks mug " * 40
    done = inpaint(
        mug_engine, place, "--prompt", long, "--set", "truncate_prompt=true", "--feather", "3", out="cut.png"
    )
    assert done.returncode == 0, done.stderr
    assert "warning: prompt: 85 of 160 tokens are cut off" in done.stderr
    done = inpaint(mug_engine, place, "--prompt", long, out="long.png")
    assert done.returncode == 0 and "warning" not in done.stderr
    assert (place / "long.png").read_bytes() != (place / "cut.png").read_bytes()


def test_a_drawn_seed_is_said_and_strength_and_format_are_kept(mug_engine: Path, place: Path) -> None:
    done = inpaint(mug_engine, place, "--seed", "random", "--subject-scale", "0.6", "--json", out="drawn.webp")
    assert done.returncode == 0, done.stderr
    (seed,) = json.loads(done.stdout)["seeds"]
    request = read_request(place / "drawn.webp")
    assert (request.seed, request.subject_scale) == (seed, 0.6) and seed > 0
    spoken = inpaint(mug_engine, place, "--set", "seed=null", "--no-metadata", out="spoken.jpg")
    assert spoken.returncode == 0 and re.search(r"seed \d+\)", spoken.stderr)
    with pytest.raises(InputError, match="carries no request"):
        read_request(place / "spoken.jpg")
    wrong = inpaint(mug_engine, place, "--seed", "five", out="wrong.png")
    assert wrong.returncode == 2 and "neither a whole number nor" in wrong.stderr


def test_every_field_can_be_set(mug_engine: Path, place: Path) -> None:
    done = inpaint(mug_engine, place, "--set", "guidance_scale=3", "--set", "negative_prompt=null", out="set.png")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "size, fields, painted",
    [
        ((4200, 4000), [], (4200, 4000)),
        ((64, 48), ["mode=reference"], (128, 128)),
        ((64, 48), ["mode=reference", "reference_resize=[192, 160]"], (160, 192)),
    ],
    ids=["larger than any default", "stretched", "stretched to a size"],
)
def test_a_gpu_is_given_room_for_this_request_alone(
    size: tuple[int, int],
    fields: list[str],
    painted: tuple[int, int],
    mug_engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the simulated device, which refuses what there is no room for."""
    pytest.importorskip("dreammix_trt._cpp", reason="the simulated device needs the C++ extension: pip install .")
    width, height = size
    Image.new("RGB", size, (90, 120, 60)).save(tmp_path / "image.png")
    mask = Image.new("L", size, 0)
    mask.paste(255, (width // 4, height // 4, width // 2, height // 2))
    mask.save(tmp_path / "mask.png")
    plans: list[Options] = []

    def opened(engine: OpenedEngine, store: Path | None = None) -> OnDevice:
        device = SimulatedDevice()
        return OnDevice(device, SimulatedNetworks(device, EngineSet.load(engine.parts, 1)), device.make_stream())

    def noted(studio: Studio, *arguments: Any, **options: Any) -> None:
        made(studio, *arguments, **options)
        plans.append(studio.options)

    made = Studio.__init__
    monkeypatch.setattr(loading, "open_device", opened)
    monkeypatch.setattr(Studio, "__init__", noted)
    words = [
        "inpaint", mug_engine, "--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png", "--out",
        tmp_path / "out.png", "--prompt", "a red sks mug", "--substitute", "blue", "--steps", "2", "--device", "cuda",
        *(word for field in fields for word in ("--set", field)),
    ]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None, done.exception
    assert plans == [Options(largest_picture=painted[0] * painted[1], subjects=1, texts=1, shapes=2)]
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == painted


def test_the_version_needs_no_command() -> None:
    from dreammix_trt import __version__

    assert run("--version").stdout.strip() == __version__


def test_an_engine_that_is_none(place: Path) -> None:
    done = inpaint(place / "nothing", place)
    assert done.returncode == 4
    assert "dreammix-trt build" in done.stderr


def test_the_build_tells_its_options() -> None:
    shown = run("build", "--help")
    assert shown.returncode == 0
    options = (
        "--base", "--patch", "--head", "--vae", "--tokenizer", "--lora", "--base-lora", "--sampler", "--steps",
        "--guidance-scale", "--backend", "--target", "--precision", "--shapes", "--pictures", "--workspace",
        "--vae-image", "--no-safe-vae", "--verify", "--no-verify", "--merge", "--no-slots", "--patch-biases",
        "--self-contained", "--store",
    )  # fmt: skip
    for option in options:
        assert option in shown.stdout, option
    for word in ("sm_89", "334 MB", "FILE[:scale[:target]]", "tensorrt-rtx", "dynamic"):
        assert word in re.sub(r"[\s│]+", " ", shown.stdout), word


BAD_BUILDS: dict[str, tuple[list[str], str]] = {
    "no target": (["--backend", "tensorrt-rtx"], "name the GPUs to build for with --target: sm_"),
    "an unknown target": (["--target", "sm_12"], "cannot build for 'sm_12'; it knows sm_75"),
    "a target twice": (["--target", "sm_89", "--target", "sm_89"], "name each once"),
    "the GPU at hand and another": (["--target", "current", "--target", "sm_89"], "current cannot be combined"),
    "an unknown back end": (
        ["--backend", "tflite"],
        "'tflite' is not one of 'onnxruntime', 'openvino', 'tensorrt-rtx'",
    ),
    "a target for onnxruntime": (["--backend", "onnxruntime", "--target", "sm_89"], "builds for no GPU in particular"),
    "a look without bfloat16": (["--look", "2"], "look is 2; allowed: 0 to 64, with bfloat16 on OpenVINO alone"),
    "bfloat16 elsewhere": (["--precision", "bfloat16"], "precision is 'bfloat16'; allowed: float32, float16"),
    "a precision": (["--precision", "int8"], "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
    "a scale": (["--lora", "mug.safetensors:much"], "no scale in 'much'"),
    "a sampler": (["--sampler", "ddim"], "'ddim' is not one of 'dpmpp_2m_sde', 'euler', 'lcm'"),
    "the embedded LoRA for another base": (["--few-step", "--base", "sdxl/"], "distilled from the embedded base"),
    "a base that is none": (["--base", "nowhere.safetensors"], "nowhere.safetensors"),
}


@pytest.mark.parametrize("name", BAD_BUILDS)
def test_a_build_that_cannot_be_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    options, told = BAD_BUILDS[name]
    if "target" in name or "GPU" in name:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install dreammix-trt[rtx]")
    done = run("build", "--out", tmp_path / "out", "--store", tmp_path / "store", *options, cwd=tmp_path)
    assert done.returncode == (3 if name == "a base that is none" else 2), done.stderr
    assert told in re.sub(r"\s+", " ", done.stderr) and done.stderr.strip().startswith("error:")
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert not (tmp_path / "out").exists() and not (tmp_path / "store").exists()


def test_a_base_alone_is_built_without_a_subject(mug_engine: Path, tmp_path: Path) -> None:
    done = run("build", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "no subject" in done.stderr
    record = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert record["subjects"] == [] and record["command"] == f"dreammix-trt build --out {tmp_path / 'out'}"
    again = run(*shlex.split(record["command"])[1:])
    assert again.returncode == 0, "the command of a passport builds it again"
    assert json.loads(run("inspect", tmp_path / "out", "--json").stdout) == record
