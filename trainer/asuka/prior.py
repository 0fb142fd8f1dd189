"""The prior's auto-encoder learns to complete pictures of which a quarter of the patches is seen (ASUKA, 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dreammix_trt.core.asuka import PriorConfig
from dreammix_trt.core.torch_modules.asuka_prior import AsukaPrior
from dreammix_trt.core.torch_modules.masked_autoencoder import normalise
from dreammix_trt.trainer.asuka.recipes import AsukaRecipe, Part
from dreammix_trt.trainer.hole_masks import draw_hole, top_up
from dreammix_trt.trainer.networks import to_latent_range
from dreammix_trt.trainer.picture_pool import PicturePool
from dreammix_trt.trainer.row_reader import Row


class PriorLesson:
    """Mean squared error of the hidden pixels, in the auto-encoder's own range. The alignment does not take part."""

    part: Part = "prior"

    def __init__(self, prior: AsukaPrior, pool: PicturePool, recipe: AsukaRecipe, device: torch.device) -> None:
        self._mae, self._pool, self._recipe, self._device = prior.mae, pool, recipe, device

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The auto-encoder's parameters but its fixed positions."""
        return {f"mae.{name}": value for name, value in self._mae.named_parameters() if value.requires_grad}

    def draw(self, rng: np.random.Generator) -> Row:
        """image: (3, S, S) in [-1, 1], of the recipe's side; mask: (1, s, s), of the auto-encoder's."""
        config, recipe = self._mae.config, self._recipe
        image = to_latent_range([self._pool.draw(rng, recipe.side, recipe.crop)])[0]
        hole = draw_hole(rng, config.side, self._pool.objects, patches=config.grid)
        return {"image": image, "mask": top_up(rng, hole, patches=config.grid)[None].astype(np.float32)}

    def loss(self, rows: Mapping[str, Tensor], step: int) -> Tensor:
        """Of the pixels of the hole and of the patches that are hidden beside it."""
        mask = rows["mask"].to(self._device)
        image = normalise(shrink_picture(rows["image"].to(self._device), self._mae.config.side))
        _, found = self._mae(image, mask)
        error = (found.float() - image).square() * mask
        return error.sum() / (3 * mask.sum())


def make_prior(config: PriorConfig) -> AsukaPrior:
    """A prior that knows nothing yet; the auto-encoder begins as He et al.'s does."""
    prior = AsukaPrior(config)
    for module in prior.mae.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    torch.nn.init.normal_(prior.mae.mask_token, std=0.02)
    return prior


def shrink_picture(image: Tensor, side: int) -> Tensor:
    """(N, C, H, W) -> (N, C, side, side): each pixel is the mean of those in its place."""
    return torch.nn.functional.adaptive_avg_pool2d(image, side)


def shrink_hole(hole: Tensor, side: int) -> Tensor:
    """(N, 1, H, W) of 0 and 1 -> (N, 1, side, side): a pixel is of the hole where any in its place is.

    So no pixel of the hole has a share in a known one of `shrink_picture`.
    """
    return torch.nn.functional.adaptive_max_pool2d(hole, side)
