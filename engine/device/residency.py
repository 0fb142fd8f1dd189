"""Which networks' weights are on the device: all of them, all but one UNet, or those that the next phase needs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

from dreammix_trt.core.networks import KINDS, is_twin, kv_name, names_of_group, twin_name, unets_of
from dreammix_trt.core.seam import DeviceNetworks
from dreammix_trt.core.slots import names_of_weights
from dreammix_trt.engine.device.memory_plan import MemoryPlan
from dreammix_trt.engine.device.room import choose_twin

_LOADING: Final = threading.Lock()  # runtimes that share networks load a twin one after the other


class Usable:
    """Networks without those of `hidden`, and without float32 twins that cannot stand in for their network.

    A twin cannot stand in where it takes slots' weights of another type: they are on the device in one type. A UNet's
    twin needs the other UNet's twin, and the twins of what attends for them, as all get the same arrays.
    """

    def __init__(self, networks: DeviceNetworks, hidden: Collection[str] = ()) -> None:
        self._networks = networks
        self._hidden = {*hidden, *_find_unlike_twins(networks)}
        together = [each for name in unets_of("both") for each in (name, kv_name(name))]
        if any(name in self and twin_name(name) not in self for name in together):
            self._hidden |= {twin_name(name) for name in together}

    def __contains__(self, name: str) -> bool:
        return name in self._networks and name not in self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._networks, name)


def restrict_to_plan(networks: DeviceNetworks, plan: MemoryPlan) -> Usable:
    """Networks without those that a memory plan has no room for."""
    raw = names_of_group("unet_raw") if plan.strategy == "one-unet" else ()
    return Usable(networks, {*plan.without, *raw, *map(twin_name, raw)})


def _find_unlike_twins(networks: DeviceNetworks) -> Iterator[str]:
    """Twins that take slots' weights in another type than the networks for which they stand in."""
    for name in [kind.name for kind in KINDS]:
        if name in networks and twin_name(name) in networks:
            known = {tensor.name: tensor.dtype for tensor in networks.inputs(name)}
            weights = names_of_weights(networks.slots(name))
            if any(t.name in weights and known.get(t.name) != t.dtype for t in networks.inputs(twin_name(name))):
                yield twin_name(name)


class Residency:
    """Carries out a memory plan's strategy.

    networks: restricted to the plan.
    wait: waits for all work under way, before weights are unloaded.
    shared: other runtimes use the networks, so none is unloaded.
    seconds: spent so far on loading and unloading.

    A float32 twin is loaded at the first overflow. Then its weights stay, as the plan counts them; under "swap" they
    take their turn. Its contexts and scratch memory are its room's, and go with the request (`Rooms`).
    """

    def __init__(
        self, networks: DeviceNetworks, plan: MemoryPlan, wait: Callable[[], None], *, shared: bool = False
    ) -> None:
        self._networks, self._plan, self._wait = networks, plan, wait
        self.seconds = 0.0
        if shared:
            return
        swap = plan.strategy == "swap"
        here = set(networks.loaded)
        for name in sorted(here):
            if swap or is_twin(name) or name not in networks:
                networks.unload(name)
        for name in [kind.name for kind in KINDS]:
            if name in networks and not swap and name not in here:
                networks.load(name)

    def free_weights(self) -> None:
        """Unload all weights under "swap", before networks are bound: TensorRT 11 briefly loads those that it binds.

        The device must be idle.
        """
        if self._plan.strategy == "swap":
            for name in self._networks.loaded:
                self._networks.unload(name)

    @property
    def captures(self) -> bool:
        """Whether graphs are made and stay valid: weights that are loaded again may have other addresses."""
        return self._plan.strategy != "swap" and self._networks.captures

    def need(self, *names: str, safe: bool = False) -> None:
        """Load these networks' weights where they are not loaded; under "swap" unload all others first.

        safe: load twins where they exist.
        """
        wanted = {choose_twin(self._networks, name, safe) for name in names if name in self._networks}
        if wanted <= set(self._networks.loaded):
            return
        started = time.perf_counter()
        with _LOADING:
            here = set(self._networks.loaded)
            if self._plan.strategy == "swap":
                self._wait()
                for name in sorted(here - wanted):
                    self._networks.unload(name)
            for name in sorted(wanted - here):
                self._networks.load(name)
        self.seconds += time.perf_counter() - started
