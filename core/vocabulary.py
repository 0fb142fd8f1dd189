"""The words that attributes are usually said with, by kind: what CLIP is asked, and what contrasts with a subject.

The one list of them. No word stands under two kinds, so that a word tells its kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_WORDS: Final = {
    "size": "tiny, small, large, huge",
    "finish": "shiny, matte, polished, frosted, weathered",
    "colour": (
        "red, orange, yellow, green, blue, purple, pink, brown, black, white, grey, beige, cream, turquoise, gold, "
        "silver"
    ),
    "pattern": "plain, striped, dotted, checkered, floral, marbled, spotted, geometric",
    "texture": "smooth, rough, fluffy, furry, ribbed, knitted, woven, cracked, wrinkled",
    "material": (
        "ceramic, clay, porcelain, glass, metal, steel, copper, wooden, plastic, paper, leather, rubber, stone, "
        "fabric, velvet, wool"
    ),
    "shape": "round, square, tall, flat, slender, curved, angular, oval",
}
#: kind -> its words. Parts, decals and accessories are phrases ("cream foot") and have none of their own.
VOCABULARY: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {kind: tuple(words.split(", ")) for kind, words in _WORDS.items()}
)
#: other spellings and forms -> the word of the vocabulary
SPELLINGS: Final[Mapping[str, str]] = MappingProxyType(
    {"gray": "grey", "golden": "gold", "violet": "purple", "glossy": "shiny", "metallic": "metal", "wood": "wooden",
     "woollen": "wool", "polka-dot": "dotted", "checked": "checkered", "chequered": "checkered",
     "teal": "turquoise", "solid": "plain", "circular": "round", "big": "large", "little": "small"}
)  # fmt: skip


def kind_of(word: str) -> str | None:
    """The kind that a word belongs to ("blue" -> "colour"), in whatever spelling; None: the vocabulary lacks it."""
    plain = word.strip().lower()
    plain = SPELLINGS.get(plain, plain)
    return next((kind for kind, words in VOCABULARY.items() if plain in words), None)
