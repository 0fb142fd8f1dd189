"""The kernels that TensorRT-RTX compiles for this machine's GPU, kept in a file so that the next start finds them."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreammix_trt.core.errors import DreamMixError
from dreammix_trt.core.files import atomic_file, sha256_of
from dreammix_trt.engine.backends.tensorrt.place import PlanPlace

LOGGER = logging.getLogger(__name__)


@dataclass
class Compiled:
    """TensorRT-RTX's settings of an engine, and the kernels that it compiled for them.

    config: the package's runtime config.
    kernels: the package's runtime cache.
    file: where the kernels are kept; None: nowhere.
    kept: what the file holds now.
    """

    config: Any
    kernels: Any
    file: Path | None
    kept: bytes = field(default=b"", repr=False)

    @classmethod
    def of(cls, config: Any, file: Path | None) -> Compiled:
        """Load the kernels in the file. A file that is damaged, or of another driver, is deleted."""
        kernels = config.create_runtime_cache()
        compiled = cls(config, kernels, file)
        if file is not None and file.is_file():
            try:
                data = file.read_bytes()
                if data and kernels.deserialize(data):
                    compiled.kept = data
                else:
                    LOGGER.warning("%s: damaged, or of another driver; kernels are compiled again", file)
                    file.unlink(missing_ok=True)
            except (OSError, RuntimeError) as error:
                LOGGER.warning("%s: cannot be used (%s); kernels are compiled again", file, error)
        config.set_runtime_cache(kernels)
        return compiled

    def keep(self) -> None:
        """Write the file where something new was compiled. A disk error is only logged: it costs time, nothing else."""
        if self.file is None:
            return
        try:
            kernels = self.kernels
            data = bytes(kernels.serialize() or b"")
            if data and data != self.kept:
                with atomic_file(self.file) as temporary:
                    temporary.write_bytes(data)
                self.kept = data
        except (OSError, RuntimeError, DreamMixError) as error:
            LOGGER.warning("%s: compiled kernels cannot be kept (%s)", self.file, error)


def kernels_file(place: PlanPlace, plan: Path) -> Path | None:
    """Where the kernels of a plan are kept. They fit one version of the package on one kind of GPU."""
    trt = place.trt
    if place.cache is None:
        return None
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", " ".join(place.gpu))
    return place.cache / f"{sha256_of(plan)[:40]}-{trt.__version__}-{gpu}.kernels"
