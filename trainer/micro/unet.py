"""The two diffusion stages: a raw text-to-image UNet with its text encoders, then its inpainting fine-tune."""

from __future__ import annotations

import torch

from dreammix_trt.trainer.micro.data import Batch, Latents
from dreammix_trt.trainer.micro.forms import FormLoss
from dreammix_trt.trainer.micro.networks import NoiseNetwork, TextEncoders, TrainedHead, build_unet, noise_table
from dreammix_trt.trainer.micro.parts import PartLoss
from dreammix_trt.trainer.networks import write_out_attention

_MOST = 10.0
_DETAIL = 5.0
_DECALS = 0.25  # share of the rows that are chosen for a decal, where forms are asked for


class RawModel(torch.nn.Module):  # type: ignore[misc]
    """UNet and text encoders, trained together."""

    def __init__(self, vocabulary: int, bos: int, eos: int, native: int) -> None:
        super().__init__()
        self.unet = build_unet(native)
        write_out_attention(self.unet)
        self.text = TextEncoders(vocabulary, bos, eos)
        with torch.no_grad():  # tokens must stand out against positions
            for encoder in (self.text.one, self.text.two):
                encoder.get_input_embeddings().weight.normal_(0, 0.1)


class InpaintModel(torch.nn.Module):  # type: ignore[misc]
    """The UNet to fine-tune and its head. Biases stay frozen (the patch drops them), and so does the middle block."""

    def __init__(self, native: int) -> None:
        super().__init__()
        self.unet = build_unet(native)
        write_out_attention(self.unet)
        self.head = TrainedHead(self.unet.config.block_out_channels[0])
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_(is_patched(name))


def is_patched(name: str) -> bool:
    """Whether the inpainting fine-tune may change this UNet tensor (diffusers name)."""
    return name.endswith(".weight") and not name.startswith("mid_block.")


class NoiseLoss:
    """Squared error of the predicted noise, weighted by where the object is and by how much noise there is.

    Small parts weigh more: a decal covers a twentieth of what is repainted, so its form hardly counts in a plain mean.
    A cell all of it on a decal weighs 1 + `_DETAIL`. A sample weighs 1 / alpha-bar, at most `_MOST`: the error of the
    velocity, not of the noise. Which part has which colour is decided where nearly all is noise, and there the noise
    is easy to predict without knowing it.
    """

    def __init__(
        self,
        data: Latents,
        rank: int,
        count: int,
        outside: float,
        all_masked: float,
        forms: FormLoss | None = None,
        parts: PartLoss | None = None,
    ) -> None:
        self._data, self._rank, self._count = data, rank, count
        self._outside, self._all_masked, self._forms, self._parts = outside, all_masked, forms, parts
        self._signal, self._noise = (table.to(data.device) for table in noise_table())

    def prepare(self, step: int) -> tuple[Batch, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, noisy latents, timesteps, noise) of a step."""
        decals = 0.0 if self._forms is None else _DECALS
        batch = self._data.draw(self._rank, step, self._count, self._all_masked, decals)
        dice = torch.Generator().manual_seed(((self._data.seed * 1009 + step) * 64 + self._rank) % 2**62)
        # stratified over the batch: lower variance than independent draws
        places = (torch.randperm(self._count, generator=dice) + torch.rand(self._count, generator=dice)) / self._count
        steps = (places * 1000).long().clamp_(0, 999).to(self._data.device)
        noise = torch.randn(batch.latents.shape, generator=dice).to(self._data.device)
        signal, spread = self._signal[steps][:, None, None, None], self._noise[steps][:, None, None, None]
        return batch, signal * batch.latents + spread * noise, steps, noise

    def weigh(self, error: torch.Tensor, batch: Batch, steps: torch.Tensor) -> torch.Tensor:
        weight = (self._outside + (1 - self._outside) * batch.mask) * (1 + _DETAIL * batch.detail)
        balance = (1 / self._signal[steps].square()).clamp(max=_MOST)[:, None, None, None]
        return (error.float().square() * weight * balance).mean() / weight.mean().sqrt()

    def read(self, noisy: torch.Tensor, predicted: torch.Tensor, batch: Batch, steps: torch.Tensor) -> torch.Tensor:
        """What the readers of decals' forms and of parts add, where they are asked."""
        added = predicted.new_zeros(())
        if self._forms is not None:
            added = added + self._forms.measure(noisy, predicted, steps, batch.asked)
        if self._parts is not None:
            added = added + self._parts.measure(noisy, predicted, steps, batch.told)
        return added


def raw_loss(model: RawModel, loss: NoiseLoss, denoiser: NoiseNetwork, step: int) -> torch.Tensor:
    batch, noisy, steps, noise = loss.prepare(step)
    states, pooled = model.text(batch.ids_one, batch.ids_two)
    return loss.weigh(denoiser(noisy, steps, states, pooled, batch.time_ids) - noise, batch, steps)


def inpaint_loss(
    model: InpaintModel, text: TextEncoders, loss: NoiseLoss, denoiser: NoiseNetwork, step: int
) -> torch.Tensor:
    batch, noisy, steps, noise = loss.prepare(step)
    with torch.no_grad():
        states, pooled = text(batch.ids_one, batch.ids_two)
    feature = model.head(batch.mask, batch.masked)
    predicted = denoiser(noisy, steps, states, pooled, batch.time_ids, feature)
    return loss.weigh(predicted - noise, batch, steps) + loss.read(noisy, predicted, batch, steps)
