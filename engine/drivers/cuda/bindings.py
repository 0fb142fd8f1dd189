"""cuda-python's functions, and what their error codes mean."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

from dreammix_trt.core.errors import DeviceError, MissingExtraError, OutOfMemoryError

# Errors after which every call in this process fails (driver_types.h: "This leaves the process in an inconsistent
# state and any further CUDA work will return the same error").
_LOSING: Final = frozenset({
    "cudaErrorECCUncorrectable", "cudaErrorNvlinkUncorrectable", "cudaErrorContained", "cudaErrorIllegalAddress",
    "cudaErrorLaunchTimeout", "cudaErrorContextIsDestroyed", "cudaErrorAssert", "cudaErrorHardwareStackError",
    "cudaErrorIllegalInstruction", "cudaErrorMisalignedAddress", "cudaErrorInvalidAddressSpace", "cudaErrorInvalidPc",
    "cudaErrorLaunchFailure", "cudaErrorTensorMemoryLeak", "cudaErrorExternalDevice", "cudaErrorMpsClientTerminated",
    "cudaErrorUnknown",
})  # fmt: skip


class Bindings:
    """cuda-python's modules `cuda.bindings.runtime` and `.driver`, and what their error codes mean.

    lost: after an error that ends all work on the device: the reason.
    """

    def __init__(self, runtime: Any, driver: Any) -> None:
        self.runtime, self.driver = runtime, driver
        self.lost: str | None = None

    @classmethod
    def load(cls) -> Bindings:
        """Import the package. Raises MissingExtraError without it, DeviceError when it does not load."""
        try:
            return cls(import_module("cuda.bindings.runtime"), import_module("cuda.bindings.driver"))
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                "cuda-python is not installed, a GPU needs it: `pip install 'dreammix-trt[cuda]'`"
            ) from error
        except (ImportError, OSError, RuntimeError) as error:
            raise DeviceError(
                f"cuda-python is installed but does not load ({error}); "
                "`pip install --force-reinstall 'cuda-python>=13,<14'`"
            ) from error

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a runtime function. Raises DeviceError or OutOfMemoryError.

        Returns what the function returns besides its error code.
        """
        if self.lost:
            raise _make_lost_error(self.lost)
        error, *results = function(*arguments)
        if error != self.runtime.cudaError_t.cudaSuccess:
            raise self.explain_failure(function.__name__, error)
        return results[0] if len(results) == 1 else tuple(results)

    def explain_failure(self, what: str, error: Any) -> DeviceError:
        """The exception for an error code. Remembers when the device is lost with it.

        what: the call that failed.
        """
        text = f"{what}: {self.runtime.cudaGetErrorString(error)[1].decode()} (CUDA error {int(error)})"
        self.runtime.cudaGetLastError()  # a later look at the last error must not find this one
        if error.name in _LOSING:
            self.lost = f"{text}; the device's context is lost and nothing runs in it any more: start the program again"
            return _make_lost_error(self.lost)
        if error == self.runtime.cudaError_t.cudaErrorMemoryAllocation:
            return OutOfMemoryError(f"{text}; close what else uses the GPU, or ask for less")
        return DeviceError(text)

    def explain_kernel_failure(self, name: str, error: RuntimeError) -> DeviceError:
        """The exception for a kernel of the extension that failed.

        The extension has its own CUDA runtime, so its errors arrive as texts. This asks whether the device is lost.
        """
        state, *_ = self.runtime.cudaMemGetInfo()
        if state != self.runtime.cudaError_t.cudaSuccess and state.name in _LOSING:
            return self.explain_failure(f"kernel {name}", state)
        if "out of memory" in str(error):
            return OutOfMemoryError(f"kernel {name}: {error}")
        return DeviceError(f"kernel {name}: {error}")


def _make_lost_error(why: str) -> DeviceError:
    """An error that reports a lost device: a queue must not try the next request on this device."""
    error = DeviceError(why)
    error.lost = True
    return error
