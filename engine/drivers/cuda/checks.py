"""Checks that this computer's driver, GPU and C++ extension can be used. Each names the remedy."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dreammix_trt.core.errors import DeviceError
from dreammix_trt.engine.drivers.cuda.bindings import Bindings
from dreammix_trt.engine.hardware import (
    CUDA_NEEDED,
    DRIVER_NEEDED,
    LEAST_CAPABILITY,
    cuda_text,
    why_kernels_do_not_fit,
)


def check_driver(bindings: Bindings) -> int:
    """The CUDA version that the driver serves, as 1000 major + 10 minor. Raises DeviceError when it is too old."""
    remedy = f"install an NVIDIA driver {DRIVER_NEEDED} or newer, or load with device='cpu' (`--device cpu`)"
    driver = bindings.driver
    try:
        (error,) = driver.cuInit(0)
    except RuntimeError as missing:  # cuda-python finds the driver's library at the first call
        raise DeviceError(f"there is no NVIDIA driver here; {remedy}") from missing
    if error != driver.CUresult.CUDA_SUCCESS:
        reason = {
            driver.CUresult.CUDA_ERROR_NO_DEVICE: "finds no device; is the GPU visible (CUDA_VISIBLE_DEVICES)?",
            driver.CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: "does not fit its library; restart the computer",
            driver.CUresult.CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE: f"does not fit this device; {remedy}",
        }.get(error, f"does not start; {remedy}")
        raise DeviceError(f"the NVIDIA driver {reason} (CUDA error {int(error)})")
    error, served = driver.cuDriverGetVersion()
    if error != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"the NVIDIA driver does not report its version (CUDA error {int(error)}); {remedy}")
    # CUDA's minor versions are compatible: any driver of the same major version will do
    needed = max(CUDA_NEEDED, bindings.call(bindings.runtime.cudaRuntimeGetVersion) // 1000 * 1000)
    if served < needed:
        raise DeviceError(
            f"the NVIDIA driver serves CUDA {cuda_text(served)}, the installed cuda-python needs {cuda_text(needed)}; "
            f"{remedy}"
        )
    return int(served)


def check_device(bindings: Bindings, index: int) -> tuple[str, str]:
    """(name, capability) of a device. Raises DeviceError when it does not exist or is too old."""
    runtime = bindings.runtime
    count = bindings.call(runtime.cudaGetDeviceCount)
    properties = [bindings.call(runtime.cudaGetDeviceProperties, each) for each in range(count)]
    names = [entry.name.partition(b"\0")[0].decode(errors="replace") for entry in properties]
    if not 0 <= index < count:
        listed = ", ".join(f"{each}: {name}" for each, name in enumerate(names))
        raise DeviceError(f"there is no GPU {index} here, only {listed}")
    capability = (int(properties[index].major), int(properties[index].minor))
    if capability < LEAST_CAPABILITY:
        least = "sm_{}{}".format(*LEAST_CAPABILITY)
        raise DeviceError(
            f"the {names[index]} is an sm_{capability[0]}{capability[1]}, GPUs from {least} on (RTX 20, GTX 16) are "
            "needed; load with device='cpu'"
        )
    return names[index], f"sm_{capability[0]}{capability[1]}"


def check_kernels(extension: Any, name: str, capability: str, driver: int) -> Any:
    """The extension's `gpu` module. Raises DeviceError when it is missing or its kernels do not run on this GPU.

    extension: None: import it.
    name, capability: of the GPU.
    driver: the CUDA version that the driver serves.
    """
    if extension is None:
        try:
            extension = import_module("dreammix_trt._cpp")
        except ImportError:
            extension = object()
    info = extension.build_info() if hasattr(extension, "build_info") else {}
    why = why_kernels_do_not_fit(info.get("cuda"), capability, driver)
    if why:
        raise DeviceError(f"the {name} ({capability}) cannot be used: {why}")
    return extension.gpu
