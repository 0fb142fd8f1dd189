"""The patched UNet, with LoRA factors that learn, predicts the noise of an object when tokens speak beside the text.

Noise is on all cells on both of the paper's paths: the loop keeps the known cells noised as well, and what they hold
the UNet knows by the hole's condition. What the paths differ in is the hole, and so where the loss is: see
`recipes.TokenRecipe.decoupling`.

Some rows may learn from the base itself instead of from the noise. It is told in words what the tokens show, and its
prediction is what tokens beside a text t are to bring about: e(t) + g (e(t and all in words) - e(t)), with the emphasis
g. That says in every row which part has which colour; the noise of one picture says so hardly at all. With a text that
names another colour than the object has, both get the text's, so words win over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.lora import Factors
from dreammix_trt.core.subject_tokens import TokenConfig
from dreammix_trt.core.token_adapter import TokenAdapter
from dreammix_trt.core.token_factors import read_factors
from dreammix_trt.core.torch_modules.subject_tokens import TokenProjection
from dreammix_trt.trainer.adapters import adapters_of, add_adapters, copy_factors
from dreammix_trt.trainer.batches import vary_sizes
from dreammix_trt.trainer.consistency import Tables, spread_times
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.networks import TrainingUNet
from dreammix_trt.trainer.row_reader import Row
from dreammix_trt.trainer.tokens.recipes import TokenRecipe
from dreammix_trt.trainer.tokens.shelf import Shelf

#: modules that get adapters, by the ends of their names: all that an engine merges a subject into
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


class TokenLesson:
    """Squared error of the noise in the hole, each row's mean over its own; rows of much noise weigh more."""

    def __init__(
        self,
        base: BaseFiles,
        config: TokenConfig,
        hardware: Hardware,
        shelf: Shelf,
        recipe: TokenRecipe,
        seed: int,
        start: TokenAdapter | None = None,
    ) -> None:
        """shelf: filled. start: the adapter that learning begins with, of the recipe's rank; None: it begins anew."""
        self._recipe, self._shelf, self._side = recipe, shelf, base.native_side
        self._unet = TrainingUNet(base, hardware)
        self._device = self._unet.device
        add_adapters(self._unet.unet, recipe.rank, seed, LAYERS)
        if recipe.gradient_checkpointing:
            self._unet.unet.enable_gradient_checkpointing()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.projection = TokenProjection(config).to(self._device)
        if start is not None:
            self._copy(start)
        self._tables = Tables(self._unet.signal.to(self._device), self._unet.noise.to(self._device))

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The projection's parameters, and the factors."""
        found = {f"token_proj.{name}": value for name, value in self.projection.named_parameters()}
        for module, pair in adapters_of(self._unet.unet).items():
            names = (f"unet.{module}.lora.{part}.weight" for part in ("down", "up"))
            found |= dict(zip(names, pair, strict=True))
        return found

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _copy(self, start: TokenAdapter) -> None:
        weights, factors = start.projection(), read_factors(start)["unet"]
        for name, value in self.projection.state_dict().items():
            value.copy_(torch.from_numpy(weights[name]))
        for module, (down, up) in adapters_of(self._unet.unet).items():
            a, b = factors[module]
            down.copy_(torch.from_numpy(a.T))
            up.copy_(torch.from_numpy(b.T))

    def draw(self, rng: np.random.Generator) -> Row:
        """As `Shelf.draw`."""
        return self._shelf.draw(rng)

    def loss(self, rows: Mapping[str, Tensor], step: int) -> Tensor:
        """All rows have as many tokens as the first asks for."""
        held = {name: value.to(self._device) for name, value in rows.items()}
        t, noise, mask = spread_times(held["time"]), held["noise"], held["mask"]
        signal, spread = self._tables.at(t)
        noisy = signal * held["latents"] + spread * noise
        with torch.autocast(self._device.type, enabled=False):  # an engine computes them in float32, too
            spoken = self.projection(held["tokens"][:, : int(held["count"][0])])
        text = torch.cat([held["states"], spoken], 1), held["pooled"]
        sizes = vary_sizes(held["sharp"], held["size"], self._side)
        feature = self._unet.feature(mask, held["masked"])
        eps = self._unet.predict(noisy, t, text, sizes, feature)
        target = self._find_target(held, noisy, t, sizes, feature) if self._recipe.words else noise
        weight = (1 / signal.square()).clamp(max=self._recipe.heaviest) * mask
        error = ((eps - target).square().mean(1, keepdim=True) * weight).flatten(1).sum(1)
        return (error / mask.flatten(1).sum(1)).mean()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _find_target(
        self, held: Mapping[str, Tensor], noisy: Tensor, t: Tensor, sizes: Tensor, feature: Tensor | None
    ) -> Tensor:
        """What each row is to predict: the noise, or what the base makes of words."""
        wordy = held["wordy"] > 0
        if not wordy.any():
            return held["noise"]

        def ask(name: str, rows: Tensor) -> Tensor:
            text = held[f"{name}states"][rows], held[f"{name}pooled"][rows]
            seen = None if feature is None else feature[rows]
            return self._unet.predict(noisy[rows], t[rows], text, sizes[rows], seen)

        self._unet.unet.disable_adapters()
        target = held["noise"].clone()
        base, told = ask("", wordy), ask("words_", wordy)
        under, silent = base.clone(), held["silent"][wordy] > 0
        if silent.any():
            under[silent] = ask("heard_", wordy & (held["silent"] > 0))
        self._unet.unet.enable_adapters()
        target[wordy] = base + self._recipe.emphasis * (told - under)
        return target

    def weights(self) -> tuple[dict[str, Any], Factors]:
        """The projection's weights by name, and the factors of both UNets, as `write_adapter` takes them."""
        projection = {name: value.detach().cpu().numpy() for name, value in self.projection.state_dict().items()}
        pairs = copy_factors(adapters_of(self._unet.unet))
        factors = {module: (down.T.numpy(), up.T.numpy()) for module, (down, up) in pairs.items()}
        return projection, {"unet": factors, "unet_raw": factors}
