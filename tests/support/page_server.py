"""A service with a canned engine, for the page: the API's answers at the pace a test sets, and what was sent.

It paints the masked region in one colour, so that a test sees whether picture, mask and result belong together.
"""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, PngImagePlugin

from dreammix_trt.core.request_schema import describe_request

PAGE = Path(__file__).resolve().parents[2] / "service" / "page"
PAINT = (220, 40, 40)
#: Nothing inline, nothing from elsewhere.
POLICY = "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_SUBJECT = {
    **{"name": "mug", "token": "sks", "class_name": "mug", "kind": "lora", "thumbnail": True, "removable": False},
    "attributes": {"colour": ["blue", "white"], "pattern": ["heart"]},
}


class Refusal(Exception):
    """An answer other than 2xx."""

    def __init__(self, status: int, kind: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"type": kind, "message": message, "field": field}


@dataclass
class Job:
    """One accepted job."""

    id: str
    image: bytes
    mask: bytes
    request: dict[str, Any]
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass
class Service:
    """How the service behaves, and what it was sent. step_seconds: of each step; refuse: the next job's answer."""

    url: str = ""
    key: str | None = None
    step_seconds: float = 0.0
    refuse: Refusal | None = None
    jobs: list[Job] = field(default_factory=list)
    subjects: list[dict[str, Any]] = field(default_factory=lambda: [dict(_SUBJECT)])
    enrolled: list[dict[str, bytes]] = field(default_factory=list)
    cuts: int = 0  # so many event streams break after their third step

    def reset(self) -> None:
        """As it was at first, for the next test."""
        for job in self.jobs:
            job.cancelled.set()
        self.__dict__.update(vars(Service(self.url)))

    def mask(self) -> Image.Image:
        """The mask of the last job."""
        return Image.open(io.BytesIO(self.jobs[-1].mask))


@contextmanager
def serve_page() -> Iterator[Service]:
    """Serve the page and the API on a free port of this machine."""
    service = Service()
    handler = type("Handler", (_Handler,), {"service": service})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    service.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield service
    finally:
        service.reset()
        server.shutdown()
        thread.join()
        server.server_close()


def paint(job: Job) -> Image.Image:
    """The job's picture with the masked region in one colour."""
    picture = Image.open(io.BytesIO(job.image)).convert("RGB")
    picture.paste(PAINT, mask=Image.open(io.BytesIO(job.mask)).convert("L"))
    return picture


def _finished(job: Job) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("dreammix", json.dumps({"schema": 2, **job.request}))
    return _encode(paint(job), "PNG", pnginfo=chunks)


def _encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _thumbnail() -> bytes:
    picture = Image.new("RGB", (64, 64), (214, 220, 228))
    ImageDraw.Draw(picture).rounded_rectangle((16, 16, 46, 52), 5, (37, 84, 214))
    return _encode(picture, "PNG")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # a page of twenty files over few connections
    service: Service

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if method == "GET" and not path.startswith("/v1/"):
                return self._send_file(path)
            if self.service.key and self.headers.get("Authorization") != f"Bearer {self.service.key}":
                raise Refusal(401, "unauthorized", "this service wants a key")
            for pattern, name in _ROUTES:
                found = re.fullmatch(pattern, f"{method} {path}")
                if found:
                    return getattr(self, name)(body, *found.groups())
            raise Refusal(404, "not_found", f"{path} is not there")
        except Refusal as refusal:
            self._send_json({"error": refusal.error}, refusal.status)
        except OSError:  # the page has gone
            return

    def _send(self, body: bytes, kind: str, status: int = 200, cache: str = "no-store") -> None:
        self.send_response(status)
        self.send_header("Cache-Control", cache)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(body)

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), "application/json", status)

    def _send_file(self, path: str) -> None:
        file = PAGE / (path.removeprefix("/page/") if path != "/" else "index.html")
        if file.parent != PAGE or not file.is_file():
            raise Refusal(404, "not_found", f"{path} is not there")
        self._send(file.read_bytes(), _KINDS[file.suffix], cache="max-age=600")

    def _schema(self, _: bytes) -> None:
        engine = {"name": "micro-SDXL", "native_size": 256, "backend": "canned", "context": 77}
        limits = {"pixels": 4_000_000, "bytes": 20_000_000, "fields": 64}
        self._send_json({"request": describe_request(), "limits": limits, "engine": engine, "can_enroll": True})

    def _subjects(self, _: bytes) -> None:
        self._send_json({"subjects": self.service.subjects, "default": "mug"})

    def _thumbnail(self, _: bytes) -> None:
        self._send(_thumbnail(), "image/png")

    def _enrol(self, body: bytes) -> None:
        parts = self._parts(body)
        self.service.enrolled.append(parts)
        name, class_name = parts["name"].decode(), parts["class_name"].decode()
        if any(each["name"] == name for each in self.service.subjects):
            raise Refusal(422, "invalid_request", f"there is a subject {name!r} already", "name")
        fresh = {"name": name, "class_name": class_name, "thumbnail": False, "removable": True, "attributes": {}}
        self.service.subjects.append({**_SUBJECT, **fresh})
        self._send_json(self.service.subjects[-1], 201)

    def _remove(self, _: bytes, name: str) -> None:
        self.service.subjects = [each for each in self.service.subjects if each["name"] != name]
        self.send_response(204)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _start(self, body: bytes) -> None:
        parts = self._parts(body)
        if self.service.refuse:
            refusal, self.service.refuse = self.service.refuse, None
            raise refusal
        request = json.loads(parts["request"])
        request = {"num_inference_steps": 6, **request, "seed": 4711 if request["seed"] is None else request["seed"]}
        job = Job(f"job{len(self.service.jobs)}", parts["image"], parts["mask"], request)
        self.service.jobs.append(job)
        self._send_json({"id": job.id, "state": "queued", "position": 1, "links": {}}, 202)

    def _cancel(self, _: bytes, name: str) -> None:
        self._job(name).cancelled.set()
        self._send_json({}, 202)

    def _image(self, _: bytes, name: str, number: str) -> None:
        self._send(_finished(self._job(name)), "image/png")

    def _read_request(self, body: bytes) -> None:
        with Image.open(io.BytesIO(self._parts(body)["image"])) as picture:
            text = picture.info.get("dreammix")
        if text is None:
            raise Refusal(422, "invalid_request", "the picture carries no request", "image")
        self._send_json({"request": json.loads(text)})

    def _events(self, _: bytes, name: str) -> None:
        job = self._job(name)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self._tell("queued", {"position": 1})
        steps = job.request["num_inference_steps"]
        for step in range(1, steps + 1):
            if job.cancelled.wait(self.service.step_seconds):
                return self._tell("cancelled", {})
            self._tell("step", {"step": step, "steps": steps})
            if step % 3 == 0:
                data = base64.b64encode(_encode(paint(job), "WEBP")).decode()
                self._tell("preview", {"step": step, "image": f"data:image/webp;base64,{data}"})
            if step == 3 and self.service.cuts:
                self.service.cuts -= 1
                return
        count = job.request.get("num_images_per_prompt", 1)
        images = [f"/v1/jobs/{job.id}/images/{k}" for k in range(count)]
        seconds = {"waited": 0.0, "ran": 0.1}
        self._tell("done", {"images": images, "request": job.request, "warnings": [], "seconds": seconds})

    def _tell(self, name: str, data: Any) -> None:
        self.wfile.write(f": beat\n\nid: {time.monotonic_ns()}\nevent: {name}\ndata: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def _job(self, name: str) -> Job:
        for job in self.service.jobs:
            if job.id == name:
                return job
        raise Refusal(404, "not_found", f"there is no job {name}")

    def _parts(self, body: bytes) -> dict[str, bytes]:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        message = BytesParser(policy=HTTP).parsebytes(head + body)
        return {
            str(part.get_param("name", header="content-disposition")): part.get_payload(decode=True)  # type: ignore[misc]
            for part in message.iter_parts()
        }


_ROUTES = (
    (r"GET /v1/schema", "_schema"),
    (r"GET /v1/subjects", "_subjects"),
    (r"GET /v1/subjects/[^/]+/thumbnail", "_thumbnail"),
    (r"POST /v1/subjects/enroll", "_enrol"),
    (r"DELETE /v1/subjects/([^/]+)", "_remove"),
    (r"POST /v1/jobs", "_start"),
    (r"GET /v1/jobs/([^/]+)/events", "_events"),
    (r"GET /v1/jobs/([^/]+)/images/(\d+)", "_image"),
    (r"DELETE /v1/jobs/([^/]+)", "_cancel"),
    (r"POST /v1/read-request", "_read_request"),
)
