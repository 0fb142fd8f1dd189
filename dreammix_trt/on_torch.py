"""A base in torch on a GPU behind the same runtime: no engines are built, any SDXL base paints at once.

Slower than TensorRT, and what its engines are compared with; needs the extra `export` and a torch with CUDA.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreammix_trt.core.errors import MissingExtraError
from dreammix_trt.engine.device.memory_plan import Options
from dreammix_trt.engine.dreammix import DreamMix
from dreammix_trt.engine.text import Tokenizer

if TYPE_CHECKING:
    from dreammix_trt.core.checkpoint import BaseFiles
    from dreammix_trt.core.subject import Subject
    from dreammix_trt.engine.drivers.device import Device


def load_torch(
    base: BaseFiles,
    subjects: Sequence[Subject] = (),
    *,
    dtype: str = "float16",
    compile: bool | str = False,
    options: Options | None = None,
    device: Device | None = None,
    torch_device: str = "cuda:0",
    **networks: Any,
) -> DreamMix:
    """A `DreamMix` that runs a base's networks in torch on the GPU.

    base: of `core.checkpoint.BaseFiles.open(path)`; subjects: of `core.subject.subject_from_loras`; dtype: "float16",
    "bfloat16" or "float32"; compile: torch.compile the UNets and the VAE (the first picture of a frame size waits for
    it); options: what memory is set aside for; device: None: the first GPU, which is torch_device's, too; networks:
    further arguments of `TorchNetworks.of`; weights come when the memory plan knows which. Raises MissingExtraError
    without torch or cuda-python, DeviceError without a GPU, InputError for an unknown dtype, FileFormatError for a base
    that does not fit, OutOfMemoryError with the memory plan.
    """
    try:
        from dreammix_trt.export.torch_backend.on_device import TorchNetworks
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed, running in torch needs it: pip install 'dreammix-trt[export]'"
        ) from error
    tokenizers = open_tokenizers(base)
    with ExitStack() as opened:
        if device is None:
            from dreammix_trt.engine.drivers.cuda import CudaDevice

            device = opened.enter_context(CudaDevice())
        made = opened.enter_context(
            TorchNetworks.of(base, device=torch_device, dtype=dtype, compile=compile, resident=(), **networks)
        )
        owned = opened.pop_all()
    return DreamMix.on_device(device, made, tokenizers, subjects, options, adapter=base.tokens, owned=[owned])


def open_tokenizers(base: BaseFiles) -> list[Tokenizer]:
    """Both tokenizers of a base."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tokenizer", "tokenizer_2"):
            base.tokenizers.write(name, Path(folder) / name)
        return [Tokenizer.load(Path(folder) / name) for name in ("tokenizer", "tokenizer_2")]
