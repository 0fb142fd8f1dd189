"""How the command line behaves: nothing replaced in silence, pipes, odd streams, exit codes, errors as JSON."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreammix_trt import cli, terminal
from dreammix_trt.core import errors
from dreammix_trt.core.extras import TRAINING
from dreammix_trt.engine.result import read_request
from tests.support.commands import run_command

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Done:
    """What a command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> dict[str, Any]:
        return dict(json.loads(self.out)["error"])


Call = Callable[..., Done]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process, as `main` does."""

    def run(*words: str | Path) -> Done:
        return Done(*run_command(monkeypatch, capsys, *words))

    return run


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of an odd name with image.png and mask.png."""
    folder = tmp_path / "my :abc: [bold] pictures é"
    folder.mkdir()
    Image.new("RGB", (64, 64), (90, 120, 150)).save(folder / "image.png")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 44, 44))
    mask.save(folder / "mask.png")
    return folder


def words(engine: Path, place: Path, *more: str | Path) -> list[str | Path]:
    pair = ["--image", place / "image.png", "--mask", place / "mask.png"]
    return ["inpaint", engine, *pair, "--prompt", "a sks mug", "--steps", "2", *more]


def spawn(*arguments: str | Path, given: bytes | None = None, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "dreammix_trt", *(str(argument) for argument in arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, input=given, capture_output=True, env=variables, check=False, timeout=300)


def test_only_what_was_made_here_is_replaced_unasked(mug_engine: Path, place: Path, call: Call) -> None:
    for name in ("photo.png", "photo.jpg", "notes.png"):
        if name == "notes.png":
            (place / name).write_text("not a picture at all")
        else:
            Image.new("RGB", (8, 8), (1, 2, 3)).save(place / name)
        before = (place / name).read_bytes()
        done = call(*words(mug_engine, place, "--out", place / name))
        assert done.code == 2 and "--force" in done.err and str(place / name) in done.err
        assert (place / name).read_bytes() == before
    assert call(*words(mug_engine, place, "--out", place / "photo.png", "--force")).code == 0
    assert read_request(place / "photo.png").prompt == "a sks mug"
    stages = ["--out", place / "photo.png", "--save-stages", place / "stages.png"]
    assert call(*words(mug_engine, place, *stages)).code == 0
    assert call(*words(mug_engine, place, *stages)).code == 0, "pictures and sheets made here are replaced"
    (place / "empty.png").touch()
    assert call(*words(mug_engine, place, "--out", place / "empty.png")).code == 0


def test_every_picture_of_a_count_is_looked_at_first(mug_engine: Path, place: Path, call: Call) -> None:
    Image.new("RGB", (8, 8)).save(place / "out-2.png")
    done = call(*words(mug_engine, place, "--out", place / "out.png", "--count", "2"))
    assert done.code == 2 and "out-2.png" in done.err
    assert not (place / "out-1.png").exists()


def test_training_replaces_an_older_lora_only_when_told(tmp_path: Path, call: Call) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "subject.json").write_text("{}")
    train = ["train", tmp_path / "nowhere", "--class-name", "mug", "--out", lora]
    done = call(*train)
    assert done.code == 2 and "--force" in done.err and str(lora) in done.err
    forced = call(*train, "--force")
    assert "--force" not in forced.err and "nowhere" in forced.err, "now it looks at the photographs"
    assert (lora / "subject.json").read_text() == "{}"


def test_a_training_tells_scripts_what_it_made(tmp_path: Path, call: Call) -> None:
    for name in TRAINING:
        pytest.importorskip(name, reason="the trainer needs its extra")
    from tests.support.tiny_model import write_tiny_model

    base = write_tiny_model(tmp_path / "base").folder
    for part, colour in (("image", (90, 120, 150)), ("mask", (0, 0, 0))):
        picture = Image.new("RGB", (80, 60), colour)
        picture.paste((255, 255, 255), (25, 20, 60, 45))
        (tmp_path / "photos" / part).mkdir(parents=True)
        picture.save(tmp_path / "photos" / part / "00.png")
    train = ["train", tmp_path / "photos", "--class-name", "mug", "-o", tmp_path / "lora", "--base", base]
    done = call(*train, "--steps", "2", "--threads", "1", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["lora"] == str(tmp_path / "lora") and record["steps"] == 2 and record["token"] == "sks"
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert call(*train, "--json").error["kind"] == "InputError"


def test_pictures_come_from_stdin_and_go_to_stdout(mug_engine: Path, place: Path) -> None:
    named = spawn(*words(mug_engine, place, "--out", place / "named.png"))
    assert named.returncode == 0, named.stderr
    for option, name in (("--image", "image.png"), ("--mask", "mask.png"), ("--from", "named.png")):
        order = words(mug_engine, place, "--out", "-", "--from", place / "named.png")
        order[order.index(option) + 1] = "-"
        done = spawn(*order, given=(place / name).read_bytes())
        assert done.returncode == 0, done.stderr
        assert done.stdout == (place / "named.png").read_bytes()
        assert b"stdout (" in done.stderr


MISUSED_PIPES = {
    "both from stdin": (["--image", "-", "--mask", "-", "--out", "x.png"], "stdin holds one file"),
    "empty": (["--image", "-", "--out", "x.png"], "stdin is empty"),
    "two pictures": (["--out", "-", "--count", "2"], "takes one picture"),
    "JSON as well": (["--out", "-", "--json"], "both write to stdout"),
}


@pytest.mark.parametrize("name", MISUSED_PIPES)
def test_a_pipe_that_cannot_be_is_refused(name: str, mug_engine: Path, place: Path) -> None:
    options, told = MISUSED_PIPES[name]
    done = spawn(*words(mug_engine, place, *options), given=b"")
    assert done.returncode == 2, done.stderr
    assert told in done.stderr.decode()


def test_each_kind_of_error_has_its_exit_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.__name__: kind.exit_code for kind in kinds if "exit_code" in vars(kind)}
    assert codes == {
        "DreamMixError": 1,
        "InputError": 2,
        "FileFormatError": 3,
        "EngineError": 4,
        "DeviceError": 5,
        "BuildError": 6,
        "MissingExtraError": 7,
        "EndpointError": 69,
        "QueueFull": 75,
        "TimedOut": 124,
        "Cancelled": 130,
    }
    page = (ROOT / "docs/command-line.md").read_text()
    for name, code in codes.items():
        assert f"| {code} |" in page, name


@pytest.mark.parametrize(
    "order, kind, code",
    [
        (["inspect", "nowhere", "--json"], "EngineError", 4),
        (["build", "--out", "x", "--base", "nowhere", "--json"], "FileFormatError", 3),
        (["train", "nowhere", "--class-name", "mug", "--out", "x", "--json"], "InputError", 2),
        (["train", "--json"], "InputError", 2),
        (["inpaint", "x", "--no-such-option", "--json"], "InputError", 2),
        (["store", "verify", "abc", "--store", "nowhere", "--json"], "InputError", 2),
    ],
)
def test_errors_are_json_on_stdout_where_json_is_asked_for(
    order: list[str], kind: str, code: int, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*order)
    assert done.code == code
    assert (done.error["kind"], done.error["exit_code"]) == (kind, code)
    assert done.err == f"error: {done.error['message']}\n"
    assert list(tmp_path.iterdir()) == []


def test_wrong_choices_name_the_right_ones(call: Call) -> None:
    for command, option, allowed in (
        ("train", "--loss", "'paper', 'reference'"),
        ("inpaint", "--sampler", "'dpmpp_2m_sde', 'euler', 'lcm'"),
        ("inpaint", "--mode", "'native', 'reference'"),
        ("inpaint", "--residency", "'resident', 'one-unet', 'swap'"),
        ("build", "--shapes", "'static', 'dynamic'"),
        ("build", "--backend", "'onnxruntime', 'openvino', 'tensorrt-rtx', 'tensorrt'"),
        ("build", "--precision", "'float32', 'float16', 'bfloat16', 'fp8'"),
        ("train-base", "--device", "'cpu', 'cuda'"),
    ):
        done = call(command, option, "wrong")
        assert done.code == 2
        assert f"'wrong' is not one of {allowed}; see `dreammix-trt {command} --help`" in done.err, done.err


@pytest.mark.parametrize("given", [["--steps", "nine"], ["--steps=nine"], ["--threads", "0"], ["-n", "-3"]])
def test_a_number_that_cannot_be_is_named_with_its_option(given: list[str], call: Call) -> None:
    done = call("inpaint", "engine", "--out", "x.png", *given)
    option, _, value = given[0].partition("=")
    assert done.code == 2
    assert option in done.err and f"(it is {value or given[1]!r}); see" in done.err


def test_messages_are_chosen_anywhere(mug_engine: Path, place: Path, call: Call) -> None:
    usual = words(mug_engine, place, "--out", place / "out.png")
    for order in (["--quiet", *usual], [*usual, "-q"], ["-q", *usual, "--log-level", "error"]):
        done = call(*order)
        assert (done.code, done.out, done.err) == (0, "", "")
    assert str(place / "out.png") in call(*usual).err
    for order in (["--log-level", "debug", "store", "size"], ["store", "size", "--log-level", "DEBUG"]):
        assert call(*order).code == 0
        assert terminal.logging.getLogger().level == terminal.logging.DEBUG
    assert call("store", "--log-level", "loud", "list").code == 2


@pytest.mark.parametrize(
    "command",
    [
        *(
            "",
            "attributes",
            "regularize",
            "train",
            "train-asuka",
            "train-tokens",
            "train-many",
            "build-many",
            "distill",
            "build",
            "inspect",
            "enroll",
            "inpaint",
            "remove",
        ),
        *("eval", "demo"),
        *("train-base", "doctor", "store", "store prune"),
    ],
)
def test_each_help_has_a_short_option_and_names_everything(command: str, call: Call) -> None:
    done = call(*command.split(), "-h")
    assert (done.code, done.err) == (0, "")
    assert "--quiet" in done.out and "--log-level" in done.out and "…" not in done.out
    wanted = {
        "attributes": ("By a model behind an endpoint", "Examples:", "--judge", "--clip", "--check", "-o"),
        "regularize": ("What is painted", "Examples:", "--photos", "--contrast", "--segment", "-n", "-o"),
        "train": ("What is learnt", "Examples:", "--force", "-o"),
        "distill": ("What is distilled", "Examples:", "--pictures", "--guidance", "--resume", "-o"),
        "train-asuka": ("What is learnt", "Examples:", "--objects", "--revealed", "--perceptual", "--resume", "-o"),
        "train-tokens": ("What is learnt", "Examples:", "--objects", "--views", "--decoupling", "--resume", "-o"),
        "train-many": ("What is learnt", "Where it runs", "Examples:", "--ray-address", "--force", "--steps", "-o"),
        "build-many": ("The base", "Where it runs", "Examples:", "--cpus-per-task", "--store", "--json", "-o"),
        "build": ("The base", "Examples:", "--json", "-o"),
        "enroll": ("What is enrolled", "Examples:", "--segment", "--class-name", "-i", "-m", "-o"),
        "inpaint": ("What is painted", "Examples:", "-i", "-m", "-p", "-o", "-n"),
        "train-base": ("--work", "--device", "--processes", "--minutes-scale", "--native-size", "--smoke"),
    }
    for word in wanted.get(command, ()):
        assert word in done.out


def test_the_help_fits_a_narrow_ascii_terminal() -> None:
    done = spawn("train-base", "-h", PYTHONIOENCODING="ascii", COLUMNS="40")
    assert done.returncode == 0 and b"--minutes-scale" in done.stdout and done.stderr == b""
    done = spawn("build", "-h", PYTHONIOENCODING="ascii", COLUMNS="80")
    assert done.returncode == 0 and b"+- The base -" in done.stdout and done.stderr == b""


def test_the_version_has_a_short_option(call: Call) -> None:
    assert call("-V").out == call("--version").out == f"{cli.__version__}\n"


def test_odd_names_are_printed_whole_in_a_narrow_ascii_terminal(mug_engine: Path, place: Path) -> None:
    streams = {"COLUMNS": "80", "PYTHONIOENCODING": "ascii"}
    long = place / ("a " * 60 + "b.png")
    escaped = str(long).encode("ascii", "backslashreplace")
    done = spawn(*words(mug_engine, place, "--out", long), **streams)
    assert done.returncode == 0 and escaped in done.stderr, done.stderr
    for order in (["inspect", long], ["store", "verify", "x", "--store", long]):
        done = spawn(*order, **streams)
        assert escaped in done.stdout + done.stderr and b"Traceback" not in done.stderr
    for order in (
        ["store", "list"],
        ["store", "size"],
        ["inspect", mug_engine],
        ["doctor"],
        ["store", "prune", "--dry-run"],
    ):
        done = spawn(*order, **streams)
        assert b"Traceback" not in done.stderr and done.stdout
    assert str(mug_engine).encode() in spawn("store", "list", **streams).stdout


def test_a_reader_that_leaves_is_no_error(mug_engine: Path) -> None:
    command = f"{sys.executable} -m dreammix_trt inspect {mug_engine} --json | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("{", "")


def test_long_work_says_plain_lines_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "FIRST_LINE", 0.05)
    monkeypatch.setattr(terminal, "NEXT_LINE", 0.1)
    monkeypatch.setattr(terminal, "_state", terminal._State())
    said = ""

    def read_until(text: str) -> str:
        nonlocal said
        until = time.monotonic() + 20
        while text not in said and time.monotonic() < until:
            time.sleep(0.05)
            said += capsys.readouterr().err
        return said

    with terminal.show_progress("training") as update:
        update("steps", 0.25, "loss 0.5 [/] :smile:")
        assert "training: steps 25% after 0 s, loss 0.5 [/] :smile:\n" in read_until("25%")
        time.sleep(0.3)
        update("steps", 0.75)
        assert "training: steps 75% after " in read_until("75%")
    assert said.count("25%") == said.count("75%") == 1, "what has not changed is not repeated"


def test_short_work_says_no_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_state", terminal._State())
    with terminal.show_progress("training") as update:
        update("steps", 1.0)
    assert capsys.readouterr().err == ""


def test_a_build_tells_scripts_what_it_made(tmp_path: Path, small_base: Path, mug_lora: Path, call: Call) -> None:
    done = call("build", "--base", small_base, "--lora", mug_lora, "--name", "mug", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["engine"] == str(tmp_path / "out")
    assert record["backend"] == "onnxruntime" and [each["name"] for each in record["subjects"]] == ["mug"]


def test_completion_has_no_noise() -> None:
    script = spawn(_DREAMMIX_TRT_COMPLETE="source_bash")
    assert b"complete -o default -F _dreammix_trt_completion dreammix-trt" in script.stdout and script.stderr == b""
    words = {
        "_DREAMMIX_TRT_COMPLETE": "complete_bash",
        "COMP_WORDS": "dreammix-trt inpaint --sampler ",
        "COMP_CWORD": "3",
    }
    done = spawn(**words)
    assert done.stdout.split() == [b"dpmpp_2m_sde", b"euler", b"lcm"] and done.stderr == b""


def test_streams_without_a_character_get_its_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    terminal.prepare_streams()
    terminal.say("é → \udcff :smile: [bold]")
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xe9 \\u2192 \\udcff :smile: [bold]\n"


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers", "peft"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from dreammix_trt.cli import main
main()
"""


@pytest.mark.parametrize("order", [["demo", "--out", "made"], ["train", "made", "--class-name", "mug", "--out", "made"],
                                   ["train-base", "--out", "made"]])  # fmt: skip
def test_without_torch_training_says_so_before_anything(order: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", BLOCKED, *order, "--quiet"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables, timeout=60, check=False)
    assert done.returncode == 7, done.stderr
    assert done.stderr == (
        "error: torch, diffusers, transformers, peft are not installed, training needs it: "
        "pip install 'dreammix-trt[train]'\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_numpy_paints_the_same_picture_but_for_last_bits(mug_engine: Path, place: Path) -> None:
    pytest.importorskip("dreammix_trt._cpp", reason="the C++ extension is not built here")
    pictures = []
    for kernels in ("numpy", "cpp"):
        done = spawn(*words(mug_engine, place, "--out", place / f"{kernels}.png"), DREAMMIX_KERNELS=kernels)
        assert done.returncode == 0, done.stderr
        with Image.open(place / f"{kernels}.png") as picture:
            pictures.append(np.asarray(picture).astype(int))
    apart = np.abs(pictures[0] - pictures[1])
    assert apart.max() <= 1 and np.count_nonzero(apart) <= apart.size / 100


def test_an_engine_is_readable_for_whom_the_umask_lets(mug_engine: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    files = [file for file in mug_engine.rglob("*") if file.is_file()]
    assert any(file.suffix == ".safetensors" for file in files)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


def test_every_option_is_explained_and_has_its_place_in_a_long_help() -> None:
    group = cli.typer.main.get_command(cli.app)
    commands = dict(group.commands)  # type: ignore[attr-defined]
    commands |= commands.pop("store").commands
    for name, command in commands.items():
        options = [each for each in command.params if each.param_type_name == "option"]
        assert [each.name for each in options if not each.help] == [], name
        own = [each for each in options if each.rich_help_panel != terminal.EVERYWHERE]
        if len(own) > 15:
            assert [each.name for each in own if each.rich_help_panel is None] == [], name
