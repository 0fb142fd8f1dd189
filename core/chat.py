"""One question to a model behind an OpenAI-compatible endpoint: vLLM, Ollama, llama.cpp, OpenAI and their like.

The only module that opens a connection, and only to the address that its user names: redirects are refused, and the
library of the standard is used, which reports nothing to anybody.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import queue
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from dreammix_trt.core.errors import EndpointError, InputError, TimedOut

log = logging.getLogger(__name__)

KEY_VARIABLE: Final = "OPENAI_API_KEY"
MOST_BYTES: Final = 1 << 20  # of an answer
_PATH: Final = "/chat/completions"
_LONGEST_PAUSE: Final = 30.0
_LONGEST_WAIT: Final = 86_400  # seconds
_QUOTED: Final = 200  # characters of a server's own words


@dataclass(frozen=True)
class Answer:
    """What the model said; cut_off: the server stopped it before its end."""

    text: str
    cut_off: bool = False


class _TryAgain(Exception):
    """A failure that may pass; its text says what it was. after: seconds that the server asks to wait."""

    def __init__(self, text: str, after: float | None = None) -> None:
        super().__init__(text)
        self.after = after


class Chat:
    """A model behind an endpoint.

    url: the address for messages, without its query, where some services want their key.
    tokens: (read, written) so far, as the server counts them.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str | None = None,
        timeout: float = 120.0,
        deadline: float = 300.0,
        pause: float = 1.0,
    ) -> None:
        """Connects to nothing yet.

        url: of the API, such as http://localhost:8000/v1.
        model: its name there.
        key_variable: the environment's variable that holds the key; None: OPENAI_API_KEY, if it is set.
        timeout: seconds for one answer.
        deadline: seconds for everything, repeated attempts and the pauses between them included.
        pause: seconds before the first repetition; each further one waits twice as long, or as the server says, but no
            less than this.

        Raises InputError for a URL that is none, a variable that is not set, and times out of range.
        """
        for option, seconds in (("timeout", timeout), ("deadline", deadline)):
            if not 0 < seconds <= _LONGEST_WAIT:
                raise InputError(f"--{option} is {seconds}; it must be above 0 and at most {_LONGEST_WAIT} seconds")
        self._target = _read_url(url)
        self.url, self.model, self.tokens = urlsplit(self._target)._replace(query="").geturl(), model, (0, 0)
        if not model.strip():
            raise InputError("--model is empty; name the model as the endpoint calls it, for example: qwen2.5-vl-7b")
        self._variable = key_variable or KEY_VARIABLE
        self._key = _read_key(self._variable, needed=key_variable is not None)
        self._timeout, self._deadline, self._pause = timeout, deadline, pause
        self._ends: float | None = None
        if self._key and urlsplit(self.url).scheme == "http" and not _is_here(urlsplit(self.url)):
            log.warning("%s: the key of %s travels unencrypted; use https", self.url, self._variable)

    def ask(self, messages: Sequence[Mapping[str, Any]], name: str, schema: Mapping[str, Any]) -> Answer:
        """Ask, and again after failures that may pass (429, 5xx, no answer in time), until the deadline.

        messages: as the API takes them.
        name, schema: of the JSON that the answer is to be; not every server keeps to it, so look at the answer.

        Raises EndpointError when the endpoint is down, refuses or does not speak the API; TimedOut at the deadline.
        """
        form = {"name": name, "strict": True, "schema": dict(schema)}
        question: dict[str, Any] = {"model": self.model, "messages": list(messages)}
        question["response_format"] = {"type": "json_schema", "json_schema": form}
        body = json.dumps(question).encode()
        if self._ends is None:
            self._ends = time.monotonic() + self._deadline
        pause = self._pause
        while True:
            try:
                return self._read(self._post(body))
            except _TryAgain as failure:
                wait = min(_LONGEST_PAUSE, pause if failure.after is None else max(self._pause, failure.after))
                if time.monotonic() + wait >= self._ends:
                    raise TimedOut(
                        f"{self.url}: no answer within {self._deadline:g} s; the last attempt: {failure}; --deadline "
                        "gives it more time"
                    ) from failure
                log.info("%s: %s; again in %.1f s", self.url, failure, wait)
                time.sleep(wait)
                pause *= 2

    def _post(self, body: bytes) -> bytes:
        """The answer's bytes."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "dreammix-trt"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._target, body, headers, method="POST")
        assert self._ends is not None
        ends = min(self._ends, time.monotonic() + self._timeout)
        opened: list[http.client.HTTPConnection] = []
        try:
            return _run_until(ends, lambda: self._exchange(request, ends, opened))
        except TimeoutError:
            for connection in opened:
                _shut(connection)
            raise _TryAgain(f"no answer after {self._timeout:g} s (--timeout)") from None

    def _exchange(
        self, request: urllib.request.Request, ends: float, opened: list[http.client.HTTPConnection]
    ) -> bytes:
        """Send a request; returns the answer's bytes. opened: gets the connection. Raises TimeoutError at `ends`."""
        opener = _make_opener(self._target, opened)
        try:
            with opener.open(request, timeout=max(0.05, ends - time.monotonic())) as response:
                return _read_up_to(response, ends, self.url)
        except TimeoutError:
            raise
        except urllib.error.HTTPError as error:
            with error:
                raise self._explain_status(error, ends) from None
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, TimeoutError):
                raise reason from None
            if isinstance(reason, (ConnectionResetError, BrokenPipeError, http.client.HTTPException)):
                raise _TryAgain(f"the connection broke ({reason or type(reason).__name__})") from error
            raise EndpointError(
                f"{self.url} cannot be reached ({reason}); is the server running, and is the address right?"
            ) from error

    def _explain_status(self, error: urllib.error.HTTPError, ends: float) -> Exception:
        """What a status other than 200 means."""
        said = self._quote(error, ends)
        if error.code in (408, 429) or error.code >= 500:
            return _TryAgain(f"it answered {error.code}{said}", _read_pause(error.headers.get("Retry-After")))
        if 300 <= error.code < 400:
            target = str(error.headers.get("Location", ""))
            return EndpointError(
                f"{self.url} sends us on to {target[:_QUOTED]!r}, and nothing but the address that you name is ever "
                "contacted; give that as --endpoint, if it is right"
            )
        if error.code in (401, 403):
            has = f"refuses the key of {self._variable}" if self._key else f"wants a key: set {self._variable}"
            return EndpointError(f"{self.url} {has} (it answered {error.code}{said})")
        if error.code in (404, 405):
            return EndpointError(
                f"{self.url} answered {error.code}{said}: check --endpoint (it often ends in /v1) and --model "
                f"{self.model}"
            )
        return EndpointError(f"{self.url} refuses the question: it answered {error.code}{said}")

    def _quote(self, error: urllib.error.HTTPError, ends: float) -> str:
        """A server's own words about an error, short, on one line, and never with the key."""
        try:
            text = _read_up_to(error, ends, self.url).decode("utf-8", "replace")
            record = json.loads(text)
            found = record.get("error", record) if isinstance(record, dict) else record
            text = str(found.get("message", text) if isinstance(found, dict) else found)
        except (ValueError, OSError, EndpointError, RecursionError, http.client.HTTPException):
            text = ""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())[:_QUOTED]
        return f": {text}" if text else ""

    def _read(self, data: bytes) -> Answer:
        """The model's words in what the server sent. Raises EndpointError for what is not the API's."""
        try:
            record = json.loads(data.decode("utf-8"))
            choice = record["choices"][0]
            text = choice["message"].get("content")
            if text is not None and not isinstance(text, str):
                raise ValueError("content is no text")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise EndpointError(
                f"{self.url} does not answer as an OpenAI-compatible endpoint does ({type(error).__name__}: "
                f"{str(error)[:_QUOTED]}); check --endpoint"
            ) from error
        usage = record.get("usage")
        if isinstance(usage, dict):
            new = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
            read, written = (count if isinstance(count, int) and count > 0 else 0 for count in new)
            self.tokens = (self.tokens[0] + read, self.tokens[1] + written)
        return Answer(text or "", choice.get("finish_reason") == "length")


def _read_url(url: str) -> str:
    """The address to post to. Raises InputError for what is no plain http address."""
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host or not re.fullmatch(r"[\x21-\x7e]+", url.strip()):
        raise InputError(f"--endpoint {url!r} is no address; give one such as http://localhost:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise InputError(f"--endpoint holds a name or password before {host}; put a key into {KEY_VARIABLE} instead")
    path = parts.path.rstrip("/")
    return parts._replace(path=path if path.endswith(_PATH) else path + _PATH, fragment="").geturl()


def _read_key(variable: str, *, needed: bool) -> str:
    """The key in a variable of the environment. No message ever has it."""
    key = os.environ.get(variable, "").strip()
    if not key and needed:
        raise InputError(f"--key-variable {variable}: the environment has no such variable, or it is empty")
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise InputError(f"the key in {variable} has spaces or characters that no key has; set it again")
    return key


def _is_here(parts: SplitResult) -> bool:
    return parts.hostname in ("localhost", "127.0.0.1", "::1")


class _Web(urllib.request.AbstractHTTPHandler):
    """Opens http and https. opened: gets each connection, so that it can be shut from outside."""

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def __init__(self, opened: list[http.client.HTTPConnection]) -> None:
        super().__init__()
        self._opened = opened

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._keep(http.client.HTTPConnection), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._keep(http.client.HTTPSConnection), request)

    def _keep(self, kind: type[http.client.HTTPConnection]) -> Any:
        def connect(host: str, **options: Any) -> http.client.HTTPConnection:
            self._opened.append(kind(host, **options))
            return self._opened[-1]

        return connect


def _make_opener(url: str, opened: list[http.client.HTTPConnection]) -> urllib.request.OpenerDirector:
    """Opens http and https, through the proxy that the environment names, and follows no redirect."""
    opener = urllib.request.OpenerDirector()
    proxy = urllib.request.ProxyHandler({} if _is_here(urlsplit(url)) else None)
    errors = (urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor)
    for handler in (proxy, _Web(opened), *(kind() for kind in errors)):
        opener.add_handler(handler)
    return opener


def _run_until(ends: float, work: Callable[[], bytes]) -> bytes:
    """What `work` returns or raises; TimeoutError when the clock `time.monotonic` shows `ends`, whatever it does then.

    It runs in a thread of its own: a socket's timeout begins anew with every byte that a server trickles, and asking
    for the address of a name has none.
    """
    done: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put(work())
        except BaseException as error:  # is raised where it is waited for
            done.put(error)

    threading.Thread(target=run, name="dreammix-chat", daemon=True).start()
    try:
        found = done.get(timeout=max(0.0, ends - time.monotonic()))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, BaseException):
        raise found
    return found


def _shut(connection: http.client.HTTPConnection) -> None:
    """End a connection that another thread waits for."""
    with suppress(OSError, AttributeError):  # none yet, or none any more
        connection.sock.shutdown(socket.SHUT_RDWR)


def _read_up_to(response: Any, ends: float, url: str) -> bytes:
    """An answer's bytes. Raises EndpointError for too many of them, TimeoutError past `ends`."""
    data = bytearray()
    while piece := response.read1(1 << 16):
        data += piece
        if len(data) > MOST_BYTES:
            raise EndpointError(f"{url} answers with more than {MOST_BYTES} bytes; that is no list of words")
        if time.monotonic() > ends:
            raise TimeoutError
    return bytes(data)


def _read_pause(text: str | None) -> float | None:
    """Seconds in a Retry-After header; None where it has a date or nothing."""
    try:
        return max(0.0, float(text)) if text is not None else None
    except ValueError:
        return None
