"""Memory plans of a full-size SDXL on usual cards; weights as measured (benchmarks/results/full_size.json)."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dreammix_trt.core.axes import FLOAT8
from dreammix_trt.core.errors import InputError, OutOfMemoryError
from dreammix_trt.core.slots import Slot
from dreammix_trt.engine.device.arena import Pieces
from dreammix_trt.engine.device.memory_plan import STRATEGIES, MemoryPlan, Options, SwapCost, plan_memory
from dreammix_trt.engine.device.slot_layout import SlottedNetwork

MIB, GIB = 1 << 20, 1 << 30
SDXL = {
    "text_encoder": 171,
    "text_encoder_2": 934,
    "unet_kv": 1,
    "unet": 3131,
    "unet_raw_kv": 1,
    "unet_raw": 3131,
    "inpaint_head": 1,
    "vae_encoder": 70,
    "vae_decoder": 98,
}
SLOTS = {"text_encoder": 54, "text_encoder_2": 400, "unet_kv": 650, "unet": 1172, "unet_raw_kv": 650, "unet_raw": 1172}
RAW = ("unet_raw_kv", "unet_raw")
SAFE_VAE = {"vae_encoder_float32": 130, "vae_decoder_float32": 189}
REGIONS = {"picture": 48 * MIB, "canvas": 96 * MIB, "subjects": 150 * MIB, "flags": 256, "text": MIB, "sample": MIB}
WORKSPACE = 1800 * MIB


class Weights:
    """Networks as far as a plan asks; sizes in MiB."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    def weight_bytes(self, name: str) -> int:
        return self.sizes[name] * MIB


def make_slotted(sizes: dict[str, int], *, eighths: bool = False) -> dict[str, SlottedNetwork]:
    """Networks with so many MiB of slot weights, float16, or merged into FP8."""
    found = {}
    for name, size in sizes.items():
        pristine = Pieces({"w": ((size * MIB // 2, 1), "float16")})
        merged = Pieces({"w": ((size * MIB // 2, 1), "uint8")}) if eighths else pristine
        slot = Slot("w", size * MIB // 2, 1, "w", 0, 1)
        found[name] = SlottedNetwork(name, (slot,), {"w": FLOAT8 if eighths else "float16"}, merged, pristine)
    return found


def make_plan(
    total: float,
    sizes: dict[str, int] | None = None,
    taken: float = 0.7,
    workspace: int = WORKSPACE,
    slots: dict[str, SlottedNetwork] | None = None,
    **options: Any,
) -> MemoryPlan:
    """total, taken: GiB of the card and of that what others hold; nothing is loaded yet."""
    sizes = SDXL if sizes is None else sizes
    networks: Any = Weights(**sizes)
    slots = make_slotted({name: size for name, size in SLOTS.items() if name in sizes}) if slots is None else slots
    free, given = int((total - taken) * GIB), Options(**options)
    return plan_memory(networks, free, int(total * GIB), given, REGIONS, workspace, slotted=slots, loaded=())


def list_bytes(plan: MemoryPlan) -> dict[str, int]:
    return {row.name: row.bytes for row in plan.rows}


@pytest.mark.parametrize(
    ("total", "strategy", "pristine"),
    [
        (24, "resident", "device"),
        (18, "resident", "device"),
        (16, "resident", "host"),
        (14, "one-unet", "device"),
        (12, "one-unet", "host"),
        (9, "swap", "host"),
    ],
)
def test_the_first_plan_that_fits_is_taken(total: int, strategy: str, pristine: str) -> None:
    plan = make_plan(total)
    assert (plan.strategy, plan.pristine) == (strategy, pristine) and plan.fits
    assert plan.needed <= plan.free < plan.total == total * GIB
    for more in STRATEGIES[: STRATEGIES.index(strategy)]:
        with pytest.raises(OutOfMemoryError):
            make_plan(total, residency=more)


def test_what_stays_adds_up() -> None:
    shared = sum(REGIONS.values()) + WORKSPACE + (512 + 4 * 32) * MIB
    whole, slots = sum(SDXL.values()) * MIB, sum(SLOTS.values()) * MIB
    raw = sum(SLOTS[name] for name in RAW) * MIB
    assert make_plan(24).needed == whole + slots + (slots - raw) + shared  # the raw UNet's have no copy
    assert make_plan(16).needed == whole + slots + shared
    assert make_plan(12).needed == whole - sum(SDXL[name] for name in RAW) * MIB + slots - raw + shared
    assert make_plan(9).needed == (SDXL["unet"] + SDXL["unet_kv"]) * MIB + raw + shared
    found = list_bytes(make_plan(24))
    assert found["unet"] == found["unet_raw"] == 3131 * MIB and found["workspace"] == WORKSPACE
    assert found["unet slots"] == found["unet pristine"] == 1172 * MIB and "unet_raw pristine" not in found
    assert found["subjects"] == 150 * MIB and found["the rest"] == 2 * MIB + 256
    assert not {*RAW, "unet_raw slots", "unet pristine"} & list_bytes(make_plan(12)).keys()
    assert list_bytes(make_plan(9))["slot weights"] == raw


def test_what_another_subject_costs_is_told() -> None:
    every, unet = sum(SLOTS.values()), SLOTS["unet"] + SLOTS["unet_kv"]
    assert make_plan(24).swap == SwapCost(bus=unet * MIB, device=2 * every * MIB, every_phase=False)  # the raw UNet's
    assert make_plan(16).swap == SwapCost(bus=every * MIB, device=2 * every * MIB, every_phase=False)
    assert make_plan(14).swap == SwapCost(bus=0, device=2 * (every - unet) * MIB, every_phase=False)
    assert make_plan(12).swap == SwapCost(bus=(every - unet) * MIB, device=2 * (every - unet) * MIB, every_phase=False)
    assert make_plan(9).swap == SwapCost(bus=unet * MIB, device=2 * unet * MIB, every_phase=True)
    assert "another subject: at most nothing but a table over the bus, 4.4 GiB read and written" in str(make_plan(14))
    assert "another subject: at most 1.8 GiB over the bus, 8.0 GiB read" in str(make_plan(24))
    assert "another subject, and each phase that needs other weights: at most 1.8 GiB" in str(make_plan(9))
    assert make_plan(24, slots={}).swap is None and make_plan(16, slots={}).pristine == "device"


def test_weights_of_another_type_than_the_files_have_room_on_their_way() -> None:
    """FP8 weights are half as large; those of the host's file pass through a region."""
    eighths = make_slotted({name: SLOTS[name] for name in ("unet_kv", "unet")}, eighths=True)
    found = list_bytes(make_plan(24, slots=eighths))
    assert found["unet slots"] == 586 * MIB and found["unet pristine"] == 1172 * MIB and "pristine pieces" not in found
    found = list_bytes(make_plan(13.2, slots=eighths, residency="resident"))
    assert found["unet slots"] == 586 * MIB and found["pristine pieces"] == 1172 * MIB  # its one input, whole


def test_users_are_told_what_they_do_without() -> None:
    assert make_plan(24).notice is None
    assert "patched_fraction=1" in str(make_plan(12).notice)
    assert "waits for its weights" in str(make_plan(9).notice)


def test_the_printed_plan_is_a_table() -> None:
    lines = str(make_plan(24)).splitlines()
    assert lines[0] == "memory plan 'resident': 16.3 GiB of 23.3 GiB that can be used", lines[0]
    assert len(lines) == len(make_plan(24).rows) + 3
    columns = [re.fullmatch(r"  (\S.*?)  +([\d.]+ (?:bytes|[KMG]iB))  (\S.*)", line) for line in lines[1:-1]]
    assert all(columns), lines
    assert len({found.end(2) for found in columns if found}) == 1  # sizes end below each other
    cells = {found[1]: (found[2], found[3]) for found in columns if found}
    assert cells["unet"] == ("3.1 GiB", "weights")
    assert cells["unet slots"] == ("1.1 GiB", "weights with the subject's in them")
    assert cells["unet pristine"] == ("1.1 GiB", "the base's own weights, into which subjects are merged")
    assert cells["vae_decoder"] == ("98.0 MiB", "weights")
    assert cells["total"] == ("16.3 GiB", "the device has 24.0 GiB")
    assert "never run at once" in cells["workspace"][1]
    assert str(make_plan(12)).splitlines()[-1].strip() == make_plan(12).notice
    assert "of unet_kv, unet; the networks of each phase take turns" in str(make_plan(9))


def test_eight_gibibytes_are_told_what_would_help() -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        make_plan(8, pictures=2)
    said = str(caught.value)
    missing = (SDXL["unet"] + 1 + 650 + 1172) * MIB + sum(REGIONS.values()) + WORKSPACE + 640 * MIB - int(7.3 * GIB)
    assert f"{missing / MIB:.1f} MiB are missing" in said
    for words in (
        "memory plan 'swap'",
        "workspace",
        "1.8 GiB",
        "the device has 8.0 GiB",
        "lower pictures (now 2), ",
        "largest_picture (now 16777216)",
        "close the programs that hold 716.8 MiB",
        "--workspace",
        "device='cpu'",
    ):
        assert words in said
    assert "residency" not in said
    # and that helps
    assert make_plan(8, workspace=900 * MIB).strategy == "swap"


def test_a_strategy_by_name_is_the_one_that_is_taken() -> None:
    for strategy in STRATEGIES:
        assert make_plan(24, residency=strategy).strategy == strategy
    with pytest.raises(OutOfMemoryError, match=r"(?s)memory plan 'resident'.*leave residency out"):
        make_plan(12, residency="resident")


def test_a_base_with_one_unet_swaps_where_not_all_fits() -> None:
    single = {name: size for name, size in SDXL.items() if name not in (*RAW, "inpaint_head")}
    assert make_plan(12, single).strategy == "resident"
    assert make_plan(9, single).strategy == "swap"
    with pytest.raises(InputError, match="no second UNet"):
        make_plan(24, single, residency="one-unet")


def test_twins_have_room_where_there_is_some() -> None:
    plan = make_plan(24, SDXL | SAFE_VAE)
    assert plan.safe == ("vae_decoder_float32", "vae_encoder_float32") and plan.without == () and plan.notice is None
    assert plan.needed - make_plan(24).needed == sum(SAFE_VAE.values()) * MIB
    assert "from the first overflow on" in str(plan)


def test_twins_never_cost_a_network_its_place() -> None:
    wide = SDXL | SAFE_VAE | {"unet_float32": 9906, "unet_raw_float32": 9906}
    plan = make_plan(24, wide)
    assert (plan.strategy, plan.without) == ("resident", ("unet_float32", "unet_raw_float32"))
    assert plan.safe == tuple(sorted(SAFE_VAE)) and plan.fits
    assert "no room for unet_float32, unet_raw_float32" in str(plan.notice)
    assert make_plan(40, wide).without == ()
    tight = make_plan(14.2, SDXL | SAFE_VAE, taken=0)
    assert tight.strategy == "resident" and tight.fits
    assert (tight.safe, tight.without) == (("vae_encoder_float32",), ("vae_decoder_float32",))


def test_twins_take_the_turn_of_their_network() -> None:
    plan = make_plan(9, SDXL | SAFE_VAE | {"unet_float32": 9906})
    assert plan.strategy == "swap" and plan.without == ("unet_float32",)
    assert list_bytes(plan)["weights"] == (SDXL["unet"] + 1) * MIB
    forced = make_plan(24, SDXL | {"unet_float32": 9906}, residency="swap")
    assert list_bytes(forced)["weights"] == (9906 + 1) * MIB and "of unet_kv, unet_float32;" in str(forced)


def test_weights_that_are_there_already_count_as_free() -> None:
    networks: Any = Weights(**SDXL, **SAFE_VAE)
    loaded = sum(SDXL.values()) * MIB
    free = int(23.3 * GIB)
    ask = (24 * GIB, Options(), REGIONS, WORKSPACE)
    fresh = plan_memory(networks, free, *ask, loaded=())
    assert plan_memory(networks, free - loaded, *ask) == fresh
    text = (171 + 934) * MIB
    assert plan_memory(networks, free - text, *ask, loaded=("text_encoder", "text_encoder_2")) == fresh
    assert plan_memory(networks, 24 * GIB, *ask).free == 24 * GIB  # never more than there is


def test_a_back_end_with_scratch_of_its_own_is_said_to_be_one() -> None:
    assert "not counted here" in str(make_plan(24, workspace=256))


@pytest.mark.parametrize(
    "wrong", [{"pictures": 0}, {"subjects": True}, {"largest_picture": 1.5}, {"texts": -1}, {"residency": "all"}]
)
def test_options_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=f"{name} is {wrong[name]!r}"):
        Options(**wrong)
