"""With what a LoRA is trained: the device, the precision of the frozen weights, the optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from dreammix_trt.core.errors import DeviceError, InputError, MissingExtraError
from dreammix_trt.core.extras import list_missing

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16", "float16"]
Optimizer = Literal["adamw", "adamw8bit"]
_BETAS, _DECAY = (0.9, 0.999), 1e-4


@dataclass(frozen=True)
class Hardware:
    """A device and how its memory is used. LoRA factors are always float32.

    device: "cpu", "cuda", or one of several as "cuda:1".
    precision: of the base's frozen weights and of matrix products; None: on a GPU bfloat16, or float16 where it lacks
        that; on a CPU float32 weights, with products in bfloat16 where the CPU has matrix tiles for it (AMX).
    optimizer: "adamw", or "adamw8bit": its state in 8 bits, for GPUs, by the package bitsandbytes.
    """

    device: str = "cpu"
    precision: Precision | None = None
    optimizer: Optimizer = "adamw"

    def check(self) -> None:
        """Raise InputError for an unknown word, DeviceError for a GPU that is not there, MissingExtraError."""
        kind, colon, number = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and number.isdecimal())):
            raise InputError(f"device is {self.device!r}; give cpu, cuda or cuda:NUMBER")
        if self.precision is not None and self.precision not in get_args(Precision):
            raise InputError(f"precision is {self.precision!r}; choose one of {', '.join(get_args(Precision))}")
        if self.optimizer not in get_args(Optimizer):
            raise InputError(f"optimizer is {self.optimizer!r}; choose one of {', '.join(get_args(Optimizer))}")
        if self.optimizer == "adamw8bit":
            if kind != "cuda":
                raise InputError("optimizer adamw8bit runs on a GPU alone; give --device cuda, or --optimizer adamw")
            if list_missing(["bitsandbytes"]):
                raise MissingExtraError(
                    "bitsandbytes is not installed, adamw8bit needs it: pip install 'dreammix-trt[train,train8bit]'"
                )
        if kind == "cuda":
            self._check_cuda(int(number or 0))

    def _check_cuda(self, number: int) -> None:
        import torch

        if not torch.cuda.is_available():
            built = f"this torch ({torch.__version__}) is built without CUDA" if not torch.version.cuda else "no driver"
            raise DeviceError(
                f"device is {self.device!r}, but torch finds no GPU ({built}); install torch for CUDA, or --device cpu"
            )
        if number >= torch.cuda.device_count():
            raise DeviceError(f"device is {self.device!r}, but there are {torch.cuda.device_count()} GPUs, from cuda:0")
        if self.precision == "bfloat16" and not torch.cuda.is_bf16_supported():
            raise DeviceError(f"{torch.cuda.get_device_name(number)} has no bfloat16; give --precision float16")

    @property
    def kind(self) -> str:
        """ "cpu" or "cuda"."""
        return self.device.partition(":")[0]

    @property
    def weights(self) -> torch.dtype:
        """The type of the UNet's frozen weights."""
        import torch

        if self.precision is None:
            return torch.float32 if self.kind == "cpu" else self.products
        found: torch.dtype = getattr(torch, self.precision)
        return found

    @property
    def products(self) -> torch.dtype:
        """The type in which matrix products are computed."""
        import torch

        from dreammix_trt.trainer.networks import choose_precision

        if self.precision is not None:
            return self.weights
        chosen = choose_precision(self.kind)
        return torch.float16 if self.kind == "cuda" and chosen == torch.float32 else chosen

    @property
    def weights_name(self) -> str:
        """The type of the weights as `precision` names it."""
        return str(self.weights).removeprefix("torch.")

    def free_bytes(self) -> int | None:
        """Memory that is free on the GPU; None for a CPU."""
        if self.kind == "cpu":
            return None
        import torch

        return int(torch.cuda.mem_get_info(torch.device(self.device))[0])

    def settings(self) -> dict[str, str]:
        """What of it decides the numbers of a training, as plain JSON values."""
        return {"precision": self.precision or "default", "device": self.kind, "optimizer": self.optimizer}

    def make_optimizer(
        self,
        parameters: Iterable[Any],
        rate: float,
        betas: tuple[float, float] = _BETAS,
        decay: float = _DECAY,
    ) -> Any:
        """AdamW of these parameters; the betas and the decay of weights are the reference's for a LoRA."""
        import torch

        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=decay)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=rate, betas=betas, weight_decay=decay)

    def make_scaler(self) -> torch.amp.GradScaler:
        """What keeps small gradients of a float16 network from vanishing; off in other precisions."""
        import torch

        return torch.amp.GradScaler(self.kind, enabled=self.products == torch.float16)
