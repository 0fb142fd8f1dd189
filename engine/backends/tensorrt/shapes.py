"""What a plan takes: its tensors, and the shapes for which it was built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from dreammix_trt.core.axes import AXES, FACTOR, Sides, Tensor
from dreammix_trt.core.errors import EngineError, ProfileError
from dreammix_trt.core.lengths import write_lengths
from dreammix_trt.core.seam import Array, BaseFacts, Shape
from dreammix_trt.engine.backends.tensorrt.builder import DTYPES
from dreammix_trt.engine.backends.tensorrt.plans import REBUILD
from dreammix_trt.engine.backends.tensorrt.profiles import Profile, fits

ALIGNMENT: Final = 256  # of every address, as the documentation of setTensorAddress and setDeviceMemory asks
Span = tuple[int, int]


@dataclass(frozen=True)
class PlanShapes:
    """The tensors and profiles of one network's plan.

    named: the tensors in `network.json`, including those that the engine omits.
    """

    name: str
    plan: Path
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    named: frozenset[str]
    profiles: tuple[Profile, ...] = ()

    @classmethod
    def from_entry(cls, name: str, plan: Path, entry: Mapping[str, Any]) -> PlanShapes:
        """The tensors in `network.json`, which has no profiles."""
        inputs = tuple(Tensor.of(tensor) for tensor in entry["inputs"])
        outputs = tuple(Tensor.of(tensor) for tensor in entry["outputs"])
        return cls(name, plan, inputs, outputs, frozenset(tensor.name for tensor in (*inputs, *outputs)))

    def read_engine(self, trt: Any, engine: Any) -> PlanShapes:
        """The tensors and profiles of the engine itself. Raises EngineError where it is another network."""
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        given = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._compare(trt, engine, given, [name for name in names if name not in given])
        # TensorRT may omit an input that nothing reads: the weight of a layer whose output is not used.
        inputs = tuple(tensor for tensor in self.inputs if tensor.name in given)
        profiles = tuple(_read_profile(engine, inputs, index) for index in range(engine.num_optimization_profiles))
        return replace(self, inputs=inputs, profiles=profiles)

    @cached_property
    def spans(self) -> tuple[dict[str, Span], ...]:
        """Per profile, the named sides: (smallest, largest)."""
        return tuple(_find_spans(self.inputs, profile) for profile in self.profiles)

    def choose(self, sides: Sides, facts: BaseFacts) -> tuple[dict[str, Shape], int]:
        """Every input's and output's shape, and the first profile that holds the inputs' shapes.

        Raises ProfileError where no profile does.
        """
        shapes = {tensor.name: sides.shape(tensor) for tensor in self.inputs}
        framed = any("h" in span or "H" in span for span in self.spans)
        side = facts.native_side // FACTOR
        found = [index for index, profile in enumerate(self.profiles) if profile.holds(shapes)]
        if not found or (framed and not fits(sides.height, sides.width, side)):
            raise ProfileError(self._explain_refusal(sides, side, fitting=bool(found)))
        return shapes | {tensor.name: sides.shape(tensor) for tensor in self.outputs}, found[0]

    def check_arrays(self, shapes: Mapping[str, Shape], arrays: Mapping[str, Array]) -> None:
        """Raise EngineError with the array that is absent, unknown, misaligned or of another dtype or shape."""
        for tensor in (*self.inputs, *self.outputs):
            array = arrays.get(tensor.name)
            if array is None:
                raise EngineError(f"{self.name}: no array is given for {tensor.name}")
            if array.dtype != tensor.memory_dtype or tuple(array.shape) != shapes[tensor.name]:
                raise EngineError(
                    f"{self.name}: {tensor.name} is {array.dtype} {list(array.shape)}, "
                    f"the engine takes {tensor.dtype} {list(shapes[tensor.name])}"
                )
            check_address(f"{self.name}: {tensor.name}", array)
        if unknown := sorted(arrays.keys() - self.named):
            raise EngineError(f"{self.name}: arrays are given for {', '.join(unknown[:6])}, which it does not have")

    def _compare(self, trt: Any, engine: Any, given: Iterable[str], made: Iterable[str]) -> None:
        """Raise EngineError where the engine is another network.

        given: names of the engine's inputs.
        made: names of its outputs.
        """
        known = {tensor.name: tensor for tensor in (*self.inputs, *self.outputs)}
        outputs = {tensor.name for tensor in self.outputs}
        wrong = [name for name in given if name not in known or name in outputs]
        wrong += sorted(outputs.symmetric_difference(made))
        for name in (name for name in (*given, *made) if name in known):
            own, named = tuple(engine.get_tensor_shape(name)), known[name].shape
            dtype = str(engine.get_tensor_dtype(name).name)
            same = len(own) == len(named) and all(
                isinstance(side, str) or have in (-1, side) for have, side in zip(own, named, strict=True)
            )
            on_device = engine.get_tensor_location(name) == trt.TensorLocation.DEVICE
            if not same or not on_device or DTYPES.get(dtype, dtype.lower()) != known[name].dtype:
                wrong.append(f"{name} ({dtype}, {list(own)})")
        if wrong:
            raise EngineError(
                f"{self.plan}: its network.json describes another network: {', '.join(wrong[:6])}; {REBUILD}"
            )

    def _explain_refusal(self, sides: Sides, side: int, fitting: bool) -> str:
        spans = self.spans
        asked = {axis: sides.size_of(axis) for axis in AXES if any(axis in span for span in spans)}
        limits = "; or ".join(_describe_span(span) for span in spans)
        say = ", ".join(f"{name} {count}" for name, count in asked.items())
        larger = fitting or any(all(count > span[name][1] for span in spans) for name, count in asked.items())
        place = "larger than any profile" if larger else "outside every profile"
        what = f"{self.name}: a request {place}: {say}; {self.plan} was built for {limits}"
        if fitting:
            return f"{what}, and at most {side * side} cells (h times w); ask for a smaller picture"
        counts = [name for name in ("rows", "pictures") if name in asked]
        if any(all(not span[name][0] <= asked[name] <= span[name][1] for span in spans) for name in counts):
            return f"{what}; rebuild with `--pictures {max(sides.pictures, -(-sides.rows // 2))}`, or ask for fewer"
        if "context" in asked and not any(low <= asked["context"] <= high for low, high in _list_contexts(spans)):
            lengths = {length for low, high in _list_contexts(spans) for length in range(low, high + 1)}
            return f"{what}; rebuild with `--context {write_lengths({asked['context'], *lengths}, ',')}`"
        if all(low == high for span in spans for name, (low, high) in span.items() if name not in counts):
            return f"{what}; rebuild with `--shapes dynamic`, or ask for that frame"
        return f"{what}; ask for a frame within these sides"


def check_address(what: str, array: Array) -> None:
    """Raise EngineError for an array at an address that TensorRT does not take."""
    if array.pointer <= 0 or array.pointer % ALIGNMENT:
        raise EngineError(f"{what} is at address {array.pointer}; TensorRT takes multiples of {ALIGNMENT}")


def _read_profile(engine: Any, inputs: Iterable[Tensor], index: int) -> Profile:
    """The shapes of every input. The engine's profiles do not always have static sides."""
    shapes = {}
    for tensor in inputs:
        own = tuple(engine.get_tensor_shape(tensor.name))
        span = engine.get_tensor_profile_shape(tensor.name, index) if -1 in own else (own, own, own)
        low, usual, high = (
            tuple(have if have != -1 else side for have, side in zip(own, tuple(shape), strict=True)) for shape in span
        )
        shapes[tensor.name] = low, usual, high
    return Profile(shapes)


def _find_spans(tensors: Iterable[Tensor], profile: Profile) -> dict[str, Span]:
    return {
        side: (low, high)
        for tensor in tensors
        for side, low, high in zip(
            tensor.shape, profile.shapes[tensor.name][0], profile.shapes[tensor.name][2], strict=True
        )
        if isinstance(side, str)
    }


def _list_contexts(spans: Iterable[Mapping[str, Span]]) -> list[Span]:
    return [span["context"] for span in spans]


def _describe_span(span: Mapping[str, Span]) -> str:
    return ", ".join(
        f"{name} {low}" if low == high else f"{name} {low} to {high}" for name, (low, high) in span.items()
    )
