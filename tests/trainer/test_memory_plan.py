"""The memory plan against what torch itself keeps on the CPU, and against numbers worked out by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the trainer needs torch")
pytest.importorskip("peft", reason="the trainer needs peft")

from diffusers import UNet2DConditionModel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.errors import InputError  # noqa: E402
from dreammix_trt.trainer.memory_plan import CONTEXT, TrainingPlan, plan_training  # noqa: E402
from dreammix_trt.trainer.meta_step import add_lora, compute_loss, count_encoding, count_step, make_inputs  # noqa: E402
from tests.support.mini_sdxl import small_configs  # noqa: E402

SIDE, RANK = 64, 4
USUAL: dict[str, Any] = {
    "precision": "bfloat16", "batch": 2, "accumulate": 3, "rank": RANK, "checkpointing": False, "optimizer": "adamw",
    "side": SIDE,
}  # fmt: skip


def small_base() -> Any:
    return SimpleNamespace(configs=small_configs(), divisor=16)


def plan(**changes: Any) -> TrainingPlan:
    return plan_training(small_base(), **(USUAL | changes))


class Kept:
    """Bytes that autograd keeps of a real step, by its own hooks: every storage once, weights and inputs not."""

    def __init__(self, precision: str, batch: int, *, fused: bool = True) -> None:
        config, dtype = small_configs()["unet"], getattr(torch, precision)
        unet = add_lora(UNet2DConditionModel.from_config(config), dtype, RANK, checkpointing=False, fused=fused)
        inputs, added = make_inputs(config, batch, SIDE, torch.float32, "cpu")
        known = {each.data_ptr() for each in (*unet.parameters(), *inputs, *added.values())}
        found: dict[int, Any] = {}

        def note(value: Any) -> Any:
            storage = value.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage
            return value

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda value: value)
        with hooks, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            self.loss = compute_loss(unet, inputs, added)
        self.bytes = sum(storage.nbytes() for storage in found.values())
        self.frozen = sum(each.numel() * each.element_size() for each in unet.parameters() if not each.requires_grad)
        self.trained = tuple(each.numel() for each in unet.parameters() if each.requires_grad)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("fused", [True, False])
def test_what_is_kept_is_what_torch_keeps(precision: str, fused: bool) -> None:
    products = None if precision == "float32" else precision
    cost, weights = count_step(
        small_configs()["unet"],
        *(precision, RANK, SIDE),
        checkpointing=False,
        products=products,
        kind="cpu",
        fused=fused,
    )
    real = Kept(precision, 1, fused=fused)
    assert cost.kept == pytest.approx(real.bytes, rel=0.01)
    assert cost.peak >= cost.kept
    assert (weights.frozen, weights.trained) == (real.frozen, real.trained)


def test_values_grow_with_the_batch() -> None:
    """As the plan takes for granted."""
    made = plan_training(small_base(), **(USUAL | {"precision": "float32", "batch": 3}), device="cpu")
    assert made.activations == pytest.approx(Kept("float32", 3).bytes, rel=0.01)


def test_checkpointing_keeps_less_and_computes_more() -> None:
    """The frozen UNet's backward pass costs about one forward pass more, and the whole forward pass comes again."""
    without, with_it = plan(), plan(checkpointing=True)
    assert with_it.activations < without.activations / 3
    assert with_it.temporary < without.activations / 3, "a block at a time is computed again, not all of them"
    assert 1.3 < with_it.flops / without.flops < 1.55


def test_flops_are_those_of_a_real_step() -> None:
    """By torch's counter, on values, with attention written out (it does not know the CPU's fused operator)."""
    cost, _ = count_step(small_configs()["unet"], "float32", RANK, SIDE, checkpointing=False, kind="cpu", fused=False)
    with FlopCounterMode(display=False) as counter:
        Kept("float32", 1, fused=False).loss.backward()
    assert cost.flops == counter.get_total_flops()


def test_fused_attention_computes_as_much() -> None:
    """Forward; its backward pass computes the scores once more."""
    config = small_configs()["unet"]
    fused, written = (
        count_step(config, "float32", RANK, SIDE, checkpointing=False, fused=each)[0] for each in (True, False)
    )
    assert written.flops < fused.flops < 1.1 * written.flops
    assert fused.kept < written.kept


def test_parts_add_up() -> None:
    made = plan()
    trained = 4 * made.trained
    assert (made.factors, made.gradients, made.states) == (trained, trained, 2 * trained)
    parts = made.unet + 4 * trained + made.activations + made.temporary + made.workspace + CONTEXT
    assert made.training_bytes == parts
    assert made.total_bytes == max(parts, made.encoding_bytes)
    assert made.encoding_bytes == max(made.text, made.vae + made.vae_values + made.workspace) + CONTEXT


def test_states_of_eight_bits() -> None:
    """Two bytes a number and two float32 scales for 256 of them; tensors below 4096 numbers stay in 32 bits."""
    made = plan(rank=128, optimizer="adamw8bit")
    counts = count_step(small_configs()["unet"], "bfloat16", 128, SIDE, checkpointing=False, products="bfloat16")[1]
    assert {count >= 4096 for count in counts.trained} == {True}
    assert made.states == sum(2 * count + 8 * -(-count // 256) for count in counts.trained)
    assert plan(optimizer="adamw8bit").states == plan().states, "all tensors of rank 4 are small here"


def test_encoding_is_counted_from_the_configs() -> None:
    """The VAE's largest moment: at least two maps of its first width at full size, and not all of the network."""
    configs = small_configs()
    vae, values, text = count_encoding(configs, SIDE)
    first = 4 * configs["vae"]["block_out_channels"][0] * SIDE * SIDE
    assert 2 * first < values < 12 * first
    assert vae > 0
    tokens = sum(
        configs[name]["vocab_size"] * configs[name]["hidden_size"] for name in ("text_encoder", "text_encoder_2")
    )
    assert text > 4 * tokens


def test_the_lines_say_what_is_calculated() -> None:
    made = plan()
    text = "\n".join(made.lines(1000))
    for words in ("calculated, not measured", "bfloat16", "batch 2 x 3", "no checkpointing", "rank 4", "assumed"):
        assert words in text
    minutes = made.flops * 1000 / (165e12 * 0.4) / 60
    assert made.minutes(1000) == pytest.approx(minutes)
    assert f"1,000 steps: {minutes:.1f} minutes" in text
    assert made.to_json()["total_bytes"] == made.total_bytes
    assert made.to_json()["measured"] is False


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    with pytest.raises(InputError) as caught:
        yield
    for each in words:
        assert each in str(caught.value), caught.value


def test_a_gpu_too_small_is_told_what_fits() -> None:
    large = plan(precision="float32", batch=64)
    need = large.total_bytes - CONTEXT
    large.check(need)
    with refused("--precision bfloat16 it needs"):
        large.check(need - 1)
    with refused("with --gradient-checkpointing on it needs"):
        large.check(plan(precision="float32", batch=64, checkpointing=True).total_bytes - CONTEXT)
    with refused(
        "--precision bfloat16 --gradient-checkpointing on --batch 1 --accumulate 192 --optimizer adamw8bit it still"
    ):
        large.check(1 << 20)
    with refused("these settings it still needs"):
        plan(checkpointing=True, batch=1, optimizer="adamw8bit").check(1 << 20)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
        ({"batch": 0}, "batch is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"side": 72}, "multiple of 16"),
    ],
)
def test_values_that_no_training_can_have(changes: dict[str, Any], words: str) -> None:
    with refused(words):
        plan(**changes)


def test_the_embedded_base_has_a_plan() -> None:
    base = BaseFiles.open()
    made = plan_training(base, **(USUAL | {"side": base.native_side, "precision": "float32"}), device="cpu")
    assert made.context == 0
    assert made.trained > 0


@pytest.mark.parametrize("checkpointing", [True, False])
def test_painting_regular_pictures_takes_less_than_a_step(checkpointing: bool) -> None:
    """So the plan, which counts the step, holds before it, too: two rows, for guidance, without a backward pass."""
    from dreammix_trt.trainer.meta_step import Ledger
    from dreammix_trt.trainer.regular import count_at_once

    config = small_configs()["unet"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).requires_grad_(False)
    inputs, added = make_inputs(config, 2 * count_at_once(1024), SIDE, torch.float32, "meta")
    ledger = Ledger([*unet.parameters(), *unet.buffers(), *inputs, *added.values()])
    with torch.no_grad(), ledger:
        unet(*inputs, added_cond_kwargs=added, return_dict=False)
    step = plan(batch=1, precision="float32", checkpointing=checkpointing)
    assert 0 < ledger.peak <= step.activations + step.temporary
