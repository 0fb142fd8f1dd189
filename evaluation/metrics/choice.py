"""Which metrics an evaluation has: all of them are named, and those that lack something say what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dreammix_trt.core.errors import MissingExtraError
from dreammix_trt.core.extras import list_missing
from dreammix_trt.evaluation.metrics.discriminator import IDS, PACKAGE, Discriminator
from dreammix_trt.evaluation.metrics.encoders import Clip, ClipHole, ClipImage, ClipText, Dino, DinoImage
from dreammix_trt.evaluation.metrics.fid import Fid, read_pictures
from dreammix_trt.evaluation.metrics.judged import JUDGED, Jury
from dreammix_trt.evaluation.metrics.lpips import Lpips
from dreammix_trt.evaluation.metrics.metric import U8, Metric, NotMeasured
from dreammix_trt.evaluation.metrics.pixels import Flip, Psnr, SeamGradient, Ssim
from dreammix_trt.evaluation.metrics.seen import ObjectSeen
from dreammix_trt.evaluation.metrics.truth import TRUTHFUL
from dreammix_trt.evaluation.protocol import Protocol

INSTALL = "pip install 'dreammix-trt[eval]'"


@dataclass(frozen=True)
class Weights:
    """Where networks lie that the user has; None: what needs them is not measured.

    clip, dino: folders as transformers saves them.
    inception: weights of the Inception v3 of FID, U-IDS and P-IDS.
    lpips: AlexNet's weights.
    real: folder of real pictures for FID; None: the protocol's scenes.
    judge: the embedded model's folder, where its judge knows what is painted.
    """

    clip: Path | None = None
    dino: Path | None = None
    inception: Path | None = None
    lpips: Path | None = None
    real: Path | None = None
    judge: Path | None = None


def choose_metrics(protocol: Protocol, weights: Weights) -> list[Metric]:
    """Every metric, opened where its weights are given, in the order of the tables.

    Raises InputError and FileFormatError for weights that cannot be used, and for what the judge does not know;
    MissingExtraError where a package is missing that weights were given for.
    """
    _require_packages(weights)
    metrics = [*_choose_judged(weights.judge), *_choose_encoded(weights)]
    metrics += [*_choose_inception(protocol, weights), Psnr(), Ssim()]
    metrics += [
        Flip()
        if not list_missing(["flip_evaluator"])
        else NotMeasured(Flip, f"flip-evaluator is not installed: {INSTALL}")
    ]
    metrics += [Lpips(weights.lpips) if weights.lpips else NotMeasured(Lpips, "give AlexNet's weights: --lpips FILE")]
    metrics += [SeamGradient(), *(kind() for kind in TRUTHFUL)]
    for metric in metrics:
        metric.check(protocol)
    return metrics


def _require_packages(weights: Weights) -> None:
    encoders = [weights.clip, weights.dino]
    needed = {"torch": [*encoders, weights.inception, weights.lpips], "transformers": encoders}
    needed["torchmetrics"] = [weights.lpips]
    missing = list_missing(name for name, files in needed.items() if any(files))
    if missing:
        raise MissingExtraError(f"{', '.join(missing)}: not installed, the weights that were given need it: {INSTALL}")


def _choose_judged(model: Path | None) -> list[Metric]:
    if model is None:
        kinds: tuple[type[Metric], ...] = (*JUDGED, ObjectSeen)
        return [NotMeasured(kind, "the judge knows the embedded model's world alone") for kind in kinds]
    jury = Jury(model)
    return [*(kind(jury) for kind in JUDGED), ObjectSeen()]


def _choose_encoded(weights: Weights) -> list[Metric]:
    metrics: list[Metric] = []
    if weights.clip is None:
        metrics += [NotMeasured(kind, "give CLIP's weights: --clip FOLDER") for kind in (ClipText, ClipImage, ClipHole)]
    else:
        clip = Clip(weights.clip, "--clip")
        metrics += [ClipText(clip), ClipImage(clip), ClipHole(clip)]
    if weights.dino is None:
        return [*metrics, NotMeasured(DinoImage, "give DINO's weights: --dino FOLDER")]
    return [*metrics, DinoImage(Dino(weights.dino, "--dino"))]


def _choose_inception(protocol: Protocol, weights: Weights) -> list[Metric]:
    if weights.inception is None:
        kinds: tuple[type[Metric], ...] = (Fid, *IDS)
        return [NotMeasured(kind, "give Inception's weights: --inception FILE") for kind in kinds]
    from dreammix_trt.evaluation.metrics.inception import Inception

    inception = Inception(weights.inception)
    fid = Fid(inception, _list_real(protocol, weights.real), inception.origin)
    if list_missing([PACKAGE]):
        return [fid, *(NotMeasured(kind, f"scikit-learn is not installed: {INSTALL}") for kind in IDS)]
    discriminator = Discriminator(inception)
    return [fid, *(kind(discriminator) for kind in IDS)]


def _list_real(protocol: Protocol, folder: Path | None) -> Iterable[U8]:
    from dreammix_trt.core.pictures import read_image

    if folder is not None:
        return read_pictures(folder)
    return (read_image(scene.image, name="scene").seen for scene in protocol.scenes)
