"""Weights that leave the range of E4M3 when a subject is merged into them: the kernel cuts them off without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.axes import FLOAT8
from dreammix_trt.core.float8 import HEADROOM, LARGEST
from dreammix_trt.core.lora_names import join_first
from dreammix_trt.core.seam import DeviceNetworks
from dreammix_trt.core.subject import Role
from dreammix_trt.engine.device.factors import FactorSet, Pair
from dreammix_trt.engine.device.slot_layout import SlottedNetwork

Cut = dict[str, int]  # module -> how many of its weights are cut off


class Saturation:
    """Finds them on the host.

    Scales leave room for weights of `HEADROOM` times the base's largest (`Calibration.scales`). A change that is
    certainly smaller than that room, by the norms of its factors, costs nothing; those of other slots are counted.
    """

    def __init__(self, networks: DeviceNetworks, slotted: Mapping[str, SlottedNetwork]) -> None:
        self._networks, self._slotted = networks, slotted
        self._found: WeakKeyDictionary[FactorSet, dict[float, Cut]] = WeakKeyDictionary()  # by strength

    def find(self, factors: FactorSet, scale: float) -> Cut:
        """The layers of which weights are cut off, at a subject's strength. Asked again, it remembers."""
        known = self._found.setdefault(factors, {})
        if scale not in known:
            known[scale] = self._count(factors, scale)
        return known[scale]

    def _count(self, factors: FactorSet, scale: float) -> Cut:
        found: Cut = {}
        for (network, number), pair in factors.pairs.items():
            slot = self._slotted[network].slots[number]
            if self._slotted[network].types[slot.weight] != FLOAT8:
                continue
            largest = LARGEST * slot.scale
            if bound_change(pair) * abs(scale) > largest * (1 - 1 / HEADROOM):
                count = count_beyond(self._networks.weights(network)[slot.weight], pair, scale, largest)
                if count:
                    found[slot.module] = count
        return found


def describe_cut(role: Role, cut: Cut) -> str:
    """What a user should know of it. The cut is not empty."""
    who = f"subject {role.name!r} at strength {role.scale:g}" if role.name else "a subject of tokens"
    beside = " beside the token adapter's LoRA" if role.name and role.adapted else ""
    return (
        f"{who}{beside}: {sum(cut.values())} weights in {len(cut)} layers are "
        f"larger than FP8 holds and are cut off, so it may look wrong: lower subject_scale, or build with `--precision "
        f"float16`; the layers: {join_first(list(cut), 3)}"
    )


def bound_change(pair: Pair) -> float:
    """What no number of A B exceeds: the largest norm of a row of A times that of a column of B."""
    return float(np.linalg.norm(pair.a, axis=1).max(initial=0) * np.linalg.norm(pair.b, axis=0).max(initial=0))


def count_beyond(weight: NDArray[Any], pair: Pair, scale: float, largest: float) -> int:
    """How many numbers of W + scale A B are larger than `largest`.

    weight: the whole pristine input.
    """
    merged = pair.slot.view(weight).astype(np.float32) + pair.a @ (pair.b * np.float32(scale))
    return int(np.count_nonzero(np.abs(merged) > largest))
