"""Reads a protocol's folder. Every fault is found before anything is painted, and all are reported at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dreammix_trt.core.errors import DreamMixError, InputError
from dreammix_trt.core.files import read_json
from dreammix_trt.core.masks import read_mask
from dreammix_trt.core.pictures import read_image
from dreammix_trt.core.remarks import keep_remarks
from dreammix_trt.core.request import Request
from dreammix_trt.evaluation import misato
from dreammix_trt.evaluation.protocol import (
    FILE_NAME,
    SCENES,
    SCHEMA,
    SUBJECTS,
    TASKS,
    Prompt,
    Protocol,
    Scene,
    Subject,
)
from dreammix_trt.trainer.listing import list_photographs
from dreammix_trt.trainer.photographs import PhotographFile, choose_twin, read_photographs

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TOLD = 20  # faults at once
_FIELDS = ("schema", "name", "seeds", "request", "subjects")
_SUBJECT_FIELDS = ("class_name", "token", "subject", "scenes", "expected", *TASKS)
_PROMPT_FIELDS = ("name", "prompt", "substitute", "expected", "request")
_OWN = {
    "prompt": "it belongs to a subject's prompts",
    "seed": "give `seeds`",
    "subject": "each subject says its own",
    "substitute": "it belongs to a subject's prompts",
    "num_images_per_prompt": "give more `seeds`",
}


def read_protocol(folder: str | Path, assigned: Mapping[str, Any] | None = None, prompt: str | None = None) -> Protocol:
    """Read and check a protocol with all its pictures. A folder in MISATO's layout (`misato`) is one as well.

    assigned: fields of the request that replace those of the protocol.
    prompt: replaces the prompts of removal; None: they stay.

    Raises InputError that names every fault with its file and field, FileFormatError where protocol.json is missing or
    no JSON.
    """
    return _Reader(Path(folder), prompt).read(assigned or {})


class _Reader:
    """Collects the faults of one folder."""

    def __init__(self, folder: Path, prompt: str | None) -> None:
        self._folder, self._file, self._prompt = folder, folder / FILE_NAME, prompt
        self._misato = misato.is_layout(folder)
        self._faults: list[str] = []
        self._scenes: dict[str, Scene] = {}
        self._fields: dict[str, Any] = {}

    def read(self, assigned: Mapping[str, Any]) -> Protocol:
        if not self._folder.is_dir():
            raise InputError(
                f"{self._folder} is no folder; give that of a protocol ({FILE_NAME}, {SCENES}/, {SUBJECTS}/), or make "
                "one: `dreammix-trt eval --example FOLDER`"
            )
        record = misato.make_record(self._folder) if self._misato else read_json(self._file)
        if record.get("schema") != SCHEMA:
            raise InputError(f"{self._file} has schema {record.get('schema')!r}, this version reads {SCHEMA}")
        self._check_names("", record, _FIELDS)
        self._fields = self._read_fields("request", record.get("request", {})) | self._read_fields(
            "--set", dict(assigned)
        )
        self._read_scenes()
        subjects = self._take(record, "subjects", dict, "an object: name -> what it is asked for", {})
        if not subjects:
            self._blame("subjects", "is empty; name at least one subject")
        found = [self._read_subject(name, entry) for name, entry in sorted(subjects.items())]
        seeds = self._read_seeds(record.get("seeds", [0]))
        name = self._take(record, "name", str, "a text", self._folder.name)
        if self._faults:
            more = len(self._faults) - _TOLD
            told = [*self._faults[:_TOLD], *([f"and {more} more"] if more > 0 else [])]
            raise InputError(
                told[0] if len(told) == 1 else "\n".join([f"{self._folder} has {len(self._faults)} faults:", *told])
            )
        altered = {**record, "prompt": self._prompt} if self._misato or self._prompt is not None else {}
        return Protocol(self._folder, name, seeds, self._fields, tuple(each for each in found if each), altered)

    def _blame(self, field: str, fault: str) -> None:
        self._faults.append(f"{self._file}: {field} {fault}")

    def _take(
        self, record: Mapping[str, Any], field: str, kind: type, allowed: str, default: Any, where: str = ""
    ) -> Any:
        value = record.get(field, default)
        if isinstance(value, kind):
            return value
        self._blame(f"{where}{field}", f"is {value!r}; it must be {allowed}")
        return default

    def _check_names(self, where: str, record: Mapping[str, Any], known: Sequence[str]) -> None:
        for name in record:
            if name not in known:
                self._blame(f"{where}{name}", f"is unknown; allowed: {', '.join(known)}")

    def _read_fields(self, where: str, fields: Any) -> dict[str, Any]:
        """Fields of a request that a protocol may set."""
        if not isinstance(fields, dict):
            self._blame(where, f"is {fields!r}; it must be an object with fields of a request")
            return {}
        for name in [each for each in fields if each in _OWN]:
            self._blame(f"{where}.{name}", f"cannot be set here: {_OWN[name]}")
        return {name: value for name, value in fields.items() if name not in _OWN}

    def _read_seeds(self, seeds: Any) -> tuple[int, ...]:
        whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 1 << 64 for seed in seeds)
        if not whole or not seeds or len(set(seeds)) < len(seeds):
            self._blame("seeds", f"is {seeds!r}; it must be a list of different whole numbers, 0 or more")
            return (0,)
        return tuple(seeds)

    def _list_scenes(self) -> Iterator[tuple[Path, Path | None, Path]]:
        """Every scene's picture, its mask, and where that belongs."""
        if self._misato:
            yield from misato.list_pairs(self._folder)
            return
        listing = list_photographs(self._folder / SCENES, choose_twin)
        listing.warn()
        for image, mask in listing.pairs.items():
            home = listing.mask_folder if listing.mask_folder.is_dir() else image.parent
            yield image, mask, home / (f"{image.stem}.png" if home != image.parent else f"{image.stem}_mask.png")

    def _read_scenes(self) -> None:
        try:
            found = list(self._list_scenes())
        except DreamMixError as error:
            self._faults.append(str(error))
            return
        for image, mask, own in found:
            if mask is None:
                self._faults.append(f"{image}: has no mask; put it there as {own}, white where it is to be painted")
                continue
            try:
                with keep_remarks(tell=False):
                    read_mask(mask, read_image(image, name="scene"), name="mask")
            except DreamMixError as error:
                self._faults.append(str(error))
                continue
            if not _NAME.fullmatch(image.stem):
                self._faults.append(f"{image}: a scene's name has letters, digits, - and _ only; rename it")
            self._scenes[image.stem] = Scene(image.stem, image, mask)

    def _read_subject(self, name: str, entry: Any) -> Subject | None:
        where = f"subjects.{name}."
        if not _NAME.fullmatch(name):
            self._blame(f"subjects.{name}", "is no name: use letters, digits, - and _")
        if not isinstance(entry, dict):
            self._blame(f"subjects.{name}", f"is {entry!r}; it must be an object with {' and '.join(TASKS)}")
            return None
        self._check_names(where, entry, _SUBJECT_FIELDS)
        asked = {task: self._take(entry, task, list, "a list of prompts", [], where) for task in TASKS}
        if self._prompt is not None:
            asked["removal"] = [self._prompt] * bool(asked["removal"])
        prompts = [
            self._read_prompt(f"{where}{task}[{number}]", f"{task}-{number + 1}", task, given)
            for task in TASKS
            for number, given in enumerate(asked[task])
        ]
        names = [prompt.name for prompt in prompts if prompt]
        for twice in sorted({each for each in names if names.count(each) > 1}):
            self._blame(f"subjects.{name}", f"has two prompts named {twice!r}; name them apart")
        if not prompts:
            self._blame(f"subjects.{name}", f"asks for nothing; give prompts under {' or '.join(TASKS)}")
        return Subject(
            name,
            self._take(entry, "subject", str, "the engine's name of the subject", name, where),
            self._take(entry, "class_name", str, "what the subject is, in a word", "", where),
            self._take(entry, "token", str, "the subject's word in the prompts", "sks", where),
            self._read_photographs(name) if asked["identity"] or asked["editing"] else (),
            self._read_expected(f"{where}expected", entry.get("expected", {})),
            tuple(prompt for prompt in prompts if prompt),
            self._choose_scenes(f"{where}scenes", entry.get("scenes")),
        )

    def _read_photographs(self, name: str) -> tuple[PhotographFile, ...]:
        try:
            return tuple(read_photographs(self._folder / SUBJECTS / name, large_masks=True))
        except DreamMixError as error:
            self._faults.append(str(error))
            return ()

    def _choose_scenes(self, where: str, names: Any) -> tuple[Scene, ...]:
        if names is None:
            return tuple(self._scenes.values())
        if not isinstance(names, list) or not names or not all(isinstance(each, str) for each in names):
            self._blame(where, f"is {names!r}; it must be a list of names of scenes, or left out for all")
            return ()
        for each in [each for each in names if each not in self._scenes]:
            self._blame(where, f"names {each!r}; there are {', '.join(self._scenes) or 'none'}")
        return tuple(self._scenes[each] for each in dict.fromkeys(names) if each in self._scenes)

    def _read_prompt(self, where: str, name: str, task: Any, given: Any) -> Prompt | None:
        entry = {"prompt": given} if isinstance(given, str) else given
        if not isinstance(entry, dict):
            self._blame(where, f"is {given!r}; it must be a text, or an object with a prompt")
            return None
        self._check_names(f"{where}.", entry, _PROMPT_FIELDS)
        name = self._take(entry, "name", str, "letters, digits, - and _", name, f"{where}.")
        if not _NAME.fullmatch(name):
            self._blame(f"{where}.name", f"is {name!r}; it must be letters, digits, - and _")
        fields = self._read_fields(f"{where}.request", entry.get("request", {}))
        fields |= {each: entry[each] for each in ("prompt", "substitute") if each in entry}
        try:
            request = Request.of(**{**self._fields, **fields})
        except InputError as error:
            self._blame(where, f"cannot be asked for: {error}")
            return None
        if request.mode == "reference":
            self._blame(where, "has mode 'reference', which stretches pictures; they are compared to the scene: native")
        return Prompt(name, task, fields, self._read_expected(f"{where}.expected", entry.get("expected", {})))

    def _read_expected(self, where: str, expected: Any) -> dict[str, str]:
        if isinstance(expected, dict) and all(isinstance(word, str) for word in expected.values()):
            return dict(expected)
        self._blame(where, f"is {expected!r}; it must be an object: part -> word")
        return {}
