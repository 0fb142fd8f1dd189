"""The part `rtx`: what TensorRT-RTX says to an engine for sm_80 on this GPU, and an engine directory's times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from _gpu_full import BackEnd
from _gpu_models import Setting, device_of
from _gpu_parts import ceiling
from _gpu_report import Part


def rtx(part: Part, setting: Setting) -> None:
    """Rows, or a note that says why there are none."""
    try:
        import tensorrt_rtx
    except (ImportError, OSError) as error:
        part.note(f"TensorRT-RTX is not to be had here: {error}")
    else:
        part.add("TensorRT-RTX", str(tensorrt_rtx.__version__))
        for target in ("SM80", "CURRENT"):
            try_target(part, tensorrt_rtx, target)
    if setting.engine:
        time_engine(part, setting, Path(setting.engine))


def try_target(part: Part, trt: Any, target: str) -> None:
    """Build a small engine for a GPU and load it on this one; the answers as rows, errors as they were said."""
    said: list[str] = []
    logger = listener(trt, said)
    blob = small_engine(trt, logger, target)
    part.add(f"{target}: an engine is built", blob is not None)
    if blob is not None:
        runtime = trt.Runtime(logger)
        validity, diagnostics = runtime.get_engine_validity(blob)
        part.add(f"{target}: validity on this GPU", validity.name)
        part.add(f"{target}: diagnostics", reasons(trt, int(diagnostics)) or "none")
        engine = runtime.deserialize_cuda_engine(blob)
        part.add(f"{target}: the engine loads", engine is not None)
    if said:
        part.note(f"{target}: {'; '.join(said)}")


def small_engine(trt: Any, logger: Any, target: str) -> Any:
    """A float16 matrix product as an engine for one kind of GPU ("SM80", "CURRENT"); None where none is built."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float16, (64, 64))
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    constant = network.add_constant((64, 64), trt.Weights(weight)).get_output(0)
    plain = trt.MatrixOperation.NONE
    y = network.add_matrix_multiply(x, plain, constant, plain).get_output(0)
    y.name = "y"
    network.mark_output(y)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    return builder.build_serialized_network(network, config)


def listener(trt: Any, said: list[str]) -> Any:
    """A logger that keeps errors in `said`."""

    class Messages(trt.ILogger):  # type: ignore[misc,unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                said.append(" ".join(message.split())[:300])

    return Messages()


def reasons(trt: Any, diagnostics: int) -> str:
    """The names of the bits that are set."""
    known = trt.EngineInvalidityDiagnostics.__members__
    return ", ".join(name for name, bit in known.items() if diagnostics & int(bit))


def time_engine(part: Part, setting: Setting, folder: Path) -> None:
    """An engine directory through the device runtime, with the rows of `full`."""
    from dreammix_trt.engine.device.loading import open_device
    from dreammix_trt.engine.directory import check_runnable, open_engine
    from dreammix_trt.engine.text import Tokenizer

    opened = open_engine(folder)
    check_runnable(folder, opened, "cuda")
    tokenizers = [Tokenizer.load(opened.parts["base"] / name) for name in ("tokenizer", "tokenizer_2")]
    with device_of(setting):  # says what is wrong with the GPU before anything is loaded
        rate = ceiling(setting)
    here = open_device(opened)
    try:
        kind = f"{opened.passport.backend} ({folder.name})"
        BackEnd(part, setting, here.device, here.networks, kind, rate, here.stream).time_all(tokenizers)
    finally:
        here.close()
