"""A small protocol of the embedded model's world: subjects it has never seen, rooms for them, prompts and what is to be
seen. `dreammix-trt eval --example FOLDER` writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dreammix_trt.core.attributes import with_article
from dreammix_trt.core.files import atomic_directory, write_json
from dreammix_trt.evaluation.protocol import FILE_NAME, SCENES, SCHEMA, SUBJECTS

if TYPE_CHECKING:
    from dreammix_trt.trainer.micro.world import Thing

STEPS = 12
_PHOTOGRAPHS = 5


def write_example(
    folder: Path,
    *,
    subjects: int = 2,
    scenes: int = 2,
    seed: int = 0,
    size: int = 256,
    progress: Callable[..., None] | None = None,
) -> None:
    """Write a protocol of held-out subjects (`world.held_out_subjects`), whole or not at all.

    folder: new, empty, or an earlier example, which is replaced.
    scenes: rooms a subject.
    size: of the pictures, pixels a side.

    Raises InputError for a folder with other files.
    """
    from dreammix_trt.trainer.micro import world

    with atomic_directory(folder, FILE_NAME) as made:
        entries = {}
        (made / SCENES).mkdir()
        things = world.held_out_subjects(subjects, seed)
        for number, thing in enumerate(things):
            name = f"{thing.attributes.shape}-{number + 1}"
            world.write_photos(made / SUBJECTS / name, thing, _PHOTOGRAPHS, seed + number, size)
            rng = np.random.default_rng([4244, seed, number])
            rooms = [f"{name}-room-{k + 1}" for k in range(scenes)]
            for room in rooms:
                _write_scene(made / SCENES, room, thing, rng, size)
            entries[name] = {**_ask(thing, rng), "scenes": rooms}
            if progress is not None:
                progress("subjects", (number + 1) / len(things), name)
        shared = {"num_inference_steps": STEPS}
        record = {"schema": SCHEMA, "name": "micro-sdxl", "seeds": [0], "request": shared, "subjects": entries}
        write_json(made / FILE_NAME, record)


def _ask(thing: Thing, rng: np.random.Generator) -> dict[str, Any]:
    """An entry of the protocol: identity, and edits of the body's and the top's colour and of the pattern."""
    from dreammix_trt.trainer.micro.captions import dictionary_of
    from dreammix_trt.trainer.micro.judge import expected_reading
    from dreammix_trt.trainer.micro.objects import COLOURS, TOPS, look_alike

    what = thing.attributes
    pattern = dictionary_of(what).attributes.get("pattern", ())
    subject = f"sks {what.shape}"
    free = [each for each in COLOURS if not any(look_alike(each, other) for other in what.colours)] or list(COLOURS)
    body, top = (str(rng.choice(free)) for _ in range(2))
    seen = {
        part: word
        for part, word in expected_reading(what).items()
        if word not in ("none", "other") and part != "finish"
    }
    edits = [
        {"prompt": with_article(f"{body} {subject}"), "substitute": [what.colour], "expected": {"colour": body}},
        {"prompt": f"a striped {subject}", "substitute": list(pattern), "expected": {"pattern": "striped"}},
    ]
    if what.top:
        words = with_article(f"{top} {TOPS[what.shape]}")
        edits.append({"prompt": f"a {subject} with {words}", "substitute": [what.top], "expected": {"top": top}})
    identity = [{"prompt": f"a photo of a {subject}"}]
    return {"class_name": what.shape, "token": "sks", "expected": seen, "identity": identity, "editing": edits}


def _write_scene(folder: Path, name: str, thing: Thing, rng: np.random.Generator, size: int) -> None:
    """A room without the thing, and a mask where it would stand."""
    from dreammix_trt.trainer.micro import world

    room = world.render_scene(rng, thing.attributes, size, float(rng.uniform(0.5, 0.7)) * size, build=thing.build)
    Image.fromarray(room.background).save(folder / f"{name}.png")
    world.show_mask(world.draw_mask(rng, room.box, size, size)).save(folder / f"{name}_mask.png")
