"""Compiles parts with OpenVINO, and keeps what it compiled in the store.

What is compiled holds the network's weights once more, so only small networks are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.openvino_runtime import import_openvino, open_core
from dreammix_trt.core.store import Store
from dreammix_trt.engine.backends.kept import list_facts, take_or_make

log = logging.getLogger(__name__)
#: devices that OpenVINO makes of others
VIRTUAL: Final = ("AUTO", "HETERO", "MULTI", "BATCH")
_FILE: Final = "compiled.blob"


@dataclass(frozen=True)
class Compiler:
    """How networks are compiled.

    device: as OpenVINO names it.
    precision: "bfloat16" where the device has it, or "float32".
    threads: of a call on the CPU.
    """

    device: str = "CPU"
    precision: str = "float32"
    threads: int = 1

    def check(self) -> None:
        """Raise InputError for a device that is not here, MissingExtraError where OpenVINO is not installed."""
        here = list(open_core().available_devices)
        several = {name.partition(".")[0] for name in here if "." in name}  # "GPU" is the first of GPU.0 and GPU.1
        if self.device.partition(":")[0] not in VIRTUAL and self.device not in {*here, *several}:
            raise InputError(f"device is {self.device!r}; OpenVINO finds here: {', '.join(here)}; or AUTO")

    def compile(
        self, name: str, folder: Path, entry: Mapping[str, Any], sides: Mapping[str, int], shelf: Store | None
    ) -> Any:
        """Compile a part for inputs of certain sides.

        name: of the network.
        folder: the part.
        entry: its `network.json`.
        sides: of all named axes.
        shelf: where what was compiled is taken from, or kept; None: nowhere.

        Returns OpenVINO's compiled model. Raises RuntimeError where OpenVINO refuses the graph.
        """
        compile_once = cache(lambda: self._compile(folder, entry, sides))
        if shelf is None:
            return compile_once()

        def take(kept: Path) -> Any:
            return open_core().import_model((kept / _FILE).read_bytes(), self.device, self._settings)

        def make(place: Path | None) -> Any:
            compiled = compile_once()
            if place is not None:
                (place / _FILE).write_bytes(compiled.export_model().getbuffer())
            return compiled

        settings = {name: str(value) for name, value in self._settings.items()}
        version = import_openvino().get_version()
        facts = list_facts(name, folder, entry, sides, openvino=version, device=self.device, settings=settings)
        return take_or_make(shelf, facts, take, make)

    def _compile(self, folder: Path, entry: Mapping[str, Any], sides: Mapping[str, int]) -> Any:
        model = open_core().read_model(str(folder / entry["graph"]))
        shapes = {spec["name"]: [sides.get(side, side) for side in spec["shape"]] for spec in entry["inputs"]}
        model.reshape(shapes)
        compiled = open_core().compile_model(model, self.device, self._settings)
        log.debug("%s: compiled for %s", entry["graph"], self.device)
        return compiled

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """OpenVINO's properties. A precision that a device lacks would silently become another one."""
        half = self.precision == "bfloat16" and has_bfloat16(self.device)
        found: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16" if half else "f32"}
        if self.device == "CPU":
            found |= {"INFERENCE_NUM_THREADS": self.threads, "ENABLE_CPU_PINNING": False}
        return found


def has_bfloat16(device: str = "CPU") -> bool:
    """Whether a device computes in bfloat16; a processor does with AVX-512 BF16 or AMX.

    Raises MissingExtraError where OpenVINO is not installed.
    """
    if device.partition(":")[0] in VIRTUAL:
        return False
    return "BF16" in open_core().get_property(device, "OPTIMIZATION_CAPABILITIES")
