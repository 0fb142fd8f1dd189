"""A subject as data: the LoRA factors of one object, named and unpadded, and how they enter an engine.

The file does not depend on an engine's slots or rank; `pack` lays the factors out for one network of one base. The
engine adds `x @ A @ B` to each slot's output, so zeros switch a slot off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.lora import NETWORKS, Factors, Lora

Floats = NDArray[np.float32]
Target = Literal["patched", "raw", "both"]
SCHEMA = 1
_LARGEST = float(np.finfo(np.float16).max)
_TARGETS: dict[str, tuple[str, ...]] = {"patched": ("unet",), "raw": ("unet_raw",), "both": ("unet", "unet_raw")}


class Slot(NamedTuple):
    """A linear layer that takes factors: A (inputs, rank) and B (rank, outputs)."""

    module: str
    inputs: int
    outputs: int
    rank: int

    @property
    def size(self) -> int:
        """Numbers this slot takes in the packed row."""
        return (self.inputs + self.outputs) * self.rank


@dataclass(frozen=True)
class Subject:
    """One object the engine can draw.

    name: how a request calls it; token: its word in prompts ("sks"); class_name: what it is ("mug");
    factors: network -> module -> (A float32 (in, r), B float32 (r, out)), alpha / rank folded in;
    target: the UNet weights it was trained on (the raw UNet of the last steps gets none unless "raw" or "both");
    scale: strength, multiplied in by `pack`; base_key: the base it was made for; source_sha256: of the LoRA file.
    """

    name: str
    token: str
    class_name: str
    factors: Factors = field(repr=False)
    target: Target = "patched"
    scale: float = 1.0
    base_key: str = ""
    source_sha256: str = ""

    def factors_for(self, network: str) -> dict[str, tuple[Floats, Floats]]:
        """The factors an engine network takes: `network` may be "unet", "unet_raw" or a text encoder."""
        if network in ("unet", "unet_raw"):
            return self.factors.get("unet", {}) if network in _TARGETS[self.target] else {}
        return self.factors.get(network, {})


def subject_from_lora(lora: Lora, name: str, token: str = "sks", class_name: str = "", **more: Any) -> Subject:
    """A subject of a LoRA's factors; `more`: the remaining fields of `Subject`."""
    return Subject(name, token, class_name, lora.factors, **more)


def write_subject(path: str | Path, subject: Subject) -> None:
    """Write the subject as safetensors, float16, whole or not at all.

    Names are `<network>.<module>.A|B`; A and B are balanced to equal Frobenius norm before rounding, so that neither
    leaves float16's range.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    tensors = {}
    for network, modules in subject.factors.items():
        for module, (a, b) in modules.items():
            for side, factor in zip("AB", _balanced(a, b), strict=True):
                if not np.abs(factor).max(initial=0) <= _LARGEST:
                    raise FileFormatError(f"{network}.{module} has factors beyond float16; the LoRA is damaged")
                tensors[f"{network}.{module}.{side}"] = np.ascontiguousarray(factor, dtype=np.float16)
    facts = {name: getattr(subject, name) for name in _FACTS}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, {"dreammix_subject": json.dumps({"schema": SCHEMA, **facts}, sort_keys=True)})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_subject(path: str | Path) -> Subject:
    """Read what `write_subject` wrote; `FileFormatError` for anything else, and for a newer schema."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get("dreammix_subject", "null")
            tensors = {name: file.get_tensor(name).astype(np.float32) for name in list(file.keys())}
        facts = json.loads(text)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise FileFormatError(f"{path}: missing, truncated, or not a subject file ({error})") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("schema"), int):
        raise FileFormatError(f"{path}: not a subject file; make one of a LoRA with `dreammix-trt build --lora FILE`")
    if facts["schema"] > SCHEMA:
        raise FileFormatError(
            f"{path}: subject schema {facts['schema']}, this version reads {SCHEMA}; update dreammix-trt"
        )
    if facts.get("target") not in _TARGETS:
        raise FileFormatError(f"{path}: unknown target {facts.get('target')!r}, expected one of {', '.join(_TARGETS)}")
    factors: Factors = {}
    for name in sorted(key.removesuffix(".A") for key in tensors if key.endswith(".A")):
        network, module = name.split(".", 1)
        if network not in NETWORKS or f"{name}.B" not in tensors:
            raise FileFormatError(f"{path}: {name} is not a pair of factors of {', '.join(NETWORKS)}")
        factors.setdefault(network, {})[module] = (tensors[f"{name}.A"], tensors[f"{name}.B"])
    return Subject(factors=factors, **{name: facts[name] for name in _FACTS if name in facts})


def slots_of(entry: Mapping[str, Any]) -> tuple[Slot, ...]:
    """The slots of a network's entry in `networks.json` (its list "slots" of module, in, out, rank)."""
    return tuple(Slot(row["module"], row["in"], row["out"], row["rank"]) for row in entry.get("slots", ()))


def packed_size(slots: Sequence[Slot]) -> int:
    """P: how many numbers a packed row has."""
    return sum(slot.size for slot in slots)


def pack(factors: Mapping[str, tuple[Floats, Floats]], slots: Sequence[Slot], scale: float = 1.0) -> Floats:
    """One picture's packed `lora` row, float32 (P,): per slot A (in, rank) then B (rank, out), zero-padded in rank.

    scale multiplies B. Raises `FileFormatError` listing the modules without slot or of other shape (a LoRA for another
    base), or when the LoRA's rank exceeds the slots'.
    """
    by_module = {slot.module: slot for slot in slots}
    strangers = [
        f"{module} ({a.shape[0]} -> {b.shape[1]}"
        + (
            f", here {by_module[module].inputs} -> {by_module[module].outputs})"
            if module in by_module
            else ", no such slot)"
        )
        for module, (a, b) in sorted(factors.items())
        if module not in by_module or (a.shape[0], b.shape[1]) != by_module[module][1:3]
    ]
    if strangers:
        more = f" and {len(strangers) - 8} more" if len(strangers) > 8 else ""
        raise FileFormatError(
            f"this LoRA is for another base; {len(strangers)} modules do not fit: {', '.join(strangers[:8])}{more}"
        )
    rank = max((a.shape[1] for a, _ in factors.values()), default=0)
    room = min((by_module[module].rank for module in factors), default=rank)
    if rank > room:
        raise FileFormatError(
            f"this LoRA has rank {rank}, the engine's slots take {room}; "
            f"rebuild with `dreammix-trt build --slot-rank {rank}`"
        )
    row = np.zeros(packed_size(slots), np.float32)
    at = 0
    for slot in slots:
        if slot.module in factors:
            a, b = factors[slot.module]
            used, middle = a.shape[1], at + slot.inputs * slot.rank
            row[at:middle].reshape(slot.inputs, slot.rank)[:, :used] = a
            row[middle : middle + used * slot.outputs] = np.ravel(b * np.float32(scale))
        at += slot.size
    return row


_FACTS = ("name", "token", "class_name", "target", "scale", "base_key", "source_sha256")


def _balanced(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if norm_a == 0.0 or norm_b == 0.0:
        return np.zeros_like(a), np.zeros_like(b)
    ratio = np.float32(np.sqrt(norm_b / norm_a))
    return a * ratio, b / ratio
