"""Passports: what is written is read back; what was changed, cut or made by another version is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dreammix_trt.core.errors import EngineError
from dreammix_trt.core.passport import FILE_NAME, SCHEMA, NetworkEntry, Passport, SubjectEntry


def make_passport(**fields: Any) -> Passport:
    kernels = [{"total": 1331}, {"total": 1342}]
    build = {"seconds": 12.4, "engine_bytes": 3 << 20, "peak_anonymous": 2 << 30, "kernels": kernels}
    network = NetworkEntry("unet", "unet.engine", {"sample": ["2*N", 4, "h", "w"]}, 36, {"max_rel": 2e-6}, build)
    subject = SubjectEntry("mug", "sks", "mug", "patched", "subjects/mug.safetensors", "a" * 64, 2048, "lora", "b" * 64)
    usual: dict[str, Any] = dict(
        schema=SCHEMA,
        created_by="dreammix-trt 0.1.0",
        backend="tensorrt-rtx",
        backend_version="1.7.1",
        targets=["sm_89"],
        precision="float16",
        platform="Linux x86_64",
        base_key="c" * 64,
        parts={"base": "e" * 64, "unet": "f" * 64},
        networks_at="store",
        base={
            "name": "micro-sdxl",
            "native_side": 128,
            "slots": True,
            "files": {},
            "loras": ["lcm.safetensors"],
            "defaults": {"sampler": "lcm"},
        },
        versions={"numpy": "2.0"},
        networks=(network,),
        subjects=(subject,),
        files={"base/base.json": "d" * 64},
        command="dreammix-trt build --lora lora --out engine",
    )
    return Passport(**(usual | fields))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_passport().write(tmp_path)
    return tmp_path


def change(folder: Path, **fields: Any) -> None:
    path = folder / FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_passport_is_read_back_as_written(folder: Path) -> None:
    assert Passport.read(folder) == make_passport()


@pytest.mark.parametrize(
    ("schema", "told"),
    [(SCHEMA + 1, "upgrade"), (2, "schema 2, this version reads 3; build it"), (0, "build it again"), (None, "build")],
)
def test_another_schema_is_refused_with_the_command_that_rebuilds(folder: Path, schema: object, told: str) -> None:
    change(folder, schema=schema)
    with pytest.raises(EngineError, match=told) as caught:
        Passport.read(folder)
    assert "dreammix-trt build --lora lora --out engine" in str(caught.value)


def test_the_command_that_rebuilds_has_no_options_that_are_gone(folder: Path) -> None:
    for rank, now in ((16, ""), (0, " --no-slots"), (8, "")):
        change(folder, schema=2, command=f"dreammix-trt build --out it --slot-rank {rank} --precision float16")
        with pytest.raises(EngineError, match=rf"`dreammix-trt build --out it{now} --precision float16`$"):
            Passport.read(folder)


def test_it_says_how_many_layers_compute_in_e4m3(folder: Path) -> None:
    facts = dict(Passport.read(folder).describe()[0][1])
    assert "FP8" not in facts
    record = {"requests": 8, "unets": {"unet": {"layers": 104, "kept_in_float16": ["conv_in", "conv_out"]}}}
    change(folder, base={**make_passport().base, "float8": record})
    facts = dict(Passport.read(folder).describe()[0][1])
    assert facts["FP8"] == "unet: 104 layers in E4M3, 2 kept in float16 (calibrated with 8 requests)"
    for damaged in ([], {"unets": {"unet": 3}, "requests": 1}):
        change(folder, base={**make_passport().base, "float8": damaged})
        assert "FP8" not in dict(Passport.read(folder).describe()[0][1])


def test_a_passport_of_schema_1_says_how_to_rebuild_though_its_fields_are_others(tmp_path: Path) -> None:
    """As version 0.1 wrote them: other fields, but the command is there, so the remedy is exact."""
    record = {
        "schema": 1,
        "created_by": "dreammix-trt 0.1.0",
        "backend": "onnxruntime",
        "precision": "float32",
        "base_key": "c" * 64,
        "networks_at": "store",
        "command": "dreammix-trt build --lora mug --out engine",
    }
    (tmp_path / FILE_NAME).write_text(json.dumps(record))
    with pytest.raises(EngineError, match=r"has schema 1.*`dreammix-trt build --lora mug --out engine`$"):
        Passport.read(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"backend": 3},
        {"base": []},
        {"files": {"base.json": 1}},
        {"networks": [{}]},
        {"networks": None},
        {"subjects": [3]},
        {"targets": "sm_89"},
        {"parts": {"unet": 3}},
        {"backend_version": None},
        {"networks_at": "elsewhere"},
        {"files": {"../../secret": "0"}},
        {"extra": 1},
        {"subjects": [{**json.loads(json.dumps(make_passport().to_dict()))["subjects"][0], "file": "/etc/passwd"}]},
        {"subjects": [{**json.loads(json.dumps(make_passport().to_dict()))["subjects"][0], "bytes": "many"}]},
        {"subjects": [{**json.loads(json.dumps(make_passport().to_dict()))["subjects"][0], "attributes": [1]}]},
        {"base": {"tokens": "abab"}},
        {"subjects": [{**json.loads(json.dumps(make_passport().to_dict()))["subjects"][0], "attributes": {"a": "b"}}]},
        {"subjects": [{**json.loads(json.dumps(make_passport().to_dict()))["subjects"][0], "attributes": {"a": [1]}}]},
    ],
)
def test_a_field_of_another_kind_is_refused(folder: Path, fields: dict[str, Any]) -> None:
    change(folder, **fields)
    with pytest.raises(EngineError, match=r"is damaged .*build it again"):
        Passport.read(folder)


def test_a_subject_of_a_passport_without_attributes_is_read(folder: Path) -> None:
    record = json.loads((folder / FILE_NAME).read_text())
    record["subjects"][0]["attributes"] = {"colour": ["blue"], "part": ["cream foot", "white rim"]}
    change(folder, **record)
    passport = Passport.read(folder)
    assert passport.subjects[0].attributes == record["subjects"][0]["attributes"]
    assert "colour: blue; part: cream foot, white rim" in dict(passport.describe())["Subjects"][0]
    del record["subjects"][0]["attributes"], record["subjects"][0]["kind"]
    change(folder, **record)
    (subject, *_) = Passport.read(folder).subjects
    assert (subject.attributes, subject.kind) == ({}, "lora")


def test_a_subject_of_tokens_and_its_adapter_are_shown(folder: Path) -> None:
    record = json.loads((folder / FILE_NAME).read_text())
    record["subjects"][0] |= {"kind": "tokens", "token": "", "bytes": 15 << 10}
    record["base"] |= {"tokens": {"token_adapter.safetensors": "ab" * 32}}
    change(folder, **record)
    shown = dict(Passport.read(folder).describe())
    assert ("token adapter", "ab" * 6) in shown["Engine"] and "tokens, 15 KiB" in shown["Subjects"][0]


@pytest.mark.parametrize("name", list(make_passport().to_dict()))
def test_a_field_that_is_gone_is_refused(folder: Path, name: str) -> None:
    record = json.loads((folder / FILE_NAME).read_text())
    del record[name]
    (folder / FILE_NAME).write_text(json.dumps(record))
    with pytest.raises(EngineError, match="build"):
        Passport.read(folder)


def test_a_missing_or_cut_passport_names_the_remedy(folder: Path) -> None:
    path = folder / FILE_NAME
    path.write_text(path.read_text()[:100])
    with pytest.raises(EngineError, match=r"passport\.json.*dreammix-trt build"):
        Passport.read(folder)
    path.unlink()
    with pytest.raises(EngineError, match=r"has no passport\.json.*dreammix-trt build"):
        Passport.read(folder)
    with pytest.raises(EngineError, match="is not an engine directory"):
        Passport.read(folder / "nothing")


def test_the_description_tells_what_a_person_asks_for() -> None:
    text = "\n".join(f"{title}: {row}" for title, rows in make_passport().describe() for row in rows)
    words = (
        "micro-sdxl",
        "128x128",
        "in the store",
        "of any rank",
        "a sks mug",
        "2 KiB",
        "36 LoRA slots",
        "2.0e-06",
        "sm_89",
        "tensorrt-rtx 1.7.1, float16",
        "3 MiB, built in 12 s with 2.0 GiB; 1331 or 1342 kernels a call",
        "lcm.safetensors",
        "sampler lcm",
    )
    for word in words:
        assert word in text


def test_a_part_that_was_not_compared_says_so() -> None:
    from dataclasses import replace

    plain = make_passport(targets=[], base={"name": "sdxl", "native_side": 1024, "slots": False})
    (network,) = plain.networks
    plain = replace(plain, networks=(replace(network, parity={"checked": "not"}, build={}),), subjects=())
    text = "\n".join(f"{title}: {row}" for title, rows in plain.describe() for row in rows)
    assert "not compared with torch" in text and "the usual" in text
    assert "GPUs" not in text and "built in" not in text


FOLDERS = {
    "engines": (["mug/passport.json", "a cup/passport.json"], "", r"it holds engines, name one: {0}/a cup, {0}/mug"),
    "in an engine": (["passport.json", "subjects/mug.safetensors"], "subjects", r"but in one; name {0}$"),
    "its file": (["passport.json"], "passport.json", r"but in one; name {0}$"),
    "a LoRA": (["pytorch_lora_weights.safetensors"], "", "it is a LoRA: `dreammix-trt build --lora {0} --out ENGINE`"),
    "a base": (["model_index.json", "unet/config.json"], "", "it is a base: `dreammix-trt build --base {0} --out"),
    "a store": (["users/1.json"], "", "it is a store: `dreammix-trt store list --store {0}`"),
    "photographs": (["image/0.jpg", "mask/0.png"], "", "looks like photographs: `dreammix-trt train {0} --class-name"),
    "something else": (
        ["letter.txt"],
        "",
        "it has no passport.json; an engine directory has passport.json and subjects/",
    ),
    "a file": (["letter.txt"], "letter.txt", "but a file; an engine directory has passport.json and subjects/"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_no_engine_is_named_as_what_it_is(name: str, tmp_path: Path) -> None:
    files, given, told = FOLDERS[name]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(EngineError, match=f"is not an engine directory.*{told.format(re.escape(str(tmp_path)))}"):
        Passport.read(tmp_path / given)
