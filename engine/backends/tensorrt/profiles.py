"""The shapes for which an engine is built, and which of them a request may use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.lengths import Length, span_of

Shape = tuple[int, ...]
Span = tuple[int, int, int]  # of a side: the smallest, the one to be fastest at, the largest


@dataclass(frozen=True)
class Profile:
    """Shapes for which an engine is built.

    shapes: input -> the smallest shape, the one to be fastest at, and the largest.
    """

    shapes: Mapping[str, tuple[Shape, Shape, Shape]]

    def to_dict(self) -> dict[str, list[list[int]]]:
        """Plain JSON values: input -> its three shapes."""
        return {name: [list(shape) for shape in span] for name, span in self.shapes.items()}

    def holds(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether inputs of these shapes are within the profile."""
        return self.shapes.keys() == shapes.keys() and all(
            len(shape) == len(self.shapes[name][0])
            and all(
                low <= side <= high
                for low, side, high in zip(self.shapes[name][0], shape, self.shapes[name][2], strict=True)
            )
            for name, shape in shapes.items()
        )


def profiles_for(
    inputs: Sequence[Mapping[str, Any]],
    *,
    pictures: int,
    shapes: str,
    latent_side: int,
    step: int = 8,
    contexts: Sequence[Length] = (TOKENS,),
    call: str = "step",
) -> tuple[Profile, ...]:
    """Make the profiles of a network.

    inputs: {"name", "shape"} each, shapes with named axes.
    pictures: the most in a batch. One picture and the full batch, with one row a picture and with two, have profiles
        of their own: fixed sizes keep the kernels of a static plan. A last profile takes the batches between them.
    shapes: "static": latents of latent_side squared. "dynamic": from 0.69 to 1 times latent_side by 0.69 to 1.31, and
        the transpose, in multiples of `step` (SDXL: 88..128 by 88..168 at 128); `fits` bounds the area.
    contexts: lengths of the text condition; each has profiles of its own, for the same reason. A span of lengths has
        profiles for all of it, fastest in its middle.
    call: how the network is called (`NetworkKind.call`); a prompt, a frame or a subject always comes alone.

    H and W are eight times h and w. Raises InputError for other values.
    """
    if pictures < 1 or step < 1 or latent_side < step or latent_side % step:
        raise InputError(
            f"profiles for {pictures} pictures, latents of {latent_side} in steps of {step}: "
            "pictures must be at least 1, and the latent side a multiple of the step"
        )
    full = latent_side
    if shapes == "static":
        frames = [((full, full, full), (full, full, full))]
    elif shapes == "dynamic":
        low, high = (step * max(1, (side * full + 64 * step) // (128 * step)) for side in (88, 168))
        frames = [((low, full, full), (low, full, high)), ((low, full, high), (low, full, full))]
    else:
        raise InputError(f'shapes is {shapes!r}; give "static" or "dynamic"')
    batches = _list_batches(
        1 if call in ("prompt", "frame", "vae", "subject") else pictures, both=call not in ("prompt", "subject")
    )
    profiles = []
    for length, (h, w), (rows, count) in product(contexts, frames, batches):
        low, high = span_of(length)
        sides = {"rows": rows, "pictures": count, "context": (low, (low + high) // 2, high)}
        sides |= {"h": h, "w": w, "H": _scale_to_pixels(h), "W": _scale_to_pixels(w)}
        profiles.append(Profile({str(entry["name"]): _make_ranges(entry, sides) for entry in inputs}))
    return tuple(profile for index, profile in enumerate(profiles) if profile not in profiles[:index])


def _list_batches(pictures: int, *, both: bool) -> list[tuple[Span, Span]]:
    """The spans of rows and pictures of every profile, the fixed ones first, as the first that fits is taken.

    both: whether a picture may have two rows.
    """
    sizes = dict.fromkeys((1, pictures))
    fixed = [(k * count, count) for count in sizes for k in ((1, 2) if both else (1,))]
    batches: list[tuple[Span, Span]] = [((rows,) * 3, (count,) * 3) for rows, count in fixed]
    if pictures > 2:
        batches.append(((2, 2 * pictures, 2 * pictures), (2, pictures, pictures)))
    return batches


def fits(h: int, w: int, latent_side: int) -> bool:
    """Whether a latent of these sides has at most the area for which engines of `latent_side` are meant."""
    return h * w <= latent_side**2


def _make_ranges(entry: Mapping[str, Any], sides: Mapping[str, Span]) -> tuple[Shape, Shape, Shape]:
    for side in entry["shape"]:
        if isinstance(side, str) and side not in sides:
            raise InputError(f"input {entry['name']} has the unknown side {side!r}; known are {', '.join(sides)}")
    spans = [sides[side] if isinstance(side, str) else (side, side, side) for side in entry["shape"]]
    low, usual, high = (tuple(span[index] for span in spans) for index in range(3))
    return low, usual, high


def _scale_to_pixels(span: Span) -> Span:
    low, usual, high = span
    return 8 * low, 8 * usual, 8 * high
