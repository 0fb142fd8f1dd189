"""Empty rooms of the embedded model's world with holes in them, as a protocol of removal: MISATO's kind of set, drawn
by rule. `dreammix-trt eval --example FOLDER --pairs 2000` writes it, and goes on where it was stopped."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.files import atomic_file, check_place, hold_alone, read_json, write_json
from dreammix_trt.evaluation.example import STEPS
from dreammix_trt.evaluation.metrics.truth import sum_boxes
from dreammix_trt.evaluation.protocol import FILE_NAME, SCENES, SCHEMA

MARKER: Final = "pairs.json"
NAME: Final = "micro-sdxl rooms"
_ROOM: Final = re.compile(r"[0-9]{4,}-[a-z-]+")  # as `_write_room` names them
_OUTLINES: Final = 0.4  # share of the holes that have a thing's outline; the others are boxes and superellipses


def write_pairs(
    folder: Path, count: int, *, seed: int = 0, size: int = 256, progress: Callable[..., None] | None = None
) -> None:
    """Write a protocol of empty rooms, in which a thing could stand where the hole is. What is there stays.

    folder: new, empty, or of an earlier call with the same seed and size, whether it was finished or not.
    count: of rooms; at least one.
    size: of the pictures, pixels a side.

    A room depends on the seed, its number and the size alone. Rooms are grouped by what the thing would stand on.

    Raises InputError for a folder with other files, or rooms of another seed or size.
    """
    check_place(folder, MARKER)
    facts = {"schema": SCHEMA, "seed": seed, "size": size}
    if (folder / MARKER).is_file() and (made := read_json(folder / MARKER)) != facts:
        raise InputError(
            f"{folder}: its rooms have seed {made.get('seed')} and {made.get('size')} pixels a side, not {seed} and "
            f"{size}; name another folder"
        )
    (folder / SCENES).mkdir(parents=True, exist_ok=True)
    with hold_alone(folder, "another program is drawing rooms"):
        write_json(folder / MARKER, facts)
        there = _find_rooms(folder / SCENES)
        rooms = []
        for number in range(count):
            rooms.append(there.get(number) or _write_room(folder / SCENES, number, seed, size))
            if progress is not None:
                progress("rooms", (number + 1) / count, rooms[-1])
        write_json(folder / FILE_NAME, _describe(rooms))


def _find_rooms(folder: Path) -> dict[int, str]:
    """Number -> name of the rooms that are there with their masks; other files are left."""
    names = [file.stem.removesuffix("_mask") for file in folder.glob("*_mask.png")]
    rooms = [name for name in names if _ROOM.fullmatch(name) and (folder / f"{name}.png").is_file()]
    return {int(name.partition("-")[0]): name for name in rooms}


def _write_room(folder: Path, number: int, seed: int, size: int) -> str:
    """Draw a room and its hole; returns its name. The mask comes last, so that what has one is whole."""
    from dreammix_trt.trainer.micro import world

    rng = np.random.default_rng([4245, seed, number])
    scene = world.render_scene(rng, None, size, float(rng.uniform(0.3, 0.7)) * size)
    outlined = rng.random() < _OUTLINES
    mask = _draw_outline(rng, scene.alpha) if outlined else world.draw_mask(rng, scene.box, size, size)
    name = f"{number:04d}-{scene.surface.replace(' ', '-')}"
    for picture, file in ((Image.fromarray(scene.background), name), (world.show_mask(mask), f"{name}_mask")):
        with atomic_file(folder / f"{file}.png") as temporary:
            picture.save(temporary, "PNG")
    return name


def _draw_outline(rng: np.random.Generator, alpha: NDArray[np.float32]) -> NDArray[np.bool_]:
    """A thing's silhouette, 2 to 6 % of the side larger at all sides."""
    reach = round(float(rng.uniform(0.02, 0.06)) * min(alpha.shape))
    return sum_boxes(np.where(alpha > 0.5, 1.0, 0.0), reach) > 0.5


def _describe(rooms: list[str]) -> dict[str, Any]:
    subjects: dict[str, Any] = {}
    for name in rooms:
        entry = subjects.setdefault(name.partition("-")[2], {"subject": "", "removal": [""], "scenes": []})
        entry["scenes"].append(name)
    shared = {"num_inference_steps": STEPS}
    return {"schema": SCHEMA, "name": NAME, "seeds": [0], "request": shared, "subjects": subjects}
