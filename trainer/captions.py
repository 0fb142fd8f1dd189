"""Captions of a subject's photographs and of the regular pictures of its class (paper, section 3.3)."""

from __future__ import annotations

from dreammix_trt.core.attributes import AttributeDictionary, compose_phrase, with_article
from dreammix_trt.trainer.attributes.prompts import combine_prompts

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "black")


def subject_captions(token: str, class_name: str, attributes: AttributeDictionary) -> tuple[str, ...]:
    """Captions with one attribute each, then one with all: what is said of an attribute belongs to its word.

    The token stands before the class, "a photo of a blue sks mug", as people will ask for it.
    """
    named = [[pair] for pair in attributes.pairs]
    named += [list(attributes.pairs)] if len(named) > 1 else []
    return tuple(f"a photo of {with_article(compose_phrase(f'{token} {class_name}', pairs))}" for pairs in named)


def regular_captions(class_name: str, count: int, attributes: AttributeDictionary | None, seed: int) -> list[str]:
    """`count` captions of members of the class, without the subject's token.

    Without attributes: a colour, every third the class alone. With them: combinations of the subject's and of others;
    where the words give fewer, they take turns.
    """
    if attributes is not None:
        found = combine_prompts(attributes, count, seed)
        return [found[index % len(found)] for index in range(count)]
    words = [word for index, colour in enumerate(COLOURS) for word in ([colour, ""] if index % 2 else [colour])]
    chosen = [words[index % len(words)] for index in range(count)]
    return [f"a photo of {with_article(f'{word} {class_name}'.strip())}" for word in chosen]
