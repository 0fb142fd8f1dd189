"""What a prompt contradicts of a subject: which words go, which stay and why, and what of it reaches the picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from dreammix_trt.building import build
from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.core.request import Request
from dreammix_trt.core.subject import Subject
from dreammix_trt.engine import DreamMix, Job, read_request
from dreammix_trt.engine.retrieval import Retrieval, choose_substitute, retrieve
from tests.engine.conftest import make_scene

MUG: dict[str, list[str]] = {
    "finish": ["matte"],
    "colour": ["blue"],
    "pattern": ["striped"],
    "material": ["clay"],
    "shape": ["round"],
    "part": ["cream foot", "white rim at the top"],
    "decal": ["green heart"],
}
TABLE = {
    # adjectives before the subject
    "a red sks mug": "blue",
    "a photo of a red sks mug": "blue",
    "red sks mug": "blue",
    "a glass sks mug": "clay",
    "a shiny red glass sks mug": "matte blue clay",
    "a red, shiny sks mug": "matte blue",
    "a red and white sks mug": "blue",
    "a red and blue sks mug": "",  # two-tone, with its own
    "a dotted sks mug": "striped",
    "a square sks mug": "round",
    "a bright red sks mug": "blue",
    "a light-blue sks mug": "",
    "a cream-coloured sks mug": "blue",
    "a polka-dot sks mug": "striped",
    "a heart-shaped sks mug": "round",
    "a boot-shaped sks mug": "round",
    "a grey sks mug": "blue",
    "a gold sks mug": "blue clay",  # colour and material
    "a transparent sks mug": "",  # which may be matte
    "two red sks mugs": "blue",
    "A RED SKS MUG": "blue",
    # its own
    "a blue sks mug": "",
    "a matte blue clay sks mug": "",
    "a plain sks mug": "striped",
    # around the class
    "a sks red mug": "blue",
    "a sks red and dotted mug": "blue striped",
    "a red mug sks": "blue",
    "a red sks cup": "blue",
    "a red sks": "blue",
    # behind it
    "a sks mug made of glass": "clay",
    "a sks mug made out of red glass": "blue clay",
    "a sks mug of glass": "clay",
    "a sks mug painted red": "blue",
    "a sks mug that is red": "blue",
    "a sks mug which is now completely red and made of glass": "blue clay",
    "the sks mug is red": "blue",
    "a sks mug in red": "blue",
    "a sks mug in a shiny finish": "matte",
    "a sks mug with a shiny finish": "matte",
    "a sks mug with blue dots": "striped",
    "sks mug, red, shiny": "matte blue",
    "sks mug, red and shiny, best quality": "matte blue",
    # parts and decals
    "a sks mug with a yellow star": "green heart",
    "a sks mug with a yellow heart": "green",
    "a sks mug with a yellow sticker": "green",
    "a sks mug with a star sticker": "green heart",
    "a sks mug with yellow stars and a red base": "cream green heart",
    "a sks mug with a star on it, a red foot and a black rim": "cream white green heart",
    "a sks mug with a heart": "",
    "a sks mug with a red handle": "",
    "a sks mug with a foot made of glass": "",
    "a sks mug with a wooden foot": "",
    "a sks mug wearing a red hat": "",
    "a sks mug with no star": "",
    "a red sks mug with a red foot and a yellow star on a blue table": "blue cream green heart",
    # what belongs to something else
    "a sks mug on a red table": "",
    "a red sks mug on a blue table": "blue",
    "a wooden table and a sks mug": "",
    "a red table with a sks mug": "",
    "a sks mug beside a red pot": "",
    "a sks mug and a red glass": "",
    "a sks mug in red wine": "",
    "a sks mug in a glass": "",
    "a sks mug with a star and a red glass": "green heart",
    "a sks mug, red table": "",
    "a sks mug on a table with a yellow star": "",
    "a red sks mug beside a green zwx pot": "blue",
    "a photo in red light. a sks mug": "",
    "red painting of a sks mug": "",
    "a sks mug in the style of a red painting": "",
    "a sks mug standing on a red carpet": "",
    "a sks mug that is not red": "",
    # what the prompt asks for elsewhere on it stays
    "a red sks mug with a blue foot": "cream",
    "a sks mug with a green star": "heart",
    # not the subject
    "a red mug": "",
    "a red mug and a sksx": "",
    "": "",
}


@pytest.mark.parametrize("prompt", TABLE)
def test_the_contradicted_attribute_is_found(prompt: str) -> None:
    found = retrieve(prompt, MUG, "mug", "sks")
    assert found.words == tuple(TABLE[prompt].split()), found.reasons
    assert found == retrieve(prompt, MUG, "mug", "sks")
    assert bool(found.words) != any(reason.startswith("nothing is taken out") for reason in found.reasons)
    for word in found.words:
        assert any(f"{word!r}" in reason and "taken out: the prompt says" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("attributes", "prompt", "words"),
    [
        ({"colour": ["dark blue"]}, "a red sks mug", "blue"),
        ({"colour": ["dark blue"]}, "a light blue sks mug", "dark"),
        ({"colour": ["dark blue"]}, "a light red sks mug", "dark blue"),
        ({"colour": ["petrol"]}, "a red sks mug", "petrol"),  # its kind says what it is
        ({"colour": ["petrol"]}, "a petrol sks mug", ""),
        ({"colour": ["blue", "white"]}, "a red sks mug", "blue white"),
        ({"colour": ["blue", "white"]}, "a red and white sks mug", "blue"),
        ({"colour": ["blue", "white"]}, "a white sks mug", ""),
        ({"colour": ["gold"], "material": ["clay"]}, "a golden sks mug", ""),
        ({"finish": ["glass"]}, "a clay sks mug", "glass"),  # whatever a model calls its kind
        ({"colour": ["gray"]}, "a grey sks mug", ""),
        ({"pattern": ["blue stripes"]}, "a red sks mug", ""),
        ({"pattern": ["blue stripes"]}, "a checkered sks mug", "stripes"),
        ({"decal": ["moon and star on the front"]}, "a sks mug with a heart", "moon star front"),
        ({"decal": ["green star", "red star"]}, "a sks mug with a yellow star", "green red"),
        ({"decal": ["red dragon"]}, "a sks mug with a green dragon", "red"),
        ({"part": ["blue antenna"]}, "a sks mug with a foot and a red antenna", "blue"),
        ({"part": ["two brown feet"]}, "a sks mug with red feet", "brown"),
        ({"decal": ["mug logo"]}, "a sks mug with a star", "logo"),  # never the class or the token
        ({"size": ["small"]}, "a huge sks mug", "small"),
        ({"texture": ["smooth"]}, "a fluffy sks mug", "smooth"),
        ({}, "a red sks mug", ""),
    ],
)
def test_dictionaries_of_all_kinds(attributes: dict[str, list[str]], prompt: str, words: str) -> None:
    assert retrieve(prompt, attributes, "mug", "sks").words == tuple(words.split())


@pytest.mark.parametrize(
    ("prompt", "class_name", "token", "words"),
    [
        ("a red coffee mug sks", "coffee mug", "sks", "blue"),
        ("a sks shiny coffee mug", "coffee mug", "sks", "matte"),
        ("a glass sks glass", "glass", "sks", "clay"),
        ("a sks glass", "glass", "sks", ""),
        ("a sks glass in red", "", "sks", "blue"),
        ("a red <s*> mug", "mug", "<s*>", "blue"),
        ("a red my-mug on a table", "mug", "my-mug", "blue"),
        ("a red sks mug and a shiny sks mug", "mug", "sks", "matte blue"),
    ],
)
def test_tokens_and_classes(prompt: str, class_name: str, token: str, words: str) -> None:
    assert retrieve(prompt, MUG, class_name, token).words == tuple(words.split())


WORDS = "sks mug a red blue star with and , . in of made out that is painted foot no on it the glass rim xyz 's ;"


@given(st.lists(st.sampled_from(WORDS.split()), max_size=12), st.sampled_from(["mug", "red mug", ""]))
def test_any_prompt_can_be_read(words: list[str], class_name: str) -> None:
    found = retrieve(" ".join(words), MUG, class_name, "sks")
    known = {word for values in MUG.values() for value in values for word in value.split()}
    assert set(found.words) <= known - {*class_name.split(), "sks"}
    assert found.reasons and ("sks" in words or not found.words)


def test_reasons_say_what_and_why() -> None:
    def why(prompt: str, attributes: dict[str, list[str]] = MUG) -> tuple[str, ...]:
        return retrieve(prompt, attributes, "mug", "sks").reasons

    assert why("a red sks mug") == ("'blue' of colour 'blue' is taken out: the prompt says 'red'",)
    assert why("a red sks mug with a yellow star", {**MUG, "colour": ["blue"]}) == (
        "'blue' of colour 'blue' is taken out: the prompt says 'red'",
        "'green', 'heart' of decal 'green heart' are taken out: the prompt says 'yellow star'",
    )
    (stays, nothing) = why("a red sks mug with a blue rim", {"colour": ["blue"]})
    assert stays.startswith(
        "'blue' of colour 'blue' stays, though the prompt says 'red': the prompt asks for 'blue rim'"
    )
    assert nothing == "nothing is taken out: the prompt contradicts none of the subject's attributes (colour blue)"
    (strange, nothing) = why("a gorgeous steampunk sks mug")[:2]
    assert "'gorgeous' is no attribute word" in strange and "'steampunk' is no attribute word" in nothing
    assert not any("no attribute word" in each for each in why("a beautiful new hand-painted red sks mug"))
    assert not any("no attribute word" in each for each in why("a petrol sks mug", {"colour": ["petrol"]}))


# -- requests


def choose(prompt: str, attributes: Any = MUG, name: str = "mug", **fields: Any) -> tuple[Request, list[str]]:
    seen = {kind: tuple(values) for kind, values in attributes.items()}
    request = Request(prompt, **{"substitute": "auto", **fields})
    return choose_substitute(request, Subject(name, "sks", "mug", attributes=seen))


@pytest.mark.parametrize(
    ("prompt", "fields", "words"),
    [
        ("a (red:1.3) sks mug", {}, ("blue",)),
        ("a red++ sks [mug] BREAK with a yellow star", {}, ("blue",)),
        ("a {red|green} sks mug, <lora:x:1>", {}, ("blue",)),
        (r"a sks mug \(red\)", {}, ("blue",)),
        ("a red sks mug", {"negative_prompt": "a striped shiny sks mug"}, ("blue",)),
        ("a red sks mug", {"mode": "reference"}, ("blue",)),
        ("a red sks, on a table", {"mode": "reference"}, ()),  # words are parted by blanks there
        ("a red mug", {}, ()),
        ("a red sks mug", {"substitute": ("auto",)}, ("auto",)),
        ("a red sks mug", {"substitute": ()}, ()),
    ],
)
def test_the_request_has_the_words(prompt: str, fields: dict[str, Any], words: tuple[str, ...]) -> None:
    request, reasons = choose(prompt, **fields)
    assert request.substitute == words
    assert request.replace(substitute=()) == Request(prompt, **fields).replace(substitute=())
    assert Request.from_json(request.to_json()) == request
    assert bool(reasons) == ("substitute" not in fields) and all(each.startswith("substitute: ") for each in reasons)


def test_without_a_subject_or_its_attributes_nothing_is_taken_out() -> None:
    for fields, why in (
        ({"name": ""}, "no subject is painted"),
        ({"attributes": {}}, "the attributes of subject 'mug' are not known; build it with `--attributes FILE`"),
        ({"prompt": "a red mug"}, "the prompt does not name the subject by its word 'sks'"),
    ):
        request, reasons = choose(**{"prompt": "a red sks mug", **fields})
        assert request.substitute == ()
        (reason,) = reasons
        assert reason.startswith(f"substitute: nothing is taken out: {why}")


# -- pictures


@pytest.fixture(scope="module")
def lora(mug_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mug's LoRA as our trainer writes it: with its words and attributes."""
    (file,) = mug_lora.glob("*.safetensors")
    out = tmp_path_factory.mktemp("lora") / file.name
    save_file(load_file(file), out, {"token": "sks", "class_name": "mug", "attributes": json.dumps(MUG)})
    return out.parent


@pytest.fixture(scope="module")
def engine(lora: Path, small_base: Path, mug_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "mug"
    build(lora, base=small_base, out=out)
    return out


@pytest.fixture(scope="module")
def dm(engine: Path) -> Iterator[DreamMix]:
    with DreamMix.load(engine, threads=1) as loaded:
        yield loaded


def paint(dm: DreamMix, prompt: str, **fields: Any) -> Any:
    image, mask = make_scene()
    return dm.inpaint(image, mask, prompt, **{"num_inference_steps": 2, "seed": 3, **fields})


def pixels(result: Any) -> np.ndarray:
    return np.asarray(result.images[0])


def test_auto_paints_what_the_explicit_words_paint(
    dm: DreamMix, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = paint(dm, "a (red:1.1) sks mug with a yellow star", substitute="auto")
    told = paint(dm, "a (red:1.1) sks mug with a yellow star", substitute=["blue", "green", "heart"])
    plain = paint(dm, "a (red:1.1) sks mug with a yellow star")
    assert np.array_equal(pixels(found), pixels(told))
    assert not np.array_equal(pixels(found), pixels(plain))
    assert found.request == told.request and told.warnings == ()
    assert found.warnings == (
        "substitute: 'blue' of colour 'blue' is taken out: the prompt says 'red'",
        "substitute: 'green', 'heart' of decal 'green heart' are taken out: the prompt says 'yellow star'",
    )
    assert [record.message for record in caplog.records if "blue" in record.message] == [found.warnings[0]]
    found.save(tmp_path / "a.png")
    assert read_request(tmp_path / "a.png").substitute == ("blue", "green", "heart")


def test_a_stored_request_needs_no_dictionary(dm: DreamMix, mug_engine: Path) -> None:
    """The same picture by an engine whose subject has no attributes."""
    found = paint(dm, "a red sks mug", substitute="auto")
    with DreamMix.load(mug_engine, threads=1) as other:
        again = paint(other, found.request)
        nothing = paint(other, "a red sks mug", substitute="auto")
        plain = paint(other, "a red sks mug")
    assert np.array_equal(pixels(found), pixels(again)) and again.warnings == ()
    assert np.array_equal(pixels(nothing), pixels(plain)) and not np.array_equal(pixels(nothing), pixels(found))
    assert "attributes of subject 'mug' are not known" in nothing.warnings[0]


def test_a_batch_finds_each_request_s_words(dm: DreamMix) -> None:
    image, mask = make_scene()
    prompts = ("a red sks mug", "a glass sks mug", "a blue sks mug")
    jobs = [Job(image, mask, dm.request(each, substitute="auto", num_inference_steps=1)) for each in prompts]
    assert [each.request.substitute for each in dm.inpaint_batch(jobs)] == [("blue",), ("clay",), ()]


def test_another_retriever_can_be_given(dm: DreamMix) -> None:
    asked: list[Any] = []

    def ask(*arguments: Any) -> Retrieval:
        asked.append(arguments)
        return Retrieval(("striped",), ("a model says so",))

    result = paint(dm, "a (red:1.2) sks mug", substitute="auto", num_inference_steps=1, retriever=ask)
    assert result.request.substitute == ("striped",) and result.warnings[0] == "substitute: a model says so"
    ((prompt, attributes, *words),) = asked
    assert (prompt, words) == ("a red sks mug", ["mug", "sks"])
    assert attributes == {kind: tuple(values) for kind, values in MUG.items()}
    paint(dm, "a red sks mug", substitute=["blue"], num_inference_steps=1, retriever=ask)
    assert len(asked) == 1, "nobody is asked about words that are given"


def test_subjects_that_are_added_bring_their_attributes(
    mug_engine: Path, engine: Path, lora: Path, mug_lora: Path, tmp_path: Path
) -> None:
    AttributeDictionary.of("mug", {"colour": ["green"]}, "hand", "x").write(tmp_path / "a.json")
    with DreamMix.load(mug_engine, threads=1) as dm:
        (file,) = (engine / "subjects").glob("*.safetensors")
        names = [
            dm.add_subject(file, "file"),
            dm.add_subject(lora, "lora"),
            dm.add_subject(mug_lora, "foreign", attributes=tmp_path / "a.json"),
        ]
        found = [
            paint(dm, "a red sks mug", subject=name, substitute="auto", num_inference_steps=1).request.substitute
            for name in names
        ]
    assert found == [("blue",), ("blue",), ("green",)]
