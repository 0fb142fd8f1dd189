"""What the evidence of ASUKA paints: rooms with a hole, and the ways to leave it empty."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np
from _ablation_cases import key_of
from numpy.typing import NDArray

from dreammix_trt.core.removal import REMOVAL
from dreammix_trt.trainer.micro import world

SIDE: Final = 256
SHARES: Final = (0.3, 0.7)  # of the frame's side that the thing takes whose place the hole is
Room = Literal["empty room", "thing's room"]
Kind = Literal["text", "prior", "trial"]


@dataclass(frozen=True)
class Way:
    """One way to fill a hole with nothing.

    kind: "text": what a user without ASUKA can do; "prior": what one with it can; "trial": to compare, in fewer rooms.
    fields: of the request.
    """

    name: str
    kind: Kind
    prompt: str = ""
    fields: tuple[tuple[str, Any], ...] = ()


def remove_with(**fields: Any) -> tuple[tuple[str, Any], ...]:
    """The fields of a removal, and others instead."""
    return tuple({**REMOVAL, **fields}.items())


_THINGS: Final = ", ".join(f"a {shape}" for shape in world.SHAPES)
_EMPTY: Final = "an empty table"
REMOVE: Final = Way("remove", "prior", fields=remove_with())
WAYS: Final = (
    Way('text ""', "text"),
    Way(f'text "{_EMPTY}"', "text", _EMPTY),
    Way(f'text "{_EMPTY}", negative: all things', "text", _EMPTY, (("negative_prompt", _THINGS),)),
    Way('text "", local, all patched', "text", fields=(("lcg_fraction", 1.0), ("patched_fraction", 1.0))),
    Way("remove, prior_weight towards 0", "trial", fields=remove_with(prior_weight=1e-6)),
    REMOVE,
    Way("remove, prior_weight 0.5", "trial", fields=remove_with(prior_weight=0.5)),
    Way("remove, prior_weight 1", "trial", fields=remove_with(prior_weight=1.0)),
    Way("remove, prior_weight 2", "trial", fields=remove_with(prior_weight=2.0)),
    Way("remove, local stage alone", "trial", fields=remove_with(lcg_fraction=1.0)),
    Way("remove, whole frame", "trial", fields=remove_with(lcg_fraction=0.0)),
    Way("remove, decoder of the VAE", "trial", fields=remove_with(decoder="vae")),
    Way(f'text "{_EMPTY}", prior negative', "prior", _EMPTY, (("prior", "negative"),)),
    Way('text "", prior negative', "trial", fields=(("prior", "negative"),)),
    Way(f'text "{_EMPTY}", prior concat', "prior", _EMPTY, (("prior", "concat"),)),
)  # fmt: skip
#: ways that are painted where a thing stands, too: its shadow stays outside the hole
BRIEF: Final = (WAYS[0], WAYS[1], REMOVE)


def count_rooms(way: Way, rooms: int, brief: bool = False) -> int:
    """In how many of the rooms a way is painted: in a quarter where it is a trial, or the comparison is `brief`."""
    return -(-rooms // 4) if brief or way.kind == "trial" else rooms


@lru_cache(maxsize=8)
def draw_room(number: int) -> tuple[world.Scene, NDArray[np.bool_]]:
    """A room that the base has never seen, with a held-out thing, and the hole in its place, bool (256, 256)."""
    rng = np.random.default_rng([95, number])
    what = world.random_attributes(rng, held_out=True, shape=world.SHAPES[number % len(world.SHAPES)])
    scene = world.render_scene(rng, what, SIDE, float(rng.uniform(*SHARES)) * SIDE)
    return scene, world.draw_mask(rng, scene.box, SIDE, SIDE)


def key_of_picture(painter: str, way: Way, room: Room, number: int) -> str:
    """16 hex digits that change with all that decides a picture. painter: what identifies who paints."""
    return key_of("asuka", painter, way.prompt, sorted(way.fields), room, number)
