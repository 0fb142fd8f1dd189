"""The decoder learns to paint what a shifted latent says in the colours of the known pixels (ASUKA, 3.3).

Its target is the picture. The latent is that of a picture whose colours were moved, half of the time after the frozen
UNet had guessed it from noise in one step, as such guesses shift. The known pixels that it sees are the true ones.

What it makes of known pixels is random at first, and would spoil what the VAE's decoder can do before it learns. So
that part learns alone at first: to say what the VAE's decoder has in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from dreammix_trt.core.asuka import DecoderConfig
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.torch_modules.asuka_decoder import AsukaDecoder
from dreammix_trt.trainer.asuka.alignment import CELL
from dreammix_trt.trainer.asuka.recipes import AsukaRecipe, Part
from dreammix_trt.trainer.consistency import Tables, tell_sizes
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.hole_masks import draw_hole
from dreammix_trt.trainer.networks import TextEncoders, TrainingUNet, Vae, to_latent_range
from dreammix_trt.trainer.picture_pool import PicturePool
from dreammix_trt.trainer.preparing import free_memory
from dreammix_trt.trainer.row_reader import Row

#: how far brightness, contrast, saturation and hue move at most; the hue in turns of the colour wheel
JITTER = (0.15, 0.2, 0.1, 0.03)
GUESSED = 0.5  # share of the pictures that the UNet guesses
#: timesteps that it guesses from; the paper's range is lost but for "large", and later ones give colours of no sampler
TIMES = (500, 900)
Distance = Callable[[Tensor, Tensor], Tensor]
#: what a pixel's error counts in L1, beside 1 in the hole: known ones are put back by the paste, and a seam is seen at
#: the border
KNOWN, BORDER = 0.2, 4.0
REACH = 8  # of the border into the hole, pixels
_LUMA = (0.299, 0.587, 0.114)


class DecoderLesson:
    """L1 of the picture and a perceptual distance."""

    part: Part = "decoder"

    def __init__(
        self,
        decoder: AsukaDecoder,
        base: BaseFiles,
        hardware: Hardware,
        pool: PicturePool,
        recipe: AsukaRecipe,
        distance: Distance,
    ) -> None:
        """distance: the perceptual term, of pictures (N, 3, S, S) in about [-1, 1]."""
        self._decoder, self._pool, self._recipe, self._base = decoder, pool, recipe, base
        self._distance, self._products = distance, hardware.products
        self._empty = TextEncoders(base, hardware.device).encode([""])
        free_memory(hardware.device)
        self._vae = Vae(base, hardware.device)
        self._unet = TrainingUNet(base, hardware)
        self._device = self._unet.device
        self._tables = Tables(self._unet.signal.to(self._device), self._unet.noise.to(self._device))

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """All of the decoder."""
        return dict(self._decoder.named_parameters())

    def draw(self, rng: np.random.Generator) -> Row:
        """image: (3, S, S) in [-1, 1]; hole: (1, S, S); colours: (4,) from -1 to 1; noise: (4, S/8, S/8); guessed: ()
        1 or 0; time: ().
        """
        side, cells = self._recipe.side, self._recipe.side // CELL
        return {
            "image": to_latent_range([self._pool.draw(rng, side, self._recipe.crop)])[0],
            "hole": draw_hole(rng, side, self._pool.objects)[None].astype(np.float32),
            "colours": rng.uniform(-1, 1, len(JITTER)).astype(np.float32),
            "noise": rng.standard_normal((self._base.latent_channels, cells, cells), np.float32),
            "guessed": np.asarray(rng.random() < GUESSED, np.float32),
            "time": np.asarray(rng.integers(*TIMES), np.float32),
        }

    def loss(self, rows: Mapping[str, Tensor], step: int) -> Tensor:
        """At first of what the condition encoder says; then of the picture: known places have to be kept, too."""
        held = {name: value.to(self._device) for name, value in rows.items()}
        image = held["image"]
        if step < self._recipe.imitated:
            return self._compare_streams(image, held["hole"])
        # UNet and VAE choose their precision themselves; colours in bfloat16 would be rounded to a level or two
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            shifted = move_colours(self._guess(held), held["colours"])
            latent = self._vae.encode_batch(shifted) / self._base.scaling_factor
        # in float16 a VAE's decoder overflows
        with torch.autocast(self._device.type, self._products, enabled=self._products == torch.bfloat16):
            found = self._decoder(latent, image, held["hole"]).float()
        with torch.autocast(self._device.type, enabled=False):  # squares of features leave float16
            counts = weigh_pixels(held["hole"])
            error = ((found - image).abs().mean(1, keepdim=True) * counts).sum() / counts.sum()
            return error + self._distance(found, image)

    def _compare_streams(self, image: Tensor, hole: Tensor) -> Tensor:
        """How far known places are from what the VAE's decoder has there, in shares of its variance; mean of levels."""
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            wanted = self._decoder.trace_latent(self._vae.encode_batch(image) / self._base.scaling_factor)
        losses = []
        for said, touched, stream in zip(*self._decoder.trace_condition(image, hole), wanted, strict=True):
            known = 1 - touched
            error = ((said.float() - stream) ** 2).mean(1, keepdim=True)
            losses.append((error * known).sum() / (known.sum() * stream.var() + 1e-6))
        return torch.stack(losses).mean()

    def _guess(self, held: Mapping[str, Tensor]) -> Tensor:
        """The pictures; those that are marked as the UNet guesses them."""
        chosen = held["guessed"].bool()
        if not chosen.any():
            return held["image"]
        clear = self._vae.encode_batch(held["image"][chosen])
        t = held["time"][chosen].long()
        guess = estimate_clear(self._tables, clear, held["noise"][chosen], t, self._predict(clear))
        pictures = held["image"].clone()
        pictures[chosen] = self._vae.decode_batch(guess).clamp(-1, 1)
        return pictures

    def _predict(self, clear: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The frozen UNet, which is told everything: no hole, and the clear latent as what is known."""
        feature = self._unet.feature(torch.zeros_like(clear[:, :1]), clear)
        states, pooled = (each.expand(len(clear), *each.shape[1:]) for each in self._empty)

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            sizes = tell_sizes(noisy, t, self._base.native_side)
            return self._unet.predict(noisy, t, (states, pooled), sizes, feature)

        return predict


def weigh_pixels(hole: Tensor) -> Tensor:
    """What each pixel's error counts. hole, result: (N, 1, H, W)."""
    near = torch.nn.functional.max_pool2d(1 - hole, 2 * REACH + 1, 1, REACH)
    return KNOWN + hole * (1 - KNOWN + (BORDER - 1) * near)


def estimate_clear(
    tables: Tables, clear: Tensor, noise: Tensor, t: Tensor, predict: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """What one step from noise makes of latents: `clear` itself where the prediction is `noise`.

    clear, noise: (N, 4, h, w). t: int64 (N,). predict: (noisy latents, t) -> the noise in them.
    """
    signal, spread = tables.at(t)
    noisy = signal * clear + spread * noise
    return tables.predict_original(noisy, predict(noisy, t), t)


def move_colours(pictures: Tensor, amounts: Tensor) -> Tensor:
    """Move brightness, contrast, saturation and hue of pictures (N, 3, H, W) in [-1, 1], in this order.

    amounts: (N, 4) from -1 to 1: shares of JITTER. The first three are factors, as in torchvision; the hue is turned
    around the axis of greys.
    """
    bright, contrast, saturation, hue = (amounts * amounts.new_tensor(JITTER)).unbind(1)
    factor = [(1 + each)[:, None, None, None] for each in (bright, contrast, saturation)]
    weights = pictures.new_tensor(_LUMA)[None, :, None, None]
    x = ((pictures + 1) / 2 * factor[0]).clamp(0, 1)
    mean = (x * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    x = (mean + (x - mean) * factor[1]).clamp(0, 1)
    grey = (x * weights).sum(1, keepdim=True)
    x = (grey + (x - grey) * factor[2]).clamp(0, 1)
    return torch.einsum("nij,njhw->nihw", _turn_hues(hue), x).clamp(0, 1) * 2 - 1


def _turn_hues(turns: Tensor) -> Tensor:
    """(N,) -> rotations (N, 3, 3) around the axis of greys (Rodrigues' formula)."""
    angle = turns * (2 * np.pi)
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    one = torch.eye(3, dtype=turns.dtype, device=turns.device)
    across = turns.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    return cosine * one + sine * across + (1 - cosine) / 3


def make_decoder(base: BaseFiles, config: DecoderConfig) -> AsukaDecoder:
    """A decoder that decodes as the base's VAE does; what is made of the known pixels is random.

    Raises FileFormatError naming the number by which the configuration is another VAE's.
    """
    wanted = DecoderConfig.of_vae(base.configs["vae"])
    for name in (each.name for each in fields(config)):
        given, own_value = getattr(config, name), getattr(wanted, name)
        if given != own_value:
            raise FileFormatError(
                f"decoder: {name} is {given}, but this base's VAE has {own_value}; what is in --out is for another "
                "base: name a new directory"
            )
    decoder = AsukaDecoder(config)
    own, weights = decoder.state_dict(), base.state("vae")
    with torch.no_grad():
        for name, value in own.items():
            if name.startswith(("decoder.", "post_quant_conv.")):
                value.copy_(torch.from_numpy(np.array(weights[name])).reshape(value.shape))
    return decoder
