"""Plans that would run programs on this computer are recognised and refused."""

from __future__ import annotations

import os
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from dreammix_trt.core.errors import EngineError
from dreammix_trt.core.files import digest_of
from dreammix_trt.core.store import check_files
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


def test_a_second_load_does_not_read_a_large_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for its hash nor in search of host code, unless the file changed or all is to be verified."""
    plan = tmp_path / "unet.engine"
    plan.write_bytes(b"weights!" * (1 << 17))
    files, opened = {plan.name: digest_of(plan)}, []
    open_file = Path.open

    def note(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == plan.name:
            opened.append(path)
        return open_file(path, *arguments, **options)

    def load(**options: bool) -> int:
        """How often the plan is opened."""
        opened.clear()
        check_files(tmp_path, files, remedy="", **{"verify": False} | options)
        refuse_host_code(plan, **options)
        return len(opened)

    monkeypatch.setattr(Path, "open", note)
    assert [load(), load(), load()] == [2, 0, 0]
    assert [load(verify=True), load()] == [2, 0]
    os.utime(plan, ns=(1, 1))
    assert [load(), load()] == [2, 0]
    shutil.copy2(plan, tmp_path / "copy")
    (tmp_path / "copy").replace(plan)
    assert [load(), load()] == [2, 0]


def test_host_code_that_came_into_a_large_plan_is_found(tmp_path: Path) -> None:
    """A change of content alone, behind the file's back, is found by verifying."""
    plan = tmp_path / "unet.engine"
    plan.write_bytes(bytes(1 << 20))
    refuse_host_code(plan)
    status = plan.stat()
    with plan.open("r+b") as stream:
        stream.write(make_elf(62))
    for _ in range(2):
        with pytest.raises(EngineError, match="carries code for the host"):
            refuse_host_code(plan)
    os.utime(plan, ns=(status.st_atime_ns, status.st_mtime_ns))
    refuse_host_code(plan)
    for options in ({"verify": True}, {}):
        with pytest.raises(EngineError, match="carries code for the host"):
            refuse_host_code(plan, **options)
