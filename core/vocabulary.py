"""The words that attributes are said with, by kind (core/attributes.py) and by what excludes what; English.

A kind has groups. Words of one group exclude each other ("red", "blue"), unless they mean the same ("grey/gray"); words
of different groups do not ("shiny", "transparent"). The first group of a kind is its main one. A star marks the usual
words: what CLIP is asked, and what contrasts with a subject.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Final, NamedTuple


def word_set(text: str) -> frozenset[str]:
    """The blank-separated words of a text."""
    return frozenset(text.split())


ADJECTIVES: Final[Mapping[str, tuple[str, ...]]] = {
    "size": ("big/large*/huge/giant/oversized/enormous small*/little/tiny/mini/miniature medium-sized",),
    "finish": (
        "matte*/matt/mat/dull shiny*/glossy/polished/gleaming/lustrous satin mirrored/reflective/mirror "
        "glittering/glittery/sparkling/sparkly iridescent/pearlescent/holographic brushed",
        "transparent*/clear/see-through translucent/frosted* opaque",
        "glazed/enamelled/enameled/lacquered/varnished unglazed/bare",
    ),
    "colour": (
        "red*/scarlet/crimson/ruby orange* yellow*/lemon green*/emerald blue*/cobalt/sapphire purple*/violet pink* "
        "black* white* grey*/gray brown*/chocolate-brown beige*/tan cream*/ivory cyan/turquoise*/aqua teal "
        "magenta/fuchsia gold/golden silver/silvery bronze copper navy maroon/burgundy olive lime mint lavender/lilac "
        "indigo coral salmon peach mustard khaki amber charcoal "
        "multicoloured/multicolored/colourful/colorful/rainbow",
        "dark/deep light/pale/pastel bright/vivid neon/fluorescent",
    ),
    "pattern": (
        "plain*/unpatterned striped*/stripes/stripe/stripy/stripey dotted*/spotted/spots/dots/polka "
        "checkered*/chequered/checked/checks/gingham plaid/tartan floral*/flowered/flowery zigzag/chevron paisley "
        "camouflage/camo leopard zebra marbled* speckled/mottled argyle herringbone geometric*",
    ),
    "texture": (
        "smooth* rough*/coarse/grainy bumpy/knobbly/pebbled furry/fluffy*/fuzzy/hairy/shaggy ribbed*/ridged/grooved "
        "cracked*/crackled/crackle wrinkled*/crumpled/creased scaly spiky hammered/dimpled quilted "
        "embossed/carved/engraved",
        "soft/squishy hard/stiff",
        "rusty/rusted/corroded",
        "worn/weathered*/battered/distressed/scratched pristine",
    ),
    "material": (
        "glass* clay*/terracotta/earthenware ceramic*/porcelain/china stoneware wood/wooden* metal*/metallic/chrome "
        "steel*/iron aluminium/aluminum brass* gold silver copper bronze tin plastic* rubber* paper* "
        "cardboard stone*/granite marble concrete/cement leather* fabric*/cloth/textile cotton linen denim silk "
        "velvet* felt wool*/woollen/woolen/knitted/knit/yarn/crocheted/crochet plush fur straw/wicker/rattan bamboo "
        "ice crystal wax foam jade chocolate lego",
    ),
    "shape": (
        "round*/circular/spherical/rounded square*/cubic/boxy rectangular oval* triangular/conical/cone-shaped "
        "cylindrical hexagonal octagonal heart-shaped star-shaped",
        "tall*/high short/squat/low",
        "wide/broad narrow/slim/slender*/thin thick/fat/chunky/plump/chubby",
        "flat* curved*/bent/twisted straight",
        "angular*/pointed/sharp-edged curvy/bulbous",
    ),
}
NOUNS: Final[Mapping[str, str]] = {
    "part": (
        "foot/base/bottom rim/edge/lip handle/grip lid/cover cap/stopper/cork roof band/ring/belt spout "
        "neck door window wheel leg arm ear nose tail eye wing horn strap sole lace zip/zipper button pocket collar "
        "sleeve hood mane beak paw knob top/crown"
    ),
    "decal": (
        "star heart circle square triangle diamond moon sun flower bolt/lightning clover cross arrow cat dog bird "
        "fish butterfly skull smiley face leaf tree anchor cloud letter number logo text/lettering/writing "
        "sticker/decal/emblem/symbol/motif/badge/print/picture/drawing"
    ),
    "accessory": (
        "hat scarf ribbon bow glasses/sunglasses necklace tie/bowtie bandana helmet backpack cape cloak "
        "jacket coat shirt sweater/jumper dress gloves/glove socks/sock shoes/shoe boots/boot mask earring/earrings"
    ),
}
GENERIC: Final = word_set("sticker decal emblem symbol motif badge print picture drawing pattern design")
#: kind -> its usual words, each with another meaning. Parts, decals and accessories are phrases ("cream foot") and have
#: none of their own.
USUAL: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {kind: tuple(re.findall(r"([\w-]+)\*", " ".join(groups))) for kind, groups in ADJECTIVES.items()}
)
_SEVERAL: Final = {"feet": "foot", "leaves": "leaf", "knives": "knife"}


class Meaning(NamedTuple):
    """What a word says: its group, and what it means there. Words of one group with other meanings exclude it."""

    kind: str
    group: int
    meaning: str


def find_meanings(word: str) -> tuple[Meaning, ...]:
    """What a word says of a thing, lower case; "gold" is a colour and a material. (): it is not known."""
    return _list_meanings().get(word) or _read_compound(word)


def find_noun(word: str) -> tuple[str, str]:
    """(kind, meaning) of a word for something on a thing: "feet" -> ("part", "foot"); ("", the word) for others."""
    for each in (word, _SEVERAL.get(word, ""), re.sub(r"(?<=..)s$", "", word), re.sub(r"(?<=[sxzh])es$", "", word)):
        if each in _list_nouns():
            return _list_nouns()[each]
    return "", re.sub(r"(?<=..[^s])s$", "", word)


def split_words(text: str) -> list[str]:
    """The words of a text, lower case; those with a hyphen are parted unless they are known as they stand."""
    words: list[str] = []
    for word in re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower()):
        words += [word] if "-" not in word or find_meanings(word) else word.split("-")
    return words


def _read_compound(word: str) -> tuple[Meaning, ...]:
    """ "boot-shaped", "cream-coloured"."""
    first, mark, last = word.rpartition("-")
    if mark and last == "shaped":
        return (Meaning("shape", 0, word),)
    if mark and last in ("coloured", "colored", "colour", "color"):
        return tuple(each for each in find_meanings(first) if each.kind == "colour")
    return ()


@cache
def _list_meanings() -> dict[str, tuple[Meaning, ...]]:
    found: dict[str, tuple[Meaning, ...]] = {}
    for kind, groups in ADJECTIVES.items():
        for number, text in enumerate(groups):
            for word, meaning in _list_synonyms(text):
                found[word] = (*found.get(word, ()), Meaning(kind, number, meaning))
    return found


@cache
def _list_nouns() -> dict[str, tuple[str, str]]:
    return {word: (kind, meaning) for kind, text in NOUNS.items() for word, meaning in _list_synonyms(text)}


def _list_synonyms(text: str) -> Iterator[tuple[str, str]]:
    """(word, what it means) of a group: blanks part meanings, "/" words that mean the same; stars go."""
    for alike in text.replace("*", "").split():
        first, *_ = words = alike.split("/")
        yield from ((word, first) for word in words)
