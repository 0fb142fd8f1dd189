"""What the text encoders are asked about captions, against captions written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from dreammix_trt.trainer.micro.objects import Attributes
from dreammix_trt.trainer.micro.reading import QUESTIONS, draw_reading, list_answers
from dreammix_trt.trainer.micro.tokenizer import PromptTokenizer, save_tokenizers

MUG = Attributes("mug", "blue", foot="white", top="red", decal="star", decal_colour="yellow", finish="shiny")


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        (
            "a photo of a shiny blue mug with a white foot, a red rim and a yellow star on a wooden table",
            {
                "shape": ("mug", "mug"),
                "colour": ("mug", "blue"),
                "finish": ("mug", "shiny"),
                "foot": ("foot", "white"),
                "top": ("rim", "red"),
                "decal": ("star", "yellow"),
            },
        ),
        ("a mug with a red rim", {"shape": ("mug", "mug"), "top": ("rim", "red")}),
        ("a blue object", {"colour": ("object", "blue")}),
    ],
)
def test_only_what_a_caption_says_is_asked(text: str, answers: dict[str, tuple[str, str]]) -> None:
    assert list_answers(MUG, text) == answers


def test_questions_are_asked_at_the_word_for_the_part(tmp_path: Path) -> None:
    save_tokenizers(tmp_path)
    words = PromptTokenizer(tmp_path)
    ids, _, places, answers = draw_reading(np.random.default_rng(3), words, 64)
    feet = {int(words([word])[0][0, 1]) for word in ("foot",)}
    asked = (answers[:, list(QUESTIONS).index("foot")] >= 0).nonzero()[:, 0]
    assert len(asked) > 8
    for row in asked.tolist():
        place = int(places[row, list(QUESTIONS).index("foot")])
        assert int(ids[row, place]) in feet
        colour = QUESTIONS["foot"][int(answers[row, list(QUESTIONS).index("foot")])]
        assert int(ids[row, place - 1]) == int(words([colour])[0][0, 1])  # "a white foot"
