"""What each part of a base is made of: everything that changes it, and nothing else.

A part's key is made of these facts, so a fact that is missing here is a stale part in somebody's store, and one too
many is hours of building for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dreammix_trt.building.engine_options import EngineOptions
from dreammix_trt.building.part_store import part_key
from dreammix_trt.core.axes import FACTOR
from dreammix_trt.core.calibration import Calibration
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.files import sha256_of
from dreammix_trt.core.lengths import order_length
from dreammix_trt.core.network_weights import BaseLora
from dreammix_trt.core.networks import BESIDE, KINDS, Network, Precision, describe_networks, is_twin, kind_of
from dreammix_trt.core.store import Store
from dreammix_trt.engine.backends.tensorrt.profiles import Profile, profiles_for
from dreammix_trt.engine.canvas.geometry import profile_sizes
from dreammix_trt.engine.canvas.tiles import SIDE, needs_tiles
from dreammix_trt.export.onnx_export import SCHEMA, describe_prior_side, graph_digest


@dataclass(frozen=True)
class Ingredients:
    """Of one base.

    loras: merged into the weights, each with its file's hash.
    defaults: of requests.
    calibration: of the UNets, where they compute in E4M3.
    """

    base: BaseFiles
    slots: bool
    engine: EngineOptions
    loras: Sequence[tuple[BaseLora, str]]
    defaults: Mapping[str, Any]
    calibration: Calibration | None = None

    @property
    def base_key(self) -> str:
        """Which weights and slots these are, whatever the back end and precision."""
        sources = {kind.component: self.sources_of(kind.name) for kind in KINDS if kind.group not in BESIDE}
        return Store.key({"sources": sources, "slots": self.slots})

    @property
    def merged(self) -> list[BaseLora]:
        """The LoRAs without their hashes."""
        return [lora for lora, _ in self.loras]

    @cached_property
    def networks(self) -> tuple[Network, ...]:
        """Those that an engine of this base has."""
        precision: Precision = "float16" if self.engine.half else "float32"
        networks = describe_networks(self.base, self.slots, precision, self.engine.fused)
        kept = (network for network in networks if self.engine.safe_vae or not is_twin(network.name))
        return tuple(self._specialise(network) if network.kind.call == "step" else network for network in kept)

    def _specialise(self, unet: Network) -> Network:
        """A UNet in the precision that is asked for UNets alone."""
        if self.engine.unet_precision == "bfloat16":
            return unet.with_bfloat16()
        return unet.with_float8(self.calibration.scales(unet.name)) if self.calibration else unet

    def sources_of(self, name: str) -> dict[str, Any]:
        """Everything that decides the weights of a network: for half a VAE, all of the VAE."""
        component = kind_of(name).component
        touching = [[digest, lora.scale, lora.target] for lora, digest in self.loras if lora.touches(name)]
        biases = {"patch_biases": self.base.patch_biases} if component == "unet" and self.base.patch else {}
        return {"files": self.base.hash_contents(component), "loras": touching, **biases}

    def of_base(self) -> dict[str, Any]:
        """Of the part "base"."""
        return {
            "revision": 2,  # of what base.json says: 2 has the UNet's blocks
            "native_side": self.base.native_side,
            "configs": self.base.configs,
            "slots": self.slots,
            "tokenizer": self.base.hash_contents("tokenizer"),
            "defaults": dict(self.defaults),
            "head": self.base.head_padding if self.base.has_head else None,
            "patched": self.base.patch is not None,
            "patch_biases": self.base.patch_biases,
            **describe_prior_side(self.base),
        }

    def of_range(self, network: Network) -> dict[str, Any]:
        """Of the units of a float16 VAE that stay float32."""
        from dreammix_trt.export.vae_range import REVISION

        return {
            "revision": REVISION,
            "sources": self.sources_of(network.name),
            "config": self.base.configs["vae"],
            "images": [sha256_of(image) for image in self.engine.vae_images],
            **({"latents": self.sources_of("vae_encoder")} if network.kind.group == "asuka" else {}),
        }

    def of_onnx(self, network: Network) -> dict[str, Any]:
        """Of a network's graph and weights."""
        facts = {"layout": SCHEMA, "graph": graph_digest(network.plain), "sources": self.sources_of(network.name)}
        if not network.float8:
            return facts
        from dreammix_trt.export.quantize import REVISION

        return {**facts, "float8": {"revision": REVISION, "scales": dict(network.float8)}}

    def of_plan(self, network: Network) -> dict[str, Any]:
        """Of a network's TensorRT plan."""
        from dreammix_trt.engine.backends.tensorrt.builder import REVISION

        return {
            "revision": REVISION,
            "onnx": part_key(network.name, "onnx", self.of_onnx(network)),
            "backend": self.engine.backend,
            "version": self.engine.version,
            "targets": sorted(self.engine.gpus),
            "workspace": self.engine.workspace,
            "profiles": [profile.to_dict() for profile in self.profiles_of(network.name, network.describe()["inputs"])],
            **self._machine(),
        }

    def profiles_of(self, name: str, inputs: Sequence[Mapping[str, Any]]) -> tuple[Profile, ...]:
        """The profiles of a network with these inputs; of tiles, where frames are so large that the VAE gets tiles."""
        side, divisor, shapes = self.base.native_side, self.base.divisor, self.engine.shapes

        def fit(shapes: str, side: int) -> tuple[Profile, ...]:
            return profiles_for(
                inputs,
                pictures=self.engine.pictures,
                shapes=shapes,
                latent_side=side // FACTOR,
                step=divisor // FACTOR,
                contexts=sorted(set(self.engine.context), key=order_length),
                call=kind_of(name).call,
            )

        frames = [(side, side)] if shapes == "static" else profile_sizes(side, divisor)
        if kind_of(name).call != "vae" or not any(needs_tiles(*frame) for frame in frames):
            return fit(shapes, side)
        tile = fit("static", FACTOR * SIDE)
        return tile if shapes == "static" else (*fit(shapes, side), *tile)

    def _machine(self) -> dict[str, Any]:
        """What else decides a plan that is built for the GPU at hand."""
        if self.engine.backend == "tensorrt-rtx" and "current" not in self.engine.targets:
            return {}
        from dreammix_trt.engine.hardware import ask_driver

        return {"gpus": [[gpu.name, gpu.capability] for gpu in ask_driver().gpus[:1]]}
