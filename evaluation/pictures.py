"""The painted pictures of an evaluation: kept as PNG with what made them, and painted anew only when that changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageOps

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.files import atomic_file, sha256_of
from dreammix_trt.core.request import Request
from dreammix_trt.evaluation.painter import Painter, Painting
from dreammix_trt.evaluation.protocol import Order, Scene

FOLDER: Final = "pictures"
THUMBNAILS: Final = "thumbnails"
_CHUNK: Final = "dreammix_evaluation"
_SIDE: Final = 192  # pixels of a thumbnail's longer side


@dataclass(frozen=True)
class Recipe:
    """All that decides a picture's pixels.

    painter: what paints it. image, mask: SHA-256 of the scene's files.
    """

    request: Request
    painter: str
    image: str
    mask: str

    def to_json(self) -> str:
        facts = {"painter": self.painter, "image": self.image, "mask": self.mask}
        return json.dumps({"request": json.loads(self.request.to_json()), **facts})

    def explain_change(self, made: Mapping[str, Any] | None) -> str:
        """How a picture differs that was made by another recipe; "": it is this one's.

        made: as JSON; None: the file does not say.
        """
        now = json.loads(self.to_json())
        then, request = _fill_request((made or {}).get("request")), now.pop("request")
        if made is None or then is None:
            return "it does not say how it was made"
        changes = [
            f"{name} was {then[name]!r} and is {request[name]!r}" for name in request if then[name] != request[name]
        ]
        names = {
            "painter": "another engine or LoRA painted it",
            "image": "its scene changed",
            "mask": "its mask changed",
        }
        return "; ".join([*changes, *(text for name, text in names.items() if made.get(name) != now[name])])


class Gallery:
    """The pictures of one evaluation, in its folder."""

    def __init__(self, out: Path, painter: Painter, fields: Mapping[str, Any]) -> None:
        """fields: of every request."""
        self.folder, self._thumbnails = out / FOLDER, out / THUMBNAILS
        self._painter, self._fields = painter, fields
        self._subject, self._scene = ("", ""), (Path(), "", "")  # what is known of those at hand

    def place(self, order: Order) -> Path:
        return self.folder / f"{order.name}.png"

    def make_recipe(self, order: Order) -> Recipe:
        """What makes a picture of the protocol now."""
        request = self._painter.request({**self._fields, **order.fields})
        if self._subject[0] != order.subject.name:
            self._subject = order.subject.name, self._painter.identify(order.subject)
        if self._scene[0] != order.scene.image:
            self._scene = order.scene.image, sha256_of(order.scene.image), sha256_of(order.scene.mask)
        return Recipe(request, self._subject[1], *self._scene[1:])

    def find_change(self, order: Order, recipe: Recipe) -> str | None:
        """Why a picture that is there is another one; "": it is the same; None: there is none."""
        file = self.place(order)
        return recipe.explain_change(_read_recipe(file)) if file.is_file() else None

    def keep(self, order: Order, recipe: Recipe, painting: Painting) -> None:
        """Write a picture as PNG, whole or not at all, with its request and its recipe."""
        options = painting.imprint.make_options(painting.image, "PNG")
        options["pnginfo"].add_itxt(_CHUNK, recipe.to_json())
        with atomic_file(self.place(order)) as temporary:
            painting.image.save(temporary, "PNG", **options)

    def read_request(self, order: Order) -> Request:
        """The request as it was painted, with what was chosen on the way (`substitute="auto"`)."""
        from dreammix_trt.engine.imprint import find_request

        with Image.open(self.place(order)) as picture:
            return Request.from_json(find_request(picture) or "")

    def shrink(self, order: Order) -> str:
        """Write a picture's thumbnail; returns its place below the evaluation's folder."""
        with Image.open(self.place(order)) as picture:
            return self._write_thumbnail(picture, order.name)

    def shrink_scene(self, scene: Scene) -> str:
        """Write a scene's thumbnail, the region to paint marked; returns its place below the evaluation's folder."""
        from dreammix_trt.core.masks import read_mask
        from dreammix_trt.core.pictures import read_image
        from dreammix_trt.core.remarks import keep_remarks
        from dreammix_trt.report import mark_region

        with keep_remarks(tell=False):
            picture = read_image(scene.image, name="scene")
            mask = Image.fromarray(read_mask(scene.mask, picture, name="mask"))
        small = [ImageOps.contain(each, (_SIDE, _SIDE)) for each in (Image.fromarray(picture.on(255)), mask)]
        return self._write_thumbnail(mark_region(small[0], small[1]), f"scenes/{scene.name}")

    def shrink_photographs(self, order: Order) -> list[str]:
        """Write thumbnails of the subject's photographs; returns their places below the evaluation's folder."""
        subject = order.subject
        return [
            self._write_thumbnail(Image.fromarray(file.read().image), f"{subject.name}/photograph-{number}")
            for number, file in enumerate(subject.photographs)
        ]

    def _write_thumbnail(self, picture: Image.Image, name: str) -> str:
        target = self._thumbnails / f"{name}.jpg"
        small = ImageOps.contain(picture.convert("RGB"), (_SIDE, _SIDE), Image.Resampling.LANCZOS)
        with atomic_file(target) as temporary:
            small.save(temporary, "JPEG", quality=88)
        return f"{THUMBNAILS}/{name}.jpg"


def _fill_request(record: Any) -> dict[str, Any] | None:
    """A stored request with the fields that came later at their defaults; None: it is none of this version."""
    try:
        filled = Request.from_json(json.dumps(record))
    except InputError:
        return None
    return dict(json.loads(filled.to_json()))


def _read_recipe(file: Path) -> dict[str, Any] | None:
    """The recipe in a picture; None where it has none, or cannot be read."""
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            record = json.loads(picture.info[_CHUNK])
    except (OSError, SyntaxError, ValueError, KeyError, RecursionError, Image.DecompressionBombError):
        return None
    return record if isinstance(record, dict) else None
