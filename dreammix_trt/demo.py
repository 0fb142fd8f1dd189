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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFilter

from dreammix_trt.core.attributes import FILE_NAME as ATTRIBUTES
from dreammix_trt.core.config_fields import MOST_TOKENS
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.files import atomic_file
from dreammix_trt.core.removal import REMOVAL
from dreammix_trt.report import (
    Figure,
    Row,
    contact_sheet,
    enlarge_border,
    enlarge_region,
    html_report,
    mark_region,
    stage_sheet,
)

if TYPE_CHECKING:
    from dreammix_trt.core.passport import Passport
    from dreammix_trt.engine.dreammix import DreamMix
    from dreammix_trt.engine.result import Result
    from dreammix_trt.trainer.micro.world import Thing

Update = Callable[[str, float, str], None]
_IDENTITY = "a photo of a sks mug"
_EDITS = ("a red sks mug", "a yellow sks mug", "a sks mug with a yellow star", "a striped sks mug")
_PICTURES, _PHOTOS = 21, 5
_MADE = ("lora", "engine", ATTRIBUTES, "contact_sheet.png", "stages.png", "report.html")


@dataclass(frozen=True)
class Pages:
    """Where the demo's pages are."""

    sheet: Path
    report: Path


@dataclass(frozen=True)
class Spot:
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
    from dreammix_trt.core.extras import require_training
    from dreammix_trt.engine.dreammix import DreamMix
    from dreammix_trt.trainer.lora import train_lora
    from dreammix_trt.trainer.micro.captions import dictionary_of, subject_captions
    from dreammix_trt.trainer.micro.world import write_photos

    require_training()
    update = progress or (lambda *_: None)
    seconds: dict[str, float] = {}
    subject = demo_subject()
    with _measure(seconds, "photographs"):
        photos = write_photos(out / "photos", subject, _PHOTOS)
        dictionary_of(subject.attributes).write(out / ATTRIBUTES)
    with _measure(seconds, "train"):
        train_lora(
            out / "photos",
            "mug",
            out / "lora",
            captions=subject_captions(subject.attributes),
            attributes=out / ATTRIBUTES,
            attribute_captions=False,
            steps=training_steps,
            threads=threads,
            seed=seed,
            progress=_name_part(update, "train"),
        )
    with _measure(seconds, "build"):
        passport = build(
            out / "lora",
            out=out / "engine",
            name="mug",
            progress=_name_part(update, "build"),
        )
    with _measure(seconds, "load"):
        engine = DreamMix.load(out / "engine", threads=threads)
    with engine as dm, _measure(seconds, "inpaint"):
        gallery = Gallery(dm, seed, picture_steps, update, read_photograph(out / "photos"))
        note = "What the trainer gets. No such mug was in the pictures that the base was trained on."
        rows = [Row("The subject: five photographs", [Figure(photo) for photo in photos], note), *gallery.rows()]
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


def check_folder(out: Path) -> None:
    """Raise InputError when a folder holds what no demo wrote, so that nobody's pictures are replaced."""
    if not out.is_dir():
        return
    found = [path for path in out.iterdir() if path.name != "photos"]
    found += [path for path in out.glob("photos/*") if path.name not in ("image", "mask")]
    found += [path for path in out.glob("photos/*/*") if path.name not in {f"{k:02d}.png" for k in range(_PHOTOS)}]
    strangers = sorted(str(path.relative_to(out)) for path in found if path.name not in _MADE or path.parent != out)
    if strangers:
        raise InputError(
            f"--out {out} holds what no demo wrote ({', '.join(strangers[:3])}); name a new folder, or --force"
        )


def demo_subject() -> Thing:
    """A blue mug with a white foot, a white rim and a green heart: a combination the base has never seen."""
    from dreammix_trt.trainer.micro import world

    what = world.Attributes("mug", "blue", foot="white", top="white", decal="heart", decal_colour="green")
    return world.Thing(what, world.Build(foot=0.2, decal=0.18))


def read_photograph(photos: Path) -> Spot:
    """The first photograph of `write_photos` and the mask of its subject."""
    with Image.open(photos / "image" / "00.png") as image, Image.open(photos / "mask" / "00.png") as mask:
        return Spot(image.copy(), mask.copy())


def find_places(
    count: int, seed: int, size: tuple[int, int], share: tuple[float, float], shape: str = "mug"
) -> list[Spot]:
    """Rooms of (height, width) `size` the base has not seen, each with a region for a `shape`.

    share: range of the thing's longer side as a share of the room's short side.
    """
    from dreammix_trt.trainer.micro import world

    rng = np.random.default_rng([90_000, seed])
    places = []
    for _ in range(count):
        what = world.random_attributes(rng, held_out=True, shape=shape)
        scene = world.render_scene(rng, what, size, object_size=float(rng.uniform(*share)) * min(size))
        mask = world.draw_mask(rng, scene.box, *size)
        places.append(Spot(Image.fromarray(scene.background), world.show_mask(mask)))
    return places


def find_thing(side: int) -> Spot:
    """A room of `side` pixels with a thing in it, and the region that a brush would mark: the thing and its shadow."""
    from dreammix_trt.trainer.micro import world

    rng = np.random.default_rng([91_000, 3])
    what = world.random_attributes(rng, held_out=True)
    scene = world.render_scene(rng, what, side, object_size=float(rng.uniform(0.4, 0.55)) * side)
    changed = np.abs(scene.image.astype(np.int16) - scene.background).max(axis=2) > 8
    brushed = world.show_mask(changed).filter(ImageFilter.MaxFilter(side // 40 * 2 + 1))
    return Spot(Image.fromarray(scene.image), brushed)


class Gallery:
    """Every picture of the sheet, made by one loaded engine."""

    def __init__(self, dm: DreamMix, seed: int, steps: int, update: Update, photograph: Spot) -> None:
        """photograph: of the subject, for what one picture is enough for; its mask marks the subject."""
        self._dm, self._seed, self._steps, self._update = dm, seed, steps, update
        self._portrait = photograph
        side = dm.facts.native_side
        self._rooms = find_places(4, 1, (side, side), (0.58, 0.66))
        self._small = find_places(1, 3, (2 * side, 2 * side), (0.19, 0.21))[0]
        self._photograph = find_places(1, 5, (3 * side, 4 * side), (0.36, 0.4))[0]
        self.pictures = 0
        self.timings: dict[str, float] = {}
        self.first: Result

    def rows(self) -> list[Row]:
        """The rows of the sheet below the photographs."""
        return [
            self._identity_row(),
            self._edit_row(),
            self._token_row(),
            self._small_row(),
            self._photograph_row(),
            self._removal_row(),
            self._base_row(),
        ]

    def _identity_row(self) -> Row:
        tiles = [Figure(mark_region(self._rooms[0].image, self._rooms[0].mask), "where it is to stand")]
        tiles += [Figure(self._paint(place, _IDENTITY, k), f'"{_IDENTITY}"') for k, place in enumerate(self._rooms[:3])]
        note = (
            "Look for the blue body, the white foot and rim and the green heart; the subject was never in these rooms."
        )
        return Row("As itself", tiles, note)

    def _edit_row(self) -> Row:
        tiles = [
            Figure(self._paint(place, prompt, 20 + k, substitute="auto"), f'"{prompt}"')
            for k, (prompt, place) in enumerate(zip(_EDITS, self._rooms, strict=True))
        ]
        return Row(
            "Edited by text", tiles, "Look for what the prompt names, and for the subject's other parts beside it."
        )

    def _token_row(self) -> Row:
        portrait = self._portrait
        subject = self._dm.enroll(portrait.image, portrait.mask, class_name="mug", name="seen_once")
        tiles = [Figure(portrait.image, "all that is known of it")]
        prompts = ("a photo of a mug", "a photo of a mug", "a red mug")
        for k, (prompt, place) in enumerate(zip(prompts, self._rooms, strict=False)):
            picture = self._paint(place, prompt, k, subject=subject.name, token_count=MOST_TOKENS)
            tiles.append(Figure(picture, f'"{prompt}"'))
        self._dm.remove_subject(subject.name)
        note = "No training: one photograph, read in a tenth of a second. Compare with the trained subject above."
        return Row("From one photograph", tiles, note)

    def _small_row(self) -> Row:
        ways: dict[str, dict[str, float]] = {
            "whole frame only": {"lcg_fraction": 0.0},
            "local only": {"lcg_fraction": 1.0},
            "local, then global (default)": {},
        }
        tiles = [Figure(mark_region(self._small.image, self._small.mask), "a fifth of the frame's side")]
        for way, fields in ways.items():
            picture = self._paint(self._small, _IDENTITY, 50, **fields)
            tiles.append(Figure(enlarge_region(picture, self._small.mask), f"{way} (enlarged)"))
        return Row(
            "A small object", tiles, "Painted in the whole frame it blurs; painted locally it keeps more of its parts."
        )

    def _photograph_row(self) -> Row:
        place = self._photograph
        picture = self._paint(place, "a red sks mug on a wooden table", 60, substitute="auto")
        size = f"{place.image.width}x{place.image.height} pixels"
        tiles = [
            Figure(mark_region(place.image, place.mask), size),
            Figure(picture, "the same size, the rest untouched"),
        ]
        return Row("In a large picture, at its own resolution", tiles, "Look for the region's edge.")

    def _removal_row(self) -> Row:
        place = find_thing(self._dm.facts.native_side)
        by_text = self._paint(place, "", 80, subject="")
        removed = self._paint(place, "", 80, **REMOVAL)
        by_vae = self._paint(place, "", 80, **{**REMOVAL, "decoder": "vae"})
        tiles = [
            Figure(mark_region(place.image, place.mask), "what is to go"),
            Figure(by_text, "an empty prompt paints something"),
            Figure(removed, "`remove`"),
            Figure(enlarge_border(by_vae, place.mask), "decoded by the VAE (enlarged)"),
            Figure(enlarge_border(removed, place.mask), "by ASUKA's decoder, the default (enlarged)"),
        ]
        note = "Nothing is to stand where the thing stood; look for the region's edge in the enlarged parts."
        return Row("Taken out", tiles, note)

    def _base_row(self) -> Row:
        wanted = {
            "teapot": "a blue teapot with a white lid and a red heart",
            "bowl": "a green bowl with a yellow rim",
            "bottle": "a shiny orange bottle with a black cap",
            "house": "a pink house with a green roof and a white star",
        }
        tiles = []
        side = self._dm.facts.native_side
        for number, (shape, words) in enumerate(wanted.items()):
            (place,) = find_places(1, 10 + number, (side, side), (0.58, 0.66), shape)
            picture = self._paint(place, f"a photo of {words}", 70 + number, subject="")
            tiles.append(Figure(picture, f'"a photo of {words}"'))
        return Row("The base without the subject", tiles, "Look for each part that the prompt names, in its colour.")

    def _paint(self, place: Spot, prompt: str, number: int, **fields: Any) -> Image.Image:
        result = self._dm.inpaint(
            place.image,
            place.mask,
            prompt,
            seed=self._seed + number,
            num_inference_steps=self._steps,
            keep_stages=not self.pictures,
            **fields,
        )
        if not self.pictures:
            self.first = result
        self.pictures += 1
        for phase, spent in result.timings.items():
            self.timings[phase] = self.timings.get(phase, 0.0) + spent
        self._update("inpaint", min(1.0, self.pictures / _PICTURES), prompt)
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
    return lambda part, fraction, message: update(" ".join(dict.fromkeys((name, *part.split()))), fraction, message)


@contextmanager
def _measure(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
