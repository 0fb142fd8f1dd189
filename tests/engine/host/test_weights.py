"""Merged weights on the host: who gets which, for how long, and that the base's own are never touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.errors import EngineError, FileFormatError
from dreammix_trt.core.networks import twin_name
from dreammix_trt.core.slots import Slot
from dreammix_trt.core.subject import NOBODY, Role, Subject
from dreammix_trt.engine.host import weights as host_weights
from dreammix_trt.engine.host.weights import HostWeights
from tests.support.tiny_model import random_factors

SELF, CROSS = "a.attn1.to_q", "a.attn2.to_k"
PLACES = {"unet": SELF, "unet_kv": CROSS, "text_encoder": "t.q_proj"}


class Networks:
    """Networks of one slot each; `reads` counts how often weights were asked for."""

    def __init__(self, *more: str) -> None:
        self.places = {**PLACES, **{name: PLACES[name.removesuffix("_float32")] for name in more}}
        self.reads: list[str] = []
        self.own = {name: self._draw(name) for name in self.places}

    def _draw(self, name: str) -> dict[str, np.ndarray]:
        dtype = np.float32 if name.endswith("_float32") or name == "unet" else np.float16
        drawn = np.random.default_rng(len(name)).standard_normal((6, 5)).astype(dtype)
        drawn.flags.writeable = False
        return {f"{self.places[name]}.weight": drawn}

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def slots(self, name: str) -> tuple[Slot, ...]:
        return (Slot.of(self.places[name], 6, 5),) if name in self.places else ()

    def weights(self, name: str) -> dict[str, np.ndarray]:
        self.reads.append(name)
        return self.own[name]

    def run(self, name: str, **arrays: Any) -> dict[str, np.ndarray]:
        raise AssertionError("merging runs no network")


def make_subject(seed: int, **more: Any) -> Subject:
    unet = random_factors({SELF: (6, 5), CROSS: (6, 5)}, rank=40, seed=seed)
    return Subject("x", "sks", "mug", {"unet": unet, "unet_raw": unet, "text_encoder": {}}, **more)


def test_a_unet_and_what_attends_for_it_share_a_subjects_factors() -> None:
    networks, subject = Networks(), make_subject(1, scale=0.5)
    weights = HostWeights(networks)
    weights.add("mug", subject)
    find = weights.use(Role("mug", 0.8))
    for name in ("unet", "unet_kv"):
        (merged,) = find(name).values()
        own, (a, b) = networks.own[name][f"{PLACES[name]}.weight"], subject.factors["unet"][PLACES[name]]
        truth = own + 0.4 * (a.astype(np.float64) @ b)
        assert merged.dtype == own.dtype
        np.testing.assert_allclose(merged, truth, atol=1e-6 if merged.dtype == np.float32 else 2e-3)
    assert find("text_encoder") == {} and list(find("unet")) == [f"{SELF}.weight"], "only what it touches"


@pytest.mark.parametrize("role", [NOBODY, Role("mug", 0.0)])
def test_nobody_and_no_strength_are_the_bases_own(role: Role) -> None:
    networks = Networks()
    weights = HostWeights(networks)
    weights.add("mug", make_subject(1))
    assert weights.use(role)("unet") == {} and networks.reads == []


def test_one_after_the_other_and_back_has_the_same_bits() -> None:
    weights = HostWeights(Networks())
    weights.add("a", make_subject(1))
    weights.add("b", make_subject(2))
    name = f"{SELF}.weight"
    first, other = weights.use(Role("a"))("unet")[name].copy(), weights.use(Role("b"))("unet")[name]
    assert (first != other).any()
    weights._merged.clear()
    np.testing.assert_array_equal(weights.use(Role("a"))("unet")[name], first)


def test_weights_are_merged_once_and_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = Networks()
    weights = HostWeights(networks)
    for number, name in enumerate("abc"):
        weights.add(name, make_subject(number))
    monkeypatch.setattr(host_weights, "_MOST_KEPT", 2 * 6 * 5 * 4)  # the float32 weight of the UNet, twice
    for name in "abcb":
        find = weights.use(Role(name))
        assert find("unet") is find("unet")
    assert networks.reads == ["unet"] * 3, "all three fit: two beside the present one"
    weights.use(Role("a", 0.5))("unet")
    assert [role for role, _ in weights._merged] == [Role("c"), Role("b"), Role("a", 0.5)]
    monkeypatch.setattr(host_weights, "_MOST_KEPT", 0)
    find = weights.use(Role("b"))
    find("unet"), find("unet_kv")
    assert list(weights._merged) == [(Role("b"), "unet"), (Role("b"), "unet_kv")], "the present one stays whole"


def test_what_is_in_use_outlives_its_subject() -> None:
    weights = HostWeights(Networks())
    weights.add("mug", make_subject(1))
    begun, name = weights.use(Role("mug")), f"{SELF}.weight"
    before = begun("unet")[name]
    weights.add("mug", make_subject(2))
    assert begun("unet")[name] is before
    late = begun("unet_kv")[f"{CROSS}.weight"]
    again = weights.use(Role("mug"))
    assert (again("unet")[name] != before).any() and (again("unet_kv")[f"{CROSS}.weight"] != late).any()
    weights.remove("mug")
    assert begun("unet")[name] is before and weights._merged == {}
    with pytest.raises(EngineError, match="subject 'mug' was removed"):
        weights.use(Role("mug"))


def test_a_subject_that_does_not_fit_changes_nothing() -> None:
    weights = HostWeights(Networks())
    weights.add("mug", make_subject(1))
    kept = weights.use(Role("mug"))("unet")
    wrong = Subject("x", "sks", "mug", {"unet": random_factors({SELF: (7, 5)})})
    with pytest.raises(FileFormatError, match=r"another base; 1 modules do not fit: a\.attn1\.to_q \(7 -> 5, here 6"):
        weights.add("mug", wrong)
    assert weights.use(Role("mug"))("unet") is kept


def test_a_float32_twin_gets_float32_weights() -> None:
    twin = twin_name("text_encoder")
    networks = Networks(twin)
    weights = HostWeights(networks)
    factors = random_factors({PLACES["text_encoder"]: (6, 5)})
    weights.add("mug", Subject("x", "sks", "mug", {"text_encoder": factors}))
    plain, safe = (weights.use(Role("mug"), safe)("text_encoder")["t.q_proj.weight"] for safe in (False, True))
    assert (plain.dtype, safe.dtype) == (np.float16, np.float32)
    a, b = factors["t.q_proj"]
    np.testing.assert_allclose(safe, networks.own[twin]["t.q_proj.weight"] + a @ b, atol=1e-6)
