"""Subjects of builds: foreign LoRAs, their words, several at once, what is told about them."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dreammix_trt.build_cli import _parse_pairs, _parse_words
from dreammix_trt.building import Defaults, build
from dreammix_trt.building.order import BuildOrder
from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.passport import Passport
from dreammix_trt.core.subject import read_subject
from dreammix_trt.engine import DreamMix
from tests.conftest import write_lora
from tests.support.kohya import write_sd_scripts_lora


@pytest.fixture
def teapot(tmp_path: Path) -> Path:
    """A LoRA as sd-scripts writes it by default: attention, feed-forward, projections, text encoders with MLPs."""
    tags = {"10_ohwx teapot": {"ohwx teapot": 12}}
    return write_sd_scripts_lora(
        tmp_path / "teapot-v3.safetensors", dict(BaseFiles.open().configs), {"ss_tag_frequency": json.dumps(tags)}
    )


def command_in(message: object) -> list[str]:
    """The words of the first command in an error message."""
    return shlex.split(str(message).split("`")[1])


def test_an_ordinary_foreign_lora_becomes_a_subject_by_the_command_that_is_told(
    teapot: Path, small_base: Path, mug_engine: Path, tmp_path: Path
) -> None:
    out, told = tmp_path / "engine", list[str]()
    with pytest.raises(FileFormatError) as caught:
        build(teapot, base=small_base, out=out, notice=told.append)
    assert str(caught.value).startswith("subject teapot: merge it into the weights of an engine of its own: `")
    wanted = ["dreammix-trt", "build", "--lora", str(teapot), "--out", str(out), "--base", str(small_base), "--merge"]
    assert command_in(caught.value) == wanted
    assert "attentions.proj_in, attentions.proj_out, ff.net, mlp.fc1" in str(caught.value) and not out.exists()
    assert ["trigger word 'ohwx', class 'teapot' (says its ss_tag_frequency)" in text for text in told] == [True]
    passport = build(teapot, base=small_base, out=out, merge=True, verify=False)
    assert passport.base["merged"] == "teapot"
    assert [(each.name, each.token, each.class_name) for each in passport.subjects] == [("teapot", "ohwx", "teapot")]
    assert read_subject(out / passport.subjects[0].file).factors == {}, "they are in the weights"
    with DreamMix.load(out, threads=1) as dm:
        assert dm.subjects == ("teapot",)


def test_attention_alone_fits_the_slots(small_base: Path, mug_engine: Path, tmp_path: Path) -> None:
    """The same trainer with attention only; the token that is asked for counts more than the file's."""
    file = write_sd_scripts_lora(
        tmp_path / "x.safetensors", dict(BaseFiles.open().configs), {"modelspec.trigger_phrase": "zwx"}, every=False
    )
    told: list[str] = []
    passport = build(
        file, base=small_base, out=tmp_path / "out", token="ohwx", class_name="tea pot", notice=told.append
    )
    (entry,) = passport.subjects
    assert (entry.name, entry.token, entry.class_name) == ("tea-pot", "ohwx", "tea pot")
    (text,) = told
    assert "modelspec.trigger_phrase says that its trigger word is 'zwx'; 'ohwx' is taken" in text
    words = shlex.split(passport.command)
    assert words[words.index("--token") + 1] == "ohwx" and words[words.index("--class-name") + 1] == "tea pot"
    build(file, base=small_base, out=tmp_path / "out", token="ohwx", class_name="tea pot", notice=told.append)
    assert told == [text, text], "the same command over again replaces nothing"
    build(file, base=small_base, out=tmp_path / "out", token="zwx", notice=told.append)
    (replaced,) = told[2:]
    assert "replaces the engine" in replaced and replaced.endswith(passport.command)


def test_an_engine_of_the_same_command_and_files_is_kept_where_that_is_asked_for(
    small_base: Path, mug_engine: Path, tmp_path: Path
) -> None:
    lora, out, told = write_lora(tmp_path / "mug", seed=1), tmp_path / "out", list[str]()

    def stamp() -> tuple[int, int]:
        return (out / "passport.json").stat().st_mtime_ns, (out / "passport.json").stat().st_ino

    def build_again(**given: Any) -> bool:
        """Whether the engine was kept."""
        told.clear()
        before = stamp()
        build(lora, base=small_base, out=out, **{"keep": True, **given}, notice=told.append)
        kept = [text for text in told if text.endswith("built before, by the same command of the same files")]
        assert bool(kept) == (stamp() == before)
        return bool(kept)

    made = build(lora, base=small_base, out=out, keep=True)
    assert build_again() and Passport.read(out) == made
    assert not build_again(keep=False) and build_again()
    changes: list[dict[str, Any]] = [
        {"token": "ohwx"}, {"defaults": Defaults(num_inference_steps=9)}, {"self_contained": True}, {},
    ]  # fmt: skip
    for changed in changes:
        assert not build_again(**changed) and build_again(**changed)
    shutil.rmtree(lora)
    write_lora(lora, seed=2)
    assert not build_again() and build_again(), "other factors in a file of the same name"
    next((out / "subjects").iterdir()).unlink()
    assert not build_again() and build_again()
    (out / "passport.json").write_text("{")
    assert not build_again() and build_again()


def test_without_slots_a_subject_is_to_be_merged(small_base: Path, mug_engine: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "mug", seed=1, rank=16)
    with pytest.raises(FileFormatError, match=r"^subject engine: merge it .*as --no-slots asks") as caught:
        build(lora, base=small_base, out=tmp_path / "engine", slots=False)
    assert {"--merge", "--no-slots"} <= {*command_in(caught.value)}


def test_several_subjects_at_once(small_base: Path, mug_engine: Path, mug_lora: Path, tmp_path: Path) -> None:
    """A LoRA with scale and an engine's subject, each by its name; the command of the passport says the same."""
    file = mug_engine
    passport = build(
        base=small_base,
        out=tmp_path / "both",
        subjects={"cup": f"{mug_lora}:0.5", "mug": file},
        token={"cup": "ohwx"},
        class_name={"mug": "mug"},
    )
    found = {each.name: (each.token, each.class_name, each.source) for each in passport.subjects}
    assert found == {"cup": ("ohwx", "", str(mug_lora)), "mug": ("sks", "mug", str(file))}
    cup, mug = (read_subject(tmp_path / "both" / each.file) for each in passport.subjects)
    for module, (a, b) in mug.factors["unet"].items():
        half = np.matmul(*cup.factors["unet"][module])
        np.testing.assert_allclose(2 * half, a @ b, atol=2e-3 * np.abs(a @ b).max())
    words = shlex.split(passport.command)
    options = [(words[n], words[n + 1]) for n, word in enumerate(words) if word in ("--subject", "--token")]
    assert options == [("--subject", f"cup={mug_lora}:0.5"), ("--subject", f"mug={file}"), ("--token", "cup=ohwx")]
    with DreamMix.load(tmp_path / "both", threads=1) as dm:
        assert dm.subjects == ("cup", "mug")


def test_loras_that_work_together_are_said_to(small_base: Path, mug_engine: Path, tmp_path: Path) -> None:
    one, two = (write_lora(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two")))
    told: list[str] = []
    passport = build([one, two], base=small_base, out=tmp_path / "pair", notice=told.append)
    assert [each.name for each in passport.subjects] == ["pair"], "called after --out"
    assert any(
        "2 LoRAs work together as one subject, 'pair'" in text
        and f"--subject NAME1={one} --subject NAME2={two}" in text
        for text in told
    )
    assert any("does not say its trigger word, so 'sks' is taken" in text and "--token" in text for text in told)


def test_a_name_comes_from_the_class_or_from_out_never_from_where_one_works(
    small_base: Path, mug_engine: Path, mug_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(shutil.copytree(mug_lora, tmp_path / "secret-project"))
    monkeypatch.chdir(place)
    for out, given, name in (("../engines/tea.v2", {}, "tea.v2"), ("../e", {"class_name": "coffee mug"}, "coffee-mug")):
        passport = build(".", base=small_base, out=out, **given)  # type: ignore[arg-type]
        assert [each.name for each in passport.subjects] == [name]


BAD_ORDERS: dict[str, tuple[dict[str, Any], str]] = {
    "a token of nobody": ({"token": "ohwx"}, "token is 'ohwx', but there is no LoRA"),
    "a token of two": ({"subjects": {"a": "x", "b": "y"}, "token": "ohwx"}, "say of which: NAME=ohwx"),
    "a token of another": ({"subjects": {"a": "x"}, "token": {"b": "w"}}, "given for b; the subjects are: a"),
    "two words": ({"lora": "x", "token": "oh wx"}, "token is 'oh wx'; it must be one word"),
    "no word": ({"lora": "x", "class_name": " "}, "class_name is ''; it must say what the subject is"),
    "a name": ({"subjects": {"../a": "x"}}, "letters, digits"),
    "attributes of nobody": ({"attributes": Path("a.json")}, "attributes is 'a.json', but there is no LoRA"),
    "attributes of two": ({"subjects": {"a": "x", "b": "y"}, "attributes": "f"}, "say of which: NAME=f"),
    "no file": ({"lora": "x", "attributes": ""}, "attributes is ''; it must name a file"),
    "merging two": ({"subjects": {"a": "x", "b": "y"}, "merge": True}, "build an engine for each"),
}


@pytest.mark.parametrize("name", BAD_ORDERS)
def test_orders_that_make_no_sense(name: str, tmp_path: Path) -> None:
    fields, told = BAD_ORDERS[name]
    with pytest.raises(InputError, match=told):
        BuildOrder(tmp_path / "out", **fields).check()


def test_subjects_that_cannot_be_made_are_refused(
    small_base: Path, mug_engine: Path, mug_lora: Path, tmp_path: Path
) -> None:
    file = mug_engine / "subjects" / "mug.safetensors"
    given: Mapping[str, Any] = {"base": small_base, "out": tmp_path / "out"}
    with pytest.raises(InputError, match="two subjects are called 'mug'"):
        build(mug_lora, name="mug", subjects={"mug": file}, **given)
    with pytest.raises(InputError, match="is a subject file, not a LoRA to bake in"):
        build(file, merge=True, **given)
    with pytest.raises(InputError, match="is a subject file, not a LoRA to put together"):
        build([file, mug_lora], **given)
    assert not (tmp_path / "out").exists()


def test_attributes_reach_the_engine(small_base: Path, mug_engine: Path, mug_lora: Path, tmp_path: Path) -> None:
    """Those that are given count more than the LoRA's own; another program's break nothing, and are said."""
    own, foreign = tmp_path / "own.safetensors", tmp_path / "foreign.safetensors"
    (factors,) = mug_lora.glob("*.safetensors")
    save_file(load_file(factors), own, {"token": "sks", "class_name": "mug", "attributes": '{"colour": ["blue"]}'})
    save_file(load_file(factors), foreign, {"token": "zwx", "attributes": '["soft light"]'})
    given = tmp_path / "attributes.json"
    AttributeDictionary.of("teapot", {"part": ["cream foot"]}, "hand", "x").write(given)
    told: list[str] = []
    common: dict[str, Any] = {"base": small_base, "out": tmp_path / "engine", "notice": told.append}

    passport = build(subjects={"one": own, "two": own, "three": foreign}, attributes={"two": given}, **common)
    seen = {entry.name: entry.attributes for entry in passport.subjects}
    assert seen == {"one": {"colour": ["blue"]}, "two": {"part": ["cream foot"]}, "three": {}}
    assert Passport.read(tmp_path / "engine") == passport
    for entry in passport.subjects:
        kept = {
            kind: list(values) for kind, values in read_subject(tmp_path / "engine" / entry.file).attributes.items()
        }
        assert kept == entry.attributes
    words = shlex.split(passport.command)
    assert words[words.index("--attributes") + 1] == f"two={given}"
    (ignored, mismatch) = [text for text in told if "attributes" in text and "replaces" not in text]
    assert ignored.startswith(f"{given}: the attributes are of a 'teapot', and are taken for subject 'two', a 'mug'")
    assert mismatch.startswith(f"{foreign}: the attributes in its metadata are ignored")

    again = build(tmp_path / "engine/subjects/one.safetensors", attributes=given, base=small_base, out=tmp_path / "two")
    assert again.subjects[0].attributes == {"part": ["cream foot"]}
    fresh = build(mug_lora, attributes=given, base=small_base, out=tmp_path / "three")
    assert (fresh.subjects[0].name, fresh.subjects[0].class_name) == ("teapot", "teapot"), "nothing else says the class"
    given.write_text('{"class_name": "mug", "attributes": {"smell": ["good"]}}')
    with pytest.raises(InputError, match=r"attributes\.json: attributes\.smell: no such kind"):
        build(own, attributes=given, base=small_base, out=tmp_path / "four")
    assert not (tmp_path / "four").exists()


def test_the_command_line_names_subjects_and_words() -> None:
    assert _parse_pairs("--subject", ["mug=a=b.safetensors:0.5", "cup=c"]) == {"mug": "a=b.safetensors:0.5", "cup": "c"}
    assert _parse_words("--token", ["ohwx"]) == "ohwx" and _parse_words("--token", []) is None
    assert _parse_words("--token", ["mug=sks", "cup=ohwx"]) == {"mug": "sks", "cup": "ohwx"}
    for given, told in ((["mug.safetensors"], "give NAME=VALUE"), (["a=x", "a=y"], "names 'a' twice")):
        with pytest.raises(InputError, match=told):
            _parse_pairs("--subject", given)


def test_the_passport_of_an_engine_with_one_subject_says_how_it_was_built(mug_engine: Path) -> None:
    words = shlex.split(Passport.read(mug_engine).command)
    assert words.count("--lora") == 1 and "--subject" not in words and "--token" not in words


def test_a_foreign_lora_is_merged_exactly(teapot: Path, small_base: Path, mug_engine: Path, tmp_path: Path) -> None:
    """W + alpha / rank B A, held against the file by plain arithmetic, for a layer of each kind."""
    from dreammix_trt.core.lora import read_lora
    from dreammix_trt.core.network_weights import BaseLora, weights_of

    base = BaseFiles.open(small_base)
    held = load_file(teapot)
    lora = BaseLora(read_lora(teapot, base.configs["unet"]), 1.0, "patched")
    plain, merged = (weights_of(base, "text_encoder_2", loras) for loras in ((), (lora,)))
    module = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    change = held[f"{module}.lora_up.weight"] @ held[f"{module}.lora_down.weight"] * held[f"{module}.alpha"] / 4
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    np.testing.assert_allclose(merged[name], plain[name] + change, atol=1e-6)
    assert np.abs(change).max() > 1e-3
