"""The list of networks: names, tensors with their symbolic shapes, LoRA slots, weights (docs/architecture.md).

Describing a network and reading its weights needs no torch; `torch_module` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import FileFormatError, MissingExtraError
from dreammix_trt.core.keymap import sgm_to_diffusers
from dreammix_trt.core.lora import Lora, Target, check_weights, weight_changes
from dreammix_trt.core.subject import LORA_SIDES, Slot, packed_size
from dreammix_trt.core.tensors import Weights

Precision = Literal["float32", "float16"]
TEXT_LENGTH = 77
#: what the name of a float32 twin of a float16 network ends in
SAFE = "_float32"
VAES = ("vae_encoder", "vae_decoder")
_ALWAYS_FLOAT32 = ("timestep", "time_ids")
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
    packed order; configs: the component configs its graph is made of; precision: of its arithmetic; fused: attention
    and group norm as single operators and an input for each LoRA factor (what TensorRT wants) instead of written out
    and one packed input (what ONNX Runtime does best); wide: units of a float16 VAE that stay float32.
    """

    name: str
    graph: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    slots: tuple[Slot, ...]
    configs: Mapping[str, Mapping[str, Any]]
    precision: Precision = "float32"
    fused: bool = False
    wide: tuple[str, ...] = ()

    def described(self) -> dict[str, Any]:
        """The network's part of `networks.json` that its graph decides."""
        slots = [{"module": s.module, "in": s.inputs, "out": s.outputs, "rank": s.rank} for s in self.slots]
        return {
            "precision": self.precision,
            "fused": self.fused,
            "wide": list(self.wide),
            "inputs": [{**asdict(spec), "shape": list(spec.shape)} for spec in self.inputs],
            "outputs": [{**asdict(spec), "shape": list(spec.shape)} for spec in self.outputs],
            "slots": slots,
        }

    def example(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, NDArray[Any]]:
        """Random inputs for given dynamic axes, e.g. {"pictures": 1, "rows": 2, "h": 16, "w": 24}; LoRA not zero."""
        rng = np.random.default_rng(seed)
        return {spec.name: self._example_of(rng, spec, sizes).astype(spec.dtype) for spec in self.inputs}

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
        elif spec.name == "lora" or spec.name.endswith(LORA_SIDES):
            values = 0.03 * values  # several times a trained LoRA; more, and rounding errors grow a hundredfold
        elif spec.name == "mask":
            values = values > 0
        elif spec.name == "image":
            values = np.tanh(values)
        return values.astype(np.float32)


def networks_of(
    base: BaseFiles, slot_rank: int = SLOT_RANK, precision: Precision = "float32", fused: bool = False
) -> tuple[Network, ...]:
    """Every network of a base, in float32 or float16.

    In float16 the VAE comes a second time as `vae_encoder_float32` and `vae_decoder_float32`: what the runtime takes
    when a picture was too much for float16. Their graphs are those of a float32 base, attention written out.
    slot_rank 0: without LoRA slots. Without a patch there is no `unet_raw`, without a head (a patch's, or a 9-channel
    UNet's own) no `inpaint_head`.
    """
    plain = _networks(base, slot_rank)
    found = [_in_precision(network, precision, fused) for network in plain]
    if precision == "float16":
        found += [replace(network, name=network.name + SAFE) for network in plain if network.name in VAES]
    return tuple(found)


def _in_precision(network: Network, precision: Precision, fused: bool) -> Network:
    """Tensors in the network's precision, but for times and sizes: float16 cannot count to 1000 in thirds. A fused
    network takes its LoRA factors one by one."""
    if fused and network.slots:
        kept = tuple(spec for spec in network.inputs if spec.name != "lora")
        network = replace(network, inputs=(*kept, *_factor_inputs(network.slots)))
    inputs, outputs = (
        tuple(
            replace(spec, dtype=precision) if spec.dtype == "float32" and spec.name not in _ALWAYS_FLOAT32 else spec
            for spec in specs
        )
        for specs in (network.inputs, network.outputs)
    )
    return replace(network, inputs=inputs, outputs=outputs, precision=precision, fused=fused)


def _factor_inputs(slots: Sequence[Slot]) -> Iterator[TensorSpec]:
    """A and B of every slot as inputs of their own, in packed order: a packed row is what lies behind them."""
    for slot in slots:
        for name, shape in slot.factors:
            yield TensorSpec(name, "float32", ("pictures", *shape))


def _networks(base: BaseFiles, slot_rank: int) -> tuple[Network, ...]:
    config, channels = base.configs["unet"], base.feature_channels
    latent = base.latent_channels
    text_width, pooled = config["cross_attention_dim"], int(base.configs["text_encoder_2"]["projection_dim"])
    slots = tuple(_unet_slots(config, slot_rank)) if slot_rank else ()
    lora = (TensorSpec("lora", "float32", ("pictures", packed_size(slots))),) if slots else ()
    unet_inputs = (
        TensorSpec("sample", "float32", ("rows", latent, "h", "w")),
        TensorSpec("timestep", "float32", ("rows",)),
        TensorSpec("encoder_hidden_states", "float32", ("rows", TEXT_LENGTH, text_width)),
        TensorSpec("text_embeds", "float32", ("rows", pooled)),
        TensorSpec("time_ids", "float32", ("rows", 6)),
        TensorSpec("inpaint_feature", "float32", ("pictures", channels, "h", "w")),
        *lora,
    )
    unet_outputs = (TensorSpec("eps", "float32", ("rows", latent, "h", "w")),)
    latents = ("pictures", latent, "h", "w")
    image = TensorSpec("image", "float32", ("pictures", 3, "H", "W"))
    unets = ("unet", "unet_raw") if base.patch else ("unet",)
    networks = [_text_network(base, name, slot_rank) for name in ("text_encoder", "text_encoder_2")]
    networks += [Network(name, "unet", unet_inputs, unet_outputs, slots, {"unet": config}) for name in unets]
    if base.has_head:
        head_inputs = (
            TensorSpec("mask", "float32", ("pictures", 1, "h", "w")),
            TensorSpec("masked_latent", "float32", latents),
        )
        feature = (TensorSpec("feature", "float32", ("pictures", channels, "h", "w")),)
        sizes = {
            "inpaint_head": {"channels": channels, "latent_channels": latent, "padding": base.head_padding},
        }
        networks.append(Network("inpaint_head", "inpaint_head", head_inputs, feature, (), sizes))
    vae = {"vae": base.configs["vae"]}
    moments = (TensorSpec("mean", "float32", latents), TensorSpec("std", "float32", latents))
    networks.append(Network("vae_encoder", "vae_encoder", (image,), moments, (), vae))
    networks.append(
        Network("vae_decoder", "vae_decoder", (TensorSpec("latent", "float32", latents),), (image,), (), vae)
    )
    return tuple(networks)


@dataclass(frozen=True)
class BaseLora:
    """A LoRA that is part of a base's weights: W + scale * (A B)^T. target: "patched", "raw" or "both" UNets; the text
    encoders always get their part."""

    lora: Lora
    scale: float = 1.0
    target: Target = "both"

    def touches(self, network: str) -> bool:
        """Whether the LoRA changes a network's weights."""
        if network in ("unet", "unet_raw"):
            chosen = {"patched": ("unet",), "raw": ("unet_raw",), "both": ("unet", "unet_raw")}[self.target]
            return network in chosen and bool(self.lora.factors.get("unet"))
        return bool(self.lora.factors.get(network))


def weights_of(base: BaseFiles, network: str, loras: Sequence[BaseLora] = ()) -> Weights:
    """The weights of a network by torch name, float32, read one at a time when asked for: base, patch and LoRAs are
    added in float32. `FileFormatError` when a LoRA names modules that the base lacks or has in another shape."""
    weights = _own_weights(base, network)
    for each in loras:
        if each.touches(network):
            check_weights(each.lora, network, {name: weights.shape(name) for name in weights})
            weights = weights.changed(weight_changes(each.lora, network, each.scale))
    return weights


def _own_weights(base: BaseFiles, network: str) -> Weights:
    if network == "unet":
        return base.unet_patched_state()
    if network == "unet_raw":
        return base.state("unet")
    if network == "inpaint_head":
        return Weights.of({"head.weight": base.head()})
    if network.startswith("vae_"):
        halves = {"vae_encoder": ("encoder.", "quant_conv."), "vae_decoder": ("decoder.", "post_quant_conv.")}
        parts = halves[network.removesuffix(SAFE)]
        return base.state("vae").renamed(lambda name: name if name.startswith(parts) else None)
    return base.state(network)


def torch_module(network: Network, weights: Weights | None = None) -> Any:
    """The network as a torch module in eval mode, float32; its `.network` holds the parameters by torch name.

    weights None: a hollow module for tracing. Every parameter has its full shape and one number of storage, so a
    2.6-billion-parameter UNet takes no memory, and no two parameters are equal, so the exporter cannot merge them.
    Raises `MissingExtraError` without torch and diffusers, `FileFormatError` when the weights do not fit the config.
    """
    try:
        import torch

        from dreammix_trt.export import modules
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed, exporting needs it: pip install dreammix-trt[export]"
        ) from error
    configs: dict[str, Any] = {name: dict(config) for name, config in network.configs.items()}
    makers: dict[str, Callable[[], Any]] = {
        "unet": lambda: modules.UNet(configs["unet"], network.slots),
        "text_encoder": lambda: modules.TextEncoder(configs["text_encoder"], network.slots, pooled=False),
        "text_encoder_2": lambda: modules.TextEncoder(configs["text_encoder_2"], network.slots, pooled=True),
        "inpaint_head": lambda: modules.InpaintHead(**configs["inpaint_head"]),
        "vae_encoder": lambda: modules.VaeEncoder(configs["vae"], network.wide),
        "vae_decoder": lambda: modules.VaeDecoder(configs["vae"], network.wide),
    }
    with torch.device("meta"):
        module = makers[network.graph]().eval().requires_grad_(False)
    if weights is not None:
        shapes = {name: tuple(value.shape) for name, value in module.network.state_dict().items()}
        check_fit(network.name, {name: weights.shape(name) for name in weights}, shapes)
    for number, (name, place, part, parameter) in enumerate(_parameters(module.network)):
        if weights is None:
            one = torch.full((1,) * parameter.ndim, 0.02 + 1e-6 * number)
            value = one.expand(parameter.shape)
        else:
            value = torch.from_numpy(np.array(weights[name]))
        setattr(place, part, torch.nn.Parameter(value, requires_grad=False))
    return module


def _parameters(root: Any) -> Iterator[tuple[str, Any, str, Any]]:
    """(full name, module, its attribute, parameter) of every parameter."""
    for name, parameter in list(root.named_parameters()):
        place, _, part = name.rpartition(".")
        yield name, root.get_submodule(place), part, parameter


def check_fit(network: str, given: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """`FileFormatError` naming the tensors that are missing, left over or of another shape."""
    wrong = [f"{name} is missing" for name in shapes if name not in given]
    wrong += [f"{name} is not in the network" for name in given if name not in shapes]
    wrong += [
        f"{name} is {given[name]}, expected {shape}"
        for name, shape in shapes.items()
        if name in given and tuple(given[name]) != tuple(shape)
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
        if rank
    )
    ids = TensorSpec("input_ids", "int64", ("rows", TEXT_LENGTH))
    lora = (TensorSpec("lora", "float32", ("pictures", packed_size(slots))),) if slots else ()
    inputs = (ids, *lora)
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
