"""LoRA adapters on a UNet: added by peft, read under diffusers' names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from dreammix_trt.trainer.folder import Factors


def add_adapters(unet: Any, rank: int, seed: int, targets: Sequence[str]) -> list[Tensor]:
    """Add trainable adapters, float32, to a frozen UNet; returns their parameters.

    targets: the ends of the names of the modules that get one. seed: of their first numbers.
    """
    import torch
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(config)
    trained = [value for value in unet.parameters() if value.requires_grad]
    for value in trained:  # peft gives adapters the type of the frozen weights
        value.data = value.data.float()
    return trained


def adapters_of(unet: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Module by its diffusers name -> (down (rank, in), up (out, rank)), the parameters themselves.

    Of a convolution (rank, in, kh, kw) and (out, rank, 1, 1).
    """
    return {
        name: (module.lora_A["default"].weight, module.lora_B["default"].weight)
        for name, module in unet.named_modules()
        if hasattr(module, "lora_A")
    }


def copy_factors(factors: Factors) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies on the CPU."""

    def copied(value: Tensor) -> Any:
        return value.detach().cpu().clone().contiguous()

    return {name: (copied(down), copied(up)) for name, (down, up) in factors.items()}
