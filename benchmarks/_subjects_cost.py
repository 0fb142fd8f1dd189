"""What a subject from one picture costs: enrolling it, 24 rows in a step, and another subject in its place."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from _ablation_cases import subject
from _ablation_report import spell
from _ablation_work import build_once
from _common import Benchmark, sample_place
from _subjects_cases import DEFAULT_COUNT, PHOTOGRAPHS
from _subjects_work import show_photograph
from numpy.typing import NDArray

from dreammix_trt.core.attention_layers import list_attention_linears
from dreammix_trt.core.axes import FACTOR
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.networks import kv_name
from dreammix_trt.core.stored import Floats
from dreammix_trt.core.subject import Subject
from dreammix_trt.engine import DreamMix
from dreammix_trt.evaluation.statistics import DRAWS, Mean, bootstrap_interval

SIDE: Final = 1024  # of the picture whose steps are timed
STEPS: Final = 12
RANK: Final = 4  # of the LoRAs that are swapped: any numbers do
SUBJECTS: Final = 4
Turn = tuple[list[float], list[float]]  # seconds of a picture's steps, without rows and with them


def measure_cost(bench: Benchmark, adapter: Path, work: Path, threads: int, rounds: int, swaps: int) -> None:
    """Rows of the three costs, and their bounds."""
    work.mkdir(parents=True, exist_ok=True)
    with DreamMix.load(build_once(work, tokens=adapter), threads=threads) as dm:
        names = measure_enrolment(bench, dm)
        measure_unet(bench, dm, rounds)
        measure_steps(bench, dm, names[0], rounds)
        measure_swaps(bench, dm, "tokens", "a mug", names[:2], swaps)
        loras = [add_lora(dm, number) for number in range(2)]
        measure_swaps(bench, dm, "LoRA", "a sks mug", loras, swaps)


def measure_enrolment(bench: Benchmark, dm: DreamMix) -> list[str]:
    """Seconds from a photograph and its mask to a subject; the first one also loads networks."""
    seconds, names = [], []
    for number in range(SUBJECTS):
        for photograph in range(PHOTOGRAPHS):
            image, mask = show_photograph(number, photograph)
            names.append(f"tokens-{number}-{photograph}")
            start = time.perf_counter()
            dm.enroll(image, mask, class_name=subject(number).attributes.shape, name=names[-1])
            seconds.append(time.perf_counter() - start)
    bench.add("enrolling, the first of an engine [s]", seconds[0])
    bench.add(f"enrolling, p50 of {len(seconds) - 1} [s]", float(np.median(seconds[1:])), bound="<= 1")
    return names


def measure_unet(bench: Benchmark, dm: DreamMix, rounds: int) -> None:
    """The UNet alone on the latents of 1024x1024, its text with 24 rows more and without; keys and values are made."""
    configs, rng = BaseFiles.open().configs, np.random.default_rng(0)
    cells = SIDE // FACTOR
    wide, pooled = int(configs["unet"]["cross_attention_dim"]), int(configs["text_encoder_2"]["projection_dim"])

    def draw(*shape: int) -> Floats:
        return rng.standard_normal((2, *shape), np.float32)

    shared: Any = {
        "sample": draw(4, cells, cells),
        "timestep": np.full(2, 500, np.float32),
        "text_embeds": draw(pooled),
        "time_ids": np.array([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 2, np.float32),
        "inpaint_feature": draw(dm.facts.feature_channels, cells, cells)[:1],
    }
    text = draw(TOKENS + DEFAULT_COUNT, wide)
    attended = [dm.networks.run(kv_name("unet"), encoder_hidden_states=text[:, :count].copy())
                for count in (TOKENS, TOKENS + DEFAULT_COUNT)]  # fmt: skip
    works = [partial(dm.networks.run, "unet", **shared, **each) for each in attended]
    turns = take_turns([partial(time_once, work) for work in works], rounds)
    add_turns(bench, f"UNet, {SIDE}x{SIDE}, batch 2", turns, lambda seconds: seconds[0], bound="<= 0.02")


def measure_steps(bench: Benchmark, dm: DreamMix, name: str, rounds: int) -> None:
    """A step with 24 rows against one without, picture by picture in turns: at the size that the base paints at."""
    image, mask = sample_place(SIDE)
    shared: Any = {"num_inference_steps": STEPS, "seed": 1, "lcg_fraction": 0.0, "prompt": "a mug"}
    kinds: Any = ({"subject": ""}, {"subject": name, "token_count": DEFAULT_COUNT})
    turns = take_turns([partial(time_steps, dm, image, mask, {**shared, **kind}) for kind in kinds], rounds)
    where = f"of a picture of {SIDE}x{SIDE}, painted at {dm.facts.native_side}"
    add_turns(bench, f"a step {where}", turns, median_step)
    add_turns(bench, f"all {STEPS} steps {where}, with all else", turns, sum)


def take_turns(works: Sequence[Callable[[], list[float]]], rounds: int) -> list[Turn]:
    """What two works measured in each round, in turns, after a round that counts nowhere."""
    found = []
    for number in range(rounds + 1):
        timed = {which: works[which]() for which in ((0, 1) if number % 2 else (1, 0))}
        found.append((timed[0], timed[1]))
    return found[1:]


def add_turns(
    bench: Benchmark,
    what: str,
    turns: Sequence[Turn],
    measure: Callable[[Sequence[float]], float],
    bound: str | None = None,
) -> None:
    """Medians without rows and with them, and what rows cost."""
    for which, told in enumerate(("without rows", f"with {DEFAULT_COUNT} rows")):
        bench.add(f"{what}: {told} [ms]", 1000 * float(np.median([measure(turn[which]) for turn in turns])))
    cost = compare(turns, measure)
    bench.add(f"{what}: cost of {DEFAULT_COUNT} rows, interval over {len(turns)} turns", spell(cost, 4))
    bench.add(f"{what}: cost of {DEFAULT_COUNT} rows", cost.mean, bound=bound)


def time_once(work: Callable[[], object]) -> list[float]:
    start = time.perf_counter()
    work()
    return [time.perf_counter() - start]


def time_steps(dm: DreamMix, image: Any, mask: Any, fields: dict[str, Any]) -> list[float]:
    """Seconds to each step of a picture from the one before; the last one has the decoder in it."""
    at = [time.perf_counter()]
    for _ in dm.iterate(image, mask, **fields):
        at.append(time.perf_counter())
    return list(np.diff(at))


def median_step(seconds: Sequence[float]) -> float:
    """A step that is neither the first, which also reads and encodes, nor the last."""
    return float(np.median(seconds[1:-1]))


def compare(turns: Sequence[Turn], measure: Callable[[Sequence[float]], float]) -> Mean:
    """The share by which it takes longer with rows: of the medians over turns, drawn anew for the interval."""
    pairs = np.array([[measure(each) for each in turn] for turn in turns])

    def share(chosen: NDArray[Any]) -> NDArray[Any]:
        plain, spoken = np.moveaxis(np.median(chosen, axis=-2), -1, 0)
        return np.asarray(spoken / plain - 1)

    drawn = np.random.default_rng(0).integers(len(pairs), size=(DRAWS, len(pairs)))
    low, high = np.quantile(share(pairs[drawn]), (0.025, 0.975))
    return Mean(float(share(pairs)), len(pairs), float(low), float(high))


def measure_swaps(bench: Benchmark, dm: DreamMix, kind: str, prompt: str, names: Sequence[str], swaps: int) -> None:
    """Milliseconds to a picture's first step where the subject changes, and where it stays."""
    image, mask = sample_place(dm.facts.native_side)

    def begin(name: str) -> float:
        start = time.perf_counter()
        for _ in dm.iterate(image, mask, prompt, num_inference_steps=2, seed=1, subject=name):
            break
        return 1000 * (time.perf_counter() - start)

    begin(names[0])
    begin(names[1])
    timed = np.array([[begin(names[number % 2]), begin(names[number % 2])] for number in range(swaps)])
    for which, told in enumerate(("changed", "stayed")):
        for share in (50, 99):
            value = float(np.percentile(timed[:, which], share))
            bench.add(f"{kind}: to the first step, the subject {told}, p{share} of {swaps} [ms]", value)
    gaps = timed[:, 0] - timed[:, 1]
    low, high = bootstrap_interval(list(gaps)) or (None, None)
    bench.add(f"{kind}: what a swap adds, mean [ms]", spell(Mean(float(gaps.mean()), swaps, low, high)))


def add_lora(dm: DreamMix, number: int) -> str:
    """A subject with factors for every attention layer."""
    rng: Callable[..., Any] = np.random.default_rng(number).standard_normal
    pairs = {
        slot.module: tuple(0.01 * rng(shape, np.float32) for shape in ((slot.inputs, RANK), (RANK, slot.outputs)))
        for slot in list_attention_linears(BaseFiles.open().configs["unet"])
    }
    factors: Any = {"unet": pairs, "unet_raw": pairs}
    dm.add_subject(Subject(f"lora-{number}", "sks", "mug", factors))
    return f"lora-{number}"
