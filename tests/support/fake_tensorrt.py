"""A stand-in for TensorRT-RTX and TensorRT 11 and for the GPU they run on: the packages' rules, and no arithmetic but
what a test brings.

Names and rules are those of the packages' own documentation. What a rule forbids is answered as they answer it: None or
False and a message for the logger, or an error. `Gpu.log` has every call that matters, in order.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from dreammix_trt.core.seam import Array
from dreammix_trt.engine.backends.tensorrt.builder import DTYPES
from dreammix_trt.engine.backends.tensorrt.package import NAMES, NAMES_AHEAD

MAGIC = "a stand-in's plan"


@dataclass
class Gpu:
    """The `Device` as far as networks use it, and what the stand-in package knows of it.

    total: memory in bytes; weights: bytes of weights that are loaded, by plan; capturing: a capture is under way;
    compute: a network's arithmetic, by the name of its plan, on the arrays it is bound to; no_start: what keeps a
    runtime from starting.
    """

    total: int = 1 << 30
    name: str = "NVIDIA Stand-in 4090"
    capability: str = "sm_89"
    driver: bool = True
    no_start: str = ""
    capturing: bool = False
    capturable: bool = True
    current: bool = False
    log: list[str] = field(default_factory=list)
    weights: dict[str, int] = field(default_factory=dict)
    compilations: list[str] = field(default_factory=list)
    compute: Callable[[str, dict[str, Array]], None] | None = None
    _at: int = 1 << 20
    _streams: int = 0

    def memory(self) -> tuple[int, int]:
        return self.total - sum(self.weights.values()), self.total

    def make_array(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Memory at an address of its own."""
        made = Array(self._at, shape, dtype)
        self._at += -(-max(made.nbytes, 1) // 256) * 256
        return made

    def make_stream(self) -> SimpleNamespace:
        self._streams += 1
        return SimpleNamespace(handle=0x5000 + self._streams, close=lambda: self.log.append("close stream"))

    def synchronize(self, stream: Any) -> None:
        assert not self.capturing
        self.current = True
        if self.log[-1:] != ["synchronize"]:
            self.log.append("synchronize")

    def enqueue_work(self, label: str, stream: Any, run: Callable[[], None]) -> None:
        self.log.append(f"work {label}")
        run()

    def fit(self, name: str, nbytes: int) -> bool:
        """Take memory for weights, where there is some."""
        if nbytes > self.memory()[0]:
            return False
        self.weights[name] = nbytes
        return True


def write_plan(
    path: Path,
    tensors: dict[str, tuple[str, str, list[int]]],
    profiles: list[dict[str, Any]],
    *,
    named: dict[str, list[int | str]],
    weights: int = 1000,
    scratch: int = 100,
    **more: Any,
) -> None:
    """A plan: name -> ("INPUT" or "OUTPUT", data type, shape with -1), profiles of the dynamic inputs, shapes with
    the names of their sides, bytes of weights and of scratch for each element of the first input. more: whatever a test
    wants to differ."""
    record: dict[str, Any] = {"magic": MAGIC, "version": "1.7.1.116", "targets": ["sm_89"], "name": path.stem}
    record |= {"tensors": tensors, "profiles": profiles, "weights": weights, "scratch": scratch, "named": named, **more}
    path.write_text(json.dumps(record))


def make_package(gpu: Gpu, backend: str = "tensorrt-rtx", version: str | None = None) -> Any:
    """The module to stand in `sys.modules` for tensorrt_rtx or tensorrt."""
    jit = backend == "tensorrt-rtx"
    trt: Any = ModuleType("tensorrt_rtx" if jit else "tensorrt")
    trt.__version__ = version or ("1.7.1.116" if jit else "11.4.0.106")
    for name in NAMES + (NAMES_AHEAD if jit else ()):  # what building uses is not stood in for
        holder = trt
        for part in name.split("."):
            if not hasattr(holder, part):
                setattr(holder, part, type(part, (), {}))
            holder = getattr(holder, part)
    trt.DataType = enum.Enum("DataType", ["FLOAT", "HALF", "INT64", "INT32"])
    trt.TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
    trt.TensorLocation = enum.Enum("TensorLocation", ["DEVICE", "HOST"])
    trt.ExecutionContextAllocationStrategy = enum.Enum(
        "ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"]
    )
    trt.ILogger, trt.Logger, trt.IErrorRecorder = ILogger, Logger, IErrorRecorder
    trt.ErrorCodeTRT = enum.Enum("ErrorCodeTRT", ["UNSPECIFIED_ERROR"])
    trt.ICudaEngine, trt.IExecutionContext = (JitEngine, JitContext) if jit else (ICudaEngine, IExecutionContext)
    trt.Runtime = type("Runtime", (JitRuntime if jit else Runtime,), {"trt": trt, "gpu": gpu})
    if jit:
        trt.CudaGraphStrategy = enum.Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
        trt.DynamicShapesKernelSpecializationStrategy = enum.Enum("Specialization", ["LAZY", "EAGER", "NONE"])
        trt.EngineValidity = enum.Enum("EngineValidity", ["VALID", "SUBOPTIMAL", "INVALID"])
        trt.EngineInvalidityDiagnostics = enum.IntFlag(
            "EngineInvalidityDiagnostics",
            [
                "VERSION_MISMATCH",
                "UNSUPPORTED_CC",
                "OLD_CUDA_DRIVER",
                "OLD_CUDA_RUNTIME",
                "INSUFFICIENT_GPU_MEMORY",
                "MALFORMED_ENGINE",
                "CUDA_ERROR",
            ],
        )
        trt.IRuntimeConfig, trt.IRuntimeCache = IRuntimeConfig, IRuntimeCache
    return trt


class ILogger:
    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    """The package's own."""

    ERROR = "ERROR"

    def __init__(self, min_severity: Any) -> None:
        self.severity = min_severity

    def log(self, severity: Any, message: str) -> None:
        if severity.name == self.severity:
            print(f"[TRT] [E] {message}")


class IErrorRecorder:
    def report_error(self, code: Any, text: str) -> bool:
        raise NotImplementedError


class Runtime:
    """Deserialises; weights come at once."""

    trt: Any
    gpu: Gpu
    error_recorder: IErrorRecorder | None = None

    def __init__(self, logger: ILogger) -> None:
        self.logger = logger
        self._allowed = True
        if self.gpu.no_start:
            self.say(self.gpu.no_start)
            raise TypeError("pybind11::init(): factory function returned nullptr")

    @property
    def engine_host_code_allowed(self) -> bool:
        return self._allowed

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, value: bool) -> None:
        self._allowed = value

    def say(self, text: str, severity: str = "ERROR") -> None:
        """An error goes to the recorder, if there is one, and not to the logger; all else to the logger."""
        if severity == "ERROR" and self.error_recorder is not None:
            self.error_recorder.report_error(self.trt.ErrorCodeTRT.UNSPECIFIED_ERROR, text)
        else:
            self.logger.log(SimpleNamespace(name=severity), text)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        assert not self._allowed and not self.gpu.capturing and self.gpu.current
        plan = read_plan(serialized_engine)
        self.gpu.log.append(f"deserialise {plan['name'] if plan else '?'}")
        if not self.gpu.driver:
            self.say("Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is insufficient for CUDA runtime)")
            return None
        if plan is None:
            self.say("Error Code 1: Serialization (Serialization assertion header.magicTag == kEXPECTED failed)")
            return None
        engine = self.make_engine(plan)
        if engine is not None:
            engine.blob = serialized_engine
        return engine

    def make_engine(self, plan: dict[str, Any]) -> Any:
        if not self.gpu.fit(plan["name"], plan["weights"]):
            self.say(f"Error Code 2: OutOfMemory (Requested size was {plan['weights']} bytes.)")
            return None
        return ICudaEngine(self, plan)


class JitRuntime(Runtime):
    """TensorRT-RTX: knows why a plan does not fit, and can leave weights for later."""

    defer_weights_loading = False

    def get_engine_validity(self, buffer: Any) -> tuple[Any, int]:
        trt, plan, bits = self.trt, read_plan(buffer), 0
        if not self.gpu.driver:
            self.say("Error reading CUDA GPU properties (cudaError 35: CUDA driver version is insufficient)")
            return trt.EngineValidity.INVALID, 0
        kinds = trt.EngineInvalidityDiagnostics
        if plan is None:
            bits = int(kinds.MALFORMED_ENGINE)
        elif "invalid" in plan:
            bits = int(kinds[plan["invalid"]])
        elif self.gpu.capability not in plan["targets"]:
            bits = int(kinds.UNSUPPORTED_CC)
        if bits:
            return trt.EngineValidity.INVALID, bits
        assert plan is not None
        return (trt.EngineValidity.SUBOPTIMAL if plan.get("suboptimal") else trt.EngineValidity.VALID), 0

    def make_engine(self, plan: dict[str, Any]) -> Any:
        engine = JitEngine(self, plan)
        if not self.defer_weights_loading:
            raise AssertionError("weights that are not deferred cannot be unloaded")
        return engine


class ICudaEngine:
    num_io_tensors = num_optimization_profiles = 0
    blob: Any = None  # the bytes it was made of, which it reads when it likes
    error_recorder: IErrorRecorder | None = None

    def __init__(self, runtime: Runtime, plan: dict[str, Any]) -> None:
        self.runtime, self.plan, self.gpu = runtime, plan, runtime.gpu
        self.contexts = 0
        self.num_io_tensors = len(plan["tensors"])
        self.num_optimization_profiles = max(1, len(plan["profiles"]))

    def __del__(self) -> None:
        self.gpu.log.append(f"free {self.plan['name']}{' after its bytes' if self.has_lost_bytes() else ''}")
        self.gpu.weights.pop(self.plan["name"], None)

    def has_lost_bytes(self) -> bool:
        """Whether the mapped file that it was made of was closed."""
        return bool(getattr(self.blob, "closed", False))

    @property
    def loaded(self) -> bool:
        return self.plan["name"] in self.gpu.weights

    def get_tensor_name(self, index: int) -> str:
        return list(self.plan["tensors"])[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.runtime.trt.TensorIOMode[self.plan["tensors"][name][0]]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.runtime.trt.DataType[self.plan["tensors"][name][1]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.plan["tensors"][name][2])

    def get_tensor_location(self, name: str) -> Any:
        return self.runtime.trt.TensorLocation["HOST" if name in self.plan.get("host", ()) else "DEVICE"]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert -1 in self.plan["tensors"][name][2], "asked only of dynamic inputs"
        return [tuple(shape) for shape in self.plan["profiles"][profile_index][name]]

    def create_execution_context(self, *, strategy: Any) -> Any:
        assert strategy == self.runtime.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self.make_context(IExecutionContext)

    def make_context(self, kind: Any) -> Any:
        assert not self.gpu.capturing
        if self.plan.get("no_context"):
            self.runtime.say(self.plan["no_context"])
            return None
        self.gpu.log.append(f"context {self.plan['name']}")
        return kind(self)


class JitEngine(ICudaEngine):
    def load_weights(self, blob: Any) -> bool:
        if self.loaded or blob is not self.blob or read_plan(blob) != self.plan:
            return False
        if not self.gpu.fit(self.plan["name"], self.plan["weights"]):
            self.runtime.say("Error Code 1: Cuda Runtime (cudaError 2: out of memory)")
            return False
        self.gpu.log.append(f"load {self.plan['name']}")
        return True

    def unload_weights(self) -> bool:
        assert not self.gpu.capturing
        self.gpu.log.append(f"unload {self.plan['name']}")
        return self.gpu.weights.pop(self.plan["name"], None) is not None

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self)

    def create_execution_context(self, *, runtime_config: IRuntimeConfig) -> Any:  # type: ignore[override]
        trt = self.runtime.trt
        assert runtime_config.strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        assert runtime_config.cuda_graph_strategy == trt.CudaGraphStrategy.DISABLED
        kinds = trt.DynamicShapesKernelSpecializationStrategy
        assert runtime_config.dynamic_shapes_kernel_specialization_strategy == kinds.EAGER
        context = self.make_context(JitContext)
        if context is not None:
            context.cache = runtime_config.cache
        return context


class IRuntimeConfig:
    cuda_graph_strategy: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def __init__(self, engine: ICudaEngine) -> None:
        self.engine = engine
        self.strategy: Any = None
        self.cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True


class IRuntimeCache:
    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def deserialize(self, blob: Any) -> bool:
        if not bytes(blob).startswith(b"kernels:"):
            return False
        self.kernels = set(bytes(blob)[8:].decode().split(",")) - {""}
        return True

    def serialize(self) -> bytes:
        return b"kernels:" + ",".join(sorted(self.kernels)).encode()


class IExecutionContext:
    """Refuses what the documentation forbids: see `execute_async_v3`."""

    error_recorder: IErrorRecorder | None = None

    def __init__(self, engine: ICudaEngine) -> None:
        self.engine, self.plan, self.gpu = engine, engine.plan, engine.gpu
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.given: tuple[int, int] | None = None
        self.need: int | None = None
        self.ran = False
        self.cache: IRuntimeCache | None = None

    def __del__(self) -> None:
        self.gpu.log.append(f"free context {self.plan['name']}")

    def note(self, what: str) -> None:
        self.gpu.log.append(f"{self.plan['name']}: {what}")

    def list_inputs(self) -> list[str]:
        return [name for name, (mode, _, _) in self.plan["tensors"].items() if mode == "INPUT"]

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert isinstance(stream_handle, int) and stream_handle and not self.ran
        self.note(f"profile {profile_index}")
        self.profile, self.shapes = profile_index, {}
        return 0 <= profile_index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        own = self.plan["tensors"][name][2]
        span = self.plan["profiles"][self.profile][name] if -1 in own else (own, own, own)
        if any(not low <= side <= high for low, side, high in zip(span[0], shape, span[2], strict=True)):
            self.engine.runtime.say("API Usage Error (Set dimensions do not satisfy the profile's)")
            return False
        self.note(f"shape {name}")
        self.shapes[name] = tuple(shape)
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        assert self.shapes.keys() == set(self.list_inputs()), "every shape must be set before"
        self.need = self.plan["scratch"] * int(np.prod(self.shapes[self.list_inputs()[0]]))
        return self.need

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0 and self.need is not None
        if size < self.need:
            raise RuntimeError("API Usage Error (the given device memory is too small)")
        self.note("memory")
        self.given = memory, size

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert not self.gpu.capturing and not self.ran, "addresses never change"
        if name not in self.plan["tensors"] or memory % 256:
            return False
        self.note(f"address {name}")
        self.addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.list_inputs() if name not in self.shapes or self.plan.get("unknown") == name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sides: dict[str, int] = {}
        for known, shape in self.shapes.items():
            sides |= dict(zip(map(str, self.plan["named"][known]), shape, strict=True))
        sides |= {each.upper(): 8 * sides[each] for each in "hw" if each in sides}
        sides |= {each.lower(): sides[each] // 8 for each in "HW" if each in sides}
        wrong = self.plan.get("too_large", 0)
        return tuple(sides[side] + wrong if isinstance(side, str) else side for side in self.plan["named"][name])

    def execute_async_v3(self, stream_handle: int) -> bool:
        why = self.find_fault()
        if why:
            self.engine.runtime.say(why)
            return False
        self.note(f"run {stream_handle:#x}{' captured' if self.gpu.capturing else ''}")
        self.ran = True
        if self.gpu.compute is not None:
            self.gpu.compute(self.plan["name"], self.view_arrays())
        return True

    def view_arrays(self) -> dict[str, Array]:
        shapes = {name: self.shapes.get(name) or self.get_tensor_shape(name) for name in self.addresses}
        kinds = {name: self.engine.get_tensor_dtype(name).name for name in self.addresses}
        return {
            name: Array(at, shapes[name], DTYPES.get(kinds[name], kinds[name].lower()))
            for name, at in self.addresses.items()
        }

    def find_fault(self) -> str | None:
        assert self.error_recorder is not None and self.engine.error_recorder is not None, "errors would go nowhere"
        if self.engine.has_lost_bytes():
            return "Error Code 1: the plan's bytes are gone"
        if self.plan.get("fails"):
            return str(self.plan["fails"])
        if self.addresses.keys() != self.plan["tensors"].keys():
            return "API Usage Error (an address is not set)"
        if self.need and self.given is None:
            return "API Usage Error (no device memory is set)"
        if not self.engine.loaded:
            return "API Usage Error (weights are not loaded)"
        if self.gpu.capturing and not self.ran:
            return (
                "API Usage Error (the first run cannot be captured: operation not permitted when stream is capturing)"
            )
        return None


class JitContext(IExecutionContext):
    asked = 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        kernel = f"{self.plan.get('graph', self.plan['name'])}/{'x'.join(map(str, self.shapes[self.list_inputs()[0]]))}"
        if self.cache is not None and kernel not in self.cache.kernels:
            self.gpu.compilations.append(kernel)
            self.cache.kernels.add(kernel)
        return super().execute_async_v3(stream_handle)

    def is_stream_capturable(self, stream: int) -> bool:
        """not_capturable: True, or after how many questions it can be."""
        assert self.ran and not self.gpu.capturing
        self.asked += 1
        refused = self.plan.get("not_capturable", False)
        return self.gpu.capturable and (self.asked > refused if type(refused) is int else not refused)


def read_plan(buffer: Any) -> dict[str, Any] | None:
    """The plan in a buffer, or None."""
    try:
        plan = json.loads(bytes(buffer))
    except ValueError:
        return None
    return plan if isinstance(plan, dict) and plan.get("magic") == MAGIC else None
