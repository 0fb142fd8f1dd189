"""The subject in words: captions made of attributes, regular pictures of a folder, both ways of eq. 8's sum."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

for _name in ("torch", "diffusers", "transformers", "peft"):
    pytest.importorskip(_name, reason="the trainer needs its extra")

import torch  # noqa: E402

from dreammix_trt.core.attributes import AttributeDictionary  # noqa: E402
from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.errors import InputError  # noqa: E402
from dreammix_trt.core.lora import read_lora  # noqa: E402
from dreammix_trt.trainer import preparing  # noqa: E402
from dreammix_trt.trainer.batches import Draws  # noqa: E402
from dreammix_trt.trainer.captions import regular_captions, subject_captions  # noqa: E402
from dreammix_trt.trainer.preparing import Prepared  # noqa: E402
from dreammix_trt.trainer.samples import Samples  # noqa: E402
from tests.support.training import TINY, train  # noqa: E402

WORDS = AttributeDictionary.of("mug", {"colour": ["blue"], "part": ["clay table"]}, "hand", "test")


def test_captions_name_each_attribute_and_all() -> None:
    assert subject_captions("sks", "mug", WORDS) == (
        "a photo of a blue sks mug",
        "a photo of a sks mug with a clay table",
        "a photo of a blue sks mug with a clay table",
    )
    alone = AttributeDictionary.of("coffee mug", {"finish": ["old"]}, "hand", "test")
    assert subject_captions("sks", "coffee mug", alone) == ("a photo of an old sks coffee mug",)


def test_regular_captions_combine_attributes_by_the_seed_and_never_say_the_token() -> None:
    made = [regular_captions("mug", 12, WORDS, seed) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2] and len(made[0]) == 12
    assert len(set(made[0])) > 4 and any("blue" in text for text in made[0])
    assert all("mug" in text and "sks" not in text for text in made[0])
    plain = regular_captions("mug", 3, None, 1)
    assert plain == ["a photo of a red mug", "a photo of a green mug", "a photo of a mug"]


def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Prepared]:
    """What trainings learn from, noted."""
    noted: list[Prepared] = []
    honest = preparing._make

    def note(*given: Any) -> Prepared:
        noted.append(honest(*given))
        return noted[-1]

    monkeypatch.setattr(preparing, "_make", note)
    return noted


def test_a_dictionary_is_trained_and_travels_with_the_lora(
    base: BaseFiles, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = encoded(monkeypatch)
    WORDS.write(tmp_path / "attributes.json")
    record = train(photos, tmp_path / "lora", base, attributes=tmp_path / "attributes.json", steps=1)
    assert record.captions == subject_captions("sks", "mug", WORDS)
    listed = {"colour": ["blue"], "part": ["clay table"]}
    metadata = read_lora(tmp_path / "lora").metadata
    assert json.loads(metadata["attributes"]) == listed
    card = json.loads((tmp_path / "lora" / "subject.json").read_text())
    assert card["attributes"] == listed and card["captions"] == list(record.captions)
    plain = train(photos, tmp_path / "plain", base, attributes=WORDS, attribute_captions=False, steps=1)
    assert plain.captions == () and plain.attributes == listed
    own = [len(record.captions) + 1, 1]
    assert [len(each.states) for each in noted] == [count + 2 for count in own], (
        "two regular pictures, painted by words"
    )
    with pytest.raises(InputError, match=r"attributes\.json: the attributes are those of a 'mug'.*'cup'"):
        train_cup = {"attributes": tmp_path / "attributes.json"}
        from dreammix_trt.trainer.lora import train_lora

        train_lora(photos, "cup", tmp_path / "cup", base=base, **train_cup)


def test_pictures_of_a_folder_take_the_place_of_painted_ones(
    base: BaseFiles, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = encoded(monkeypatch)
    folder = tmp_path / "regular_mug"
    for level, caption in ((40, "a_photo_of_a_red_mug"), (200, "a_photo_of_a_blue_mug")):
        (folder / caption).mkdir(parents=True)
        Image.new("RGB", (64, 64), (level,) * 3).save(folder / caption / "0-image.png")
        mask = Image.new("L", (64, 64))
        mask.paste(255, (16, 16, 48, 48))
        mask.save(folder / caption / "0-mask.png")
    record = train(photos, tmp_path / "lora", base, regular=folder, steps=2)
    regular = noted[0].regular
    assert regular is not None and len(regular) == TINY.views
    assert regular.captions.tolist() == [1, 2, 1, 2], "in order of their captions, behind the subject's own"
    assert not torch.equal(noted[0].states[1], noted[0].states[2])
    assert set(record.settings["regular"]) == {"a photo of a blue mug/0-image.png", "a photo of a red mug/0-image.png"}
    unmasked = [SimpleNamespace(image=folder / "a_photo_of_a_red_mug" / "0-image.png", mask=None, caption="a red mug")]
    with pytest.raises(InputError, match="none of the regular pictures has a mask"):
        train(photos, tmp_path / "other", base, regular=unmasked)
    train(photos, tmp_path / "none", base, regular=unmasked, recipe=replace(TINY, beta=0.0), steps=1)
    assert noted[-1].regular is None


def samples(count: int, level: float) -> Samples:
    """Rows that are told apart by their latents' level."""
    latents, mask = torch.full((count, 4, 2, 2), level), torch.ones(count, 1, 2, 2)
    return Samples(latents, latents, mask, torch.full((count,), 64.0), torch.zeros(count, dtype=torch.long))


def draw(recipe: Any, count: int) -> list[tuple[float, Any]]:
    prepared = Prepared(samples(3, 1.0), samples(2, 5.0), torch.zeros(1, 1, 1), torch.zeros(1, 1))
    return Draws(prepared, 1, recipe, 64, torch.Generator().manual_seed(0)).draw(count)


def test_beta_is_a_probability_or_a_weight() -> None:
    ((weight, mixed),) = draw(replace(TINY, beta=0.4), 4000)
    share = float((mixed.samples.latents[:, 0, 0, 0] == 5).float().mean())
    assert weight == 1 and share == pytest.approx(0.4 / 1.4, abs=0.03)
    summed = draw(replace(TINY, beta=0.4, beta_as="loss"), 8)
    assert [(weight, set(part.samples.latents.unique().tolist())) for weight, part in summed] == [
        (1, {1.0}),
        (0.4, {5.0}),
    ]
    assert [len(part.samples) for _, part in summed] == [8, 8]
    parts = [summed[0][1].part(index, 4) for index in range(4)]
    assert torch.equal(torch.cat([part.noise for part in parts]), summed[0][1].noise)
    for wrong in ({"beta": -1.0}, {"beta_as": "share"}, {"crop_share": 1.5}, {"batch": 0}, {"checkpoint_every": -1}):
        with pytest.raises(InputError, match=next(iter(wrong)).replace("crop_share", "crop share")):
            replace(TINY, **wrong).check()  # type: ignore[arg-type]


def test_the_summed_loss_is_that_of_eq_8(
    base: BaseFiles, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step the LoRA adds nothing, so the first loss is linear in beta, from L_s on."""
    losses = {}
    for beta in (0.2, 0.4, 1.0):
        recipe = replace(TINY, beta=beta, beta_as="loss")
        losses[beta] = train(photos, tmp_path / "lora", base, recipe=recipe, steps=1).loss
    regular = (losses[1.0] - losses[0.2]) / 0.8
    assert losses[0.4] == pytest.approx(losses[0.2] + 0.2 * regular, rel=1e-5)
    assert regular > 0.1 and losses[0.2] - 0.2 * regular > 0.1, "both parts count"
    assert np.isfinite(list(losses.values())).all()
