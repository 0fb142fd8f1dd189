"""CLIP-T, CLIP-I and DINO by networks of `transformers` in local folders. Nothing is downloaded.

As DreamBooth does (Ruiz et al. 2023, section 4.2): CLIP-I and DINO are the cosine between a painted picture and a
photograph of the subject, the mean over all photographs. As we inpaint, both are crops: the square around the mask,
and around the subject in its photograph. CLIP-T is the cosine between the same crop and the prompt without the
subject's token, which is no word that CLIP knows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.files import read_json
from dreammix_trt.evaluation.metrics.metric import U8, Metric, Sample, read_references

Rows = NDArray[np.float32]
_ROWS = 16  # pictures at once
_UNUSED = ("position_ids", "mask_token")  # weights that embedding a picture does not use


class Encoder:
    """A vision transformer of a local folder, and the pictures it has seen last.

    kinds: values of `model_type` that it may have.
    """

    kinds: tuple[str, ...] = ()

    def __init__(self, folder: Path, option: str) -> None:
        """folder: config.json, preprocessor_config.json and weights, as transformers saves them.

        option: what errors call it.

        Raises InputError and FileFormatError for a folder of another kind, or with a file missing or damaged.
        """
        self._config = self._read_config(folder, option)
        self._mean, self._std, self._side = _read_preprocessing(folder / "preprocessor_config.json")
        try:
            self._load(folder)
        except Exception as error:  # what transformers and its readers raise is theirs to choose
            raise FileFormatError(
                f"{option} {folder}: cannot be loaded ({error}); fetch the whole model again"
            ) from error
        self._sample: Sample | None = None
        self._seen: Rows = np.zeros(0, np.float32)
        self._subject, self._references = "", np.zeros((0, 0), np.float32)

    def see(self, sample: Sample) -> Rows:
        """The embedding of the painted thing, float32, of unit length."""
        if sample is not self._sample:
            self._seen, self._sample = self.embed([sample.crop])[0], sample
        return self._seen

    def compare(self, sample: Sample) -> float | None:
        """Mean cosine of the painted thing and the subject's photographs; None: it has none."""
        if not sample.subject.photographs:
            return None
        if sample.subject.name != self._subject:
            self._references = self.embed(read_references(sample.subject))
            self._subject = sample.subject.name
        return float((self._references @ self.see(sample)).mean())

    def embed(self, crops: Sequence[U8]) -> Rows:
        """uint8 (h, w, 3), any size -> float32 (N, D) of unit length."""
        import torch

        parts = []
        for start in range(0, len(crops), _ROWS):
            pixels = np.stack([self._prepare(crop) for crop in crops[start : start + _ROWS]])
            with torch.inference_mode():
                parts.append(self._run(torch.from_numpy(pixels)).float().numpy())
        return _normalise(np.concatenate(parts))

    def _prepare(self, crop: U8) -> NDArray[np.float32]:
        small = Image.fromarray(crop).resize((self._side, self._side), Image.Resampling.BICUBIC)
        unit = np.asarray(small, np.float32) / np.float32(255)
        return np.ascontiguousarray(np.moveaxis((unit - self._mean) / self._std, -1, 0), np.float32)

    def _read_config(self, folder: Path, option: str) -> dict[str, Any]:
        if not (folder / "config.json").is_file():
            raise InputError(f"{option} {folder}: has no config.json; give a folder as transformers saves it")
        config = read_json(folder / "config.json")
        if config.get("model_type") not in self.kinds:
            raise InputError(
                f"{option} {folder}: config.json has model_type {config.get('model_type')!r}; "
                f"allowed: {', '.join(self.kinds)}"
            )
        return config

    def _load(self, folder: Path) -> None:
        raise NotImplementedError

    def _run(self, pixels: Any) -> Any:
        raise NotImplementedError


class Clip(Encoder):
    """CLIP: pictures and texts."""

    kinds = ("clip",)

    def _load(self, folder: Path) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self._model = _read_whole(CLIPModel, folder)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    def _run(self, pixels: Any) -> Any:
        return _pooled(self._model.get_image_features(pixel_values=pixels))

    def embed_text(self, text: str) -> Rows:
        """A text's embedding, float32, of unit length; what is longer than its context is cut."""
        import torch

        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer([text], truncation=True, max_length=length, return_tensors="pt")
        fields = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            found = _pooled(self._model.get_text_features(**fields)).float().numpy()
        return np.asarray(_normalise(found)[0])


class Dino(Encoder):
    """A vision transformer that saw no text: DINO (`vit`, as DreamBooth has) or DINOv2."""

    kinds = ("vit", "dinov2", "dinov2_with_registers")

    def _load(self, folder: Path) -> None:
        from transformers import AutoModel

        options = {"add_pooling_layer": False} if self._config["model_type"] == "vit" else {}
        self._model = _read_whole(AutoModel, folder, trust_remote_code=False, **options)

    def _run(self, pixels: Any) -> Any:
        return self._model(pixel_values=pixels, **self._resizing).last_hidden_state[:, 0]

    @property
    def _resizing(self) -> dict[str, bool]:
        """DINOv2 fits its positions to a picture by itself; a ViT is told to."""
        return {"interpolate_pos_encoding": True} if self._config["model_type"] == "vit" else {}


class ClipText(Metric):
    """CLIP-T."""

    name = "clip_t"
    about = "CLIP cosine between the painted crop and the prompt without the token"

    def __init__(self, clip: Clip) -> None:
        self._clip = clip

    def add(self, sample: Sample) -> float | None:
        text = self._clip.embed_text(drop_word(sample.prompt, sample.subject.token))
        return float(self._clip.see(sample) @ text)


class ClipImage(Metric):
    """CLIP-I."""

    name = "clip_i"
    about = "CLIP cosine between the painted crop and the subject's photographs, cropped to it"

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def add(self, sample: Sample) -> float | None:
        return self._encoder.compare(sample)


class DinoImage(ClipImage):
    """DINO: the class token's cosine."""

    name = "dino"
    about = "DINO cosine between the painted crop and the subject's photographs, cropped to it"


class ClipHole(Metric):
    """CLIP's cosine of what was painted and what is there in truth, black around both."""

    name = "clip_hole"
    about = "CLIP cosine between the painted hole and the true one, everything else black"

    def __init__(self, clip: Clip) -> None:
        self._clip = clip

    def add(self, sample: Sample) -> float | None:
        if sample.truth is None:
            return None
        hole = sample.mask[..., None]
        painted, true = self._clip.embed([sample.image * hole, sample.truth * hole])
        return float(painted @ true)


def drop_word(text: str, word: str) -> str:
    """A text without a word, in whatever case, and without the space it leaves."""
    return (
        " ".join(re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", " ", text, flags=re.IGNORECASE).split()) if word else text
    )


def _read_preprocessing(file: Path) -> tuple[Rows, Rows, int]:
    """Mean, standard deviation and side in pixels of what a network sees."""
    record = read_json(file)
    try:
        mean, std = (np.asarray(record[name], np.float32).reshape(3) for name in ("image_mean", "image_std"))
        size = record.get("crop_size") or record["size"]
        side = size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
        if not (isinstance(side, int) and 1 <= side <= 2048 and (std > 0).all()):
            raise ValueError(f"side {side}, image_std {std}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(
            f"{file}: image_mean, image_std and size are needed as transformers writes them ({error!r})"
        ) from error
    return mean, std, side


def _read_whole(kind: Any, folder: Path, **options: Any) -> Any:
    """A model of transformers. ValueError where weights are missing: transformers would draw them at random."""
    model, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    absent = sorted(name for name in info["missing_keys"] if not name.endswith(_UNUSED))
    if absent:
        raise ValueError(f"its weights lack {', '.join(absent[:3])}")
    return model.eval()


def _pooled(output: Any) -> Any:
    """The features of a call: transformers 5 gives an object with them, 4 the tensor."""
    return getattr(output, "pooler_output", output)


def _normalise(rows: Rows) -> Rows:
    return np.asarray(rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-12), np.float32)
