from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.lora import read_lora
from dreammix_trt.core.subject import (
    Slot,
    Subject,
    pack,
    packed_size,
    read_subject,
    slots_of,
    subject_from_lora,
    write_subject,
)
from tests.support.tiny_model import random_factors, write_tiny_lora

MODULES = {"a.to_k": (6, 5), "a.to_v": (7, 5), "b.to_out.0": (5, 5)}
SLOTS = tuple(Slot(module, inputs, outputs, 8) for module, (inputs, outputs) in MODULES.items())


def unpacked(row: np.ndarray, slots: tuple[Slot, ...]) -> dict[str, np.ndarray]:
    """module -> A @ B, read by the layout's definition: per slot A (in, rank), then B (rank, out)."""
    found, at = {}, 0
    for slot in slots:
        a = row[at : at + slot.inputs * slot.rank].reshape(slot.inputs, slot.rank)
        at += a.size
        b = row[at : at + slot.rank * slot.outputs].reshape(slot.rank, slot.outputs)
        at += b.size
        found[slot.module] = a @ b
    assert at == row.size
    return found


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_pack_pads_and_scales(rank: int) -> None:
    factors = random_factors(MODULES, rank=rank)
    row = pack(factors, SLOTS, scale=0.5)
    assert row.shape == (packed_size(SLOTS),) and row.dtype == np.float32
    for module, product in unpacked(row, SLOTS).items():
        a, b = factors[module]
        np.testing.assert_allclose(product, 0.5 * a @ b, rtol=1e-5, atol=1e-7)


def test_slots_without_factors_are_zero() -> None:
    factors = random_factors({"a.to_v": (7, 5)})
    products = unpacked(pack(factors, SLOTS), SLOTS)
    assert not products["a.to_k"].any() and not products["b.to_out.0"].any() and products["a.to_v"].any()
    assert not pack({}, SLOTS).any()


def test_a_lora_for_another_base_lists_what_does_not_fit() -> None:
    with pytest.raises(
        FileFormatError, match=r"another base; 2 modules.*a\.to_k \(9 -> 5, here 6 -> 5\).*z \(2 -> 2, no such slot\)"
    ):
        pack(random_factors({"a.to_k": (9, 5), "z": (2, 2), "a.to_v": (7, 5)}), SLOTS)


def test_too_high_a_rank_names_the_command() -> None:
    with pytest.raises(FileFormatError, match=r"rank 16, the engine's slots take 8.*dreammix-trt build --slot-rank 16"):
        pack(random_factors(MODULES, rank=16), SLOTS)


def test_the_file_keeps_everything(tmp_path: Path) -> None:
    lora = read_lora(write_tiny_lora(tmp_path / "l.safetensors", random_factors(MODULES)))
    subject = subject_from_lora(
        lora, "mug", class_name="mug", target="both", scale=0.7, base_key="k", source_sha256="s"
    )
    write_subject(tmp_path / "mug.safetensors", subject)
    again = read_subject(tmp_path / "mug.safetensors")
    for name in ("name", "token", "class_name", "target", "scale", "base_key", "source_sha256"):
        assert getattr(again, name) == getattr(subject, name)
    for module, (a, b) in subject.factors["unet"].items():
        found_a, found_b = again.factors["unet"][module]
        product = a @ b
        np.testing.assert_allclose(found_a @ found_b, product, atol=2e-3 * np.abs(product).max())
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_balancing_keeps_lopsided_factors_in_range(tmp_path: Path) -> None:
    a, b = np.full((6, 4), 1e6, np.float32), np.full((4, 5), 1e-6, np.float32)
    write_subject(tmp_path / "x.safetensors", Subject("x", "sks", "mug", {"unet": {"m": (a, b), "zero": (a, 0 * b)}}))
    found_a, found_b = read_subject(tmp_path / "x.safetensors").factors["unet"]["m"]
    np.testing.assert_allclose(found_a @ found_b, a @ b, rtol=2e-3)
    assert not read_subject(tmp_path / "x.safetensors").factors["unet"]["zero"][1].any()


@pytest.mark.parametrize(
    ("target", "patched", "raw"), [("patched", True, False), ("raw", False, True), ("both", True, True)]
)
def test_target_chooses_the_unet(target: str, patched: bool, raw: bool) -> None:
    subject = Subject("x", "sks", "mug", {"unet": random_factors(MODULES)}, target=target)  # type: ignore[arg-type]
    assert bool(subject.factors_for("unet")) == patched and bool(subject.factors_for("unet_raw")) == raw
    assert subject.factors_for("text_encoder") == {}


def test_slots_come_from_the_table() -> None:
    entry = {"slots": [{"module": "a.to_k", "in": 6, "out": 5, "rank": 8}]}
    assert slots_of(entry) == SLOTS[:1] and slots_of({}) == ()


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": np.ones(1, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(FileFormatError, match="not a subject file"):
        read_subject(tmp_path / "x.safetensors")
    save_file({"x": np.ones(1, np.float32)}, tmp_path / "y.safetensors", {"dreammix_subject": '{"schema": 99}'})
    with pytest.raises(FileFormatError, match=r"schema 99.*update"):
        read_subject(tmp_path / "y.safetensors")
    with pytest.raises(FileFormatError, match="missing"):
        read_subject(tmp_path / "none.safetensors")
