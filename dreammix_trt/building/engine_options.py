"""What to build for: back end, precision, GPUs, shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.errors import InputError, MissingExtraError
from dreammix_trt.core.lengths import Length, join_lengths, span_of
from dreammix_trt.core.networks import Fused, Precision
from dreammix_trt.engine import machine
from dreammix_trt.engine.directory import BACKENDS
from dreammix_trt.engine.machine import PLANS

_FIRST_WITH_E4M3 = 89  # compute capability
_MOST_CONTEXT = 4096  # rows of a condition; a typing error costs an hour of building else


@dataclass(frozen=True)
class EngineOptions:
    """What to build for.

    backend: "onnxruntime", "openvino", "tensorrt-rtx" or "tensorrt"; default: tensorrt-rtx where targets are named,
        else onnxruntime.
    precision: "float32", "float16" or "fp8" (UNets in E4M3, all else in float16; on ONNX Runtime in float32, which
        emulates it); for OpenVINO "float32" or "bfloat16", its arithmetic on float32 graphs. Default: float16 for
        TensorRT, bfloat16 for OpenVINO where this processor has it, else float32.
    unet_precision: "bfloat16": the UNets' own precision, for one whose values are too large for float16; "": that of
        the rest.
    calibration: what "fp8" needs to know about the base (`calibration.calibrate`); None: the file in the base's folder.
    targets: GPUs as "sm_89", several if wanted, or "current".
    shapes: "static" (the base's native square) or "dynamic" (sides from 0.69 to 1.31 of it within its area, in two
        profiles).
    pictures: most in a batch.
    workspace: most bytes of scratch memory on the GPU.
    context: lengths of the text condition, each with profiles of its own (77: the text alone), and spans of lengths
        that share profiles, (78, 125) for a text with any number of tokens of a subject.
    vae_images: pictures on which a float16 VAE is looked at for overflow, besides the built-in ones.
    safe_vae: build a float16 VAE in float32 too, for pictures that are too much for it.
    look: pictures that are painted to see what bfloat16 changes; 0: none; None: some where the base is small.
    """

    backend: str = ""
    precision: Precision | str = ""
    unet_precision: str = ""
    calibration: Path | None = None
    targets: tuple[str, ...] = ()
    shapes: str = "static"
    pictures: int = 1
    workspace: int | None = None
    context: tuple[Length, ...] = (TOKENS,)
    vae_images: tuple[Path, ...] = ()
    safe_vae: bool = True
    look: int | None = None

    def __post_init__(self) -> None:
        backend = self.backend or ("tensorrt-rtx" if self.targets else "onnxruntime")
        object.__setattr__(self, "backend", backend)
        object.__setattr__(self, "precision", self.precision or self._choose_precision())

    @property
    def plans(self) -> bool:
        """Whether plans are built, not just graphs."""
        return self.backend in PLANS

    def _choose_precision(self) -> str:
        if self.backend == "openvino" and "openvino" in machine.find_versions():
            from dreammix_trt.engine.backends.openvino.compiling import has_bfloat16

            return "bfloat16" if has_bfloat16() else "float32"
        return "float16" if self.plans else "float32"

    @property
    def fused(self) -> Fused:
        """Whether attention and group norm are single operators in the graphs.

        In float16 ONNX Runtime runs on GPUs, where it has a kernel for attention that keeps no scores.
        """
        if not self.half:
            return False
        return True if self.plans else "attention"

    @property
    def half(self) -> bool:
        """Whether the networks compute in float16, but for UNets of another precision."""
        return self.precision == "float16" or (self.precision == "fp8" and self.plans)

    @property
    def version(self) -> str:
        """Of the back end's package; raises MissingExtraError when it is not installed."""
        found = machine.find_versions()
        version = found.get(self.backend) or (found.get("onnxruntime-gpu") if self.backend == "onnxruntime" else None)
        if version is None:
            extra = {**PLANS, "openvino": "openvino"}.get(self.backend)
            package = f"dreammix-trt[{extra}]" if extra else self.backend
            raise MissingExtraError(f"{self.backend} is not installed, building for it needs it: pip install {package}")
        return version

    def check(self) -> None:
        """Raise InputError for what cannot be built, before anything is read."""
        for name, allowed in (
            ("backend", BACKENDS),
            (
                "precision",
                ("float32", "bfloat16") if self.backend == "openvino" else ("float32", "float16", "fp8"),
            ),
            ("unet_precision", ("", "bfloat16")),
            ("shapes", ("static", "dynamic")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.targets and not self.plans:
            raise InputError(
                f"targets are {', '.join(self.targets)}, but {self.backend} builds for no GPU in particular"
            )
        self._check_openvino()
        if not 1 <= self.pictures <= 64:
            raise InputError(f"pictures is {self.pictures}; allowed: 1 to 64")
        if not self.context or any(
            not TOKENS <= low <= high <= _MOST_CONTEXT for low, high in map(span_of, self.context)
        ):
            raise InputError(
                f"context is {join_lengths(self.context) or 'empty'}; allowed: lengths from {TOKENS} to {_MOST_CONTEXT}"
            )
        for image in self.vae_images:
            if not Path(image).is_file():
                raise InputError(f"{image}: no such picture (vae_images)")
        if self.vae_images and not self.half:
            raise InputError("vae_images are given, but only a float16 VAE is looked at for overflow")
        if not self.safe_vae and not self.half:
            raise InputError("safe_vae is off, but only a float16 VAE is built in float32 too; leave --no-safe-vae")
        if self.plans:
            from dreammix_trt.engine.backends.tensorrt.builder import check_targets

            _ = self.version
            check_targets(self.backend, self.targets)
        elif (self.shapes, self.pictures, self.workspace, self.context) != ("static", 1, None, (TOKENS,)):
            raise InputError(
                f"shapes, pictures, workspace and context are TensorRT's; graphs for {self.backend} take any shape, "
                "batch and condition"
            )
        self._check_unets()

    def _check_openvino(self) -> None:
        if self.look is not None and (self.precision != "bfloat16" or not 0 <= self.look <= 64):
            raise InputError(f"look is {self.look}; allowed: 0 to 64, with bfloat16 on OpenVINO alone")
        if self.backend != "openvino":
            return
        _ = self.version
        from dreammix_trt.engine.backends.openvino.compiling import has_bfloat16

        if self.precision == "bfloat16" and not has_bfloat16():
            raise InputError(
                "precision is 'bfloat16', and this processor has neither AVX-512 BF16 nor AMX, so its pictures cannot "
                "be looked at here; build where it will run, or with --precision float32"
            )

    def _check_unets(self) -> None:
        """Raise InputError for UNets that cannot compute as is asked."""
        if self.unet_precision and (not self.plans or self.precision != "float16"):
            raise InputError(
                f"unet_precision is {self.unet_precision!r}: it goes with TensorRT and precision float16 alone, not "
                f"{self.backend} and {self.precision}"
            )
        if self.calibration is not None and self.precision != "fp8":
            raise InputError(f"a calibration is given, but only precision fp8 uses one; it is {self.precision}")
        if self.calibration is not None and not Path(self.calibration).is_file():
            raise InputError(f"{self.calibration}: no such calibration; make it with `dreammix-trt calibrate`")
        if self.precision == "fp8":
            for gpu in self.gpus:
                if int(gpu.removeprefix("sm_")) < _FIRST_WITH_E4M3:
                    raise InputError(
                        f"precision is fp8, but {gpu} cannot multiply E4M3 numbers; sm_{_FIRST_WITH_E4M3} (RTX 40) is "
                        "the first that can: build for that, or with precision float16"
                    )

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPUs that plans are for, by name also where "current" was asked for."""
        if not self.plans:
            return ()
        from dreammix_trt.engine.backends.tensorrt.builder import name_targets

        return name_targets(self.targets)

    def words(self) -> dict[str, Any]:
        """The options of the command line that say the same."""
        usual = EngineOptions(backend=self.backend)
        chosen = self.backend != "onnxruntime"
        given: dict[str, Any] = {"backend": self.backend if chosen else None, "target": list(self.targets)}
        depends = self.backend == "openvino"  # its default is the processor's
        given["precision"] = self.precision if depends or self.precision != usual.precision else None
        given["unet_precision"] = self.unet_precision or None
        given["calibration"] = str(self.calibration) if self.calibration else None
        given["shapes"] = self.shapes if self.shapes != usual.shapes else None
        given["pictures"] = self.pictures if self.pictures != usual.pictures else None
        given["workspace"] = self.workspace >> 20 if self.workspace else None  # the option counts MiB
        given["context"] = join_lengths(self.context) if self.context != usual.context else None
        given["vae_image"] = [str(image) for image in self.vae_images]
        given["no_safe_vae"] = not self.safe_vae
        given["look"] = self.look
        return given
