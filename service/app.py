"""The app: all doors of one service behind one gate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from dreammix_trt.service import a1111_door, native, openai_door, subjects
from dreammix_trt.service.gate import Gate
from dreammix_trt.service.house import Here, House
from dreammix_trt.service.refusals import Refusal, describe_errors, install
from dreammix_trt.service.served import Served
from dreammix_trt.service.settings import Settings

PAGE = Path(__file__).parent / "page"
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_SAFE = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Health(BaseModel):
    """Whether the process answers, and takes work."""

    status: str


def make_app(engines: Sequence[Served], settings: Settings) -> FastAPI:
    """An ASGI app over engines, the first of which is meant where nobody names one. Its end closes their queues."""
    house = House(engines, settings)

    @asynccontextmanager
    async def live(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(house.watch())
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await asyncio.to_thread(house.close)

    app = FastAPI(
        title="dreammix-trt",
        summary="Put a subject into a marked region of any picture.",
        version="1",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=live,
    )
    app.state.house = house
    install(app)
    app.add_middleware(Gate, settings=settings, is_draining=lambda: house.draining)
    for door in (native, subjects, openai_door, a1111_door):
        app.include_router(door.router)
    _add_state(app)
    _add_page(app)
    return app


def _add_state(app: FastAPI) -> None:
    """What operators ask."""

    @app.get("/healthz", tags=["state"], responses=describe_errors("unavailable"))
    async def get_health(house: Here) -> Health:
        """The process answers, and no engine has lost all its devices, which only a new start mends."""
        house.refuse_where_lost()
        return Health(status="ok")

    @app.get("/readyz", tags=["state"], responses=describe_errors("draining", "unavailable"))
    async def get_readiness(house: Here) -> Health:
        """The service takes work."""
        house.refuse_where_draining()
        house.refuse_where_lost()
        return Health(status="ok")

    @app.get(
        "/metrics",
        tags=["state"],
        response_class=Response,
        responses={
            **describe_errors(),
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format."},
        },
    )
    async def get_metrics(house: Here) -> Response:
        """The numbers that an operator watches."""
        return Response(house.meters.to_text(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
    """The page and its files, and nothing else of the disk."""
    files = {
        path.relative_to(PAGE).as_posix(): path
        for path in (PAGE.rglob("*") if PAGE.is_dir() else ())
        if path.suffix in _KINDS
    }

    @app.get("/", include_in_schema=False)
    async def get_page() -> Response:
        return _send("index.html")

    @app.get("/page/{name:path}", include_in_schema=False)
    async def get_file(name: str) -> Response:
        return _send(name)

    @app.get("/favicon.ico", include_in_schema=False)
    async def get_icon() -> Response:
        return Response(status_code=204)

    def _send(name: str) -> Response:
        path = files.get(name)
        if path is None:
            return JSONResponse(Refusal("not_found", "there is no such page").to_body(), 404)
        return FileResponse(path, media_type=_KINDS[path.suffix], headers=_SAFE)
