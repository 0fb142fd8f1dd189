"""The main job on the embedded model: photographs of a subject -> LoRA -> engine -> pictures, on one sheet.

Everything is made on the spot: the photographs are rendered, the LoRA is trained, the engine is built and every picture
is inpainted by the runtime an app would embed.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dreammix_trt.core.files import atomic_file
from dreammix_trt.report import Row, Tile, contact_sheet, html_report, marked, stage_sheet

if TYPE_CHECKING:
    from dreammix_trt.core.passport import Passport
    from dreammix_trt.engine.dreammix import DreamMix
    from dreammix_trt.engine.result import Result

Update = Callable[[str, float, str], None]
_IDENTITY = "a photo of a sks mug"
_EDITS = ("a red sks mug", "a green sks mug", "a purple sks mug", "a yellow striped sks mug")
_ELIMINATED = ("blue",)
_GUIDANCE = 2.5  # micro-SDXL keeps calmer backgrounds and more of the subject than at the default of 4


@dataclass(frozen=True)
class Pages:
    """Where the demo's pages are."""

    sheet: Path
    report: Path


@dataclass(frozen=True)
class Place:
    """A picture and the region of it to fill."""

    image: Image.Image
    mask: Image.Image


def run_demo(
    out: Path,
    *,
    seed: int = 7,
    threads: int | None = None,
    training_steps: int | None = None,
    picture_steps: int = 30,
    progress: Update | None = None,
) -> Pages:
    """Run the whole main job into `out` and return its pages.

    training_steps: of the LoRA; None: what suits the base. picture_steps: of each picture. Needs the extras `train` and
    `export` (the LoRA is trained here). Existing files of an earlier run are replaced.
    """
    from dreammix_trt.building import build
    from dreammix_trt.engine.dreammix import DreamMix
    from dreammix_trt.trainer.lora import train_lora

    update = progress or (lambda *_: None)
    seconds: dict[str, float] = {}
    with _measure(seconds, "photographs"):
        photos = write_photos(out / "photos")
    with _measure(seconds, "train"):
        train_lora(
            out / "photos",
            "mug",
            out / "lora",
            steps=training_steps,
            threads=threads,
            seed=seed,
            progress=_name_part(update, "train"),
        )
    with _measure(seconds, "build"):
        passport = build(out / "lora", out=out / "engine", name="mug", progress=_name_part(update, "build"))
    with _measure(seconds, "load"):
        engine = DreamMix.load(out / "engine", threads=threads)
    with engine as dm, _measure(seconds, "inpaint"):
        gallery = Gallery(dm, seed, picture_steps, update)
        rows = [Row("The subject: five photographs", [Tile(photo) for photo in photos]), *gallery.rows()]
    title = "dreammix-trt: a subject the model had never seen, placed by mask and text"
    sheet = contact_sheet(rows, title=title)
    pages = Pages(out / "contact_sheet.png", out / "report.html")
    with atomic_file(pages.sheet) as path:
        sheet.save(path, "PNG")
    stages = stage_sheet(gallery.first)
    with atomic_file(out / "stages.png") as path:
        stages.save(path, "PNG")
    with atomic_file(pages.report) as path:
        path.write_text(html_report(title, sheet, _tables(seconds, gallery, passport)), encoding="utf-8")
    return pages


def write_photos(folder: Path, count: int = 5, size: int = 192) -> list[Image.Image]:
    """Render the subject's photographs in the trainer's layout (image/NN.png, mask/NN.png)."""
    from dreammix_trt.trainer.micro.world import render_subject_photos

    pictures = []
    for kind in ("image", "mask"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for index, (image, mask) in enumerate(render_subject_photos(count, seed=0, size=size)):
        pictures.append(Image.fromarray(image))
        pictures[-1].save(folder / "image" / f"{index:02d}.png")
        Image.fromarray(mask).save(folder / "mask" / f"{index:02d}.png")
    return pictures


def places(
    count: int, seed: int, size: tuple[int, int], extent: tuple[float, float], shape: str = "mug"
) -> list[Place]:
    """Rooms of (height, width) `size` the model has not seen, each with a region for a `shape` of `extent` pixels."""
    from dreammix_trt.trainer.micro import world

    rng = np.random.default_rng([90_000, seed])
    rooms = []
    for _ in range(count):
        what = replace(world.random_attributes(rng), shape=shape)
        scene = world.render_scene(rng, what, size, object_size=float(rng.uniform(*extent)))
        mask = world.draw_mask(rng, scene.box, *size)
        rooms.append(Place(Image.fromarray(scene.background), Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))))
    return rooms


class Gallery:
    """Every picture of the sheet, made by one loaded engine."""

    def __init__(self, dm: DreamMix, seed: int, steps: int, update: Update) -> None:
        self._dm, self._seed, self._steps, self._update = dm, seed, steps, update
        self._large = places(5, 1, (192, 192), (105.0, 130.0))
        self._wide = places(2, 2, (256, 384), (96.0, 110.0))
        self._small = places(2, 3, (256, 256), (48.0, 52.0))
        self.pictures = 0
        self.timings: dict[str, float] = {}
        self.first: Result

    def rows(self) -> list[Row]:
        """The rows of the sheet below the photographs."""
        return [
            self._places_row(),
            self._identity_row(),
            self._edit_row('Edited by text, attributes decomposed (TAS takes "blue" out)', _ELIMINATED),
            self._edit_row("The same without TAS", ()),
            self._small_row(),
            self._base_row(),
        ]

    def _places_row(self) -> Row:
        shown = [*self._large[:3], *self._wide]
        return Row("Where it shall stand", [Tile(marked(place.image, place.mask)) for place in shown])

    def _identity_row(self) -> Row:
        shown = [*self._large[:3], *self._wide]
        tiles = [Tile(self._paint(place, _IDENTITY, k), f'"{_IDENTITY}"') for k, place in enumerate(shown)]
        return Row("As itself", tiles)

    def _edit_row(self, title: str, eliminated: tuple[str, ...]) -> Row:
        tiles = []
        for number, (prompt, place) in enumerate(zip(_EDITS, self._large, strict=False)):
            picture = self._paint(place, prompt, 20 + number, substitute=eliminated)
            tiles.append(Tile(picture, f'"{prompt}"' + (f" minus {', '.join(eliminated)}" if eliminated else "")))
        return Row(title, tiles)

    def _small_row(self) -> Row:
        place = self._small[0]
        ways = {
            "local, then global (default)": {},
            "local only": {"lcg_fraction": 1.0},
            "global only": {"lcg_fraction": 0.0},
        }
        tiles = [Tile(marked(place.image, place.mask), "a fifth of the frame's side")]
        tiles += [Tile(self._paint(place, "a red sks mug", 40, **fields), f"{way}") for way, fields in ways.items()]
        return Row('A small object in a larger picture: "a red sks mug"', tiles)

    def _base_row(self) -> Row:
        wanted = (
            "blue striped teapot",
            "red dotted bowl",
            "green plain bottle",
            "pink checkered heart",
            "black plain house",
        )
        tiles = []
        for number, words in enumerate(wanted):
            (place,) = places(1, 10 + number, (192, 192), (105.0, 125.0), words.split()[-1])
            prompt = f"a photo of a {words} on a table"
            tiles.append(Tile(self._paint(place, prompt, 60 + number), f'"{prompt}"'))
        return Row("The base model without the subject's word", tiles)

    def _paint(self, place: Place, prompt: str, number: int, **fields: Any) -> Image.Image:
        result = self._dm.inpaint(
            place.image,
            place.mask,
            prompt,
            seed=self._seed + number,
            num_inference_steps=self._steps,
            guidance_scale=_GUIDANCE,
            keep_stages=not self.pictures,
            **fields,
        )
        if not self.pictures:
            self.first = result
        self.pictures += 1
        for phase, spent in result.timings.items():
            self.timings[phase] = self.timings.get(phase, 0.0) + spent
        self._update("inpaint", min(1.0, self.pictures / 22), prompt)
        return result.images[0]


def _tables(seconds: dict[str, float], gallery: Gallery, passport: Passport) -> list[tuple[str, list[list[str]]]]:
    steps = [["step", "seconds"], *([name, f"{value:.1f}"] for name, value in seconds.items())]
    total = sum(gallery.timings.values())
    phases = [["phase of a picture", "milliseconds (mean)", "share"]]
    phases += [
        [name, f"{1000 * value / gallery.pictures:.1f}", f"{value / total:.1%}"]
        for name, value in gallery.timings.items()
    ]
    facts = [["passport", ""], *([str(cell) for cell in row] for _, rows in passport.describe() for row in rows)]
    machine = [["machine", ""], ["platform", platform.platform()], ["python", platform.python_version()]]
    request = [
        ["the first request", ""],
        *([k, json.dumps(v)] for k, v in json.loads(gallery.first.request.to_json()).items()),
    ]
    return [
        ("Whole run", steps),
        (f"{gallery.pictures} pictures", phases),
        ("Engine", facts),
        ("Request", request),
        ("Machine", machine),
    ]


def _name_part(update: Update, name: str) -> Update:
    return lambda part, fraction, message: update(f"{name} {part}".strip(), fraction, message)


@contextmanager
def _measure(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
