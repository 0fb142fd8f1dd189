"""The units of a VAE, and the change to float32 and back around those for which float16 is too narrow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dreammix_trt.core.torch_modules.asuka_decoder import Injection

Convert = Callable[[Tensor], Tensor]
_CONDITION = "condition."


def vae_units(kind: str, network: Any) -> dict[str, nn.Module]:
    """The modules that a picture passes one after the other.

    kind: "vae_encoder", "vae_decoder" or "asuka_decoder".
    network: diffusers' AutoencoderKL, or `AsukaDecoder`, whose condition encoder's layers come first.

    Returns name -> module, in order.
    """
    half: Any = network.encoder if kind == "vae_encoder" else network.decoder
    blocks = half.down_blocks if kind == "vae_encoder" else half.up_blocks
    samplers = "downsamplers" if kind == "vae_encoder" else "upsamplers"
    sides: dict[str, nn.Module] = {}
    injections = network.injections if kind == "asuka_decoder" else ()
    for number, block in enumerate(blocks):
        if injections:
            sides[f"injections.{number}"] = injections[number]
        parts = [*(("resnets", layer) for layer in block.resnets)]
        parts += [(samplers, layer) for layer in getattr(block, samplers) or ()]
        for place, (part, layer) in enumerate(parts):
            sides[f"blocks.{number}.{place}.{part}"] = layer
    if injections:
        sides[f"injections.{len(blocks)}"] = injections[-1]
    mid = half.mid_block
    middle = {"mid.0": mid.resnets[0], "mid.1": mid.attentions[0], "mid.2": mid.resnets[1]}
    body = {**sides, **middle} if kind == "vae_encoder" else {**middle, **sides}
    units = {"conv_in": half.conv_in, **body, "conv_norm_out": half.conv_norm_out, "conv_out": half.conv_out}
    if kind == "vae_encoder":
        return units if network.quant_conv is None else {**units, "quant_conv": network.quant_conv}
    units = units if network.post_quant_conv is None else {"post_quant_conv": network.post_quant_conv, **units}
    condition = network.condition.layers if injections else ()
    return {**{f"{_CONDITION}{number}": layer for number, layer in enumerate(condition)}, **units}


def split_chains(units: Collection[str]) -> Iterator[list[str]]:
    """Names of units by the stream that flows through them: the condition's, and the picture's."""
    for condition in (True, False):
        chain = [name for name in units if name.startswith(_CONDITION) is condition]
        if chain:
            yield chain


def convert_units(units: Mapping[str, nn.Module], wide: Sequence[str], widen: Convert, narrow: Convert) -> None:
    """Let the units of each chain compute in float32 from the first to the last of `wide`.

    wide: names (`export/vae_range.py` finds them).
    widen, narrow: to float32 and back.
    """
    if not wide:
        return
    for chain in split_chains(units):
        chosen = [name for name in chain if name in wide]
        if chosen:
            units[chosen[0]].register_forward_pre_hook(lambda _unit, given: (widen(given[0]), *given[1:]))
            units[chosen[-1]].register_forward_hook(lambda _unit, _given, out: narrow(out))
    for name, unit in units.items():
        if isinstance(unit, Injection):
            _join_streams(unit, widen if name in wide else narrow)


def _join_streams(unit: Injection, convert: Convert) -> None:
    """Bring both streams that meet in a unit to its type."""
    unit.register_forward_pre_hook(lambda _unit, given: (convert(given[0]), convert(given[1]), given[2]))
