"""What the evidence of token subjects paints: the ways to tell the base what a subject looks like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final, Literal

from _ablation_cases import DREAMBOOTH, Case, Place, Way, edits_of, subject
from _micro_subjects import Edit

from dreammix_trt.trainer.micro import world
from dreammix_trt.trainer.micro.captions import describe

#: photographs of a subject. They take turns as the reference, scene by scene: so one that is seen from the middle, and
#: is like all views a little, does not look like the favourite of a painter who never saw it
PHOTOGRAPHS: Final = 5
SCENES_OF_A_ROUND: Final = PHOTOGRAPHS
KINDS: Final = ("body colour", "decal colour", "pattern", "top colour")
COUNTS: Final = (1, 4, 8, 16, 24, 48)
DEFAULT_COUNT: Final = 24
Choice = Literal["discriminative", "random"]


@dataclass(frozen=True)
class Reference:
    """A picture that also comes from the scene's reference.

    choice: of the object's cells that become tokens: the engine's own, or drawn by chance.
    adapter: sha256 of the adapter's file.
    """

    choice: Choice
    adapter: str


@dataclass(frozen=True)
class Rendering:
    """Nothing is painted: the world renders what is asked for.

    posed: seen as the reference is, else from where the scene has it.
    """

    posed: bool


NONE: Final = "no reference"
WORDS: Final = "no reference, all in words"
RANDOM: Final = "random 24 tokens"
UNDECOUPLED: Final = "24 tokens, no decoupling"
LORAS: Final = {"LoRA 200 steps": 200, "LoRA 800 steps": 800}
BOTH: Final = "24 tokens and LoRA 200"
REAL: Final = "real rendering"
REAL_POSED: Final = "real rendering, posed as the reference"


def name_count(count: int) -> str:
    """The row of so many discriminative tokens."""
    return "1 token" if count == 1 else f"{count} tokens"


TOKENS: Final = name_count(DEFAULT_COUNT)


def list_ways(adapter: str, undecoupled: str = "") -> tuple[Way, ...]:
    """Every row of the table, in its order.

    adapter, undecoupled: sha256 of the adapters; "": there is no such adapter, and so no such row.
    """

    def speak(name: str, count: int, choice: Choice = "discriminative", made_by: str = adapter) -> Way:
        return Way(name, None, fields=(("token_count", count),), source=Reference(choice, made_by))

    loras = [Way(name, replace(DREAMBOOTH, steps=steps), auto=True) for name, steps in LORAS.items()]
    return (
        Way(NONE, None),
        Way(WORDS, None),
        *(speak(name_count(count), count) for count in COUNTS),
        speak(RANDOM, DEFAULT_COUNT, "random"),
        *([speak(UNDECOUPLED, DEFAULT_COUNT, made_by=undecoupled)] if undecoupled else []),
        *loras,
        replace(speak(BOTH, DEFAULT_COUNT), training=loras[0].training, auto=True),
        Way(REAL, None, source=Rendering(posed=False)),
        Way(REAL_POSED, None, source=Rendering(posed=True)),
    )


@dataclass(frozen=True)
class SubjectPlan:
    """The pictures, subject by subject: those of the first ones make a table of their own.

    ways: rows.
    first: the first subject.
    loras: how many subjects of the plan have LoRAs.
    """

    ways: Sequence[Way]
    subjects: int
    scenes: int
    steps: int
    loras: int
    first: int = 0
    kinds: Sequence[str] = field(default=KINDS)

    def cases(self) -> Iterator[Case]:
        """As itself and one edit in each scene; the edits take turns."""
        for number in range(self.first, self.first + self.subjects):
            for way in self.ways:
                if way.training is None or number < self.first + self.loras:
                    yield from self._paint(way, number)

    def _paint(self, way: Way, number: int) -> Iterator[Case]:
        for scene in range(self.scenes):
            edits = {edit.kind: edit for edit in edits_of(number, scene, "sks" if way.training else "")}
            for edit in (edits["identity"], edits[self.kinds[scene % len(self.kinds)]]):
                wanted = tell_all(number, edit) if way.name == WORDS else edit
                yield Case(way, Place(number, scene), wanted, 0, self.steps)


def tell_all(number: int, edit: Edit) -> Edit:
    """The edit with a prompt that names everything there is a word for."""
    changed: dict[str, Any] = dict([edit.changed]) if edit.changed else {}
    return replace(edit, prompt=describe(replace(subject(number).attributes, **changed)))


def reference_of(place: Place) -> int:
    """The number of the photograph that is the reference in a scene."""
    return place.scene % PHOTOGRAPHS


@lru_cache(maxsize=4)
def portraits(number: int) -> tuple[world.Scene, ...]:
    """The scenes of a subject's photographs: those that LoRAs are trained on, too."""
    return tuple(world.render_portraits(subject(number), PHOTOGRAPHS))
