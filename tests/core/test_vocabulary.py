"""The list of attribute words: a word tells its kind."""

from __future__ import annotations

from dreammix_trt.core.attributes import BEFORE, AttributeDictionary
from dreammix_trt.core.vocabulary import SPELLINGS, VOCABULARY, kind_of


def test_every_word_has_one_kind_and_fits_into_a_dictionary() -> None:
    words = [word for each in VOCABULARY.values() for word in each]
    assert len(words) == len(set(words)) > 50
    assert tuple(VOCABULARY) == BEFORE
    assert AttributeDictionary.of("mug", VOCABULARY, "hand", "here").attributes == VOCABULARY


def test_spellings_lead_to_words_and_hide_none() -> None:
    words = {word for each in VOCABULARY.values() for word in each}
    assert set(SPELLINGS.values()) <= words
    assert not words & SPELLINGS.keys()


def test_a_word_tells_its_kind() -> None:
    assert [kind_of(word) for word in ("Blue", "gray", "wood", "striped", "mug")] == [
        "colour",
        "colour",
        "material",
        "pattern",
        None,
    ]
