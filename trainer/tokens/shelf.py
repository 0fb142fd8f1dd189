"""Encoded objects in the work folder, some tens in a file: made once, and a stop loses one file at most."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.tensors import map_tensors, write_tensors
from dreammix_trt.trainer.processes import Processes
from dreammix_trt.trainer.row_reader import Row
from dreammix_trt.trainer.tokens.objects import ObjectPool
from dreammix_trt.trainer.tokens.recipes import TokenRecipe, draw_count

if TYPE_CHECKING:
    from dreammix_trt.trainer.tokens.encoding import Arrays, ObjectEncoder

log = logging.getLogger(__name__)
_IN_A_FILE, _SEED = 32, 62
_OPEN = 256  # files that are mapped at a time
_CLASS_ALONE = 0.5  # of the rows that learn from words hear the class alone, the others each of the other texts
_TEXT = ("states", "pooled")


class Shelf:
    """Draws rows of the objects that `fill` has made."""

    def __init__(self, folder: Path, pool: ObjectPool, recipe: TokenRecipe, seed: int) -> None:
        self._folder, self._pool, self._recipe, self._seed = folder, pool, recipe, seed
        self._files = [folder / f"{number:05d}.safetensors" for number in range(-(-len(pool) // _IN_A_FILE))]
        self._objects: list[tuple[int, slice]] = []
        self._map = lru_cache(_OPEN)(lambda number: map_tensors(self._files[number]))

    def fill(
        self, open_encoder: Callable[[], ObjectEncoder], processes: Processes, tell: Callable[[float], None]
    ) -> None:
        """Make the files that are missing or damaged; several processes share them.

        open_encoder: called where there is something to make. tell: is told the share that is made.

        Raises InputError where no object can be read.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        own = [number for number in range(len(self._files)) if number % processes.count == processes.index]
        missing = [number for number in own if not self._is_whole(number)]
        encoder = open_encoder() if missing else None
        for done, number in enumerate(missing):
            assert encoder is not None
            tell((len(own) - len(missing) + done) / len(own))
            self._write(number, encoder)
        processes.wait()
        self._objects = [each for number in range(len(self._files)) for each in self._list_objects(number)]
        if not self._objects:
            raise InputError("none of the objects can be read; see the warnings")

    def draw(self, rng: np.random.Generator) -> Row:
        """A row: a picture of an object, and a reference of it from another photograph where there is one.

        latents, masked (4, h, w); mask (1, h, w); sharp, size (); tokens (48, D); states (77, C); pooled (Dp);
        noise (4, h, w); time () from 0 to 1; count (): how many tokens the batch has that begins with this row. Where
        the recipe asks for words: wordy () is 1 for a row that learns from them; heard_states, words_states (77, C) and
        heard_pooled, words_pooled (Dp): the text before it was dropped for guidance, and all in words; silent () is 1
        where it was.
        """
        number, views = self._objects[int(rng.integers(len(self._objects)))]
        held, recipe = self._map(number), self._recipe
        places = np.arange(views.start, views.stop)
        place = int(rng.choice(places))
        others = places[held["photograph"][views] != held["photograph"][place]]
        reference = int(rng.choice(others if len(others) else places))
        wordy, whole, silent = (rng.random() < share for share in (recipe.words, recipe.decoupling, recipe.no_text))
        whole = whole and not wordy
        pair = 0 if rng.random() < _CLASS_ALONE else int(rng.integers(1, held["heard"].shape[1]))
        heard = int(held["heard"][place, pair] if wordy else held["caption" if whole else "class_text"][place])
        text = 0 if silent else heard
        row = {
            "latents": held["latents"][place],
            "masked": held["grey"][0] if whole else held["masked"][place],
            "mask": np.ones_like(held["cells"][place]) if whole else held["cells"][place],
            "sharp": held["sharp"][place],
            "tokens": held["tokens"][reference],
            "states": held["states"][text],
            "pooled": held["pooled"][text],
            "noise": rng.standard_normal(held["latents"].shape[1:], np.float32),
            "time": rng.random(),
            "size": rng.random(),
            "count": draw_count(rng, held["tokens"].shape[1]),
        }
        if recipe.words:
            told = int(held["words"][place, pair]) if wordy else heard
            row |= {"wordy": wordy, "silent": silent}
            row |= {
                f"{name}_{part}": held[part][k] for name, k in (("heard", heard), ("words", told)) for part in _TEXT
            }
        return {name: np.array(value, np.float32) for name, value in row.items()}

    def _is_whole(self, number: int) -> bool:
        from dreammix_trt.trainer.tokens.encoding import SHARD

        if not self._files[number].exists():
            return False
        try:
            held = map_tensors(self._files[number])
        except FileFormatError as error:
            log.warning("%s is damaged (%s); its objects are encoded again", self._files[number], error)
            return False
        return not held or all(name in held for name in SHARD)

    def _write(self, number: int, encoder: ObjectEncoder) -> None:
        from dreammix_trt.trainer.tokens.encoding import SHARD

        first = number * _IN_A_FILE
        opened = (self._pool.open(each) for each in range(first, min(first + _IN_A_FILE, len(self._pool))))
        objects = [seen for seen in opened if seen is not None]
        arrays: Arrays = {}
        if objects:
            arrays = encoder.encode(objects, self._recipe, np.random.default_rng([self._seed, _SEED, number]))
        write_tensors(
            self._files[number], {name: (SHARD[name], each.shape) for name, each in arrays.items()}, arrays.__getitem__
        )

    def _list_objects(self, number: int) -> Sequence[tuple[int, slice]]:
        """(file, the views of one object in it)."""
        owners: Any = map_tensors(self._files[number]).get("owner", ())
        if not len(owners):
            return []
        ends = [*(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
        return [(number, slice(start, end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
