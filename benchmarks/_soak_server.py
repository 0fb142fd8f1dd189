"""`dreammix-trt serve` itself, but for its painters, whose device can be lost.

Workers are threads of one process, each with a painter. To kill one is to lose its device: the painter raises the
DeviceError that a lost GPU raises, in the middle of a request. That worker ends, the others go on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _soak_orders import DEATH

from dreammix_trt import serve_cli
from dreammix_trt.core.errors import DeviceError


class Mortal:
    """A painter that loses its device after the first step of a request for `DEATH`."""

    def __init__(self, painter: Any) -> None:
        self._painter = painter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._painter, name)

    def iterate(self, image: Any, mask_image: Any, request: Any, /, **options: Any) -> Iterator[Any]:
        """The painter's own, or its end."""
        events: Iterator[Any] = self._painter.iterate(image, mask_image, request, **options)
        return _die(events) if request.prompt == DEATH else events


def _die(events: Iterator[Any]) -> Iterator[Any]:
    yield next(events)
    error = DeviceError("its device was lost: the soak asked for it")
    error.lost = True
    raise error


def main() -> None:
    load: Any = serve_cli._load
    serve_cli._load = lambda *given: map(Mortal, load(*given))  # type: ignore[assignment, return-value]
    engine, workers, queue = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    serve_cli.serve([engine], port=0, workers=workers, threads=workers, queue=queue, timeout=600.0, keep=32)


if __name__ == "__main__":
    main()
