"""The VAE: a start that already carries colour, a loss that asks for edges, and latents of unit scale.

The colour-bypass start: six channels carry +YCbCr and -YCbCr through every shortcut and every resampling step (since
silu(x) - silu(-x) = x, their difference survives the last activation), while the residual branches start near zero.
Training then only adds what a blurred thumbnail lacks.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from dreammix_trt.trainer.micro.networks import SCALING_FACTOR

TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def _calm_residuals(part: torch.nn.Module, scale: float) -> None:
    for name, module in part.named_modules():
        if name.endswith("conv2") or name.endswith("to_out.0"):
            with torch.no_grad():
                module.weight.mul_(scale)  # type: ignore[operator,union-attr]


def _carry(conv: torch.nn.Conv2d, taps: torch.Tensor, keep: int = 6) -> None:
    """Let the first `keep` channels pass a convolution alone, each through `taps` (k, k)."""
    with torch.no_grad():
        conv.weight[:keep] = 0
        conv.weight[:, :keep] *= 0.1
        if conv.bias is not None:
            conv.bias[:keep] = 0
        for channel in range(keep):
            conv.weight[channel, channel] = taps


def start_with_colour(vae: AutoencoderKL) -> None:
    """Overwrite the random start in place."""
    encoder, decoder = vae.encoder, vae.decoder
    _calm_residuals(encoder, 0.05)
    _calm_residuals(decoder, 0.05)
    one = torch.ones(1, 1)
    half = torch.zeros(3, 3)
    half[:2, :2] = 0.25  # the stride-2 convolution pads right and below: its first two taps are the 2x2 cell
    blur = torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])) / 16
    ycc = torch.cat([TO_YCC, -TO_YCC])
    with torch.no_grad():
        encoder.conv_in.weight[:6] = 0
        encoder.conv_in.weight[:6, :, 1, 1] = ycc
        encoder.conv_in.bias[:6] = 0
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                if resnet.conv_shortcut is not None:
                    _carry(resnet.conv_shortcut, one)
            for sampler in block.downsamplers or ():
                _carry(sampler.conv, half)
        for norm in (encoder.conv_norm_out, decoder.conv_norm_out):
            norm.weight.fill_(1.0)
        encoder.conv_out.weight[:3] *= 0.1
        for channel in range(3):
            encoder.conv_out.weight[channel, :6] = 0
            encoder.conv_out.weight[channel, channel, 1, 1] = 1.0
            encoder.conv_out.weight[channel, channel + 3, 1, 1] = -1.0
        encoder.conv_out.bias.zero_()
        eye = torch.eye(8)
        vae.quant_conv.weight.copy_((0.98 * eye + 0.02 * vae.quant_conv.weight[:, :, 0, 0])[:, :, None, None])
        vae.quant_conv.bias.zero_()
        vae.quant_conv.bias[4:] = -5.0
        vae.post_quant_conv.weight.copy_((torch.eye(4))[:, :, None, None])
        vae.post_quant_conv.bias.zero_()
        decoder.conv_in.weight[:6] = 0
        for channel in range(3):
            decoder.conv_in.weight[channel, channel, 1, 1] = 1.0
            decoder.conv_in.weight[channel + 3, channel, 1, 1] = -1.0
        decoder.conv_in.bias[:6] = 0
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                if resnet.conv_shortcut is not None:
                    _carry(resnet.conv_shortcut, one)
            for sampler in block.upsamplers or ():
                _carry(sampler.conv, blur)
        inverse = torch.linalg.inv(TO_YCC)
        decoder.conv_out.weight.mul_(0.1)
        decoder.conv_out.weight[:, :6] = 0
        decoder.conv_out.weight[:, :3, 1, 1] = 0.4 * inverse
        decoder.conv_out.weight[:, 3:6, 1, 1] = -0.4 * inverse
        decoder.conv_out.bias.zero_()


def to_unit(images: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in -1..1."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_pictures(images: torch.Tensor) -> NDArray[np.uint8]:
    """float (N, 3, H, W) in -1..1 -> uint8 (N, H, W, 3)."""
    scaled = (images.float().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
    return np.asarray(scaled.permute(0, 2, 3, 1).cpu().numpy())


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + MSE + 2 L1(CbCr) + half the L1 of both picture gradients; images in -1..1."""
    error = output.float() - target
    chroma = torch.einsum("nchw,dc->ndhw", error, TO_YCC[1:].to(error))
    slope = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 2 * chroma.abs().mean() + 0.5 * slope


def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """images (N, 3, H, W) in -1..1 -> scaled latents (N, 4, H/8, W/8): the distribution's mode x 0.13025."""
    latents: torch.Tensor = vae.encode(images).latent_dist.mode() * SCALING_FACTOR
    return latents


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents -> images in -1..1 (not clipped)."""
    images: torch.Tensor = vae.decode(latents / SCALING_FACTOR).sample
    return images


def fold_latent_scale(vae: AutoencoderKL, images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Move the latents' mean and standard deviation into quant_conv and post_quant_conv: scaled latents become N(0, 1).

    images: (N, 3, H, W) to measure on. Exact up to rounding. Returns the measured (means, deviations).
    """
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(32)])
        mean = latents.mean((0, 2, 3))
        deviation = latents.std((0, 2, 3))
        gain = 1 / (deviation * SCALING_FACTOR)
        vae.quant_conv.weight[:4] *= gain[:, None, None, None]
        vae.quant_conv.bias[:4] = (vae.quant_conv.bias[:4] - mean) * gain
        vae.quant_conv.bias[4:] += 2 * gain.log()
        vae.post_quant_conv.bias += (vae.post_quant_conv.weight[:, :, 0, 0] * mean[None]).sum(1)
        vae.post_quant_conv.weight /= gain[None, :, None, None]
    return [float(x) for x in mean], [float(x) for x in deviation]


def psnr(output: torch.Tensor, target: torch.Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB; images in -1..1."""
    error = (output.clamp(-1, 1) - target).square().mean((1, 2, 3)).clamp_min(1e-8)
    return float((10 * torch.log10(4 / error)).mean())
