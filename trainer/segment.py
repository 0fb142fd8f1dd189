"""Masks for photographs that have none, made by a network that tells what stands in front.

Any U²-Net (Qin et al. 2020) or ISNet (Qin et al. 2022) in ONNX form fits, rembg's files among them: one input of
(1, 3, S, S), and a first output of (1, 1, S, S) that says how much each pixel belongs to the subject.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.files import atomic_file
from dreammix_trt.core.onnx_runtime import import_onnxruntime
from dreammix_trt.core.pictures import U8, read_image
from dreammix_trt.trainer.listing import list_photographs
from dreammix_trt.trainer.photographs import choose_twin, has_cut_out

if TYPE_CHECKING:
    import onnxruntime

log = logging.getLogger(__name__)
Style = Literal["u2net", "isnet"]

#: how pictures are normalised, after division by their brightest value: mean and deviation of each channel
_STYLES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "u2net": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
    "isnet": ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0)),
}
_SIDES = {"u2net": 320, "isnet": 1024}  # where a file takes any size
_NAMES = {"isnet": r"isnet|rmbg|\bdis\b", "u2net": r"u2net|silueta|birefnet|basnet"}
_LARGE = 768  # files that say nothing by their name: ISNets take larger pictures than this
_REMBG_FILES = ("isnet-general-use.onnx", "u2net.onnx", "silueta.onnx", "u2netp.onnx")
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Segmenter:
    """A network that finds the subject of a photograph. Make one with `open_segmenter`.

    size: (height, width) in pixels that it takes.
    style: how it wants pictures normalised.
    """

    file: Path
    size: tuple[int, int]
    style: str
    _session: onnxruntime.InferenceSession

    def find_subject(self, rgb: U8) -> U8 | None:
        """The subject of a picture uint8 (H, W, 3) as a soft mask uint8 (H, W); None: the network sees none.

        Raises FileFormatError when the network's output is no mask.
        """
        height, width = rgb.shape[:2]
        small = Image.fromarray(rgb).resize(self.size[::-1], Image.Resampling.LANCZOS)
        pixels = np.asarray(small, np.float32) / max(1, int(np.asarray(small).max()))
        mean, deviation = (np.asarray(values, np.float32) for values in _STYLES[self.style])
        taken = self._session.get_inputs()[0]
        array = ((pixels - mean) / deviation).transpose(2, 0, 1)[None].astype(_FLOATS[taken.type])
        share = _read_output(self.file, self._run(taken.name, array))
        low, high = float(share.min()), float(share.max())
        if high - low < 1e-4:
            return None
        soft = Image.fromarray(np.rint(255 * (share - low) / (high - low)).astype(np.uint8))
        return np.asarray(soft.resize((width, height), Image.Resampling.LANCZOS))

    def _run(self, name: str, array: Any) -> Any:
        try:
            return self._session.run([self._session.get_outputs()[0].name], {name: array})[0]
        except Exception as error:  # onnxruntime has no class of its own that they share
            raise FileFormatError(f"{self.file}: cannot run on a picture of {self.size} pixels ({error})") from error


def open_segmenter(file: str | Path | None, style: str | None = None, threads: int | None = None) -> Segmenter:
    """Open a segmenter.

    file: an ONNX file; None: the first that rembg has downloaded (U2NET_HOME, or ~/.u2net).
    style: "u2net" or "isnet"; None: as the file's name says, else ISNet's for large pictures.
    threads: CPU threads; None: all.

    Raises InputError for a file that is missing or an unknown style, FileFormatError for one that is no such network.
    """
    path = Path(file) if file is not None else _find_rembg_file()
    if style is not None and style not in _STYLES:
        raise InputError(f"segmenter style {style!r} is none of {', '.join(_STYLES)}")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; give a segmenter's ONNX file, such as rembg's u2net.onnx")
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads or 0, 3
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        text = str(error).splitlines()[0]
        raise FileFormatError(f"{path} is no ONNX network that can be opened ({text}); download it again") from error
    inputs = session.get_inputs()
    shape = inputs[0].shape if len(inputs) == 1 else []
    if len(shape) != 4 or shape[1] not in (3, None) or inputs[0].type not in _FLOATS:
        found = ", ".join(f"{each.name} {each.shape}" for each in inputs)
        raise FileFormatError(f"{path} is no U²-Net or ISNet: it takes {found}, not one picture of (1, 3, S, S)")
    height, width = (side if isinstance(side, int) else 0 for side in shape[2:])
    style = style or _guess_style(path.stem, height)
    return Segmenter(path, (height or _SIDES[style], width or _SIDES[style]), style, session)


@dataclass(frozen=True)
class NewMasks:
    """What `segment_photographs` did.

    made: the new masks.
    unseen: photographs in which the network saw no subject.
    """

    made: list[Path]
    unseen: list[Path]


def segment_photographs(
    folder: str | Path, segmenter: Segmenter, progress: Callable[[str, float, str], None] | None = None
) -> NewMasks:
    """Make a mask for every photograph that has none. Masks that are there are never changed.

    folder: photographs as `listing` finds them. Masks go to their `mask/` under the photograph's name.
    progress: called with (name, fraction, message) before each photograph.

    Raises InputError for a folder without photographs, or one that cannot be written.
    """
    listing, made, unseen = list_photographs(Path(folder), choose_twin), [], []
    for number, (image, mask) in enumerate(listing.pairs.items()):
        if progress is not None:
            progress("masks", number / len(listing.pairs), image.name)
        picture = read_image(image, name="photograph")
        if mask is not None or has_cut_out(picture):
            continue
        found = segmenter.find_subject(picture.on(255))
        if found is None or not (found > 127).any():
            unseen.append(image)
            continue
        made.append(_write_mask(found, listing.mask_folder, image))
    return NewMasks(made, unseen)


def _write_mask(mask: U8, folder: Path, image: Path) -> Path:
    names = (f"{image.stem}.png", f"{image.name}.png")  # the second for IMG_0.JPG beside another IMG_0
    target = next((folder / name for name in names if not (folder / name).exists()), None)
    if target is None:
        raise InputError(f"{folder / names[0]} is there, but is no mask of {image.name}: move it away")
    with atomic_file(target) as temporary:
        Image.fromarray(mask).save(temporary, "PNG")
    return target


def _read_output(file: Path, output: Any) -> npt.NDArray[np.float32]:
    """A network's first output as shares of the subject, float32 (h, w). Values beyond 0..1 are logits."""
    share: npt.NDArray[np.float32] = np.asarray(output, np.float32)
    if share.ndim < 2 or share.size != share.shape[-1] * share.shape[-2] or not np.isfinite(share).all():
        raise FileFormatError(f"{file}: its first output {share.shape} is no mask of one picture")
    share = share.reshape(share.shape[-2:])
    if share.min() < -0.01 or share.max() > 1.01:
        share = np.asarray(1 / (1 + np.exp(-np.clip(share, -60, 60))), np.float32)
    return share


def _guess_style(stem: str, side: int) -> Style:
    for style, pattern in _NAMES.items():
        if re.search(pattern, stem.lower()):
            return "isnet" if style == "isnet" else "u2net"
    return "isnet" if side >= _LARGE else "u2net"


def _find_rembg_file() -> Path:
    home = Path(os.environ.get("U2NET_HOME") or "~/.u2net").expanduser()
    found = next((home / name for name in _REMBG_FILES if (home / name).is_file()), None)
    if found is None:
        raise InputError(
            "--segmenter is missing: give a U²-Net's or ISNet's ONNX file, such as rembg's u2net.onnx or "
            f"isnet-general-use.onnx (there is none in {home})"
        )
    log.info("%s serves as segmenter", found)
    return found
