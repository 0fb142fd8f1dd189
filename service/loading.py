"""How the painters of one engine are loaded, in this process or in a replica elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dreammix_trt.engine.dreammix import DreamMix


@dataclass(frozen=True)
class Loading:
    """What an engine is loaded with.

    workers: how many requests are painted at once. On a GPU the painters share its weights, on the CPU its cores.
    threads, store, verify, device, options: as for `DreamMix.load`.
    """

    path: Path
    workers: int = 1
    device: str = "cpu"
    threads: int | None = None
    store: Path | None = None
    verify: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> list[DreamMix]:
        """Load the painters. Close them in reverse order. Raises as `DreamMix.load` does; then none is left open."""
        from dreammix_trt.engine.dreammix import DreamMix

        shares, threads = self.workers > 1 and self.device != "cuda", self.threads
        if shares:
            threads = max(1, (threads or os.cpu_count() or 1) // self.workers)
        with ExitStack() as opened:
            painters: list[DreamMix] = []
            for number in range(self.workers):
                if number and self.device == "cuda":
                    painters.append(painters[0].another())
                else:
                    given: dict[str, Any] = {"threads": threads, "store": self.store, "device": self.device}
                    checks = self.verify and not number
                    painters.append(DreamMix.load(self.path, verify=checks, **given, **self.options))
                opened.callback(painters[-1].close)
            opened.pop_all()
        return painters
