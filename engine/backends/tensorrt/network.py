"""One network on TensorRT-RTX or TensorRT 11: its engine, its contexts, its compiled kernels (see tensorrt_networks).

Variables called trt, runtime, engine, context, config and kernels are the package's objects; a test compares their
attributes with the package's.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dreammix_trt.core.errors import DeviceError, DreamMixError, EngineError, ProfileError
from dreammix_trt.core.files import atomic_file, sha256_of
from dreammix_trt.core.networks import AXES, FACTOR, Sides, Tensor
from dreammix_trt.core.seam import Array, BaseFacts, Shape, Stream
from dreammix_trt.engine.backends.tensorrt.builder import DTYPES
from dreammix_trt.engine.backends.tensorrt.callbacks import hearing
from dreammix_trt.engine.backends.tensorrt.package import Package
from dreammix_trt.engine.backends.tensorrt.plans import (
    REBUILD,
    Origin,
    check_origin,
    check_validity,
    failure,
    mapped,
)
from dreammix_trt.engine.backends.tensorrt.profiles import Profile, fits
from dreammix_trt.engine.drivers.device import Device

LOGGER = logging.getLogger(__name__)
ALIGNMENT: Final = 256  # of every address, as the documentation of setTensorAddress and setDeviceMemory asks
Span = tuple[int, int]
Asked = tuple[int, tuple[Shape, ...]]  # a profile, and every input's shape


@dataclass
class Place:
    """What all networks of a base share. stream: for setting contexts up; lock: contexts are made, and weights come and
    go, one at a time."""

    trt: Any
    package: Package
    runtime: Any
    device: Device
    stream: Stream
    cache: Path | None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def check(self) -> None:
        """Raise EngineError after `close`; else the device is current in this thread from here on."""
        if self.runtime is None:
            raise EngineError("these networks are closed; open them again")
        self.device.synchronize(self.stream)

    def close(self) -> None:
        """Let the runtime go; again does nothing."""
        if self.runtime is not None:
            self.runtime = None
            self.stream.close()

    @property
    def gpu(self) -> tuple[str, str]:
        return self.device.name, self.device.capability


class Network:
    """One network: its engine, what is bound to it, and what it was built for."""

    def __init__(self, name: str, folder: Path, entry: Mapping[str, Any], place: Place) -> None:
        self.name, self.entry, self._place = name, entry, place
        self.plan = plan_of(name, folder, entry)
        self.inputs = tuple(Tensor.of(tensor) for tensor in entry["inputs"])
        self.outputs = tuple(Tensor.of(tensor) for tensor in entry["outputs"])
        self.jit, self.lock = place.package.jit, place.lock
        self.loads, self.loaded = 0, False
        self.profiles: tuple[Profile, ...] = ()
        self.spans: tuple[dict[str, Span], ...] = ()
        self.bound: list[TensorRtBound] = []
        self._engine: Any = None
        self._compiled: _Compiled | None = None
        self._needs: dict[Asked, int] = {}
        self._ready: tuple[Asked, Any] | None = None  # a context that `workspace` made and nobody has bound yet

    # --- the engine and its weights ---

    def open(self, weights: bool) -> None:
        """Load the engine the first time, and learn what it was built for."""
        self._place.check()
        self._deserialise(weights)
        self._learn()
        if weights:
            self._arrived()
        elif not self.jit:
            self._measure()
            self._engine = None

    def load(self) -> None:
        """See `TensorRtNetworks.load`."""
        if self.loaded:
            return
        self._place.check()
        if self._engine is None:
            self._deserialise(weights=True)
        else:
            with mapped(self.plan) as data:
                self._weights(data)
        try:
            for bound in self.bound:
                bound.renew()
        except BaseException:
            self._let_go()
            raise
        self._arrived()

    def unload(self) -> None:
        """See `TensorRtNetworks.unload`."""
        if self.loaded:
            self._let_go()
            self.loaded = False

    def close(self) -> None:
        """Contexts first, then what was compiled, then the engine."""
        for bound in list(self.bound):
            bound.close()
        self._ready = None
        if self._compiled is not None:
            self._compiled.keep()
        self._compiled = self._engine = None
        self.loaded = False

    def _deserialise(self, weights: bool) -> None:
        trt, runtime, package = self._place.trt, self._place.runtime, self._place.package
        origin = Origin(self.plan, self.entry.get("build") or {}, self._place.gpu)
        check_origin(trt, package, origin)
        with mapped(self.plan) as data:
            if package.jit:
                check_validity(trt, package, runtime, data, origin)
                runtime.defer_weights_loading = True  # else they could not be unloaded
            with hearing() as messages:
                engine = runtime.deserialize_cuda_engine(data)
            if engine is None:
                raise failure(f"{self.plan} cannot be loaded", messages)
            self._engine = engine
            if package.jit and weights:
                self._weights(data)

    def _weights(self, data: Any) -> None:
        engine = self._engine
        with hearing() as messages:
            if not engine.load_weights(data):
                raise failure(f"{self.plan}: its weights cannot be loaded", messages)

    def _arrived(self) -> None:
        """Last of all: from here on other threads run what is bound."""
        self.loads += 1
        self.loaded = True

    def _let_go(self) -> None:
        """Give the weights back; without TensorRT-RTX the engine goes, and the contexts with it."""
        for bound in self.bound:
            bound.lapse(whole=not self.jit)
        if not self.jit:
            self._ready = self._engine = None
            return
        self._place.check()
        engine = self._engine
        with hearing() as messages:
            if not engine.unload_weights():
                raise failure(f"{self.plan}: its weights cannot be unloaded", messages)

    def _learn(self) -> None:
        """Profiles and spans, from the engine itself; and whether it is the network that `network.json` describes."""
        trt, engine = self._place.trt, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        given = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._compare(given, [name for name in names if name not in given])
        # TensorRT may leave out an input that nothing reads: a LoRA slot of a layer whose output is not used.
        self.inputs = tuple(tensor for tensor in self.inputs if tensor.name in given)
        self.profiles = tuple(self._profile(index) for index in range(engine.num_optimization_profiles))
        self.spans = tuple(_spans(self.inputs, profile) for profile in self.profiles)

    def _profile(self, index: int) -> Profile:
        """The shapes of every input; static sides are not always in the engine's profiles."""
        engine, shapes = self._engine, {}
        for tensor in self.inputs:
            own = tuple(engine.get_tensor_shape(tensor.name))
            span = engine.get_tensor_profile_shape(tensor.name, index) if -1 in own else (own, own, own)
            low, usual, high = (
                tuple(have if have != -1 else side for have, side in zip(own, tuple(shape), strict=True))
                for shape in span
            )
            shapes[tensor.name] = low, usual, high
        return Profile(shapes)

    def _compare(self, given: Iterable[str], made: Iterable[str]) -> None:
        trt, engine = self._place.trt, self._engine
        known = {tensor.name: tensor for tensor in (*self.inputs, *self.outputs)}
        outputs = {tensor.name for tensor in self.outputs}
        wrong = [name for name in given if name not in known or name in outputs]
        wrong += sorted(outputs.symmetric_difference(made))
        for name in (name for name in (*given, *made) if name in known):
            own, told = tuple(engine.get_tensor_shape(name)), known[name].shape
            dtype = str(engine.get_tensor_dtype(name).name)
            same = len(own) == len(told) and all(
                isinstance(side, str) or have in (-1, side) for have, side in zip(own, told, strict=True)
            )
            on_device = engine.get_tensor_location(name) == trt.TensorLocation.DEVICE
            if not same or not on_device or DTYPES.get(dtype, dtype.lower()) != known[name].dtype:
                wrong.append(f"{name} ({dtype}, {list(own)})")
        if wrong:
            raise EngineError(
                f"{self.plan}: its network.json tells of another network: {', '.join(wrong[:6])}; {REBUILD}"
            )

    # --- shapes ---

    def chosen(self, sides: Sides, facts: BaseFacts) -> tuple[dict[str, Shape], int]:
        """Every input's and output's shape, and the first profile that holds the inputs'."""
        shapes = {tensor.name: sides.shape(tensor) for tensor in self.inputs}
        framed = any("h" in span or "H" in span for span in self.spans)
        side = facts.native_side // FACTOR
        found = [index for index, profile in enumerate(self.profiles) if profile.holds(shapes)]
        if not found or (framed and not fits(sides.height, sides.width, side)):
            raise ProfileError(self._refusal(sides, side, fitting=bool(found)))
        return shapes | {tensor.name: sides.shape(tensor) for tensor in self.outputs}, found[0]

    def _refusal(self, sides: Sides, side: int, fitting: bool) -> str:
        spans = self.spans
        asked = {axis: sides.size_of(axis) for axis in AXES if any(axis in span for span in spans)}
        told = "; or ".join(_told(span) for span in spans)
        say = ", ".join(f"{name} {count}" for name, count in asked.items())
        larger = fitting or any(all(count > span[name][1] for span in spans) for name, count in asked.items())
        place = "larger than any profile" if larger else "outside every profile"
        what = f"{self.name}: a request {place}: {say}; {self.plan} was built for {told}"
        if fitting:
            return f"{what}, and at most {side * side} cells (h times w); ask for a smaller picture"
        counts = [name for name in ("rows", "pictures") if name in asked]
        if any(all(not span[name][0] <= asked[name] <= span[name][1] for span in spans) for name in counts):
            return f"{what}; rebuild with `--pictures {max(sides.pictures, -(-sides.rows // 2))}`, or ask for fewer"
        if "context" in asked and all(span["context"][0] != asked["context"] for span in spans):
            lengths = sorted({asked["context"], *(span["context"][0] for span in spans)})
            return f"{what}; rebuild with `--context {','.join(map(str, lengths))}`"
        if all(low == high for span in spans for name, (low, high) in span.items() if name not in counts):
            return f"{what}; rebuild with `--shapes dynamic`, or ask for that frame"
        return f"{what}; ask for a frame within these sides"

    def check_arrays(self, shapes: Mapping[str, Shape], arrays: Mapping[str, Array]) -> None:
        """Raise EngineError naming an array that is absent, unknown, misplaced or of another dtype or shape."""
        for tensor in (*self.inputs, *self.outputs):
            array = arrays.get(tensor.name)
            if array is None:
                raise EngineError(f"{self.name}: no array is given for {tensor.name}")
            if array.dtype != tensor.dtype or tuple(array.shape) != shapes[tensor.name]:
                raise EngineError(
                    f"{self.name}: {tensor.name} is {array.dtype} {list(array.shape)}, "
                    f"the engine wants {tensor.dtype} {list(shapes[tensor.name])}"
                )
            _check_address(f"{self.name}: {tensor.name}", array)
        known = {tensor["name"] for tensor in (*self.entry["inputs"], *self.entry["outputs"])}
        if unknown := sorted(arrays.keys() - known):
            raise EngineError(f"{self.name}: arrays are given for {', '.join(unknown[:6])}, which it does not have")

    # --- contexts ---

    def workspace(self, sides: Sides, facts: BaseFacts) -> int:
        """See `TensorRtNetworks.workspace_bytes`."""
        shapes, profile = self.chosen(sides, facts)
        asked = self._asked(shapes, profile)
        if asked not in self._needs:
            self._ready = None
            if self._engine is not None:
                self._ready = asked, self._shaped(shapes, profile)
            else:
                self._place.check()
                self._deserialise(weights=True)
                try:
                    self._shaped(shapes, profile)
                finally:
                    self._engine = None
        return self._needs[asked]

    def bind(
        self, shapes: dict[str, Shape], profile: int, arrays: dict[str, Array], workspace: Array | None
    ) -> TensorRtBound:
        """See `TensorRtNetworks.bind`."""
        bound = TensorRtBound(self, self._place.device, _Binding(shapes, profile, arrays, workspace))
        if self._engine is not None:  # else its context comes with the weights
            bound.renew()
        self.bound.append(bound)
        return bound

    def context_for(self, binding: _Binding) -> Any:
        """A context with shapes, memory and addresses set, and nothing missing."""
        asked = self._asked(binding.shapes, binding.profile)
        ready, self._ready = self._ready, None
        if ready is not None and ready[0] == asked:
            context = ready[1]
        else:
            ready = None
            context = self._shaped(binding.shapes, binding.profile)
        need, workspace = self._needs[asked], binding.workspace
        if need and (workspace is None or workspace.nbytes < need):
            have = 0 if workspace is None else workspace.nbytes
            raise EngineError(f"{self.name}: needs {need} bytes of workspace and is given {have}; see workspace_bytes")
        with hearing() as messages:
            try:
                if workspace is not None:
                    _check_address(f"{self.name}: the workspace", workspace)
                    context.set_device_memory(workspace.pointer, workspace.nbytes)
                for tensor in (*self.inputs, *self.outputs):
                    if not context.set_tensor_address(tensor.name, binding.arrays[tensor.name].pointer):
                        raise failure(f"{self.name}: {tensor.name} cannot be bound", messages)
                missing = context.infer_shapes()
            except RuntimeError as error:
                raise self._failed("cannot be bound", error, messages) from error
        if missing:
            raise EngineError(
                f"{self.name}: the engine still lacks shape or address of {', '.join(missing)}; {REBUILD}"
            )
        for tensor in self.outputs:
            shape = tuple(context.get_tensor_shape(tensor.name))
            if shape != binding.shapes[tensor.name]:
                raise EngineError(
                    f"{self.name}: {tensor.name} comes out as {list(shape)}, not as "
                    f"{list(binding.shapes[tensor.name])}; {REBUILD}"
                )
        return context

    def keep_compiled(self) -> None:
        """Write what was compiled, where something new was."""
        if self._compiled is not None:
            self._compiled.keep()

    def _asked(self, shapes: Mapping[str, Shape], profile: int) -> Asked:
        return profile, tuple(shapes[tensor.name] for tensor in self.inputs)

    def _measure(self) -> None:
        """Note what the profiles' own shapes need: most questions are about these, and the engine is here now."""
        for index, profile in enumerate(self.profiles):
            for end in range(3):
                shapes = {name: span[end] for name, span in profile.shapes.items()}
                if self._asked(shapes, index) not in self._needs:
                    self._shaped(shapes, index)

    def _shaped(self, shapes: Mapping[str, Shape], profile: int) -> Any:
        """A new context with its profile and input shapes; notes the memory it needs."""
        place = self._place
        place.check()
        handle = _handle(place.stream)
        with hearing() as messages:
            try:
                context = self._new_context()
                if context is None or not context.set_optimization_profile_async(profile, handle):
                    raise failure(f"{self.name}: no context for profile {profile}", messages)
                place.device.synchronize(place.stream)
                for tensor in self.inputs:
                    if not context.set_input_shape(tensor.name, shapes[tensor.name]):
                        raise failure(f"{self.name}: {tensor.name} cannot be {list(shapes[tensor.name])}", messages)
                self._needs[self._asked(shapes, profile)] = int(context.update_device_memory_size_for_shapes())
            except RuntimeError as error:
                raise self._failed("no context", error, messages) from error
        return context

    def _new_context(self) -> Any:
        trt, engine = self._place.trt, self._engine
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.jit:
            return engine.create_execution_context(strategy=strategy)
        if self._compiled is None:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # graphs are captured around the engine
            # Never a fallback first and better kernels later: a captured graph would keep the fallback.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            self._compiled = _Compiled.of(config, self._cache_file())
        return engine.create_execution_context(runtime_config=self._compiled.config)

    def _cache_file(self) -> Path | None:
        place = self._place
        if place.cache is None:
            return None
        gpu = re.sub(r"[^A-Za-z0-9]+", "-", " ".join(place.gpu))
        return place.cache / f"{sha256_of(self.plan)[:40]}-{place.trt.__version__}-{gpu}.kernels"

    def _failed(self, what: str, error: RuntimeError, messages: list[tuple[str, str]]) -> EngineError:
        return failure(f"{self.name}: {what}", messages or [("ERROR", str(error))])


@dataclass(frozen=True)
class _Binding:
    """What a context is made of, so that it can be made again."""

    shapes: Mapping[str, Shape]
    profile: int
    arrays: Mapping[str, Array]
    workspace: Array | None


class TensorRtBound:
    """A network with its shapes and addresses fixed: one context."""

    def __init__(self, network: Network, device: Device, binding: _Binding) -> None:
        self._network, self._device, self._binding = network, device, binding
        self._context: Any = None
        self._ran = self._capturable = self._closed = False

    @property
    def capturable(self) -> bool:
        """False before the first `enqueue`, and again after the weights were unloaded."""
        return self._capturable

    def enqueue(self, stream: Stream) -> None:
        """Run once, in the stream. The first run is outside any capture: it sets the context up.

        Raises EngineError after `close` and while the weights are unloaded, and what the package's messages mean where
        it fails.
        """
        handle = _handle(stream)
        if self._closed:
            raise EngineError(f"{self._network.name}: closed; bind it anew")
        if self._context is None or not self._network.loaded:
            raise EngineError(f"{self._network.name}: its weights are unloaded; load them first")
        self._device.work(self._network.name, stream, lambda: self._run(handle))

    def close(self) -> None:
        """Free the context; the arrays are their owner's. The stream must be idle."""
        with self._network.lock:
            self._context = None
            self._closed, self._capturable = True, False
            if self in self._network.bound:
                self._network.bound.remove(self)

    def renew(self) -> None:
        """Make the context where there is none."""
        if self._context is None:
            self._context = self._network.context_for(self._binding)

    def lapse(self, *, whole: bool) -> None:
        """The weights go: the next run is a first run. whole: the context goes, too."""
        self._ran = self._capturable = False
        if whole:
            self._context = None

    def _run(self, handle: int) -> None:
        context = self._context
        with hearing() as messages:
            try:
                done = context.execute_async_v3(handle)
            except RuntimeError as error:
                messages.append(("ERROR", str(error)))
                done = False
        if not done:
            raise failure(f"{self._network.name} cannot be run", messages)
        if not self._ran:
            self._ran = True
            jit = self._network.jit
            self._capturable = bool(context.is_stream_capturable(handle)) if jit else True
            self._network.keep_compiled()


@dataclass
class _Compiled:
    """TensorRT-RTX's settings of an engine, and the kernels it compiled for them; file: where those are kept."""

    config: Any
    kernels: Any
    file: Path | None
    kept: bytes = field(default=b"", repr=False)

    @classmethod
    def of(cls, config: Any, file: Path | None) -> _Compiled:
        """With what the file holds; one that is damaged, or of another driver, is thrown away."""
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
        """Write the file where something new was compiled; a disk that does not take it costs time only."""
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


def plan_of(name: str, folder: Path, entry: Mapping[str, Any]) -> Path:
    if not entry.get("engine"):
        raise EngineError(f"{folder / 'network.json'}: {name} is no TensorRT engine; {REBUILD} --backend tensorrt-rtx")
    plan = folder / str(entry["engine"])
    if not plan.is_file():
        raise EngineError(f"{plan}: missing, so {name} cannot run; {REBUILD}")
    return plan


def _spans(tensors: Iterable[Tensor], profile: Profile) -> dict[str, Span]:
    """The named sides of a profile: (smallest, largest)."""
    return {
        side: (low, high)
        for tensor in tensors
        for side, low, high in zip(
            tensor.shape, profile.shapes[tensor.name][0], profile.shapes[tensor.name][2], strict=True
        )
        if isinstance(side, str)
    }


def _told(span: Mapping[str, Span]) -> str:
    return ", ".join(
        f"{name} {low}" if low == high else f"{name} {low} to {high}" for name, (low, high) in span.items()
    )


def _check_address(what: str, array: Array) -> None:
    if array.pointer <= 0 or array.pointer % ALIGNMENT:
        raise EngineError(f"{what} is at address {array.pointer}; TensorRT wants multiples of {ALIGNMENT}")


def _handle(stream: Stream) -> int:
    if stream.handle is None:
        raise DeviceError("TensorRT runs in CUDA streams only; this device has none")
    return stream.handle
