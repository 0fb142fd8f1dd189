"""The alignment learns to speak to a frozen UNet in the place of text (ASUKA, 3.2 and "misalignment").

Where a hole hides a thing, the auto-encoder expects background and the noise to be predicted is the thing's: from that
alone the alignment would learn to ignore its input. So at first always, later sometimes, the auto-encoder is told of an
empty hole. Then its feature describes what the UNet must paint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.torch_modules.asuka_prior import AsukaPrior
from dreammix_trt.core.torch_modules.masked_autoencoder import normalise
from dreammix_trt.trainer.asuka.prior import shrink_hole, shrink_picture
from dreammix_trt.trainer.asuka.recipes import AsukaRecipe, Part
from dreammix_trt.trainer.consistency import Tables, spread_times, tell_sizes
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.hole_masks import draw_hole
from dreammix_trt.trainer.networks import TrainingUNet, Vae, to_latent_range
from dreammix_trt.trainer.picture_pool import PicturePool
from dreammix_trt.trainer.row_reader import Row, RowReader

Tensors = Mapping[str, Tensor]
#: gives tensors that were kept, or makes them by what it is given
Keep = Callable[[Callable[[], Tensors]], Tensors]
#: what an encoded view holds
VIEW = ("seen", "hidden", "latents", "masked", "cells")
_AT_ONCE, _VIEWS = 8, 41  # views that are encoded at a time; a seed
CELL = 8  # pixels of a latent cell's side


class AlignLesson:
    """Mean squared error of the noise that the patched UNet predicts when the alignment speaks to it."""

    part: Part = "align"

    def __init__(
        self,
        prior: AsukaPrior,
        base: BaseFiles,
        hardware: Hardware,
        pool: PicturePool,
        recipe: AsukaRecipe,
        seed: int,
        keep: Keep,
        tell: Callable[[float], None],
    ) -> None:
        """seed: of the views. keep: gives the views that are kept, or makes them. tell: is told the encoded share."""
        self._prior, self._pool, self._recipe, self._base = prior, pool, recipe, base
        self._device, self._seed, self._tell = torch.device(hardware.device), seed, tell
        prior.mae.eval().requires_grad_(False)
        self._vae = Vae(base, hardware.device)
        self._views = keep(self._encode_views) if recipe.views else None
        self._unet = TrainingUNet(base, hardware)
        if recipe.gradient_checkpointing:
            self._unet.unet.enable_gradient_checkpointing()
        self._tables = Tables(self._unet.signal.to(self._device), self._unet.noise.to(self._device))

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The alignment's parameters."""
        return {f"alignment.{name}": value for name, value in self._prior.alignment.named_parameters()}

    def draw(self, rng: np.random.Generator) -> Row:
        """A view, noise (4, S/8, S/8), and time, reveal: () from 0 to 1."""
        cells = self._recipe.side // CELL
        if self._views is None:
            view = self._draw_view(rng)
        else:
            number = int(rng.integers(self._recipe.views))
            view = {name: value[number].numpy() for name, value in self._views.items()}
        return {
            **view,
            "noise": rng.standard_normal((self._base.latent_channels, cells, cells), np.float32),
            "time": np.asarray(rng.random(), np.float32),
            "reveal": np.asarray(rng.random(), np.float32),
        }

    def _draw_view(self, rng: np.random.Generator) -> Row:
        """image: (3, S, S) in [-1, 1]; hole: (1, S, S)."""
        hole = draw_hole(rng, self._recipe.side, self._pool.objects, patches=self._prior.config.grid)
        image = to_latent_range([self._pool.draw(rng, self._recipe.side, self._recipe.crop)])[0]
        return {"image": image, "hole": hole[None].astype(np.float32)}

    def _encode_views(self) -> Tensors:
        """All views of the recipe, as `_encode` gives them, on the CPU."""
        parts: list[Tensors] = []
        with RowReader(self._draw_view, (self._seed, _VIEWS), range(_AT_ONCE)) as reader:
            for number in range(-(-self._recipe.views // _AT_ONCE)):
                self._tell(number * _AT_ONCE / self._recipe.views)
                encoded = self._encode(reader.take(number))
                parts.append({name: value.cpu() for name, value in encoded.items()})
        return {name: torch.cat([part[name] for part in parts])[: self._recipe.views] for name in parts[0]}

    def _encode(self, view: Tensors) -> Tensors:
        """Of pictures with holes: seen (N, 3, s, s) and hidden (N, 1, s, s), the prior's inputs; cells (N, 1, h, w);
        latents and masked (N, 4, h, w), of the picture and of what is known of it.
        """
        image, hole = (view[name].to(self._device) for name in ("image", "hole"))
        side = self._prior.config.side
        # the hole is mid grey, as the head saw it in the base's own training
        latents, masked = (self._vae.encode_batch(each) for each in (image, image * (1 - hole)))
        found = {"seen": shrink_picture(image, side), "hidden": shrink_hole(hole, side), "latents": latents}
        return found | {"masked": masked, "cells": torch.nn.functional.max_pool2d(hole, CELL)}

    def loss(self, rows: Tensors, step: int) -> Tensor:
        """Over all cells, as the base itself was trained; rows of much noise may weigh more."""
        held = rows if "latents" in rows else {**rows, **self._encode(rows)}
        held = {name: value.to(self._device) for name, value in held.items()}
        t, noise = spread_times(held["time"]), held["noise"]
        signal, spread = self._tables.at(t)
        noisy = signal * held["latents"] + spread * noise
        hides = (held["reveal"] >= self._recipe.revealed_at(step)).float()[:, None, None, None]
        text = self.condition(held["seen"], held["hidden"] * hides)
        feature = self._unet.feature(held["cells"], held["masked"])
        eps = self._unet.predict(noisy, t, text, tell_sizes(noisy, t, self._base.native_side), feature)
        weight = (1 / signal.square()).clamp(max=self._recipe.heaviest)
        return ((eps - noise).square() * weight).mean()

    def condition(self, seen: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the UNet is told of pictures (N, 3, s, s) in [-1, 1] with holes (N, 1, s, s): context and pooled."""
        with torch.no_grad():
            feature, _ = self._prior.mae(normalise(seen), hidden)
        context, pooled = self._prior.alignment(feature)
        return context.float(), pooled.float()
