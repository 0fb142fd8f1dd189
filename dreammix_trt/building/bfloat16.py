"""Whether a base's pictures stay what they are when it is computed in bfloat16: some are painted both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.checkpoint import EMBEDDED, BaseFiles

Picture = npt.NDArray[np.uint8]
#: decibels over whole pictures, on the mean, below which an engine computes in float32 instead
LEAST_PSNR: Final = 35.0
#: the largest native side of which pictures are painted without being asked for: a minute on a processor
_LARGEST: Final = 256
_STEPS: Final = 12


@dataclass(frozen=True)
class Looked:
    """What a look at pictures found.

    psnr: of each picture, bfloat16 against float32, in decibels.
    alike: the share of parts that the judge of the embedded model reads alike in both; None for other bases.
    right: the share that it reads as they were asked for, in float32 and in bfloat16.
    """

    psnr: tuple[float, ...]
    alike: float | None = None
    right: tuple[float, float] | None = None

    @property
    def good(self) -> bool:
        """Whether the pictures may be painted in bfloat16."""
        return float(np.mean(self.psnr)) >= LEAST_PSNR

    def __str__(self) -> str:
        mean, least = float(np.mean(self.psnr)), min(self.psnr)
        said = f"bfloat16 against float32, {len(self.psnr)} pictures: PSNR {mean:.1f} dB, the lowest {least:.1f}"
        if self.alike is None or self.right is None:
            return said
        was, now = (f"{100 * share:.0f} %" for share in self.right)
        return f"{said}; the judge reads {100 * self.alike:.0f} % of parts alike, right in float32 {was}, now {now}"


def choose_count(asked: int | None, native_side: int) -> int:
    """How many pictures to look at. asked: None: some where a base is small, else none."""
    if asked is not None:
        return asked
    return 6 if native_side <= _LARGEST else 0


def look_at_pictures(base: BaseFiles, folders: Mapping[str, Path], count: int) -> Looked:
    """Paint pictures on ONNX Runtime in float32 and on OpenVINO in bfloat16, and compare them.

    folders: the base's parts.
    count: of pictures; each takes two requests of a dozen steps at the base's native side.
    """
    from dreammix_trt.engine.backends.onnxruntime.engine_set import EngineSet
    from dreammix_trt.engine.backends.openvino.engine_set import OpenVinoSet
    from dreammix_trt.trainer.micro.world import held_out_scenes

    scenes = held_out_scenes(count, size=base.native_side)
    with EngineSet.load(folders) as plain, OpenVinoSet.open(folders, precision="bfloat16") as half:
        was, now = (_paint(networks, folders, scenes) for networks in (plain, half))
    psnr = tuple(measure_psnr(one, other) for one, other in zip(was, now, strict=True))
    return Looked(psnr, *_judge(was, now, scenes)) if base.folder == EMBEDDED else Looked(psnr)


def measure_psnr(one: Picture, other: Picture) -> float:
    """Of two pictures in decibels; at most 99."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return min(99.0, 10 * float(np.log10(255**2 / error))) if error else 99.0


def _paint(networks: Any, folders: Mapping[str, Path], scenes: Sequence[Any]) -> list[Picture]:
    """Every scene's thing painted into its background."""
    from dreammix_trt.engine.dreammix import DreamMix
    from dreammix_trt.engine.text import Tokenizer
    from dreammix_trt.trainer.micro.captions import describe
    from dreammix_trt.trainer.micro.world import show_mask

    tokenizers = [Tokenizer.load(folders["base"] / name) for name in ("tokenizer", "tokenizer_2")]
    with DreamMix.on_host(networks, networks.facts, tokenizers) as dm:
        results = [
            dm.inpaint(
                scene.background, show_mask(mask), describe(scene.attributes), seed=seed, num_inference_steps=_STEPS
            )
            for seed, (scene, mask) in enumerate(scenes)
        ]
    return [np.asarray(result.images[0]) for result in results]


def _judge(was: Sequence[Picture], now: Sequence[Picture], scenes: Sequence[Any]) -> tuple[float, tuple[float, float]]:
    """See `Looked`: alike, right."""
    from dreammix_trt.trainer.micro.judge import Judge, crop_of_mask, expected_reading
    from dreammix_trt.trainer.micro.scoring import is_right

    judge = Judge.load(EMBEDDED)
    wanted = [expected_reading(scene.attributes) for scene, _ in scenes]
    read = [
        judge.read([crop_of_mask(picture, mask) for picture, (_, mask) in zip(pictures, scenes, strict=True)])
        for pictures in (was, now)
    ]

    def share(one: Sequence[Any], other: Sequence[Any]) -> float:
        pairs = zip(one, other, strict=True)
        return float(np.mean([is_right(mine, theirs, part) for mine, theirs in pairs for part in theirs]))

    return share(read[0], read[1]), (share(read[0], wanted), share(read[1], wanted))
