"""A subject from one picture: a photograph and its mask become rows of the text condition (docs/algorithm.md, 17).

What the paper leaves open is decided in `core/subject_tokens.py`; here its networks are called in order. Photographs of
one object are pooled: the cells of all of them are scored together, and the selection is one over all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.masks import mask_from_alpha, read_mask
from dreammix_trt.core.networks import kv_name, names_of_group
from dreammix_trt.core.pictures import PictureIn, name_source, read_image
from dreammix_trt.core.reference_pictures import place_on_white
from dreammix_trt.core.remarks import remark
from dreammix_trt.core.request import Request
from dreammix_trt.core.seam import BaseFacts, Networks
from dreammix_trt.core.sources import Source
from dreammix_trt.core.subject_tokens import TokenConfig, is_in_stack, mark_cells, select_tokens
from dreammix_trt.engine.text import Tokenizer

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
#: finds the subject of a picture uint8 (H, W, 3): a mask uint8 (H, W), or None where it sees none
Segment = Callable[[U8], U8 | None]
_FEW_CELLS = 4  # an object of fewer cells on its longer side has hardly a detail to keep


@dataclass(frozen=True, eq=False)
class Reference:
    """A photograph of a subject, as the networks take it.

    image: the object on white, float32 (1, 3, side, side) in [-1, 1].
    inside: which cells have any pixel of the object, float32 (N,).
    digest: sha256 of the photograph's pixels and its mask, in hex.
    """

    image: F32
    inside: F32
    digest: str


@dataclass(frozen=True, eq=False)
class ClassText:
    """The class's name, as both encoders read it: hidden (1, 77, C) and pooled (1, Dp)."""

    hidden: F32
    pooled: F32


def read_references(
    image: Source | Sequence[Source],
    mask: Source | Sequence[Source | None] | None,
    segment: Segment | None,
    config: TokenConfig,
) -> list[Reference]:
    """Read the photographs of an object.

    image, mask: one, or as many of each. A mask of None: the photograph's own transparency, else what `segment` finds.

    Remarks on an object that is small, and on one of few cells.

    Raises InputError for another number of masks, a photograph without a mask, an empty mask and one that marks all.
    """
    images: list[Source] = _list(image)
    masks: list[Source | None] = _list(mask) if mask is not None else [None] * len(images)
    if not images:
        raise InputError("image is an empty list: give a photograph of the subject")
    if len(masks) != len(images):
        raise InputError(f"{len(images)} photographs and {len(masks)} masks: give one mask for each, in their order")
    return [_read_reference(photo, each, segment, config) for photo, each in zip(images, masks, strict=True)]


def _list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _read_reference(image: Source, mask: Source | None, segment: Segment | None, config: TokenConfig) -> Reference:
    label, picture = name_source(image, "image"), read_image(image)
    marked = _find_mask(picture, mask, label, segment) > 127
    if marked.all():
        raise InputError(
            f"the mask of {label} marks the whole picture, so nothing tells the object from what is behind it: mark "
            "the object alone; where it fills the picture, put that on a larger white one and mark it there"
        )
    rgb = picture.on(255)
    placed, seen = place_on_white(rgb, marked, config.side)
    inside = mark_cells(seen, config)
    _tell_expectations(label, marked, int(inside.sum()), config)
    digest = hashlib.sha256(str(rgb.shape).encode() + rgb.tobytes() + marked.tobytes()).hexdigest()
    return Reference(placed[None], inside, digest)


def _find_mask(picture: PictureIn, mask: Source | None, label: str, segment: Segment | None) -> U8:
    """uint8 (H, W), above 127 where the object is."""
    if mask is not None:
        return read_mask(mask, picture, name="mask", of_subject=True)
    if picture.alpha is not None and picture.alpha.min() <= 127:
        return mask_from_alpha(picture, label, of_subject=True)
    if segment is None:
        raise InputError(
            f"{label} has no mask: give one of its size, white where the object is (mask, --mask), or a network that "
            "finds the object (segment, --segment FILE)"
        )
    found = segment(picture.on(255))
    if found is None or not (found > 127).any():
        raise InputError(f"the segmenter sees no object in {label}: give a mask, white where the object is")
    return found


def _tell_expectations(label: str, marked: npt.NDArray[np.bool_], cells: int, config: TokenConfig) -> None:
    height, width = (int(np.ptp(np.flatnonzero(marked.any(axis)))) + 1 for axis in (1, 0))
    if max(height, width) < _FEW_CELLS * config.cell:
        remark(
            f"{label}: the object is {width}x{height} pixels, less than {_FEW_CELLS} cells of {config.cell}: it is "
            "enlarged, so expect its colours and rough shape, no details; a photograph that shows it larger helps"
        )
    elif cells < min(config.tokens, Request.token_count):
        remark(
            f"{label}: the object covers {cells} cells, and its further tokens are of the white beside it: request no "
            "more than so many (token_count), or give more photographs"
        )


def encode_class(class_name: str, tokenizers: Sequence[Tokenizer], networks: Networks) -> ClassText:
    """Encode the class's name. Raises InputError for one that is too long."""
    found = [
        networks.run(name, input_ids=tokenizer.encode(class_name)[None])
        for name, tokenizer in zip(names_of_group("text"), tokenizers, strict=True)
    ]
    return ClassText(np.concatenate([each["hidden"] for each in found], axis=-1), found[-1]["pooled"])


def find_features(
    references: Sequence[Reference], text: ClassText, networks: Networks, facts: BaseFacts, config: TokenConfig
) -> list[F32]:
    """The features of each reference, float32 (N, D); cells in rows from the top left."""
    attended = networks.run(kv_name("unet"), encoder_hidden_states=text.hidden)
    read = {name: values for name, values in attended.items() if is_in_stack(name, config)}
    side = np.float32(config.side)
    sizes = np.array([[side, side, 0, 0, side, side]], np.float32)
    found = []
    for reference in references:
        latent = np.float32(facts.scaling_factor) * networks.run("vae_encoder", image=reference.image)["mean"]
        given = {"sample": latent, "text_embeds": text.pooled, "time_ids": sizes, **read}
        found.append(networks.run("subject_features", **given)["features"][0])
    return found


def choose_tokens(features: Sequence[F32], inside: Sequence[F32], networks: Networks, config: TokenConfig) -> F32:
    """The most discriminative features, float32 (tokens, D): of one picture by its network, of several together."""
    if len(features) > 1:
        return select_tokens(np.concatenate(features), np.concatenate(inside), config.tokens)[0]
    chosen: F32 = networks.run("token_select", features=features[0][None], inside=inside[0][None])["tokens"][0]
    return chosen


def project(tokens: F32, networks: Networks, config: TokenConfig) -> F32:
    """Make rows of tokens: float32 (n, D) -> (n, context width), each by itself. Its network takes a fixed number."""
    padded = np.zeros((-(-len(tokens) // config.tokens) * config.tokens, config.width), np.float32)
    padded[: len(tokens)] = tokens
    made = [
        networks.run("token_proj", tokens=part[None])["token_rows"][0]
        for part in padded.reshape(-1, config.tokens, config.width)
    ]
    return np.concatenate(made)[: len(tokens)]


def make_rows(
    references: Sequence[Reference],
    class_name: str,
    tokenizers: Sequence[Tokenizer],
    networks: Networks,
    facts: BaseFacts,
    config: TokenConfig,
) -> F32:
    """The rows of a subject, float32 (tokens, context width), the most discriminative one first."""
    text = encode_class(class_name, tokenizers, networks)
    features = find_features(references, text, networks, facts, config)
    tokens = choose_tokens(features, [each.inside for each in references], networks, config)
    return project(tokens, networks, config)
