"""What a build needs of memory and disk, told before it starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from dreammix_trt.building.ingredients import Ingredients
from dreammix_trt.building.part_store import PartStore
from dreammix_trt.core.network_weights import weights_of
from dreammix_trt.engine.backends.tensorrt.builder import Estimate, check_room, estimate_build

GIB = 1 << 30
#: what tracing a full-size UNet holds at once (measured: 4.9 GiB, with what the networks before it left 7)
_TRACING = 7 * GIB


def check_needs(ingredients: Ingredients, store: PartStore, tell: Callable[[str], None]) -> None:
    """Tell what is to be made and what that needs. Raises BuildError where it is not there, FileFormatError for weights
    that do not fit."""
    needs = list(_list_needs(ingredients, store))
    if not needs:
        return
    total = Estimate(max(need.host_bytes for need in needs), sum(need.disk_bytes for need in needs))
    if total.disk_bytes > GIB:
        tell(
            f"building needs up to {total.host_bytes / GIB:.1f} GiB of memory at a time and "
            f"{total.disk_bytes / GIB:.1f} GiB of disk in {store.shelf.root}"
        )
    check_room(total, store.shelf.root)


def _list_needs(ingredients: Ingredients, store: PartStore) -> Iterator[Estimate]:
    """Of each part that the store lacks."""
    engine = ingredients.engine
    for network in ingredients.networks:
        weights = weights_of(ingredients.base, network.name, ingredients.merged)  # refuses what does not fit
        if network.kind.twin and network.precision == "float16":
            # small, and which units are float32 is not known yet
            continue
        if engine.plans and store.holds(network.name, "engine", ingredients.of_plan(network)):
            continue
        size = 4 if network.precision == "float32" else 2
        eight = {f"{module}.weight" for module in network.float8}
        count = sum(math.prod(weights.shape(name)) * (1 if name in eight else size) for name in weights)
        if not store.holds(network.name, "onnx", ingredients.of_onnx(network)):
            yield Estimate(_TRACING if count > GIB else 0, count)
        if engine.plans:
            yield estimate_build(4 << 20, count, engine.backend)
