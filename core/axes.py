"""Tensors of networks by their named axes, and the sizes that one call gives the axes.

"rows" of the UNet's batch or of prompts, "pictures", "context" (rows of the text condition), "h" and "w" in latent
cells, "H" and "W" in pixels. Rows run [neg0, pos0, neg1, pos1, ...] for N pictures, or one a picture where guidance is
off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dreammix_trt.core.config_fields import TOKENS

FACTOR: Final = 8  # pixels of a latent cell's side
AXES: Final = ("rows", "pictures", "context", "h", "w", "H", "W")
_ALWAYS_FLOAT32: Final = ("timestep", "time_ids")  # float16 cannot count to 1000 in thirds


@dataclass(frozen=True)
class Tensor:
    """An input or output: its numpy dtype, and sides as numbers or as names of axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Tensor:
        """From a `network.json`."""
        return cls(str(entry["name"]), str(entry["dtype"]), tuple(entry["shape"]))

    @property
    def stays_float32(self) -> bool:
        """Whether it is float32 whatever the network's precision."""
        return self.name in _ALWAYS_FLOAT32


@dataclass(frozen=True)
class Sides:
    """The sizes of one call's axes: rows, pictures, the latent's height and width, rows of the condition."""

    rows: int
    pictures: int
    height: int
    width: int
    context: int = TOKENS

    def size_of(self, axis: str) -> int:
        """The length of a named axis."""
        named = {
            "rows": self.rows,
            "pictures": self.pictures,
            "context": self.context,
            "h": self.height,
            "w": self.width,
            "H": FACTOR * self.height,
            "W": FACTOR * self.width,
        }
        return named[axis]

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """A tensor's shape at these sizes."""
        return tuple(self.size_of(side) if isinstance(side, str) else side for side in tensor.shape)
