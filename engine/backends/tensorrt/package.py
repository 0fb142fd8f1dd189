"""The two packages, TensorRT-RTX and TensorRT: how they differ, which names are used, and when they are refused."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dreammix_trt.core.errors import EngineError, InputError, MissingExtraError


@dataclass(frozen=True)
class Package:
    """How the two packages differ.

    title: as users know it.
    module: to import.
    extra: of this project, which brings the package.
    oldest: the first version that will do.
    ahead: builds for GPUs named by compute capability, without a driver.
    jit: finishes kernels when it loads an engine (runtime cache, capture check), reports why an engine does not fit,
        and unloads weights without losing contexts.
    """

    title: str
    module: str
    extra: str
    oldest: tuple[int, int]
    ahead: bool
    jit: bool


PACKAGES: Final[Mapping[str, Package]] = {
    "tensorrt-rtx": Package("TensorRT-RTX", "tensorrt_rtx", "rtx", (1, 7), ahead=True, jit=True),
    "tensorrt": Package("TensorRT", "tensorrt", "trt", (11, 0), ahead=False, jit=False),
}

# Every name of the packages that building uses. A package that lacks one is refused before it fails half-way.
NAMES: Final = (
    "Builder.build_serialized_network_to_stream", "Builder.create_builder_config", "Builder.create_network",
    "Builder.create_optimization_profile", "BuilderFlag.TF32", "DataType.HALF", "IAttention.decomposable",
    "IAttentionInputLayer.attention", "IBuilderConfig.add_optimization_profile", "IBuilderConfig.progress_monitor",
    "IBuilderConfig.set_flag", "IBuilderConfig.set_memory_pool_limit", "ILogger", "INetworkDefinition.get_input",
    "INetworkDefinition.get_layer", "INetworkDefinition.get_output", "INetworkDefinition.num_inputs",
    "INetworkDefinition.num_layers", "INetworkDefinition.num_outputs", "IOptimizationProfile.set_shape",
    "IProgressMonitor", "IStreamWriter", "LayerType.ATTENTION_INPUT", "MemoryPoolType.WORKSPACE",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "OnnxParser.get_error", "OnnxParser.num_errors",
    "OnnxParser.parse_from_file", "ParserError.desc", "ParserError.node_name", "ParserError.node_operator",
    "Runtime.engine_host_code_allowed",
)  # fmt: skip
NAMES_AHEAD: Final = (
    "BuilderFlag.REQUIRE_USER_ALLOCATION", "ComputeCapability.CURRENT", "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
)  # fmt: skip

# What running uses. Those of TensorRT 11 were never tried here: no release of it could be installed.
RUNTIME_NAMES: Final = (
    "ErrorCodeTRT.UNSPECIFIED_ERROR", "ExecutionContextAllocationStrategy.USER_MANAGED",
    "ICudaEngine.create_execution_context", "ICudaEngine.error_recorder", "ICudaEngine.get_tensor_dtype",
    "ICudaEngine.get_tensor_location", "ICudaEngine.get_tensor_mode", "ICudaEngine.get_tensor_name",
    "ICudaEngine.get_tensor_profile_shape", "ICudaEngine.get_tensor_shape",
    "ICudaEngine.num_io_tensors", "ICudaEngine.num_optimization_profiles", "IErrorRecorder",
    "IExecutionContext.error_recorder", "IExecutionContext.execute_async_v3", "IExecutionContext.get_tensor_shape",
    "IExecutionContext.infer_shapes", "IExecutionContext.set_device_memory", "IExecutionContext.set_input_shape",
    "IExecutionContext.set_optimization_profile_async", "IExecutionContext.set_tensor_address",
    "IExecutionContext.update_device_memory_size_for_shapes", "ILogger", "Logger.ERROR",
    "Runtime.deserialize_cuda_engine", "Runtime.engine_host_code_allowed", "Runtime.error_recorder",
    "TensorIOMode.INPUT", "TensorLocation.DEVICE",
)  # fmt: skip
RUNTIME_NAMES_JIT: Final = (
    "CudaGraphStrategy.DISABLED", "DynamicShapesKernelSpecializationStrategy.EAGER",
    "EngineInvalidityDiagnostics.CUDA_ERROR", "EngineInvalidityDiagnostics.INSUFFICIENT_GPU_MEMORY",
    "EngineInvalidityDiagnostics.MALFORMED_ENGINE", "EngineInvalidityDiagnostics.OLD_CUDA_DRIVER",
    "EngineInvalidityDiagnostics.OLD_CUDA_RUNTIME", "EngineInvalidityDiagnostics.UNSUPPORTED_CC",
    "EngineInvalidityDiagnostics.VERSION_MISMATCH", "EngineValidity.INVALID", "EngineValidity.SUBOPTIMAL",
    "ICudaEngine.create_runtime_config", "ICudaEngine.load_weights", "ICudaEngine.unload_weights",
    "IExecutionContext.is_stream_capturable", "IRuntimeCache.deserialize", "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache", "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_execution_context_allocation_strategy", "IRuntimeConfig.set_runtime_cache",
    "Runtime.defer_weights_loading", "Runtime.get_engine_validity",
)  # fmt: skip


def load(backend: str) -> Any:
    """Import the package of a back end.

    Raises InputError for an unknown back end, MissingExtraError or EngineError without its package.
    """
    if backend not in PACKAGES:
        raise InputError(f"there is no TensorRT back end {backend!r}; choose one of {', '.join(PACKAGES)}")
    package = PACKAGES[backend]
    install = f"`pip install 'dreammix-trt[{package.extra}]'`"
    try:
        trt = importlib.import_module(package.module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{package.title} is not installed ({error.name} is missing); {install}") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(
            f"{package.title} is installed but does not load ({error}); install it again: {install}"
        ) from error
    check_package(trt, package)
    return trt


def check_package(trt: Any, package: Package) -> None:
    """Raise EngineError when the package is too old or lacks a name that is used here."""
    version = str(getattr(trt, "__version__", "0"))
    oldest = ".".join(str(part) for part in package.oldest)
    install = f"`pip install 'dreammix-trt[{package.extra}]'`"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < package.oldest:
        raise EngineError(f"{package.title} {version} is too old, {oldest} is needed; {install}")
    _check_names(trt, package, (*NAMES, *(NAMES_AHEAD if package.ahead else ())))


def check_runtime(trt: Any, package: Package) -> None:
    """Raise EngineError when the package lacks a name that running an engine uses."""
    _check_names(trt, package, (*RUNTIME_NAMES, *(RUNTIME_NAMES_JIT if package.jit else ())))


def _check_names(trt: Any, package: Package, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not _has(trt, name)]
    if missing:
        oldest = ".".join(str(part) for part in package.oldest)
        raise EngineError(
            f"{package.title} {getattr(trt, '__version__', '0')} lacks {', '.join(missing)}, unlike {oldest}; "
            f"`pip install 'dreammix-trt[{package.extra}]'`"
        )


def list_targets(trt: Any) -> dict[str, Any]:
    """The GPUs for which a package builds without having them: "sm_89" -> its name for it."""
    members = getattr(trt, "ComputeCapability", None)
    found = {name: getattr(members, name) for name in dir(members) if re.fullmatch(r"SM\d+", name)}
    return {f"sm_{name[2:]}": value for name, value in sorted(found.items(), key=lambda item: int(item[0][2:]))}


def _has(trt: Any, name: str) -> bool:
    missing = object()
    return functools.reduce(lambda found, part: getattr(found, part, missing), name.split("."), trt) is not missing
