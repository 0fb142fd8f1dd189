"""The parts of one build in the store: found there, or made there and noted with what that took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dreammix_trt.core.files import write_json
from dreammix_trt.core.store import Store
from dreammix_trt.engine.directory import COST

_MESSAGES = {"graph": "tracing", "onnx": "weights", "range": "looking for overflow", "base": "tokenizers"}


class PartStore:
    """The store as one build uses it.

    keys: of the parts that a runtime needs, by name, as far as they were provided.
    """

    def __init__(self, shelf: Store, user: Path, update: Callable[[str, float, str], None]) -> None:
        """user: the engine directory to be; update(part, fraction, message): progress."""
        self.shelf, self.update = shelf, update
        self.keys: dict[str, str] = {}
        self._user = user
        self._touched: set[str] = set()
        self._inner: list[float] = []  # seconds spent in the parts made on the way, per part under way

    def holds(self, name: str, kind: str, facts: Mapping[str, Any]) -> bool:
        """Whether a part is there already."""
        return self.shelf.get(part_key(name, kind, facts)) is not None

    def provide(
        self, name: str, kind: str, facts: Mapping[str, Any], make: Callable[[Path], None], *, needed: bool = False
    ) -> Path:
        """The folder of a part, made with `make(folder)` where the store lacks it.

        facts: everything that decides it.
        needed: a runtime needs it; else it is made on the way to another.
        """
        key = part_key(name, kind, facts)
        if needed:
            self.keys[name] = key
        self._touched.add(key)
        self.shelf.register(self._user, self._touched)  # so that nobody prunes it while this build goes on
        found = self.shelf.get_sound(key)
        if found is None:
            self.update(name, 0.0, _MESSAGES.get(kind, "starting"))
            with self.shelf.put(key, {"kind": kind, "part": name, **facts}) as folder:
                if folder is not None:  # else another process has just made it
                    self._make(make, folder)
            found = self.shelf.get(key)
        assert found is not None
        if needed:
            self.update(name, 1.0, "in the store")
        return found

    def files(self) -> dict[str, str]:
        """Of every file "PART/FILE" -> sha256, but for the cost of its making: a part made again is the same part."""
        return {
            f"{name}/{file}": digest
            for name, key in self.keys.items()
            for file, digest in self.shelf.files(key).items()
            if file != COST
        }

    def _make(self, make: Callable[[Path], None], folder: Path) -> None:
        """Make a part and note beside it what that took, without the parts made on the way."""
        from dreammix_trt.engine.hardware import MemoryWatch, give_back_memory

        started = time.perf_counter()
        self._inner.append(0.0)
        with MemoryWatch() as watch:
            make(folder)
        spent, inner = time.perf_counter() - started, self._inner.pop()
        if self._inner:
            self._inner[-1] += spent
        give_back_memory()
        cost = {"seconds": spent - inner, "peak_rss": watch.rss, "peak_anonymous": watch.anonymous}
        write_json(folder / COST, cost)


def part_key(name: str, kind: str, facts: Mapping[str, Any]) -> str:
    """The key of a part; kind: "graph", "range", "onnx", "engine" or "base"."""
    return Store.key({"kind": kind, "part": name, **facts})
