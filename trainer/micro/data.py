"""Rendered scenes on disk, their latents, and the batches drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from dreammix_trt.trainer.data import latent_mask
from dreammix_trt.trainer.micro import objects, rooms, world
from dreammix_trt.trainer.micro.captions import caption, describe, name_form
from dreammix_trt.trainer.micro.parallel import Team
from dreammix_trt.trainer.micro.reading import list_answers, number_answers
from dreammix_trt.trainer.micro.tokenizer import PromptTokenizer
from dreammix_trt.trainer.micro.vae import encode, to_unit

EMPTY_SHARE = 0.10  # scenes shown without their thing
BLURRED_SHARE = 0.25  # scenes rendered small and scaled up, as a local crop is
_LEGIBLE = 9  # cells of the latents that a decal must cover for its form to be read
FORMS = (*objects.DECALS, "blot")
FACTS = np.dtype(
    [(name, np.int8) for name in ("shape", "colour", "pattern", "foot", "band", "top", "decal", "decal_colour")]
    + [("finish", np.int8), ("surface", np.int8), ("box", np.int32, 4), ("sharp", np.int32), ("empty", np.bool_)]
)  # one rendered scene; indices into world's tuples, -1 for a part that is not there
_WORDS: dict[str, tuple[str, ...]] = {
    "shape": objects.SHAPES,
    "colour": objects.COLOURS,
    "pattern": objects.PATTERNS,
    "foot": objects.COLOURS,
    "band": objects.COLOURS,
    "top": objects.COLOURS,
    "decal": FORMS,
    "decal_colour": objects.COLOURS,
    "finish": objects.FINISHES,
}


def pack_attributes(row: Any, what: objects.Attributes) -> None:
    """Write `what` into a FACTS row."""
    for name, words in _WORDS.items():
        word = getattr(what, name)
        row[name] = -1 if word is None else words.index(word)


def unpack_attributes(row: Any) -> objects.Attributes:
    """The attributes in a FACTS row."""
    return objects.Attributes(**{n: words[row[n]] if row[n] >= 0 else None for n, words in _WORDS.items()})  # type: ignore[arg-type]


def frame_sizes(native: int) -> dict[str, tuple[int, int]]:
    """(height, width) of each kind of frame: square, and two of 5:3."""
    short, long = native * 3 // 4, native * 5 // 4
    return {"square": (native, native), "wide": (short, long), "tall": (long, short)}


def kind_counts(scenes: int) -> dict[str, int]:
    """How many of `scenes` each kind of frame gets."""
    other = max(8, scenes // 18)
    return {"square": scenes - 2 * other, "wide": other, "tall": other}


def render_shard(team: Team, work: Path, native: int, scenes: int, seed: int) -> None:
    """Render this process' share.

    Into ``images_<kind>.npy`` (N, h, w, 3) uint8, ``facts_<kind>.npy`` (N,) FACTS, and ``details_<kind>.npy``
    (N, h/8, w/8) uint8: how much of a latent cell belongs to small parts, 255 for a decal all over it.
    """
    for number, (kind, size) in enumerate(frame_sizes(native).items()):
        count = kind_counts(scenes)[kind]
        paths = [work / f"{what}_{kind}.npy" for what in ("images", "facts", "details")]
        if team.leads:
            open_memmap(paths[0], "w+", np.uint8, (count, *size, 3))  # type: ignore[no-untyped-call]
            open_memmap(paths[1], "w+", FACTS, (count,))  # type: ignore[no-untyped-call]
            open_memmap(paths[2], "w+", np.uint8, (count, size[0] // 8, size[1] // 8))  # type: ignore[no-untyped-call]
        team.wait()
        images, facts, details = (np.load(path, "r+") for path in paths)
        for index in range(team.rank, count, team.size):
            rng = np.random.default_rng([seed, number, index])
            blurred = rng.random() < BLURRED_SHARE
            sharp = int(rng.uniform(0.45, 0.9) * min(size)) if blurred else None
            scene = world.render_scene(rng, None, size, sharp_side=sharp)
            empty = rng.random() < EMPTY_SHARE
            box = world.random_box(rng, *size) if empty else scene.box
            images[index] = scene.background if empty else scene.image
            details[index] = 0 if empty else _average_cells(scene.detail)
            pack_attributes(facts[index], scene.attributes)
            facts[index]["surface"] = rooms.SURFACES.index(scene.surface)
            facts[index]["box"], facts[index]["sharp"], facts[index]["empty"] = box, scene.sharp_side, empty
        team.wait()


def _average_cells(share: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The mean of each 8x8 cell of (H, W) in 0..1, as 0..255."""
    height, width = share.shape
    means = share.reshape(height // 8, 8, width // 8, 8).mean((1, 3))
    return np.asarray(np.rint(means * 255), np.uint8)


@torch.no_grad()  # type: ignore[untyped-decorator]
def encode_shard(team: Team, work: Path, vae: AutoencoderKL, native: int, seed: int) -> None:
    """Write ``latents_<kind>.npy`` float16 (N, 9, h/8, w/8): image latent, masked-image latent, latent mask."""
    for number, kind in enumerate(frame_sizes(native)):
        images, facts = np.load(work / f"images_{kind}.npy", "r"), np.load(work / f"facts_{kind}.npy")
        count, height, width = images.shape[:3]
        path = work / f"latents_{kind}.npy"
        if team.leads:
            open_memmap(path, "w+", np.float16, (count, 9, height // 8, width // 8))  # type: ignore[no-untyped-call]
        team.wait()
        latents = np.load(path, "r+")
        for start in range(team.rank * 16, count, team.size * 16):
            rows = range(start, min(start + 16, count))
            masks = [
                world.draw_mask(np.random.default_rng([seed, 50 + number, r]), _box(facts[r]["box"]), height, width)
                for r in rows
            ]
            pictures = to_unit(images[rows.start : rows.stop])
            holes = torch.from_numpy(np.stack(masks))[:, None]
            both = torch.cat([encode(vae, pictures), encode(vae, pictures * ~holes)]).numpy()
            latents[rows.start : rows.stop, :4] = both[: len(rows)]
            latents[rows.start : rows.stop, 4:8] = both[len(rows) :]
            latents[rows.start : rows.stop, 8] = np.stack([latent_mask(m) for m in masks])
        team.wait()


def _box(facts: NDArray[np.int32]) -> world.Box:
    return (int(facts[0]), int(facts[1]), int(facts[2]), int(facts[3]))


@dataclass(frozen=True)
class Asked:
    """Decals that are large enough to be read, and whose form the caption names.

    rows: int64 (M,), of the batch. corners: int64 (M, 2), top and left cell of what a reader sees of their latents.
    forms: int64 (M,), indices into FORMS.
    """

    rows: torch.Tensor
    corners: torch.Tensor
    forms: torch.Tensor


@dataclass(frozen=True)
class Told:
    """What captions say of things.

    boxes: float32 (N, 4), left, top, right and bottom of the things in cells. answers: int64 (N, questions), indices
    into the answers of QUESTIONS; UNASKED where a caption says nothing of it.
    """

    boxes: torch.Tensor
    answers: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """Everything one step needs; rows are samples. detail: where small parts are, (N, 1, h, w) in 0..1."""

    latents: torch.Tensor
    masked: torch.Tensor
    mask: torch.Tensor
    detail: torch.Tensor
    ids_one: torch.Tensor
    ids_two: torch.Tensor
    time_ids: torch.Tensor
    asked: Asked
    told: Told


class Latents:
    """The encoded scenes, read from disk as they are needed.

    reading: cells of a side of what a reader of decals sees.
    """

    def __init__(self, work: Path, model_dir: Path, native: int, seed: int, device: str) -> None:
        self.native, self.seed, self.device = native, seed, device
        self.reading = native * 3 // 64
        self.kinds = tuple(frame_sizes(native))
        self._latents = {k: np.load(work / f"latents_{k}.npy", "r") for k in self.kinds}
        self._details = {k: np.load(work / f"details_{k}.npy", "r") for k in self.kinds}
        self._facts: dict[str, NDArray[Any]] = {k: np.load(work / f"facts_{k}.npy") for k in self.kinds}
        self._centres = {k: _find_decals(self._details[k], self._facts[k]) for k in self.kinds}
        self._legible = {k: np.nonzero(centres[:, 0] >= 0)[0] for k, centres in self._centres.items()}
        self._things = np.nonzero(~self._facts["square"]["empty"])[0]
        self._tokens = PromptTokenizer(model_dir)
        self._grey = torch.from_numpy(np.load(work / "grey.npy"))

    def draw(self, rank: int, step: int, count: int, all_masked: float, decals: float = 0.0) -> Batch:
        """Whole frames; the batch depends on (seed, rank, step) alone.

        all_masked: share of rows with the whole frame to repaint. decals: share of rows chosen for a decal that can be
            read.
        """
        rng = np.random.default_rng([self.seed, 7, rank, step])
        shared = np.random.default_rng([self.seed, 8, step])  # all processes take the same kind, so none waits
        kind = self.kinds[int(shared.choice(3, p=[0.88, 0.06, 0.06]))]
        store, legible = self._latents[kind], self._legible[kind]
        rows = rng.integers(len(store), size=count)
        if decals and len(legible):
            rows = np.where(rng.random(count) < decals, legible[rng.integers(len(legible), size=count)], rows)
        facts, short = self._facts[kind], min(store.shape[2:]) * 8
        height, width = (8 * cells for cells in store.shape[2:])
        chosen = torch.from_numpy(np.asarray(store[rows], np.float32))
        latents, masked, mask = chosen[:, :4], chosen[:, 4:8].clone(), chosen[:, 8:9].clone()
        detail = torch.from_numpy(np.asarray(self._details[kind][rows], np.float32)[:, None] / 255)
        whole = torch.from_numpy(rng.random(count) < all_masked)
        mask[whole] = 1.0
        grey = torch.nn.functional.interpolate(self._grey, size=latents.shape[-2:], mode="nearest")
        masked[whole] = grey.expand(int(whole.sum()), -1, -1, -1)
        prompts, times = [], []
        for row in rows:
            fact = facts[row]
            sharp = int(fact["sharp"])
            what = None if fact["empty"] else unpack_attributes(fact)
            prompts.append(caption(rng, what, rooms.SURFACES[fact["surface"]]))
            factor = sharp / short if sharp < short else rng.uniform(0.98, 1.6)
            times.append((round(height * factor), round(width * factor), 0, 0, self.native, self.native))
        ids_one, ids_two = self._tokens(prompts)
        time_ids = torch.tensor(times, dtype=torch.float32)
        parts = {"latents": latents, "masked": masked, "mask": mask, "detail": detail, "time_ids": time_ids}
        parts |= {"ids_one": ids_one, "ids_two": ids_two}
        asked = self._ask(kind, rows, prompts)
        told = self._tell(facts[rows], prompts)
        return Batch(asked=asked, told=told, **{name: part.to(self.device) for name, part in parts.items()})

    def count_things(self) -> int:
        """How many square scenes have a thing in them."""
        return len(self._things)

    def read_things(self, numbers: NDArray[Any]) -> tuple[torch.Tensor, Told]:
        """(latents float32 (N, 4, h, w), all that could be said of the things) of some of these scenes."""
        rows = self._things[numbers]
        facts = self._facts["square"][rows]
        told = self._tell(facts, [describe(unpack_attributes(fact)) for fact in facts])
        return torch.from_numpy(np.asarray(self._latents["square"][rows], np.float32)[:, :4]), told

    def count_decals(self) -> int:
        """How many square scenes have a decal that can be read."""
        return len(self._legible["square"])

    def crop_decals(self, numbers: NDArray[Any], shifts: NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """(latents (N, 4, reading, reading), forms int64 (N,)) of some of these decals.

        shifts: (N, 2) down and right in cells, from the decals' middles.
        """
        rows, side = self._legible["square"][numbers], self.reading
        corners = self._frame_decals("square", rows, shifts)
        store = self._latents["square"]
        crops = [store[row][:4, y : y + side, x : x + side] for row, (y, x) in zip(rows, corners, strict=True)]
        forms = self._facts["square"]["decal"][rows].astype(np.int64)
        return torch.from_numpy(np.stack(crops).astype(np.float32)), torch.from_numpy(forms)

    def _tell(self, facts: NDArray[Any], prompts: Sequence[str]) -> Told:
        """What captions of these things say of them."""
        found = [
            {} if fact["empty"] else list_answers(unpack_attributes(fact), prompt)
            for fact, prompt in zip(facts, prompts, strict=True)
        ]
        answers = torch.tensor([number_answers(each) for each in found])
        boxes = torch.from_numpy(facts["box"].astype(np.float32) / 8)
        return Told(boxes.to(self.device), answers.to(self.device))

    def _ask(self, kind: str, rows: NDArray[Any], prompts: Sequence[str]) -> Asked:
        """Which decals of a batch have a form that its captions name."""
        forms = self._facts[kind]["decal"][rows].astype(np.int64)
        legible = self._centres[kind][rows, 0] >= 0
        named = [name_form(FORMS[form]) in prompt.split() for form, prompt in zip(forms, prompts, strict=True)]
        chosen = np.nonzero(legible & np.array(named))[0]
        values = (chosen, self._frame_decals(kind, rows[chosen], 0.0), forms[chosen])
        return Asked(*(torch.from_numpy(value).to(self.device) for value in values))

    def _frame_decals(self, kind: str, rows: NDArray[Any], shifts: NDArray[Any] | float) -> NDArray[np.int64]:
        """Top and left cell, int64 (N, 2), of what a reader sees of these decals."""
        corners = np.rint(self._centres[kind][rows] - self.reading / 2 + shifts)
        most = np.array(self._latents[kind].shape[2:]) - self.reading
        return np.asarray(np.clip(corners, 0, most), np.int64)


def _find_decals(details: NDArray[np.uint8], facts: NDArray[Any]) -> NDArray[np.float32]:
    """The middle (down, right) in cells of each scene's decal, float32 (N, 2); -1 where none is large enough."""
    found = np.full((len(details), 2), -1, np.float32)
    for row, detail in enumerate(details):
        cells = np.argwhere(detail > 128)  # more than what is a foot's or a rim's
        if not facts["empty"][row] and facts["decal"][row] >= 0 and len(cells) >= _LEGIBLE:
            found[row] = cells.mean(0) + 0.5
    return found
