"""Identity and edits of held-out subjects: what is trained, what is asked for, and what the judge makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dreammix_trt.building import build
from dreammix_trt.core.attributes import with_article
from dreammix_trt.engine import DreamMix
from dreammix_trt.evaluation.statistics import bootstrap_interval
from dreammix_trt.trainer.lora import train_lora
from dreammix_trt.trainer.micro import world
from dreammix_trt.trainer.micro.captions import subject_captions
from dreammix_trt.trainer.micro.judge import Judge, crop_of_mask, expected_reading
from dreammix_trt.trainer.micro.objects import COLOURS, TOPS, look_alike
from dreammix_trt.trainer.micro.scoring import PARTS, is_right

KEPT = ("shape", "colour", "pattern", *PARTS)


@dataclass(frozen=True)
class Edit:
    """One prompt for a subject. changed: the head it changes and its new word (None: identity); gone: the word of the
    subject's dictionary (`captions.dictionary_of`, which has no "plain") that TAS takes out."""

    kind: str
    prompt: str
    changed: tuple[str, str] | None
    gone: str | None


@dataclass(frozen=True)
class Verdict:
    """One judged picture. right: the edited part (None for identity); kept: share of the other parts; cosine: to the
    subject's photographs."""

    subject: int
    kind: str
    right: bool | None
    kept: float
    cosine: float

    @property
    def both(self) -> bool:
        """Whether the edited part is right and every other part is kept."""
        return bool(self.right) and self.kept == 1.0


def draw_edits(subject: world.Thing, rng: np.random.Generator, token: str = "sks") -> list[Edit]:
    """Identity, body colour, decal colour, pattern and top of one scene; new colours unlike those on the thing.

    token: the word before the class's name in prompts; "": none.
    """
    what = subject.attributes
    name = f"{token} {what.shape}".strip()
    free = [colour for colour in COLOURS if not any(look_alike(colour, other) for other in what.colours)]
    body, decal, top = (str(rng.choice(free or COLOURS)) for _ in range(3))
    pattern = str(rng.choice(["striped", "dotted", "checkered"]))
    decal_word = what.decal if what.decal in world.DECALS else "sticker"
    return [
        Edit("identity", f"a photo of {with_article(name)}", None, None),
        Edit("body colour", with_article(f"{body} {name}"), ("colour", body), what.colour),
        Edit(
            "decal colour",
            f"{with_article(name)} with {with_article(f'{decal} {decal_word}')}",
            ("decal_colour", decal),
            what.decal_colour,
        ),
        Edit("pattern", f"a {pattern} {name}", ("pattern", pattern), None if what.pattern == "plain" else what.pattern),
        Edit(
            "top colour",
            f"{with_article(name)} with {with_article(f'{top} {TOPS[what.shape]}')}",
            ("top", top),
            what.top,
        ),
    ]


def train_subject(subject: world.Thing, folder: Path, *, captioned: bool = True, **fields: Any) -> Path:
    """Photographs, LoRA and engine of one subject; returns the engine. captioned: with captions naming attributes."""
    world.write_photos(folder / "photos", subject)
    captions = subject_captions(subject.attributes) if captioned else ()
    train_lora(folder / "photos", subject.attributes.shape, folder / "lora", captions=captions, **fields)
    build(folder / "lora", out=folder / "engine", name="subject")
    return folder / "engine"


def judge_subject(
    number: int,
    subject: world.Thing,
    dm: DreamMix,
    judge: Judge,
    scenes: int,
    steps: int,
    *,
    tas: bool,
) -> list[Verdict]:
    """Every edit in `scenes` rooms, painted and judged."""
    photographs = judge.embed([crop_of_mask(image, mask > 0) for image, mask in world.render_photos(subject, 5)])
    rng, side = np.random.default_rng([91, number]), dm.facts.native_side
    verdicts = []
    for index in range(scenes):
        room = world.render_scene(rng, subject.attributes, side, float(rng.uniform(0.55, 0.72)) * side)
        mask = world.draw_mask(rng, room.box, *room.image.shape[:2])
        edits = draw_edits(subject, rng)
        fields: dict[str, Any] = {"seed": 100 * number + index, "num_inference_steps": steps}
        pictures = [
            paint_scene(dm, room, mask, edit.prompt, substitute=[edit.gone] if tas and edit.gone else [], **fields)
            for edit in edits
        ]
        crops = [crop_of_mask(picture, mask) for picture in pictures]
        cosines = judge.embed(crops) @ photographs.T
        for edit, reading, likeness in zip(edits, judge.read(crops), cosines, strict=True):
            wanted = expected_reading(subject.attributes)
            if edit.changed:
                wanted[edit.changed[0]] = edit.changed[1]
            others = [part for part in KEPT if wanted[part] != "none" and (not edit.changed or part != edit.changed[0])]
            kept = float(np.mean([is_right(reading, wanted, part) for part in others]))
            right = is_right(reading, wanted, edit.changed[0]) if edit.changed else None
            verdicts.append(Verdict(number, edit.kind, right, kept, float(likeness.mean())))
    return verdicts


def paint_scene(dm: DreamMix, scene: world.Scene, mask: NDArray[np.bool_], prompt: str, **fields: Any) -> world.Picture:
    """A prompt painted into a scene's background; uint8 (h, w, 3)."""
    result = dm.inpaint(Image.fromarray(scene.background), world.show_mask(mask), prompt, **fields)
    return np.asarray(result.images[0])


@dataclass(frozen=True)
class Share:
    """A mean over subjects with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_share(verdicts: Sequence[Verdict], field: str) -> Share:
    """The mean of a verdict's field, resampled over subjects."""
    subjects = sorted({verdict.subject for verdict in verdicts})
    means = [float(np.mean([float(getattr(v, field)) for v in verdicts if v.subject == s])) for s in subjects]
    mean = float(np.mean(means))
    return Share(mean, *(bootstrap_interval(means) or (mean, mean)))
