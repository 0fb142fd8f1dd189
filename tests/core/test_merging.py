from __future__ import annotations

import numpy as np
import pytest

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.merging import check_fit, list_changes, merge_weights, sum_products
from dreammix_trt.core.slots import Slot
from tests.support.tiny_model import random_factors

MODULES = {"a.to_k": (6, 5), "a.to_v": (7, 5), "b.to_out.0": (5, 5)}
SLOTS = tuple(Slot.of(module, inputs, outputs) for module, (inputs, outputs) in MODULES.items())


def draw_weights(dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {slot.weight: rng.standard_normal((slot.inputs, slot.outputs)).astype(dtype) for slot in SLOTS}


@pytest.mark.parametrize("rank", [1, 4, 33])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_merged_weights_are_the_sum_of_any_rank(rank: int, dtype: type) -> None:
    """W + 0.5 A B in float64, to half a unit in the last place of the weights' dtype and float32's own rounding."""
    pristine, factors = draw_weights(dtype), random_factors(MODULES, rank=rank)
    merged = merge_weights(pristine, list_changes(factors, SLOTS, 0.5))
    assert list(merged) == [slot.weight for slot in SLOTS]
    for slot in SLOTS:
        a, b = (factor.astype(np.float64) for factor in factors[slot.module])
        truth = pristine[slot.weight] + 0.5 * (a @ b)
        found = merged[slot.weight]
        assert found.dtype == dtype and found.shape == (slot.inputs, slot.outputs)
        slack = 0.5 * np.spacing(np.abs(truth).astype(dtype)).astype(np.float64) + 1e-6
        assert (np.abs(found - truth) <= slack).all()


def test_what_is_not_touched_gets_no_copy() -> None:
    pristine = draw_weights()
    before = {name: weight.copy() for name, weight in pristine.items()}
    merged = merge_weights(pristine, list_changes(random_factors({"a.to_v": (7, 5), "elsewhere": (2, 2)}), SLOTS))
    assert list(merged) == ["a.to_v.weight"]
    assert all(np.array_equal(pristine[name], weight) for name, weight in before.items()), (
        "the base's own are not written"
    )
    assert merge_weights(pristine, ()) == {}


def test_a_layer_without_an_input_has_no_effect() -> None:
    """A text encoder's last layer, whose result nobody reads, is no input of the graph."""
    pristine = draw_weights()
    del pristine["a.to_k.weight"]
    assert "a.to_k.weight" not in merge_weights(pristine, list_changes(random_factors(MODULES), SLOTS))


@pytest.mark.parametrize("flipped", [False, True])
def test_stacked_slots_change_their_own_part_alone(flipped: bool) -> None:
    shape, step = ((12, 4), 48 // 3) if flipped else ((4, 12), 4)
    stride = 4 if flipped else 12
    slots = [Slot(name, 4, 4, "qkv", at * step, stride, flipped) for at, name in enumerate(("q", "k", "v"))]
    pristine = {"qkv": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    factors = random_factors({"q": (4, 4), "v": (4, 4)}, rank=2)
    merged = merge_weights(pristine, list_changes(factors, slots))["qkv"]
    for slot in slots:
        before, after = slot.view(pristine["qkv"]), slot.view(merged)
        change = np.matmul(*factors[slot.module]) if slot.module in factors else np.zeros((4, 4))
        np.testing.assert_allclose(after - before, change, atol=1e-6)
    assert np.array_equal(slots[1].view(merged), slots[1].view(pristine["qkv"]))


def test_products_are_summed_in_the_order_of_the_ranks() -> None:
    """The order decides the last bits, so it is fixed; every other implementation follows it."""
    a, b = np.array([[1e8, 1.0, -1e8]], np.float32), np.ones((3, 1), np.float32)
    assert sum_products(a, b).tolist() == [[0.0]]
    assert sum_products(a[:, [0, 2, 1]], b).tolist() == [[1.0]]


def test_beyond_float16_is_infinite_and_not_a_warning() -> None:
    pristine = {"a.to_k.weight": np.full((6, 5), 6e4, np.float16)}
    factors = {"a.to_k": (np.full((6, 1), 1e3, np.float32), np.full((1, 5), 1e3, np.float32))}
    assert np.isinf(merge_weights(pristine, list_changes(factors, SLOTS))["a.to_k.weight"]).all()


def test_a_lora_for_another_base_lists_what_does_not_fit() -> None:
    told = r"another base; 2 modules.*a\.to_k \(9 -> 5, here 6 -> 5\).*z \(2 -> 2, no such slot\)"
    with pytest.raises(FileFormatError, match=told):
        check_fit(random_factors({"a.to_k": (9, 5), "z": (2, 2), "a.to_v": (7, 5)}), SLOTS)
    check_fit(random_factors(MODULES), SLOTS)


@pytest.mark.parametrize(("width", "family"), [(768, "Stable Diffusion 1.x"), (1024, "Stable Diffusion 2.x")])
def test_a_lora_for_another_model_is_recognised(width: int, family: str) -> None:
    slots = [Slot.of(f"x.{name}.to_k", width, 5) for name, width in (("attn1", 5), ("attn2", 2048))]
    factors = random_factors({"x.attn1.to_k": (5, 5), "x.attn2.to_k": (width, 5)})
    with pytest.raises(
        FileFormatError, match=rf"another base \({family}\); 1 modules do not fit: x\.attn2\.to_k \({width}"
    ):
        check_fit(factors, slots)
    with pytest.raises(FileFormatError, match="another base; 1 modules"):
        check_fit(random_factors({"x.attn1.to_k": (7, 5), "x.attn2.to_k": (2048, 5)}), slots)


def test_layers_without_slots_are_to_be_merged() -> None:
    others = {"b.ff.net.0.proj": (5, 9), "b.resnets.1.conv1": (45, 5)}
    told = r"^merge this LoRA.*build --lora FILE --merge.*2 of its 5 layers.*ff\.net\.0\.proj.*resnets\.1\.conv1"
    with pytest.raises(FileFormatError, match=told):
        check_fit(random_factors({**MODULES, **others}), SLOTS)
    with pytest.raises(FileFormatError, match=r"another base; 3 modules do not fit: b\.ff.*b\.to_out\.1"):
        check_fit(random_factors({"b.to_out.1": (5, 5), **others}), SLOTS)


def test_an_engine_without_slots_is_named_as_the_reason() -> None:
    with pytest.raises(
        FileFormatError, match=r"built with --no-slots, .*: build it without that option, or merge the L"
    ):
        check_fit(random_factors(MODULES), ())
    check_fit({}, ())
