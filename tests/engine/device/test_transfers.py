"""Uploads through pinned pieces when something comes in between."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.seam import Array
from dreammix_trt.engine.device.transfers import Uploads
from dreammix_trt.engine.drivers.simulated import SimulatedDevice


@pytest.mark.parametrize("method", ["upload", "mark"])
def test_a_piece_whose_copy_nobody_marked_is_not_filled_before_it_was_read(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    with ExitStack() as made, SimulatedDevice(late=True) as device:
        stream, memory, waited = device.make_stream(), device.allocate(64), []

        def wait_for(mark: Any) -> None:
            waited.append(mark)
            assert mark.has_passed()

        uploads = Uploads(device, stream, wait_for, made, size=16)
        first, second = (Array(memory.pointer + at, (16,), "uint8") for at in (0, 32))

        plain = getattr(device, method)

        def interrupt(*given: Any, **named: Any) -> None:
            if method == "upload":
                plain(*given, **named)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(device, method, interrupt)
            with pytest.raises(KeyboardInterrupt):
                uploads.send(first, [np.full(16, 1, np.uint8)])
        uploads.send(second, [np.full(16, 2, np.uint8)])
        assert len(waited) == 1
        device.synchronize(stream)
        assert (device.view(first) == 1).all() and (device.view(second) == 2).all()
        for _ in range(3):
            uploads.send(second, [np.full(16, 3, np.uint8)])
        device.synchronize(stream)
        assert (device.view(second) == 3).all()
