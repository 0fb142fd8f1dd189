"""Prompts on the device: both text encoders, attribute removal, and the rows that each stage gives the UNet.

Encoded prompts stay on the device, so a prompt that comes again (nearly always the negative one) is encoded once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from dreammix_trt.core.axes import Sides
from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.networks import flag_of, names_of_group, twin_name
from dreammix_trt.core.schedule import STAGES
from dreammix_trt.core.seam import Array, Bound, DeviceNetworks, Stream
from dreammix_trt.core.subject import Role
from dreammix_trt.engine.device.arena import Arena, Regions
from dreammix_trt.engine.device.room import choose_twin, try_capture
from dreammix_trt.engine.device.subjects import Layout, Subjects
from dreammix_trt.engine.drivers.device import CapturedGraph, Device
from dreammix_trt.engine.prompts import MOST_PROMPTS, Prompt, PromptPlan, RowSource

_SIDES = Sides(1, 1, 1, 1)
_TAS = 2 + 2 * TOKENS  # numbers of a TAS plan


def list_regions(networks: DeviceNetworks, pictures: int, rows: int, kept: int, context: int) -> Regions:
    """Memory for the encoders, encoded prompts, and the rows of both stages.

    pictures: the largest batch.
    rows: of a picture, 1 or 2.
    kept: encoded prompts that stay (at least all of one picture).
    context: rows of the longest condition.
    """
    kept = max(kept, MOST_PROMPTS)
    width, pooled = find_widths(networks)
    unet = {tensor.name: tensor.dtype for tensor in networks.inputs("unet")}
    wide = "float32" if twin_name("unet") in networks else unet["encoder_hidden_states"]
    found: dict[str, tuple[tuple[int, ...], str]] = {
        "kept tokens": ((kept, TOKENS, width), "float32"),
        "kept pooled": ((kept, pooled), "float32"),
        "less tokens": ((TOKENS, width), "float32"),
        "less pooled": ((1, pooled), "float32"),
        "stage tokens": ((len(STAGES), pictures * rows, context, width), wide),
        "stage pooled": ((len(STAGES), pictures * rows, pooled), wide),
        "pooled plan": ((_TAS,), "int32"),
        "joined": ((TOKENS, width), "float32"),
        "joined pooled": ((pooled,), "float32"),
    }
    for name in names_of_group("text"):
        for tensor in (*networks.inputs(name), *networks.outputs(name)):
            if "lora" not in tensor.name:
                dtype = "float32" if tensor.dtype == "float16" else tensor.dtype
                found[f"{name} {tensor.name}"] = (_SIDES.shape(tensor), dtype)
    return found


def find_widths(networks: DeviceNetworks) -> tuple[int, int]:
    """Numbers of a token and of a pooled vector."""
    inputs = {tensor.name: tensor.shape for tensor in networks.inputs("unet")}
    return int(inputs["encoder_hidden_states"][-1]), int(inputs["text_embeds"][-1])


class DeviceTexts:
    """Encodes a runtime's prompts on the device, and writes the rows of its conditions."""

    def __init__(
        self,
        device: Device,
        stream: Stream,
        networks: DeviceNetworks,
        arena: Arena,
        layout: Layout,
        subjects: Subjects,
        upload: Callable[[Array, np.ndarray], None],
    ) -> None:
        """Begin with nothing encoded.

        upload: copies values to the device, and waits.
        """
        self._device, self._stream, self._arena, self._subjects = device, stream, arena, subjects
        self._networks, self._layout = networks, layout
        self._kept: OrderedDict[tuple[str, Role, bytes], int] = OrderedDict()
        self._unproven: set[tuple[str, Role, bytes]] = set()
        self._encoders: dict[bool, _Encoders] = {}
        plan = np.zeros(_TAS, np.int32)
        plan[:2] = 1  # one row removed from one row: both are row 0
        upload(arena["pooled plan"], plan)

    def forget(self, subject: str | None = None) -> None:
        """Drop what was encoded.

        subject: only what was encoded with this subject's factors; None: all.
        """
        for key in [key for key in self._kept if subject is None or key[1].name == subject]:
            del self._kept[key]

    def settle(self, *, proven: bool) -> None:
        """Keep what was encoded since the last call, or drop it.

        proven: whether the values are known to be finite; nobody checked those of a request that was left.
        """
        if not proven:
            for key in self._unproven:
                self._kept.pop(key, None)
        self._unproven.clear()

    def lacks(self, plan: PromptPlan) -> bool:
        """Whether a plan has a prompt that is not encoded yet."""
        return any(prompt.key not in self._kept for prompt in plan.prompts)

    def compose(self, picture: int, context: int, dtype: str, plan: PromptPlan, *, safe: bool, capture: bool) -> None:
        """Encode what is missing and write the picture's rows of both stages.

        picture: its number in the batch.
        context: rows of the condition.
        dtype: the UNet's.
        safe: encode with the twins.
        capture: whether the encoders may be captured.

        The plan's ids, TAS plan and appended rows must be in the arena already.
        """
        for number, prompt in enumerate(plan.prompts):
            if prompt.key in self._kept:
                self._kept.move_to_end(prompt.key)
                continue
            self._subjects.enter_text(prompt.subject)
            slot = self._choose_slot({other.key for other in plan.prompts})
            ids = self._arena["ids"][picture * MOST_PROMPTS + number]
            self._encode(ids, slot, safe, capture)
            self._kept[prompt.key] = slot
            self._unproven.add(prompt.key)
        self._write_stages(picture, context, dtype, plan)

    def close(self) -> None:
        """Free what is bound. The device must be idle."""
        for encoders in self._encoders.values():
            encoders.close()
        self._encoders.clear()

    def _choose_slot(self, needed: set[tuple[str, Role, bytes]]) -> int:
        most = self._arena["kept tokens"].shape[0]
        free = set(range(most)) - set(self._kept.values())
        if free:
            return min(free)
        oldest = next(key for key in self._kept if key not in needed)
        return self._kept.pop(oldest)

    def _encode(self, ids: Array, slot: int, safe: bool, capture: bool) -> None:
        encoders = self._encoders.get(safe)
        if encoders is None:
            encoders = self._encoders[safe] = _Encoders(self._device, self._networks, self._arena, self._layout, safe)
        for k, name in enumerate(names_of_group("text")):
            self._device.copy(encoders.arrays[name]["input_ids"], ids[k], self._stream)
        encoders.play(self._stream, capture)
        self._device.copy(self._arena["kept tokens"][slot], self._arena["joined"], self._stream)
        self._device.copy(self._arena["kept pooled"][slot], self._arena["joined pooled"], self._stream)

    def rows_of(self, stage: int, context: int, dtype: str) -> tuple[Array, Array]:
        """The rows of a stage, (rows, context, D) and (rows, Dp).

        stage: its number.
        """
        tokens, pooled = self._arena["stage tokens"], self._arena["stage pooled"]
        stages, rows, _, width = tokens.shape
        return (
            tokens.reshape((stages, rows, context, width), dtype)[stage],
            pooled.reshape(pooled.shape, dtype)[stage],
        )

    def _write_stages(self, picture: int, context: int, dtype: str, plan: PromptPlan) -> None:
        sources: dict[RowSource, tuple[Array, Array] | None] = {"prompt": self._find_kept(plan.prompt), "zeros": None}
        if plan.negative is not None:
            sources["negative"] = self._find_kept(plan.negative)
        if plan.eliminated is not None:
            plain, arena = self._find_kept(plan.prompt), self._arena
            less = arena["less tokens"], arena["less pooled"].reshape(plain[1].shape)
            self._remove_attributes(picture, plain, self._find_kept(plan.eliminated), less)
            sources["decomposed"] = less
        for stage, name in enumerate(STAGES):
            tokens, pooled = self.rows_of(stage, context, dtype)
            rows = plan.stages[name]
            for number, row in enumerate(rows):
                place = picture * len(rows) + number
                self._write_tokens(tokens[place], sources[row.tokens], place, plan.extra)
                self._write(pooled[place], _part(sources[row.pooled], 1))

    def _write_tokens(self, place: Array, source: tuple[Array, Array] | None, row: int, extra: int) -> None:
        """Write a row's token rows, and the rows appended to them."""
        self._write(place.part(0, TOKENS), _part(source, 0))
        if extra:
            self._write(place.part(TOKENS, extra), self._arena["appended"].part(row * extra, extra))

    def _remove_attributes(
        self, picture: int, plain: tuple[Array, Array], removed: tuple[Array, Array], less: tuple[Array, Array]
    ) -> None:
        for to, source in zip(less, plain, strict=True):
            self._device.copy(to, source, self._stream)
        plans = (self._arena["tas plans"][picture], self._arena["pooled plan"])
        for tokens, away, plan, rows in zip(less, removed, plans, (TOKENS, 1), strict=True):
            self._device.launch_kernel(
                "tas", self._stream, tokens=tokens, removed=away, plan=plan, rows=rows, width=tokens.shape[-1]
            )

    def _write(self, place: Array, source: Array | None) -> None:
        """Fill a place in its type; None: with zeros."""
        if source is None:
            self._device.clear(place, self._stream)
        else:
            self._device.launch_kernel(
                "convert",
                self._stream,
                source=source,
                source_half=False,
                out=place,
                out_half=place.half,
                count=source.size,
            )

    def _find_kept(self, prompt: Prompt) -> tuple[Array, Array]:
        slot = self._kept[prompt.key]
        return self._arena["kept tokens"][slot], self._arena["kept pooled"][slot]


def _part(source: tuple[Array, Array] | None, number: int) -> Array | None:
    return None if source is None else source[number]


class _Encoders:
    """Both text encoders, bound for one prompt, and what joins their outputs."""

    def __init__(
        self,
        device: Device,
        networks: DeviceNetworks,
        arena: Arena,
        layout: Layout,
        safe: bool,
    ) -> None:
        self._device, self._arena = device, arena
        flags = arena["flags"]
        self._flags = flags.part(flags.shape[0] - 1, 1)  # the last one is the texts'
        self.arrays: dict[str, dict[str, Array]] = {}
        self._bound: dict[str, Bound] = {}
        self._graph: CapturedGraph | None = None
        self._plain = False  # cannot be captured
        try:
            for name in names_of_group("text"):
                actual = choose_twin(networks, name, safe)
                tensors = [t for t in (*networks.inputs(actual), *networks.outputs(actual)) if "lora" not in t.name]
                own = {t.name: arena[f"{name} {t.name}"].reshape(_SIDES.shape(t), t.dtype) for t in tensors}
                self.arrays[name] = own | layout.cut_arrays(name, arena["bound factors"], 1)
                self._bound[name] = networks.bind(actual, _SIDES, self.arrays[name], arena["workspace"])
        except BaseException:
            self.close()
            raise

    def play(self, stream: Stream, capture: bool) -> None:
        """Encode the bound ids into "joined" and "joined pooled"."""
        if self._graph is not None and capture:
            self._graph.launch(stream)
            return
        self._record(stream)
        if capture and not self._plain and all(bound.capturable for bound in self._bound.values()):
            self._graph = try_capture(self._device, stream, lambda: self._record(stream))
            self._plain = self._graph is None

    def close(self) -> None:
        if self._graph is not None:
            self._graph.close()
        for bound in self._bound.values():
            bound.close()

    def _record(self, stream: Stream) -> None:
        for bound in self._bound.values():
            bound.enqueue(stream)
        first, second = (self.arrays[name]["hidden"] for name in names_of_group("text"))
        pooled = self.arrays["text_encoder_2"]["pooled"]
        self._device.launch_kernel(
            "join_text",
            stream,
            first=first,
            second=second,
            out=self._arena["joined"],
            rows=TOKENS,
            first_width=first.shape[-1],
            second_width=second.shape[-1],
            half=first.half,
            flags=self._flags,
            first_bit=flag_of("text_encoder"),
            second_bit=flag_of("text_encoder_2"),
        )
        self._device.launch_kernel(
            "convert",
            stream,
            source=pooled,
            source_half=pooled.half,
            out=self._arena["joined pooled"],
            out_half=False,
            count=pooled.size,
        )
