"""A token adapter: what a base learns once, on many objects, to draw a subject from one picture; one safetensors file.

Tensors: `token_proj.<name>` as in `TokenProjection`, and `factors.<name>` as in `core/factor_names.py`, the LoRA with
which the UNets read the rows. The metadata's card says for what base it is and how it was made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from dreammix_trt.core.attention_layers import list_attention_linears
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.files import sha256_of
from dreammix_trt.core.lora_names import join_first
from dreammix_trt.core.subject_tokens import TokenConfig
from dreammix_trt.core.tensors import Weights, open_tensors

SCHEMA: Final = 1
FILE_NAME: Final = "token_adapter.safetensors"
MARK: Final = "dreammix_token_adapter"  # the metadata of the file
FACTORS, PROJECTION = "factors.", "token_proj."
#: components of a base that decide what an adapter learns
_TRAINED_WITH: Final = ("unet", "text_encoder", "text_encoder_2", "vae")
_REMEDY: Final = "take the adapter that was made for this base"


@dataclass(frozen=True)
class Card:
    """What an adapter says of itself.

    config: where its tokens come from.
    base: the files of the base that it was trained with, name -> sha256, as `BaseFiles.hash_contents` gives them.
    trained_on: what its objects were, in words.
    rank: the largest of its factors; 0: it has none.
    settings: of its training.
    """

    config: TokenConfig
    base: Mapping[str, str] = field(default_factory=dict)
    trained_on: str = ""
    rank: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_text(cls, text: str) -> Card:
        """The card in a file's metadata. Raises `FileFormatError` for a newer one and for what is none."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise FileFormatError(f"its card is damaged ({error})") from error
        if not isinstance(values, dict) or not isinstance(values.get("schema"), int):
            raise FileFormatError("its card is damaged: it says no schema")
        if values["schema"] > SCHEMA:
            raise FileFormatError(f"its schema is {values['schema']}, this version reads {SCHEMA}; update dreammix-trt")
        kinds = {"base": dict, "trained_on": str, "rank": int, "settings": dict}
        for name, kind in kinds.items():
            if not isinstance(values.get(name), kind):
                raise FileFormatError(f"its card is damaged: {name} is {values.get(name)!r}")
        if not all(isinstance(digest, str) for digest in values["base"].values()):
            raise FileFormatError(f"its card is damaged: base is {values['base']!r}, expected file -> sha256")
        return cls(TokenConfig.of_dict(values.get("config")), **{name: values[name] for name in kinds})

    def to_text(self) -> str:
        """`of_text` reads it."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True)


@dataclass(frozen=True)
class TokenAdapter:
    """An adapter's file, checked. Make it with `TokenAdapter.open`. Weights are read when they are needed."""

    file: Path
    card: Card

    @classmethod
    def open(cls, path: str | Path) -> TokenAdapter:
        """Open the file, or that in a folder. Reads its header.

        Raises `FileFormatError` when it is missing, damaged, or no adapter.
        """
        file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        weights = open_tensors(file)
        if MARK not in weights.metadata:
            raise FileFormatError(f"{file}: no token adapter: it has no card")
        try:
            made = cls(file, Card.of_text(weights.metadata[MARK]))
        except FileFormatError as error:
            raise FileFormatError(f"{file}: a token adapter that cannot be used: {error}") from error
        made._check_tensors(weights)
        return made

    @property
    def config(self) -> TokenConfig:
        """Where its tokens come from."""
        return self.card.config

    def projection(self) -> Weights:
        """The weights of `TokenProjection`."""
        return open_tensors(self.file).strip_prefix(PROJECTION)

    def factors(self) -> Weights:
        """Its LoRA by the names of `core/factor_names.py`; `token_factors.read_factors` makes pairs of them."""
        return open_tensors(self.file).strip_prefix(FACTORS)

    def list_files(self) -> dict[str, Path]:
        """The file that decides it, by its name in a passport."""
        return {FILE_NAME: self.file}

    @property
    def sha256(self) -> str:
        """Of the file: which adapter this is, as subjects and passports name it."""
        return sha256_of(self.file)

    def hash_files(self) -> dict[str, str]:
        """Name in a passport -> sha256 in hex."""
        return {name: sha256_of(file) for name, file in self.list_files().items()}

    def check_fit(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise `FileFormatError` that lists the numbers and layers by which this is not for a base.

        configs: the base's, by component.
        """
        try:
            self.config.check_fit(configs)
        except FileFormatError as error:
            raise FileFormatError(f"{self.file}: {error}: it was made for another base; {_REMEDY}") from error
        here = {slot.module: (slot.inputs, slot.outputs) for slot in list_attention_linears(configs["unet"])}
        wrong = [
            f"{module} ({shape[0]} -> {shape[1]}, {_describe_place(here.get(module))})"
            for module, shape in self._list_modules().items()
            if here.get(module) != shape
        ]
        if wrong:
            raise FileFormatError(
                f"{self.file}: it was made for another base: {len(wrong)} of its layers do not fit: "
                f"{join_first(wrong)}; {_REMEDY}"
            )

    def find_doubts(self, hash_contents: Callable[[str], Mapping[str, str]]) -> list[str]:
        """What it was trained with beside this base's files, in sentences; where its card does not tell, nothing.

        hash_contents: the base's, see `BaseFiles`. Files count by what is in them: their names change.
        """
        if not self.card.base:
            return []
        files = {name: digest for part in _TRAINED_WITH for name, digest in hash_contents(part).items()}
        other = [f"{name} {digest[:12]}" for name, digest in files.items() if digest not in self.card.base.values()]
        if not other:
            return []
        known = ", ".join(f"{name} {digest[:12]}" for name, digest in self.card.base.items())
        return [
            f"{self.file}: the token adapter was trained with other files than this base's: here {', '.join(other)}, "
            f"its own {known}; so subjects from one picture may be worse"
        ]

    def _list_modules(self) -> dict[str, tuple[int, int]]:
        """Layer of the UNet -> its inputs and outputs, by the factors."""
        weights = self.factors()
        names = sorted({name.rpartition(".")[0] for name in weights})
        return {
            name.partition(".")[2]: (weights.shape(f"{name}.A")[0], weights.shape(f"{name}.B")[1]) for name in names
        }

    def _check_tensors(self, weights: Weights) -> None:
        """Raise `FileFormatError` for tensors that are missing, too many, or of other shapes than the card says."""
        config, found = self.config, {name: weights.shape(name) for name in weights}
        shapes: dict[str, tuple[int, ...]] = {"norm.weight": (config.width,), "norm.bias": (config.width,)}
        shapes |= {"linear.weight": (config.context_width, config.width), "linear.bias": (config.context_width,)}
        wrong = []
        for name, shape in ((f"{PROJECTION}{name}", shape) for name, shape in shapes.items()):
            if found.pop(name, None) != shape:
                wrong.append(f"{name} is {weights.shape(name) if name in weights else 'missing'}, expected {shape}")
        for name, shape in found.items():
            other = found.get(f"{name[:-1]}{'B' if name.endswith('.A') else 'A'}", ())
            inner = (shape[-1:], other[:1]) if name.endswith(".A") else (shape[:1], other[-1:])
            if not name.startswith(FACTORS) or not name.endswith((".A", ".B")) or len(shape) != 2:
                wrong.append(f"{name} {shape} is nothing that an adapter has")
            elif len(other) != 2 or inner[0] != inner[1]:
                wrong.append(f"{name} {shape} is no pair with {other or 'nothing'}")
        if wrong:
            raise FileFormatError(f"{self.file}: damaged, or not what its card says: {join_first(wrong)}; {_REMEDY}")


def _describe_place(shape: tuple[int, int] | None) -> str:
    return f"here {shape[0]} -> {shape[1]}" if shape else "which this base lacks"
