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
    """A server of an app on the settings' address. It drains at the first signal, and ends at once at the second. When
    all devices are lost it drains and ends by itself.

    grace: seconds to finish what was accepted.
    begun: called with the page's address once it listens.
    lost: whether it ended because all devices were lost.

    Raises InputError for an address that cannot be taken.
    """

    def __init__(self, app: FastAPI, settings: Settings, grace: float, begun: Callable[[str], None]) -> None:
        self._app, self._grace, self._begun = app, grace, begun
        self._draining: asyncio.Task[None] | None = None
        self.lost = False
        self._listener = _listen(settings)
        host = "127.0.0.1" if settings.host in ("0.0.0.0", "") else settings.host
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{self._listener.getsockname()[1]}/"
        super().__init__(
            uvicorn.Config(
                app,
                http=_make_impatient(settings.head_seconds, settings.body_seconds),
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
        self._begin_draining()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second. A service that can paint nothing any more ends, so that it is started again."""
        if counter % 10 == 0 and self._draining is None and self._app.state.house.is_lost:
            self.lost = True
            self._begin_draining()
        return await super().on_tick(counter)

    def _begin_draining(self) -> None:
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


def _make_impatient(head_seconds: float, still_seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which leaves clients that are too slow.

    head_seconds: for a request's headers.
    still_seconds: for which a client may take nothing of an answer that waits for it.
    """

    class Impatient(H11Protocol):
        _alarm: asyncio.TimerHandle | None = None
        _reader: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._mind()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._mind()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            for timer in (self._alarm, self._reader):
                if timer is not None:
                    timer.cancel()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch_reader(None)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._reader is not None:
                self._reader.cancel()
                self._reader = None

        def _watch_reader(self, before: int | None) -> None:
            """Leave a client that has taken nothing since the last look; its answer would stay in memory."""
            left = self.transport.get_write_buffer_size()
            if before is not None and left >= before:
                self.transport.abort()
                return
            self._reader = self.loop.call_later(still_seconds, self._watch_reader, left)

        def _mind(self) -> None:
            """Wait for headers no longer than allowed; between two requests the keep-alive's time counts."""
            waits = self.conn.their_state is h11.IDLE
            if not waits and self._alarm is not None:
                self._alarm.cancel()
                self._alarm = None
            elif waits and self._alarm is None:
                self._alarm = self.loop.call_later(head_seconds, self._give_up)

        def _give_up(self) -> None:
            self._alarm = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.close()

    return Impatient
