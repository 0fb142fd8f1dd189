"""What each part of ASUKA learns by: losses, what stays frozen, and how pictures and latents are moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for _name in ("torch", "diffusers", "transformers"):
    pytest.importorskip(_name, reason="the trainer needs its extra")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from dreammix_trt.core.asuka import PriorConfig  # noqa: E402
from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.errors import FileFormatError  # noqa: E402
from dreammix_trt.core.torch_modules.masked_autoencoder import normalise  # noqa: E402
from dreammix_trt.trainer.asuka import decoder  # noqa: E402
from dreammix_trt.trainer.asuka.alignment import AlignLesson  # noqa: E402
from dreammix_trt.trainer.asuka.decoder import (  # noqa: E402
    JITTER,
    DecoderLesson,
    estimate_clear,
    make_decoder,
    move_colours,
)
from dreammix_trt.trainer.asuka.perceptual import slope_distance  # noqa: E402
from dreammix_trt.trainer.asuka.prior import PriorLesson, make_prior, shrink_hole, shrink_picture  # noqa: E402
from dreammix_trt.trainer.asuka.recipes import Part  # noqa: E402
from dreammix_trt.trainer.asuka.task import config_for  # noqa: E402
from dreammix_trt.trainer.consistency import Tables  # noqa: E402
from dreammix_trt.trainer.hardware import Hardware  # noqa: E402
from dreammix_trt.trainer.hole_masks import touched_patches  # noqa: E402
from dreammix_trt.trainer.networks import TextEncoders, TrainingUNet, Vae  # noqa: E402
from dreammix_trt.trainer.picture_pool import FolderPool  # noqa: E402
from tests.support.asuka_training import tiny_recipe, write_pictures  # noqa: E402

CPU = torch.device("cpu")
PRIOR = PriorConfig(
    **{"side": 32, "patch": 4, "width": 16, "layers": 2, "heads": 2, "decoder_width": 12, "decoder_layers": 2},
    **{"decoder_heads": 2, "feature_layer": 1, "align_width": 16, "align_layers": 1, "align_head": 8},
    **{"context_width": 40, "pooled_width": 16},
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> FolderPool:
    return FolderPool(write_pictures(tmp_path_factory.mktemp("pool") / "pictures"))


def draw_rows(lesson: Any, count: int) -> dict[str, Tensor]:
    rows = [lesson.draw(np.random.default_rng([7, number])) for number in range(count)]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


# -- prior ------------------------------------------------------------------------------------------------------------


def test_the_prior_learns_what_is_hidden_alone(pool: FolderPool) -> None:
    """Three quarters of the patches are hidden; known pixels do not count, hidden ones do, by hand."""
    prior = make_prior(PRIOR)
    lesson = PriorLesson(prior, pool, tiny_recipe("prior"), CPU)
    rows = draw_rows(lesson, 3)
    assert rows["image"].shape == (3, 3, 64, 64) and rows["mask"].shape == (3, 1, 32, 32)
    assert all(touched_patches(mask[0].numpy() > 0, 8).sum() == 48 for mask in rows["mask"])
    small, mask = shrink_picture(rows["image"], 32), rows["mask"]
    with torch.no_grad():
        found = prior.mae(normalise(small), mask)[1]
        wanted = (((found - normalise(small)) ** 2)[mask.expand_as(small) > 0]).mean()
        assert float(lesson.loss(rows, 0)) == pytest.approx(float(wanted), rel=1e-5)


def test_the_priors_alignment_and_positions_do_not_learn_with_it(pool: FolderPool) -> None:
    prior = make_prior(PRIOR)
    lesson = PriorLesson(prior, pool, tiny_recipe("prior"), CPU)
    trained = lesson.trained()
    assert all(name.startswith("mae.") for name in trained) and "mae.pos_embed" not in trained
    lesson.loss(draw_rows(lesson, 2), 0).backward()
    unused = {name for name, value in trained.items() if value.grad is None}
    assert not unused, "all of it takes part"
    assert all(value.grad is None for value in prior.alignment.parameters())


def test_a_small_hole_pixel_is_one_that_any_large_one_touches() -> None:
    hole = torch.zeros(1, 1, 64, 64)
    hole[..., 5, 9] = 1
    assert shrink_hole(hole, 16).nonzero().tolist() == [[0, 0, 1, 2]]
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    dirty = torch.where(hole > 0, torch.tensor(100.0), image)
    known = 1 - shrink_hole(hole, 16)
    assert torch.equal(shrink_picture(image, 16) * known, shrink_picture(dirty, 16) * known), "nothing leaks"


# -- alignment --------------------------------------------------------------------------------------------------------


def make_alignment(base: BaseFiles, pool: FolderPool, **fields: Any) -> AlignLesson:
    prior, recipe = make_prior(config_for(base).prior), tiny_recipe("align", **fields)
    return AlignLesson(prior, base, Hardware(), pool, recipe, 0, lambda make: make(), lambda _: None)


def test_only_the_alignment_learns(base: BaseFiles, pool: FolderPool) -> None:
    lesson = make_alignment(base, pool)
    lesson.loss(draw_rows(lesson, 2), 0).backward()
    trained = lesson.trained()
    assert all(name.startswith("alignment.") and value.grad is not None for name, value in trained.items())
    frozen = [*lesson._prior.mae.parameters(), *lesson._unet.unet.parameters()]
    assert not any(value.requires_grad or value.grad is not None for value in frozen)


def test_values_computed_twice_give_the_same_gradients(base: BaseFiles, pool: FolderPool) -> None:
    """With gradient checkpointing in the frozen UNet, which full-size bases have by default."""
    found = []
    for twice in (False, True):
        torch.manual_seed(0)
        lesson = make_alignment(base, pool, gradient_checkpointing=twice)
        lesson.loss(draw_rows(lesson, 1), 0).backward()
        found.append([value.grad for value in lesson.trained().values()])
    torch.testing.assert_close(*found)


def test_the_loss_is_the_noise_that_the_base_predicts(base: BaseFiles, pool: FolderPool) -> None:
    """Computed once more from the networks, with the hole's condition as the base's own training has it."""
    lesson = make_alignment(base, pool, heaviest=1.0)
    rows = draw_rows(lesson, 2)
    rows["time"][:] = torch.tensor([0.25, 0.5])  # of the first and the second half: 125 and 750
    rows["reveal"][:] = 1.0
    vae, unet = Vae(base), TrainingUNet(base, Hardware())
    image, hole, t = rows["image"], rows["hole"], torch.tensor([125, 750])
    latents, masked = vae.encode(image.numpy()), vae.encode((image * (1 - hole)).numpy())
    cells = torch.nn.functional.max_pool2d(hole, 8)
    tables = Tables(unet.signal, unet.noise)
    signal, spread = tables.at(t)
    noisy = signal * latents + spread * rows["noise"]
    with torch.no_grad():
        context, pooled, _ = lesson._prior(image, hole)  # pictures of 64 pixels are of the prior's own side
        assert context.shape == (2, 256, 40)
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64], [96, 96, 0, 0, 64, 64]])  # as the loop tells them, early larger
        eps = unet.predict(noisy, t, (context, pooled), sizes, unet.feature(cells, masked))
        errors = (eps - rows["noise"]).square().mean((1, 2, 3))
        assert float(lesson.loss(rows, 5)) == pytest.approx(float(errors.mean()), rel=1e-4)
        heavier = make_alignment(base, pool, heaviest=5.0)
        heavier._prior.load_state_dict(lesson._prior.state_dict())
        weight = torch.tensor([1 / float(signal[0]) ** 2, 5.0])  # of the velocity's error; the second is at the limit
        assert weight[0] < 5 < 1 / float(signal[1]) ** 2
        assert float(heavier.loss(rows, 5)) == pytest.approx(float((errors * weight).mean()), rel=1e-4)


def test_at_first_the_prior_is_told_of_an_empty_hole(base: BaseFiles, pool: FolderPool) -> None:
    lesson = make_alignment(base, pool, revealed=(1.0, 0.25), reveal_steps=2)
    rows = draw_rows(lesson, 2)
    rows["reveal"][:] = torch.tensor([0.2, 0.9])
    told: list[Tensor] = []
    lesson.condition = lambda seen, hidden: told.append(hidden) or AlignLesson.condition(lesson, seen, hidden)  # type: ignore[method-assign,func-returns-value]
    for step in range(3):
        lesson.loss(rows, step)
    assert [[bool(hole.any()) for hole in each] for each in told] == [[False, False], [False, True], [False, True]]
    never = make_alignment(base, pool, revealed=(0.0, 0.0))
    never.condition = lambda seen, hidden: told.append(hidden) or AlignLesson.condition(never, seen, hidden)  # type: ignore[method-assign,func-returns-value]
    never.loss(rows, 0)
    assert all(hole.any() for hole in told[-1])


def test_views_are_the_rows_that_are_drawn_without_them(base: BaseFiles, pool: FolderPool) -> None:
    """A view holds what the loss makes of a picture and its hole."""
    kept, anew = make_alignment(base, pool, views=9), make_alignment(base, pool)
    assert kept._views is not None and all(len(value) == 9 for value in kept._views.values())
    row = kept.draw(np.random.default_rng(1))
    assert set(row) == {"seen", "hidden", "cells", "latents", "masked", "noise", "time", "reveal"}
    assert any(np.array_equal(row["latents"], each) for each in kept._views["latents"].numpy())
    view = draw_rows(_Views(anew), 1)
    image, hole, vae = view["image"], view["hole"], Vae(base)
    side = anew._prior.config.side
    wanted = {
        "seen": shrink_picture(image, side),
        "hidden": shrink_hole(hole, side),
        "latents": vae.encode(image.numpy()),
        "masked": vae.encode((image * (1 - hole)).numpy()),
        "cells": torch.nn.functional.max_pool2d(hole, 8),
    }
    torch.testing.assert_close(dict(anew._encode(view)), wanted)
    assert not torch.equal(wanted["latents"], wanted["masked"])
    other = draw_rows(anew, 1)
    held = {name: other[name] for name in ("noise", "time", "reveal")}
    torch.testing.assert_close(anew.loss({**view, **held}, 0), anew.loss({**wanted, **held}, 0))  # it takes both


class _Views:
    def __init__(self, lesson: AlignLesson) -> None:
        self._lesson = lesson

    def draw(self, rng: np.random.Generator) -> Mapping[str, Any]:
        return self._lesson._draw_view(rng)


# -- decoder ----------------------------------------------------------------------------------------------------------


def make_lesson(base: BaseFiles, pool: FolderPool, **fields: Any) -> DecoderLesson:
    torch.manual_seed(0)
    own = make_decoder(base, config_for(base).decoder)
    return DecoderLesson(own, base, Hardware(), pool, tiny_recipe("decoder", **fields), slope_distance)


def test_only_the_decoder_learns(base: BaseFiles, pool: FolderPool) -> None:
    lesson = make_lesson(base, pool)
    rows = draw_rows(lesson, 2)
    rows["guessed"][:] = torch.tensor([1.0, 0.0])
    lesson.loss(rows, 0).backward()
    assert all(value.grad is not None for value in lesson.trained().values())
    frozen = [*lesson._vae._vae.parameters(), *lesson._unet.unet.parameters()]
    assert not any(value.requires_grad for value in frozen)


def test_at_first_what_is_made_of_known_pixels_learns_alone(base: BaseFiles, pool: FolderPool) -> None:
    lesson = make_lesson(base, pool, imitated=3)
    rows = draw_rows(lesson, 2)
    lesson.loss(rows, 2).backward()
    learns = {name: value.grad is not None for name, value in lesson.trained().items()}
    assert all(found == name.startswith("condition.") for name, found in learns.items())
    lesson.loss(rows, 3).backward()
    assert all(value.grad is not None for value in lesson.trained().values())


def test_imitation_costs_nothing_where_known_places_say_what_the_decoder_has(
    base: BaseFiles, pool: FolderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson = make_lesson(base, pool, imitated=1)
    rows = draw_rows(lesson, 1)
    latent = Vae(base).encode_batch(rows["image"]) / base.scaling_factor
    with torch.no_grad():
        streams = lesson._decoder.trace_latent(latent)
        holes = lesson._decoder.trace_condition(rows["image"], rows["hole"])[1]
    # in the hole anything may be said
    said = [torch.where(hole > 0, stream + 7, stream) for stream, hole in zip(streams, holes, strict=True)]
    monkeypatch.setattr(lesson._decoder, "trace_condition", lambda *_: (said, holes))
    assert float(lesson.loss(rows, 0)) < 1e-8
    said[0] = said[0] + streams[0].std()  # one level off by a deviation, of five
    assert float(lesson.loss(rows, 0)) == pytest.approx(1 / 5, rel=1e-3)


def test_pixels_at_the_border_count_most() -> None:
    hole = torch.zeros(1, 1, 40, 40)
    hole[..., 20:] = 1
    counts = decoder.weigh_pixels(hole)[0, 0, 5]
    near = slice(20, 20 + decoder.REACH)
    assert counts[:20].unique().tolist() == [pytest.approx(decoder.KNOWN)]
    assert counts[near].unique().tolist() == [decoder.BORDER] and counts[near.stop :].unique().tolist() == [1.0]


def test_a_decoder_begins_as_the_bases_vae(base: BaseFiles) -> None:
    """Where all is hole, nothing of the picture enters, and both decode alike."""
    own, vae = make_decoder(base, config_for(base).decoder).eval(), Vae(base)
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = own(latent, torch.zeros(1, 3, 64, 64), torch.ones(1, 1, 64, 64))
    torch.testing.assert_close(found, vae.decode_batch(latent * base.scaling_factor), rtol=1e-4, atol=1e-4)


def test_a_decoder_for_another_vae_is_refused_by_field(base: BaseFiles) -> None:
    other = replace(config_for(base).decoder, layers_per_block=7)
    with pytest.raises(FileFormatError, match="decoder: layers_per_block is 7, but this base's VAE has"):
        make_decoder(base, other)


def test_the_distance_is_measured_in_full_precision(
    base: BaseFiles, pool: FolderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop computes the loss under its own autocast."""
    lesson, asked = make_lesson(base, pool), []

    def measure(found: Tensor, wanted: Tensor) -> Tensor:
        asked.append((torch.is_autocast_enabled("cpu"), (found.flatten(1) @ wanted.flatten(1).T).dtype))
        return slope_distance(found, wanted)

    monkeypatch.setattr(lesson, "_distance", measure)
    rows = draw_rows(lesson, 1)
    rows["guessed"][:] = 0
    with torch.autocast("cpu", torch.bfloat16):
        lesson.loss(rows, 0)
    assert asked == [(False, torch.float32)]


def test_half_of_the_pictures_are_guessed(base: BaseFiles, pool: FolderPool) -> None:
    lesson = make_lesson(base, pool)
    rows = draw_rows(lesson, 200)
    assert 0.4 < float(rows["guessed"].mean()) < 0.6
    assert rows["time"].min() >= decoder.TIMES[0] and rows["time"].max() < decoder.TIMES[1] <= 1000
    few = {name: value[:3] for name, value in rows.items()}
    few["guessed"] = torch.tensor([0.0, 1.0, 0.0])
    pictures = lesson._guess(few)
    same = [torch.equal(one, other) for one, other in zip(pictures, few["image"], strict=True)]
    assert same == [True, False, True] and pictures.abs().max() <= 1


def test_the_guess_is_told_everything(base: BaseFiles, pool: FolderPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hole, the clear latent as what is known, and the empty text."""
    lesson, asked = make_lesson(base, pool), []
    honest = lesson._unet.predict

    def spy(*given: Any) -> Tensor:
        asked.append(given)
        return honest(*given)

    monkeypatch.setattr(lesson._unet, "predict", spy)
    rows = draw_rows(lesson, 2)
    rows["guessed"][:] = 1
    lesson._guess(rows)
    (_, t, (states, pooled), _, feature) = asked[0]
    clear = Vae(base).encode(rows["image"].numpy())
    torch.testing.assert_close(feature, lesson._unet.feature(torch.zeros(2, 1, 8, 8), clear))
    empty = TextEncoders(base).encode([""])
    assert torch.equal(states[1], empty[0][0]) and torch.equal(pooled[0], empty[1][0])
    assert torch.equal(t, rows["time"].long())


@pytest.mark.parametrize("t", [0, 700, 999])
def test_a_perfect_prediction_gives_the_latent_back(t: int) -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    tables = Tables(alphas.sqrt(), (1 - alphas).sqrt())
    clear, noise = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    asked = []

    def know(noisy: Tensor, when: Tensor) -> Tensor:
        asked.append((noisy, when))
        return noise

    found = estimate_clear(tables, clear, noise, torch.tensor([t, t]), know)
    torch.testing.assert_close(found, clear, rtol=1e-10, atol=1e-10)
    noisy, when = asked[0]
    torch.testing.assert_close(noisy, alphas[t].sqrt() * clear + (1 - alphas[t]).sqrt() * noise)
    assert when.tolist() == [t, t]
    wrong = estimate_clear(tables, clear, noise, torch.tensor([t, t]), lambda *_: noise + 1)
    shift = -((1 - alphas[t]) / alphas[t]).sqrt()
    torch.testing.assert_close(wrong, clear + shift, rtol=1e-9, atol=1e-9)


def test_colours_move_as_much_as_they_are_told() -> None:
    """By hand, in values from 0 to 1; nothing moves them without an amount."""
    picture = torch.tensor([0.6, 0.4, 0.2])[None, :, None, None].expand(5, 3, 2, 2) * 2 - 1
    amounts = torch.zeros(5, 4)
    for number in range(4):
        amounts[number + 1, number] = 1
    moved = (move_colours(picture, amounts) + 1) / 2
    torch.testing.assert_close(moved[0], (picture[0] + 1) / 2)
    torch.testing.assert_close(moved[1, :, 0, 0], torch.tensor([0.6, 0.4, 0.2]) * (1 + JITTER[0]))
    grey = 0.6 * 0.299 + 0.4 * 0.587 + 0.2 * 0.114  # of every pixel, so the mean is the same
    wanted = grey + (torch.tensor([0.6, 0.4, 0.2]) - grey) * (1 + JITTER[1])
    torch.testing.assert_close(moved[2, :, 0, 0], wanted)
    wanted = grey + (torch.tensor([0.6, 0.4, 0.2]) - grey) * (1 + JITTER[2])
    torch.testing.assert_close(moved[3, :, 0, 0], wanted)
    turned = moved[4, :, 0, 0]
    assert float(turned.sum()) == pytest.approx(1.2, abs=1e-5), "as bright as it was"
    spread = [float(((each - each.mean()) ** 2).sum()) for each in (turned, torch.tensor([0.6, 0.4, 0.2]))]
    assert spread[0] == pytest.approx(spread[1], rel=1e-4) and turned[1] > 0.4, "as colourful, towards yellow"


def test_a_third_of_a_turn_exchanges_the_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "JITTER", (0.0, 0.0, 0.0, 1 / 3))
    picture = torch.tensor([0.9, 0.1, 0.3])[None, :, None, None] * 2 - 1
    moved = (move_colours(picture, torch.tensor([[0.0, 0.0, 0.0, 1.0]])) + 1) / 2
    torch.testing.assert_close(moved[0, :, 0, 0], torch.tensor([0.3, 0.9, 0.1]))


def test_parts_are_named_as_the_command_names_them(base: BaseFiles, pool: FolderPool, tmp_path: Path) -> None:
    parts: list[Part] = [PriorLesson.part, AlignLesson.part, DecoderLesson.part]
    assert parts == ["prior", "align", "decoder"]
