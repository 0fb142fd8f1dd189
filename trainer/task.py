"""What a training is asked for, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dreammix_trt.core.attributes import AttributeDictionary, with_article
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.files import sha256_of
from dreammix_trt.core.network_weights import BaseLora
from dreammix_trt.trainer.captions import subject_captions
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.losses import loss_weights
from dreammix_trt.trainer.photographs import PhotographFile
from dreammix_trt.trainer.recipes import Recipe

MOST_RANK = 256
#: of a recipe, what the numbers of a training do not depend on; rank, steps and rate are settings of their own
_NO_SETTINGS = ("rank", "steps", "learning_rate", "checkpoint_every", "gradient_checkpointing")
#: of the settings, what decides the samples that are prepared before the first step
_PREPARING = (
    *("photographs", "base", "patch_biases", "base_loras", "token", "class_name", "prompt", "captions"),
    *("attributes", "regular", "regular_attributes", "seed", "views", "crop_share", "regular_pictures"),
    *("precision", "device"),
)


class RegularPicture(Protocol):
    """A picture of another member of the class, as `regular_folder` lists them."""

    @property
    def image(self) -> Path: ...
    @property
    def mask(self) -> Path | None: ...
    @property
    def caption(self) -> str: ...


@dataclass(frozen=True)
class Names:
    """What the subject is called: its token and class, and the captions that hold the token."""

    token: str
    class_name: str
    prompt: str
    captions: tuple[str, ...]

    @classmethod
    def of(
        cls,
        token: str,
        class_name: str,
        prompt: str | None,
        captions: Sequence[str],
        attributes: AttributeDictionary | None = None,
    ) -> Names:
        """With the usual prompt where none is given, and captions made of attributes.

        Raises InputError for a caption without the token.
        """
        prompt = (prompt or f"a photo of {with_article(f'{token} {class_name}')}").strip()
        made = subject_captions(token, class_name, attributes) if attributes else ()
        given = tuple(caption.strip() for caption in captions)
        names = cls(token, class_name, prompt, (*given, *(caption for caption in made if caption not in given)))
        for text in names.prompts:
            if token.lower() not in text.lower().split():
                raise InputError(f"the prompt {text!r} lacks the token {token!r}; without it the subject has no name")
        return names

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt, then the further captions."""
        return self.prompt, *self.captions


@dataclass(frozen=True)
class Task:
    """A subject to learn on a base.

    names: with the captions that are trained. attributes: of the subject; None: they are not known.
    regular_attributes: whether pictures of the class that the base paints are captioned by them.
    regular: pictures of the class; None: the base paints some of its own.
    loss: the name of one.
    base_loras: merged into the base's weights, each with its file's hash.
    """

    base: BaseFiles
    photographs: Sequence[PhotographFile]
    names: Names
    recipe: Recipe
    rank: int
    steps: int
    learning_rate: float
    loss: str
    seed: int
    attributes: AttributeDictionary | None = None
    regular_attributes: bool = True
    regular: Sequence[RegularPicture] | None = None
    hardware: Hardware = field(default_factory=Hardware)
    base_loras: Sequence[tuple[BaseLora, str]] = ()

    @property
    def merged(self) -> list[BaseLora]:
        """The base's LoRAs without their hashes."""
        return [lora for lora, _ in self.base_loras]

    @property
    def paints_regular(self) -> bool:
        """Whether the base paints regular pictures of its own."""
        return self.recipe.beta > 0 and self.regular is None and self.recipe.regular_pictures > 0

    @property
    def takes_regular(self) -> bool:
        """Whether regular pictures that were given are trained on."""
        return self.recipe.beta > 0 and self.regular is not None

    def settings(self) -> dict[str, Any]:
        """All that decides the numbers of the training but the number of threads, as plain JSON values."""
        recipe = {name: value for name, value in asdict(self.recipe).items() if name not in _NO_SETTINGS}
        return {
            "photographs": {file.name: _hash_pair(file) for file in self.photographs},
            "base": self.base.hash_contents(),
            "patch_biases": self.base.patch_biases,
            "base_loras": [[digest, lora.scale, lora.target] for lora, digest in self.base_loras],
            **{name: getattr(self.names, name) for name in ("token", "class_name", "prompt")},
            "captions": list(self.names.captions),
            "attributes": self.attributes.to_dict() if self.attributes else {},
            "regular_attributes": self.regular_attributes,
            "regular": None if self.regular is None else _hash_regular(self.regular),
            "rank": self.rank,
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "loss": self.loss,
            "seed": self.seed,
            **recipe,
            **self.hardware.settings(),
        }

    def preparing_settings(self) -> dict[str, Any]:
        """Those that decide the samples which are made before the first step."""
        settings = self.settings()
        chosen = {"paints_regular": self.paints_regular, "takes_regular": self.takes_regular}
        return {**{name: settings[name] for name in _PREPARING}, **chosen}


def _hash_pair(file: PhotographFile) -> str:
    mask = "" if file.mask is None else sha256_of(file.mask)
    return f"{sha256_of(file.image)} {mask}{' inverted' if file.inverted else ''}"


def _hash_regular(pictures: Sequence[RegularPicture]) -> dict[str, str]:
    named = {}
    for picture in pictures:
        mask = "" if picture.mask is None else sha256_of(picture.mask)
        named[f"{picture.caption}/{picture.image.name}"] = f"{sha256_of(picture.image)} {mask}"
    return named


def explain_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs first between two trainings' settings, in words; "" where nothing does."""
    for name in dict.fromkeys((*old, *new)):
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        label = name.replace("_", " ")
        if isinstance(before, dict) and isinstance(now, dict):
            inner = next(key for key in (*before, *now) if before.get(key) != now.get(key))
            verb = "is new" if inner not in before else "is missing" if inner not in now else "is another one"
            return f"{label}: {inner} {verb}"
        return f"{label} is {now!r}, and was {before!r}"
    return ""


def check_options(
    class_name: str,
    token: str,
    loss: str,
    rank: int | None,
    steps: int | None,
    rate: float | None,
    seed: int,
    threads: int | None,
) -> None:
    """Raise InputError for what no training can have, before anything is read."""
    loss_weights(loss)
    if not class_name:
        raise InputError("the class name is empty; say what the subject is, for example: mug")
    if not token or len(token.split()) != 1:
        raise InputError(f"the token {token!r} must be one word, for example: sks")
    if rank is not None and not 1 <= rank <= MOST_RANK:
        raise InputError(f"rank is {rank}; it must be 1 to {MOST_RANK}")
    if steps is not None and not 1 <= steps <= 100_000:
        raise InputError(f"steps is {steps}; it must be 1 to 100000")
    if rate is not None and not (math.isfinite(rate) and 0 < rate <= 1):
        raise InputError(f"learning rate is {rate}; it must be above 0 and at most 1")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}; it must be 0 to 2^63 - 1")
    if threads is not None and not 1 <= threads <= 1024:
        raise InputError(f"threads is {threads}; it must be 1 to 1024")
