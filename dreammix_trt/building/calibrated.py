"""The calibration that a build with UNets in E4M3 uses."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreammix_trt.building.order import BuildOrder
from dreammix_trt.core.calibration import FILE_NAME, Calibration, key_of_unet
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.networks import Network, unets_of
from dreammix_trt.core.remarks import remark


def find_calibration(order: BuildOrder, base: BaseFiles) -> Calibration | None:
    """Read the calibration that is named, or that lies in the base's folder. None where the build needs none.

    Raises InputError with the command that makes one, or for the calibration of another base; FileFormatError for a
    file that is none.
    """
    if order.engine.precision != "fp8":
        return None
    named = order.engine.calibration or base.folder / FILE_NAME
    if not named.is_file():
        raise InputError(
            f"precision is fp8, and {base.name} was not calibrated; run `{_spell_command(order)}`, then build with "
            f"--calibration {FILE_NAME}"
        )
    calibration = Calibration.read(named)
    for name in unets_of("both" if base.patch else "patched"):
        if name not in calibration.sources:
            raise InputError(
                f"{named}: holds nothing of {name}, which {base.name} has as it has a patch; run "
                f"`{_spell_command(order)}`, then build with --calibration {FILE_NAME}"
            )
        if calibration.sources[name] != key_of_unet(base, name):
            raise InputError(
                f"{named}: the calibration of {calibration.base}, whose weights are not those of {base.name}; run "
                f"`{_spell_command(order)}`, then build with --calibration {FILE_NAME}"
            )
        if not calibration.layers.get(name):
            raise InputError(
                f"{named}: nothing was recorded of {name} yet; run `{_spell_command(order, named)}` again: it goes on"
            )
    _tell_unmeasured(calibration, f"`{_spell_command(order, named)}`")
    return calibration


def _tell_unmeasured(calibration: Calibration, command: str) -> None:
    """Say of how many layers nobody knows what E4M3 does."""
    for name in calibration.layers:
        unknown = calibration.unmeasured(name)
        if unknown:
            remark(
                f"{name}: the errors of {len(unknown)} of {len(calibration.layers[name])} layers were never measured "
                f"(ranges are from {len(calibration.runs)} requests), so they all compute in E4M3, whatever it does to "
                f"the picture; to measure them run {command}, then build again"
            )


def describe_float8(networks: Sequence[Network], calibration: Calibration | None) -> dict[str, Any]:
    """What the passport says of layers in E4M3: how many, which others stay float16, from how many requests."""
    if calibration is None:
        return {}
    unets = {
        network.name: {"layers": len(network.float8), "kept_in_float16": list(calibration.kept(network.name))}
        for network in networks
        if network.float8
    }
    return {"float8": {"requests": len(calibration.runs), "unets": unets}}


def _spell_command(order: BuildOrder, out: Path | None = None) -> str:
    """The command that calibrates the base of an order."""
    sources = order.base
    options = {"patch": sources.patch, "head": sources.head, "vae": sources.vae, "tokenizer": sources.tokenizer}
    words = [str(word) for name, value in options.items() if value is not None for word in (f"--{name}", value)]
    words += ["--patch-biases"] if sources.patch_biases else []
    base = [str(sources.base)] if sources.base is not None else []
    return shlex.join(("dreammix-trt", "calibrate", *base, *words, "--out", str(out or FILE_NAME)))
