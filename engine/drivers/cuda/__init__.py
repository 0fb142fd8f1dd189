"""The real device: an NVIDIA GPU through cuda-python (`cuda.bindings`), loaded when a `CudaDevice` is made.

Memory is plain `cudaMalloc`, not a stream-ordered pool. An engine set takes one arena and keeps it, so a pool has
nothing to reuse, while its hidden reserve would be missing from what `memory` reports and from the networks' own
allocators. Memory is aligned to 256 bytes (CUDA C++ Programming Guide, device memory accesses).

The device is used through its primary context, which torch, ONNX Runtime and TensorRT share. Nothing resets it.
"""

from dreammix_trt.engine.drivers.cuda.bindings import Bindings
from dreammix_trt.engine.drivers.cuda.device import CudaDevice

__all__ = ["Bindings", "CudaDevice"]
