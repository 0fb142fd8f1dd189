"""The files of a base model: an SDXL checkpoint, a Fooocus patch and its head, another VAE or tokenizer.

The checkpoint is a diffusers folder (`core/diffusers_folder.py`) or a single file (`core/single_file.py`). Nothing here
needs torch. Weights are read one tensor at a time, when they are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dreammix_trt.core import fooocus, keymap
from dreammix_trt.core.asuka_folder import CONFIG as ASUKA_CONFIG
from dreammix_trt.core.asuka_folder import PARTS, AsukaFolder
from dreammix_trt.core.base_tokenizers import BaseTokenizers
from dreammix_trt.core.diffusers_folder import describe_choice, find_weight_files, read_config, read_configs, read_state
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.files import explain_read_errors, sha256_of
from dreammix_trt.core.hub_cache import find_snapshot
from dreammix_trt.core.recognise import check_sdxl, check_weights
from dreammix_trt.core.single_file import explain_odd_tensors, read_single_file, read_vae
from dreammix_trt.core.stored import Array, Floats
from dreammix_trt.core.tensors import Weights, open_tensors
from dreammix_trt.core.token_adapter import FILE_NAME as TOKEN_ADAPTER
from dreammix_trt.core.token_adapter import TokenAdapter

State = Mapping[str, Floats]
Config = dict[str, Any]

EMBEDDED = Path(__file__).parents[1] / "models" / "micro-sdxl"
EMBEDDED_LCM = EMBEDDED / "lcm_lora.safetensors"  # made by `dreammix-trt distill`
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_NO_INPAINTING = (
    "no inpainting base: it has no inpainting patch and head, so pictures will fit their surroundings badly. Give "
    "Fooocus' two files with --patch inpaint_v26.fooocus.patch --head fooocus_inpaint_head.pth{place}; they are at "
    "https://huggingface.co/lllyasviel/fooocus_inpaint, tagged openrail (read its terms). Or take a base whose UNet "
    "has nine input channels"
)
_PATCHED = "an inpainting UNet brings its own head; omit patch and head, or use a text-to-image base"


@dataclass(frozen=True)
class BaseFiles:
    """A base model on disk, checked. Make it with `BaseFiles.open`. Weights are read when they are needed.

    folder: the diffusers folder or the single file.
    patch, head_file: the files of the inpainting patch and its head; None for a base without them.
    patch_biases: whether the patch's `.bias` deltas are applied (Fooocus applies them, the reference does not).
    configs: component name -> its config.json. The UNet's always says 4 input channels.
    nine_channels: whether the UNet has five more input channels, which are its inpaint head.
    vae: a VAE used instead of the base's own.
    tokenizer: a folder used instead of the base's own tokenizers.
    asuka: ASUKA's prior and decoder for this base; None: it has neither.
    tokens: the adapter that makes a subject of one picture on this base; None: it has none.
    """

    folder: Path
    patch: Path | None
    head_file: Path | None
    patch_biases: bool
    configs: Mapping[str, Config] = field(repr=False)
    nine_channels: bool = field(default=False, kw_only=True)
    vae: Path | None = field(default=None, kw_only=True)
    tokenizer: Path | None = field(default=None, kw_only=True)
    asuka: AsukaFolder | None = field(default=None, kw_only=True)
    tokens: TokenAdapter | None = field(default=None, kw_only=True)

    @classmethod
    def open(
        cls,
        path: str | Path | None = None,
        patch: str | Path | None = None,
        head: str | Path | None = None,
        patch_biases: bool = False,
        *,
        vae: str | Path | None = None,
        tokenizer: str | Path | None = None,
        asuka: str | Path | None = None,
        tokens: str | Path | None = None,
    ) -> BaseFiles:
        """Open a base and check it. Reads headers only, and the vocabularies of tokenizers.

        path: a diffusers folder, a model's folder in the hub's cache, or a single `.safetensors` or `.ckpt` file; None:
            the embedded model.
        patch, head: files of the inpainting patch and its head; None: those in the base's folder, or beside its single
            file where that has no head of its own, if any.
        patch_biases: see `BaseFiles`.
        vae: a folder with config.json and weights, a folder that has them in `vae/`, or a file.
        tokenizer: a folder with `tokenizer/` and `tokenizer_2/`, or with the files of one tokenizer for both encoders.
        asuka, tokens: a folder as `core/asuka_folder.py` has it, a file as `core/token_adapter.py` has it; None: none,
            see `find_own_extras`.

        Raises `FileFormatError` when this is not an epsilon-predicting SDXL (the message says what it is); when a part
        is missing, truncated, damaged or cannot be read; when a tokenizer does not fit the text encoders; when only one
        of patch and head is present; and when the UNet has a head of its own besides.
        """
        with explain_read_errors(EMBEDDED if path is None else path):
            base = cls._find(path, vae, tokenizer)
            patch_file, head_file = base._find_patch(patch, head)
            base = base._open_extras(Path(asuka) if asuka else None, Path(tokens) if tokens else None)
        if base.nine_channels and (patch_file or head_file):
            raise FileFormatError(f"{patch_file or head_file}: does not go with {base.folder}: {_PATCHED}")
        if (patch_file is None) != (head_file is None):
            there, absent = ("patch", "head") if head_file is None else ("head", "patch")
            raise FileFormatError(
                f"{patch_file or head_file}: an inpaint {there} without its {absent}; patch and head belong together"
            )
        return replace(base, patch=patch_file, head_file=head_file, patch_biases=patch_biases)

    @classmethod
    def _find(cls, path: str | Path | None, vae: str | Path | None, tokenizer: str | Path | None) -> BaseFiles:
        """Open and check the base without patch and head."""
        folder = EMBEDDED if path is None else find_snapshot(Path(path))
        if path is None and not folder.is_dir():
            raise FileFormatError(f"the embedded model is not installed ({folder}); name a base instead")
        own_vae = _find_vae(Path(vae)) if vae is not None else None
        own_tokenizer = find_snapshot(Path(tokenizer)) if tokenizer is not None else None
        configs = _read_configs(folder, own_vae)
        check_sdxl(folder, configs, own_vae)
        base = cls(folder, None, None, False, configs, vae=own_vae, tokenizer=own_tokenizer)
        channels = check_weights(folder, configs, {name: base._open_weights(name) for name in COMPONENTS})
        configs["unet"] = {**configs["unet"], "in_channels": 4}
        base.tokenizers.check({name: configs[name]["vocab_size"] for name in ("text_encoder", "text_encoder_2")})
        return replace(base, nine_channels=channels == 9)

    def _find_patch(self, patch: str | Path | None, head: str | Path | None) -> tuple[Path | None, Path | None]:
        """Patch and head, given or found. Beside a single file both have to lie; a 9-channel one needs none."""
        alone = not self.folder.is_dir()
        place = self.folder.parent if alone and not self.nine_channels else self.folder
        found = _choose_file(patch, place, "*.fooocus.patch"), _choose_file(head, place, "*inpaint_head.*")
        return (None, None) if alone and patch is None and head is None and None in found else found

    def find_own_extras(self) -> BaseFiles:
        """This base with `asuka/` and the token adapter of its folder, where it has them and no others were given;
        checked as in `open`."""
        asuka, tokens = self.folder / "asuka", self.folder / TOKEN_ADAPTER
        with explain_read_errors(self.folder):
            return self._open_extras(
                asuka if self.asuka is None and (asuka / ASUKA_CONFIG).is_file() else None,
                tokens if self.tokens is None and tokens.is_file() else None,
            )

    def _open_extras(self, asuka: Path | None, tokens: Path | None) -> BaseFiles:
        """This base with an ASUKA folder and a token adapter, checked against it; None: what it has."""
        found: dict[str, Any] = {"asuka": AsukaFolder.open(asuka)} if asuka else {}
        found |= {"tokens": TokenAdapter.open(tokens)} if tokens else {}
        for each in found.values():
            each.check_fit(self.configs)
        return replace(self, **found)

    @property
    def name(self) -> str:
        """What the base is called: its folder or file, or the model in the hub's cache."""
        place = self.folder.parent
        return place.parent.name.rpartition("--")[2] if place.name == "snapshots" else self.folder.name

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a person should know of the base: what was chosen among its files, and what it lacks."""
        found = []
        if self.folder.parent.name == "snapshots":
            found.append(f"{self.folder.parent.parent}: a folder of the hub's cache; {self.folder.name} in it is used")
        if self.folder.is_dir():
            own = [name for name in COMPONENTS if name != "vae" or self.vae is None]
            found += filter(None, (describe_choice(self.folder / name, name) for name in own))
        if not self.has_head:
            place = ", or lay them into the base's folder" if self.folder.is_dir() else ""
            found.append(f"{self.name}: {_NO_INPAINTING.format(place=place)}")
        return tuple(found)

    @property
    def tokenizers(self) -> BaseTokenizers:
        """Those of the text encoders."""
        return BaseTokenizers(self.folder, self.tokenizer)

    @property
    def native_side(self) -> int:
        """The side in pixels of the pictures that the base was trained on (SDXL: 1024)."""
        return int(self.configs["unet"]["sample_size"]) * 8

    @property
    def latent_channels(self) -> int:
        return int(self.configs["vae"]["latent_channels"])

    @property
    def feature_channels(self) -> int:
        """Channels of the UNet's first convolution, to which the head's feature is added (SDXL: 320)."""
        return int(self.configs["unet"]["block_out_channels"][0])

    @property
    def divisor(self) -> int:
        """Picture sides must be multiples of this many pixels (SDXL: 32)."""
        return int(8 * 2 ** (len(self.configs["unet"]["block_out_channels"]) - 1))

    @property
    def scaling_factor(self) -> float:
        return float(self.configs["vae"]["scaling_factor"])

    @property
    def has_head(self) -> bool:
        """Whether the base has an inpaint head: Fooocus' with its patch, or a 9-channel UNet's own."""
        return self.nine_channels or self.head_file is not None

    @property
    def head_padding(self) -> Literal["replicate", "zeros"]:
        """How the head's inputs are padded: Fooocus repeats their edges, a 9-channel UNet's conv_in pads with zeros."""
        return "zeros" if self.nine_channels else "replicate"

    def hash_contents(self, component: str | None = None) -> dict[str, str]:
        """Hash every file that decides what the base computes; what stands beside it is asked for by name.

        component: one of `COMPONENTS` ("unet" is patched, "unet_raw" is not), "tokenizer" (both), "inpaint_head",
            "asuka_prior", "asuka_decoder", "token_proj" or "token_select", which no file decides: hash its files only.
            In a single file every component but these depends on the whole file.

        Returns file -> sha256 in hex. Files in the base's folder are named by their relative paths.
        """
        names = (*COMPONENTS, "tokenizer", "inpaint_head") if component is None else (component,)
        with explain_read_errors(self.folder):
            files = {key: file for name in names for key, file in self._list_files(name).items()}
            return {key: sha256_of(file) for key, file in sorted(files.items())}

    def state(self, component: str) -> Weights:
        """The weights of a component as float32, under the classic names of diffusers and transformers
        (`text_model....`).

        component: "text_encoder", "text_encoder_2", "vae" or "unet" (unpatched, with 4 input channels).
        """
        weights = self._open_weights(component)
        if component == "unet" and self.nine_channels:
            return weights.arrange({name: (name, _keep_four if name == "conv_in.weight" else None) for name in weights})
        return weights

    def unet_patched_state(self) -> Weights:
        """The weights of the UNet with the inpainting patch added; without a patch, the raw UNet.

        The patch is added to each tensor when it is read.
        """
        raw = self.state("unet")
        if self.patch is None:
            return raw
        names = keymap.sgm_to_diffusers(self.configs["unet"])
        try:
            return fooocus.apply_patch(raw, fooocus.read_patch(self.patch), names, biases=self.patch_biases)
        except FileFormatError as error:
            raise FileFormatError(f"{self.patch} on {self.folder}: {error}") from error

    def head(self) -> Floats:
        """Read the inpaint head: float32 (feature channels, 5, 3, 3), input channels [mask, masked latent x 4].

        Raises `FileFormatError` when the base has no head or the head has another number of channels.
        """
        if self.nine_channels:
            return self._open_weights("unet").arrange({"head": ("conv_in.weight", _take_head)})["head"]
        if self.head_file is None:
            raise FileFormatError(f"{self.folder}: this base has no inpaint head; give one with its patch")
        head = fooocus.read_head(self.head_file)
        if head.shape[0] != self.feature_channels:
            raise FileFormatError(
                f"{self.head_file}: a head of {head.shape[0]} channels does not fit the base's {self.feature_channels}"
            )
        return head

    def _open_weights(self, component: str) -> Weights:
        if component == "vae" and self.vae is not None:
            return read_state(self.vae, "vae") if self.vae.is_dir() else read_vae(open_tensors(self.vae))[1]
        if self.folder.is_dir():
            return read_state(self.folder / component, component)
        return read_single_file(self.folder, vae=component == "vae")[component][1]

    def _list_files(self, name: str) -> dict[str, Path]:
        """The files that decide a component, by their names in a passport."""
        if name == "tokenizer":
            return self.tokenizers.list_files()
        for part in PARTS:
            if name == f"asuka_{part}":
                return self.asuka.list_files(part) if self.asuka else {}
        if name in ("token_proj", "token_select"):
            return self.tokens.list_files() if self.tokens and name == "token_proj" else {}
        if name == "inpaint_head" and not self.nine_channels:
            return {name: self.head_file} if self.head_file else {}
        component = "unet" if name in ("unet_raw", "inpaint_head") else name
        patch = {"patch": self.patch} if name == "unet" and self.patch else {}
        override = self.vae if component == "vae" else None
        if override is None and self.folder.is_file():
            return {"base": self.folder, **patch}
        if override is not None and override.is_file():
            return {"vae": override}
        folder = override or self.folder / component
        files = [*find_weight_files(folder, component), folder / "config.json"]
        return {**{f"{component}/{file.name}": file for file in files}, **patch}


def _read_configs(folder: Path, vae: Path | None) -> dict[str, Config]:
    """The config of every component. `vae`: a VAE used instead of the base's own."""
    own = tuple(name for name in COMPONENTS if name != "vae" or vae is None)
    if folder.is_dir() or not folder.exists():
        configs = read_configs(folder, own)
    else:
        configs = {name: config for name, (config, _) in read_single_file(folder, vae=vae is None).items()}
    if vae is not None:
        configs["vae"] = read_config(vae) if vae.is_dir() else _read_vae_config(vae)
    return configs


def _find_vae(path: Path) -> Path:
    """The folder or file of a VAE that the user gave; in a pipeline's folder, its vae/."""
    path = find_snapshot(path)
    if (path / "vae" / "config.json").is_file():
        return path / "vae"
    if not path.exists():
        raise FileFormatError(f"{path}: no such VAE")
    return path


def _read_vae_config(path: Path) -> Config:
    weights = open_tensors(path)
    try:
        return read_vae(weights)[0]
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error
    except (IndexError, ValueError) as error:
        raise explain_odd_tensors(path, error) from error


def _choose_file(given: str | Path | None, folder: Path, pattern: str) -> Path | None:
    if given is not None:
        if not Path(given).is_file():
            raise FileFormatError(f"{given}: no such file")
        return Path(given)
    found = sorted(folder.glob(pattern)) if folder.is_dir() else []
    if len(found) > 1:
        raise FileFormatError(f"{folder}: several files match {pattern}; say which one to use")
    return found[0] if found else None


def _keep_four(weight: Array) -> Array:
    return weight[:, :4]


def _take_head(weight: Array) -> Array:
    return weight[:, 4:]
