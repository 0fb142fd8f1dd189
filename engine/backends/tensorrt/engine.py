"""The engine of a plan and its contexts. A context is made for shapes, then gets memory and addresses.

The plan's file stays mapped as long as there is an engine of it: the package may read weights when it needs them, and
wants the very bytes again when weights come back. Mapped pages take no memory that others could use.

Variables called trt, runtime, engine, context, config and kernels are the package's objects. A test compares their
attributes with the package's.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dreammix_trt.core.errors import EngineError
from dreammix_trt.core.seam import Array, Shape
from dreammix_trt.engine.backends.tensorrt.callbacks import collect_messages, get_recorder
from dreammix_trt.engine.backends.tensorrt.place import PlanPlace, handle_of
from dreammix_trt.engine.backends.tensorrt.plans import (
    REBUILD,
    Origin,
    check_origin,
    check_validity,
    explain_failure,
    map_plan,
)
from dreammix_trt.engine.backends.tensorrt.shapes import PlanShapes, check_address

ContextKey = tuple[int, tuple[Shape, ...]]  # a profile, and every input's shape


@dataclass(frozen=True)
class Binding:
    """What is needed to make a context, or to make it again."""

    shapes: Mapping[str, Shape]
    profile: int
    arrays: Mapping[str, Array]
    workspace: Array | None


class PlanEngine:
    """The engine of one plan, which may be dropped and loaded again. Callers of its methods hold the place's lock.

    shapes: the shapes it takes: those in `network.json`, after `learn` those of the engine itself.
    entry: its `network.json`.

    It remembers the memory that contexts need while the engine is dropped.
    """

    def __init__(self, place: PlanPlace, shapes: PlanShapes, entry: Mapping[str, Any]) -> None:
        self.shapes = shapes
        self._place, self._origin = place, Origin(shapes.plan, entry.get("build") or {}, place.gpu)
        self._kernels = place.shelf.find(entry)
        self._engine: Any = None
        self._data: mmap.mmap | None = None  # the plan's bytes, while there is an engine
        self._config: Any = None
        self._needs: dict[ContextKey, int] = {}
        self._ready: tuple[ContextKey, Any] | None = None  # a context that `measure` made and nobody has bound yet

    @property
    def here(self) -> bool:
        """Whether the package has loaded it."""
        return self._engine is not None

    def bring(self, *, weights: bool) -> None:
        """Load the engine. Raises the error that fits where it cannot be loaded.

        weights: whether the weights come as well; only TensorRT-RTX can omit them.
        """
        trt, runtime, package = self._place.trt, self._place.runtime, self._place.package
        self.check()
        data = map_plan(self._origin.plan)
        if package.jit:
            check_validity(trt, package, data, self._origin)
            runtime.defer_weights_loading = True  # else the weights could not be unloaded
        with collect_messages() as messages:
            engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise explain_failure(f"{self._origin.plan} cannot be loaded", messages)
        engine.error_recorder = get_recorder(trt)
        self._data, self._engine = data, engine
        if package.jit and weights:
            self.bring_weights()

    def check(self) -> None:
        """Raise EngineError or DeviceError for a plan that `network.json` says does not fit here."""
        check_origin(self._place.trt, self._place.package, self._origin)

    def learn(self) -> None:
        """Ask the engine for its shapes. Raises EngineError where they differ from those in `network.json`."""
        self.shapes = self.shapes.read_engine(self._place.trt, self._engine)

    def bring_weights(self) -> None:
        """Load the weights that `give_weights_back` unloaded (TensorRT-RTX only)."""
        engine = self._engine
        with collect_messages() as messages:
            if not engine.load_weights(self._data):
                raise explain_failure(f"{self._origin.plan}: its weights cannot be loaded", messages)

    def give_weights_back(self) -> None:
        """Unload the weights; contexts stay (TensorRT-RTX only)."""
        self._place.check()
        engine = self._engine
        with collect_messages() as messages:
            if not engine.unload_weights():
                raise explain_failure(f"{self._origin.plan}: its weights cannot be unloaded", messages)

    def drop(self) -> None:
        """Drop the engine, then the mapped plan. Nobody else may have a context of it."""
        self._ready = self._config = self._engine = None
        self._data = None

    def drop_contexts(self) -> None:
        """Drop the context that nobody has bound."""
        self._ready = None

    def measure(self, shapes: Mapping[str, Shape], profile: int) -> int:
        """Bytes of workspace at these shapes, from a context that stays ready for the next `make_context`.

        Where the engine is dropped, it is loaded for that and dropped again, with the context.
        """
        key = self._key_of(shapes, profile)
        if key not in self._needs:
            with self._hold_engine():
                self._ready = None
                self._ready = key, self._open_context(shapes, profile)
        return self._needs[key]

    def measure_profiles(self) -> None:
        """Remember what the profiles' own shapes need: most questions are about these."""
        for index, profile in enumerate(self.shapes.profiles):
            for end in range(3):
                self.measure({name: span[end] for name, span in profile.shapes.items()}, index)

    def make_context(self, binding: Binding) -> Any:
        """Make a context with shapes, memory and addresses set, ready to run."""
        key, ready = self._key_of(binding.shapes, binding.profile), self._ready
        self._ready = None
        if ready is not None and ready[0] == key:
            context = ready[1]
        else:
            ready = None  # drop it first, as its memory may be missing
            context = self._open_context(binding.shapes, binding.profile)
        name, need, workspace = self.shapes.name, self._needs[key], binding.workspace
        if need and (workspace is None or workspace.nbytes < need):
            have = 0 if workspace is None else workspace.nbytes
            raise EngineError(f"{name}: needs {need} bytes of workspace and is given {have}; see workspace_bytes")
        self._attach(context, binding)
        for tensor in self.shapes.outputs:
            shape, expected = tuple(context.get_tensor_shape(tensor.name)), binding.shapes[tensor.name]
            if shape != expected:
                raise EngineError(
                    f"{name}: {tensor.name} comes out as {list(shape)}, not as {list(expected)}; {REBUILD}"
                )
        return context

    def keep_compiled(self) -> None:
        """Write what was compiled, where something new was."""
        self._kernels.keep()

    @contextmanager
    def _hold_engine(self) -> Iterator[None]:
        """Have the engine loaded within the block."""
        if self.here:
            yield
            return
        self._place.check()
        self.bring(weights=True)
        try:
            yield
        finally:
            self.drop()

    def _key_of(self, shapes: Mapping[str, Shape], profile: int) -> ContextKey:
        return profile, tuple(shapes[tensor.name] for tensor in self.shapes.inputs)

    def _attach(self, context: Any, binding: Binding) -> None:
        """Set memory and addresses."""
        name, workspace = self.shapes.name, binding.workspace
        with collect_messages() as messages:
            try:
                if workspace is not None:
                    check_address(f"{name}: the workspace", workspace)
                    context.set_device_memory(workspace.pointer, workspace.nbytes)
                for tensor in (*self.shapes.inputs, *self.shapes.outputs):
                    if not context.set_tensor_address(tensor.name, binding.arrays[tensor.name].pointer):
                        raise explain_failure(f"{name}: {tensor.name} cannot be bound", messages)
                missing = context.infer_shapes()
            except RuntimeError as error:
                raise self._explain_failure("cannot be bound", error, messages) from error
        if missing:
            raise EngineError(f"{name}: the engine still lacks shape or address of {', '.join(missing)}; {REBUILD}")

    def _open_context(self, shapes: Mapping[str, Shape], profile: int) -> Any:
        """A new context with its profile and input shapes. Remembers the memory that it needs."""
        place, name = self._place, self.shapes.name
        place.check()
        handle = handle_of(place.stream)
        with collect_messages() as messages:
            try:
                context = self._make_context()
                if context is None or not context.set_optimization_profile_async(profile, handle):
                    raise explain_failure(f"{name}: no context for profile {profile}", messages)
                context.error_recorder = get_recorder(place.trt)
                place.device.synchronize(place.stream)
                for tensor in self.shapes.inputs:
                    if not context.set_input_shape(tensor.name, shapes[tensor.name]):
                        raise explain_failure(f"{name}: {tensor.name} cannot be {list(shapes[tensor.name])}", messages)
                self._needs[self._key_of(shapes, profile)] = int(context.update_device_memory_size_for_shapes())
            except RuntimeError as error:
                raise self._explain_failure("no context", error, messages) from error
        return context

    def _make_context(self) -> Any:
        trt, engine = self._place.trt, self._engine
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._place.package.jit:
            return engine.create_execution_context(strategy=strategy)
        if self._config is None:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # graphs are captured around the engine
            # Never fallback kernels first and better ones later: a captured graph would keep the fallback.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            self._kernels.join(config)
            self._config = config
        return engine.create_execution_context(runtime_config=self._config)

    def _explain_failure(self, what: str, error: RuntimeError, messages: list[tuple[str, str]]) -> EngineError:
        return explain_failure(f"{self.shapes.name}: {what}", messages or [("ERROR", str(error))])
