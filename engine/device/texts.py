"""Prompts on the device: both text encoders, attribute removal, and the rows each stage tells the UNet.

Encoded prompts stay on the device, so a prompt that comes again (the negative one nearly always) is encoded once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.request import Request
from dreammix_trt.engine.device.arena import Arena, Regions
from dreammix_trt.engine.device.jobs import PROMPTS
from dreammix_trt.engine.device.records import FLAGS
from dreammix_trt.engine.device.room import captured, named
from dreammix_trt.engine.device.subjects import TEXT_ENCODERS, Layout, Subjects
from dreammix_trt.engine.drivers.device import Array, Device, Graph, Stream
from dreammix_trt.engine.seam import Bound, DeviceNetworks, Sides
from dreammix_trt.engine.text import LENGTH, TasPlan, Tokenizer, plan_tas

I64 = npt.NDArray[np.int64]
STAGES = ("lcg", "gch")
_SIDES = Sides(1, 1, 1, 1)
_WHOLE = 2 + 2 * LENGTH


class Wanted(NamedTuple):
    """A prompt to be encoded with a subject's factors; ids int64 (2, 77), of both encoders."""

    prompt: str
    subject: str
    ids: I64

    @property
    def key(self) -> tuple[str, str, bytes]:
        return self.prompt, self.subject, self.ids.tobytes()


class PictureTexts(NamedTuple):
    """The prompts of one picture: its own, what TAS takes attributes from, the negative one; plan: of TAS."""

    positive: Wanted
    eliminated: Wanted | None
    negative: Wanted | None
    plan: TasPlan | None

    @property
    def all(self) -> list[Wanted]:
        return [wanted for wanted in (self.positive, self.eliminated, self.negative) if wanted is not None]


def texts_of(tokenizers: Sequence[Tokenizer], request: Request, subject: str, token: str) -> PictureTexts:
    """Tokenise what a request needs. InputError for a prompt too long, or TAS without the subject's token."""

    def wanted(prompt: str) -> Wanted:
        ids = np.stack([tokenizer.encode(prompt, request.truncate_prompt) for tokenizer in tokenizers])
        return Wanted(prompt, subject, ids)

    plan = eliminated = negative = None
    positive = wanted(request.prompt)
    if request.substitute:
        prefix = f"a photo of a {token}" if request.substitute_prefix is None else request.substitute_prefix
        plan = plan_tas(tokenizers[0], request.prompt, request.substitute, prefix, request.indexing, token)
        eliminated = wanted(plan.text)
    if request.guided and request.negative_prompt is not None:
        negative = wanted(request.negative_prompt)
    return PictureTexts(positive, eliminated, negative, plan)


def plan_record(plan: TasPlan | None) -> npt.NDArray[np.int32]:
    """int32 (156,): how many rows are removed and projected, then both lists, each with room for 77; what the kernel
    `tas` reads."""
    record = np.zeros(_WHOLE, np.int32)
    if plan is not None:
        record[:2] = len(plan.removed), len(plan.projected)
        for start, rows in ((2, plan.removed), (2 + LENGTH, plan.projected)):
            record[start : start + len(rows)] = rows
    return record


def regions(networks: DeviceNetworks, pictures: int, rows: int, kept: int) -> Regions:
    """Memory for the encoders, `kept` encoded prompts (at least all of one picture's), and the rows of both stages.
    rows: a picture, 1 or 2."""
    kept = max(kept, PROMPTS)
    width, pooled = widths(networks)
    unet = {tensor.name: tensor.dtype for tensor in networks.inputs("unet")}
    wide = "float32" if "unet_float32" in networks else unet["encoder_hidden_states"]
    found: dict[str, tuple[tuple[int, ...], str]] = {
        "kept tokens": ((kept, LENGTH, width), "float32"), "kept pooled": ((kept, pooled), "float32"),
        "less tokens": ((LENGTH, width), "float32"), "less pooled": ((1, pooled), "float32"),
        "stage tokens": ((len(STAGES), pictures * rows, LENGTH, width), wide),
        "stage pooled": ((len(STAGES), pictures * rows, pooled), wide),
        "pooled plan": ((_WHOLE,), "int32"),
        "joined": ((LENGTH, width), "float32"), "joined pooled": ((pooled,), "float32"),
    }  # fmt: skip
    for name in TEXT_ENCODERS:
        for tensor in (*networks.inputs(name), *networks.outputs(name)):
            if "lora" not in tensor.name:
                dtype = "float32" if tensor.dtype == "float16" else tensor.dtype
                found[f"{name} {tensor.name}"] = (_SIDES.shape(tensor), dtype)
    return found


def widths(networks: DeviceNetworks) -> tuple[int, int]:
    """Numbers a token and a pooled vector have."""
    inputs = {tensor.name: tensor.shape for tensor in networks.inputs("unet")}
    return int(inputs["encoder_hidden_states"][-1]), int(inputs["text_embeds"][-1])


class Texts:
    """The text side of a runtime."""

    def __init__(
        self, device: Device, stream: Stream, networks: DeviceNetworks, arena: Arena, layout: Layout,
        subjects: Subjects, workspace: Array, flags: Array, upload: Callable[[Array, np.ndarray], None],
    ) -> None:  # fmt: skip
        """upload: brings values to the device, and waits."""
        self._device, self._stream, self._arena, self._subjects, self._flags = device, stream, arena, subjects, flags
        self._networks, self._layout, self._workspace = networks, layout, workspace
        self._kept: OrderedDict[tuple[str, str, bytes], int] = OrderedDict()
        self._unproven: set[tuple[str, str, bytes]] = set()
        self._encoders: dict[bool, _Encoders] = {}
        plan = np.zeros(_WHOLE, np.int32)
        plan[:2] = 1  # one row removed from one row: both are row 0
        upload(arena["pooled plan"], plan)

    def forget(self, subject: str | None = None) -> None:
        """Drop what was encoded (with a subject's factors)."""
        for key in [key for key in self._kept if subject is None or key[1] == subject]:
            del self._kept[key]

    def settle(self, *, proven: bool) -> None:
        """Keep what was encoded since the last call, or drop it: of a request that was left, no one has seen whether
        its values are finite."""
        if not proven:
            for key in self._unproven:
                self._kept.pop(key, None)
        self._unproven.clear()

    def missing(self, texts: PictureTexts) -> bool:
        """Whether something of it is not encoded yet."""
        return any(wanted.key not in self._kept for wanted in texts.all)

    def tell(
        self, picture: int, rows: int, dtype: str, texts: PictureTexts, request: Request, *, safe: bool, capture: bool
    ) -> None:
        """Encode what is missing and write the picture's rows of both stages in the UNet's dtype; its prompts' ids and
        TAS plan lie in the arena already ("ids", "tas plans")."""
        for number, wanted in enumerate(texts.all):
            if wanted.key in self._kept:
                self._kept.move_to_end(wanted.key)
                continue
            self._subjects.for_text(wanted.subject)
            slot = self._slot({other.key for other in texts.all})
            ids = self._arena["ids"][picture * PROMPTS + number]
            self._encode(ids, slot, safe, capture)
            self._kept[wanted.key] = slot
            self._unproven.add(wanted.key)
        self._compose(picture, rows, dtype, texts, request)

    def close(self) -> None:
        """Free what is bound; the device must be idle."""
        for encoders in self._encoders.values():
            encoders.close()
        self._encoders.clear()

    def _slot(self, needed: set[tuple[str, str, bytes]]) -> int:
        most = self._arena["kept tokens"].shape[0]
        free = set(range(most)) - set(self._kept.values())
        if free:
            return min(free)
        oldest = next(key for key in self._kept if key not in needed)
        return self._kept.pop(oldest)

    def _encode(self, ids: Array, slot: int, safe: bool, capture: bool) -> None:
        encoders = self._encoders.get(safe)
        if encoders is None:
            encoders = self._encoders[safe] = _Encoders(
                self._device, self._networks, self._arena, self._layout, self._workspace, self._flags, safe
            )
        for k, name in enumerate(TEXT_ENCODERS):
            self._device.copy(encoders.arrays[name]["input_ids"], ids[k], self._stream)
        encoders.play(self._stream, capture)
        self._device.copy(self._arena["kept tokens"][slot], self._arena["joined"], self._stream)
        self._device.copy(self._arena["kept pooled"][slot], self._arena["joined pooled"], self._stream)

    def rows_of(self, stage: int, dtype: str) -> tuple[Array, Array]:
        """The rows of a stage, (rows, 77, D) and (rows, Dp)."""
        regions = self._arena["stage tokens"], self._arena["stage pooled"]
        tokens, pooled = (region.reshaped(region.shape, dtype)[stage] for region in regions)
        return tokens, pooled

    def _compose(self, picture: int, rows: int, dtype: str, texts: PictureTexts, request: Request) -> None:
        arena = self._arena
        plain = self._kept_of(texts.positive)
        less = plain
        if texts.eliminated is not None:
            less = arena["less tokens"], arena["less pooled"].reshaped(plain[1].shape)
            self._take_away(picture, plain, self._kept_of(texts.eliminated), less)
        for stage, name in enumerate(STAGES):
            chosen = (
                less[0] if f"tokens_{name}" in request.tas_stages else plain[0],
                less[1] if f"pooled_{name}" in request.tas_stages else plain[1],
            )
            negative = None if texts.negative is None else self._kept_of(texts.negative)
            for row, source in enumerate([negative, chosen][2 - rows :]):
                self._write(self.rows_of(stage, dtype), picture * rows + row, source)

    def _take_away(
        self, picture: int, plain: tuple[Array, Array], removed: tuple[Array, Array], less: tuple[Array, Array]
    ) -> None:
        for to, source in zip(less, plain, strict=True):
            self._device.copy(to, source, self._stream)
        plans = (self._arena["tas plans"][picture], self._arena["pooled plan"])
        for tokens, away, plan, rows in zip(less, removed, plans, (LENGTH, 1), strict=True):
            self._device.kernel(
                "tas", self._stream, tokens=tokens, removed=away, plan=plan, rows=rows, width=tokens.shape[-1]
            )

    def _write(self, places: tuple[Array, Array], row: int, source: tuple[Array, Array] | None) -> None:
        """Put a row of a stage; None: zeros."""
        for place, array in zip(places, source or (None, None), strict=True):
            if array is None:
                self._device.clear(place[row], self._stream)
            else:
                self._device.kernel(
                    "convert", self._stream, source=array, source_half=False, out=place[row], out_half=place.half,
                    count=array.size,
                )  # fmt: skip

    def _kept_of(self, wanted: Wanted) -> tuple[Array, Array]:
        slot = self._kept[wanted.key]
        return self._arena["kept tokens"][slot], self._arena["kept pooled"][slot]


class _Encoders:
    """Both text encoders, bound for one prompt, and what joins their outputs."""

    def __init__(
        self, device: Device, networks: DeviceNetworks, arena: Arena, layout: Layout, workspace: Array, flags: Array,
        safe: bool,
    ) -> None:  # fmt: skip
        self._device, self._arena, self._flags = device, arena, flags
        self.arrays: dict[str, dict[str, Array]] = {}
        self._bound: dict[str, Bound] = {}
        self._graph: Graph | None = None
        self._plain = False  # cannot be captured
        try:
            for name in TEXT_ENCODERS:
                actual = named(networks, name, safe)
                tensors = [t for t in (*networks.inputs(actual), *networks.outputs(actual)) if "lora" not in t.name]
                own = {t.name: arena[f"{name} {t.name}"].reshaped(_SIDES.shape(t), t.dtype) for t in tensors}
                self.arrays[name] = own | layout.arrays(name, arena["bound factors"], 1)
                self._bound[name] = networks.bind(actual, _SIDES, self.arrays[name], workspace)
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
            self._graph = captured(self._device, stream, lambda: self._record(stream))
            self._plain = self._graph is None

    def close(self) -> None:
        if self._graph is not None:
            self._graph.close()
        for bound in self._bound.values():
            bound.close()

    def _record(self, stream: Stream) -> None:
        for bound in self._bound.values():
            bound.enqueue(stream)
        first, second = (self.arrays[name]["hidden"] for name in TEXT_ENCODERS)
        pooled = self.arrays["text_encoder_2"]["pooled"]
        self._device.kernel(
            "join_text", stream, first=first, second=second, out=self._arena["joined"], rows=LENGTH,
            first_width=first.shape[-1], second_width=second.shape[-1], half=first.half, flags=self._flags,
            first_bit=FLAGS["text_encoder"], second_bit=FLAGS["text_encoder_2"],
        )  # fmt: skip
        self._device.kernel(
            "convert", stream, source=pooled, source_half=pooled.half, out=self._arena["joined pooled"], out_half=False,
            count=pooled.size,
        )  # fmt: skip
