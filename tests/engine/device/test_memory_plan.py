"""Memory plans of a full-size SDXL on usual cards; weights as measured (benchmarks/results/full_size.json)."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dreammix_trt.core.errors import InputError, OutOfMemoryError
from dreammix_trt.engine.device.memory_plan import STRATEGIES, MemoryPlan, Options, plan_memory

MIB, GIB = 1 << 20, 1 << 30
SDXL = {
    "text_encoder": 225,
    "text_encoder_2": 1334,
    "unet": 4953,
    "unet_raw": 4953,
    "inpaint_head": 1,
    "vae_encoder": 70,
    "vae_decoder": 98,
}
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


def make_plan(
    total: float, sizes: dict[str, int] | None = None, taken: float = 0.7, workspace: int = WORKSPACE, **options: Any
) -> MemoryPlan:
    """total, taken: GiB of the card and of that what others hold; nothing is loaded yet."""
    networks: Any = Weights(**(SDXL if sizes is None else sizes))
    free = int((total - taken) * GIB)
    return plan_memory(networks, free, int(total * GIB), Options(**options), REGIONS, workspace, loaded=())


def list_bytes(plan: MemoryPlan) -> dict[str, int]:
    return {row.name: row.bytes for row in plan.rows}


@pytest.mark.parametrize(
    "total, strategy", [(24, "resident"), (16, "resident"), (14, "one-unet"), (12, "one-unet"), (9, "swap")]
)
def test_the_first_strategy_that_fits_is_taken(total: int, strategy: str) -> None:
    plan = make_plan(total)
    assert plan.strategy == strategy and plan.fits and plan.needed <= plan.free < plan.total == total * GIB
    for more in STRATEGIES[: STRATEGIES.index(strategy)]:
        with pytest.raises(OutOfMemoryError):
            make_plan(total, residency=more)


def test_what_stays_adds_up() -> None:
    shared = sum(REGIONS.values()) + WORKSPACE + (512 + 4 * 32) * MIB
    assert make_plan(24).needed == sum(SDXL.values()) * MIB + shared
    assert make_plan(12).needed == (sum(SDXL.values()) - SDXL["unet_raw"]) * MIB + shared
    assert make_plan(9).needed == SDXL["unet"] * MIB + shared
    found = list_bytes(make_plan(24))
    assert found["unet"] == found["unet_raw"] == 4953 * MIB and found["workspace"] == WORKSPACE
    assert found["subjects"] == 150 * MIB and found["the rest"] == 2 * MIB + 256
    assert "unet_raw" not in list_bytes(make_plan(12))


def test_users_are_told_what_they_do_without() -> None:
    assert make_plan(24).notice is None
    assert "patched_fraction=1" in str(make_plan(12).notice)
    assert "waits for its weights" in str(make_plan(9).notice)


def test_the_printed_plan_is_a_table() -> None:
    lines = str(make_plan(24)).splitlines()
    assert lines[0] == "memory plan 'resident': 14.0 GiB of 23.3 GiB that can be used", lines[0]
    assert len(lines) == len(make_plan(24).rows) + 2
    columns = [re.fullmatch(r"  (\S.*?)  +([\d.]+ (?:bytes|[KMG]iB))  (\S.*)", line) for line in lines[1:]]
    assert all(columns), lines
    assert len({found.end(2) for found in columns if found}) == 1  # sizes end below each other
    cells = {found[1]: (found[2], found[3]) for found in columns if found}
    assert cells["unet"] == ("4.8 GiB", "weights")
    assert cells["vae_decoder"] == ("98.0 MiB", "weights")
    assert cells["total"] == ("14.0 GiB", "the device has 24.0 GiB")
    assert "never run at once" in cells["workspace"][1]
    assert str(make_plan(12)).splitlines()[-1].strip() == make_plan(12).notice
    assert "of unet; the networks of each phase take turns" in str(make_plan(9))


def test_eight_gibibytes_are_told_what_would_help() -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        make_plan(8, pictures=2)
    said = str(caught.value)
    missing = SDXL["unet"] * MIB + sum(REGIONS.values()) + WORKSPACE + 640 * MIB - int(7.3 * GIB)
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
    single = {name: size for name, size in SDXL.items() if name not in ("unet_raw", "inpaint_head")}
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
    assert list_bytes(plan)["weights"] == SDXL["unet"] * MIB
    forced = make_plan(24, SDXL | {"unet_float32": 9906}, residency="swap")
    assert list_bytes(forced)["weights"] == 9906 * MIB and "of unet_float32;" in str(forced)


def test_weights_that_are_there_already_count_as_free() -> None:
    networks: Any = Weights(**SDXL, **SAFE_VAE)
    loaded = sum(SDXL.values()) * MIB
    free = int(23.3 * GIB)
    ask = (24 * GIB, Options(), REGIONS, WORKSPACE)
    fresh = plan_memory(networks, free, *ask, loaded=())
    assert plan_memory(networks, free - loaded, *ask) == fresh
    text = (225 + 1334) * MIB
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
