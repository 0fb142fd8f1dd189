"""`dreammix-trt eval` with an engine: paints, measures by the judge, is resumed, says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dreammix_trt import eval_cli
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.files import sha256_of
from dreammix_trt.engine.result import read_request
from dreammix_trt.evaluation.pairs import write_pairs
from tests.conftest import write_lora
from tests.support.commands import run_command
from tests.support.protocols import write_protocol

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run `eval` in this process; returns its exit code, stdout and stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        return run_command(monkeypatch, capsys, "eval", *words)

    return run


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    """One subject that the engine has, one that comes as a LoRA."""
    folder = write_protocol(tmp_path / "protocol", scenes=1, side=96, request={"num_inference_steps": 1})
    record = json.loads((folder / "protocol.json").read_text())
    record["subjects"]["mug-0"] |= {"subject": "mug", "expected": {"shape": "mug", "colour": "blue"}}
    (folder / "protocol.json").write_text(json.dumps(record))
    return folder


def test_an_engine_paints_a_protocol_and_goes_on_where_it_stopped(
    mug_engine: Path, protocol: Path, tmp_path: Path, call: Call
) -> None:
    loras, out = tmp_path / "loras", tmp_path / "out"
    write_lora(loras / "mug-1", seed=9)
    code, _, err = call(mug_engine, protocol, "-o", out)
    assert code == 2 and "the engine has no subject 'mug-1' (it has mug)" in err and "--subjects" in err
    code, stdout, err = call(mug_engine, protocol, "-o", out, "--subjects", loras, "--threads", "1", "--json")
    assert code == 0, err
    summary: dict[str, Any] = json.loads(stdout)
    assert summary["pictures"] == {"measured": 4, "of": 4, "painted_now": 4}
    assert summary["run"]["engine"]["passport_sha256"] == sha256_of(mug_engine / "passport.json")
    assert set(summary["tasks"]["editing"]) >= {"edit_success", "attributes_kept", "subject_cosine", "psnr"}
    assert 20 < summary["tasks"]["identity"]["psnr"]["mean"] <= 100
    painted = {name: read_request(out / f"pictures/{name}/room-0.editing-1.0.png") for name in ("mug-0", "mug-1")}
    assert [painted[name].subject for name in ("mug-0", "mug-1")] == ["mug", "mug-1"]
    assert painted["mug-0"].substitute == ("blue",) and painted["mug-0"].steps == 1
    (out / "pictures/mug-1/room-0.editing-1.0.png").unlink()
    code, stdout, err = call(mug_engine, protocol, "-o", out, "--subjects", loras, "--threads", "1")
    assert code == 0 and "4 pictures, 1 of them painted now" in err
    assert "clip_t" in stdout and "not measured: give CLIP's weights" in stdout
    shutil.rmtree(loras)
    write_lora(loras / "mug-1", seed=10)
    code, _, err = call(mug_engine, protocol, "-o", out, "--subjects", loras, "--threads", "1")
    assert code == 2 and "holds 2 pictures" in err and "another engine or LoRA" in err
    code, _, err = call(mug_engine, protocol, "-o", out, "--subjects", loras, "--set", "num_inference_steps=2")
    assert code == 2 and "num_inference_steps was 1 and is 2" in err


def test_the_example_is_written_and_nothing_else(tmp_path: Path, call: Call) -> None:
    code, stdout, err = call("--example", tmp_path / "p", "--json")
    assert code == 0 and json.loads(stdout) == {"protocol": str(tmp_path / "p")}, err
    assert (tmp_path / "p/protocol.json").is_file() and len(list((tmp_path / "p/subjects").iterdir())) == 2
    code, _, err = call("engine", "--example", tmp_path / "p")
    assert code == 2 and "leave out engine" in err


def test_rooms_are_drawn_and_finished_pictures_of_them_measured(tmp_path: Path, call: Call) -> None:
    rooms, out = tmp_path / "rooms", tmp_path / "out"
    code, stdout, err = call("--example", rooms, "--pairs", 3, "--seed", 5)
    assert (code, stdout) == (0, "") and "a protocol of 3 empty rooms" in err
    (tmp_path / "finished").mkdir()
    for scene in (file for file in (rooms / "scenes").iterdir() if "_mask" not in file.name):
        shutil.copy(scene, tmp_path / "finished")
    code, stdout, err = call(rooms, "--pictures", tmp_path / "finished", "-o", out, "--json")
    assert code == 0, err
    summary = json.loads(stdout)
    means = {name: value["mean"] for name, value in summary["tasks"]["removal"].items()}
    perfect = {"object_seen": 0, "psnr": 100, "ssim": 1, "psnr_asuka": 70, "ssim_asuka": 1, "grad": 0, "ring_colour": 0}
    assert {name: means[name] for name in perfect} == pytest.approx(perfect)
    assert summary["run"]["pictures_given"] == str(tmp_path / "finished")
    for words, told in (
        ([rooms, "--pictures", tmp_path / "finished"], "--pictures FOLDER and --out"),
        (["engine", rooms, "--pictures", tmp_path / "finished", "-o", out], "give ENGINE, PROTOCOL and --out"),
        (["--pairs", 4], "--pairs says how many rooms"),
        ([rooms, "--pictures", tmp_path / "none", "-o", out], "no such folder"),
        (["--example", rooms, "--pairs", 3], "have seed 5 and 256 pixels a side, not 0"),
    ):
        code, _, err = call(*words)
        assert code == 2 and told in err, words


def test_an_engine_removes_with_the_prompt_that_is_given(mug_engine: Path, tmp_path: Path, call: Call) -> None:
    rooms, out = tmp_path / "rooms", tmp_path / "out"
    write_pairs(rooms, 2, size=96)
    words = [mug_engine, rooms, "-o", out, "--set", "num_inference_steps=1", "--threads", "1"]
    code, stdout, err = call(*words, "--json")
    assert code == 0, err
    means = json.loads(stdout)["tasks"]["removal"]
    assert (
        means["object_seen"]["pictures"] == 2
        and means["ring_colour"]["mean"] > 0
        and 0 < means["psnr_asuka"]["mean"] < 70
    )
    code, _, err = call(*words, "--prompt", "an empty table")
    assert code == 2 and "prompt was '' and is 'an empty table'" in err
    code, _, err = call(*words, "--prompt", "an empty table", "--force")
    assert code == 0 and "2 of them painted now" in err


def test_wrong_use_is_explained(mug_engine: Path, protocol: Path, tmp_path: Path, call: Call) -> None:
    for words, told in (
        ([], "--example FOLDER"),
        ([mug_engine, protocol], "--out"),
        ([mug_engine, tmp_path / "nowhere", "-o", tmp_path / "out"], "nowhere is no folder"),
        ([mug_engine, protocol, "-o", tmp_path / "out", "--set", "seed=3"], "--set.seed cannot be set here"),
        ([mug_engine, protocol, "-o", tmp_path / "out", "--clip", tmp_path], "has no config.json"),
        ([mug_engine, protocol, "-o", tmp_path / "out", "--inception", tmp_path / "none.pth"], "no such file"),
        ([mug_engine, protocol, "-o", protocol], "other files"),
        (
            [mug_engine, protocol, "-o", tmp_path / "out", "--seed", "1"],
            "--seed cannot be used here: it is of the rooms",
        ),
        (
            ["--example", tmp_path / "out", "--clip", tmp_path],
            "--clip cannot be used here: --example writes a protocol",
        ),
        (
            [protocol, "--pictures", tmp_path, "-o", tmp_path / "out", "--threads", "2", "--verify"],
            "--threads, --verify cannot be used here: the pictures of --pictures are finished",
        ),
    ):
        code, _, err = call(*words)
        assert code == 2 and told in err, words
    record = json.loads((protocol / "protocol.json").read_text())
    record["subjects"]["mug-0"]["expected"] = {"colour": "lime"}
    (protocol / "protocol.json").write_text(json.dumps(record))
    code, _, err = call(mug_engine, protocol, "-o", tmp_path / "out")
    assert code == 2 and "subjects.mug-0.expected.colour is 'lime'" in err
    assert not (tmp_path / "out").exists()


def test_the_judge_comes_with_the_base_s_contents_whatever_its_name() -> None:
    own = BaseFiles.open()
    files = own.hash_contents()

    protocol: Any = SimpleNamespace(name="rooms")

    def found(name: str, **changed: str) -> Path | None:
        passport: Any = SimpleNamespace(base={"name": name, "files": files | changed})
        return eval_cli._find_judge(passport, protocol)

    assert found("renamed") == found(own.folder.name) == own.folder
    assert found("renamed", **{"unet/config.json": "0" * 64}) == own.folder, "another native side"
    for name in ("patch", next(name for name in files if name.startswith("unet/") and "config" not in name)):
        assert found(own.folder.name, **{name: "0" * 64}) is None
    nameless: Any = SimpleNamespace(base={"name": own.folder.name})
    assert eval_cli._find_judge(nameless, protocol) is None
    assert eval_cli._find_judge(None, protocol) is None
    world: Any = SimpleNamespace(name=f"{own.folder.name} rooms")
    assert eval_cli._find_judge(None, world) == own.folder, "finished pictures of its world"
