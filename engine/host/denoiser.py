"""The one seam between the loop and what predicts noise: latents, step, conditioning -> noise prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.networks import kv_name
from dreammix_trt.core.schedule import Step, time_ids
from dreammix_trt.core.seam import Networks
from dreammix_trt.engine.host.weights import WeightsOf

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Conditioning:
    """What a stage feeds the UNet. R rows are [neg0, pos0, neg1, pos1, ...], or positive ones only; N pictures.

    text: (R, L, D), L rows of the condition.
    pooled: (R, Dp).
    sizes: (height, width) in pixels given as the original size, one pair for each picture.
    target: side in pixels given as the target size.
    feature: (N, C, h, w), of the inpaint head.
    weights: network -> the weights of its slots that are not the base's own, by input.
    negative: of the negative rows where they are of another length than the positive ones, which are then alone here.
    is_negative: whether the rows are negative ones alone.
    """

    text: F32
    pooled: F32
    sizes: tuple[tuple[int, int], ...]
    target: int
    feature: F32
    weights: WeightsOf = lambda network: {}
    negative: Conditioning | None = None
    is_negative: bool = False

    @property
    def rows_per_picture(self) -> int:
        """2 with a negative row, else 1."""
        return 2 if self.negative else len(self.text) // len(self.sizes)

    def time_ids(self, step: Step) -> F32:
        """float32 (R, 6), see `core.schedule.time_ids`."""
        count = len(self.text) // len(self.sizes)
        rows = slice(0, 1) if self.is_negative else slice(-count, None)
        return np.concatenate([time_ids(step, size, self.target)[rows] for size in self.sizes])


class Denoiser(Protocol):
    """Predicts the noise in latents."""

    def __call__(self, latents: F32, step: Step, conditioning: Conditioning) -> F32:
        """Predict eps for every row.

        latents: scaled, float32 (R, C, h, w).

        Returns float32 (R, C, h, w).
        """
        ...


class EngineDenoiser:
    """The engine's two UNets. The raw one gets no inpaint feature. A base without it runs every step patched."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._attended: dict[tuple[str, bool], tuple[Conditioning, Mapping[str, F32]]] = {}
        self._nothing: dict[tuple[int, ...], F32] = {}

    def __call__(self, latents: F32, step: Step, conditioning: Conditioning) -> F32:
        if conditioning.negative is None:
            return self._predict(latents, step, conditioning)
        eps = np.empty_like(latents)
        for first, part in enumerate((conditioning.negative, conditioning)):
            eps[first::2] = self._predict(np.ascontiguousarray(latents[first::2]), step, part)
        return eps

    def _predict(self, latents: F32, step: Step, conditioning: Conditioning) -> F32:
        name = step.network if step.network in self._networks else "unet"
        patched = name == "unet"
        output = self._networks.run(
            name,
            sample=latents,
            timestep=np.full(len(latents), step.timestep, np.float32),
            text_embeds=conditioning.pooled,
            time_ids=conditioning.time_ids(step),
            inpaint_feature=conditioning.feature if patched else self._zeros(conditioning.feature.shape),
            **self._attend(name, conditioning),
            **conditioning.weights(name),
        )
        return output["eps"]

    def _attend(self, unet: str, conditioning: Conditioning) -> Mapping[str, F32]:
        """The text's keys and values for a UNet, made at its first step of a stage."""
        key = (unet, conditioning.is_negative)
        known = self._attended.get(key)
        if known is None or known[0] is not conditioning:
            name = kv_name(unet)
            text, weights = conditioning.text, conditioning.weights(name)
            known = conditioning, self._networks.run(name, encoder_hidden_states=text, **weights)
            self._attended[key] = known
        return known[1]

    def _zeros(self, shape: tuple[int, ...]) -> F32:
        if shape not in self._nothing:
            self._nothing = {shape: np.zeros(shape, np.float32)}
        return self._nothing[shape]


@dataclass
class FakeDenoiser:
    """The exact denoiser of pictures whose latents are independent normals: for tests, and for apps without a model.

    mean: of positive rows; negative ones have mean 0.
    spread: deviation of both.
    steps: the rows of the schedule that it was called with.

    For x = x0 + sigma n that gives eps = sigma (x - mean) / (sigma^2 + spread^2).
    """

    mean: float = 0.5
    spread: float = 0.5
    steps: list[Step] = field(default_factory=list)

    def __call__(self, latents: F32, step: Step, conditioning: Conditioning) -> F32:
        self.steps.append(step)
        means = np.array([0.0, self.mean][-conditioning.rows_per_picture :], np.float64)
        mean = np.tile(means, len(conditioning.sizes)).reshape(-1, 1, 1, 1)
        x = latents.astype(np.float64) * np.sqrt(step.sigma**2 + 1)
        eps: F32 = (step.sigma * (x - mean) / (step.sigma**2 + self.spread**2)).astype(np.float32)
        return eps
