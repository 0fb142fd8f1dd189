from __future__ import annotations

import numpy as np
import pytest

from dreammix_trt.core.slots import Slot, gather_weight, names_of_weights, slots_of

STACKED = (
    Slot("a.to_q", 2, 3, "a.to_qkv.weight", 0, 6),
    Slot("a.to_k", 2, 3, "a.to_qkv.weight", 3, 6),
    Slot.of("a.to_out.0", 3, 2),
    Slot("b.to_q", 2, 3, "b.to_q.weight", 0, 2, flipped=True),
)


def test_slots_come_back_from_their_entries() -> None:
    assert slots_of({"slots": [slot.describe() for slot in STACKED]}) == STACKED
    assert slots_of({}) == ()


def test_every_input_is_named_once() -> None:
    assert names_of_weights(STACKED) == ("a.to_qkv.weight", "a.to_out.0.weight", "b.to_q.weight")


def test_a_view_is_the_matrix_wherever_it_lies() -> None:
    whole = np.arange(12, dtype=np.float32).reshape(2, 6)
    assert STACKED[0].view(whole).tolist() == [[0, 1, 2], [6, 7, 8]]
    assert STACKED[1].view(whole).tolist() == [[3, 4, 5], [9, 10, 11]]
    STACKED[1].view(whole)[...] = 0
    assert whole.tolist() == [[0, 1, 2, 0, 0, 0], [6, 7, 8, 0, 0, 0]]
    flipped = STACKED[3].view(np.arange(6, dtype=np.float32).reshape(3, 2))
    assert flipped.tolist() == [[0, 2, 4], [1, 3, 5]]


def test_a_view_never_reaches_beyond_its_array() -> None:
    with pytest.raises(AssertionError, match=r"a\.to_k is not in \(2, 5\)"):
        STACKED[1].view(np.zeros((2, 5), np.float32))


def test_an_input_is_gathered_from_torchs_weights() -> None:
    rng = np.random.default_rng(0)
    shapes = {slot.module: (slot.outputs, slot.inputs) for slot in STACKED}
    weights = {f"{module}.weight": rng.standard_normal(shape).astype(np.float32) for module, shape in shapes.items()}
    stacked = gather_weight("a.to_qkv.weight", (2, 6), STACKED, weights)
    np.testing.assert_array_equal(stacked, np.hstack([weights["a.to_q.weight"].T, weights["a.to_k.weight"].T]))
    np.testing.assert_array_equal(gather_weight("b.to_q.weight", (3, 2), STACKED, weights), weights["b.to_q.weight"])
