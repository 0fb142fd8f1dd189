"""Which networks' weights are on the device: all of them, all but one UNet, or those that the next phase needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dreammix_trt.engine.gpu.networks import DeviceNetworks
from dreammix_trt.engine.gpu.plan import MemoryPlan
from dreammix_trt.engine.gpu.room import named

_ALL = (
    "text_encoder", "text_encoder_2", "unet", "unet_raw", "inpaint_head", "vae_encoder", "vae_decoder",
)  # fmt: skip


class Planned:
    """Networks as a memory plan leaves them: those it has no room for are not there."""

    def __init__(self, networks: DeviceNetworks, plan: MemoryPlan) -> None:
        self._networks = networks
        self._hidden = {*plan.without, *(("unet_raw", "unet_raw_float32") if plan.strategy == "one-unet" else ())}

    def __contains__(self, name: str) -> bool:
        return name in self._networks and name not in self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._networks, name)


class Residency:
    """Carries a memory plan's strategy out. wait: for everything under way, before weights leave. seconds: spent so far
    on bringing weights in and out."""

    def __init__(self, networks: DeviceNetworks, plan: MemoryPlan, wait: Callable[[], None]) -> None:
        self._networks, self._plan, self._wait = networks, plan, wait
        self.seconds = 0.0
        twins = {f"{name}_float32" for name in _ALL}
        self._here = set(networks.loaded)
        away = twins | (set(_ALL) if plan.strategy == "swap" else set())
        away |= {"unet_raw"} if plan.strategy == "one-unet" else set()
        for name in sorted(self._here & away):
            self._drop(name)
        for name in _ALL:
            if name in networks and name not in self._here | away:
                self._bring(name)

    @property
    def captures(self) -> bool:
        """Whether graphs stay valid: weights that come back may lie elsewhere."""
        return self._plan.strategy != "swap"

    def need(self, *names: str, safe: bool = False) -> None:
        """Have these networks' weights on the device; under "swap" all others leave first."""
        wanted = {named(self._networks, name, safe) for name in names if name in self._networks}
        if wanted <= self._here:
            return
        started = time.perf_counter()
        if self._plan.strategy == "swap":
            self._wait()
            for name in sorted(self._here - wanted):
                self._drop(name)
        for name in sorted(wanted - self._here):
            self._bring(name)
        self.seconds += time.perf_counter() - started

    def _bring(self, name: str) -> None:
        self._networks.load(name)
        self._here.add(name)

    def _drop(self, name: str) -> None:
        self._networks.unload(name)
        self._here.discard(name)
