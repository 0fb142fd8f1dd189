"""What the ablation paints: trainings, places and prompts, as frozen values whose text is their key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Final, Literal

import numpy as np
from _micro_subjects import Edit, draw_edits
from numpy.typing import NDArray

from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.engine.retrieval import retrieve
from dreammix_trt.trainer.micro import world
from dreammix_trt.trainer.micro.captions import describe, dictionary_of
from dreammix_trt.trainer.micro.objects import View
from dreammix_trt.trainer.recipes import SMALL

REVISION: Final = 1  # of what a key does not tell: scenes, prompts, how pictures are read
SIDE: Final = 256
SHARES: Final = (0.2, 0.7)  # of the frame's side that a thing takes, log-uniform
Regular = Literal["class", "attributes"]


@dataclass(frozen=True)
class Training:
    """How a subject's LoRA is trained.

    captioned: whether its captions name attributes.
    regular: what the regular pictures show: the class alone, or combined attributes.
    """

    captioned: bool = True
    regular: Regular = "attributes"
    beta: float = SMALL.beta
    rank: int = SMALL.rank
    steps: int = SMALL.steps


DREAMBOOTH: Final = Training(captioned=False, regular="class")
ADM: Final = Training()


@dataclass(frozen=True)
class Way:
    """A row of a table: how a subject is trained, and how it is painted.

    training: None: the base alone paints the subject's full description.
    auto: whether TAS takes out what the prompt contradicts.
    fields: of the requests.
    source: what else the picture comes from, a frozen dataclass; None: nothing else.
    """

    name: str
    training: Training | None
    auto: bool = False
    fields: tuple[tuple[str, Any], ...] = ()
    source: Any = None


WHOLE: Final = (("lcg_fraction", 0.0),)
LOCAL: Final = (("lcg_fraction", 1.0),)
REAL: Final = "real rendering"  # no picture of ours: what the judge makes of the world's own
TABLE: Final = (
    Way("baseline", DREAMBOOTH, fields=WHOLE),
    Way("+DIF", DREAMBOOTH),
    Way("++TAS", DREAMBOOTH, auto=True),
    Way("+++ADM", ADM, auto=True),
    Way("DIF and ADM, no TAS", ADM),
)


@dataclass(frozen=True)
class Sweep:
    """A part of the ablation: its rows, and whether they are painted at fixed sizes, and edited.

    axis: what changes, for the figure; "" for a table.
    """

    ways: tuple[Way, ...]
    axis: str = ""
    shares: tuple[float, ...] = ()
    edits: bool = True


def sweep_sizes(training: Training | None) -> Sweep:
    """Object size against the three ways to paint."""
    ways = (("whole frame", WHOLE), ("local", LOCAL), ("both", ()))
    return Sweep(
        tuple(Way(name, training, fields=fields) for name, fields in ways),
        "object's side / frame's side",
        (0.15, 0.2, 0.3, 0.45, 0.65),
        edits=False,
    )


SWEEPS: Final = {
    "table": Sweep(TABLE),
    "size": sweep_sizes(ADM),
    "size-base": sweep_sizes(None),  # without any training
    "lcg": Sweep(
        tuple(
            Way(f"{share:.3g}", ADM, True, (("lcg_fraction", share),))
            for share in (0.0, 0.2, 0.4, 2 / 3, 0.8, 0.9, 1.0)
        ),
        "share of local steps",
    ),
    "picture-steps": Sweep(
        tuple(Way(f"{steps}", ADM, True, (("num_inference_steps", steps),)) for steps in (4, 6, 8, 12, 20, 30)),
        "steps of a picture",
    ),
    "asuka": Sweep(
        (
            Way("VAE decoder, no prior", ADM, True),
            Way("ASUKA's decoder", ADM, True, (("decoder", "asuka"),)),
            Way("prior negative", ADM, True, (("prior", "negative"),)),
            Way("prior concat", ADM, True, (("prior", "concat"),)),
        )
    ),
    "beta": Sweep(
        tuple(
            Way(f"{beta:.3g}", replace(ADM, beta=beta), True) for beta in (0.0, SMALL.beta, 3 / 7)
        ),
        "beta",
    ),
    "rank": Sweep(tuple(Way(f"{rank}", replace(ADM, rank=rank), True) for rank in (1, 4, 16)), "rank"),
    "steps": Sweep(
        tuple(Way(f"{steps}", replace(ADM, steps=steps), True) for steps in (250, 1000, 2000)), "training steps"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a subject is painted. share: of the frame's side; 0: drawn from SHARES."""

    subject: int
    scene: int
    share: float = 0.0


@dataclass(frozen=True)
class Case:
    """One picture. seed: 0 for the first of a place."""

    way: Way
    place: Place
    edit: Edit
    seed: int
    steps: int

    @property
    def task(self) -> str:
        return "editing" if self.edit.changed else "identity"

    @property
    def row(self) -> str:
        """The row of the table that it counts in."""
        return f"{self.way.name} at {self.place.share:g}" if self.place.share else self.way.name

    @cached_property
    def substitute(self) -> tuple[str, ...]:
        """The words that TAS takes out: what `substitute="auto"` finds."""
        if not self.way.auto:
            return ()
        known = dictionary(self.place.subject)
        return retrieve(self.edit.prompt, known.attributes, known.class_name, "sks").words

    @property
    def fields(self) -> dict[str, Any]:
        """Of its request. The noise is the same in every row."""
        number = 10_000 * self.place.subject + 100 * self.place.scene + self.seed
        shared = {"seed": number, "num_inference_steps": self.steps, "substitute": list(self.substitute)}
        return {**shared, **dict(self.way.fields)}


@dataclass(frozen=True)
class Plan:
    """The pictures of one part, subject by subject and LoRA by LoRA."""

    sweep: Sweep
    subjects: int
    scenes: int
    seeds: int
    steps: int
    kinds: Sequence[str] = field(default=("body colour", "decal colour", "pattern", "top colour"))

    def cases(self) -> Iterator[Case]:
        """Identity and one edit in each scene; the edits take turns."""
        trainings = dict.fromkeys(way.training for way in self.sweep.ways)
        for subject in range(self.subjects):
            for training in trainings:
                for way in (way for way in self.sweep.ways if way.training == training):
                    yield from self._paint(way, subject)

    def _paint(self, way: Way, subject: int) -> Iterator[Case]:
        for scene in range(self.scenes):
            edits = {edit.kind: edit for edit in edits_of(subject, scene)}
            wanted = [edits["identity"]] if way.training else [describe_subject(subject)]
            wanted += [edits[self.kinds[scene % len(self.kinds)]]] if self.sweep.edits else []
            for share in self.sweep.shares or (0.0,):
                for edit in wanted:
                    for seed in range(self.seeds):
                        yield Case(way, Place(subject, scene, share), edit, seed, self.steps)


@lru_cache
def subject(number: int) -> world.Thing:
    """A subject that the base has never seen."""
    return world.held_out_subjects(number + 1)[number]


def dictionary(number: int) -> AttributeDictionary:
    """Its attributes, as its owner would write them down."""
    return dictionary_of(subject(number).attributes)


def share_of(place: Place) -> float:
    """The share of the frame's side that the thing takes there."""
    return place.share or _draw_share(_room_dice(place))


def _room_dice(place: Place) -> np.random.Generator:
    return np.random.default_rng([91, place.subject, place.scene])


def _draw_share(rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(*np.log(SHARES))))


@lru_cache(maxsize=32)
def draw_place(
    place: Place, edit: Edit | None = None, pose: View | None = None
) -> tuple[world.Scene, NDArray[np.bool_]]:
    """The room with the thing, and the mask bool (256, 256).

    edit: what is changed of the thing that stands there. pose: from where it is seen; None: as drawn.
    """
    rng = _room_dice(place)
    drawn = _draw_share(rng)
    thing = subject(place.subject)
    what = replace(thing.attributes, **dict([edit.changed])) if edit and edit.changed else thing.attributes
    scene = world.render_scene(rng, what, SIDE, (place.share or drawn) * SIDE, build=thing.build, pose=pose)
    return scene, world.draw_mask(np.random.default_rng([92, place.subject, place.scene]), scene.box, SIDE, SIDE)


def edits_of(number: int, scene: int, token: str = "sks") -> list[Edit]:
    """What is asked for in a scene, identity first. token: as `draw_edits` has it."""
    return draw_edits(subject(number), np.random.default_rng([93, number, scene]), token)


def describe_subject(number: int) -> Edit:
    """What the base alone is asked for."""
    return Edit("identity", describe(subject(number).attributes), None, None)


def key_of(*facts: Any) -> str:
    """16 hex digits that change with any of the facts."""
    return hashlib.sha256(json.dumps([REVISION, *facts], sort_keys=True).encode()).hexdigest()[:16]


def lora_facts(number: int, training: Training | None) -> list[Any]:
    """All that decides a LoRA beside the base. Where beta is 0, no regular picture is asked for."""
    if training is None:
        return ["base"]
    told = asdict(training)
    if training.beta == 0:
        told["regular"] = ""
    return ["lora", asdict(subject(number)), told]


def picture_facts(case: Case) -> list[Any]:
    """All that decides a picture and its reading beside the base and the LoRA."""
    source = case.way.source
    told = [] if source is None else [type(source).__name__, asdict(source)]
    return ["picture", asdict(case.place), case.edit.prompt, case.edit.changed, case.fields, *told]
