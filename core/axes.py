"""The inputs and outputs of networks with named axes, and the sizes of these axes in one call.

rows: of the UNet's batch, or of prompts: [neg0, pos0, neg1, pos1, ...] for N pictures, or one per picture without
    guidance.
pictures: N.
context: rows of the text condition.
h, w: in latent cells.
H, W: in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dreammix_trt.core.config_fields import TOKENS

FACTOR: Final = 8  # pixels of a latent cell's side
AXES: Final = ("rows", "pictures", "context", "h", "w", "H", "W")
FLOAT8: Final = "float8_e4m3fn"  # 4 bits of exponent, 3 of fraction, no infinities
#: float16 cannot count to 1000 in thirds, and cannot tell features of a reference apart that differ by thousandths
_ALWAYS_FLOAT32: Final = ("timestep", "time_ids", "features")


@dataclass(frozen=True)
class Tensor:
    """An input or output of a network.

    dtype: of numpy, or `FLOAT8`.
    shape: each side a number or the name of an axis.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Tensor:
        """Make a tensor from its entry in `network.json`."""
        return cls(str(entry["name"]), str(entry["dtype"]), tuple(entry["shape"]))

    @property
    def memory_dtype(self) -> str:
        """The numpy type that holds it in memory: bytes for FP8, which numpy does not have."""
        return "uint8" if self.dtype == FLOAT8 else self.dtype

    @property
    def stays_float32(self) -> bool:
        """Whether it is float32 in every precision of the network."""
        return self.name in _ALWAYS_FLOAT32


@dataclass(frozen=True)
class Sides:
    """The sizes of the axes in one call.

    height, width: of the latent, in cells.
    context: rows of the text condition.
    """

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
        """The shape of a tensor at these sizes."""
        return tuple(self.size_of(side) if isinstance(side, str) else side for side in tensor.shape)
