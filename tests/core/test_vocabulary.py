"""The list of attribute words: what a word says, what excludes it, and which words are usual."""

from __future__ import annotations

from dreammix_trt.core.attributes import BEFORE, BEHIND, AttributeDictionary
from dreammix_trt.core.vocabulary import ADJECTIVES, NOUNS, USUAL, find_meanings, find_noun


def test_the_list_is_orderly() -> None:
    """Every kind is one of the dictionary's; no word is twice in a kind, or a noun of two kinds."""
    assert tuple(ADJECTIVES) == BEFORE and tuple(NOUNS) == BEHIND
    for kind, groups in ADJECTIVES.items():
        words = [word for group in groups for word in group.replace("*", "").replace("/", " ").split()]
        assert sorted(words) == sorted(set(words)), kind
        assert all(word == word.lower() and find_meanings(word) for word in words)
    nouns = [word for text in NOUNS.values() for word in text.replace("/", " ").split()]
    assert sorted(nouns) == sorted(set(nouns))


def test_usual_words_have_one_kind_and_a_meaning_of_their_own() -> None:
    """So CLIP's scores of a kind are shared by no two words for the same, and a contrast tells its kind."""
    assert tuple(USUAL) == BEFORE and all(len(words) > 1 for words in USUAL.values())
    meanings = {(kind, word): find_meanings(word) for kind, words in USUAL.items() for word in words}
    assert all([each.kind for each in found] == [kind] for (kind, _), found in meanings.items())
    assert len({found for found in meanings.values()}) == len(meanings) > 50
    assert AttributeDictionary.of("mug", {"size": USUAL["size"]}, "hand", "here").attributes == {"size": USUAL["size"]}
    assert sum(group.count("*") for groups in ADJECTIVES.values() for group in groups) == len(meanings)


def test_a_word_tells_what_it_means() -> None:
    gold = {(each.kind, each.meaning) for each in find_meanings("gold")}
    assert gold == {("colour", "gold"), ("material", "gold")}
    assert find_meanings("gray") == find_meanings("grey") == find_meanings("grey-coloured") != find_meanings("blue")
    assert find_meanings("cream")[0][:2] == find_meanings("teal")[0][:2] != find_meanings("dark")[0][:2]
    assert find_meanings("mug") == find_meanings("large*") == ()
    assert [find_noun(word) for word in ("feet", "stars", "boxes", "dragons", "glass")] == [
        ("part", "foot"),
        ("decal", "star"),
        ("", "boxe"),
        ("", "dragon"),
        ("", "glass"),
    ]
