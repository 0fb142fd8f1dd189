"""What a token adapter learns by: which numbers learn, and the loss, computed once more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dreammix_trt.core.attention_layers import list_attention_linears
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.subject_tokens import TokenConfig
from dreammix_trt.core.torch_modules.subject_tokens import TokenProjection
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.networks import TrainingUNet
from dreammix_trt.trainer.row_reader import RowReader
from dreammix_trt.trainer.tokens.lesson import TokenLesson
from tests.support.token_training import fill_shelf, tiny_recipe


@pytest.fixture(scope="module")
def shelf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lesson")


def make_lesson(base: BaseFiles, objects: Path, folder: Path, **fields: Any) -> TokenLesson:
    shelf, config = fill_shelf(base, objects, folder, **fields), TokenConfig.of_base(base.configs)
    return TokenLesson(base, config, Hardware(), shelf, tiny_recipe(**fields), 0)


def draw_rows(lesson: TokenLesson, count: int) -> dict[str, torch.Tensor]:
    with RowReader(lesson.draw, (0,), range(count)) as reader:
        return reader.take(0)


def test_projection_and_factors_learn_and_nothing_else(base: BaseFiles, objects: Path, shelf_folder: Path) -> None:
    lesson = make_lesson(base, objects, shelf_folder)
    trained = lesson.trained()
    lesson.loss(draw_rows(lesson, 2), 0).backward()
    assert all(value.grad is not None and value.dtype == torch.float32 for value in trained.values())
    assert {name for name in trained if name.startswith("token_proj.")} == {
        f"token_proj.{name}" for name in ("norm.weight", "norm.bias", "linear.weight", "linear.bias")
    }
    learns = {id(value) for value in trained.values()}
    assert not any(value.requires_grad for value in lesson._unet.unet.parameters() if id(value) not in learns)


def test_there_are_factors_for_every_slot_of_an_engine(base: BaseFiles, objects: Path, shelf_folder: Path) -> None:
    lesson = make_lesson(base, objects, shelf_folder)
    _, factors = lesson.weights()
    slots = {slot.module: (slot.inputs, slot.outputs) for slot in list_attention_linears(base.configs["unet"])}
    assert {name: (a.shape[0], b.shape[1]) for name, (a, b) in factors["unet"].items()} == slots
    assert all(a.shape[1] == b.shape[0] == 2 for a, b in factors["unet"].values())
    assert factors["unet"] is factors["unet_raw"], "written once"


@pytest.mark.parametrize("decoupling", [0.0, 1.0])
def test_the_loss_is_that_of_the_hole_by_hand(
    decoupling: float, base: BaseFiles, objects: Path, shelf_folder: Path
) -> None:
    """Of the base's own prediction, told of tokens beside the text, since factors begin as nothing."""
    lesson = make_lesson(base, objects, shelf_folder, decoupling=decoupling)
    rows = draw_rows(lesson, 2)
    rows["time"][:], rows["count"][:] = torch.tensor([0.25, 0.9]), torch.tensor([3.0, 9.0])
    rows["sharp"][:] = torch.tensor([40.0, 64.0])
    rows["size"][:] = 0.5
    unet, t = TrainingUNet(base, Hardware()), torch.tensor([125, 950])
    signal, noise = (table[t][:, None, None, None] for table in (unet.signal, unet.noise))
    projection = TokenProjection(TokenConfig.of_base(base.configs))
    projection.load_state_dict(lesson.projection.state_dict())
    with torch.no_grad():
        text = torch.cat([rows["states"], projection(rows["tokens"][:, :3])], 1)
        sizes = torch.tensor([[40.0, 40, 0, 0, 64, 64], [83, 83, 0, 0, 64, 64]])
        noisy = signal * rows["latents"] + noise * rows["noise"]
        feature = unet.feature(rows["mask"], rows["masked"])
        error = (unet.predict(noisy, t, (text, rows["pooled"]), sizes, feature) - rows["noise"]).square()
        each = [
            float(error[row][:, rows["mask"][row, 0] > 0].mean()) * min(10.0, 1 / float(signal[row]) ** 2)
            for row in range(2)
        ]
        assert float(lesson.loss(rows, 0)) == pytest.approx(sum(each) / 2, rel=1e-4)
    if decoupling:
        assert rows["mask"].min() == 1, "all cells count"


def test_rows_of_words_learn_from_the_base_told_in_words(base: BaseFiles, objects: Path, shelf_folder: Path) -> None:
    """e(t) + g (e(all in words) - e(t under it)), by the base alone also where factors have learnt something."""
    lesson = make_lesson(base, objects, shelf_folder, words=1.0, emphasis=2.5)
    rows = draw_rows(lesson, 3)
    rows["wordy"][:], rows["silent"][:] = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    rows["states"][1], rows["pooled"][1] = 0.5, -0.5  # what stands for no text
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in lesson.trained().values():
            value += 0.05 * torch.randn(value.shape, generator=generator)
        unet, t = TrainingUNet(base, Hardware()), torch.tensor([125, 500, 950])
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(3, 1)
        noisy, feature = rows["latents"] + rows["noise"], unet.feature(rows["mask"], rows["masked"])
        e = {
            name: unet.predict(noisy, t, (rows[f"{name}states"], rows[f"{name}pooled"]), sizes, feature)
            for name in ("", "heard_", "words_")
        }
        wanted = e[""] + 2.5 * (e["words_"] - e["heard_"])
        wanted[2] = rows["noise"][2]
        found = lesson._find_target(rows, noisy, t, sizes, feature)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert float((e["words_"] - e["heard_"]).abs().max()) > 1e-3, "the words say something"
    assert lesson._unet.unet.active_adapters(), "they act again"


def test_tokens_change_what_is_predicted_and_their_order_does_not(
    base: BaseFiles, objects: Path, shelf_folder: Path
) -> None:
    lesson = make_lesson(base, objects, shelf_folder)
    rows = draw_rows(lesson, 2)
    rows["count"][:] = rows["tokens"].shape[1]
    with torch.no_grad():
        first = float(lesson.loss(rows, 0))
        turned = float(lesson.loss({**rows, "tokens": rows["tokens"].flip(1)}, 0))
        other = float(lesson.loss({**rows, "tokens": rows["tokens"].flip(0)}, 0))
    assert turned == pytest.approx(first, rel=1e-5) and abs(other - first) > 1e-6


def test_values_computed_twice_give_the_same_gradients(base: BaseFiles, objects: Path, shelf_folder: Path) -> None:
    """With gradient checkpointing in the frozen UNet, which full-size bases have by default."""
    found = []
    for twice in (False, True):
        lesson = make_lesson(base, objects, shelf_folder, gradient_checkpointing=twice)
        lesson.loss(draw_rows(lesson, 1), 0).backward()
        found.append([value.grad for value in lesson.trained().values()])
    torch.testing.assert_close(*found)
    assert any(np.abs(np.asarray(value)).max() > 0 for value in found[1])
