"""A model names what a prompt contradicts; its answers are checked against the attributes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dreammix_trt.core.chat import Chat
from dreammix_trt.core.errors import EndpointError
from dreammix_trt.engine.endpoint_retriever import EndpointRetriever
from dreammix_trt.engine.retrieval import Retrieval
from tests.support.chat_server import Reply, Script, free_url, say, serve

MUG = {"finish": ("matte",), "colour": ("blue",), "part": ("cream foot at the bottom",), "decal": ("green heart",)}


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def name(*words: str) -> Reply:
    return say(json.dumps({"words": words}))


def retrieve(script: Script, prompt: str, attributes: Any = MUG) -> Retrieval:
    chat = Chat(script.url, "some-llm", pause=0.02, deadline=5.0)
    return EndpointRetriever(chat)(prompt, attributes, "mug", "sks")


def test_the_model_s_words_are_taken_out_in_the_order_of_the_attributes() -> None:
    with serve(name("Heart", "blue", "green")) as script:
        found = retrieve(script, "a ruby sks mug with a yellow star")
    assert found.words == ("blue", "green", "heart")
    assert found.reasons[0] == "'blue' of colour 'blue' is taken out: some-llm says that the prompt contradicts it"
    (question,) = script.asked
    text = question["messages"][0]["content"]
    assert "'a ruby sks mug with a yellow star'" in text and "- part: cream foot at the bottom" in text
    schema = question["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["words"]["items"]["enum"] == [
        *("matte", "blue", "cream", "foot", "bottom", "green", "heart")
    ]


def test_words_that_the_prompt_says_are_not_among_the_choices() -> None:
    """TAS would take them out there as well."""
    with serve(name("blue"), name()) as script:
        found = retrieve(script, "a sks mug with a blue heart")
    assert found == Retrieval(
        (), ("nothing is taken out: some-llm says that the prompt contradicts none of the subject's attributes",)
    )
    assert "'blue' cannot be taken out; choose of matte, cream" in script.asked[1]["messages"][2]["content"]


def test_nobody_is_asked_where_nothing_can_go() -> None:
    with serve(name()) as script:
        found = retrieve(script, "a blue sks mug", {"colour": ("blue",)})
    assert script.asked == [] and found.words == () and "says every word" in found.reasons[0]


@pytest.mark.parametrize(
    ("answer", "fault"),
    [('{"words": "blue"}', "no list of texts"), ('{"words": [3]}', "no list"), ("{}", "no list"), ("blue", "no JSON")],
)
def test_a_model_that_cannot_answer_is_an_error_that_says_what_else_there_is(answer: str, fault: str) -> None:
    with serve(say(answer)) as script, pytest.raises(EndpointError, match=rf"twice.*{fault}.*without --endpoint"):
        retrieve(script, "a red sks mug")
    assert len(script.asked) == 2


def test_an_endpoint_that_is_down_is_an_error() -> None:
    with pytest.raises(EndpointError, match=r"cannot be reached.*without --endpoint"):
        EndpointRetriever(Chat(free_url(), "m"))("a red sks mug", MUG, "mug", "sks")
