"""What calibration found out about a base's UNets, in a file: ranges for E4M3, and which layers it would hurt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import DreamMixError, FileFormatError
from dreammix_trt.core.files import read_json, write_json
from dreammix_trt.core.float8 import HEADROOM, scale_for
from dreammix_trt.core.networks import kind_of
from dreammix_trt.core.schedule import TRAINING_STEPS, model_sigmas
from dreammix_trt.core.store import Store

SCHEMA: Final = 1
FILE_NAME: Final = "calibration.json"
#: the sum of the errors of all layers in E4M3 may be this much (errors of layers add up: measured within 0.2 dB)
BUDGET: Final = 5e-5
#: share of the layers that may stay float16 for this: with more of them E4M3 would gain little
MOST_HURT: Final = 0.25
#: layers that are never quantised, whatever their error: they meet the latent itself, or take next to no time
_ALWAYS_KEPT: Final = (
    "conv_in",
    "conv_out",
    "time_embedding",
    "add_embedding",
    "time_emb_proj",
    "attn2.to_k",
    "attn2.to_v",
)


@dataclass(frozen=True)
class Layer:
    """One linear or convolution.

    input, weight: the largest magnitudes of its input and of its weight.
    error: what the picture gets to see when this layer alone computes in E4M3: the mean square of the difference in the
        UNet's output, as a share of the output's, times the weight of the step (`weight_of_step`); None: not measured.
    """

    input: float
    weight: float
    error: float | None = None

    @property
    def scales(self) -> tuple[float, float]:
        """Of its input and of its weight."""
        return scale_for(self.input), scale_for(self.weight, HEADROOM)

    def check(self) -> None:
        """Raise ValueError for a value that is no magnitude."""
        for name, value in vars(self).items():
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}, which no magnitude is")


@dataclass(frozen=True)
class Calibration:
    """The result of calibration, complete or under way.

    base: name of the base.
    sources: UNet -> hash of everything that decides its weights.
    runs: the requests that were run, each as a short text.
    layers: UNet -> layer -> what was found.
    """

    base: str
    sources: Mapping[str, str]
    runs: tuple[str, ...] = ()
    layers: Mapping[str, Mapping[str, Layer]] = field(default_factory=dict)

    def kept(self, network: str) -> tuple[str, ...]:
        """The layers of a UNet that stay float16: those that never compute in E4M3, and those that it hurts most."""
        hurt = self.hurt(network)
        return tuple(name for name in self.layers[network] if is_kept(name) or name in hurt)

    def hurt(self, network: str) -> tuple[str, ...]:
        """The layers that E4M3 hurts most, worst first: as few as leave the others' errors below `BUDGET` together."""
        errors = {name: layer.error or 0.0 for name, layer in self.layers[network].items() if not is_kept(name)}
        worst, rest = sorted(errors, key=errors.__getitem__, reverse=True), sum(errors.values())
        most = int(MOST_HURT * len(errors))
        for number, name in enumerate(worst[:most]):
            if rest <= BUDGET:
                return tuple(worst[:number])
            rest -= errors[name]
        return tuple(worst[:most])

    def unmeasured(self, network: str) -> tuple[str, ...]:
        """The layers of a UNet that may compute in E4M3, and of which nobody knows yet what that does."""
        return tuple(name for name, layer in self.layers[network].items() if layer.error is None and not is_kept(name))

    def scales(self, network: str) -> dict[str, tuple[float, float]]:
        """The layers of a UNet that compute in E4M3: name -> scale of the input, scale of the weight."""
        kept = set(self.kept(network))
        return {name: scales for name, scales in self.scales_of_all(network).items() if name not in kept}

    def scales_of_all(self, network: str) -> dict[str, tuple[float, float]]:
        """`scales`, of the layers that stay float16, too."""
        return {name: layer.scales for name, layer in self.layers[network].items()}

    def see(self, run: str, found: Mapping[str, Mapping[str, Layer]]) -> Calibration:
        """This and one more run. The errors of layers whose scales become others are no longer known.

        found: UNet -> layer -> the magnitudes of that run.
        """
        layers = {network: dict(known) for network, known in self.layers.items()}
        for network, seen in found.items():
            known = layers.setdefault(network, {})
            for name, layer in seen.items():
                before = known.get(name, layer)
                now = replace(before, input=max(before.input, layer.input), weight=layer.weight)
                known[name] = now if now.scales == before.scales else replace(now, error=None)
        return replace(self, runs=(*self.runs, run), layers=layers)

    def weigh(self, network: str, errors: Mapping[str, float | None]) -> Calibration:
        """This and the errors of some layers of a UNet."""
        known = {
            name: replace(layer, error=errors.get(name, layer.error)) for name, layer in self.layers[network].items()
        }
        return replace(self, layers={**self.layers, network: known})

    def write(self, path: Path) -> None:
        """Write the file, completely or not at all. Numbers have six digits: further ones differ between machines.

        Raises FileFormatError for numbers that are not finite.
        """
        for network, known in self.layers.items():
            for name, layer in known.items():
                try:
                    layer.check()
                except ValueError as error:
                    raise FileFormatError(f"{path} is not written: of {name} in {network}, {error}") from error
        layers = {
            network: {name: _round(vars(layer)) for name, layer in known.items()}
            for network, known in self.layers.items()
        }
        kept = {network: list(self.kept(network)) for network in self.layers}
        facts = {"schema": SCHEMA, "base": self.base, "sources": dict(self.sources), "runs": list(self.runs)}
        write_json(path, {**facts, "kept_in_float16": kept, "layers": layers})

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read a file. Raises `FileFormatError` that says what is wrong with it."""
        try:
            record = read_json(path)
        except DreamMixError as error:
            raise FileFormatError(f"{error}; make it again with `dreammix-trt calibrate`") from error
        if record.get("schema") != SCHEMA:
            raise FileFormatError(
                f"{path}: no calibration of schema {SCHEMA}, but {record.get('schema')!r}; make it again with "
                "`dreammix-trt calibrate`"
            )
        try:
            layers = {
                str(network): {str(name): _read_layer(layer) for name, layer in known.items()}
                for network, known in record["layers"].items()
            }
            sources = {str(network): str(source) for network, source in record["sources"].items()}
            return cls(str(record["base"]), sources, tuple(map(str, record["runs"])), layers)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(
                f"{path} is damaged ({error!r}); make it again with `dreammix-trt calibrate`"
            ) from error


def weight_of_step(timestep: float) -> float:
    """How much an error of the UNet's output counts in this training step, 0 to 1.

    The predicted picture is off by the noise level times the error, so late errors hardly reach it. Early ones are lost
    in the noise that is still there when the next step looks again. With a share a of the picture in what the UNet
    sees, 1 - a of noise, this is 4 a (1 - a): most where both are equal.
    """
    variance = float(model_sigmas()[min(round(timestep), TRAINING_STEPS - 1)]) ** 2
    return 4 * variance / (1 + variance) ** 2


def key_of_unet(base: BaseFiles, name: str) -> str:
    """Names all of a base that decides a UNet's weights. LoRAs that a build adds to them change the ranges little."""
    facts: dict[str, Any] = {"files": base.hash_contents(kind_of(name).component)}
    return Store.key({**facts, "patch_biases": base.patch_biases} if base.patch else facts)


def is_kept(layer: str) -> bool:
    """Whether a layer is never quantised."""
    return any(part in layer for part in _ALWAYS_KEPT)


def _round(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: value if value is None else float(f"{value:.6g}") for name, value in values.items()}


def _read_layer(record: Mapping[str, Any]) -> Layer:
    error = record["error"]
    layer = Layer(float(record["input"]), float(record["weight"]), None if error is None else float(error))
    layer.check()
    return layer
