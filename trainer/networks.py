"""A base's networks in torch, float32, as training uses them: the patched UNet with the inpaint feature, VAE, texts.

Imports torch, diffusers and transformers: reach it from inside functions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

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


def choose_precision(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster (CUDA, CPUs with AMX), else float32."""
    fast = torch.cpu._is_amx_tile_supported() if device == "cpu" else torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def write_out_attention(network: Any) -> None:
    """Attention as matrix products: on a CPU the fused operator's backward pass takes 42 % of a training step."""
    network.set_attn_processor(AttnProcessor())


class TrainingNetworks:
    """Everything of a base that training touches, frozen; LoRA adapters are added to `unet` from outside.

    signal, noise: float32 (1000,), sqrt(alpha-bar) and sqrt(1 - alpha-bar) of SDXL's scaled-linear betas.
    """

    def __init__(self, base: BaseFiles) -> None:
        self.base = base
        unet, vae = (dict(base.configs[name]) for name in ("unet", "vae"))
        self.unet: Any = _fill_weights(UNet2DConditionModel.from_config(unet), base.unet_patched_state())
        write_out_attention(self.unet)
        self.precision = choose_precision("cpu")
        self._vae: Any = _fill_weights(AutoencoderKL.from_config(vae), base.state("vae"))
        self._encoders = [_text_encoder(base, name) for name in ("text_encoder", "text_encoder_2")]
        self._tokenizers = [_tokenizer(base, name) for name in ("tokenizer", "tokenizer_2")]
        self._head = torch.from_numpy(base.head()) if base.has_head else None
        self._feature: Tensor | None = None
        self.unet.conv_in.register_forward_hook(self._add_feature)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = torch.cumprod(1 - betas, 0)
        self.signal, self.noise = alphas.sqrt().float(), (1 - alphas).sqrt().float()

    def predict(
        self, sample: Tensor, timestep: Tensor, text: tuple[Tensor, Tensor], times: Tensor, feature: Tensor | None
    ) -> Tensor:
        """The patched UNet's noise prediction (N, 4, h, w) float32; feature (N, C, h, w) enters after conv_in."""
        self._feature = feature
        conditions = {"text_embeds": text[1], "time_ids": times}
        with torch.autocast("cpu", self.precision, enabled=self.precision != torch.float32):
            out: Tensor = self.unet(sample, timestep, text[0], added_cond_kwargs=conditions, return_dict=False)[0]
        self._feature = None
        return out.float()

    def feature(self, mask: Tensor, masked: Tensor) -> Tensor | None:
        """The inpaint head on mask (N, 1, h, w) and masked latent (N, 4, h, w); None for a base without head."""
        if self._head is None:
            return None
        mode = "constant" if self.base.head_padding == "zeros" else "replicate"
        both = torch.nn.functional.pad(torch.cat([mask, masked], 1), (1, 1, 1, 1), mode=mode)
        return torch.nn.functional.conv2d(both, self._head)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def encode(self, pictures: NDArray[np.float32]) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> the latents' modes, scaled, (N, 4, H/8, W/8)."""
        batches = torch.from_numpy(pictures).split(8)
        latents = torch.cat([self._vae.encode(batch).latent_dist.mode() for batch in batches])
        return latents * self.base.scaling_factor

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def encode_text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(N, 77, D) penultimate states of both encoders side by side, and (N, Dp) pooled, of the second."""
        states = []
        for encoder, tokenizer in zip(self._encoders, self._tokenizers, strict=True):
            out = encoder(self._ids(tokenizer, prompts), output_hidden_states=True)
            states.append(out.hidden_states[-2])
        pooled: Tensor = out.text_embeds
        return torch.cat(states, -1), pooled

    def _ids(self, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        rows = [tokenizer(prompt, padding="max_length", max_length=TOKENS)["input_ids"] for prompt in prompts]
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > TOKENS:
                raise InputError(f"the prompt {prompt!r} has {len(row)} tokens; at most {TOKENS} fit, shorten it")
        return torch.tensor(rows)

    def _add_feature(self, _module: Any, _inputs: Any, out: Tensor) -> Tensor:
        return out if self._feature is None else out + self._feature


def to_latent_range(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """uint8 pictures (H, W, 3) -> float32 (N, 3, H, W) in [-1, 1]."""
    return np.asarray(np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1, np.float32)


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


def _text_encoder(base: BaseFiles, name: str) -> Any:
    kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
    module = kind(CLIPTextConfig(**base.configs[name]))
    state: State = base.state(name)
    if not any(key.startswith("text_model.") for key in module.state_dict()):  # transformers 5 for the first encoder
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
    return _fill_weights(module, state)


def _tokenizer(base: BaseFiles, name: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        base.write_tokenizer(name, folder)
        try:
            return CLIPTokenizer.from_pretrained(folder, pad_token=base.pad_token(name), local_files_only=True)
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{base.folder}: its {name} is not CLIP's ({error})") from error
