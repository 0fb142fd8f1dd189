"""A subject's attributes from a CLIP in a local folder: which usual words its photographs are nearest to.

Zero-shot classification (Radford et al. 2021, section 3.1) within each kind of attribute. Parts, decals and accessories
are phrases that no list of words holds, so CLIP names none.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from dreammix_trt.core.attributes import AttributeDictionary, with_article
from dreammix_trt.core.errors import FileFormatError, MissingExtraError
from dreammix_trt.core.extras import list_missing
from dreammix_trt.core.files import read_json
from dreammix_trt.core.vocabulary import USUAL
from dreammix_trt.trainer.attributes.describing import cut_out
from dreammix_trt.trainer.data import Photograph

log = logging.getLogger(__name__)

THRESHOLD: Final = 0.4
_NEEDED: Final = ("torch", "transformers")
_FILES: Final = "config.json, model.safetensors, vocab.json and merges.txt"
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's


class ClipDescriber:
    """Scores the words of each kind against the photographs.

    threshold: 0..1, the mean probability that a word must have among those of its kind.
    """

    def __init__(self, folder: str | Path, threshold: float = THRESHOLD) -> None:
        """Load it. Nothing is fetched and nothing unpickled.

        folder: of `transformers` files: config.json, model.safetensors, the tokenizer's files.

        Raises FileFormatError for a folder that is no such CLIP, MissingExtraError without torch and transformers.
        """
        missing = list_missing(_NEEDED)
        if missing:
            raise MissingExtraError(
                f"{', '.join(missing)}: not installed, CLIP needs it: pip install 'dreammix-trt[train]'"
            )
        self._folder, self._threshold = Path(folder), threshold
        kind = read_json(self._folder / "config.json").get("model_type")
        if kind != "clip":
            raise FileFormatError(f"{folder} holds a model of type {kind!r}; give one of type 'clip'")
        self._tokenizer, self._model = _load(self._folder)

    def describe(self, pictures: Sequence[Photograph], class_name: str) -> AttributeDictionary:
        """The words whose mean probability over the photographs reaches the threshold, the likeliest first.

        pictures: with the masks of the subject; CLIP sees it alone on grey.
        """
        found = {}
        for kind, shares in self.score(pictures, class_name).items():
            words = sorted(shares, key=lambda word: -shares[word])
            chosen = [word for word in words if shares[word] >= self._threshold]
            if chosen:
                found[kind] = chosen
            else:
                log.warning(
                    "%s is left out: CLIP gives %s %.2f, below %.2f", kind, words[0], shares[words[0]], self._threshold
                )
        return AttributeDictionary.of(class_name, found, f"clip {self._folder.name}", str(self._folder))

    def score(self, pictures: Sequence[Photograph], class_name: str) -> Mapping[str, Mapping[str, float]]:
        """kind -> word -> its probability among those of the kind, the mean over the photographs.

        That is the softmax of exp(logit_scale) * cos(picture, "a photo of a WORD CLASS").
        """
        import torch

        captions = [f"a photo of {with_article(f'{word} {class_name}')}" for words in USUAL.values() for word in words]
        text = self._tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        pixels = torch.from_numpy(np.stack([self._prepare(picture) for picture in pictures]))
        with torch.inference_mode():
            out = self._model(input_ids=text["input_ids"], attention_mask=text["attention_mask"], pixel_values=pixels)
        logits, at, found = out.logits_per_image.double().numpy(), 0, {}
        for kind, words in USUAL.items():
            part = logits[:, at : at + len(words)]
            at += len(words)
            shares = np.exp(part - part.max(1, keepdims=True))
            shares = (shares / shares.sum(1, keepdims=True)).mean(0)
            found[kind] = dict(zip(words, map(float, shares), strict=True))
        return found

    def _prepare(self, photograph: Photograph) -> npt.NDArray[np.float32]:
        """The subject as CLIP takes it, float32 (3, S, S)."""
        file = self._folder / "preprocessor_config.json"
        config = read_json(file) if file.is_file() else {}
        side = self._model.config.vision_config.image_size
        image = Image.fromarray(cut_out(photograph)).resize((side, side), Image.Resampling.BICUBIC)
        mean, deviation = (
            np.asarray(config.get(name, usual), np.float32)
            for name, usual in (("image_mean", _MEAN), ("image_std", _DEVIATION))
        )
        pixels = (np.asarray(image, np.float32) / 255 - mean) / deviation
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _load(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and model, float32."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        model, info = CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # whatever its files make transformers, tokenizers and safetensors raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileFormatError(f"{folder} is no whole CLIP of transformers ({said}); it needs {_FILES}") from error
    absent = sorted(name for name in info["missing_keys"] if not name.endswith("position_ids"))
    if absent or info["mismatched_keys"]:
        raise FileFormatError(f"{folder}: its weights lack {', '.join(absent[:3]) or 'the shapes of its config.json'}")
    return tokenizer, model.float().eval()
