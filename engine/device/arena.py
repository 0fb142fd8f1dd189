"""All of a runtime's own memory on a device: one allocation, cut into named regions before the first request."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from dreammix_trt.core.seam import Array, Shape
from dreammix_trt.engine.drivers.device import Device

ALIGNMENT = 256
Regions = Mapping[str, tuple[Shape, str]]


def measure_regions(regions: Regions) -> dict[str, int]:
    """Bytes of each region, rounded up to the alignment.

    regions: name -> (shape, numpy dtype).
    """
    return {name: -(-Array(0, *region).nbytes // ALIGNMENT) * ALIGNMENT for name, region in regions.items()}


class Pieces:
    """Arrays side by side in one region, each aligned.

    arrays: name -> (shape, numpy dtype).
    nbytes: of the region.
    """

    def __init__(self, arrays: Regions) -> None:
        taken = measure_regions(arrays)
        self.arrays, self.nbytes = dict(arrays), sum(taken.values())
        starts = [0, *accumulate(taken.values())]
        self._starts = dict(zip(arrays, starts, strict=False))

    def cut(self, region: Array, at: int = 0) -> dict[str, Array]:
        """The arrays in a region, from byte `at` on."""
        whole = region.reshape((region.nbytes,), "uint8")
        return {
            name: whole.part(at + self._starts[name], Array(0, *array).nbytes).reshape(*array)
            for name, array in self.arrays.items()
        }


class Arena:
    """One allocation of `regions`. `arena[name]` is the whole region. A context manager that frees it."""

    def __init__(self, device: Device, regions: Regions) -> None:
        taken = measure_regions(regions)
        self._memory = device.allocate(max(sum(taken.values()), ALIGNMENT))
        self._arrays: dict[str, Array] = {}
        at = self._memory.pointer
        for name, (shape, dtype) in regions.items():
            self._arrays[name] = Array(at, tuple(shape), dtype)
            at += taken[name]

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def close(self) -> None:
        """Free it."""
        self._memory.free()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
