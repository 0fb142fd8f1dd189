"""What a training of ASUKA is asked for, checked, and the lesson that it makes of it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dreammix_trt.core.asuka import AsukaConfig, DecoderConfig, PriorConfig
from dreammix_trt.core.asuka_folder import AsukaFolder
from dreammix_trt.core.asuka_folder import Part as Network
from dreammix_trt.core.asuka_public import check_start, read_alignment, read_autoencoder, read_decoder
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.files import sha256_of
from dreammix_trt.core.tensors import Weights
from dreammix_trt.trainer.asuka.recipes import SMALL_SIDE, AsukaRecipe, Part
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.picture_pool import PicturePool
from dreammix_trt.trainer.preparing import Progress
from dreammix_trt.trainer.state_files import keep_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dreammix_trt.trainer.learning import Lesson

log = logging.getLogger(__name__)

#: of a recipe, what the numbers do not depend on
_NO_SETTINGS = ("checkpoint_every", "gradient_checkpointing")
#: of the settings, what decides the encoded views of the alignment
_VIEWS = ("pictures", "base", "config", "side", "crop", "views", "seed", "precision", "device")
#: part -> the network that it trains, and how the names of the parameters begin that learn
NETWORKS: dict[Part, tuple[Network, str]] = {
    "prior": ("prior", "mae."),
    "align": ("prior", "alignment."),
    "decoder": ("decoder", ""),
}


@dataclass(frozen=True)
class AsukaTask:
    """One part to train.

    folder: what was trained before in the place that is written; None: nothing.
    start: a file or folder whose weights the part begins with, as `read_start` takes it; None: those of `folder` do not
        count either.
    perceptual: VGG-16's weights; None: the decoder learns slopes instead.
    work: where encoded views are kept; None: nowhere.
    """

    part: Part
    base: BaseFiles
    pool: PicturePool
    recipe: AsukaRecipe
    config: AsukaConfig
    folder: AsukaFolder | None
    hardware: Hardware
    seed: int = 0
    start: Path | None = None
    perceptual: Path | None = None
    work: Path | None = None

    def settings(self) -> dict[str, Any]:
        """All that decides the numbers but the number of threads, as plain JSON values."""
        recipe = {name: value for name, value in asdict(self.recipe).items() if name not in _NO_SETTINGS}
        network, _ = NETWORKS[self.part]
        return {
            "part": self.part,
            "pictures": self.pool.describe(),
            "base": self.base.hash_contents(),
            "patch_biases": self.base.patch_biases,
            "config": self.config.to_dict()[network],
            "prior": _hash(self.folder, "prior") if self.part == "align" else None,
            "start": None if self.start is None else _hash_start(self.start),
            "perceptual": sha256_of(self.perceptual) if self.perceptual else None,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in recipe.items()},
            "seed": self.seed,
            **self.hardware.settings(),
        }

    def make_lesson(self, tell: Progress) -> tuple[Lesson, nn.Module]:
        """The lesson, and the whole network that learns in it, on the device. tell: is told of what is made first.

        Raises FileFormatError for weights of other shapes, to start with or of a perceptual distance.
        """
        import torch

        device = torch.device(self.hardware.device)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            network = self._make_network()
        if self.start is not None:
            take_start(network, self.part, self.start)
        network.to(device)
        return self._make_lesson(network, device, tell), network

    def _make_network(self) -> Any:
        if self.part == "decoder":
            from dreammix_trt.trainer.asuka.decoder import make_decoder

            return make_decoder(self.base, self.config.decoder)
        from dreammix_trt.trainer.asuka.prior import make_prior

        prior = make_prior(self.config.prior)
        if self.part == "align":
            assert self.folder is not None
            fill_weights(prior, _choose(self.folder.weights("prior"), "mae."))
        return prior

    def _make_lesson(self, network: Any, device: Any, tell: Progress) -> Lesson:
        if self.part == "prior":
            from dreammix_trt.trainer.asuka.prior import PriorLesson

            return PriorLesson(network, self.pool, self.recipe, device)
        if self.part == "align":
            from dreammix_trt.trainer.asuka.alignment import AlignLesson

            count = self.recipe.views
            return AlignLesson(
                network,
                self.base,
                self.hardware,
                self.pool,
                self.recipe,
                self.seed,
                self._keep_views,
                lambda share: tell("views", share, f"encoding {count} pictures with holes"),
            )
        from dreammix_trt.trainer.asuka.decoder import DecoderLesson
        from dreammix_trt.trainer.asuka.perceptual import VggDistance, slope_distance

        distance = VggDistance(self.perceptual).to(device) if self.perceptual else slope_distance
        return DecoderLesson(network, self.base, self.hardware, self.pool, self.recipe, distance)

    def _keep_views(self, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The encoded views of an earlier run in the work folder; where there are none they are made, and written."""
        settings = self.settings()
        key = hashlib.sha256(json.dumps({name: settings[name] for name in _VIEWS}, sort_keys=True).encode())
        from dreammix_trt.trainer.asuka.alignment import VIEW

        return keep_tensors(self.work and self.work / f"views-{key.hexdigest()[:16]}.safetensors", VIEW, make)

    def collect(self, network: nn.Module) -> dict[Network, Weights]:
        """The networks of the folder that is to be written: the trained one, and what is kept beside it.

        A new auto-encoder makes the old alignment useless, so it is left out then.
        """
        name, _ = NETWORKS[self.part]
        kept = {} if self.folder is None else {other: self.folder.weights(other) for other in self.folder.parts}
        state = {key: value.detach().cpu().float().numpy() for key, value in network.state_dict().items()}
        if self.part == "prior":
            state = {key: value for key, value in state.items() if key.startswith("mae.")}
        return {**kept, name: Weights.of(state)}


def config_for(base: BaseFiles) -> AsukaConfig:
    """The networks that suit a base."""
    context, pooled = (
        int(base.configs["unet"]["cross_attention_dim"]),
        int(base.configs["text_encoder_2"]["projection_dim"]),
    )
    vae = base.configs["vae"]
    if base.native_side <= SMALL_SIDE:
        return AsukaConfig.micro(vae, context, pooled)
    return AsukaConfig(PriorConfig(context_width=context, pooled_width=pooled), DecoderConfig.of_vae(vae))


def take_start(network: nn.Module, part: Part, place: Path) -> None:
    """Fill a network with the weights of `read_start`; what is missing stays, and is logged.

    Raises FileFormatError naming a tensor of another shape, or one that the network does not have.
    """
    weights, beginning = read_start(part, place), NETWORKS[part][1]
    own = {name: tuple(value.shape) for name, value in network.state_dict().items() if name.startswith(beginning)}
    fresh = [name for name in check_start(place, weights, own) if not name.endswith("pos_embed")]  # which is fixed
    if fresh:
        log.warning("%s lacks %d tensors, such as %s: they begin anew", place, len(fresh), fresh[0])
    fill_weights(network, weights)


def read_start(part: Part, place: Path) -> Weights:
    """The weights of one part, by the names in the part's own file.

    place: an ASUKA folder with that part; or what is public, as `core/asuka_public.py` reads it: for the prior the
        authors' mae_300.pth or another masked auto-encoder, such as facebook/vit-mae-base; asuka_alignment_*.pt; and
        asuka_decoder.ckpt.

    Raises FileFormatError for what is none of these.
    """
    network, beginning = NETWORKS[part]
    if (place / f"{network}.safetensors").is_file():
        weights = _choose(AsukaFolder.open(place).weights(network), beginning)
        if not list(weights):
            raise FileFormatError(f"{place}: this part ({part}) was not trained there; name another folder")
        return weights
    read = {"prior": read_autoencoder, "align": read_alignment, "decoder": read_decoder}[part]
    return read(place).rename(lambda name: beginning + name)


def fill_weights(network: nn.Module, weights: Weights) -> None:
    """Copy weights into the tensors of their names, whose shapes they have."""
    import torch

    with torch.no_grad():
        own = network.state_dict()
        for name in weights:
            own[name].copy_(torch.from_numpy(np.array(weights[name], np.float32)))


def _choose(weights: Weights, beginning: str) -> Weights:
    return weights.rename(lambda name: name if name.startswith(beginning) else None)


def check_parts(part: Part, folder: AsukaFolder | None, out: Path) -> None:
    """Raise InputError where the alignment has no auto-encoder to align."""
    if part == "align" and (folder is None or "prior" not in folder.parts):
        raise InputError(
            f"{out} holds no prior to align; train it first: dreammix-trt train-asuka prior IMAGES --out {out}"
        )


def is_trained(part: Part, folder: AsukaFolder | None) -> bool:
    """Whether a folder has a part."""
    network, start = NETWORKS[part]
    return (
        folder is not None
        and network in folder.parts
        and any(name.startswith(start) for name in folder.weights(network))
    )


def _hash_start(place: Path) -> dict[str, str]:
    """Of the files that decide what a training begins with."""
    if place.is_file():
        return {place.name: sha256_of(place)}
    return {file.name: sha256_of(file) for file in sorted(place.iterdir()) if file.is_file()}


def _hash(folder: AsukaFolder | None, network: Network) -> Mapping[str, str] | None:
    if folder is None:
        return None
    return {name: sha256_of(file) for name, file in folder.list_files(network).items() if "config" not in name}
