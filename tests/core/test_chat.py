"""A model's endpoint as it may behave, played by a scripted server on this machine."""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import Any

import pytest

from dreammix_trt.core import chat as module
from dreammix_trt.core.chat import Answer, Chat
from dreammix_trt.core.errors import EndpointError, InputError, TimedOut
from tests.support.chat_server import Reply, Script, free_url, say, serve

SECRET = "sk-very-secret-0123456789"
MESSAGES = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object"}


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def ask(script: Script, **options: Any) -> Answer:
    return Chat(script.url, "m", **{"pause": 0.02, "deadline": 5.0, **options}).ask(MESSAGES, "thing", SCHEMA)


def test_the_question_is_the_api_s_and_tokens_are_counted() -> None:
    with serve(say("one", 7, 2), say("two", 5, 1)) as script:
        chat = Chat(script.url + "/", "some-model")
        assert [chat.ask(MESSAGES, "thing", SCHEMA).text for _ in range(2)] == ["one", "two"]
    assert chat.tokens == (12, 3)
    assert script.paths == ["/v1/chat/completions"] * 2
    assert script.keys == [None, None]
    form = {"name": "thing", "strict": True, "schema": SCHEMA}
    wanted = {"type": "json_schema", "json_schema": form}
    assert script.asked[0] == {"model": "some-model", "messages": MESSAGES, "response_format": wanted}


def test_a_whole_address_and_its_query_are_kept() -> None:
    with serve(say("yes")) as script:
        script.url += "/chat/completions?version=3"
        assert ask(script).text == "yes"
    assert script.paths == ["/v1/chat/completions?version=3"]


@pytest.mark.parametrize("variable", [None, "MY_KEY"])
def test_the_key_comes_from_the_environment_and_is_told_to_nobody_else(
    variable: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable or "OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("ANOTHER_KEY", "unused")
    echo = json.dumps({"error": {"message": f"bad key {SECRET}\n\x1b[31m of you"}}).encode()
    with caplog.at_level(logging.DEBUG), serve(say("hi"), Reply(echo, 401)) as script:
        chat = Chat(script.url, "m", key_variable=variable)
        assert chat.ask(MESSAGES, "thing", SCHEMA).text == "hi"
        with pytest.raises(
            EndpointError, match=r"refuses the key of \w+ \(it answered 401: bad key \*\*\* \[31m of you"
        ):
            chat.ask(MESSAGES, "thing", SCHEMA)
    assert script.keys == [f"Bearer {SECRET}"] * 2
    assert SECRET not in caplog.text and SECRET not in repr(chat)


def test_a_failure_that_passes_is_waited_for() -> None:
    replies = (Reply(status=429, headers={"Retry-After": "0.2"}), Reply(status=503), say("at last"))
    begun = time.monotonic()
    with serve(*replies) as script:
        assert ask(script).text == "at last"
    assert len(script.asked) == 3
    assert time.monotonic() - begun >= 0.22  # as the server said, then as long as we wait ourselves


def test_failures_end_at_the_deadline() -> None:
    begun = time.monotonic()
    with serve(Reply(b'{"error": "overloaded"}', 500)) as script, pytest.raises(TimedOut) as caught:
        ask(script, deadline=0.5)
    assert time.monotonic() - begun < 5
    assert "within 0.5 s" in str(caught.value) and "500: overloaded" in str(caught.value)
    assert 2 <= len(script.asked) <= 5  # pauses of 0.02, 0.04, 0.08, 0.16 seconds


SLOW = {
    "silent": Reply(delay=9.0),
    "trickling": Reply(b" " * 500, trickle=0.05),
    "trickling its headers": Reply(head=b"HTTP/1.0 200 OK\r\nX-Slow: " + b"x" * 500, trickle=0.05),
    "trickling an error": Reply(b" " * 500, status=503, trickle=0.05),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_server_cannot_hold_us(name: str) -> None:
    reply = SLOW[name]
    begun = time.monotonic()
    with serve(reply, say("late")) as script:
        assert ask(script, timeout=0.3).text == "late"
    assert 0.3 < time.monotonic() - begun < 5
    with serve(reply) as script:
        with pytest.raises(TimedOut, match=r"no answer after 0\.3 s"):
            ask(script, timeout=0.3, deadline=0.7)
        ends = time.monotonic() + 5
        while any(thread.name == "dreammix-chat" for thread in threading.enumerate()):
            assert time.monotonic() < ends, "nobody goes on reading"
            time.sleep(0.01)


def test_an_endpoint_that_is_down_is_named_at_once() -> None:
    url = free_url()
    begun = time.monotonic()
    with pytest.raises(EndpointError, match=rf"{url}/chat/completions cannot be reached .*refused"):
        Chat(url, "m").ask(MESSAGES, "thing", SCHEMA)
    assert time.monotonic() - begun < 5


def test_nobody_else_is_ever_contacted() -> None:
    with serve(say("stolen")) as other:
        for status in (301, 302, 307, 308):
            with serve(Reply(status=status, headers={"Location": f"{other.url}/x"})) as script:
                with pytest.raises(EndpointError, match=r"sends us on to .*nothing but the address that you name"):
                    ask(script)
                assert len(script.asked) == 1
    assert other.asked == []


def test_a_proxy_is_not_asked_for_what_is_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(say("stolen")) as proxy, serve(say("hi")) as script:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert ask(script).text == "hi"
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        elsewhere = Chat("http://model.invalid/v1", "m", pause=0.02)
        assert elsewhere.ask(MESSAGES, "thing", SCHEMA).text == "stolen", "the proxy of the environment serves others"
    assert len(proxy.asked) == 1


def test_a_huge_answer_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    with serve(Reply(b"x" * 5000)) as script, pytest.raises(EndpointError, match="more than 1000 bytes"):
        ask(script)


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xfe\x00", b"<html>hello</html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": 3}]}',
        b'{"choices": [{"message": {"content": {"a": 1}}}]}', b"[" * 100_000, b"",
    ],
)  # fmt: skip
def test_what_is_not_the_api_is_named(body: bytes) -> None:
    with serve(Reply(body)) as script, pytest.raises(EndpointError, match="does not answer as an OpenAI-compatible"):
        ask(script)


def test_an_answer_without_usage_or_text_is_one() -> None:
    with serve(
        Reply(b'{"choices": [{"message": {"content": null}, "finish_reason": "length"}], "usage": 3}')
    ) as script:
        assert ask(script) == Answer("", cut_off=True)


@pytest.mark.parametrize(
    ("status", "told"), [(401, "set OPENAI_API_KEY"), (404, "check --endpoint"), (400, "refuses the question")]
)
def test_other_refusals_say_what_to_do(status: int, told: str) -> None:
    with serve(Reply(b"no such thing", status)) as script, pytest.raises(EndpointError, match=told):
        ask(script)
    assert len(script.asked) == 1


NO_ADDRESSES = (
    *("", "localhost:8000/v1", "file:///etc/passwd", "ftp://host/v1", "http://"),
    *("http://a b/", "http://[::1/", "http://h:x/", "http://h/\x00"),
)


@pytest.mark.parametrize("url", NO_ADDRESSES)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="is no address; give one such as"):
        Chat(url, "m")


def test_secrets_have_their_place(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match="name or password") as caught:
        Chat("http://me:hidden@host/v1", "m")
    assert "hidden" not in str(caught.value)
    with pytest.raises(InputError, match="no such variable"):
        Chat("http://host/v1", "m", key_variable="NOT_THERE")
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\nX: y")
    with pytest.raises(InputError, match="characters that no key has") as caught:
        Chat("http://host/v1", "m")
    assert SECRET not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    Chat("http://host.example/v1", "m")
    assert "travels unencrypted" in caplog.text and SECRET not in caplog.text
    with pytest.raises(InputError, match="--model is empty"):
        Chat("http://host/v1", " ")


def test_a_query_is_sent_and_told_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Some services want their key there."""
    with caplog.at_level(logging.DEBUG), serve(Reply(status=404)) as script:
        script.url += f"?key={SECRET}"
        with pytest.raises(EndpointError) as caught:
            ask(script)
    assert script.paths == [f"/v1/chat/completions?key={SECRET}"]
    assert SECRET not in f"{caught.value} {caplog.text} {Chat(script.url, 'm').url}"


def test_a_server_that_asks_for_no_pause_is_not_stormed() -> None:
    with serve(Reply(status=429, headers={"Retry-After": "0"})) as script, pytest.raises(TimedOut):
        ask(script, deadline=0.5, pause=0.1)
    assert 2 <= len(script.asked) <= 6


@pytest.mark.parametrize("option", ["timeout", "deadline"])
@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_never_end_are_refused(option: str, seconds: float) -> None:
    with pytest.raises(InputError, match=rf"--{option} is {seconds}"):
        Chat("http://localhost:1/v1", "m", **{option: seconds})
