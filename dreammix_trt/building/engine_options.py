"""What to build for: back end, precision, GPUs, shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.errors import InputError, MissingExtraError
from dreammix_trt.core.networks import Precision
from dreammix_trt.engine.directory import BACKENDS

_FIRST_WITH_E4M3 = 89  # compute capability
_MOST_CONTEXT = 4096  # rows of a condition; a typing error costs an hour of building else


@dataclass(frozen=True)
class EngineOptions:
    """What to build for.

    backend: "onnxruntime", "tensorrt-rtx" or "tensorrt"; default: tensorrt-rtx where targets are named, else
        onnxruntime.
    precision: "float32", "float16" or "fp8" (UNets in E4M3, all else in float16; on ONNX Runtime in float32, which
        emulates it); default: float16 for TensorRT, float32 for ONNX Runtime.
    unet_precision: "bfloat16": the UNets' own precision, for one whose values are too large for float16; "": that of
        the rest.
    calibration: what "fp8" needs to know about the base (`calibration.calibrate`); None: the file in the base's folder.
    targets: GPUs as "sm_89", several if wanted, or "current".
    shapes: "static" (the base's native square) or "dynamic" (sides from 0.69 to 1.31 of it within its area, in two
        profiles).
    pictures: most in a batch.
    workspace: most bytes of scratch memory on the GPU.
    context: lengths of the text condition, each with profiles of its own (77: the text alone).
    vae_images: pictures on which a float16 VAE is looked at for overflow, besides the built-in ones.
    safe_vae: build a float16 VAE in float32 too, for pictures that are too much for it.
    """

    backend: str = ""
    precision: Precision | str = ""
    unet_precision: str = ""
    calibration: Path | None = None
    targets: tuple[str, ...] = ()
    shapes: str = "static"
    pictures: int = 1
    workspace: int | None = None
    context: tuple[int, ...] = (TOKENS,)
    vae_images: tuple[Path, ...] = ()
    safe_vae: bool = True

    def __post_init__(self) -> None:
        backend = self.backend or ("tensorrt-rtx" if self.targets else "onnxruntime")
        object.__setattr__(self, "backend", backend)
        object.__setattr__(self, "precision", self.precision or ("float16" if self.plans else "float32"))

    @property
    def plans(self) -> bool:
        """Whether plans are built, not just graphs."""
        return self.backend != "onnxruntime"

    @property
    def fused(self) -> bool:
        """Whether attention and group norm are single operators in the graphs."""
        return self.plans and self.half

    @property
    def half(self) -> bool:
        """Whether the networks compute in float16, but for UNets of another precision."""
        return self.precision == "float16" or (self.precision == "fp8" and self.plans)

    @property
    def version(self) -> str:
        """Of the back end's package; raises MissingExtraError when it is not installed."""
        from dreammix_trt.engine.machine import find_versions

        found = find_versions()
        version = found.get(self.backend) or (found.get("onnxruntime-gpu") if not self.plans else None)
        if version is None:
            extra = {"tensorrt-rtx": "rtx", "tensorrt": "trt"}.get(self.backend)
            package = f"dreammix-trt[{extra}]" if extra else self.backend
            raise MissingExtraError(f"{self.backend} is not installed, building for it needs it: pip install {package}")
        return version

    def check(self) -> None:
        """Raise InputError for what cannot be built, before anything is read."""
        for name, allowed in (
            ("backend", BACKENDS),
            ("precision", ("float32", "float16", "fp8")),
            ("unet_precision", ("", "bfloat16")),
            ("shapes", ("static", "dynamic")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.targets and not self.plans:
            raise InputError(f"targets are {', '.join(self.targets)}, but onnxruntime builds for no GPU in particular")
        if not 1 <= self.pictures <= 64:
            raise InputError(f"pictures is {self.pictures}; allowed: 1 to 64")
        if not self.context or any(not TOKENS <= length <= _MOST_CONTEXT for length in self.context):
            raise InputError(
                f"context is {','.join(map(str, self.context)) or 'empty'}; allowed: lengths from {TOKENS} to "
                f"{_MOST_CONTEXT}"
            )
        for image in self.vae_images:
            if not Path(image).is_file():
                raise InputError(f"{image}: no such picture (vae_images)")
        if self.vae_images and not self.half:
            raise InputError("vae_images are given, but only a float16 VAE is looked at for overflow")
        if not self.safe_vae and not self.half:
            raise InputError("safe_vae is off, but only a float16 VAE is built in float32 too; leave --no-safe-vae")
        self._check_unets()
        if self.plans:
            from dreammix_trt.engine.backends.tensorrt.builder import check_targets

            _ = self.version
            check_targets(self.backend, self.targets)
        elif (self.shapes, self.pictures, self.workspace, self.context) != ("static", 1, None, (TOKENS,)):
            raise InputError(
                "shapes, pictures, workspace and context are TensorRT's; graphs for onnxruntime take any shape, batch "
                "and condition"
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
        given: dict[str, Any] = {"backend": self.backend if self.plans else None, "target": list(self.targets)}
        given["precision"] = self.precision if self.precision != usual.precision else None
        given["unet_precision"] = self.unet_precision or None
        given["calibration"] = str(self.calibration) if self.calibration else None
        given["shapes"] = self.shapes if self.shapes != usual.shapes else None
        given["pictures"] = self.pictures if self.pictures != usual.pictures else None
        given["workspace"] = self.workspace >> 20 if self.workspace else None  # the option counts MiB
        given["context"] = ",".join(map(str, self.context)) if self.context != usual.context else None
        given["vae_image"] = [str(image) for image in self.vae_images]
        given["no_safe_vae"] = not self.safe_vae
        return given
