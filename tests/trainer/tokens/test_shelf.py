"""Encoded objects: what a row is made of, on both paths; files made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.reference_pictures import place_on_white
from dreammix_trt.core.subject_tokens import TokenConfig, mark_cells
from dreammix_trt.core.subject_tokens import select_tokens as define_tokens
from dreammix_trt.core.tensors import map_tensors
from dreammix_trt.core.torch_modules.subject_tokens import run_down_stack
from dreammix_trt.trainer.data import Photograph
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.networks import TextEncoders, TrainingUNet, Vae
from dreammix_trt.trainer.processes import Processes
from dreammix_trt.trainer.tokens import encoding, shelf
from dreammix_trt.trainer.tokens.objects import FolderObjects, Seen
from dreammix_trt.trainer.tokens.recipes import USUAL_TOKENS, draw_count
from dreammix_trt.trainer.tokens.shelf import Shelf
from tests.support.token_training import fill_shelf, open_encoder, tiny_recipe

_TOLERANCE = 2e-3  # of float16


@pytest.fixture(scope="module")
def folder(base: BaseFiles, objects: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the three mugs are encoded."""
    place = tmp_path_factory.mktemp("shelf")
    fill_shelf(base, objects, place)
    return place


def open_shelf(objects: Path, folder: Path, **fields: Any) -> Shelf:
    """What is encoded, under another recipe."""
    opened = Shelf(folder, FolderObjects(objects), tiny_recipe(**fields), 0)
    opened.fill(lambda: pytest.fail("it is there"), Processes(), lambda _: None)
    return opened


def draw(held: Shelf, count: int = 12) -> list[Any]:
    return [held.draw(np.random.default_rng([5, number])) for number in range(count)]


def close(one: Any, other: Any) -> bool:
    return bool(np.allclose(one, other, atol=_TOLERANCE, rtol=_TOLERANCE))


def test_the_main_path_has_a_hole_and_the_class(base: BaseFiles, objects: Path, folder: Path) -> None:
    text = TextEncoders(base).encode(["a photo of a mug"])
    rows = draw(open_shelf(objects, folder, decoupling=0.0, no_text=0.0))
    assert any((row["mask"] == 0).any() for row in rows), "a hole over a mug may fill so small a picture, not always"
    for row in rows:
        assert set(np.unique(row["mask"])) <= {0, 1} and row["mask"].any()
        assert close(row["states"], text[0][0]) and close(row["pooled"], text[1][0])
        assert not close(row["masked"], row["latents"])
        assert all(value.dtype == np.float32 for value in row.values())


def test_the_regularised_path_hides_everything_and_tells_the_caption(
    base: BaseFiles, objects: Path, folder: Path
) -> None:
    texts = TextEncoders(base).encode([f"a photo of a {word}mug" for word in ("", "red ", "blue ")])[0]
    grey, told = Vae(base).encode(np.zeros((1, 3, 64, 64), np.float32))[0], set()
    for row in draw(open_shelf(objects, folder, decoupling=1.0, no_text=0.0), 24):
        assert (row["mask"] == 1).all() and close(row["masked"], grey)
        told |= {number for number, text in enumerate(texts) if close(row["states"], text)}
    assert told == {0, 1, 2}


def test_some_rows_have_no_text_and_keep_their_tokens(base: BaseFiles, objects: Path, folder: Path) -> None:
    empty = TextEncoders(base).encode([""])[0][0]
    rows = draw(open_shelf(objects, folder, no_text=1.0))
    assert all(close(row["states"], empty) and row["tokens"].any() for row in rows)
    rows = draw(open_shelf(objects, folder, no_text=0.5), 40)
    assert 8 < sum(close(row["states"], empty) for row in rows) < 32


def test_rows_of_words_hear_the_class_and_the_base_all_of_the_caption(
    base: BaseFiles, objects: Path, folder: Path
) -> None:
    class_alone, *captions = TextEncoders(base).encode([f"a photo of a {word}mug" for word in ("", "red ", "blue ")])[0]
    empty, told = TextEncoders(base).encode([""])[0][0], set()
    for silent in (False, True):
        for row in draw(open_shelf(objects, folder, words=1.0, decoupling=1.0, no_text=float(silent)), 24):
            assert row["wordy"] == 1 and row["silent"] == silent
            assert close(row["states"], empty if silent else class_alone)
            assert close(row["heard_states"], class_alone)
            told |= {number for number, text in enumerate(captions) if close(row["words_states"], text)}
    assert told == {0, 1}
    rows = draw(open_shelf(objects, folder, words=0.5), 40)
    assert 8 < sum(row["wordy"] for row in rows) < 32
    assert all(close(row["words_states"], row["heard_states"]) for row in rows if not row["wordy"])
    assert "wordy" not in draw(open_shelf(objects, folder), 1)[0]


def test_a_reference_is_of_another_photograph_where_there_is_one(objects: Path, folder: Path) -> None:
    held = map_tensors(folder / "00000.safetensors")
    assert held["owner"].tolist() == [0, 0, 1, 1, 2, 2] and held["photograph"].tolist() == [0, 1, 0, 0, 0, 0]

    def find(name: str, value: Any) -> int:
        return next(number for number, each in enumerate(held[name]) if close(each, value))

    rows = draw(open_shelf(objects, folder), 60)
    pairs = {(find("latents", row["latents"]), find("tokens", row["tokens"])) for row in rows}
    assert {pair for pair in pairs if pair[0] < 2} == {(0, 1), (1, 0)}
    assert all(held["owner"][target] == held["owner"][reference] for target, reference in pairs)
    assert {pair for pair in pairs if 1 < pair[0] < 4} == {(2, 2), (2, 3), (3, 2), (3, 3)}, "of one picture any"


def test_tokens_are_those_of_the_definition(base: BaseFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of the base alone, without noise, of the object on white, under its class's name."""
    monkeypatch.setattr(encoding, "vary_reference", lambda _, photograph, __: (photograph.image, photograph.subject))
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    subject = np.zeros((64, 64), bool)
    subject[10:50, 20:44] = True
    seen = Seen("mug", [Photograph(image, subject, "a")], ["a red mug"], [("a mug", "a red mug")])
    found = open_encoder(base).encode([seen], tiny_recipe(views=1), np.random.default_rng(0))["tokens"][0]
    config, unet = TokenConfig.of_base(base.configs), TrainingUNet(base, Hardware())
    placed, mask = place_on_white(image, subject, 64)
    text, pooled = TextEncoders(base).encode(["mug"])
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    with torch.no_grad():
        features = run_down_stack(unet.unet, Vae(base).encode(placed[None]), text, pooled, sizes, config.block)
    wanted, _ = define_tokens(features[0].numpy(), mark_cells(mask, config), config.tokens)
    assert found.shape == (config.tokens, config.width)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_files_are_made_once_and_a_damaged_one_again(
    base: BaseFiles, objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shelf, "_IN_A_FILE", 1)
    fill_shelf(base, objects, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    before = [file.read_bytes() for file in files]
    assert len(files) == 3
    files[1].write_bytes(before[1][:900])
    files[2].unlink()
    made = []
    monkeypatch.setattr(shelf, "write_tensors", _note(made, shelf.write_tensors))
    fill_shelf(base, objects, tmp_path)
    assert made == files[1:] and [file.read_bytes() for file in files] == before
    assert "is damaged" in caplog.text


def test_processes_share_what_is_to_be_made(
    base: BaseFiles, objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "_IN_A_FILE", 1)
    there: list[list[str]] = []
    monkeypatch.setattr(Processes, "wait", lambda _: there.append(sorted(file.name for file in tmp_path.iterdir())))
    own = Shelf(tmp_path, FolderObjects(objects), tiny_recipe(), 0)
    with pytest.raises(Exception, match=r"00000\.safetensors"):  # the other has not made its files
        own.fill(lambda: open_encoder(base), Processes(1, 2), lambda _: None)
    assert there == [["00001.safetensors"]]
    own.fill(lambda: open_encoder(base), Processes(0, 2), lambda _: None)
    assert there[1] == [f"0000{number}.safetensors" for number in range(3)]


def test_objects_that_cannot_be_read_are_left_out(
    base: BaseFiles, objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "_IN_A_FILE", 2)
    honest = FolderObjects.open
    monkeypatch.setattr(FolderObjects, "open", lambda self, number: None if number == 2 else honest(self, number))
    fill_shelf(base, objects, tmp_path / "some")
    monkeypatch.setattr(FolderObjects, "open", lambda *_: None)
    with pytest.raises(InputError, match="none of the objects can be read"):
        fill_shelf(base, objects, tmp_path / "none")


def test_half_of_the_batches_have_the_papers_tokens() -> None:
    counts = [draw_count(np.random.default_rng(seed), 48) for seed in range(600)]
    assert 0.42 < counts.count(USUAL_TOKENS) / 600 < 0.6
    assert set(counts) == set(range(1, 49))
    assert {draw_count(np.random.default_rng(seed), 3) for seed in range(60)} == {1, 2, 3}


def _note(made: list[Path], write: Any) -> Any:
    def noted(file: Path, *given: Any) -> None:
        made.append(file)
        write(file, *given)

    return noted
