"""Large pictures through the VAE in tiles: where the tiles are and how their results are joined.

Above `ABOVE` pixels a VAE's attention takes more memory than everything else (its scores grow with the fourth power of
the side: 10 GB in float32 at 2048 x 1536). Tiles are as large as SDXL's own pictures, all of one size, so one engine
shape serves all. Neighbours overlap, and each result fades into the next one's along a straight ramp. The VAE's norms
and attention look at a whole tile, so the joined picture is close to that of the whole frame but not equal.

Pure planning, for the device and the host alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.axes import FACTOR

F32 = npt.NDArray[np.float32]

#: the longer side in pixels up to which a frame goes through the VAE whole
ABOVE: Final = 1536
#: side of a tile in latent cells: 1024 pixels
SIDE: Final = 128
#: cells that neighbours share at least. The embedded VAE on 1920 x 1024 pixels against the whole frame: with 16 cells,
#: 43.7 dB and up to 20 of 255 levels off, with 32 (a tile more) 44.4 dB and 9; sixteenfold enlarged, the difference
#: shows the first seam and not the second
OVERLAP: Final = 32


class Tile(NamedTuple):
    """A tile of (1, C, H, W). All numbers have one scale, latent cells or pixels.

    row, col: its first row and column.
    ramp_rows: weights of its rows, float32 (height,).
    ramp_cols: weights of its columns, float32 (width,).

    The weight of an element is ramp_rows[y] * ramp_cols[x].
    """

    row: int
    col: int
    ramp_rows: F32
    ramp_cols: F32


@dataclass(frozen=True)
class Tiling:
    """How a frame is cut into tiles.

    height, width: of every tile, in latent cells.
    rows, cols: the first cells of the tiles along each axis.
    """

    height: int
    width: int
    rows: tuple[int, ...]
    cols: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the whole frame in latent cells."""
        return self.rows[-1] + self.height, self.cols[-1] + self.width

    def tiles(self, factor: int = 1) -> tuple[Tile, ...]:
        """The tiles, row by row. Their weights sum to 1 at every element.

        factor: 1: in latent cells; `FACTOR` (8): in pixels.
        """
        down = _make_ramps(self.rows, self.height, factor)
        across = _make_ramps(self.cols, self.width, factor)
        return tuple(
            Tile(factor * row, factor * col, *ramps)
            for (row, col), ramps in zip(product(self.rows, self.cols), product(down, across), strict=True)
        )


def needs_tiles(height: int, width: int) -> bool:
    """Whether a frame of height x width pixels goes through the VAE in tiles."""
    return max(height, width) > ABOVE


def tiles_of(height: int, width: int, *, side: int = SIDE, overlap: int = OVERLAP) -> Tiling:
    """The fewest tiles that cover height x width latent cells, spread evenly.

    side: of a tile, in latent cells; less where the frame is smaller.
    overlap: cells that neighbours share at least, 1 to side - 1.
    """
    rows, cols = (_find_starts(length, side, overlap) for length in (height, width))
    return Tiling(min(side, height), min(side, width), rows, cols)


def run_tiled(
    run: Callable[[Mapping[str, F32]], Mapping[str, F32]], arrays: Mapping[str, F32], tiling: Tiling
) -> dict[str, F32]:
    """Run a network tile by tile.

    run: the network: its arrays by name -> its outputs by name.
    arrays: (N, C, H, W), latents or pictures of one frame; the length of a side shows whether it counts cells or
        pixels.

    Returns the joined outputs by name, float32.
    """
    height, width = tiling.size
    tiles = {factor: tiling.tiles(factor) for factor in (1, FACTOR)}
    joined: dict[str, F32] = {}
    for number in range(len(tiles[1])):
        given = {
            name: np.ascontiguousarray(array[_slice_tile(tiles[array.shape[2] // height][number])])
            for name, array in arrays.items()
        }
        for name, values in run(given).items():
            factor = values.shape[2] // tiling.height
            tile, size = tiles[factor][number], (*values.shape[:2], factor * height, factor * width)
            whole = joined.setdefault(name, np.zeros(size, np.float32))
            whole[_slice_tile(tile)] += values * (tile.ramp_rows[:, None] * tile.ramp_cols)
    return joined


def _slice_tile(tile: Tile) -> tuple[slice, ...]:
    rows, cols = slice(tile.row, tile.row + len(tile.ramp_rows)), slice(tile.col, tile.col + len(tile.ramp_cols))
    return slice(None), slice(None), rows, cols


def _find_starts(length: int, side: int, overlap: int) -> tuple[int, ...]:
    """First cells of tiles along an axis: the first at 0, the last ends at the end of the axis."""
    room = length - side
    if room <= 0:
        return (0,)
    gaps = -(-room // (side - overlap))
    return tuple(index * room // gaps for index in range(gaps + 1))


def _make_ramps(starts: Sequence[int], side: int, factor: int) -> list[F32]:
    """The weights of tiles along one axis, (factor * side,) each.

    From each tile to the next a step goes from 0 to 1 in a straight line over their common cells. A tile's weight is
    the step to it minus the step from it. So the sum is 1 for any overlap, even of three tiles. No weight is negative,
    as each step lies behind the one before.
    """
    at = np.arange(factor * (starts[-1] + side)) + 0.5
    steps = [np.ones_like(at)]
    for before, start in pairwise(starts):
        first, last = factor * start, factor * (before + side)
        steps.append(np.clip((at - first) / (last - first), 0, 1))
    steps.append(np.zeros_like(at))
    return [
        (come - gone)[factor * start : factor * (start + side)].astype(np.float32)
        for start, (come, gone) in zip(starts, pairwise(steps), strict=True)
    ]
