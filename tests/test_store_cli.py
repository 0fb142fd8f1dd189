"""`dreammix-trt store` as a user meets it: tables, JSON, exit codes, and nothing removed that was not agreed to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dreammix_trt.core.errors import InputError
from dreammix_trt.store_cli import store_app
from tests.core.test_store import Shelf, add

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def run(shelf: Shelf, *words: str) -> Any:
    environment = {"COLUMNS": "400", "NO_COLOR": "1"}
    return CliRunner().invoke(store_app, [*words, "--store", str(shelf.store.root)], env=environment)


def run_json(shelf: Shelf, *words: str) -> dict[str, Any]:
    done = run(shelf, *words, "--json")
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def test_list_shows_every_part_and_who_needs_it(shelf: Shelf) -> None:
    lines = {line.split()[-2]: line for line in map(str.rstrip, run(shelf, "list").stdout.splitlines()[1:])}
    assert lines.keys() == {key[:12] for key in shelf.present()}
    assert lines[shelf.plan[:12]].split()[:3] == ["engine", "unet", "(sm_89)"]
    assert lines[shelf.plan[:12]].endswith(str(shelf.engine))
    assert lines[shelf.unused[:12]].endswith("-")
    (shelf.store.root / shelf.plan / "data").unlink()
    assert "engine, damaged" in run(shelf, "list").stdout


def test_list_as_json(shelf: Shelf) -> None:
    entries = {entry["key"]: entry for entry in run_json(shelf, "list")["entries"]}
    assert entries.keys() == shelf.present()
    assert entries[shelf.plan]["users"] == [str(shelf.engine)]
    assert entries[shelf.plan]["parts"]["onnx"] == shelf.onnx


def test_size_adds_up(shelf: Shelf) -> None:
    record = run_json(shelf, "size")
    truth = sum(file.stat().st_size for key in shelf.present() for file in (shelf.store.root / key).iterdir())
    assert record["bytes"] == truth == sum(kind["bytes"] for kind in record["kinds"].values())
    assert {kind: each["parts"] for kind, each in record["kinds"].items()} == {
        "base": 1,
        "graph": 1,
        "onnx": 2,
        "engine": 2,
    }
    assert "all     6 parts" in run(shelf, "size").stdout
    assert record["free"] > 0


def test_an_empty_store_is_no_error(tmp_path: Path) -> None:
    for words in (["list"], ["size"], ["verify"], ["prune"]):
        done = CliRunner().invoke(store_app, [*words, "--store", str(tmp_path / "none")])
        assert done.exit_code == 0, done.output
    assert not (tmp_path / "none").exists()


def test_verify_names_the_damage_and_the_command_that_repairs(shelf: Shelf) -> None:
    assert "6 parts: every file" in run(shelf, "verify").stdout
    key = add(shelf.store, "engine", "vae", size=2 << 20)
    for damaged in (shelf.plan, key):
        data = shelf.store.root / damaged / "data"
        status = data.stat()
        with data.open("r+b") as stream:
            stream.write(b"\1")
        os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a failing disk does it
    assert shelf.store.get_sound(key), "a remembered hash counts"
    done = run(shelf, "verify")
    assert (done.exit_code, done.stdout) == (1, "")
    told = done.stderr.splitlines()
    mug = next(line for line in told if shelf.plan in line)
    assert "data is not what was built" in mug and f"`dreammix-trt build --out {shelf.engine}`" in mug
    assert "store prune" in next(line for line in told if key in line)
    assert shelf.store.get_sound(key) is None, "the next build sees it"


def test_verify_of_some_parts(shelf: Shelf) -> None:
    (shelf.store.root / shelf.plan / "data").unlink()
    assert run(shelf, "verify", shelf.base[:8]).exit_code == 0
    done = run(shelf, "verify", shelf.plan[:8], shelf.base, "--json")
    record = json.loads(done.stdout)
    assert done.exit_code == 1 and record["parts"] == 2
    assert record["damaged"][0]["key"] == shelf.plan and "missing" in record["damaged"][0]["what"]
    unknown = run(shelf, "verify", "xyz")
    assert isinstance(unknown.exception, InputError) and "'xyz'" in str(unknown.exception)


def test_a_damaged_manifest_is_a_damaged_part(shelf: Shelf) -> None:
    for key, content in ((shelf.base, "{"), (shelf.plan, '{"key": "other", "files": {}}')):
        (shelf.store.root / key / "manifest.json").write_text(content)
    (shelf.store.root / shelf.graph / "manifest.json").unlink()
    record = json.loads(run(shelf, "verify", "--json").stdout)
    assert {each["key"] for each in record["damaged"]} == {shelf.base, shelf.plan, shelf.graph}


def test_prune_says_what_goes_and_why_the_rest_stays(shelf: Shelf) -> None:
    before = shelf.present()
    done = run(shelf, "prune", "--dry-run")
    assert done.exit_code == 0 and shelf.present() == before
    lines = [line.split() for line in done.stdout.splitlines()]
    assert sum(line[:2] == ["goes", "onnx"] for line in lines) == 2
    assert ["goes", "engine", "unet", "(sm_120)"] in [line[:4] for line in lines]
    assert any(line[:4] == ["stays", "engine", "unet", "(sm_89)"] and line[-1] == str(shelf.engine) for line in lines)
    assert "--keep-onnx" in done.stdout
    record = run_json(shelf, "prune", "--dry-run", "--keep-onnx")
    assert {entry["key"] for entry in record["goes"]} == {shelf.stale, shelf.unused} and record["dry_run"]


def test_prune_frees_what_it_says(shelf: Shelf) -> None:
    planned = run_json(shelf, "prune", "--dry-run")["bytes"]
    done = run_json(shelf, "prune", "--yes")
    assert done["bytes"] == planned > 0
    assert shelf.present() == {shelf.base, shelf.graph, shelf.plan}
    assert "nothing to remove" in run(shelf, "prune", "--yes").stdout
    assert run(shelf, "prune", "--all", "--yes").exit_code == 0
    assert shelf.present() == {shelf.base, shelf.plan}


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_prune_removes_nothing_where_nobody_can_be_asked(shelf: Shelf, words: list[str]) -> None:
    before = shelf.present()
    done = run(shelf, "prune", *words)
    assert isinstance(done.exception, InputError) and "--yes" in str(done.exception)
    assert shelf.present() == before


def test_prune_keeps_the_parts_of_an_engine_that_is_not_mounted(shelf: Shelf) -> None:
    shelf.engine.rename(shelf.engine.with_name("away"))
    done = run(shelf, "prune", "--yes")
    assert shelf.plan in shelf.present() and f"{shelf.engine} is not there now" in done.stdout
    assert "forgotten" in run(shelf, "prune", "--yes", "--forget-missing").stdout
    assert shelf.present() == {shelf.graph}


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("answer, stays", [("n", True), ("y", False)])
def test_prune_asks_a_person(shelf: Shelf, answer: str, stays: bool) -> None:
    master, slave = os.openpty()
    command = [sys.executable, "-c", "from dreammix_trt.store_cli import store_app; store_app()", "prune", "--store"]
    os.write(master, f"{answer}\n".encode())
    done = subprocess.run(
        [*command, str(shelf.store.root)],
        stdin=slave,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(master)
    os.close(slave)
    assert done.returncode == 0, done.stderr
    assert "remove them?" in done.stderr
    assert (shelf.unused in shelf.present()) == stays
