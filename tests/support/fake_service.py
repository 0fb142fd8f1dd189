"""A painter without networks, and a server of it: for tests of what lies between the wire and the queue."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.masks import read_mask
from dreammix_trt.core.pictures import read_image
from dreammix_trt.core.request import Request
from dreammix_trt.core.subject import Subject
from dreammix_trt.engine.result import Result, StepEvent
from dreammix_trt.service.app import make_app
from dreammix_trt.service.running import Server
from dreammix_trt.service.served import Served
from dreammix_trt.service.settings import Settings

LONG = 30  # seconds after which a test has failed
U8 = npt.NDArray[np.uint8]


def colour_of(seed: int) -> tuple[int, int, int]:
    """What a `FakePainter` paints."""
    return (seed * 37 % 256, seed * 59 % 256, seed * 83 % 256)


def paint_plainly(picture: U8, mask: U8, seed: int) -> U8:
    """What a `FakePainter` makes of a picture, by hand."""
    return np.where(mask[..., None] > 127, np.array(colour_of(seed), np.uint8), picture).astype(np.uint8)


class FakePainter:
    """Fills the hole with a colour that is the seed's. Words of the prompt make it "slow" (10 ms a step), "hold" it
    until `let_go` is set, or "break" it.

    can: whether it makes subjects of pictures.
    """

    def __init__(self, can: bool = False) -> None:
        self.facts = SimpleNamespace(native_side=256, unet=None)
        self.runtime = SimpleNamespace(contexts=(77, 154), adapter="adapter" if can else None)
        self.let_go = threading.Event()
        self.held = threading.Event()
        self.painted: list[str] = []
        self.closed = False
        self._subjects = {"mug": Subject("mug", "sks", "mug", attributes={"colour": ("blue",)})}
        self._alone = threading.Lock()

    @property
    def subjects(self) -> tuple[str, ...]:
        return tuple(self._subjects)

    def list_subjects(self) -> list[Subject]:
        return list(self._subjects.values())

    def add_subject(self, subject: Subject) -> str:
        assert not self._alone.locked(), "a subject is added while a request runs"
        if subject.class_name == "misfit":
            raise FileFormatError("subject 'cup' does not fit this base")
        self._subjects[subject.name] = subject
        return subject.name

    def enroll(self, images: Any, masks: Any, *, class_name: str, name: str) -> Subject:
        for image, mask in zip(images, masks, strict=True):
            read_mask(mask, read_image(image), of_subject=True)
        self._subjects[name] = Subject(name, "", class_name)
        return self._subjects[name]

    def remove_subject(self, name: str) -> None:
        assert not self._alone.locked()
        del self._subjects[name]

    def request(self, prompt: str, *, preset: str | None = None, **fields: Any) -> Request:
        steps = {"fast": 2, "balanced": 4, "best": 6}.get(preset or "", 4)
        return Request.of(**{"num_inference_steps": steps, **fields, "prompt": prompt})

    def iterate(
        self, image: Any, mask_image: Any, request: Request, /, *, noise: Any, keep_stages: bool
    ) -> Iterator[StepEvent]:
        if request.subject and request.subject not in self._subjects:
            raise InputError(f"subject is {request.subject!r}; loaded are: {', '.join(self._subjects)}")
        source = read_image(image)
        return self._paint(source, read_mask(mask_image, source), request)

    def close(self) -> None:
        self.closed = True

    def _paint(self, source: Any, mask: U8, request: Request) -> Iterator[StepEvent]:
        assert self._alone.acquire(blocking=False), "two requests at a time"
        try:
            seed, count, steps = request.seed or 0, request.num_images_per_prompt, request.steps
            request = request.replace(seed=seed)
            self.painted.append(request.prompt)
            images = [Image.fromarray(paint_plainly(source.rgb, mask, seed + k)) for k in range(count)]
            for index in range(steps * count):
                if "slow" in request.prompt:
                    time.sleep(0.01)
                if "break" in request.prompt:
                    raise ZeroDivisionError("a secret of the painter's")
                if "hold" in request.prompt and index:
                    self.held.set()
                    assert self.let_go.wait(LONG)
                last = index + 1 == steps * count
                seeds, nothing = tuple(seed + k for k in range(count)), None
                result = Result(images, request, seeds, nothing, {"loop": 0.01}) if last else None  # type: ignore[arg-type]
                picture = index // steps
                yield StepEvent(index, steps * count, "lcg", picture, lambda whole, k=picture: images[k], None, result)
        finally:
            self._alone.release()


class Running:
    """A server of fake painters in a thread. `url` has no slash at its end."""

    def __init__(
        self,
        *painters: FakePainter,
        waiting: int = 16,
        timeout: float | None = 60.0,
        grace: float = 5.0,
        **settings: Any,
    ) -> None:
        self.painters = painters or (FakePainter(),)
        self.settings = Settings(**{"port": 0, **settings})
        self.served = Served("fake", self.painters, waiting=waiting, timeout=timeout, backend="none")
        self._began = threading.Event()
        self.app = make_app([self.served], self.settings)
        self.server = Server(self.app, self.settings, grace, lambda address: self._began.set())
        self.url = self.server.address.rstrip("/")
        self.thread = threading.Thread(target=self.server.serve_to_end)

    def __enter__(self) -> Running:
        self.thread.start()
        assert self._began.wait(LONG)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for painter in self.painters:
            getattr(painter, "let_go", threading.Event()).set()  # a DreamMix has none
        self.server.should_exit = True
        self.thread.join(LONG)
        assert not self.thread.is_alive()


def make_png(pixels: U8) -> bytes:
    """An array as the bytes of a PNG."""
    to = io.BytesIO()
    Image.fromarray(pixels).save(to, "PNG")
    return to.getvalue()


def read_pixels(data: bytes) -> U8:
    """The bytes of a picture's file as an array."""
    return np.asarray(Image.open(io.BytesIO(data)))


def make_scene(height: int = 48, width: int = 64) -> tuple[U8, U8]:
    """A picture of noise and a mask with a hole."""
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[10:30, 20:44] = 255
    return picture, mask
