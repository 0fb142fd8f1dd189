"""The records of Python and C++ have one layout."""

from __future__ import annotations

import numpy as np
import pytest

from dreammix_trt.core.noise import DRAWS
from dreammix_trt.engine.device import records

gpu = pytest.importorskip("dreammix_trt._cpp").gpu
NAMES = ("CUT", "SHEET", "FIELD", "JOB", "STEP", "MERGE")


def test_every_record_is_compared() -> None:
    ours = {name for name, value in vars(records).items() if isinstance(value, np.dtype)}
    assert ours == set(NAMES) == set(gpu.layouts())


@pytest.mark.parametrize("name", NAMES)
def test_layouts_are_equal(name: str) -> None:
    dtype: np.dtype = getattr(records, name)
    size, offsets = gpu.layouts()[name]
    fields = {field: dtype.fields[field][1] for field in dtype.names if not field.startswith("unused")}
    assert (dtype.itemsize, fields) == (size, offsets)


def test_draws_are_those_the_kernels_know() -> None:
    """The kernels name init, blend, solver and renoise themselves; the rest is told to them."""
    known = ["init_noise", "blend_noise", "solver_noise", "renoise_switch"]
    assert [DRAWS[name] for name in known] == [0, 1, 2, 3]
