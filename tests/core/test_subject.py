from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.lora import Factors, Lora, LoraSpec, Target, read_lora
from dreammix_trt.core.lora_names import SDXL
from dreammix_trt.core.subject import (
    Subject,
    find_subject_file,
    open_subject,
    read_subject,
    subject_from_loras,
    write_subject,
)
from tests.support.tiny_model import random_factors, unet_attention_modules, write_tiny_lora

MODULES = {"a.to_k": (6, 5), "a.to_v": (7, 5), "b.to_out.0": (5, 5)}


def test_the_file_keeps_everything(tmp_path: Path) -> None:
    lora = read_lora(write_tiny_lora(tmp_path / "l.safetensors", random_factors(MODULES)))
    subject = subject_from_loras(
        [(lora, 1.0, "both")], "mug", class_name="mug", scale=0.7, base_key="k", source_sha256="s"
    )
    write_subject(tmp_path / "mug.safetensors", subject)
    again = read_subject(tmp_path / "mug.safetensors")
    for name in ("name", "token", "class_name", "target", "scale", "base_key", "source_sha256"):
        assert getattr(again, name) == getattr(subject, name)
    assert again.factors.keys() == subject.factors.keys() == {"unet", "unet_raw"}
    for network in ("unet", "unet_raw"):
        assert_products(again.factors_for(network), subject.factors_for(network))
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_balancing_keeps_lopsided_factors_in_range(tmp_path: Path) -> None:
    a, b = np.full((6, 4), 1e6, np.float32), np.full((4, 5), 1e-6, np.float32)
    write_subject(tmp_path / "x.safetensors", Subject("x", "sks", "mug", {"unet": {"m": (a, b), "zero": (a, 0 * b)}}))
    found_a, found_b = read_subject(tmp_path / "x.safetensors").factors["unet"]["m"]
    np.testing.assert_allclose(found_a @ found_b, a @ b, rtol=2e-3)
    assert not read_subject(tmp_path / "x.safetensors").factors["unet"]["zero"][1].any()


def lora_of(**parts: dict[str, tuple[np.ndarray, np.ndarray]]) -> Lora:
    return Lora(dict(parts), 4, Path("x.safetensors"), {})


def assert_products(
    found: dict[str, tuple[np.ndarray, np.ndarray]], wanted: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    assert found.keys() == wanted.keys()
    for module, (a, b) in wanted.items():
        product = a @ b
        np.testing.assert_allclose(found[module][0] @ found[module][1], product, atol=2e-3 * np.abs(product).max())


@pytest.mark.parametrize(
    ("target", "patched", "raw"), [("patched", True, False), ("raw", False, True), ("both", True, True)]
)
def test_target_chooses_the_unet(target: Target, patched: bool, raw: bool, tmp_path: Path) -> None:
    lora = lora_of(unet=random_factors(MODULES), text_encoder=random_factors({"t": (3, 3)}))
    subject = subject_from_loras([(lora, 1.0, target)], "x")
    write_subject(tmp_path / "x.safetensors", subject)
    for each in (subject, read_subject(tmp_path / "x.safetensors")):
        assert bool(each.factors_for("unet")) == patched and bool(each.factors_for("unet_raw")) == raw
        assert each.factors_for("text_encoder").keys() == {"t"} and each.factors_for("text_encoder_2") == {}
        assert each.target == target


def test_several_loras_add_up(tmp_path: Path) -> None:
    """x (s1 A1 B1 + s2 A2 B2) for the networks that get it: in memory and from the file."""
    first, second = random_factors(MODULES, seed=1), random_factors({"a.to_k": (6, 5)}, rank=3, seed=2)
    text = random_factors({"t": (3, 3)}, seed=3)
    style = random_factors({"b.to_out.0": (5, 5)}, seed=4)
    loras: list[tuple[Lora, float, Target]] = [
        (lora_of(unet=first, text_encoder=text), 0.5, "both"),
        (lora_of(unet=second, text_encoder=text, text_encoder_2=text), -2.0, "raw"),
        (lora_of(unet=style), 3.0, "patched"),
    ]
    made = subject_from_loras(loras, "mug", "sks", "mug", base_key="k")
    assert made.target == "both" and made.scale == 1 and made.base_key == "k"

    def product(factors: dict[str, tuple[np.ndarray, np.ndarray]], module: str) -> np.ndarray:
        a, b = factors.get(module, (np.zeros((MODULES[module][0], 1)), np.zeros((1, MODULES[module][1]))))
        return a.astype(np.float64) @ b

    write_subject(tmp_path / "mug.safetensors", made)
    for subject in (made, read_subject(tmp_path / "mug.safetensors")):
        for module in MODULES:
            for network, other, scale in (("unet", style, 3.0), ("unet_raw", second, -2.0)):
                expected = 0.5 * product(first, module) + scale * product(other, module)
                found = product(subject.factors_for(network), module)
                np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
        for encoder, scale in (("text_encoder", 0.5 - 2.0), ("text_encoder_2", -2.0)):
            a, b = subject.factors_for(encoder)["t"]
            np.testing.assert_allclose(a @ b, scale * text["t"][0] @ text["t"][1], atol=5e-3)
    a, _ = made.factors["unet_raw"]["a.to_k"]
    assert a.shape == (6, 4 + 3) and made.factors["unet"]["a.to_k"][0].shape == (6, 4)


def test_what_both_unets_share_is_stored_once(tmp_path: Path) -> None:
    shared, alone = random_factors(MODULES), random_factors({"a.to_k": (6, 5)}, seed=2)
    patched = subject_from_loras([(lora_of(unet=shared), 1.0, "patched")], "x")
    both = subject_from_loras([(lora_of(unet=shared), 1.0, "both"), (lora_of(unet=alone), 1.0, "raw")], "x")
    for name, subject, count in (("patched", patched, 6), ("both", both, 8)):
        write_subject(tmp_path / f"{name}.safetensors", subject)
        assert len(load_file(tmp_path / f"{name}.safetensors")) == count
    names = load_file(tmp_path / "both.safetensors").keys()
    stored = {"unet.a.to_k.A", "unet_raw.a.to_k.B", "unets.a.to_v.A", "unets.b.to_out.0.B"}
    assert {f"factors.{name}" for name in stored} < names
    again = read_subject(tmp_path / "both.safetensors")
    for network in ("unet", "unet_raw"):
        assert_products(again.factors_for(network), both.factors_for(network))
    assert again.factors["unet"]["a.to_v"][0] is again.factors["unet_raw"]["a.to_v"][0]


def test_both_unets_cost_as_much_as_one(tmp_path: Path) -> None:
    """Every number takes two bytes, once. The size for SDXL's attention with rank 4 follows from its shapes."""
    shapes = unet_attention_modules({**SDXL, "cross_attention_dim": 2048})
    numbers = 4 * sum(inputs + outputs for inputs, outputs in shapes.values())
    assert len(shapes) == 420 and numbers == 4_474_880  # as the reference trains them
    factors = random_factors(shapes)
    write_subject(tmp_path / "x.safetensors", subject_from_loras([(lora_of(unet=factors), 1.0, "both")], "x"))
    assert numbers * 2 < (tmp_path / "x.safetensors").stat().st_size < numbers * 2 + 200_000


def test_a_weak_lora_beside_a_strong_one_keeps_its_digits(tmp_path: Path) -> None:
    strong, weak = random_factors(MODULES, seed=1, size=1e4), random_factors(MODULES, seed=2, size=1e-6)
    subject = subject_from_loras([(lora_of(unet=strong), 1.0, "patched"), (lora_of(unet=weak), 1.0, "patched")], "x")
    write_subject(tmp_path / "x.safetensors", subject)
    for module, (a, b) in read_subject(tmp_path / "x.safetensors").factors["unet"].items():
        for part, ranks in ((strong, slice(0, 4)), (weak, slice(4, 8))):
            product = part[module][0] @ part[module][1]
            np.testing.assert_allclose(a[:, ranks] @ b[ranks], product, atol=2e-3 * np.abs(product).max())


@pytest.mark.parametrize(
    ("target", "networks"), [("patched", {"unet"}), ("raw", {"unet_raw"}), ("both", {"unet", "unet_raw"})]
)
def test_files_of_the_first_schema_are_read(tmp_path: Path, target: str, networks: set[str]) -> None:
    tensors = {f"{part}.m.{side}": np.ones((2, 2), np.float16) for part in ("unet", "text_encoder") for side in "AB"}
    facts = {
        "schema": 1,
        "name": "mug",
        "token": "sks",
        "class_name": "mug",
        "target": target,
        "scale": 0.5,
        "base_key": "k",
        "source_sha256": "s",
    }
    save_file(tensors, tmp_path / "x.safetensors", {"dreammix_subject": json.dumps(facts)})
    subject = read_subject(tmp_path / "x.safetensors")
    assert subject.factors.keys() == {*networks, "text_encoder"} and subject.target == target
    assert (subject.name, subject.scale, subject.base_key) == ("mug", 0.5, "k")
    save_file(tensors, tmp_path / "x.safetensors", {"dreammix_subject": json.dumps({**facts, "target": "all"})})
    with pytest.raises(FileFormatError, match="unknown target 'all', expected one of patched, raw, both"):
        read_subject(tmp_path / "x.safetensors")


def test_files_of_the_second_schema_are_read(tmp_path: Path) -> None:
    tensors = {f"{part}.m.{side}": np.ones((2, 2), np.float16) for part in ("unets", "text_encoder") for side in "AB"}
    facts = {"schema": 2, "name": "mug", "token": "sks", "class_name": "mug", "scale": 0.5}
    save_file(tensors, tmp_path / "x.safetensors", {"dreammix_subject": json.dumps(facts)})
    subject = read_subject(tmp_path / "x.safetensors")
    assert subject.factors.keys() == {"unet", "unet_raw", "text_encoder"} and subject.scale == 0.5
    np.testing.assert_array_equal(subject.factors["unet_raw"]["m"][1], np.ones((2, 2)))


def test_every_part_may_be_absent(tmp_path: Path) -> None:
    write_subject(tmp_path / "x.safetensors", Subject("x", "sks", "mug"))
    assert read_subject(tmp_path / "x.safetensors") == Subject("x", "sks", "mug")


def test_a_part_that_is_not_known_asks_for_an_update(tmp_path: Path) -> None:
    facts = {"schema": 3, "name": "x", "token": "sks", "class_name": "mug", "parts": ["factors", "smell"]}
    tensors = {"factors.unet.m.A": np.ones((2, 2), np.float16), "smell": np.ones(2, np.float16)}
    save_file(tensors, tmp_path / "x.safetensors", {"dreammix_subject": json.dumps(facts)})
    with pytest.raises(FileFormatError, match=r"parts that this version does not know \(smell\); update"):
        read_subject(tmp_path / "x.safetensors")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": np.ones(1, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(FileFormatError, match="not a subject file"):
        read_subject(tmp_path / "x.safetensors")
    save_file({"x": np.ones(1, np.float32)}, tmp_path / "y.safetensors", {"dreammix_subject": '{"schema": 99}'})
    with pytest.raises(FileFormatError, match=r"schema 99.*update"):
        read_subject(tmp_path / "y.safetensors")
    save_file({"x": np.ones(1, np.float32)}, tmp_path / "w.safetensors", {"dreammix_subject": '{"schema": 2}'})
    with pytest.raises(FileFormatError, match="says no name, token and class"):
        read_subject(tmp_path / "w.safetensors")
    facts = {"dreammix_subject": json.dumps({"schema": 2, "name": "x", "token": "sks", "class_name": ""})}
    one, two = np.ones((1, 1), np.float32), np.ones((2, 2), np.float32)
    for tensors in (
        {"unet.m.A": one},
        {"unet.m.B": one},
        {"vae.m.A": one, "vae.m.B": one},
        {"unet.m.A": one, "unet.m.B": two},
    ):
        save_file(tensors, tmp_path / "z.safetensors", facts)
        with pytest.raises(FileFormatError, match=r"m is not a pair of factors of text_encoder, "):
            read_subject(tmp_path / "z.safetensors")
    with pytest.raises(FileFormatError, match="missing"):
        read_subject(tmp_path / "none.safetensors")


# Subjects of LoRA files


def test_a_lora_becomes_a_subject_called_as_its_file_says(tmp_path: Path) -> None:
    factors = random_factors(MODULES)
    path = write_tiny_lora(tmp_path / "v2 final.safetensors", factors)
    plain = open_subject(path)
    assert (plain.name, plain.token, plain.class_name) == ("v2-final", "sks", "")
    tags = json.dumps({"10_ohwx tea pot": {"ohwx tea pot": 3}})
    save_file(load_file(path), path, {"ss_tag_frequency": tags})
    told = open_subject(path)
    assert (told.name, told.token, told.class_name) == ("tea-pot", "ohwx", "tea pot")
    asked = open_subject(LoraSpec(path, 0.5, "both"), name="pot", token="zwx", class_name="jug")
    assert (asked.name, asked.token, asked.class_name, asked.target) == ("pot", "zwx", "jug", "both")
    for module, (a, b) in factors.items():
        np.testing.assert_allclose(asked.factors["unet_raw"][module][0], a)
        np.testing.assert_allclose(asked.factors["unet"][module][1], 0.5 * b)


def test_a_subject_file_stays_one(tmp_path: Path) -> None:
    lora = write_tiny_lora(tmp_path / "l.safetensors", random_factors(MODULES))
    made = open_subject(lora, name="mug", token="ohwx", class_name="mug")
    write_subject(tmp_path / "mug.safetensors", made)
    assert find_subject_file(tmp_path / "mug.safetensors") == tmp_path / "mug.safetensors"
    assert find_subject_file(lora) is None and find_subject_file(tmp_path / "none") is None
    read = open_subject(LoraSpec(tmp_path / "mug.safetensors", 0.5), name="cup")
    assert (read.name, read.token, read.class_name, read.scale) == ("cup", "ohwx", "mug", 0.5)
    assert read.source_sha256 == made.source_sha256 != ""
    with pytest.raises(InputError, match="has its own target"):
        open_subject(LoraSpec(tmp_path / "mug.safetensors", 1.0, "raw"))


def test_the_working_directory_names_no_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret-project").mkdir()
    monkeypatch.chdir(tmp_path / "secret-project")
    write_tiny_lora(Path("pytorch_lora_weights.safetensors"), random_factors(MODULES))
    assert open_subject(".").name == open_subject(Path()).name == "subject"


@pytest.mark.parametrize("name", ["../up", "a b", ".hidden", "a/b"])
def test_a_name_that_cannot_name_a_file_is_refused(tmp_path: Path, name: str) -> None:
    lora = write_tiny_lora(tmp_path / "l.safetensors", random_factors(MODULES))
    with pytest.raises(InputError, match="letters, digits"):
        open_subject(lora, name=name)


def test_a_subject_file_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    write_subject(tmp_path / "s.safetensors", Subject("mug", "sks", "mug"))
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert (tmp_path / "s.safetensors").stat().st_mode == plain.stat().st_mode


def test_an_engine_directory_means_its_one_subject(tmp_path: Path) -> None:
    (tmp_path / "subjects").mkdir()
    lora = write_tiny_lora(tmp_path / "l.safetensors", random_factors(MODULES))
    write_subject(tmp_path / "subjects" / "mug.safetensors", open_subject(lora, name="mug"))
    assert open_subject(tmp_path).name == "mug"
    write_subject(tmp_path / "subjects" / "cup.safetensors", open_subject(lora, name="cup"))
    with pytest.raises(FileFormatError, match=r"holds 2 subjects; name the file of one: .*cup\.safetensors, .*mug"):
        open_subject(tmp_path)


def test_a_merged_subject_has_no_factors_to_take_elsewhere(tmp_path: Path) -> None:
    write_subject(tmp_path / "s.safetensors", Subject("mug", "sks", "mug"))
    with pytest.raises(FileFormatError, match="subject mug is merged into the weights of its engine"):
        open_subject(tmp_path / "s.safetensors")


def test_the_words_of_captions_are_kept(tmp_path: Path) -> None:
    """A LoRA's captions say which attributes its subject has; a subject file keeps the words."""
    factors: Factors = {"unet": random_factors(MODULES)}
    captions = {"captions": '["a photo of a blue sks mug"]'}
    lora = Lora(factors, 4, tmp_path / "x", captions)
    subject = subject_from_loras([(lora, 1.0, "patched")], "mug")
    assert subject.caption_words == ("blue", "mug", "sks")
    file = tmp_path / "mug.safetensors"
    write_subject(file, subject)
    assert read_subject(file).caption_words == subject.caption_words
    write_subject(file, Subject("mug", "sks", "mug"))
    assert read_subject(file).caption_words == ()
    facts = {"schema": 3, "name": "x", "token": "y", "class_name": "", "caption_words": 3}
    save_file({}, file, {"dreammix_subject": json.dumps(facts)})
    with pytest.raises(FileFormatError, match="caption_words are 3"):
        read_subject(file)


def test_the_attributes_are_kept(tmp_path: Path) -> None:
    """Those of the first LoRA that has some; a file of this schema without the field is read, a spoilt one is not."""
    factors: Factors = {"unet": random_factors(MODULES)}
    seen = [{}, {"attributes": '{"decal": ["green heart"], "colour": ["Blue"]}'}, {"attributes": '{"size": ["big"]}'}]
    loras = [Lora(factors, 4, tmp_path / "x", metadata) for metadata in seen]
    subject = subject_from_loras([(lora, 1.0, "patched") for lora in loras], "mug")
    assert subject.attributes == {"colour": ("blue",), "decal": ("green heart",)}
    file = tmp_path / "mug.safetensors"
    write_subject(file, subject)
    assert read_subject(file).attributes == subject.attributes
    assert list(read_subject(file).attributes) == ["colour", "decal"], "in the order of a caption"
    attributes = AttributeDictionary.of("cup", {"colour": ["red"]}, "hand", "x")
    opened = open_subject(file, attributes=attributes)
    assert (opened.attributes, opened.class_name) == ({"colour": ("red",)}, "cup")
    assert open_subject(file, class_name="mug", attributes=attributes).class_name == "mug"
    facts = {"schema": 3, "name": "x", "token": "y", "class_name": ""}
    save_file({}, file, {"dreammix_subject": json.dumps(facts)})
    assert read_subject(file).attributes == {}
    for spoilt in ({"attributes": 3}, {"attributes": {"smell": ["good"]}}, {"attributes": {"colour": [3]}}):
        save_file({}, file, {"dreammix_subject": json.dumps(facts | spoilt)})
        with pytest.raises(FileFormatError, match=r"mug\.safetensors: attributes.*build the subject again"):
            read_subject(file)
