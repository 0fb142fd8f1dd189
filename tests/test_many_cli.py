"""`train-many` and `build-many` on a tiny base: what each subject gets, what a second run does, what is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

for _name in ("torch", "diffusers", "transformers", "peft"):
    pytest.importorskip(_name, reason="the trainer needs its extra")

from dreammix_trt import many_cli  # noqa: E402
from dreammix_trt.core.lora import FILE_NAME  # noqa: E402
from dreammix_trt.core.passport import Passport  # noqa: E402
from dreammix_trt.many import Events, Job  # noqa: E402
from dreammix_trt.train_cli import train  # noqa: E402
from tests.conftest import write_lora  # noqa: E402
from tests.support.commands import run_command  # noqa: E402
from tests.support.tiny_model import write_tiny_model  # noqa: E402
from tests.support.training import write_photographs  # noqa: E402


@dataclass
class Done:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Of --json, by subject."""
        return {row["name"]: row for row in json.loads(self.out)["subjects"]}


Call = Callable[..., Done]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command as `main` does; its jobs run in another process."""

    def run(*words: str | Path) -> Done:
        return Done(*run_command(monkeypatch, capsys, *words))

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two good subjects and a bad one."""
    folder = tmp_path / "photos"
    for name in ("cup", "mug", "odd"):
        write_photographs(folder / name)
    shutil.rmtree(folder / "odd" / "mask")
    (folder / "mug" / "subject.json").write_text('{"class_name": "mug", "token": "ohwx"}')
    (folder / "notes.txt").touch()
    return folder


def run_here(jobs: Sequence[Job]) -> Events:
    """As `run_in_turn`, without the seconds that another process takes to begin."""
    for job in jobs:
        yield job.carry_out()


def test_many_are_trained_as_one_is_and_what_is_done_stays(
    photos: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_tiny_model(tmp_path / "base").folder
    options = ["--steps", "2", "--threads", "1", "--beta", "0", "--base", base]
    order = ["train-many", photos, "--out", tmp_path / "loras", *options]
    done = call(*order)
    assert done.code == 1
    table = [line.split() for line in done.out.splitlines()]
    assert table[0] == ["subject", "state", "seconds", "steps", "where"]
    assert [row[:2] for row in table[1:]] == [["cup", "failed"], ["mug", "made"], ["odd", "failed"]]
    assert table[2][3:] == ["2", str(tmp_path / "loras" / "mug")]
    assert f"error: cup: {photos / 'cup'}: nothing says what the subject is; give --class-name" in done.err
    assert "error: odd: " in done.err and f"warning: {photos / 'notes.txt'}: a file, no subject" in done.err
    assert "mug: begins (process " in done.err and "mug: made after " in done.err
    assert "2 of 3 failed; the same command tries them again" in done.err

    monkeypatch.setattr(many_cli, "run_in_turn", run_here)
    (photos / "cup" / "subject.json").write_text('{"class_name": "cup"}')
    (photos / "odd" / "subject.json").write_text('{"class_name": "cup"}')
    done = call(*order, "--json")
    assert done.code == 1
    states = {name: (row["state"], row["steps"]) for name, row in done.rows.items()}
    assert states == {"cup": ("made", 2), "mug": ("already there", 2), "odd": ("failed", None)}
    assert "no photograph has a mask" in done.rows["odd"]["error"] and not (tmp_path / "loras" / "odd").exists()

    alone = tmp_path / "alone"
    train(photos / "mug", "mug", alone, token="ohwx", steps=2, threads=1, beta=0.0, base=base)
    for name in (FILE_NAME, "ohwx_mug.safetensors"):
        assert (alone / name).read_bytes() == (tmp_path / "loras" / "mug" / name).read_bytes()

    shutil.rmtree(photos / "odd")
    changed = [*order, "--rank", "2", "--json"]
    done = call(*changed)
    assert done.code == 1 and [row["state"] for row in done.rows.values()] == ["failed", "failed"]
    assert "holds a LoRA of other settings (rank is 2, and was 16)" in done.rows["mug"]["error"]
    assert {name: row["state"] for name, row in call(*changed, "--force").rows.items()} == {
        "cup": "made",
        "mug": "made",
    }
    done = call(*changed, "--force")
    assert done.code == 0 and {row["state"] for row in done.rows.values()} == {"already there"}


def test_a_stopped_training_goes_on(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint is used; where other settings stand there, only --force begins anew."""
    from dreammix_trt.core.errors import InputError
    from dreammix_trt.trainer.checkpoints import Checkpoints

    base = write_tiny_model(tmp_path / "base").folder
    out = tmp_path / "mug"
    given: dict[str, Any] = {"photos": photos / "mug", "class_name": "mug", "steps": 4, "threads": 1, "beta": 0.0}
    given |= {"base": base, "checkpoint_every": 2}
    train(out=tmp_path / "whole", **given)
    with monkeypatch.context() as patch:
        keep = Checkpoints.keep

        def stop(self: Any, learner: Any, done: Any) -> None:
            keep(self, learner, done)
            if len(done.history) == 3:
                raise KeyboardInterrupt

        patch.setattr(Checkpoints, "keep", stop)
        with pytest.raises(KeyboardInterrupt):
            many_cli.train_subject(out=out, force=False, **given)
    assert (tmp_path / "mug.work" / "checkpoint").is_dir() and not out.exists()
    with pytest.raises(InputError, match="had other settings"):
        many_cli.train_subject(out=out, force=False, **{**given, "seed": 1})
    restored = []
    restore = Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", lambda *rest: restored.append(1) or restore(*rest))
    many_cli.train_subject(out=out, force=False, **given)
    assert restored == [1] and (out / FILE_NAME).read_bytes() == (tmp_path / "whole" / FILE_NAME).read_bytes()


def test_engines_are_built_of_all_loras_and_share_the_store(
    tmp_path: Path, small_base: Path, mug_engine: Path, call: Call
) -> None:
    loras, engines = tmp_path / "loras", tmp_path / "engines"
    for seed, name in enumerate(("cup", "mug")):
        write_lora(loras / name, seed=seed)
    (loras / "half").mkdir()
    (loras / "half" / "pytorch_lora_weights.safetensors").write_bytes(b"half")
    order = ["build-many", loras, "--out", engines, "--base", small_base, "--json"]
    done = call(*order)
    assert done.code == 1 and {name: row["state"] for name, row in done.rows.items()} == {
        "cup": "made", "half": "failed", "mug": "made",
    }  # fmt: skip
    assert "half" in done.rows["half"]["error"] and not (engines / "half").exists()
    passports = [Passport.read(engines / name) for name in ("cup", "mug")]
    assert passports[0].parts == passports[1].parts == Passport.read(mug_engine).parts
    assert [each.subjects[0].name for each in passports] == ["cup", "mug"]
    shutil.rmtree(loras / "half")
    done = call(*order)
    assert done.code == 0 and {row["state"] for row in done.rows.values()} == {"already there"}
    shutil.rmtree(loras / "mug")
    write_lora(loras / "mug", seed=7)
    assert {name: row["state"] for name, row in call(*order).rows.items()} == {"cup": "already there", "mug": "made"}


BAD: dict[str, tuple[list[str], str]] = {
    "no folder": (["nowhere", "-o", "out"], "nowhere: no such folder"),
    "out inside": (["photos", "-o", "photos/loras"], "lies in photos, where everything is a subject"),
    "an address alone": (["photos", "-o", "out", "--ray-address", "auto"], "need --ray"),
    "a chosen GPU": (["photos", "-o", "out", "--ray", "--device", "cuda:1"], "give --device cuda"),
    "no words": (
        ["photos", "-o", "out", "--captions", "attributes", "--class-name", "mug"],
        "needs photos/cup/attributes.json",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused(
    name: str, photos: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, told = BAD[name]
    monkeypatch.chdir(tmp_path)
    done = call("train-many", *words)
    assert done.code in (1, 2) and told in done.err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["photos"]


def test_ctrl_c_tells_what_is_unfinished(
    photos: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreammix_trt.many import Begun, Outcome

    def stopped(jobs: Any) -> Any:
        yield Begun("cup", "process 1")
        yield Outcome("cup", "made", 2.0)
        yield Begun("mug", "process 1")
        raise KeyboardInterrupt

    monkeypatch.setattr(many_cli, "run_in_turn", stopped)
    monkeypatch.setattr(many_cli, "_read_steps", lambda _: 5)
    order = ["train-many", photos, "-o", tmp_path / "out", "--class-name", "mug"]
    done = call(*order)
    assert done.code == 130 and "stopped; 2 of 3 are unfinished, and the same command goes on" in done.err
    assert [line.split()[:2] for line in done.out.splitlines()[1:]] == [
        ["cup", "made"], ["mug", "unfinished"], ["odd", "unfinished"],
    ]  # fmt: skip
    assert json.loads(call(*order, "--json").out)["error"]["exit_code"] == 130
