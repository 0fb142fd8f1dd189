"""What a LoRA file says its subject is called: its trigger word and its class.

Trainers write it in many places: ours as `token` and `class_name`, in the file and on a card beside it; kohya's scripts
as the name of the folder of photographs ("10_ohwx teapot") and the tags of the captions (`ss_tag_frequency`); others as
`modelspec.trigger_phrase`, trained words or the caption of the photographs; sites and managers of LoRAs into a file
beside it. It is a default to be shown, never more. The words of all captions say which attributes the subject may have;
ours say as well which it has.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.files import read_json
from dreammix_trt.core.remarks import remark

CARD = "subject.json"  # that our trainer lays beside a LoRA
_PHRASES = (
    "modelspec.trigger_phrase",
    "ss_trigger_words",
    "trigger_phrase",
    "trigger_words",
    "trigger_word",
    "trained_words",
    "trainedWords",
    "activation text",
    "instance_prompt",
)
_BESIDE = (".civitai.info", ".json", ".metadata.json")  # of Civitai's helpers, A1111, managers
_FOLDERS, _TAGS = "ss_dataset_dirs", "ss_tag_frequency"
_REPEATED = re.compile(r"\d+_(.+)")
_DULL = {
    "a", "an", "the", "of", "in", "on", "with", "and", "by", "at", "for", "to", "this", "my", "photo", "picture",
    "image", "photograph", "photography", "drawing", "painting", "rendering", "close-up", "closeup", "cropped", "style",
}  # fmt: skip
_MOST_CAPTION_WORDS = 2000
_MOST_WORDS = 4  # a longer tag is a sentence, whose first word says nothing


class LoraWords(NamedTuple):
    """What a subject is called.

    token: its word in prompts, one word; "" where the file does not say it.
    class_name: what it is; "" where the file does not say it.
    source: the field of the metadata that says so.
    """

    token: str = ""
    class_name: str = ""
    source: str = ""


def add_card(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """A LoRA's metadata, and what it leaves out of the card beside it, where that is this subject's.

    path: the LoRA file.
    """
    said: dict[str, str] = {}
    with contextlib.suppress(FileFormatError):
        card = read_json(path.with_name(CARD))
        said = {name: card[name] for name in ("token", "class_name") if isinstance(card.get(name), str)}
        said |= {name: json.dumps(card[name]) for name in ("captions", "attributes") if card.get(name)}
    told = read_words(metadata).token
    return {**said, **metadata} if told in ("", said.get("token")) else dict(metadata)


def find_words(path: Path, metadata: Mapping[str, str]) -> LoraWords:
    """Find what a LoRA's subject is called: in its metadata, else in the file that a site or manager laid beside it.

    path: the LoRA file.
    metadata: of it.
    """
    found = read_words(metadata)
    for ending in () if found.token else _BESIDE:
        beside = path.with_name(f"{path.stem}{ending}")
        with contextlib.suppress(FileFormatError):
            told = read_json(beside)
            said = {field: _as_text(told[field]) for field in _PHRASES if told.get(field)}
            found = read_words(said)._replace(source=beside.name) if said else found
        if found.token:
            break
    return found


def read_words(metadata: Mapping[str, str]) -> LoraWords:
    """Read what a LoRA's subject is called.

    metadata: of its safetensors file.

    Returns empty words where nothing is said, or nothing that can be understood.
    """
    own = metadata.get("token", "").split()
    if len(own) == 1:
        return LoraWords(own[0], metadata.get("class_name", "").strip(), "token")
    for field in _PHRASES:
        for phrase in _list_phrases(metadata.get(field, "")):
            found = _split(phrase)
            if found:
                return LoraWords(*found, field)
    return _read_kohya(metadata)


def read_folder_name(name: str) -> LoraWords:
    """What the name of a folder of photographs says, as kohya's scripts want it: "10_ohwx teapot"."""
    named = _REPEATED.fullmatch(name.strip())
    found = _split(named[1]) if named else None
    return LoraWords(*found, "the folder's name") if found else LoraWords()


def read_caption_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The words of the captions that a LoRA was trained with, lower case, in order; () where the file does not say.

    metadata: of its safetensors file: our trainer's `captions`, kohya's `ss_tag_frequency`.
    """
    texts = list(_list_phrases(metadata.get("captions", "")))
    for counts in _read_object(metadata, _TAGS).values():
        texts += map(str, counts) if isinstance(counts, dict) else []
    found = {word for text in texts for word in re.findall(r"\w[\w'-]*", text.lower())}
    return tuple(sorted(found - _DULL))[:_MOST_CAPTION_WORDS]


def read_attributes(path: Path, metadata: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Read the attributes that our trainer writes into a LoRA, kind -> values (`core/attributes.py`).

    path: the LoRA file, to name it.
    metadata: of it; `attributes` holds JSON.

    Returns {} where it says none. What another program calls so is ignored with a remark.
    """
    text = metadata.get("attributes")
    if text is None:
        return {}
    try:
        found = AttributeDictionary.of(metadata.get("class_name") or "thing", json.loads(text), "", str(path))
    except (ValueError, RecursionError, InputError) as error:
        why = str(error).removeprefix(f"{path}: ")
        remark(f"{path}: the attributes in its metadata are ignored, as they are not ours ({why}); give --attributes")
        return {}
    return dict(found.attributes)


def _read_kohya(metadata: Mapping[str, str]) -> LoraWords:
    """The folder's name counts where no caption replaced it; else the most frequent tag."""
    tags: dict[str, float] = {}
    listed = _read_object(metadata, _FOLDERS)
    folders = list(listed)
    for folder, counts in _read_object(metadata, _TAGS).items():
        folders.append(folder)
        for tag, count in counts.items() if isinstance(counts, dict) else ():
            if isinstance(count, int | float):
                tags[str(tag)] = tags.get(str(tag), 0) + count
    spoken = {word for tag in tags for word in tag.lower().split()}
    for folder in folders:
        named = read_folder_name(folder)
        if named.token and (not spoken or named.token.lower() in spoken):
            return named._replace(source=_FOLDERS if folder in listed else _TAGS)
    found = _split(max(tags, key=lambda tag: tags[tag])) if tags else None
    return LoraWords(*found, _TAGS) if found else LoraWords()


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _split(phrase: str) -> tuple[str, str] | None:
    """ "a photo of ohwx teapot" -> ("ohwx", "teapot"); None for a sentence, or for nothing but common words."""
    words = [word.strip(".,;:!?\"'()") for word in phrase.split()]
    telling = [word for word in words if word and word.lower() not in _DULL]
    if not 0 < len(telling) <= _MOST_WORDS:
        return None
    return telling[0], " ".join(telling[1:])


def _list_phrases(text: str) -> Iterator[str]:
    """The phrases in a field: a JSON list, or a text with commas."""
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError):
        listed = text
    for each in listed if isinstance(listed, list) else [text]:
        yield from (phrase for phrase in str(each).split(",") if phrase.strip())


def _read_object(metadata: Mapping[str, str], field: str) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(field, "{}"))
    except (ValueError, RecursionError):
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}
