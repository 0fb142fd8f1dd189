"""ASUKA's prior on a device: what it expects in a frame's hole, as rows of a condition (docs/algorithm.md, 16).

It sees its pictures at its own side, so they are cut and shrunk on the host and uploaded with the batch. The rest stays
on the device.
"""

from __future__ import annotations

from dreammix_trt.core.networks import flag_of
from dreammix_trt.core.schedule import Stage
from dreammix_trt.core.seam import Array, DeviceNetworks
from dreammix_trt.engine.device.arena import Regions
from dreammix_trt.engine.device.texts import DeviceTexts
from dreammix_trt.engine.device.tools import RoomTools

NAME = "asuka_prior"


def count_rows(networks: DeviceNetworks) -> int:
    """Rows of the condition that the prior makes; 0: there is none."""
    return _measure(networks)[0]


def list_regions(networks: DeviceNetworks) -> Regions:
    """Memory for the prior's weighted rows."""
    rows, width, pooled = _measure(networks)
    if not rows:
        return {}
    return {
        "prior tokens": ((rows, width), "float32"),
        "prior pooled": ((pooled,), "float32"),
        "no tokens": ((max(rows * width, pooled),), "float32"),  # zeros
    }


def _measure(networks: DeviceNetworks) -> tuple[int, int, int]:
    """Rows of the condition, numbers of a row, and of the pooled vector."""
    if NAME not in networks:
        return 0, 0, 0
    shapes = {tensor.name: tensor.shape for tensor in networks.outputs(NAME)}
    return int(shapes["context"][1]), int(shapes["context"][2]), int(shapes["pooled"][1])


class Prior:
    """ASUKA's prior in one room."""

    def __init__(self, tools: RoomTools, texts: DeviceTexts) -> None:
        self._tools, self._texts = tools, texts

    def ask(self, k: int, number: int, stage: Stage, *, beside: bool) -> None:
        """Write the prior's rows into picture k's condition of a stage.

        number: of the stage, in their order.
        beside: whether they follow the text's, see `DeviceTexts.write_prior`.
        """
        tools, arrays = self._tools, self._tools.room.arrays[NAME]
        shown = tools.arena["prior pictures"][k][number]
        tools.convert(shown.part(0, 3), arrays["image"])
        tools.convert(shown.part(3, 1), arrays["mask"])
        tools.room.enqueue(NAME, tools.stream)
        tokens, pooled = tools.arena["prior tokens"], tools.arena["prior pooled"]
        tools.device.clear(tools.arena["no tokens"], tools.stream)
        for source, out in ((arrays["context"], tokens), (arrays["pooled"], pooled)):
            self._weigh(k, source, out)
        shape, dtype = tools.room.shape, tools.room.texts[0].dtype
        self._texts.write_prior(k, stage, shape, dtype, tokens, pooled, beside=beside)

    def _weigh(self, k: int, source: Array, out: Array) -> None:
        """Check an output, and multiply it by picture k's weight: the empty condition is zeros."""
        tools = self._tools
        tools.launch(
            "check_finite", values=source, count=source.size, half=source.half, flags=tools.flag(k), bit=flag_of(NAME)
        )
        tools.convert(source, out)
        tools.launch(
            "weigh_text",
            tokens=out,
            empty=tools.arena["no tokens"],
            weights=tools.arena["prior weights"].part(k, 1),
            rows=1,
            first_width=out.size,
            width=out.size,
        )
