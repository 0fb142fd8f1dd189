"""An ASUKA folder: config.json, prior.safetensors and decoder.safetensors; either network may be missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from numpy.typing import NDArray

from dreammix_trt.core.asuka import AsukaConfig
from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.files import atomic_directory, read_json, sha256_of, write_json
from dreammix_trt.core.tensors import Weights, open_tensors, write_tensors

Part = Literal["prior", "decoder"]

PARTS: Final[tuple[Part, ...]] = get_args(Part)
CONFIG: Final = "config.json"
RECORD: Final = "train.json"
#: what is trained -> the components of a base that it is trained with; the prior is trained with none
_TRAINED_WITH: Final = {"align": ("unet", "inpaint_head", "vae"), "decoder": ("vae",)}


@dataclass(frozen=True)
class AsukaFolder:
    """A folder on disk, checked. Make it with `AsukaFolder.open`. Weights are read when they are needed.

    parts: the networks that it has.
    """

    folder: Path
    config: AsukaConfig
    parts: tuple[Part, ...]

    @classmethod
    def open(cls, path: str | Path) -> AsukaFolder:
        """Open a folder. Reads config.json and the headers of the weights.

        Raises `FileFormatError` when it is no ASUKA folder, has neither network, or a file is damaged.
        """
        folder = Path(path)
        try:
            config = AsukaConfig.of_dict(read_json(folder / CONFIG))
        except FileFormatError as error:
            raise FileFormatError(f"{folder}: not an ASUKA folder that can be used: {error}") from error
        found = tuple(part for part in PARTS if _file_of(folder, part).is_file())
        if not found:
            names = " nor ".join(f"{part}.safetensors" for part in PARTS)
            raise FileFormatError(f"{folder}: has neither {names}; train them with `dreammix-trt train-asuka`")
        made = cls(folder, config, found)
        for part in found:
            made.weights(part)
        return made

    @property
    def prior_side(self) -> int | None:
        """Of the pictures that the prior takes, in pixels; None: it has none."""
        return self.config.prior.side if "prior" in self.parts else None

    def read_record(self) -> dict[str, Any]:
        """What is told of their training, by part; {} where nothing is."""
        return read_json(self.folder / RECORD) if (self.folder / RECORD).is_file() else {}

    def weights(self, part: Part) -> Weights:
        """A network's weights by the names of `AsukaPrior` or `AsukaDecoder`."""
        return open_tensors(_file_of(self.folder, part))

    def list_files(self, part: Part) -> dict[str, Path]:
        """The files that decide a network, by their names in a passport; none where it is missing."""
        files = (self.folder / CONFIG, _file_of(self.folder, part))
        return {f"asuka/{file.name}": file for file in files} if part in self.parts else {}

    def hash_files(self) -> dict[str, str]:
        """The files of both networks, by their names in a passport -> sha256 in hex."""
        files = {name: file for part in self.parts for name, file in self.list_files(part).items()}
        return {name: sha256_of(file) for name, file in sorted(files.items())}

    def check_fit(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise `FileFormatError` naming the number by which these networks are not for a base.

        configs: the base's, by component.
        """
        prior, decoder = self.config.prior, self.config.decoder
        wanted = []
        if "prior" in self.parts:
            unet, text = configs["unet"]["cross_attention_dim"], configs["text_encoder_2"]["projection_dim"]
            wanted += [("prior: context_width", prior.context_width, unet, "UNet's condition")]
            wanted += [("prior: pooled_width", prior.pooled_width, text, "pooled text")]
        if "decoder" in self.parts:
            latent = configs["vae"]["latent_channels"]
            wanted += [("decoder: latent_channels", decoder.latent_channels, latent, "latent")]
        for name, found, expected, what in wanted:
            if found != expected:
                raise FileFormatError(
                    f"{self.folder / CONFIG}: {name} is {found}, but this base's {what} has {expected}: it was made "
                    "for another base; train one for this base with `dreammix-trt train-asuka`"
                )

    def check_aligned(self) -> None:
        """Raise `FileFormatError` for a prior that was not aligned: nothing can be painted with it yet."""
        if "prior" in self.parts and not any(name.startswith("alignment.") for name in self.weights("prior")):
            raise FileFormatError(
                f"{self.folder}: the prior is not aligned; align it: dreammix-trt train-asuka align IMAGES "
                f"--out {self.folder}"
            )

    def find_doubts(self, hash_contents: Callable[[str], Mapping[str, str]]) -> list[str]:
        """What was trained with other files than a base has, in sentences; of what train.json does not tell, nothing.

        hash_contents: the base's, see `BaseFiles`. Files count by what is in them: their names change.
        """
        found, record = [], self.read_record()
        for part, components in _TRAINED_WITH.items():
            known = record.get(part, {}).get("settings", {}).get("base")
            if not known or ("decoder" if part == "decoder" else "prior") not in self.parts:
                continue
            files = {name: digest for each in components for name, digest in hash_contents(each).items()}
            other = [name for name, digest in files.items() if digest not in known.values()]
            if other:
                found.append(
                    f"{self.folder}: {part} was trained with other files than this base's ({', '.join(other)}), so its "
                    f"pictures may be worse; train it for this base: dreammix-trt train-asuka {part}"
                )
        return found


def write_asuka(
    folder: str | Path,
    config: AsukaConfig,
    parts: Mapping[Part, Mapping[str, NDArray[Any]]],
    dtype: Literal["float16", "float32"] = "float16",
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write an ASUKA folder. It appears when it is complete, in the place of one that was there.

    parts: network -> its weights by name, arrays or `Weights`.
    record: of their training, for train.json.

    Raises `FileFormatError` for a weight that does not fit the dtype, InputError for a folder that is not ours.
    """
    _check_own(Path(folder))
    with atomic_directory(folder, CONFIG) as made:
        write_json(made / CONFIG, config.to_dict())
        if record:
            write_json(made / RECORD, dict(record))
        for part, state in parts.items():
            weights = Weights.of(state)
            shapes = {name: (dtype, weights.shape(name)) for name in weights}
            write_tensors(_file_of(made, part), shapes, weights.__getitem__)


def _check_own(folder: Path) -> None:
    """Raise InputError for a folder whose config.json is something else's, such as a VAE's."""
    if not (folder / CONFIG).is_file():
        return
    try:
        AsukaConfig.of_dict(read_json(folder / CONFIG))
    except FileFormatError as error:
        raise InputError(
            f"{folder}: its {CONFIG} is not ASUKA's ({error}), and all of it would be replaced; name a new directory"
        ) from error


def _file_of(folder: Path, part: Part) -> Path:
    return folder / f"{part}.safetensors"
