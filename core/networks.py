"""The one list of networks: the networks of a base in the order in which a request runs them.

An entry (`NetworkKind`) has everything that differs between networks; all other code asks the list. A new network takes
one entry here, one torch module, and a phase of the painters that uses it (docs/architecture.md, "A new network").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Final, Literal

from numpy.typing import NDArray

from dreammix_trt.core import asuka, token_networks
from dreammix_trt.core.asuka_folder import Part
from dreammix_trt.core.attention_layers import (
    FROM_TEXT,
    describe_keys_and_values,
    describe_weights,
    list_attention_linears,
    reads_text,
)
from dreammix_trt.core.axes import FLOAT8, Tensor
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.examples import draw_inputs
from dreammix_trt.core.slots import Slot, names_of_weights
from dreammix_trt.core.tensors import Weights

Precision = Literal["float32", "float16", "bfloat16"]
Fused = bool | Literal["attention"]
Group = Literal["text", "picture", "unet", "unet_raw", "asuka", "tokens"]
Call = Literal["prompt", "frame", "vae", "stage", "step", "subject"]
#: stand beside a base and have no part in its key
BESIDE: Final[tuple[Group, ...]] = ("asuka", "tokens")

_TWIN: Final = "_float32"


# -- one network of one base ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """The description of one network of one base.

    name: of the network, or of its twin.
    graph: the name of its graph (`unet_raw` shares `unet`'s).
    module: its torch module, "package.module:Class"; export makes it with `Class.of(network)`.
    inputs, outputs: in call order.
    slots: its LoRA slots; their weights are its last inputs.
    configs: the component configs that its graph is made from.
    precision: of its arithmetic. Inputs and outputs of a bfloat16 network are float16: numpy has no bfloat16.
    fused: whether attention and group norm are single operators, as TensorRT wants; "attention": that one alone, for
        which ONNX Runtime has a kernel on GPUs. Otherwise they are written out.
    wide: the units of a float16 VAE that stay float32.
    float8: linear or convolution -> the scales of its input and of its weight, powers of two; these compute in E4M3.
    """

    name: str
    graph: str
    module: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    slots: tuple[Slot, ...]
    configs: Mapping[str, Mapping[str, Any]]
    precision: Precision = "float32"
    fused: Fused = False
    wide: tuple[str, ...] = ()
    float8: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def kind(self) -> NetworkKind:
        """Its entry in the list."""
        return kind_of(self.name)

    def describe(self) -> dict[str, Any]:
        """The part of `network.json` that depends on the graph."""
        quantized = {"float8": {name: list(scales) for name, scales in self.float8.items()}} if self.float8 else {}
        return {
            **quantized,
            "precision": self.precision,
            "fused": self.fused,
            "wide": list(self.wide),
            "inputs": [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in self.inputs],
            "outputs": [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in self.outputs],
            "slots": [slot.describe() for slot in self.slots],
        }

    def at(self, precision: Precision, fused: Fused) -> Network:
        """The same network in another precision and form."""
        inputs, outputs = (
            tuple(
                replace(tensor, dtype=precision) if tensor.dtype == "float32" and not tensor.stays_float32 else tensor
                for tensor in tensors
            )
            for tensors in (self.inputs, self.outputs)
        )
        return replace(self, inputs=inputs, outputs=outputs, precision=precision, fused=fused)

    def shapes_of_weights(self) -> dict[str, tuple[int, ...]]:
        """The inputs that hold the slots' weights: name -> shape."""
        shapes = {tensor.name: tensor.shape for tensor in self.inputs}
        return {name: tuple(int(side) for side in shapes[name]) for name in names_of_weights(self.slots)}

    def without_slots(self) -> Network:
        """The same network with the base's weights in it."""
        weights = names_of_weights(self.slots)
        return replace(self, inputs=tuple(each for each in self.inputs if each.name not in weights), slots=())

    def with_bfloat16(self) -> Network:
        """The same float16 network, which computes in bfloat16 between its inputs and outputs."""
        return replace(self, precision="bfloat16")

    def with_float8(self, scales: Mapping[str, tuple[float, float]]) -> Network:
        """The same network, some layers of which compute in E4M3. In the fused form their slots hold codes.

        scales: see `float8`.
        """
        made = replace(self, float8=dict(scales))
        if not self.fused:
            return made
        slots = tuple(slot.as_float8(scales[slot.module][1]) if slot.module in scales else slot for slot in self.slots)
        shapes = {slot.weight: (slot.outputs, slot.inputs) for slot in slots if slot.module in scales}
        inputs = tuple(
            replace(tensor, dtype=FLOAT8, shape=shapes[tensor.name]) if tensor.name in shapes else tensor
            for tensor in self.inputs
        )
        return replace(made, slots=slots, inputs=inputs)

    @property
    def plain(self) -> Network:
        """The same network without layers in E4M3."""
        slots = tuple(
            Slot.of(slot.module, slot.inputs, slot.outputs) if slot.module in self.float8 else slot
            for slot in self.slots
        )
        inputs = tuple(
            replace(tensor, dtype=self.precision, shape=tensor.shape[::-1]) if tensor.dtype == FLOAT8 else tensor
            for tensor in self.inputs
        )
        return replace(self, float8={}, slots=slots, inputs=inputs)

    def draw_example(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, NDArray[Any]]:
        """Draw random inputs; the slots' weights are of the size that layers begin training with.

        sizes: of the named axes, for example {"pictures": 1, "rows": 2, "h": 16, "w": 24}; "context" is 77 by default.

        Returns input name -> array.
        """
        tokens = next(iter(self.configs.values())).get("vocab_size", 0)
        return draw_inputs(self.inputs, names_of_weights(self.slots), tokens, {"context": TOKENS, **sizes}, seed)


# -- the list ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkKind:
    """One entry of the list.

    name: of the network.
    phase: networks of one phase are needed together, so their weights are loaded together.
    call: how it is called: for one "prompt", one "frame", one frame or tile of the "vae", once in a "stage" of a batch,
        once in each of its "step"s, or once for a "subject", outside requests.
    describe: (base, whether it has LoRA slots) -> the network; None when the base does not have it.
    weights: base -> weights by torch name: its own, or those of the component that it is a part of.
    holds: torch name -> whether the weight is its own; None: all are.
    component: the part of a base that decides its weights (`BaseFiles.hash_contents`).
    factors: the part of a LoRA that it takes ("unet" for both UNets); None when it takes none.
    factors_of: the network under whose name a subject keeps its factors; "": its own.
    twin: whether a float16 build also makes it in float32, for pictures that overflow.
    wide: whether it is float32 in every build.
    required: whether the runtime needs it.
    """

    name: str
    group: Group
    call: Call
    describe: Callable[[BaseFiles, bool], Network | None]
    weights: Callable[[BaseFiles], Weights]
    component: str
    factors: str | None = None
    factors_of: str = ""
    holds: Callable[[str], bool] | None = None
    twin: bool = False
    wide: bool = False
    required: bool = True


def kind_of(name: str) -> NetworkKind:
    """The entry of a network or its twin. Raises KeyError for a name that is not in the list."""
    plain = plain_name(name)
    for kind in KINDS:
        if kind.name == plain:
            return kind
    raise KeyError(name)


def names_of_group(group: Group) -> tuple[str, ...]:
    """The networks of a phase, in running order."""
    return tuple(kind.name for kind in KINDS if kind.group == group)


def names_of_factors(part: str) -> tuple[str, ...]:
    """The names under which a subject keeps a part of a LoRA: both UNets for "unet"."""
    return tuple(kind.name for kind in KINDS if kind.factors == part and not kind.factors_of)


def networks_of_factors(name: str) -> tuple[str, ...]:
    """The networks that take the factors which a subject keeps under a name: a UNet and what attends for it."""
    return tuple(kind.name for kind in KINDS if kind.factors and name in (kind.name, kind.factors_of))


def kv_name(unet: str) -> str:
    """The network that gives a UNet's cross-attention its keys and values."""
    return f"{unet}_kv"


def unets_of(target: str) -> tuple[str, ...]:
    """The UNets that a LoRA's target names: "patched", "raw" or "both"."""
    unets = names_of_factors("unet")
    return {"patched": unets[:1], "raw": unets[1:], "both": unets}[target]


def list_groups() -> tuple[Group, ...]:
    """Every phase once, in running order."""
    return tuple(dict.fromkeys(kind.group for kind in KINDS))


def flag_of(name: str) -> int:
    """The bit that the device sets when this network gives values that are not finite."""
    return 1 << KINDS.index(kind_of(name))


def twin_name(name: str) -> str:
    """The name of a network's float32 twin."""
    return name + _TWIN


def plain_name(name: str) -> str:
    """The name of the network itself, given its own name or its twin's."""
    return name.removesuffix(_TWIN)


def is_twin(name: str) -> bool:
    """Whether this is the name of a float32 twin."""
    return name.endswith(_TWIN)


def describe_networks(
    base: BaseFiles, slots: bool = True, precision: Precision = "float32", fused: Fused = False
) -> tuple[Network, ...]:
    """Describe every network of a base.

    slots: whether the weights of LoRA slots are inputs. Without them no subject can be chosen later.
    precision, fused: see `Network`.

    Returns the networks in running order. With float16 the float32 twins follow; their graphs are those of a float32
    base.
    """
    plain = [network for kind in KINDS if (network := kind.describe(base, slots)) is not None]
    found = [network if network.kind.wide else network.at(precision, fused) for network in plain]
    if precision == "float16":
        found += [replace(network, name=twin_name(network.name)) for network in plain if network.kind.twin]
    return tuple(found)


# -- the entries ------------------------------------------------------------------------------------------------------

_MODULES: Final = "dreammix_trt.export.modules"
_ASUKA: Final = "dreammix_trt.export.asuka_modules"


def _describe_text_encoder(base: BaseFiles, name: str, has_slots: bool) -> Network:
    config = base.configs[name]
    width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    slots = tuple(
        Slot.of(f"text_model.encoder.layers.{layer}.self_attn.{part}_proj", width, width)
        for layer in range(layers)
        for part in ("q", "k", "v", "out")
        if has_slots
    )
    inputs = (Tensor("input_ids", "int64", ("rows", TOKENS)), *describe_weights(slots))
    outputs = [Tensor("hidden", "float32", ("rows", TOKENS, width))]
    if name == "text_encoder_2":
        outputs.append(Tensor("pooled", "float32", ("rows", int(config["projection_dim"]))))
    return Network(name, name, f"{_MODULES}:TextEncoder", inputs, tuple(outputs), slots, {name: config})


def _describe_unet(base: BaseFiles, name: str, has_slots: bool) -> Network:
    config, latent = base.configs["unet"], base.latent_channels
    linears = tuple(list_attention_linears(config))
    slots = tuple(slot for slot in linears if has_slots and not slot.module.endswith(FROM_TEXT))
    pooled = int(base.configs["text_encoder_2"]["projection_dim"])
    inputs = (
        Tensor("sample", "float32", ("rows", latent, "h", "w")),
        Tensor("timestep", "float32", ("rows",)),
        Tensor("text_embeds", "float32", ("rows", pooled)),
        Tensor("time_ids", "float32", ("rows", 6)),
        Tensor("inpaint_feature", "float32", ("pictures", base.feature_channels, "h", "w")),
        *describe_keys_and_values(linears),
        *describe_weights(slots),
    )
    outputs = (Tensor("eps", "float32", ("rows", latent, "h", "w")),)
    return Network(name, "unet", f"{_MODULES}:UNet", inputs, outputs, slots, {"unet": config})


def _describe_kv(base: BaseFiles, name: str, has_slots: bool) -> Network:
    """What depends on the text alone in all steps of a stage: keys and values of the UNet's cross-attention layers."""
    config = base.configs["unet"]
    linears = tuple(slot for slot in list_attention_linears(config) if slot.module.endswith(FROM_TEXT))
    slots = linears if has_slots else ()
    text = Tensor("encoder_hidden_states", "float32", ("rows", "context", int(config["cross_attention_dim"])))
    return Network(
        kv_name(name),
        kv_name("unet"),
        f"{_MODULES}:KeysAndValues",
        (text, *describe_weights(slots)),
        tuple(describe_keys_and_values(linears)),
        slots,
        {"unet": config},
    )


def _describe_inpaint_head(base: BaseFiles, _slots: bool) -> Network | None:
    if not base.has_head:
        return None
    channels, latent = base.feature_channels, base.latent_channels
    inputs = (
        Tensor("mask", "float32", ("pictures", 1, "h", "w")),
        Tensor("masked_latent", "float32", ("pictures", latent, "h", "w")),
    )
    feature = (Tensor("feature", "float32", ("pictures", channels, "h", "w")),)
    configs = {"inpaint_head": {"channels": channels, "latent_channels": latent, "padding": base.head_padding}}
    return Network("inpaint_head", "inpaint_head", f"{_MODULES}:InpaintHead", inputs, feature, (), configs)


def _describe_vae_encoder(base: BaseFiles, _slots: bool) -> Network:
    image = Tensor("image", "float32", ("pictures", 3, "H", "W"))
    moments = tuple(Tensor(name, "float32", ("pictures", base.latent_channels, "h", "w")) for name in ("mean", "std"))
    configs = {"vae": base.configs["vae"]}
    return Network("vae_encoder", "vae_encoder", f"{_MODULES}:VaeEncoder", (image,), moments, (), configs)


def _describe_vae_decoder(base: BaseFiles, _slots: bool) -> Network:
    latent = Tensor("latent", "float32", ("pictures", base.latent_channels, "h", "w"))
    image = Tensor("image", "float32", ("pictures", 3, "H", "W"))
    configs = {"vae": base.configs["vae"]}
    return Network("vae_decoder", "vae_decoder", f"{_MODULES}:VaeDecoder", (latent,), (image,), (), configs)


def _describe_asuka(base: BaseFiles, part: Part) -> Network | None:
    if base.asuka is None or part not in base.asuka.parts:
        return None
    if part == "prior":
        base.asuka.check_aligned()
    name, config = f"asuka_{part}", getattr(base.asuka.config, part)
    inputs, outputs = asuka.describe_prior(config) if part == "prior" else asuka.describe_decoder(config)
    module = {"prior": f"{_ASUKA}:AsukaPrior", "decoder": f"{_ASUKA}:AsukaDecoder"}[part]
    return Network(name, name, module, inputs, outputs, (), {name: asdict(config)})


def _weights_of_asuka(base: BaseFiles, part: Part) -> Weights:
    if base.asuka is None:
        raise KeyError(f"asuka_{part}")
    return base.asuka.weights(part)


def _describe_tokens(name: str, base: BaseFiles, _slots: bool) -> Network | None:
    made = token_networks.describe(name, base)
    return Network(name, name, made.module, made.inputs, made.outputs, (), made.configs) if made else None


def _half_of_vae(*prefixes: str) -> Callable[[BaseFiles], Weights]:
    return lambda base: base.state("vae").rename(lambda name: name if name.startswith(prefixes) else None)


#: in running order; all code that needs networks asks this list, so a new entry reaches all of it
KINDS: Final[list[NetworkKind]] = [
    NetworkKind(
        "text_encoder",
        "text",
        "prompt",
        lambda base, slots: _describe_text_encoder(base, "text_encoder", slots),
        lambda base: base.state("text_encoder"),
        component="text_encoder",
        factors="text_encoder",
    ),
    NetworkKind(
        "text_encoder_2",
        "text",
        "prompt",
        lambda base, slots: _describe_text_encoder(base, "text_encoder_2", slots),
        lambda base: base.state("text_encoder_2"),
        component="text_encoder_2",
        factors="text_encoder_2",
    ),
    NetworkKind(
        "vae_encoder",
        "picture",
        "vae",
        _describe_vae_encoder,
        _half_of_vae("encoder.", "quant_conv."),
        component="vae",
        twin=True,
    ),
    NetworkKind(
        "inpaint_head",
        "picture",
        "frame",
        _describe_inpaint_head,
        lambda base: Weights.of({"head.weight": base.head()}),
        component="inpaint_head",
        required=False,
    ),
    NetworkKind(
        "asuka_prior",
        "asuka",
        "frame",
        lambda base, _slots: _describe_asuka(base, "prior"),
        lambda base: _weights_of_asuka(base, "prior"),
        component="asuka_prior",
        required=False,
    ),
    NetworkKind(
        "unet_kv",
        "unet",
        "stage",
        lambda base, slots: _describe_kv(base, "unet", slots),
        lambda base: base.unet_patched_state(),
        component="unet",
        factors="unet",
        factors_of="unet",
        holds=reads_text,
    ),
    NetworkKind(
        "unet",
        "unet",
        "step",
        lambda base, slots: _describe_unet(base, "unet", slots),
        lambda base: base.unet_patched_state(),
        component="unet",
        factors="unet",
        holds=lambda name: not reads_text(name),
    ),
    NetworkKind(
        "unet_raw_kv",
        "unet_raw",
        "stage",
        lambda base, slots: _describe_kv(base, "unet_raw", slots) if base.patch else None,
        lambda base: base.state("unet"),
        component="unet_raw",
        factors="unet",
        factors_of="unet_raw",
        holds=reads_text,
        required=False,
    ),
    NetworkKind(
        "unet_raw",
        "unet_raw",
        "step",
        lambda base, slots: _describe_unet(base, "unet_raw", slots) if base.patch else None,
        lambda base: base.state("unet"),
        component="unet_raw",
        factors="unet",
        holds=lambda name: not reads_text(name),
        required=False,
    ),
    NetworkKind(
        "vae_decoder",
        "picture",
        "vae",
        _describe_vae_decoder,
        _half_of_vae("decoder.", "post_quant_conv."),
        component="vae",
        twin=True,
    ),
    NetworkKind(
        "asuka_decoder",
        "asuka",
        "vae",
        lambda base, _slots: _describe_asuka(base, "decoder"),
        lambda base: _weights_of_asuka(base, "decoder"),
        component="asuka_decoder",
        twin=True,
        required=False,
    ),
    *(
        NetworkKind(
            *(each.name, "tokens", "subject", partial(_describe_tokens, each.name), each.weights),
            component=each.component,
            wide=each.wide,
            required=False,
        )
        for each in token_networks.LIST
    ),
]
