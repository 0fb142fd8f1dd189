"""Running the app: the server around it, impatient with slow heads, and what a signal to end does."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from dreammix_trt.core.errors import InputError
from dreammix_trt.service.settings import Settings

_LINGER = 5  # seconds for open connections after the end of all work
_CONNECTIONS = 512


class Server(uvicorn.Server):
    """A server of an app on the settings' address. It drains at the first signal, and ends at once at the second.

    grace: seconds to finish what was accepted.
    begun: called with the page's address once it listens.

    Raises InputError for an address that cannot be taken.
    """

    def __init__(self, app: FastAPI, settings: Settings, grace: float, begun: Callable[[str], None]) -> None:
        self._app, self._grace, self._begun = app, grace, begun
        self._draining: asyncio.Task[None] | None = None
        self._listener = _listen(settings)
        host = "127.0.0.1" if settings.host in ("0.0.0.0", "") else settings.host
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{self._listener.getsockname()[1]}/"
        super().__init__(
            uvicorn.Config(
                app,
                http=_make_impatient(settings.head_seconds),
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=_CONNECTIONS,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=_LINGER,
                ws="none",
                lifespan="on",
            )
        )

    def serve_to_end(self) -> None:
        """Serve until a signal."""
        try:
            self.run(sockets=[self._listener])
        finally:
            self._listener.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and tell that it does."""
        await super().startup(sockets)
        if not self.should_exit:
            self._begun(self.address)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals to end for as long as the server runs, in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First drain, then end; a second signal does not wait. Called in the loop's thread."""
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        self._app.state.house.draining = True
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        await self._app.state.house.drain(self._grace)
        self.should_exit = True


def _listen(settings: Settings) -> socket.socket:
    """The socket of the settings' address."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # the protocol is named, or asyncio leaves Nagle's algorithm on, which holds answers back for 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(
            f"--host {settings.host} --port {settings.port} cannot be listened on ({error}): name another; --port 0 "
            "takes any that is free"
        ) from error
    return listener


def _make_impatient(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection that takes longer than this for a request's headers."""

    class Impatient(H11Protocol):
        _alarm: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._mind()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._mind()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._alarm is not None:
                self._alarm.cancel()

        def _mind(self) -> None:
            """Wait for headers no longer than allowed; between two requests the keep-alive's time counts."""
            waits = self.conn.their_state is h11.IDLE
            if not waits and self._alarm is not None:
                self._alarm.cancel()
                self._alarm = None
            elif waits and self._alarm is None:
                self._alarm = self.loop.call_later(seconds, self._give_up)

        def _give_up(self) -> None:
            self._alarm = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.close()

    return Impatient
