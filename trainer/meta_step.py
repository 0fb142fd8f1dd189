"""What a training step keeps, needs and computes, counted by running it on torch's meta device: no weight is loaded.

Imports torch, diffusers and transformers: reach it from inside functions.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from peft import LoraConfig
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dreammix_trt.core.config_fields import TOKENS

TARGETS = ("to_k", "to_v", "to_out.0")
_SIZE_NUMBERS = 6  # of SDXL's time_ids


@dataclass(frozen=True)
class StepCost:
    """One forward and backward pass of one picture.

    kept: bytes that live when the forward pass ends: what the backward pass needs.
    peak: the most bytes that live at a time, with what is kept; weights, gradients and optimizer are not in it.
    flops: of both passes, with what checkpointing computes again. Two for a multiplication and an addition.
    """

    kept: int
    peak: int
    flops: int


@dataclass(frozen=True)
class Weights:
    """Bytes of a network's frozen weights, and the number of values in each tensor that is trained."""

    frozen: int
    trained: tuple[int, ...]


class Ledger(TorchDispatchMode):
    """Counts what operators compute, and the bytes of the tensors that they make, while these live.

    torch's own FlopCounterMode would keep tensors alive by its hooks on modules.

    known: tensors that were there before; they and their views do not count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._sizes: dict[int, int] = {}
        self.now = self.peak = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=made))
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                self._count(value)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._known or place in self._sizes:
            return
        self._sizes[place] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, place)

    def _forget(self, place: int) -> None:
        self.now -= self._sizes.pop(place)


class _LikeDevice(TorchFunctionMode):
    """Lets operators on the meta device take the form and the types that they have on a real one.

    The meta device has neither attention as one operator nor autocast. The lists are those of PyTorch's documentation
    ("Autocast Op Reference"), as far as a UNet calls them.

    kind: "cuda" or "cpu".
    products: the type in which autocast has products computed; None: no autocast.
    """

    def __init__(self, kind: str, products: torch.dtype | None) -> None:
        super().__init__()
        self._products = products
        self._wide = (F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax) if kind == "cuda" else ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._products is not None and func in _PRODUCTS:
            args, kwargs = _cast((args, kwargs), self._products)
        elif self._products is not None and func in self._wide:
            args, kwargs = _cast((args, kwargs), torch.float32)
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **kwargs)

    def checkpoint(self, module: Any, *args: Any) -> Any:
        """Diffusers' checkpointing of a block; what is computed again is computed in this mode."""
        run = torch.utils.checkpoint.checkpoint
        return run(module.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), self))


_PRODUCTS = {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.bmm, torch.matmul, torch.baddbmm}


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """The same arguments with their floating-point tensors in another type."""
    return tree_map(
        lambda each: each.to(dtype) if isinstance(each, Tensor) and each.is_floating_point() else each, values
    )


def add_lora(unet: Any, precision: torch.dtype, rank: int, *, checkpointing: bool, fused: bool) -> Any:
    """Make a frozen UNet in one precision with float32 LoRA factors, as training has it; returns the same UNet.

    fused: attention as one operator, else as matrix products.
    """
    torch.nn.Module.to(unet, precision)  # diffusers' own `to` warns
    unet.eval().requires_grad_(False)
    targets = list(TARGETS)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
    for value in unet.parameters():
        if value.requires_grad:
            value.data = value.data.float()
    unet.set_attn_processor(AttnProcessor2_0() if fused else AttnProcessor())
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def make_inputs(
    config: Mapping[str, Any], batch: int, side: int, dtype: torch.dtype, device: str
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Zeros in the shapes of a UNet's inputs: (sample, timestep, text states), and the conditions added to the time.

    side: of the picture in pixels.
    """

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    pooled = int(config["projection_class_embeddings_input_dim"]) - _SIZE_NUMBERS * int(
        config["addition_time_embed_dim"]
    )
    sample = zeros(batch, int(config["in_channels"]), side // 8, side // 8)
    text = zeros(batch, TOKENS, int(config["cross_attention_dim"]))
    added = {"text_embeds": zeros(batch, pooled), "time_ids": zeros(batch, _SIZE_NUMBERS)}
    return (sample, torch.zeros(batch, device=device), text), added


def compute_loss(unet: Any, inputs: tuple[Tensor, ...], added: dict[str, Tensor]) -> Tensor:
    """A mean square of the UNet's output in float32: as much work and memory as training's loss."""
    out = unet(*inputs, added_cond_kwargs=added, return_dict=False)[0].float()
    return (out - torch.zeros_like(out)).square().mean()


def count_step(
    config: Mapping[str, Any],
    weights: str,
    rank: int,
    side: int,
    *,
    checkpointing: bool,
    products: str | None = None,
    kind: str = "cuda",
    fused: bool = True,
) -> tuple[StepCost, Weights]:
    """Count one training step of one picture, and the UNet's weights.

    config: the UNet's config.json.
    weights: torch's name of the frozen weights' type.
    side: of the picture in pixels.
    checkpointing, fused: as `add_lora` has them.
    products: torch's name of the type that autocast has products computed in; None: no autocast.
    kind: "cuda" or "cpu".
    """
    precision = getattr(torch, weights)
    inner = None if products is None else getattr(torch, products)
    mode = _LikeDevice(kind, inner)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
        add_lora(unet, precision, rank, checkpointing=False, fused=fused)
    if checkpointing:
        unet.enable_gradient_checkpointing(mode.checkpoint)
    values = list(unet.parameters())
    trained = [value for value in values if value.requires_grad]
    for value in trained:  # gradients are counted apart: they stay from step to step
        value.grad = torch.zeros_like(value)
    inputs, added = make_inputs(config, 1, side, precision if inner is None else torch.float32, "meta")
    known = [*values, *(value.grad for value in trained), *unet.buffers(), *inputs, *added.values()]
    ledger = Ledger(known)
    with mode, ledger:
        loss = compute_loss(unet, inputs, added)
        kept = ledger.now
        loss.backward()
    frozen = sum(_bytes_of(value) for value in values if not value.requires_grad)
    cost = StepCost(kept, ledger.peak, ledger.flops)
    return cost, Weights(frozen, tuple(value.numel() for value in trained))


def count_encoding(configs: Mapping[str, Mapping[str, Any]], side: int) -> tuple[int, int, int]:
    """(bytes of the VAE's weights, the most that live while it encodes one picture, bytes of the text encoders).

    All are float32 whatever the UNet's precision is: SDXL's VAE overflows in float16. What the text encoders compute of
    77 tokens is too little to matter.

    configs: by component, as a base has them.
    """
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(configs["vae"])).eval().requires_grad_(False)
        vae.set_attn_processor(AttnProcessor2_0())
        picture = torch.zeros(1, int(configs["vae"]["in_channels"]), side, side)
        encoders = [
            kind(CLIPTextConfig(**configs[name]))
            for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection))
        ]
    ledger = Ledger([*vae.parameters(), picture])
    with _LikeDevice("cuda", None), torch.no_grad(), ledger:
        vae.encode(picture)
    text = sum(_bytes_of(value) for encoder in encoders for value in encoder.parameters())
    return sum(map(_bytes_of, vae.parameters())), ledger.peak, text


def _bytes_of(tensor: Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())
