"""A vision-language model's answers, good and bad, from a scripted server."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.attributes import KINDS, AttributeDictionary
from dreammix_trt.core.chat import Chat
from dreammix_trt.core.errors import EndpointError, TimedOut
from dreammix_trt.trainer.attributes.endpoint import SCHEMA, EndpointDescriber
from dreammix_trt.trainer.data import Photograph
from tests.support.chat_server import Reply, Script, say, serve

GOOD = {**{kind: [] for kind in KINDS}, "colour": ["Blue"], "part": ["a cream foot", "white rim"]}
WANTED = {"colour": ("blue",), "part": ("cream foot", "white rim")}


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def photograph(height: int = 60, width: int = 90) -> Photograph:
    image = np.full((height, width, 3), 250, np.uint8)
    image[20:40, 30:50] = (200, 30, 30)
    subject = np.zeros((height, width), bool)
    subject[20:40, 30:50] = True
    return Photograph(image, subject, "x.png")


def describe(script: Script, pictures: list[Photograph] | None = None, side: int = 64) -> AttributeDictionary:
    chat = Chat(script.url, "some-vlm", pause=0.02, deadline=5.0)
    return EndpointDescriber(chat, side).describe(pictures or [photograph()], "mug")


def pictures_in(question: dict[str, Any]) -> list[Image.Image]:
    urls = [part["image_url"]["url"] for part in question["messages"][0]["content"][1:]]
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def test_a_good_answer_is_the_dictionary() -> None:
    with serve(say(json.dumps(GOOD))) as script:
        found = describe(script)
    assert (found.class_name, found.source, found.attributes) == ("mug", "some-vlm", WANTED)
    question = script.asked[0]
    assert question["response_format"]["json_schema"]["schema"] == SCHEMA
    assert set(SCHEMA["properties"]) == set(SCHEMA["required"]) == set(KINDS)
    text = question["messages"][0]["content"][0]["text"]
    assert "mug" in text and all(f"- {kind}: such as" in text or f"- {kind}: " in text for kind in KINDS)


def test_the_model_sees_small_pictures_of_the_subject_alone() -> None:
    whole = Photograph(photograph(300, 450).image, np.ones((300, 450), bool), "whole")
    with serve(say(json.dumps(GOOD))) as script:
        describe(script, [photograph(), whole])
    alone, large = pictures_in(script.asked[0])
    assert alone.size == (24, 24) and large.size == (64, 43)  # 20 pixels and a tenth around; scaled to 64
    pixels = np.asarray(alone).astype(int)
    assert abs(pixels[0, 0] - 127).max() < 25, "grey around it"
    assert abs(pixels[12, 12] - (200, 30, 30)).max() < 12


def test_a_fence_of_markdown_is_no_fault() -> None:
    for fence in ("```json\n%s\n```", "```\n%s```"):
        with serve(say(fence % json.dumps(GOOD))) as script:
            assert describe(script).attributes == WANTED
        assert len(script.asked) == 1


RUBBISH = {
    "prose": ("I see a lovely blue mug!", "no JSON object alone, it begins 'I see a lovely blue mug!'"),
    "prose around it": (f"Here it is: {json.dumps(GOOD)}", "no JSON object alone"),
    "a list": ('["blue"]', "a JSON list, not an object"),
    "an unknown kind": ('{"smell": ["sweet"]}', "attributes.smell: no such kind"),
    "no list": ('{"colour": {"body": "blue"}}', "must be a list of words"),
    "a sentence": (json.dumps({"part": ["it has a very " + "long " * 9 + "foot"]}), "one to 8 plain words"),
    "nothing named": (json.dumps({kind: [] for kind in KINDS}), "names no attribute"),
    "empty": ("", "your answer is empty"),
    "silence": (None, "your answer is empty"),
    "too long": (json.dumps({**GOOD, "shape": ["round"] * 2000}), "characters; at most 8000"),
    "too deep": ("[" * 7000, "no JSON object alone"),
}


@pytest.mark.parametrize("name", RUBBISH)
def test_rubbish_is_sent_back_once_with_its_fault(name: str) -> None:
    text, fault = RUBBISH[name]
    with serve(say(text), say(json.dumps(GOOD))) as script:
        assert describe(script).attributes == WANTED
    first, again = (question["messages"] for question in script.asked)
    assert again[:1] == first
    assert [message["role"] for message in again[1:]] == ["assistant", "user"]
    assert again[1]["content"] == ((text or "(nothing)")[:8000])
    assert fault in again[2]["content"]
    with serve(say(text)) as script, pytest.raises(EndpointError, match="some-vlm answered twice") as caught:
        describe(script)
    assert fault in str(caught.value) and len(str(caught.value)) < 600
    assert len(script.asked) == 2


def test_an_answer_that_was_cut_off_is_sent_back() -> None:
    with serve(say('{"colour": ["bl', finish="length"), say(json.dumps(GOOD))) as script:
        assert describe(script).attributes == WANTED
    assert "cut off" in script.asked[1]["messages"][2]["content"]


def test_tokens_of_repairs_count_too() -> None:
    with serve(say("hm", 10, 3), Reply(status=429), say(json.dumps(GOOD), 20, 5)) as script:
        chat = Chat(script.url, "m", pause=0.02)
        assert EndpointDescriber(chat).describe([photograph()], "mug").attributes == WANTED
    assert chat.tokens == (30, 8) and len(script.asked) == 3


def test_a_repair_has_no_deadline_of_its_own() -> None:
    with serve(say("hm"), Reply(status=500)) as script, pytest.raises(TimedOut):
        EndpointDescriber(Chat(script.url, "m", pause=0.02, deadline=0.3)).describe([photograph()], "mug")
