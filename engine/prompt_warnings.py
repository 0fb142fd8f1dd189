"""Words of a request that do nothing, or the opposite of what was meant: one sentence each.

What is said depends on the request, its subject and the tokenizer alone, so it is the same on the host and on a device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.request import Request
from dreammix_trt.engine.prompt_syntax import Parsed
from dreammix_trt.engine.text import Tokenizer, find_near_miss, has_word


def list_warnings(
    request: Request,
    texts: Sequence[tuple[str, Parsed]],
    subject: str,
    token: str,
    tokenizer: Tokenizer,
    caption_words: Sequence[str] = (),
    has_tokens: bool = False,
) -> tuple[str, ...]:
    """What a user should know about the words of a request.

    texts: (field of the request, how it was read) of every prompt that is encoded; the request's own comes first.
    subject: the name of its subject, "" for none and for one of tokens, which needs no word.
    token: the subject's word in prompts.
    tokenizer: of the first encoder.
    caption_words: that the subject was trained with; (): nobody knows.
    has_tokens: whether a subject's tokens stand beside the text.
    """
    found = [f"{name}: {note}" for name, parsed in texts for note in parsed.notes]
    found += [f"{name}: {note}" for name, parsed in texts for note in _note_rest(request, parsed, tokenizer)]
    found += _note_subject(texts[0][1].text, subject, token)
    found += _note_substitute(request, texts[0][1].text, token, tokenizer)
    found += _note_strange(request, texts[0][1].text, subject, token, caption_words)
    if subject and request.guided and has_word(request.negative_prompt or "", token):
        found.append(f"negative_prompt: it names the subject's word {token!r}, and so leads away from the subject")
    if request.negative_prompt and not request.guided:
        found.append(
            f"negative_prompt does nothing: guidance_scale is {request.guidance_scale:g}, and guidance begins above 1"
        )
    found += _note_prior(request, subject)
    found += [] if has_tokens or request.token_weight == 0 else _note_tokens(request)
    return tuple(dict.fromkeys(found))


def _note_prior(request: Request, subject: str) -> Iterator[str]:
    if request.prior is None:
        if request.prior_weight != 1:
            yield f"prior_weight is {request.prior_weight:g} and does nothing: there is no prior"
    elif request.prior == "negative" and request.negative_prompt:
        yield "negative_prompt does nothing: prior 'negative' stands in its place"
    elif request.prior == "alone":
        if request.prompt:
            yield "prompt does nothing: prior 'alone' stands in the place of all text"
        if request.substitute_words:
            yield "substitute does nothing: prior 'alone' stands in the place of all text"


def _note_tokens(request: Request) -> Iterator[str]:
    """Fields that say how tokens are used, where there are none."""
    for field in ("token_count", "token_weight"):
        value = getattr(request, field)
        if value != getattr(Request, field):
            yield f"{field} is {value:g} and does nothing: the subject has no tokens"


def _note_rest(request: Request, parsed: Parsed, tokenizer: Tokenizer) -> Iterator[str]:
    count, rest = tokenizer.find_rest(parsed.text)
    if rest and request.truncate_prompt:
        yield f"{count - TOKENS + 2} of {count} tokens are cut off (truncate_prompt): {rest.strip()!r}"


def _note_subject(prompt: str, subject: str, token: str) -> Iterator[str]:
    if subject and not has_word(prompt, token):
        near = find_near_miss(prompt, token)
        hint = f"; is {near!r} meant to be it?" if near else ""
        yield f"prompt: it does not name the subject {subject!r}, whose word is {token!r}{hint}"


def _note_substitute(request: Request, prompt: str, token: str, tokenizer: Tokenizer) -> Iterator[str]:
    if not request.substitute_words:
        if request.substitute_prefix is not None:
            yield "substitute_prefix does nothing: there is no substitute"
        return
    if not request.tas_stages:
        yield "substitute does nothing: tas_stages names no stage"
    for word in request.substitute_words:
        if not re.search(r"\w", word):
            yield f"substitute: {word!r} is no word"
        elif has_word(word, token):
            yield f"substitute: {word!r} is the subject's own word, and would be taken out of it"
        elif has_word(prompt, word.strip()):
            yield f"substitute: {word!r} stands in the prompt too, and is taken out there as well"
        else:
            yield from (
                f"substitute: {each!r} is no word that the text encoder knows: check its spelling"
                for each in re.findall(r"[^\W\d_]+", word)
                if tokenizer.spells_out(each)
            )


def _note_strange(
    request: Request, prompt: str, subject: str, token: str, caption_words: Sequence[str]
) -> Iterator[str]:
    """Attributes that no caption of the subject has, where its captions name any."""
    known = [word for word in caption_words if word != token.lower()]
    if not subject or len(known) < 2:  # the class alone says nothing about attributes
        return
    shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    for word in request.substitute_words:
        parts = re.findall(r"\w[\w'-]*", word.lower())
        if parts and not has_word(prompt, word.strip()) and not {*parts} & {*known, token.lower()}:
            yield f"substitute: {word!r} is in no caption that {subject!r} was trained with ({shown})"
