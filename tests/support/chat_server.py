"""A loopback server that answers as scripted: what an OpenAI-compatible endpoint may do to us."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """One answer. delay: seconds before it; trickle: seconds between its bytes; head: instead of the usual one."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    trickle: float = 0.0
    head: bytes = b""


def say(text: str | None, read: int = 10, written: int = 3, finish: str = "stop") -> Reply:
    """The model says a text, as the API wraps it."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": read, "completion_tokens": written}
    return Reply(json.dumps({"choices": [choice], "usage": usage}).encode())


@dataclass
class Script:
    """A running server. asked: the body of every request, paths, keys: its path and Authorization header.

    The last reply is repeated.
    """

    replies: list[Reply]
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@contextmanager
def serve(*replies: Reply) -> Iterator[Script]:
    """Serve replies in order on a free port of this machine."""
    script = Script(list(replies))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            number = len(script.asked)
            script.asked.append(json.loads(data))
            script.paths.append(self.path)
            script.keys.append(self.headers.get("Authorization"))
            self._answer(script.replies[min(number, len(script.replies) - 1)])

        def _answer(self, reply: Reply) -> None:
            try:
                stop.wait(reply.delay)
                if not reply.head:
                    self.send_response(reply.status)
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                data = reply.head + reply.body
                for start in range(len(data)) if reply.trickle else ():
                    self.wfile.write(data[start : start + 1])
                    if stop.wait(reply.trickle):
                        return
                if not reply.trickle:
                    self.wfile.write(data)
            except OSError:  # nobody waits for it any more
                return

        def log_message(self, *_: object) -> None:
            pass

    stop = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    script.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield script
    finally:
        stop.set()
        server.shutdown()
        thread.join()
        server.server_close()


def free_url() -> str:
    """An address of this machine where nothing listens."""
    with serve(Reply()) as script:
        return script.url
