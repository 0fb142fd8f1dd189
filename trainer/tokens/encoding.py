"""Objects as a training needs them: pictures with holes as latents, references as tokens, texts as states."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.reference_pictures import place_on_white
from dreammix_trt.core.subject_tokens import TokenConfig, mark_cells
from dreammix_trt.core.torch_modules.subject_tokens import run_down_stack, select_tokens
from dreammix_trt.trainer.data import draw_view, latent_mask
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.networks import TextEncoders, TrainingUNet, Vae, to_latent_range
from dreammix_trt.trainer.tokens.objects import Seen
from dreammix_trt.trainer.tokens.recipes import TokenRecipe, name_class
from dreammix_trt.trainer.tokens.references import vary_reference

log = logging.getLogger(__name__)
_PAIRS = 4  # of words of an object

Arrays = Mapping[str, NDArray[Any]]
#: what a shard holds: name -> its type in the file
#: - of each view, in order of the objects: latents and masked (4, h, w); cells (1, h, w), 1 is hole; sharp (), in
#:   pixels; tokens (48, D), of the reference that was made of the view's photograph; owner, photograph, caption,
#:   class_text (): numbers of the object, of its photograph, and of texts; heard, words (4,): of the texts of
#:   `Seen.words`, which take turns where there are fewer pairs
#: - of each text: states (77, C), pooled (Dp); number 0 is the empty one
#: - grey (1, 4, h, w): the latent of a picture of which nothing is known
SHARD = {
    "latents": "float16",
    "masked": "float16",
    "cells": "uint8",
    "sharp": "float32",
    "tokens": "float32",
    "owner": "int64",
    "photograph": "int64",
    "caption": "int64",
    "class_text": "int64",
    "heard": "int64",
    "words": "int64",
    "states": "float16",
    "pooled": "float16",
    "grey": "float16",
}


class ObjectEncoder:
    """The base's networks as far as they are needed, float32 whatever the training computes in.

    The features of a reference are the base's alone, as in `core/subject_tokens`.
    """

    def __init__(self, base: BaseFiles, config: TokenConfig, hardware: Hardware) -> None:
        self._base, self._config, self._device = base, config, torch.device(hardware.device)
        self._stack = _cut_stack(TrainingUNet(base, replace(hardware, precision="float32")), config.block)
        self._vae, self._texts = Vae(base, hardware.device), TextEncoders(base, hardware.device)

    def encode(self, objects: Sequence[Seen], recipe: TokenRecipe, rng: np.random.Generator) -> Arrays:
        """One shard of objects, by the names of SHARD."""
        texts, rows = _Texts(self._texts), []
        for owner, seen in enumerate(objects):
            numbers: dict[str, Any] = {"owner": owner, "class_text": texts.number(name_class(seen.class_name))}
            numbers |= _number_words(seen, texts)
            for view in self._encode_object(seen, recipe, rng):
                caption = texts.number(seen.captions[int(view["photograph"])])
                rows.append({**view, **numbers, "caption": caption})
        states, pooled = texts.encode()
        side = self._base.native_side
        grey = self._vae.encode(np.zeros((1, 3, side, side), np.float32)).numpy()
        stacked = {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}
        return {**stacked, "states": states.numpy(), "pooled": pooled.numpy(), "grey": grey}

    def _encode_object(self, seen: Seen, recipe: TokenRecipe, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Its views, each with the tokens of a reference; the photographs take turns."""
        count, side = len(seen.photographs), self._base.native_side
        numbers = [number % count for number in range(max(recipe.views, count))]
        views = [draw_view(rng, seen.photographs[number], side, recipe.crop_share) for number in numbers]
        varied = [vary_reference(rng, seen.photographs[number], self._config.side) for number in numbers]
        placed = [place_on_white(picture, mask, self._config.side) for picture, mask in varied]
        pictures = to_latent_range([view.image for view in views])
        holes = np.stack([view.hole for view in views])[:, None]
        # the hole is mid grey, as the head saw it in the base's own training
        latents, masked = (self._vae.encode(each) for each in (pictures, np.where(holes, np.float32(0), pictures)))
        references = self._vae.encode(np.stack([image for image, _ in placed]))
        inside = np.stack([mark_cells(mask, self._config) for _, mask in placed])
        tokens = self._select(references, torch.from_numpy(inside), seen.class_name)
        return [
            {
                "latents": latents[place].numpy(),
                "masked": masked[place].numpy(),
                "cells": latent_mask(views[place].hole)[None],
                "sharp": views[place].sharp_side,
                "tokens": tokens[place].numpy(),
                "photograph": number,
            }
            for place, number in enumerate(numbers)
        ]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _select(self, references: Tensor, inside: Tensor, class_name: str) -> Tensor:
        """Latents (N, 4, h, w) -> tokens (N, 48, D) on the CPU, one reference at a time: their cells are many."""
        side = float(self._config.side)
        text, pooled = (each.to(self._device) for each in self._texts.encode([class_name]))
        sizes = torch.tensor([[side, side, 0, 0, side, side]], device=self._device)
        found = []
        for latent, cells in zip(references.split(1), inside.split(1), strict=True):
            sample = latent.to(self._device)
            features = run_down_stack(self._stack, sample, text, pooled, sizes, self._config.block)
            found.append(select_tokens(features, cells.to(self._device), self._config.tokens)[0].cpu())
        return torch.cat(found)


def _cut_stack(unet: TrainingUNet, block: int) -> Any:
    """The UNet without what comes behind a down block; the rest is let go."""
    stack = unet.unet
    stack.mid_block, stack.up_blocks, stack.down_blocks = None, torch.nn.ModuleList(), stack.down_blocks[: block + 1]
    return stack


def _number_words(seen: Seen, texts: _Texts) -> dict[str, NDArray[np.int64]]:
    """The numbers of an object's words, of as many pairs for every object."""
    pairs = [seen.words[place % len(seen.words)] for place in range(_PAIRS)]
    numbers = np.array([[texts.number(text) for text in pair] for pair in pairs], np.int64)
    return {"heard": numbers[:, 0], "words": numbers[:, 1]}


class _Texts:
    """_Texts by their numbers; the empty one is number 0, and stands for one that is too long, which is logged."""

    def __init__(self, encoders: TextEncoders) -> None:
        self._encoders, self._encoded = encoders, {"": encoders.encode([""])}
        self._numbers = {"": 0}

    def number(self, text: str) -> int:
        """The number of a text."""
        if text not in self._numbers:
            try:
                self._encoded[text] = self._encoders.encode([text])
                self._numbers[text] = len(self._numbers)
            except InputError as error:
                log.warning("%s; it is left out", error)
                return 0
        return self._numbers[text]

    def encode(self) -> tuple[Tensor, Tensor]:
        """states (T, 77, C) and pooled (T, Dp)."""
        found = [self._encoded[text] for text in self._numbers]
        return torch.cat([states for states, _ in found]), torch.cat([pooled for _, pooled in found])
