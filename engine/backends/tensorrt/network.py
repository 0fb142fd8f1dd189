"""One network on TensorRT-RTX or TensorRT 11. Its weights can be unloaded and loaded while it stays bound.

A network that was not opened is only its `network.json` and its file: no engine, no context, nothing compiled. Whoever
first asks for more opens it. So a float32 twin costs nothing until a picture overflows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt

from dreammix_trt.core.axes import Sides
from dreammix_trt.core.errors import EngineError
from dreammix_trt.core.seam import Array, BaseFacts
from dreammix_trt.engine.backends.onnxruntime.engine_set import map_weights
from dreammix_trt.engine.backends.tensorrt.bound import TensorRtBound
from dreammix_trt.engine.backends.tensorrt.engine import Binding, PlanEngine
from dreammix_trt.engine.backends.tensorrt.place import PlanPlace
from dreammix_trt.engine.backends.tensorrt.plans import REBUILD
from dreammix_trt.engine.backends.tensorrt.shapes import PlanShapes


class PlanNetwork:
    """A network that runs a plan. Callers of its methods hold the place's lock.

    bound: what is bound to it.
    opened: whether its engine was asked what it takes.
    loads: how often its weights were loaded.
    """

    def __init__(self, name: str, folder: Path, entry: Mapping[str, Any], place: PlanPlace) -> None:
        self.name, self.entry, self._folder, self._place = name, entry, folder, place
        self.plan = plan_of(name, folder, entry)
        self.jit, self.lock = place.package.jit, place.lock
        self.loads, self.loaded, self.opened = 0, False, False
        self.bound: list[TensorRtBound] = []
        self._engine = PlanEngine(place, PlanShapes.from_entry(name, self.plan, entry), entry)

    @cached_property
    def slot_weights(self) -> Mapping[str, npt.NDArray[Any]]:
        """The base's own weights of the slots, in their mapped file."""
        return map_weights(self._folder, self.entry)

    @property
    def shapes(self) -> PlanShapes:
        """The shapes it takes; before `open` as far as `network.json` has them."""
        return self._engine.shapes

    def open(self, weights: bool) -> None:
        """Load the engine the first time, and ask what it was built for.

        weights: whether its weights stay loaded.
        """
        self._place.check()
        self._engine.bring(weights=weights)
        self._engine.learn()
        self.opened = True
        if weights:
            self._announce()
        elif not self.jit:
            self._engine.measure_profiles()  # the engine is here now
            self._engine.drop()

    def check(self) -> None:
        """Raise EngineError or DeviceError for a plan that `network.json` says does not fit here."""
        self._engine.check()

    def load(self) -> None:
        """See `TensorRtNetworks.load`."""
        if self.loaded:
            return
        if not self.opened:
            self.open(weights=True)
            return
        self._place.check()
        if self._engine.here:
            self._engine.bring_weights()
        else:
            self._engine.bring(weights=True)
        try:
            for bound in self.bound:
                bound.renew()
        except BaseException:
            self._let_go()
            raise
        self._announce()

    def unload(self) -> None:
        """See `TensorRtNetworks.unload`."""
        if self.loaded:
            self._let_go()
            self.loaded = False

    def close_contexts(self) -> None:
        """Free every context."""
        for bound in list(self.bound):
            bound.close()
        self._engine.drop_contexts()

    def close(self) -> None:
        """Drop the engine, after `close_contexts`."""
        self._engine.drop()
        self.loaded = False

    def measure_workspace(self, sides: Sides, facts: BaseFacts) -> int:
        """See `TensorRtNetworks.workspace_bytes`."""
        self._learn()
        return self._engine.measure(*self.shapes.choose(sides, facts))

    def bind(
        self, sides: Sides, facts: BaseFacts, arrays: Mapping[str, Array], workspace: Array | None
    ) -> TensorRtBound:
        """See `TensorRtNetworks.bind`."""
        self._place.check()
        self._learn()
        shapes, profile = self.shapes.choose(sides, facts)
        self.shapes.check_arrays(shapes, arrays)
        bound = TensorRtBound(self, self._place.device, Binding(shapes, profile, dict(arrays), workspace))
        if self._engine.here:  # else its context comes with the weights
            bound.renew()
        self.bound.append(bound)
        return bound

    def make_context(self, binding: Binding) -> Any:
        """Make a context with shapes, memory and addresses set, ready to run."""
        return self._engine.make_context(binding)

    def keep_compiled(self) -> None:
        """Write what was compiled, where something new was."""
        self._engine.keep_compiled()

    def _learn(self) -> None:
        """Open it where it is not."""
        if not self.opened:
            self.open(weights=False)

    def _announce(self) -> None:
        """Count it as loaded. The last step of loading: from here on other threads run what is bound."""
        self.loads += 1
        self.loaded = True

    def _let_go(self) -> None:
        """Unload the weights. Without TensorRT-RTX the engine goes, and its contexts with it."""
        for bound in self.bound:
            bound.lapse(whole=not self.jit)
        if self.jit:
            self._engine.give_weights_back()
        else:
            self._engine.drop()


def plan_of(name: str, folder: Path, entry: Mapping[str, Any]) -> Path:
    """The plan of a part. Raises EngineError where it has none."""
    if not entry.get("engine"):
        raise EngineError(
            f"{folder / 'network.json'}: {name} is not a TensorRT engine; {REBUILD} --backend tensorrt-rtx"
        )
    plan = folder / str(entry["engine"])
    if not plan.is_file():
        raise EngineError(f"{plan}: missing, so {name} cannot run; {REBUILD}")
    return plan
