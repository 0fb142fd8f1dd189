"""The alignment learns to speak to a frozen UNet in the place of text (ASUKA, 3.2 and "misalignment").

Where a hole hides a thing, the auto-encoder expects background and the noise to be predicted is the thing's: from that
alone the alignment would learn to ignore its input. So at first always, later sometimes, the auto-encoder is told of an
empty hole. Then its feature does tell of what the UNet must paint.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.torch_modules.asuka_prior import AsukaPrior
from dreammix_trt.core.torch_modules.masked_autoencoder import normalise
from dreammix_trt.trainer.asuka.prior import shrink_hole, shrink_picture
from dreammix_trt.trainer.asuka.recipes import AsukaRecipe, Part
from dreammix_trt.trainer.consistency import Tables, tell_sizes
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.hole_masks import draw_hole
from dreammix_trt.trainer.networks import TrainingUNet, Vae, to_latent_range
from dreammix_trt.trainer.picture_pool import PicturePool
from dreammix_trt.trainer.row_reader import Row

CELL = 8  # pixels of a latent cell's side
_TIMES = 1000


class AlignLesson:
    """Mean squared error of the noise that the patched UNet predicts when the alignment speaks to it."""

    part: Part = "align"

    def __init__(
        self, prior: AsukaPrior, base: BaseFiles, hardware: Hardware, pool: PicturePool, recipe: AsukaRecipe
    ) -> None:
        self._prior, self._pool, self._recipe, self._base = prior, pool, recipe, base
        prior.mae.eval().requires_grad_(False)
        self._vae = Vae(base, hardware.device)
        self._unet = TrainingUNet(base, hardware)
        if recipe.gradient_checkpointing:
            self._unet.unet.enable_gradient_checkpointing()
        self._tables = Tables(self._unet.signal.to(self._unet.device), self._unet.noise.to(self._unet.device))

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The alignment's parameters."""
        return {f"alignment.{name}": value for name, value in self._prior.alignment.named_parameters()}

    def draw(self, rng: np.random.Generator) -> Row:
        """image: (3, S, S) in [-1, 1]; hole: (1, S, S); noise: (4, S/8, S/8); time, reveal: () from 0 to 1."""
        side, cells = self._recipe.side, self._recipe.side // CELL
        hole = draw_hole(rng, side, self._pool.objects, patches=self._prior.config.grid)
        return {
            "image": to_latent_range([self._pool.draw(rng, side, self._recipe.crop)])[0],
            "hole": hole[None].astype(np.float32),
            "noise": rng.standard_normal((self._base.latent_channels, cells, cells), np.float32),
            "time": np.asarray(rng.random(), np.float32),
            "reveal": np.asarray(rng.random(), np.float32),
        }

    def loss(self, rows: Mapping[str, Tensor], step: int) -> Tensor:
        """Over all cells, as the base itself was trained."""
        on_device = {name: value.to(self._unet.device) for name, value in rows.items()}
        image, hole, noise = (on_device[name] for name in ("image", "hole", "noise"))
        cells = torch.nn.functional.max_pool2d(hole, CELL)
        # the hole is mid grey, as the head saw it in the base's own training
        latents, masked = (self._vae.encode_batch(each) for each in (image, image * (1 - hole)))
        t = self._spread_times(on_device["time"])
        signal, spread = self._tables.at(t)
        noisy = signal * latents + spread * noise
        hidden = (on_device["reveal"] >= self._recipe.revealed_at(step)).float()[:, None, None, None]
        text = self.condition(image, hole * hidden)
        sizes = tell_sizes(noisy, t, self._base.native_side)
        eps = self._unet.predict(noisy, t, text, sizes, self._unet.feature(cells, masked))
        return (eps - noise).square().mean()

    def condition(self, image: Tensor, hole: Tensor) -> tuple[Tensor, Tensor]:
        """What the UNet is told of pictures (N, 3, S, S) in [-1, 1] with holes (N, 1, S, S): context and pooled."""
        side = self._prior.config.side
        with torch.no_grad():
            feature, _ = self._prior.mae(normalise(shrink_picture(image, side)), shrink_hole(hole, side))
        context, pooled = self._prior.alignment(feature)
        return context.float(), pooled.float()

    def _spread_times(self, drawn: Tensor) -> Tensor:
        """Timesteps, int64 (N,), uniform, and one in each N-th of them, so that the loss varies less."""
        order = torch.arange(len(drawn), device=drawn.device)
        return ((order + drawn) / len(drawn) * _TIMES).long().clamp_(max=_TIMES - 1)
