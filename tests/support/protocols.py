"""Small protocols of plain pictures, and a painter that needs no engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.request import Request
from dreammix_trt.engine.imprint import Imprint, Origin
from dreammix_trt.evaluation.painter import Painting
from dreammix_trt.evaluation.protocol import Scene, Subject

SIDE = 40


def write_protocol(
    folder: Path, *, subjects: int = 2, scenes: int = 2, seeds: int = 1, side: int = SIDE, **changes: Any
) -> Path:
    """Write a protocol: each subject has one prompt of identity and one edit. changes: of protocol.json's fields."""
    rng = np.random.default_rng(0)
    (folder / "scenes").mkdir(parents=True)
    for number in range(scenes):
        save(folder / "scenes" / f"room-{number}.png", rng.integers(0, 256, (side, side, 3), np.uint8))
        save(folder / "scenes" / f"room-{number}_mask.png", draw_mask(side))
    entries = {}
    for number in range(subjects):
        name = f"mug-{number}"
        for kind in ("image", "mask"):
            (folder / "subjects" / name / kind).mkdir(parents=True)
        for photo in range(2):
            save(folder / "subjects" / name / "image" / f"{photo}.png", rng.integers(0, 256, (side, side, 3), np.uint8))
            save(folder / "subjects" / name / "mask" / f"{photo}.png", draw_mask(side))
        entries[name] = {
            "class_name": "mug",
            "identity": ["a photo of a sks mug"],
            "editing": [{"prompt": "a red sks mug", "substitute": ["blue"], "expected": {"colour": "red"}}],
        }
    record = {"schema": 1, "name": "plain", "seeds": list(range(seeds)), "request": {}, "subjects": entries, **changes}
    (folder / "protocol.json").write_text(json.dumps(record))
    return folder


def draw_mask(side: int = SIDE) -> Any:
    mask = np.zeros((side, side), np.uint8)
    mask[side // 4 : side // 2, side // 4 : 3 * side // 4] = 255
    return mask


def save(file: Path, pixels: Any) -> None:
    Image.fromarray(pixels).save(file)


class FakePainter:
    """Fills the mask with a colour that its request decides, and counts what it is asked for.

    known: the subjects it has; None: all.
    stop_at: raises before it paints this picture.
    """

    def __init__(self, name: str = "fake", known: tuple[str, ...] | None = None, stop_at: int | None = None) -> None:
        self.name, self.known, self.stop_at = name, known, stop_at
        self.painted: list[Request] = []
        self.opened: list[str] = []

    def request(self, fields: Mapping[str, Any]) -> Request:
        return Request.of(**fields)

    def identify(self, subject: Subject) -> str:
        return f"{self.name} {subject.engine_name}"

    @contextmanager
    def open(self, subject: Subject) -> Iterator[None]:
        if self.known is not None and subject.engine_name not in self.known:
            raise InputError(f"subjects.{subject.name}: is not here")
        self.opened.append(subject.name)
        yield

    def check(self, scene: Scene, request: Request) -> tuple[str, ...]:
        return ("'skz' is no word",) if "skz" in request.prompt else ()

    def paint(self, scene: Scene, request: Request) -> Painting:
        if len(self.painted) == self.stop_at:
            raise KeyboardInterrupt
        self.painted.append(request)
        with Image.open(scene.image) as picture, Image.open(scene.mask) as mask:
            image = picture.convert("RGB")
            digest = hashlib.sha256(f"{self.name}{request.to_json()}".encode()).digest()
            image.paste(tuple(digest[:3]), mask=mask.convert("L"))
        return Painting(image, Imprint(request, Origin("0")), 0.5, ("a warning",))
