"""The records that kernels read from device memory: geometry, steps and pictures as data, so captured graphs serve any.

Each dtype repeats a struct of cpp_ext/gpu/records.hpp. A test compares their sizes and offsets.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from dreammix_trt.core.axes import FLOAT8

_I, _F = np.int32, np.float32

#: How a picture (height, width) is cut (box row0..col1, ends exclusive) and resampled to (out_height, out_width).
#: rows_at, cols_at: where an axis' resampling begins in the int32 tables, -1 where it keeps its size: first (outputs),
#: count (outputs), weights (outputs, most): Pillow's Lanczos, 22 fractional bits. vertically_first: which pass leads.
CUT: Final = np.dtype(
    [(name, _I) for name in (
        "height", "width", "row0", "row1", "col0", "col1", "out_height", "out_width", "vertically_first",
        "rows_at", "rows_most", "cols_at", "cols_most", "unused0", "unused1", "unused2",
    )]
)  # fmt: skip

#: How a stage's content is pasted: the canvas' size, the content's box in it, whether a soft alpha goes first,
#: and, where the local result is kept inside (keeps_local), the local content's box.
SHEET: Final = np.dtype(
    [(name, _I) for name in (
        "height", "width", "row0", "row1", "col0", "col1", "soft", "keeps_local",
        "local_row0", "local_row1", "local_col0", "local_col1", "unused0", "unused1", "unused2", "unused3",
    )]
)  # fmt: skip

#: Which distances are wanted around a mask: its size, how far in pixels (1..32767), and the box that has any
#: (for a seam: the ring around the mask's bounds; else the whole mask).
FIELD: Final = np.dtype([(name, _I) for name in ("height", "width", "reach", "row0", "row1", "col0", "col1", "unused")])

#: One picture of a batch.
JOB: Final = np.dtype(
    [("seed", np.uint64), ("start_scale", _F), ("hand_over_sigma", _F), ("samples_vae", _I), ("blends_output", _I)]
)

#: The fields of a schedule's row (core/schedule.py) that kernels read as they are.
STEP_FIELDS: Final = (
    "sigma", "timestep", "guidance_scale", "guidance_rescale", "blur_alpha", "c_x", "c_x0", "c_dx0", "c_noise",
)  # fmt: skip

#: One row of the schedule. time_ids: of the negative and the positive row. solver_step: -1 where the solver draws no
#: noise.
STEP: Final = np.dtype(
    [(name, _F) for name in STEP_FIELDS]
    + [("time_ids", _F, (2, 6))]
    + [("blend_step", _I), ("solver_step", _I), ("unused", _I)]
)

#: A slot's weight to merge: target = (source + left right) * out_scale, (rows, columns) as it is stored, rows `stride`
#: numbers apart; left (rows, rank) and right (rank, columns) are float32, times their scales. source may be target. The
#: first four are addresses. kind: of `MERGE_KINDS`. first: number of its first task (`gpu.plan_merges` counts them).
MERGE: Final = np.dtype(
    [(name, np.uint64) for name in ("source", "target", "left", "right")]
    + [("stride", np.int64)]
    + [(name, _I) for name in ("rows", "columns", "rank", "kind", "first")]
    + [(name, _F) for name in ("left_scale", "right_scale", "out_scale")]
)

#: (type of the source, type of the target) -> kind
MERGE_KINDS: Final = {("float32", "float32"): 0, ("float16", "float16"): 1, ("float16", FLOAT8): 2}
