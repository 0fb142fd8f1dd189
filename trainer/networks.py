"""A base's networks in torch, as training uses them: text encoders, VAE, and the patched UNet with the inpaint feature.

Each is loaded when it is needed and let go before the next, so that a full SDXL fits on the cards people own. What goes
in and comes out is on the CPU, where every random number is drawn; the UNet's prediction alone stays on its device.

Imports torch, diffusers and transformers: reach it from inside functions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreammix_trt.core.checkpoint import BaseFiles, State
from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.network_weights import BaseLora, whole_weights_of

if TYPE_CHECKING:
    from dreammix_trt.trainer.hardware import Hardware

SMALL_SIDE = 256  # bases up to this side train fastest with attention written out, and in larger batches


def choose_precision(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster (CUDA, CPUs with AMX), else float32."""
    fast = torch.cpu._is_amx_tile_supported() if device == "cpu" else torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def write_out_attention(network: Any) -> None:
    """Attention as matrix products: on a CPU the fused operator's backward pass takes 42 % of a training step.

    That is at 256 pixels; of 4096 tokens, as SDXL has, the fused operator takes 0.57 of the time and no memory for the
    products.
    """
    network.set_attn_processor(AttnProcessor())


class TextEncoders:
    """Both text encoders of a base, float32, frozen."""

    def __init__(self, base: BaseFiles, device: str = "cpu", loras: Sequence[BaseLora] = ()) -> None:
        self._device = device
        names = ("text_encoder", "text_encoder_2")
        self._encoders = [_text_encoder(base, name, loras).to(device) for name in names]
        self._tokenizers = [_tokenizer(base, name) for name in ("tokenizer", "tokenizer_2")]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(N, 77, D) penultimate states of both encoders side by side, and (N, Dp) pooled, of the second.

        Raises InputError for a prompt that is too long.
        """
        states = []
        for encoder, tokenizer in zip(self._encoders, self._tokenizers, strict=True):
            out = encoder(self._ids(tokenizer, prompts), output_hidden_states=True)
            states.append(out.hidden_states[-2])
        pooled: Tensor = out.text_embeds
        return torch.cat(states, -1).cpu(), pooled.cpu()

    def _ids(self, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        rows = [tokenizer(prompt, padding="max_length", max_length=TOKENS)["input_ids"] for prompt in prompts]
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > TOKENS:
                raise InputError(f"the prompt {prompt!r} has {len(row)} tokens; at most {TOKENS} fit, shorten it")
        return torch.tensor(rows, device=self._device)


class Vae:
    """A base's VAE, float32 (SDXL's own overflows in float16), frozen."""

    def __init__(self, base: BaseFiles, device: str = "cpu") -> None:
        self._device, self._scaling = device, base.scaling_factor
        self._at_once = 8 if base.native_side <= SMALL_SIDE else 1
        self._vae: Any = _fill_weights(AutoencoderKL.from_config(dict(base.configs["vae"])), base.state("vae"))
        self._vae.to(device)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def encode(self, pictures: NDArray[np.float32]) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> the latents' modes, scaled, (N, 4, H/8, W/8)."""
        batches = torch.tensor(pictures).split(self._at_once)  # in memory aligned as torch's always is, for equal bits
        return torch.cat([self.encode_batch(batch).cpu() for batch in batches])

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def encode_batch(self, pictures: Tensor) -> Tensor:
        """As `encode`, of a tensor that fits into the memory at once; the latents stay on the device."""
        with torch.autocast(torch.device(self._device).type, enabled=False):
            modes: Tensor = self._vae.encode(pictures.to(self._device)).latent_dist.mode()
        return modes * self._scaling

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def decode_batch(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, 4, h, w) -> (N, 3, 8h, 8w) in about [-1, 1], on the device."""
        with torch.autocast(torch.device(self._device).type, enabled=False):
            pictures: Tensor = self._vae.decode(latents.to(self._device) / self._scaling, return_dict=False)[0]
        return pictures


class TrainingUNet:
    """The patched UNet, frozen in the hardware's precision; LoRA adapters are added to `unet` from outside.

    signal, noise: float32 (1000,), sqrt(alpha-bar) and sqrt(1 - alpha-bar) of SDXL's scaled-linear betas.
    """

    def __init__(self, base: BaseFiles, hardware: Hardware, loras: Sequence[BaseLora] = ()) -> None:
        """loras: of the base, merged into its weights."""
        self.base, self.device = base, torch.device(hardware.device)
        self._weights, self._products = hardware.weights, hardware.products
        with torch.device("meta"):
            empty = UNet2DConditionModel.from_config(dict(base.configs["unet"]))
        torch.nn.Module.to(empty, self._weights)  # diffusers' own `to` warns of an empty list
        self.unet: Any = empty.to_empty(device=self.device)
        _copy_weights(self.unet, whole_weights_of(base, "unet", loras))
        if hardware.kind == "cpu" and base.native_side <= SMALL_SIDE:
            write_out_attention(self.unet)
        self._head = torch.tensor(base.head(), device=self.device) if base.has_head else None
        self._feature: Tensor | None = None
        self.unet.conv_in.register_forward_hook(self._add_feature)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = torch.cumprod(1 - betas, 0)
        self.signal, self.noise = alphas.sqrt().float(), (1 - alphas).sqrt().float()

    def predict(
        self, sample: Tensor, timestep: Tensor, text: tuple[Tensor, Tensor], times: Tensor, feature: Tensor | None
    ) -> Tensor:
        """The noise prediction (N, 4, h, w) float32 on the device; feature (N, C, h, w) enters after conv_in."""
        self._feature = feature
        sample, timestep, states, pooled, times = (each.to(self.device) for each in (sample, timestep, *text, times))
        conditions = {"text_embeds": pooled, "time_ids": times}
        with torch.autocast(self.device.type, self._products, enabled=self._products != torch.float32):
            out: Tensor = self.unet(sample, timestep, states, added_cond_kwargs=conditions, return_dict=False)[0]
        self._feature = None
        return out.float()

    def feature(self, mask: Tensor, masked: Tensor) -> Tensor | None:
        """The inpaint head on mask (N, 1, h, w) and masked latent (N, 4, h, w); None for a base without head."""
        if self._head is None:
            return None
        mode = "constant" if self.base.head_padding == "zeros" else "replicate"
        both = torch.nn.functional.pad(torch.cat([mask, masked], 1).to(self.device), (1, 1, 1, 1), mode=mode)
        return torch.nn.functional.conv2d(both, self._head)

    def _add_feature(self, _module: Any, _inputs: Any, out: Tensor) -> Tensor:
        if self._feature is None:
            return out
        total = out + self._feature
        return total if self._weights == torch.float32 else total.to(out.dtype)


def to_latent_range(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """uint8 pictures (H, W, 3) -> float32 (N, 3, H, W) in [-1, 1]."""
    return np.asarray(np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1, np.float32)


@torch.no_grad()  # type: ignore[untyped-decorator]
def _copy_weights(module: Any, state: Mapping[str, NDArray[np.float32]]) -> None:
    """Fill a module one tensor at a time, rounded to its own type: the float32 weights are never held whole."""
    for name, target in module.state_dict().items():
        if name not in state:
            raise FileFormatError(f"{type(module).__name__}: the weights lack {name}")
        value = torch.from_numpy(state[name])
        if value.shape != target.shape:
            raise FileFormatError(
                f"weights do not fit {type(module).__name__}'s config: {name} is {tuple(value.shape)}, "
                f"not {tuple(target.shape)}"
            )
        target.copy_(value)
    module.eval().requires_grad_(False)


def _fill_weights(module: Any, state: State) -> Any:
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    try:
        missing, _ = module.float().load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise FileFormatError(f"weights do not fit {type(module).__name__}'s config: {error}") from error
    missing = [name for name in missing if not name.endswith("position_ids")]
    if missing:
        raise FileFormatError(f"{type(module).__name__}: the weights lack {', '.join(missing[:3])}")
    return module.eval().requires_grad_(False)


def _text_encoder(base: BaseFiles, name: str, loras: Sequence[BaseLora]) -> Any:
    kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
    module = kind(CLIPTextConfig(**base.configs[name]))
    state: State = whole_weights_of(base, name, loras)
    if not any(key.startswith("text_model.") for key in module.state_dict()):  # transformers 5 for the first encoder
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
    return _fill_weights(module, state)


def _tokenizer(base: BaseFiles, name: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        base.tokenizers.write(name, folder)
        try:
            return CLIPTokenizer.from_pretrained(
                folder, pad_token=base.tokenizers.pad_token(name), local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{base.folder}: its {name} is not CLIP's ({error})") from error
