"""Subjects' factors on the device: every one in its place, whatever inputs an engine has kept."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.axes import Tensor
from dreammix_trt.core.slots import Slot
from dreammix_trt.core.subject import Role, Subject, read_subject
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.device.arena import Arena
from dreammix_trt.engine.device.subjects import Layout, Subjects
from dreammix_trt.engine.drivers.simulated import SimulatedDevice
from tests.engine.device.test_studio import paint_pixels
from tests.engine.device.test_studio_more import assert_alike

SLOTS = {
    "unet": (Slot("down.0", 6, 4, 2), Slot("mid.0", 3, 5, 2), Slot("up.0", 8, 2, 2)),
    "text_encoder": (Slot("layers.0", 5, 5, 2), Slot("layers.1", 5, 5, 2)),
    "text_encoder_2": (Slot("layers.0", 7, 3, 2),),
}


class Networks:
    """Networks that take factors as inputs of their own, but for some."""

    def __init__(self, unread: Collection[tuple[str, str]]) -> None:
        self._unread = unread

    def __contains__(self, name: str) -> bool:
        return name in SLOTS

    def slots(self, name: str) -> tuple[Slot, ...]:
        return SLOTS[name]

    def inputs(self, name: str) -> tuple[Tensor, ...]:
        return tuple(
            Tensor(factor, "float16", ("pictures", *shape))
            for slot in SLOTS[name]
            for factor, shape in slot.factors
            if (name, slot.module) not in self._unread
        )


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize(
    "unread", [(), (("text_encoder", "layers.1"),), (("unet", "mid.0"), ("text_encoder", "layers.0"))], ids=str
)
def test_every_factor_comes_to_its_own_input(unread: Collection[tuple[str, str]], pictures: int) -> None:
    rng = np.random.default_rng(0)
    factors = {
        network: {
            slot.module: (
                rng.standard_normal((slot.inputs, 2), np.float32),
                rng.standard_normal((2, slot.outputs), np.float32),
            )
            for slot in slots
        }
        for network, slots in SLOTS.items()
    }
    networks: Any = Networks(unread)
    with SimulatedDevice() as device:
        stream = device.make_stream()
        layout = Layout(networks, pictures)
        arena = Arena(device, layout.list_regions(1))
        subjects = Subjects(device, stream, layout, arena, lambda: device.synchronize(stream))
        subjects.add("mug", Subject("mug", "sks", "mug", factors))
        subjects.enter([Role("mug")] * pictures)
        subjects.enter_text(Role("mug"))
        device.synchronize(stream)
        for network, slots in SLOTS.items():
            bound = layout.cut_arrays(network, arena["bound factors"], pictures)
            assert bound.keys() == {tensor.name for tensor in networks.inputs(network)}
            for slot in slots:
                for (name, _), values in zip(slot.factors, factors[network][slot.module], strict=True):
                    if name in bound:
                        for row in device.view(bound[name]):
                            np.testing.assert_array_equal(row, values.astype(np.float16))


def test_an_engine_without_the_factors_nothing_reads_paints_the_same(
    simulated: Any, host: DreamMix, mug_engine: Path, opened: Any
) -> None:
    """The first text encoder gives its last but one layer, so engines have no input for the last one's factors."""
    networks = opened[0]
    last = max(slot.module for slot in networks.slots("text_encoder"))
    layer = last[: last.index("self_attn")]
    unread = [
        factor for slot in networks.slots("text_encoder") if slot.module.startswith(layer) for factor, _ in slot.factors
    ]
    rng = np.random.default_rng(1)
    everywhere = {
        network: {
            slot.module: (
                0.3 * rng.standard_normal((slot.inputs, 2), np.float32),
                0.3 * rng.standard_normal((2, slot.outputs), np.float32),
            )
            for slot in networks.slots(network)
        }
        for network in ("text_encoder", "unet")
    }
    subject = replace(read_subject(next((mug_engine / "subjects").glob("*.safetensors"))), factors=everywhere)
    dm, _, _ = simulated(networks={"factors": True, "unread": unread})
    for each in (dm, host):
        each._roster.add(subject, "everywhere")
    got, expected, without = (
        paint_pixels(each, subject=name).astype(int)
        for each, name in ((dm, "everywhere"), (host, "everywhere"), (host, ""))
    )
    assert_alike([got], [expected])
    assert (expected != without).any()
