"""What the soak asks for: different requests, and who asks for which of them, by which API, and leaves when."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from dreammix_trt.core.attention_layers import list_attention_linears
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.subject import Subject, write_subject

U8 = npt.NDArray[np.uint8]
Door = Literal["native", "openai", "a1111"]
Fate = Literal["stays", "cancels", "vanishes", "kills"]
SIZES: Final = ((256, 256), (256, 320), (192, 256), (320, 224))  # height, width
STEPS: Final = (2, 3, 4)
SUBJECTS: Final = ("cup", "vase", "bowl")
DEATH: Final = "the device of whoever paints this is lost"  # see _soak_server
_RANK: Final = 4


@dataclass(frozen=True)
class Variant:
    """One request that can be told from all others by its picture. picture: uint8 (H, W, 3); mask: uint8 (H, W)."""

    picture: U8
    mask: U8
    fields: dict[str, Any]


@dataclass(frozen=True)
class Order:
    """What one client does.

    variant: the number of its request.
    start: seconds after the start of the run, at a rate of one order a second.
    patience: seconds until it cancels or vanishes, at the same rate.
    """

    number: int
    variant: int
    door: Door
    fate: Fate
    start: float
    patience: float


def draw_variants(count: int, subjects: Sequence[str] = SUBJECTS, seed: int = 0) -> list[Variant]:
    """Requests of mixed sizes, steps and subjects; neighbours differ in all three."""
    rng = np.random.default_rng(seed)
    found = []
    for k in range(count):
        height, width = SIZES[k % len(SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        mask = np.zeros((height, width), np.uint8)
        top, left = rng.integers(24, height // 3), rng.integers(24, width // 3)
        mask[top : top + height // 3, left : left + width // 3] = 255
        fields = {"prompt": "a red sks mug", "seed": k, "num_inference_steps": STEPS[k % len(STEPS)]}
        fields["subject"] = subjects[k // 2 % len(subjects)]
        picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        found.append(Variant(picture, mask, fields))
    return found


def draw_orders(count: int, variants: int, seed: int = 0, kills: bool = True) -> list[Order]:
    """Orders of a Poisson process: every tenth is cancelled, every twentieth vanishes, the middle one kills a worker.

    Those that vanish use OpenAI's stream, whose head tells them that they were accepted; those that cancel use our API.
    """
    rng = np.random.default_rng(seed)
    starts = np.cumsum(rng.exponential(1.0, count))
    fates = np.array(["stays"] * count, object)
    chosen = rng.permutation([k for k in range(count) if not (kills and k == count // 2)])
    fates[chosen[: round(count * 0.1)]] = "cancels"
    fates[chosen[round(count * 0.1) : round(count * 0.15)]] = "vanishes"
    if kills:
        fates[count // 2] = "kills"
    doors: dict[str, Door] = {"cancels": "native", "vanishes": "openai", "kills": "native"}
    found = []
    for k in range(count):
        door: Door = doors.get(fates[k]) or ("native", "native", "openai", "a1111")[rng.integers(4)]  # type: ignore[assignment]
        patience = float(rng.exponential(12.0))
        found.append(Order(k, int(rng.integers(variants)), door, fates[k], float(starts[k]), patience))
    return found


def write_subjects(folder: Path, names: Sequence[str] = SUBJECTS) -> dict[str, Path]:
    """Subject files with random factors of every attention layer of the embedded base."""
    files = {}
    for seed, name in enumerate(names):
        draw: Any = np.random.default_rng(seed).standard_normal
        pairs = {
            slot.module: tuple(
                np.float32(0.05) * draw(shape, np.float32) for shape in ((slot.inputs, _RANK), (_RANK, slot.outputs))
            )
            for slot in list_attention_linears(BaseFiles.open().configs["unet"])
        }
        factors: Any = {"unet": pairs, "unet_raw": pairs}
        files[name] = folder / f"{name}.safetensors"
        write_subject(files[name], Subject(name, "sks", "mug", factors))
    return files


def encode(pixels: U8) -> bytes:
    """An array as the bytes of a PNG."""
    to = io.BytesIO()
    Image.fromarray(pixels).save(to, "PNG", compress_level=1)
    return to.getvalue()


def decode(data: bytes) -> U8:
    """The bytes of a picture as an array."""
    return np.asarray(Image.open(io.BytesIO(data)))
