"""Prompts on the device: both text encoders, attribute removal, and the rows that each stage gives the UNet.

Encoded prompts stay on the device, so a prompt that comes again (nearly always the negative one) is encoded once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from dreammix_trt.core.axes import Sides
from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.networks import flag_of, kv_name, names_of_group, twin_name
from dreammix_trt.core.schedule import STAGES, Stage
from dreammix_trt.core.seam import Array, Bound, DeviceNetworks, Stream
from dreammix_trt.core.slots import names_of_weights
from dreammix_trt.engine.device.arena import Arena, Regions
from dreammix_trt.engine.device.blocks import measure_tas_plan
from dreammix_trt.engine.device.captures import Graphs, Tally
from dreammix_trt.engine.device.choices import Chosen
from dreammix_trt.engine.device.room import RoomShape, choose_twin, find_obstacle
from dreammix_trt.engine.device.weights import DeviceWeights
from dreammix_trt.engine.drivers.device import Device, Memory
from dreammix_trt.engine.prompts import Key, Prompt, PromptPlan, RowSource, count_prompts

_SIDES = Sides(1, 1, 1, 1)
Sources = list[tuple[Array, Array]]  # of each chunk: its token rows (77, D) and its pooled vector (Dp,)


def list_regions(networks: DeviceNetworks, pictures: int, rows: int, kept: int, context: int) -> Regions:
    """Memory for the encoders, encoded prompts, and the rows of both stages.

    pictures: the largest batch.
    rows: of a picture, 1 or 2.
    kept: encoded prompts that stay (at least all of one picture).
    context: rows of the longest condition.
    """
    kept, text_rows = max(kept, count_prompts(context)), TOKENS * (context // TOKENS)
    width, pooled = find_widths(networks)
    told = {tensor.name: tensor.dtype for tensor in networks.inputs(kv_name("unet"))}
    wide = "float32" if twin_name("unet") in networks else told["encoder_hidden_states"]
    found: dict[str, tuple[tuple[int, ...], str]] = {
        "kept tokens": ((kept, TOKENS, width), "float32"),
        "kept pooled": ((kept, pooled), "float32"),
        "less tokens": ((text_rows, width), "float32"),
        "less pooled": ((1, pooled), "float32"),
        "stage tokens": ((len(STAGES), pictures * rows, context, width), wide),
        "stage pooled": ((len(STAGES), pictures * rows, pooled), wide),
        "pooled plan": ((measure_tas_plan(1),), "int32"),
        "joined": ((TOKENS, width), "float32"),
        "joined pooled": ((pooled,), "float32"),
    }
    for name in names_of_group("text"):
        weights = names_of_weights(networks.slots(name))
        for tensor in (*networks.inputs(name), *networks.outputs(name)):
            if tensor.name not in weights:
                dtype = "float32" if tensor.dtype == "float16" else tensor.dtype
                found[f"{name} {tensor.name}"] = (_SIDES.shape(tensor), dtype)
    return found


def find_widths(networks: DeviceNetworks) -> tuple[int, int]:
    """Numbers of a token and of a pooled vector."""
    inputs = {tensor.name: tensor.shape for name in (kv_name("unet"), "unet") for tensor in networks.inputs(name)}
    return int(inputs["encoder_hidden_states"][-1]), int(inputs["text_embeds"][-1])


class DeviceTexts:
    """Encodes a runtime's prompts on the device, and writes the rows of its conditions."""

    def __init__(
        self,
        device: Device,
        stream: Stream,
        networks: DeviceNetworks,
        arena: Arena,
        weights: DeviceWeights,
        upload: Callable[[Array, np.ndarray], None],
        tally: Tally,
    ) -> None:
        """Begin with nothing encoded.

        upload: copies values to the device, and waits.
        tally: counts how the encoders run.
        """
        self._device, self._stream, self._networks = device, stream, networks
        self._arena, self._weights, self._tally = arena, weights, tally
        self._kept: OrderedDict[Key, int] = OrderedDict()
        self._unproven: set[Key] = set()
        self._encoders: dict[bool, _Encoders] = {}
        upload(arena["pooled plan"], np.array([1, 1, 0, 0], np.int32))  # one row removed from one row: both are row 0

    def forget(self, subject: str | None = None) -> None:
        """Drop what was encoded.

        subject: only what was encoded with this subject's factors; None: all.
        """
        for key in [key for key in self._kept if subject is None or key[0].name == subject]:
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

    def compose(
        self,
        picture: int,
        shapes: Mapping[Stage, RoomShape],
        dtype: str,
        plan: PromptPlan,
        chosen: Chosen,
        *,
        safe: bool,
        capture: bool,
    ) -> None:
        """Encode what is missing and write the picture's rows of each stage, but for those of ASUKA's prior.

        picture: its number in the batch.
        shapes: of the stages' rooms.
        dtype: the UNet's.
        chosen: what the plan's subject means in this request.
        safe: encode with the twins.
        capture: whether the encoders may be captured.

        The plan's ids, weights, TAS plan and appended rows must be in the arena already.
        """
        prompts = plan.prompts
        for number, prompt in enumerate(prompts):
            if prompt.key in self._kept:
                self._kept.move_to_end(prompt.key)
                continue
            self._weights.enter(chosen, names_of_group("text"))
            slot = self._choose_slot({other.key for other in prompts})
            place = picture * count_prompts(plan.text_rows) + number
            self._encode(self._arena["ids"][place], slot, safe, capture)
            if prompt.weights is not None and plan.empty is not None:
                self._weigh(self._arena["text weights"][place], slot, self._find_kept(plan.empty)[0])
            self._kept[prompt.key] = slot
            self._unproven.add(prompt.key)
        self._write_stages(picture, shapes, dtype, plan)

    def leave(self) -> None:
        """End a request: free what is bound of twins. The device must be idle."""
        if True in self._encoders:
            self._encoders.pop(True).close()

    def close(self) -> None:
        """Free what is bound. The device must be idle."""
        for encoders in self._encoders.values():
            encoders.close()
        self._encoders.clear()

    def _choose_slot(self, needed: set[Key]) -> int:
        most = self._arena["kept tokens"].shape[0]
        free = set(range(most)) - set(self._kept.values())
        if free:
            return min(free)
        oldest = next(key for key in self._kept if key not in needed)
        return self._kept.pop(oldest)

    def _encode(self, ids: Array, slot: int, safe: bool, capture: bool) -> None:
        encoders = self._encoders.get(safe)
        if encoders is None:
            encoders = _Encoders(self._device, self._networks, self._arena, self._weights, self._tally, safe)
            self._encoders[safe] = encoders
        for k, name in enumerate(names_of_group("text")):
            self._device.copy(encoders.arrays[name]["input_ids"], ids[k], self._stream)
        encoders.play(self._stream, capture)
        self._device.copy(self._arena["kept tokens"][slot], self._arena["joined"], self._stream)
        self._device.copy(self._arena["kept pooled"][slot], self._arena["joined pooled"], self._stream)

    def _weigh(self, weights: Array, slot: int, empty: Array) -> None:
        tokens = self._arena["kept tokens"][slot]
        outputs = {tensor.name: tensor.shape for tensor in self._networks.outputs(names_of_group("text")[0])}
        self._device.launch_kernel(
            "weigh_text",
            self._stream,
            tokens=tokens,
            empty=empty,
            weights=weights,
            rows=TOKENS,
            first_width=int(outputs["hidden"][-1]),
            width=tokens.shape[-1],
        )

    def rows_of(self, stage: Stage, shape: RoomShape, dtype: str) -> list[tuple[Array, Array]]:
        """The rows of a stage for each call of its room, (rows, context, D) and (rows, Dp)."""
        number, found, token, row = STAGES.index(stage), [], 0, 0
        tokens, pooled = self._arena["stage tokens"][number], self._arena["stage pooled"][number]
        width = tokens.shape[-1]
        tokens, pooled = tokens.reshape((tokens.size // width, width), dtype), pooled.reshape(pooled.shape, dtype)
        for sides in shape.calls:
            part = tokens.part(token, sides.rows * sides.context).reshape((sides.rows, sides.context, width))
            found.append((part, pooled.part(row, sides.rows)))
            token, row = token + sides.rows * sides.context, row + sides.rows
        return found

    def write_prior(
        self, picture: int, stage: Stage, shape: RoomShape, dtype: str, tokens: Array, pooled: Array, *, beside: bool
    ) -> None:
        """Write the rows of ASUKA's prior into a stage's condition.

        tokens, pooled: float32 (T, D) and (Dp,).
        beside: they follow the text's and a subject's in each of the picture's rows; else they and a subject's are its
            negative, or only, row.
        """
        places, vectors = self.rows_of(stage, shape, dtype)[0]
        count, each = tokens.shape[0], shape.rows_per_picture
        if not beside:
            self._write(places[picture].part(0, count), tokens)
            extra = places.shape[1] - count
            if extra:
                appended = self._arena["appended"].part(picture * each * extra, extra)
                self._write(places[picture].part(count, extra), appended)
            self._write(vectors[picture], pooled)
            return
        for row in range(picture * each, (picture + 1) * each):
            self._write(places[row].part(shape.context - count, count), tokens)

    def _write_stages(self, picture: int, shapes: Mapping[Stage, RoomShape], dtype: str, plan: PromptPlan) -> None:
        sources: dict[RowSource, Sources] = {"prompt": [self._find_kept(prompt) for prompt in plan.prompt], "zeros": []}
        sources["negative"] = [self._find_kept(prompt) for prompt in plan.negative]
        if plan.eliminated is not None:
            sources["decomposed"] = self._remove_attributes(picture, plan, self._find_kept(plan.eliminated))
        for stage, shape in shapes.items():
            calls, rows = self.rows_of(stage, shape, dtype), plan.stages[stage]
            first = len(calls) - 1  # with two calls the negative row is the prior's
            for number, row in enumerate(rows[first:], first):
                tokens, pooled = calls[first]
                place = picture if first else picture * len(rows) + number
                self._write_tokens(tokens[place], sources[row.tokens], picture * len(rows) + number, plan)
                self._write(pooled[place], sources[row.pooled][0][1] if sources[row.pooled] else None)

    def _write_tokens(self, place: Array, chunks: Sources, row: int, plan: PromptPlan) -> None:
        """Write a row's token rows, and the rows appended to them."""
        for n in range(len(plan.prompt)):
            self._write(place.part(n * TOKENS, TOKENS), chunks[n][0] if chunks else None)
        if plan.extra:
            appended = self._arena["appended"].part(row * plan.extra, plan.extra)
            self._write(place.part(plan.text_rows, plan.extra), appended)

    def _remove_attributes(self, picture: int, plan: PromptPlan, removed: tuple[Array, Array]) -> Sources:
        """The prompt's chunks without the removed directions; the pooled vector is the first one's."""
        rows = plan.text_rows
        tokens, pooled = self._arena["less tokens"].part(0, rows), self._arena["less pooled"]
        chunks = [(tokens.part(n * TOKENS, TOKENS), pooled[0]) for n in range(len(plan.prompt))]
        for (to, _), prompt in zip(chunks, plan.prompt, strict=True):
            self._device.copy(to, self._find_kept(prompt)[0], self._stream)
        self._device.copy(pooled[0], self._find_kept(plan.prompt[0])[1], self._stream)
        size, plans = measure_tas_plan(rows), self._arena["tas plans"]
        own = plans.reshape((plans.size,)).part(picture * size, size)
        for array, away, numbers, count in (
            (tokens, removed[0], own, rows),
            (pooled, removed[1], self._arena["pooled plan"], 1),
        ):
            self._device.launch_kernel(
                "tas", self._stream, tokens=array, removed=away, plan=numbers, rows=count, width=array.shape[-1]
            )
        return chunks

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


class _Encoders:
    """Both text encoders, bound for one prompt, and what joins their outputs."""

    def __init__(
        self,
        device: Device,
        networks: DeviceNetworks,
        arena: Arena,
        weights: DeviceWeights,
        tally: Tally,
        safe: bool,
    ) -> None:
        self._device, self._arena = device, arena
        flags = arena["flags"]
        self._flags = flags.part(flags.shape[0] - 1, 1)  # the last one is the texts'
        self.arrays: dict[str, dict[str, Array]] = {}
        self._bound: dict[str, Bound] = {}
        self._memory: Memory | None = None
        self._graphs = Graphs(device, tally)
        self._name = "text, in float32" if safe else "text"
        try:
            chosen = {name: choose_twin(networks, name, safe) for name in names_of_group("text")}
            workspace = self._find_workspace(networks, chosen.values())
            for name, actual in chosen.items():
                merged = weights.arrays(name)
                tensors = [t for t in (*networks.inputs(actual), *networks.outputs(actual)) if t.name not in merged]
                own = {t.name: arena[f"{name} {t.name}"].reshape(_SIDES.shape(t), t.dtype) for t in tensors}
                self.arrays[name] = own | dict(merged)
                self._bound[name] = networks.bind(actual, _SIDES, self.arrays[name], workspace)
        except BaseException:
            self.close()
            raise

    def play(self, stream: Stream, capture: bool) -> None:
        """Encode the bound ids into "joined" and "joined pooled"."""
        self._graphs.play(
            self._name,
            lambda: self._record(stream),
            stream,
            capture=capture,
            find_obstacle=lambda: find_obstacle(self._bound.items()),
        )

    def close(self) -> None:
        self._graphs.close()
        for bound in self._bound.values():
            bound.close()
        if self._memory is not None:
            self._memory.free()

    def _find_workspace(self, networks: DeviceNetworks, names: Iterable[str]) -> Array:
        """The scratch memory that all share, or their own where twins need more."""
        shared, need = self._arena["workspace"], max(networks.workspace_bytes(name, _SIDES) for name in names)
        if need <= shared.nbytes:
            return shared
        self._memory = self._device.allocate(need)
        return Array(self._memory.pointer, (need,), "uint8")

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
