"""Training of the judge on rendered things (see judge.py for how it runs)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch.nn import functional

from dreammix_trt.trainer.micro import world
from dreammix_trt.trainer.micro.data import unpack_attributes
from dreammix_trt.trainer.micro.judge import (
    FACTS_FILE,
    HEADS,
    LAYERS,
    SIDE,
    WEIGHTS_FILE,
    Judge,
    crop_of_mask,
    expected_reading,
)
from dreammix_trt.trainer.micro.loop import take_step
from dreammix_trt.trainer.micro.objects import COLOURS, DECALS, UNNAMED_DECALS, Attributes, Build, look_alike
from dreammix_trt.trainer.micro.parallel import Team
from dreammix_trt.trainer.micro.readers import ask_all
from dreammix_trt.trainer.networks import choose_precision

log = logging.getLogger(__name__)
_CHANNELS = (3, 24, 48, 64, 96)
_FRAME = 144  # side of the rendered views
_VIEWS = 3  # of each thing
_SIZES = [len(words) for words in HEADS.values()]


class _Trunk(torch.nn.Module):  # type: ignore[misc]
    """Four 3x3 convolutions with pooling and one hidden layer: pictures (N, 3, 96, 96) -> (N, 160)."""

    def __init__(self) -> None:
        super().__init__()
        for layer in range(LAYERS):
            self.add_module(f"conv{layer}", torch.nn.Conv2d(_CHANNELS[layer], _CHANNELS[layer + 1], 3, padding=1))
        self.hidden = torch.nn.Linear(_CHANNELS[-1] * (SIDE // 16) ** 2, 160)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in range(LAYERS):
            x = functional.max_pool2d(functional.relu(self.get_submodule(f"conv{layer}")(x)), 2)
        return functional.relu(self.hidden(functional.dropout(x.flatten(1), 0.1, self.training)))


class Classifier(torch.nn.Module):  # type: ignore[misc]
    """Two trunks, the heads and the embedding: 1.4 M parameters.

    A decal's form has a trunk of its own, which learns from pictures whose colours are shuffled: colours tell which
    thing it is, and so, for a thing seen in training, what its decal was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.form = _Trunk(), _Trunk()
        self.out = torch.nn.Linear(160, sum(_SIZES[:-1]))
        self.same = torch.nn.Linear(160, 64)
        self.decal = torch.nn.Linear(160, _SIZES[-1])

    def forward(self, x: torch.Tensor, forms: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of every head and embeddings (N, 64) of unit length.

        forms: the pictures in which a decal's form is read; None: x.
        """
        hidden = self.whole(x)
        logits = torch.cat([self.out(hidden), self.decal(self.form(x if forms is None else forms))], 1)
        return logits, functional.normalize(self.same(hidden).float(), dim=1)


# -- pictures to learn from -------------------------------------------------------------------------------------------


def _vary(rng: np.random.Generator, what: Attributes) -> Attributes:
    """The same thing with one part changed: what an embedding must tell apart."""
    while True:
        twin = _change_part(rng, what)
        if not world.is_held_out(twin):
            return twin


def _change_part(rng: np.random.Generator, what: Attributes) -> Attributes:
    part = ("colour", "foot", "top", "decal", "decal_colour")[rng.integers(5)]
    if part == "decal" and what.decal:
        return replace(what, decal=str(rng.choice([name for name in DECALS if name != what.decal])))
    if part == "decal_colour" and what.decal is None:
        part = "colour"
    taken = {*what.colours}
    free = [name for name in COLOURS if not any(look_alike(name, other) for other in taken)] or list(COLOURS)
    return replace(what, **{part if part != "decal" else "top": str(rng.choice(free))})


def render_things(team: Team, work: Path, count: int, seed: int) -> None:
    """Write ``judge_views.npy`` (count, 3, 144, 144, 3), ``judge_boxes.npy`` and ``judge_truth.npy`` (count, heads).

    Rows 2k and 2k + 1 are alike but for one part. Every eighth decal is one the captions have no word for.
    """
    shapes = {
        "views": ((count, _VIEWS, _FRAME, _FRAME, 3), np.uint8),
        "boxes": ((count, _VIEWS, 4), np.int32),
        "truth": ((count, len(HEADS)), np.int8),
    }
    if team.leads:
        for name, (shape, kind) in shapes.items():
            open_memmap(work / f"judge_{name}.npy", "w+", kind, shape)  # type: ignore[no-untyped-call]
    team.wait()
    views, boxes, truth = (np.load(work / f"judge_{name}.npy", "r+") for name in shapes)
    for pair in range(team.rank, count // 2, team.size):
        rng = np.random.default_rng([seed, 40, pair])
        what, build = world.random_attributes(rng), world.random_build(rng)
        if what.decal and rng.random() < 0.125:
            what = replace(what, decal=str(rng.choice(UNNAMED_DECALS)))
        for row, thing in ((2 * pair, what), (2 * pair + 1, _vary(rng, what))):
            _render_views(rng, views[row], boxes[row], thing, build)
            truth[row] = _number_reading(thing)
    team.wait()


def _number_reading(what: Attributes) -> list[int]:
    """For each head the index of the word that a flawless judge reads."""
    reading = expected_reading(what)
    return [words.index(reading[name]) for name, words in HEADS.items()]


def _render_views(
    rng: np.random.Generator, views: NDArray[Any], boxes: NDArray[Any], thing: Attributes, build: Build
) -> None:
    for view in range(_VIEWS):
        scene = world.render_scene(rng, thing, _FRAME, float(rng.uniform(0.5, 0.74)) * _FRAME, build=build)
        views[view], boxes[view] = scene.image, scene.box


@dataclass(frozen=True)
class _Lesson:
    """pictures (N, 3, 96, 96) in -1..1; truth int64 (N, heads), -100 where a head is not asked."""

    pictures: torch.Tensor
    truth: torch.Tensor


_Lessons = tuple[_Lesson, _Lesson]


class _School:
    """Draws lessons: two views each of 32 things, some of them spoilt on purpose."""

    def __init__(self, work: Path, seed: int) -> None:
        self._views, self._boxes, self._truth = (
            np.load(work / f"judge_{name}.npy", "r") for name in ("views", "boxes", "truth")
        )
        self._seed = seed

    def draw(self, step: int, pairs: int = 16) -> _Lesson:
        """Rows 0..2P-1 are first views of P pairs of near twins, rows 2P..4P-1 second views of the same."""
        rng = np.random.default_rng([self._seed, 21, step])
        first = 2 * rng.integers(len(self._views) // 2, size=pairs)
        rows = np.stack([first, first + 1], 1).reshape(-1)
        looks = np.stack([rng.permutation(_VIEWS)[:2] for _ in rows])
        crops = [
            _crop(rng, self._views[row, look], self._boxes[row, look])
            for side in looks.T
            for row, look in zip(rows, side, strict=True)
        ]
        return _make_lesson(rng, crops, np.tile(self._truth[rows], (2, 1)))


class _Scenes:
    """Draws lessons from the scenes that the model learns from: more things than the views show, one look each."""

    def __init__(self, work: Path, seed: int) -> None:
        self._images = np.load(work / "images_square.npy", "r")
        self._facts, self._seed = np.load(work / "facts_square.npy"), seed
        boxes, native = self._facts["box"], self._images.shape[1]
        sides = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
        seen = sides * np.minimum(1, self._facts["sharp"] / native)  # pixels that a thing was rendered in
        self._rows = np.flatnonzero(~self._facts["empty"] & (seen >= SIDE // 2))

    def __len__(self) -> int:
        return len(self._rows)

    def draw(self, step: int, count: int = 64) -> _Lesson:
        """`count` things."""
        rng = np.random.default_rng([self._seed, 22, step])
        rows = self._rows[rng.integers(len(self._rows), size=count)]
        truth = np.array([_number_reading(unpack_attributes(self._facts[row])) for row in rows])
        return _make_lesson(rng, [_crop(rng, self._images[row], self._facts["box"][row]) for row in rows], truth)


def _crop(rng: np.random.Generator, picture: world.Picture, box: NDArray[np.int32]) -> world.Picture:
    """A crop as an evaluation would take it: looser or tighter, off centre, sometimes soft."""
    x0, y0, x1, y1 = (int(edge) for edge in box)
    side = max(x1 - x0, y1 - y0) * rng.uniform(1.02, 1.42)
    cx, cy = ((a + b) / 2 + side * rng.uniform(-0.08, 0.08) for a, b in ((x0, x1), (y0, y1)))
    left, top = max(0, round(cx - side / 2)), max(0, round(cy - side / 2))
    crop = picture[top : round(cy + side / 2), left : round(cx + side / 2)]
    if rng.random() < 0.35:
        soft = int(rng.uniform(44, 80))
        crop = world.resize(np.ascontiguousarray(crop), soft, soft)
    return world.resize(np.ascontiguousarray(crop), SIDE, SIDE)


def _make_lesson(rng: np.random.Generator, crops: list[world.Picture], truth: NDArray[Any]) -> _Lesson:
    """Some of the crops spoilt, all with a little noise."""
    x = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
    x, answers = _spoil(rng, x, torch.from_numpy(truth.astype(np.int64)))
    return _Lesson(x + torch.randn_like(x) * 0.04 * torch.rand(len(x), 1, 1, 1), answers)


def _spoil(rng: np.random.Generator, x: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Warp, smear or double some of the pictures and correct their truth: a smeared star is no star."""
    count = len(x)
    kinds = rng.choice(4, count, p=(0.72, 0.14, 0.08, 0.06))  # left alone, warped, smeared, doubled
    names = list(HEADS)
    shape, decal = names.index("shape"), names.index("decal")
    unclear, other = HEADS["shape"].index("unclear"), HEADS["decal"].index("other")
    x, truth = x.clone(), truth.clone()
    doubled = x[torch.from_numpy(rng.permutation(count))]
    for row in range(count):
        if kinds[row] == 0:
            continue
        strength = float(rng.uniform(0, 1))
        if kinds[row] == 1:
            bend = torch.from_numpy(rng.normal(0, 0.02 + 0.16 * strength, (1, 2, 6, 6))).float()
            flow = functional.interpolate(bend, size=(SIDE, SIDE), mode="bicubic", align_corners=True)
            line = torch.linspace(-1, 1, SIDE)
            grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)[None] + flow.permute(0, 2, 3, 1)
            x[row] = functional.grid_sample(x[row : row + 1], grid, align_corners=True, padding_mode="border")[0]
        elif kinds[row] == 2:
            cells = round(34 - 26 * strength)
            small = functional.interpolate(x[row : row + 1], size=(cells, cells), mode="area")
            x[row] = functional.interpolate(small, size=(SIDE, SIDE), mode="bicubic", align_corners=False)[0].clamp(
                -1, 1
            )
        else:
            x[row] = x[row] * (1 - 0.5 * strength) + doubled[row] * 0.5 * strength
        if strength > 0.55:
            kept = truth[row, decal].item()
            truth[row] = -100
            truth[row, shape] = unclear
            if kept > 0:
                truth[row, decal] = other
        elif strength > 0.25:
            truth[row, shape] = truth[row, decal] = -100
    return x, truth


# -- learning ---------------------------------------------------------------------------------------------------------


def _likeness_loss(same: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """InfoNCE at temperature 0.1 between the two views of a lesson, and a pull towards cosine 1 of the same thing."""
    one, two = same.chunk(2)
    sure = keep.chunk(2)[0] & keep.chunk(2)[1]
    one, two = one[sure], two[sure]
    logits, target = one @ two.T / 0.1, torch.arange(len(one))
    contrast = functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    return contrast / 2 + 2 * (1 - (one * two).sum(1)).mean()


def _shuffle_colours(pictures: torch.Tensor) -> torch.Tensor:
    """The pictures with each one's channels exchanged and some of them inverted: forms stay, colours mean nothing."""
    order = torch.rand(len(pictures), 3).argsort(1)[:, :, None, None].expand_as(pictures)
    signs = torch.where(torch.rand(len(pictures), 3, 1, 1) < 0.5, -1.0, 1.0)
    return pictures.gather(1, order) * signs


def _draw_ahead(draw: Callable[[int], _Lessons], steps: int) -> Iterator[_Lessons]:
    """The lessons of all steps, each drawn while the one before it is learnt."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(draw, 0)
        for step in range(steps):
            lesson = coming.result()
            if step + 1 < steps:
                coming = pool.submit(draw, step + 1)
            yield lesson


def train_judge(work: Path, steps: int, seed: int) -> None:
    """Write the weights (fp16) and their accuracy on held-out combinations.

    Learns from what ``render_things`` wrote, which shows each thing more than once, and as much from the rendered
    scenes, which show more things.
    """
    torch.manual_seed(seed)
    model, school, scenes = Classifier(), _School(work, seed), _Scenes(work, seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=max(steps, 4), pct_start=0.05)
    precision = choose_precision("cpu")
    for step, (looks, more) in enumerate(_draw_ahead(lambda step: (school.draw(step), scenes.draw(step)), steps)):
        pictures = torch.cat([looks.pictures, more.pictures])
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits, same = model(pictures, _shuffle_colours(pictures))
        loss = ask_all(logits.float().split(_SIZES, 1), torch.cat([looks.truth, more.truth]))
        loss = loss + 0.5 * _likeness_loss(same[: len(looks.truth)], looks.truth[:, 1] >= 0)
        take_step(loss, optimiser, schedule)
        if step % 200 == 199:
            log.info("judge: step %d, loss %.4f", step + 1, loss.item())
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, work / WEIGHTS_FILE)
    (work / FACTS_FILE).write_text("{}")
    judge = Judge.load(work)
    record: dict[str, object] = {"input": [SIDE, SIDE, 3], "heads": HEADS, "steps": steps}
    record["held_out_accuracy"] = measure_accuracy(judge)
    record["cosine"] = measure_likeness(judge)
    (work / FACTS_FILE).write_text(json.dumps(record, indent=1) + "\n")
    log.info("judge: %s, cosine %s", record["held_out_accuracy"], record["cosine"])


def measure_accuracy(judge: Judge, count: int = 256) -> dict[str, float]:
    """Share of right words a head on renderings of held-out combinations, cropped as evaluations crop."""
    scenes = world.held_out_scenes(count, seed=5)
    readings = judge.read([crop_of_mask(scene.image, mask) for scene, mask in scenes])
    wanted = [expected_reading(scene.attributes) for scene, _ in scenes]
    shares = {
        name: float(np.mean([r[name] == w[name] for r, w in zip(readings, wanted, strict=True)])) for name in HEADS
    }
    return shares | {"scenes": count}


def measure_likeness(judge: Judge, count: int = 64) -> dict[str, float]:
    """Mean cosine between renderings of the same subject in other rooms, of near twins, and of different subjects."""
    subjects = world.held_out_subjects(count, seed=9)
    rng = np.random.default_rng([78, count])
    twins = [world.Thing(_vary(rng, subject.attributes), subject.build) for subject in subjects]
    sides = []
    for group, seed in ((subjects, 1), (subjects, 2), (twins, 3)):
        photos = [world.render_photos(subject, 1, seed=seed)[0] for subject in group]
        sides.append(judge.embed([crop_of_mask(image, mask > 0) for image, mask in photos]))
    one, two, twin = sides
    return {
        "same": float((one * two).sum(1).mean()),
        "near_twin": float((one * twin).sum(1).mean()),
        "different": float((one * np.roll(two, 1, 0)).sum(1).mean()),
        "subjects": count,
    }
