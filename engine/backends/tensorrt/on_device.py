"""A base's networks on TensorRT-RTX and TensorRT 11: plans loaded, contexts bound to arrays, runs enqueued.

Both packages share the code. What only TensorRT-RTX has depends on `Package.jit`: it finishes kernels at load (kept in
a runtime cache), says whether a context may be captured, and unloads weights without losing contexts. TensorRT 11 can
do none of that. There a network whose weights are unloaded is destroyed and loaded again from its file, what is bound
to it is made again with the same arrays, and a question that only the engine answers loads it for a moment. The names
of TensorRT-RTX are those of 1.7.1. The names of TensorRT 11 were compared with its published bindings (11.1) and never
run: unverified.

Every context runs in memory that is given to it, at addresses that never change. Variables called trt, runtime, engine,
context, config and kernels are the package's objects. A test compares their attributes with the package's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from dreammix_trt.core.axes import FACTOR, Sides, Tensor
from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.errors import EngineError, OutOfMemoryError, ProfileError
from dreammix_trt.core.files import size_text
from dreammix_trt.core.networks import is_twin, kind_of
from dreammix_trt.core.seam import Array, BaseFacts
from dreammix_trt.core.slots import Slot, slots_of
from dreammix_trt.engine.backends.onnxruntime.engine_set import read_facts, read_network
from dreammix_trt.engine.backends.tensorrt.bound import TensorRtBound
from dreammix_trt.engine.backends.tensorrt.network import PlanNetwork, plan_of
from dreammix_trt.engine.backends.tensorrt.package import PACKAGES, load
from dreammix_trt.engine.backends.tensorrt.place import PlanPlace
from dreammix_trt.engine.backends.tensorrt.plans import (
    open_guarded_runtime,
    refuse_host_code,
)
from dreammix_trt.engine.canvas.geometry import Size
from dreammix_trt.engine.drivers.device import Device

__all__ = ["ProfileError", "TensorRtNetworks"]


class TensorRtNetworks:
    """`DeviceNetworks` (core/seam.py) on plans. Runtimes in several threads may share them.

    A captured graph holds the addresses of weights: it is invalid once `count_loads` of its network has changed.
    """

    def __init__(self, place: PlanPlace, facts: BaseFacts, networks: Mapping[str, PlanNetwork]) -> None:
        self.facts = facts
        self._place, self._networks = place, dict(networks)

    @classmethod
    def open(
        cls,
        parts: Mapping[str, Path],
        backend: str,
        device: Device,
        *,
        cache: Path | None = None,
        resident: Collection[str] | None = None,
    ) -> TensorRtNetworks:
        """Open the parts of a base.

        parts: name -> folder with `network.json` and its plan, and `base`.
        backend: "tensorrt-rtx" or "tensorrt".
        cache: folder that keeps what TensorRT-RTX compiles for this GPU; None: it is compiled again each time (up to
            half a minute).
        resident: the networks whose weights are loaded now (none, to plan memory first); None: all but float32 twins.

        Raises MissingExtraError or EngineError for the package, EngineError for parts that are damaged, carry host code
        or were built with another version, DeviceError for another GPU or driver, OutOfMemoryError with the plan.
        """
        trt = load(backend)
        facts = read_facts(parts["base"])
        entries = {name: (folder, read_network(folder)) for name, folder in parts.items() if name != "base"}
        for name, (folder, entry) in entries.items():
            refuse_host_code(plan_of(name, folder, entry))
        runtime = open_guarded_runtime(backend)
        place = PlanPlace(trt, PACKAGES[backend], runtime, device, device.make_stream(), cache)
        opened = cls(place, facts, {name: PlanNetwork(name, *entry, place) for name, entry in entries.items()})
        try:
            usual = [name for name in entries if not is_twin(name)]
            opened._bring(usual if resident is None else resident)
        except BaseException:
            opened.close()
            raise
        return opened

    def __enter__(self) -> TensorRtNetworks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._networks

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The LoRA slots of a network."""
        return slots_of(self._networks[name].entry) if name in self._networks else ()

    def weights(self, name: str) -> Mapping[str, npt.NDArray[Any]]:
        """The base's own weights of the slots, mapped from their file at first use."""
        return self._network(name).slot_weights

    def inputs(self, name: str) -> tuple[Tensor, ...]:
        """Those in `network.json` that the engine has; the weights of slots are the last ones."""
        return self._network(name).shapes.inputs

    def outputs(self, name: str) -> tuple[Tensor, ...]:
        """Those in `network.json`."""
        return self._network(name).shapes.outputs

    def frames(self) -> tuple[Size, ...] | None:
        """The UNet's frames, where its profiles have fixed sides; else None (`bind` checks)."""
        spans = [network.shapes.spans for name, network in self._networks.items() if kind_of(name).call == "step"]
        frames = {(span["h"], span["w"]) for each in spans for span in each if "h" in span and "w" in span}
        if not frames or any(low != high for frame in frames for low, high in frame):
            return None
        return tuple(sorted((FACTOR * h[0], FACTOR * w[0]) for h, w in frames))

    def contexts(self) -> tuple[int, ...] | None:
        """The lengths in the profiles of the UNets, and of what attends for them: all of a span."""
        told = ("stage", "step")
        spans = [network.shapes.spans for name, network in self._networks.items() if kind_of(name).call in told]
        spanned = {span["context"] for each in spans for span in each if "context" in span}
        lengths = {length for low, high in spanned for length in range(low, high + 1)}
        return tuple(sorted(lengths)) or (TOKENS,)

    @property
    def most_pictures(self) -> int | None:
        """The largest batch that the UNets take; other networks take one picture at a time, or rows."""
        most = [
            max(span["pictures"][1] for span in network.shapes.spans)
            for name, network in self._networks.items()
            if kind_of(name).call == "step" and all("pictures" in span for span in network.shapes.spans)
        ]
        return min(most, default=None)

    @property
    def captures(self) -> bool:
        """Always, once a network ran."""
        return True

    def weight_bytes(self, name: str) -> int:
        """The size of the plan, which is little more than its weights (measured: 5183 MB for 5146 MB)."""
        return self._network(name).plan.stat().st_size

    def workspace_bytes(self, name: str, sides: Sides) -> int:
        """Exactly what a context needs for these sides.

        The first question about a shape makes the context, in which TensorRT-RTX may compile kernels; `bind` then takes
        it. Where TensorRT 11 has unloaded the network, shapes other than its profiles' own load it for the answer and
        drop it again.

        Raises the same errors as `bind`.
        """
        with self._place.lock:
            return self._network(name).measure_workspace(sides, self.facts)

    def bind(
        self, name: str, sides: Sides, arrays: Mapping[str, Array], workspace: Array | None = None
    ) -> TensorRtBound:
        """Make a context of its own with every address set.

        arrays: one for every input and output, by name (the slots' weights as well), at multiples of ALIGNMENT bytes,
            of exactly the network's dtype and shape.
        workspace: at least `workspace_bytes`.

        The weights need not be loaded; on TensorRT 11 the context is then made with them.

        Raises ProfileError for sides outside the profiles, EngineError with the array that does not fit, DeviceError or
        OutOfMemoryError where the package fails.
        """
        with self._place.lock:
            return self._network(name).bind(sides, self.facts, arrays, workspace)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The networks whose weights are on the device now."""
        return tuple(name for name, network in self._networks.items() if network.loaded)

    def count_loads(self, name: str) -> int:
        """How often the weights were loaded. Graphs that were captured at another count must be captured again."""
        return self._network(name).loads

    def unload(self, name: str) -> None:
        """Free the weights' memory. The caller has synchronised: nothing of the network may be running."""
        with self._place.lock:
            self._network(name).unload()

    def load(self, name: str) -> None:
        """Load the weights again; what is bound can be enqueued again.

        Raises OutOfMemoryError; then nothing has changed.
        """
        with self._place.lock:
            self._network(name).load()

    def close(self) -> None:
        """Keep what was compiled; free contexts, kernels, engines, runtime, in this order. Again does nothing."""
        with self._place.lock:
            networks = self._networks.values()
            for network in networks:
                network.close_contexts()
            self._place.shelf.keep()
            self._place.shelf.close()
            for network in networks:
                network.close()
            self._place.close()

    def _network(self, name: str) -> PlanNetwork:
        if name not in self._networks:
            raise EngineError(f"this base has no network {name!r}; it has {', '.join(self._networks)}")
        return self._networks[name]

    def _bring(self, resident: Collection[str]) -> None:
        """Open the networks, first those that do not stay loaded. Twins wait until they are needed."""
        try:
            for name in sorted(self._networks, key=lambda name: name in resident):
                if name in resident or not is_twin(name):
                    self._networks[name].open(weights=name in resident)
                else:
                    self._networks[name].check()
        except OutOfMemoryError as error:
            free, total = self._place.device.memory()
            plan = ", ".join(f"{name} {size_text(self.weight_bytes(name))}" for name in self._networks)
            raise OutOfMemoryError(
                f"{error} (weights: {plan}; {size_text(free)} of {size_text(total)} are free)"
            ) from error
