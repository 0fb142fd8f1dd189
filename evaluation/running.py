"""One evaluation: what is missing is painted, everything is measured, tables and page are kept up to date."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.files import check_place, hold_alone, write_json
from dreammix_trt.core.masks import read_mask
from dreammix_trt.core.pictures import PictureIn, read_image
from dreammix_trt.core.remarks import keep_remarks
from dreammix_trt.core.request import Request
from dreammix_trt.evaluation.metrics.metric import U8, Mask, Metric, Sample
from dreammix_trt.evaluation.painter import Painter, Painting
from dreammix_trt.evaluation.pictures import FOLDER, Gallery
from dreammix_trt.evaluation.protocol import Order, Protocol, Scene
from dreammix_trt.evaluation.results import Results

log = logging.getLogger(__name__)
MARKER: Final = "run.json"
_TOLD: Final = 5
Update = Callable[[str, float, str], None]


def evaluate(
    protocol: Protocol,
    painter: Painter,
    metrics: Sequence[Metric],
    out: Path,
    *,
    facts: Mapping[str, Any] | None = None,
    references: Path | None = None,
    force: bool = False,
    update_every: int = 25,
    progress: Update | None = None,
) -> dict[str, Any]:
    """Paint what is missing of a protocol, measure every picture, and write tables and page.

    Can be stopped at any time and given again: pictures that are there are measured, not painted. Memory does not grow
    with the number of pictures.

    out: a folder that is new, empty, or of an earlier evaluation.
    facts: of the run, for its tables.
    references: SUBJECT/PICTURE.png for every picture, such as another evaluation's `pictures`; None: pictures are
        compared with their scene, outside the mask.
    force: paint anew what was made with other settings; else it is refused.
    update_every: pictures after which tables and page are written.

    Returns the summary. Raises InputError before anything is painted: for subjects and prompts that the painter
    refuses, for pictures of other settings, for references that are missing or of another size.
    """
    check_place(out, MARKER)
    update = progress or (lambda *_: None)
    gallery = Gallery(out, painter, protocol.fields)
    for warning in _check_requests(protocol, painter, gallery):
        log.warning("%s", warning)
    changed = _find_changes(protocol, gallery, force=force)
    if references is not None:
        _check_references(protocol, references)
    out.mkdir(parents=True, exist_ok=True)
    with hold_alone(out, "another evaluation is writing"):
        run = {"protocol": {"name": protocol.name, "sha256": protocol.digest()}, **(facts or {})}
        write_json(out / MARKER, run)
        _name_strangers(protocol, gallery)
        results = Results(out, metrics, run, len(protocol))
        try:
            _Round(painter, gallery, results, references, changed).go(protocol, update_every, update)
            return results.publish(final=True)
        finally:
            results.close()


class _Round:
    """Goes through the pictures once."""

    def __init__(
        self, painter: Painter, gallery: Gallery, results: Results, references: Path | None, changed: bool
    ) -> None:
        self._painter, self._gallery, self._results = painter, gallery, results
        self._references, self._changed = references, changed
        self._scene: tuple[Scene, U8, Mask, str] | None = None
        self._opened, self._opened_name = ExitStack(), ""

    def go(self, protocol: Protocol, update_every: int, update: Update) -> None:
        subject = None
        with self._opened:
            for order in protocol.orders():
                update("pictures", self._results.measured / len(protocol), order.name)
                if order.subject is not subject:
                    subject = order.subject
                    self._results.photographs[subject.name] = self._gallery.shrink_photographs(order)
                self._take(order)
                if self._results.measured % update_every == 0:
                    self._results.publish(final=False)

    def _take(self, order: Order) -> None:
        """Paint a picture where it is missing or to be made anew, then measure it."""
        recipe = self._gallery.make_recipe(order)
        change = self._gallery.find_change(order, recipe)
        seconds: float | None = None
        warnings: tuple[str, ...] = ()
        if change is None or (change and self._changed):
            painting = self._paint(order, recipe.request)
            self._gallery.keep(order, recipe, painting)
            seconds, warnings = painting.seconds, painting.warnings
        facts = {
            "picture": f"{FOLDER}/{order.name}.png",
            "subject": order.subject.name,
            "scene": order.scene.name,
            "task": order.prompt.task,
            "prompt_name": order.prompt.name,
            "prompt": order.prompt.text,
            "substitute": ", ".join(self._gallery.read_request(order).substitute),
            "seed": order.seed,
            "painted_seconds": "" if seconds is None else f"{seconds:.3f}",
            "thumbnail": self._gallery.shrink(order),
            "warnings": " ".join(warnings),
        }
        sample, facts["scene_thumbnail"] = self._make_sample(order)
        values = {each.name: each.add(sample) for each in self._results.metrics if not each.missing}
        self._results.add(facts, values, painted=seconds is not None)

    def _paint(self, order: Order, request: Request) -> Painting:
        """Paint a picture. Its subject stays open for those that follow."""
        if self._opened_name != order.subject.name:
            self._opened.close()
            self._opened.enter_context(self._painter.open(order.subject))
            self._opened_name = order.subject.name
        return self._painter.paint(order.scene, request)

    def _make_sample(self, order: Order) -> tuple[Sample, str]:
        """The picture, read from its file, so that it does not matter when it was painted."""
        if self._scene is None or self._scene[0] != order.scene:
            picture, mask = _read_scene(order.scene)
            self._scene = order.scene, picture.seen, mask, self._gallery.shrink_scene(order.scene)
        _, scene, mask, thumbnail = self._scene
        image = read_image(self._gallery.place(order), name="picture").seen
        reference = None
        if self._references is not None:
            reference = read_image(self._references / f"{order.name}.png", name="reference").seen
        expected = dict(order.prompt.expected)
        sample = Sample(image, scene, mask, order.subject, order.prompt.text, order.prompt.task, expected, reference)
        return sample.hold_against_scene() if order.prompt.task == "removal" else sample, thumbnail


def _read_scene(scene: Scene) -> tuple[PictureIn, Mask]:
    with keep_remarks(tell=False):  # they were told when the protocol was read
        picture = read_image(scene.image, name="scene")
        return picture, read_mask(scene.mask, picture, name="mask") > 127


def _check_requests(protocol: Protocol, painter: Painter, gallery: Gallery) -> list[str]:
    """Have the painter look at every prompt in one scene and at every scene with one prompt; returns its warnings."""
    warnings: dict[str, None] = {}
    for subject in protocol.subjects:
        first = Order(subject, subject.scenes[0], subject.prompts[0], protocol.seeds[0])
        pairs = [(first.scene, prompt) for prompt in subject.prompts]
        pairs += [(scene, first.prompt) for scene in subject.scenes[1:]]
        try:
            with painter.open(subject):
                for scene, prompt in pairs:
                    order = Order(subject, scene, prompt, first.seed)
                    said = painter.check(scene, gallery.make_recipe(order).request)
                    warnings |= dict.fromkeys(f"subjects.{subject.name}, {prompt.name}: {each}" for each in said)
        except InputError as error:
            raise InputError(f"{protocol.folder}: {error}") from error
    return list(warnings)


def _find_changes(protocol: Protocol, gallery: Gallery, *, force: bool) -> bool:
    """Whether pictures are there that were made with other settings. Raises InputError for them without `force`."""
    changes: list[str] = []
    count = 0
    for order in protocol.orders():
        if change := gallery.find_change(order, gallery.make_recipe(order)):
            count += 1
            changes += [f"{order.name}.png: {change}"] * (len(changes) < _TOLD)
    if count and not force:
        what = f"{gallery.folder} holds {count} pictures that were made with other settings; --force paints them anew"
        more = [f"and {count - len(changes)} more"] if count > len(changes) else []
        raise InputError("\n".join([f"{what}, or name another folder:", *changes, *more]))
    if count:
        log.warning("%s: %d pictures of other settings are painted anew, such as %s", gallery.folder, count, changes[0])
    return bool(count)


def _check_references(protocol: Protocol, references: Path) -> None:
    """Refuse a folder in which a reference is missing or has another size than its scene."""
    scene, wanted = None, (0, 0)
    for order in protocol.orders():
        if order.scene != scene:
            scene, wanted = order.scene, _read_scene(order.scene)[0].size
        file = references / f"{order.name}.png"
        if not file.is_file():
            raise InputError(f"--references {references}: has no {order.name}.png; give one for each picture")
        try:
            with Image.open(file) as picture:
                width, height = picture.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{file}: cannot be read as a picture ({error})") from error
        if (height, width) != wanted:
            raise InputError(
                f"{file}: is {width}x{height}, but its scene {wanted[1]}x{wanted[0]}; give its own picture"
            )


def _name_strangers(protocol: Protocol, gallery: Gallery) -> None:
    """Say which pictures are there that the protocol does not ask for; they stay, and count nowhere."""
    known = {gallery.place(order).relative_to(gallery.folder).as_posix() for order in protocol.orders()}
    there = sorted(file.relative_to(gallery.folder).as_posix() for file in gallery.folder.glob("*/*.png"))
    strangers = [name for name in there if name not in known]
    if strangers:
        log.warning(
            "%s: %d pictures are not of this protocol, and are left alone: %s%s",
            gallery.folder, len(strangers), ", ".join(strangers[:_TOLD]), ", ..." if len(strangers) > _TOLD else "",
        )  # fmt: skip
