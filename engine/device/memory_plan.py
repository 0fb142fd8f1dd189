"""How an engine set uses a device's memory. The plan is made before the first request and can be printed.

It covers weights, the workspace that all networks share (they never run at once), the arena's regions and a reserve.
Where not everything fits, the base's own weights of LoRA slots stay with the host, and a subject's swap takes longer.
Where that is not enough the raw UNet is omitted, and where that is not enough networks take turns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Final

from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.errors import InputError, OutOfMemoryError
from dreammix_trt.core.files import size_text
from dreammix_trt.core.networks import is_twin, kind_of, list_groups, names_of_group, plain_name, twin_name
from dreammix_trt.core.seam import DeviceNetworks
from dreammix_trt.engine.device.slot_layout import (
    PIECES,
    SHARED,
    Pristine,
    SlottedNetwork,
    keeps_pristine,
    measure_weights,
)

MIB: Final = 1 << 20

#: What helps where memory is short, in the order in which it is tried.
STRATEGIES: Final = ("resident", "one-unet", "swap")
_CHOICES: Final[tuple[tuple[str, Pristine], ...]] = (
    ("resident", "device"),
    ("resident", "host"),
    ("one-unet", "device"),
    ("one-unet", "host"),
    ("swap", "host"),
)

# For what cannot be measured beforehand: kernels that the driver loads or TensorRT-RTX compiles at their first use,
# their local memory, rounding of allocations to 2 MiB, and what a desktop takes meanwhile. It does not include the
# context, which exists already when free memory is measured. An estimate.
_RESERVE: Final = 512 * MIB
# A step of SDXL is some thousand kernels, and a shape keeps graphs of both UNets and of the phases around. An estimate.
_GRAPHS_OF_A_SHAPE: Final = 32 * MIB


@dataclass(frozen=True)
class Options:
    """What a runtime is loaded for. Memory is set aside for all of it.

    pictures: the largest batch.
    largest_picture: width times height of the largest picture that a request may bring. It takes some twenty bytes of
        device memory a pixel. Larger pictures are refused.
    subjects: for how many there is memory for factors on the device, of rank 8 and for one UNet; larger ones take the
        room of several, and those without room are uploaded again when a request needs them.
    texts: how many prompts stay encoded there; others are encoded again.
    shapes: how many frame sizes (and batch sizes) keep graphs.
    context: the most rows of the text condition, where the engines take any number; 77 for each 75 tokens of a prompt.
        A subject's tokens are not counted; they have room where the base has a token adapter.
    residency: "resident": all networks stay. "one-unet": unet_raw is omitted and all steps run on the inpainting UNet,
        so pictures differ a little. "swap": networks are loaded while a phase needs them; one that cannot be loaded
        fails in the first request. None: the first of these that fits.

    Raises InputError for other values.
    """

    pictures: int = 1
    largest_picture: int = 4096 * 4096
    subjects: int = 8
    texts: int = 16
    shapes: int = 4
    context: int = 4 * TOKENS
    residency: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if field.name == "residency":
                if value is not None and value not in STRATEGIES:
                    raise InputError(f"residency is {value!r}, not one of {', '.join(STRATEGIES)}, or None")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{field.name} is {value!r}, not a whole number from 1 on")


@dataclass(frozen=True)
class MemoryRow:
    """One use of memory.

    bytes: how much it takes.
    purpose: what for, as users read it.
    """

    name: str
    bytes: int
    purpose: str


@dataclass(frozen=True)
class SwapCost:
    """What it takes to choose a subject that touches every slot of every network that is kept; sizes in bytes.

    bus: pristine weights that come from the host again.
    device: read and written within the device, without the factors.
    every_phase: whether each phase that needs other weights pays this, not a swap alone. Then it is what the phase with
        the most takes.
    """

    bus: int
    device: int
    every_phase: bool

    def __str__(self) -> str:
        bus = f"{size_text(self.bus)} over the bus" if self.bus else "nothing but a table over the bus"
        when = "another subject, and each phase that needs other weights" if self.every_phase else "another subject"
        return f"{when}: at most {bus}, {size_text(self.device)} read and written on the device"


@dataclass(frozen=True)
class MemoryPlan:
    """How the memory of a device is used. `str` makes a table. Sizes in bytes.

    strategy: "resident": every network stays. "one-unet": unet_raw is omitted and requests run with patched_fraction=1.
        "swap": networks are loaded while a phase needs them.
    free: available for everything in the plan, so loaded weights count as free.
    total: of the device.
    safe: the float32 twins that fit beside the rest.
    without: the float32 twins that do not fit.
    notice: what users of this plan should know; None where nothing is missing.
    pristine: where the base's own weights of LoRA slots are: on the "device", or with the "host" alone. The raw UNet's
        are always with the host.
    swap: what another subject costs; None: the networks have no slots.
    """

    strategy: str
    rows: tuple[MemoryRow, ...]
    free: int
    total: int
    safe: tuple[str, ...]
    without: tuple[str, ...]
    notice: str | None
    pristine: Pristine = "device"
    swap: SwapCost | None = None

    def keeps(self, name: str) -> bool:
        """Whether a network is used at all."""
        return self.strategy != "one-unet" or kind_of(name).group != "unet_raw"

    @property
    def needed(self) -> int:
        """Bytes of all rows."""
        return sum(row.bytes for row in self.rows)

    @property
    def fits(self) -> bool:
        """Whether the needed bytes are free."""
        return self.needed <= self.free

    def __str__(self) -> str:
        head = f"memory plan {self.strategy!r}: {size_text(self.needed)} of {size_text(self.free)} that can be used"
        cells = [(row.name, size_text(row.bytes), row.purpose) for row in self.rows]
        cells.append(("total", size_text(self.needed), f"the device has {size_text(self.total)}"))
        name, size = (max(len(cell[column]) for cell in cells) for column in (0, 1))
        lines = [f"  {cell[0]:<{name}}  {cell[1]:>{size}}  {cell[2]}".rstrip() for cell in cells]
        return "\n".join([head, *lines, *(f"  {said}" for said in (self.swap, self.notice) if said)])


@contextmanager
def explain_memory(plan: MemoryPlan) -> Iterator[None]:
    """Report lack of memory with the plan. A MemoryError comes from torch."""
    try:
        yield
    except (OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(f"{error}\nThe memory plan was:\n{plan}") from error


def plan_memory(
    networks: DeviceNetworks,
    free: int,
    total: int,
    options: Options,
    regions: Mapping[str, int],
    workspace: int,
    *,
    slotted: Mapping[str, SlottedNetwork] | None = None,
    loaded: Collection[str] | None = None,
    beside: bool = False,
) -> MemoryPlan:
    """Plan an engine set on a device.

    free: bytes that are free now.
    total: bytes of the device.
    regions: bytes of each region of the arena, by name, but those of slots' weights.
    workspace: bytes for the network that needs most (almost 0 where the back end allocates its own).
    slotted: the networks whose slots' weights the arena holds.
    loaded: networks whose weights are on the device now, so that `free` lacks them; None: all but the float32 twins.
    beside: another runtime uses the same networks, with the same options.

    Raises OutOfMemoryError with the whole plan when no strategy fits, or not that of `options.residency`; InputError
    when that is "one-unet" and the base has no unet_raw.
    """
    weights = {name: networks.weight_bytes(name) for name in _list_present(networks)}
    there = [name for name in weights if not is_twin(name)] if loaded is None else loaded
    usable = min(free + sum(weights[name] for name in there), total)
    if options.residency == "one-unet" and "unet_raw" not in weights:
        raise InputError("residency is 'one-unet', but this base has no second UNet; leave residency out")
    shared = (*_list_regions(regions), _make_workspace_row(workspace), *_list_reserves(options))
    slotted, tried = slotted or {}, []
    for strategy, pristine in _CHOICES:
        if options.residency not in (None, strategy) or (strategy == "one-unet" and "unet_raw" not in weights):
            continue
        tried.append(_plan_strategy(strategy, pristine, weights, slotted, shared, usable, total))
        if tried[-1].fits:
            return tried[-1]
    least = min(tried, key=lambda plan: plan.needed)
    raise OutOfMemoryError(_explain_shortage(least, options, total - usable, beside))


def _plan_strategy(
    strategy: str,
    pristine: Pristine,
    weights: Mapping[str, int],
    slotted: Mapping[str, SlottedNetwork],
    shared: Sequence[MemoryRow],
    usable: int,
    total: int,
) -> MemoryPlan:
    """A strategy's plan, which may not fit. It has as many twins as fit, the smallest first."""
    omitted = names_of_group("unet_raw") if strategy == "one-unet" else ()
    kept = {name: size for name, size in weights.items() if plain_name(name) not in omitted}
    slotted = {name: each for name, each in slotted.items() if name not in omitted}
    shared = (*_list_slots(strategy, pristine, slotted), *shared)
    plain = {name: size for name, size in kept.items() if not is_twin(name)}
    rows = _list_weights(strategy, plain)
    safe: list[str] = []
    for name in sorted(kept.keys() - plain.keys(), key=lambda name: (kept[name], name)):
        more = _list_weights(strategy, plain | {twin: kept[twin] for twin in (*safe, name)})
        if sum(row.bytes for row in (*more, *shared)) <= usable:
            rows, safe = more, [*safe, name]
    without = tuple(sorted(kept.keys() - plain.keys() - set(safe)))
    return MemoryPlan(
        strategy,
        (*rows, *shared),
        usable,
        total,
        tuple(sorted(safe)),
        without,
        _write_notice(strategy, without),
        pristine,
        _price_swap(strategy, pristine, slotted),
    )


def _list_slots(strategy: str, pristine: Pristine, slotted: Mapping[str, SlottedNetwork]) -> Iterator[MemoryRow]:
    """The regions of slots' weights."""
    purposes = {
        "slots": "weights with the subject's in them",
        "pristine": "the base's own weights, into which subjects are merged",
        SHARED: "weights with the subject's in them; the networks of each phase take turns",
        PIECES: "the host's weights on their way into weights of another type",
    }
    sizes = measure_weights(slotted, turns=strategy == "swap", pristine=pristine)
    for name, size in sizes.items():
        yield MemoryRow(name, size, purposes.get(name) or purposes[name.split()[-1]])


def _price_swap(strategy: str, pristine: Pristine, slotted: Mapping[str, SlottedNetwork]) -> SwapCost | None:
    swap, costs = strategy == "swap", {group: (0, 0) for group in list_groups()}
    for name, each in slotted.items():
        bus, device = costs[kind_of(name).group]
        source, target = each.pristine.nbytes, each.merged.nbytes
        costs[kind_of(name).group] = bus + (0 if keeps_pristine(name, pristine) else source), device + source + target
    if not slotted:
        return None
    bus, device = ((max if swap else sum)(each) for each in zip(*costs.values(), strict=True))
    return SwapCost(bus, device, every_phase=swap)


def _list_weights(strategy: str, weights: Mapping[str, int]) -> tuple[MemoryRow, ...]:
    if strategy != "swap":
        return tuple(
            MemoryRow(
                name,
                size,
                "weights, from the first overflow on; scratch memory then as well" if is_twin(name) else "weights",
            )
            for name, size in weights.items()
        )
    turns = dict(_list_turns(weights))
    neediest = max(turns, key=lambda turn: turns[turn], default="nothing")
    return (
        MemoryRow("weights", max(turns.values(), default=0), f"of {neediest}; the networks of each phase take turns"),
    )


def _list_turns(weights: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """What is on the device at once under "swap", and its bytes: each phase, and each phase with its twins."""
    for phase in map(names_of_group, list_groups()):
        plain = [name for name in phase if name in weights]
        wide = [twin_name(name) if twin_name(name) in weights else name for name in plain]
        for turn in (plain, wide):
            yield ", ".join(turn), sum(weights[name] for name in turn)


def _list_regions(regions: Mapping[str, int]) -> Iterator[MemoryRow]:
    """The larger regions of the arena by name, the small ones together."""
    small = {name for name, size in regions.items() if size < 16 * MIB}
    for name, size in sorted(regions.items(), key=lambda item: -item[1]):
        if name not in small:
            yield MemoryRow(name, size, "arena")
    if small:
        yield MemoryRow("the rest", sum(regions[name] for name in small), f"arena: {len(small)} small regions")


def _make_workspace_row(count: int) -> MemoryRow:
    if count < MIB:
        return MemoryRow(
            "workspace", count, "almost none: the back end allocates its own scratch memory, not counted here"
        )
    return MemoryRow("workspace", count, "scratch of the network that needs most; all share it, they never run at once")


def _list_reserves(options: Options) -> Iterator[MemoryRow]:
    yield MemoryRow("graphs", options.shapes * _GRAPHS_OF_A_SHAPE, f"of {options.shapes} shapes; estimated")
    yield MemoryRow("reserve", _RESERVE, "kernels that are loaded or compiled when first used; estimated")


def _write_notice(strategy: str, without: Sequence[str]) -> str | None:
    notice = {
        "one-unet": "unet_raw is not loaded: requests run with patched_fraction=1",
        "swap": "the networks take turns: each phase of a request waits for its weights",
    }.get(strategy)
    if without:
        lacks = f"there is no room for {', '.join(without)}: a request that overflows float16 there may fail"
        notice = f"{notice}; {lacks}" if notice else lacks
    return notice


def _explain_shortage(plan: MemoryPlan, options: Options, taken: int, beside: bool) -> str:
    """What to do: first the options that are higher than necessary, then what other programs hold."""
    lower = {
        name: f"{name} (now {value})"
        for name, value, least in (
            ("pictures", options.pictures, 1),
            ("largest_picture", options.largest_picture, 1024 * 1024),
            ("subjects", options.subjects, 1),
            ("texts", options.texts, 3),
            ("shapes", options.shapes, 2),
        )
        if value > least
    }
    remedies = [f"lower {', '.join(lower.values())}"] if lower else []
    if beside:
        what = "the device has too little memory for another runtime beside the first"
        remedies = [f"load the first with less ({each})" for each in remedies] + ["use one runtime alone"]
    else:
        what = "the device has too little memory"
        if "largest_picture" in lower:
            remedies.append("paint smaller pictures")
        if options.residency:
            remedies.append("leave residency out, so that one that fits is chosen")
        if taken >= 256 * MIB:
            remedies.append(f"close the programs that hold {size_text(taken)} of the device")
        remedies += ["build the engines with a smaller `--workspace`", "load with device='cpu'"]
    return f"{what}, {size_text(plan.needed - plan.free)} are missing:\n{plan}\nWhat helps: {'; or '.join(remedies)}"


def _list_present(networks: DeviceNetworks) -> list[str]:
    names = [name for phase in list_groups() for name in names_of_group(phase)]
    return [each for name in names for each in (name, twin_name(name)) if each in networks]
