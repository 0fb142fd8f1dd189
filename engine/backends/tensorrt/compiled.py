"""The kernels that TensorRT-RTX compiles for this machine's GPU, kept in a file so that the next start finds them.

Networks of one structure share their kernels: both UNets of a base, and those of every base like it. A runtime cache
takes each kernel once, whatever engine brought it, and finds it again by its content: NVIDIA's own programs attach one
cache to all engines of a deployment. So the key of a file (`structure_of`) decides only what is found, never what is
right: two engines that share a file and differ after all compile what is missing. Weights are no part of the key,
since kernels take them as arguments. Nor is the driver: the package itself refuses kernels of another one, and takes
those of an older one where it can. No GPU was at hand to count the kernels that a second network finds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dreammix_trt.core.errors import DreamMixError
from dreammix_trt.core.files import atomic_file

LOGGER = logging.getLogger(__name__)
_ENTRY: Final = ("engine", "precision", "fused", "wide", "inputs", "outputs", "slots")
_BUILD: Final = ("backend", "version", "targets", "layers", "decomposed", "profiles")


class Kernels:
    """What was compiled for networks of one structure: one runtime cache of the package, and its file.

    Threads may share it. Processes may as well: a file is replaced as a whole, and where another process has written
    more meanwhile, its file stays. What a file lacks is compiled again, which costs time and nothing else.
    """

    def __init__(self, file: Path | None) -> None:
        """file: where the kernels are kept; None: nowhere."""
        self._file = file
        self._kernels: Any = None
        self._configs: list[Any] = []  # they own the cache
        self._kept, self._seen = b"", (0, 0, 0)  # what the file held when this process last saw it
        self._lock = threading.Lock()

    def join(self, config: Any) -> None:
        """Let what a runtime config is used for take its kernels from here. Loads the file the first time."""
        with self._lock:
            if self._kernels is None:
                self._kernels = config.create_runtime_cache()
                self._read()
            self._configs.append(config)
            config.set_runtime_cache(self._kernels)

    def keep(self) -> None:
        """Write the file where something new was compiled. A disk error is only logged."""
        with self._lock:
            kernels = self._kernels
            if self._file is None or kernels is None:
                return
            try:
                data = bytes(kernels.serialize() or b"")
                if data and data != self._kept and not self._is_outdone(len(data)):
                    with atomic_file(self._file) as temporary:
                        temporary.write_bytes(data)
                    self._kept, self._seen = data, _mark(self._file)
            except (OSError, RuntimeError, DreamMixError) as error:
                LOGGER.warning("%s: compiled kernels cannot be kept (%s)", self._file, error)

    def close(self) -> None:
        """Let go of the package's objects. Nobody may have a context that was made with them."""
        with self._lock:
            self._kernels, self._configs = None, []

    def _read(self) -> None:
        """Load the file. One that is damaged, or of another driver, is deleted."""
        file, kernels = self._file, self._kernels
        if file is None or not file.is_file():
            return
        try:
            self._seen = _mark(file)
            data = file.read_bytes()
            if data and kernels.deserialize(data):
                self._kept = data
            else:
                LOGGER.warning("%s: damaged, or of another driver; kernels are compiled again", file)
                file.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:
            LOGGER.warning("%s: cannot be used (%s); kernels are compiled again", file, error)

    def _is_outdone(self, size: int) -> bool:
        """Whether another process has written a file since, of at least this many bytes."""
        if self._file is None or not self._file.is_file():
            return False
        now = _mark(self._file)
        return now != self._seen and now[0] >= size


class Shelf:
    """The kernels of all networks of a place, by structure.

    folder: where their files are; None: they are not kept.
    gpu: name and capability of the device.
    version: of the package.
    """

    def __init__(self, folder: Path | None, gpu: tuple[str, str], version: str) -> None:
        self._folder, self._made = folder, dict[str, Kernels]()
        self._suffix = f"{version}-{re.sub(r'[^A-Za-z0-9]+', '-', ' '.join(gpu))}.kernels"

    def find(self, entry: Mapping[str, Any]) -> Kernels:
        """The kernels of a network, shared with those of the same structure.

        entry: its `network.json`.
        """
        key = structure_of(entry)
        if key not in self._made:
            self._made[key] = Kernels(self._folder / f"{key[:40]}-{self._suffix}" if self._folder else None)
        return self._made[key]

    def keep(self) -> None:
        """Write every file whose kernels are more than it holds."""
        for each in self._made.values():
            each.keep()

    def close(self) -> None:
        """See `Kernels.close`."""
        for each in self._made.values():
            each.close()


def structure_of(entry: Mapping[str, Any]) -> str:
    """A digest of what decides a plan's kernels, without its weights.

    That is the graph (name, precision, form, tensors, slots, number of layers) and the build (package, version, GPUs,
    profiles), as `network.json` has them.
    """
    build = entry.get("build") or {}
    parts = [[entry.get(name) for name in _ENTRY], [build.get(name) for name in _BUILD]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _mark(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
