"""The list of networks: names, tensors with their symbolic shapes, LoRA slots, weights (docs/architecture.md).

Describing a network and reading its weights needs no torch; `torch_module` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.checkpoint import BaseFiles, State
from dreammix_trt.core.errors import FileFormatError, MissingExtraError
from dreammix_trt.core.keymap import sgm_to_diffusers
from dreammix_trt.core.subject import Slot, packed_size

TEXT_LENGTH = 77
SLOT_RANK = 8
_ATTENTION_LINEARS = (".to_q", ".to_k", ".to_v", ".to_out.0")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: its dtype and shape; strings in the shape are dynamic axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Network:
    """One network of a base.

    graph: name of its graph (`unet_raw` shares `unet`'s); inputs, outputs in call order; slots: its LoRA slots in
    packed order; configs: the component configs its graph is made of.
    """

    name: str
    graph: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    slots: tuple[Slot, ...]
    configs: Mapping[str, Mapping[str, Any]]

    def described(self) -> dict[str, Any]:
        """The network's part of `networks.json` that its graph decides."""
        slots = [{"module": s.module, "in": s.inputs, "out": s.outputs, "rank": s.rank} for s in self.slots]
        return {
            "inputs": [{**asdict(spec), "shape": list(spec.shape)} for spec in self.inputs],
            "outputs": [{**asdict(spec), "shape": list(spec.shape)} for spec in self.outputs],
            "slots": slots,
        }

    def example(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, NDArray[Any]]:
        """Random inputs for given dynamic axes, e.g. {"pictures": 1, "rows": 2, "h": 16, "w": 24}; LoRA not zero."""
        rng = np.random.default_rng(seed)
        return {spec.name: self._example_of(rng, spec, sizes) for spec in self.inputs}

    def _example_of(self, rng: np.random.Generator, spec: TensorSpec, sizes: Mapping[str, int]) -> NDArray[Any]:
        shape = tuple(sizes[side] if isinstance(side, str) else side for side in spec.shape)
        if spec.dtype == "int64":
            config = next(iter(self.configs.values()))
            ids = rng.integers(1, config["vocab_size"] - 2, shape)
            ids[:, 9:] = config["vocab_size"] - 1
            return ids
        if spec.name == "timestep":
            return rng.uniform(0, 999, shape).astype(np.float32)
        values: NDArray[Any] = rng.standard_normal(shape)
        if spec.name == "time_ids":
            values = 128 * np.abs(values)
        elif spec.name == "lora":
            values = 0.1 * values
        elif spec.name == "mask":
            values = values > 0
        elif spec.name == "image":
            values = np.tanh(values)
        return values.astype(np.float32)


def networks_of(base: BaseFiles, slot_rank: int = SLOT_RANK) -> tuple[Network, ...]:
    """Every network of a base. Without a patch there is neither `unet_raw` nor `inpaint_head`."""
    config, channels = base.configs["unet"], base.feature_channels
    latent = base.latent_channels
    text_width, pooled = config["cross_attention_dim"], int(base.configs["text_encoder_2"]["projection_dim"])
    slots = tuple(_unet_slots(config, slot_rank))
    lora = TensorSpec("lora", "float32", ("pictures", packed_size(slots)))
    unet_inputs = (
        TensorSpec("sample", "float32", ("rows", latent, "h", "w")),
        TensorSpec("timestep", "float32", ("rows",)),
        TensorSpec("encoder_hidden_states", "float32", ("rows", TEXT_LENGTH, text_width)),
        TensorSpec("text_embeds", "float32", ("rows", pooled)),
        TensorSpec("time_ids", "float32", ("rows", 6)),
        TensorSpec("inpaint_feature", "float32", ("pictures", channels, "h", "w")),
        lora,
    )
    unet_outputs = (TensorSpec("eps", "float32", ("rows", latent, "h", "w")),)
    latents = ("pictures", latent, "h", "w")
    image = TensorSpec("image", "float32", ("pictures", 3, "H", "W"))
    unets = ("unet", "unet_raw") if base.patch else ("unet",)
    networks = [_text_network(base, name, slot_rank) for name in ("text_encoder", "text_encoder_2")]
    networks += [Network(name, "unet", unet_inputs, unet_outputs, slots, {"unet": config}) for name in unets]
    if base.patch:
        head_inputs = (
            TensorSpec("mask", "float32", ("pictures", 1, "h", "w")),
            TensorSpec("masked_latent", "float32", latents),
        )
        feature = (TensorSpec("feature", "float32", ("pictures", channels, "h", "w")),)
        sizes = {"inpaint_head": {"channels": channels, "latent_channels": latent}}
        networks.append(Network("inpaint_head", "inpaint_head", head_inputs, feature, (), sizes))
    vae = {"vae": base.configs["vae"]}
    moments = (TensorSpec("mean", "float32", latents), TensorSpec("std", "float32", latents))
    networks.append(Network("vae_encoder", "vae_encoder", (image,), moments, (), vae))
    networks.append(
        Network("vae_decoder", "vae_decoder", (TensorSpec("latent", "float32", latents),), (image,), (), vae)
    )
    return tuple(networks)


def weights_of(base: BaseFiles, network: str) -> State:
    """The weights of a network, float32, by torch name."""
    if network == "unet":
        return base.unet_patched_state()
    if network == "unet_raw":
        return base.state("unet")
    if network == "inpaint_head":
        return {"head.weight": base.head()}
    if network.startswith("vae_"):
        parts = {"vae_encoder": ("encoder.", "quant_conv."), "vae_decoder": ("decoder.", "post_quant_conv.")}[network]
        return {name: value for name, value in base.state("vae").items() if name.startswith(parts)}
    return base.state(network)


def torch_module(network: Network, weights: State | None = None) -> Any:
    """The network as a torch module in eval mode, float32; its `.network` holds the parameters by torch name.

    weights None: random values, all tensors different, as tracing a graph wants. Raises `MissingExtraError` without
    torch and diffusers, `FileFormatError` when the weights do not fit the config.
    """
    try:
        import torch

        from dreammix_trt.export import modules
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed, exporting needs it: pip install dreammix-trt[export]"
        ) from error
    configs = {name: dict(config) for name, config in network.configs.items()}
    makers: dict[str, Callable[[], Any]] = {
        "unet": lambda: modules.UNet(configs["unet"], network.slots),
        "text_encoder": lambda: modules.TextEncoder(configs["text_encoder"], network.slots, pooled=False),
        "text_encoder_2": lambda: modules.TextEncoder(configs["text_encoder_2"], network.slots, pooled=True),
        "inpaint_head": lambda: modules.InpaintHead(**cast(dict[str, int], configs["inpaint_head"])),
        "vae_encoder": lambda: modules.VaeEncoder(configs["vae"]),
        "vae_decoder": lambda: modules.VaeDecoder(configs["vae"]),
    }
    module = makers[network.graph]().eval().requires_grad_(False)
    if weights is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in module.parameters():
                parameter.uniform_(-0.05, 0.05)
        return module
    check_fit(network.name, weights, {name: tuple(value.shape) for name, value in module.network.state_dict().items()})
    module.network.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return module


def check_fit(network: str, weights: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """`FileFormatError` naming the tensors that are missing, left over or of another shape."""
    wrong = [f"{name} is missing" for name in shapes if name not in weights]
    wrong += [f"{name} is not in the network" for name in weights if name not in shapes]
    wrong += [
        f"{name} is {weights[name].shape}, expected {shape}"
        for name, shape in shapes.items()
        if name in weights and tuple(weights[name].shape) != tuple(shape)
    ]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise FileFormatError(
            f"{network}: weights and config.json do not belong together: {', '.join(wrong[:6])}{more}"
        )


def _text_network(base: BaseFiles, name: str, rank: int) -> Network:
    config = base.configs[name]
    width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    slots = tuple(
        Slot(f"text_model.encoder.layers.{layer}.self_attn.{part}_proj", width, width, rank)
        for layer in range(layers)
        for part in ("q", "k", "v", "out")
    )
    inputs = (
        TensorSpec("input_ids", "int64", ("rows", TEXT_LENGTH)),
        TensorSpec("lora", "float32", ("pictures", packed_size(slots))),
    )
    outputs = [TensorSpec("hidden", "float32", ("rows", TEXT_LENGTH, width))]
    if name == "text_encoder_2":
        outputs.append(TensorSpec("pooled", "float32", ("rows", int(config["projection_dim"]))))
    return Network(name, name, inputs, tuple(outputs), slots, {name: config})


def _unet_slots(config: Mapping[str, Any], rank: int) -> Iterator[Slot]:
    """The attention projections in the order of the sgm names: down, middle, up."""
    channels, context = list(config["block_out_channels"]), int(config["cross_attention_dim"])
    for name in sgm_to_diffusers(config).values():
        module = name.removesuffix(".weight")
        if not module.endswith(_ATTENTION_LINEARS):
            continue
        place = module.split(".")
        by_block = {"down_blocks": channels, "up_blocks": channels[::-1]}.get(place[0])
        width = by_block[int(place[1])] if by_block else channels[-1]
        from_text = place[-2] == "attn2" and place[-1] in ("to_k", "to_v")
        yield Slot(module, context if from_text else width, width, rank)
