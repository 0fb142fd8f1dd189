"""Plans that would run programs on this computer are recognised and refused."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from dreammix_trt.core.errors import EngineError
from dreammix_trt.engine.backends.tensorrt.plans import holds_host_code, refuse_host_code


def make_elf(machine: int) -> bytes:
    """The head of a 64-bit little-endian ELF file for a processor."""
    return b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 3, machine, 1) + bytes(40)


def make_image(processor: int, magic: int) -> bytes:
    """The headers of a Windows executable."""
    return (
        b"MZ"
        + bytes(58)
        + struct.pack("<I", 64)
        + b"PE\0\0"
        + struct.pack("<H", processor)
        + bytes(18)
        + struct.pack("<H", magic)
    )


@pytest.mark.parametrize(
    "inside, found",
    [
        (b"", False), (bytes(1000), False), (make_elf(190), False), (b"\x7fELF", False), (b"PE\0\0 and text", False),
        (make_elf(62), True), (make_elf(183), True), (make_elf(190) + make_elf(62), True),
        (make_image(0x8664, 0x20B), True), (make_image(0xAA64, 0x20B), True), (make_image(0x1234, 0x20B), False),
    ],
)  # fmt: skip
def test_programs_for_the_host_are_found_in_a_plan(tmp_path: Path, inside: bytes, found: bool) -> None:
    plan = tmp_path / "n.plan"
    plan.write_bytes(b"ptrt" * 33 + inside + b"weights" * 5 if inside else b"")
    assert holds_host_code(plan) is found
    if found:
        with pytest.raises(EngineError, match=r"n\.plan carries code for the host"):
            refuse_host_code(plan)
    else:
        refuse_host_code(plan)


def test_the_programs_of_this_computer_are_recognised() -> None:
    assert holds_host_code(Path(sys.executable))
