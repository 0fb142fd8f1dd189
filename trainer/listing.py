"""Finds a subject's photographs and their masks in a folder, by names alone, and says what it leaves out and why.

Photographs lie in `image/`, in kohya's `10_sks mug/`, or in the folder itself. Masks lie in `mask/` under the
photograph's name, or beside the photograph as `NAME_mask.png`.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.pictures import readable_suffixes

log = logging.getLogger(__name__)

#: the sheet on which new masks are shown, in the photographs' folder
SHEET = "masks-to-look-at.png"
SEGMENT_HINT = "or let --segment make them: --segment --segmenter u2net.onnx"

_IMAGE_FOLDERS, _MASK_FOLDERS = ("image", "images", "img"), ("mask", "masks")
_MASK_ENDINGS = ("_mask", "-mask", ".mask", " mask", "_masklabel", "-masklabel", "_matte", "_alpha", "_seg", ".out")
_MASK_STARTS = ("mask_", "mask-", "mask.")
#: what says in words what the subject is; `train-many` reads it
_WORDS = ("subject.json", "attributes.json")
_REASONS = {
    ("txt", "caption", "wildcard"): "captions of other trainers are not read; give --prompt",
    ("heic", "heif", "hif"): "HEIC needs pillow-heif: pip install pillow-heif, or save it as JPEG",
    ("cr2", "cr3", "nef", "arw", "dng", "raf", "orf", "rw2"): "a camera's raw file; export it as JPEG",
    ("psd", "xcf", "kra", "svg", "pdf", "ai"): "an editor's file; export it as PNG",
    ("mov", "mp4", "avi", "mkv", "webm"): "a video; save some of its frames as pictures",
    ("zip", "7z", "rar", "tar", "gz"): "an archive; unpack it",
}


@dataclass
class Listing:
    """What a folder holds.

    pairs: photograph -> its mask, None where it has none; in order of names.
    left_out: reason -> files.
    mask_folder: where masks that are made for it belong.
    """

    pairs: dict[Path, Path | None] = field(default_factory=dict)
    left_out: dict[str, list[Path]] = field(default_factory=dict)
    mask_folder: Path = Path()

    def leave_out(self, reason: str, *files: Path) -> None:
        """Note files that are not used."""
        if files:
            self.left_out.setdefault(reason, []).extend(files)

    def explain(self) -> list[str]:
        """One sentence a reason, with the names of its files."""
        return [f"left out ({reason}): {', '.join(file.name for file in files)}" for reason, files in self._sorted()]

    def warn(self) -> None:
        """Log what is left out."""
        for line in self.explain():
            log.warning("%s: %s", self.mask_folder.parent, line)

    def _sorted(self) -> list[tuple[str, list[Path]]]:
        return sorted((reason, sorted(files)) for reason, files in self.left_out.items())


#: chooses among photographs of one name: (files, their mask) -> (photograph, its mask, reason -> files left out)
Choice = tuple[Path, Path | None, dict[str, list[Path]]]
ChooseTwin = Callable[[Sequence[Path], Path | None], Choice]


def list_photographs(folder: Path, choose_twin: ChooseTwin) -> Listing:
    """List a subject's photographs.

    choose_twin: asked about photographs that differ in their suffix alone, such as IMG_0.JPG and IMG_0.PNG.

    Raises InputError for a folder that is missing, holds no photographs, or photographs of several subjects.
    """
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {state}; give the folder that holds the subject's photographs")
    place = _find_place(folder)
    mask_folders = _find_mask_folders(folder, place)
    home = folder if place.name.lower() in _IMAGE_FOLDERS else place
    listing = Listing(mask_folder=mask_folders[0] if mask_folders else home / _MASK_FOLDERS[0])
    if place != folder:
        stray = [file for file in _files(folder) if is_picture(file) and file.name != SHEET]
        listing.leave_out(f"it lies beside {place.name}/, not in it", *stray)
    pictures = _sift(place, listing)
    masks = [file for each in mask_folders for file in _sift(each, listing)]
    stems = {_normal(file.stem) for file in pictures} | {_normal(file.name) for file in pictures}
    beside = [file for file in pictures if (_strip_mask_word(file.stem) or "") in stems]
    photographs = [file for file in pictures if file not in beside]
    if not photographs:
        reasons = "; ".join(listing.explain()) or f"it may hold {', '.join(sorted(readable_suffixes()))}"
        raise InputError(f"{place} holds no photographs; {reasons}")
    found = _match(photographs, masks, beside)
    for file in {*masks, *beside} - set(found.values()):
        second = _strip_mask_word(file.stem) in stems or _normal(file.stem) in stems
        listing.leave_out("a second mask of its photograph" if second else "no photograph has its name", file)
    _join_twins(found, choose_twin, listing)
    return listing


def is_picture(file: Path) -> bool:
    """Whether a file is a picture by its name: a suffix that is read, and nobody's side file."""
    return file.suffix.lower() in readable_suffixes() and not file.name.startswith(".")


def _find_place(folder: Path) -> Path:
    """The folder in which the photographs themselves lie."""
    place = next(iter(_find_named(folder, _IMAGE_FOLDERS)), folder)
    if any(is_picture(file) for file in _files(place)):
        return place
    subjects = sorted(each for each in place.iterdir() if each.is_dir() and re.match(r"\d+_.", each.name))
    if len(subjects) > 1:
        names = ", ".join(each.name for each in subjects)
        raise InputError(f"{place} holds the photographs of several subjects ({names}); name one of these folders")
    layouts = sorted(each for each in place.iterdir() if each.is_dir() and _find_named(each, _IMAGE_FOLDERS))
    if layouts and not subjects and place == folder:  # the authors' train_data/, a folder a subject
        names = ", ".join(each.name for each in layouts)
        raise InputError(f"{place} holds no photographs but folders of subjects ({names}); name one of them")
    if subjects:
        log.info("%s: photographs are taken once each, whatever the number in the folder's name", subjects[0])
    return subjects[0] if subjects else place


def _find_mask_folders(folder: Path, place: Path) -> list[Path]:
    """Folders of masks: in the one that was given, in that of the photographs, beside an image/ that was given."""
    roots = [folder, place] + ([folder.parent] if folder.name.lower() in _IMAGE_FOLDERS else [])
    there = dict.fromkeys(each for root in roots for each in _find_named(root, _MASK_FOLDERS))
    deeper = [each / place.name for each in there if (each / place.name).is_dir()]  # mask/10_sks mug/
    return deeper + [each for each in there if each not in {each.parent for each in deeper}]


def _find_named(folder: Path, names: Sequence[str]) -> list[Path]:
    """The folders in it of these names, in whatever case, in the names' order."""
    there = {each.name.lower(): each for each in sorted(folder.iterdir(), reverse=True) if each.is_dir()}
    return [there[name] for name in names if name in there]


def _files(folder: Path) -> list[Path]:
    """Everything in a folder but folders; links that lead nowhere, too."""
    return sorted(file for file in folder.iterdir() if not file.is_dir())


def _sift(folder: Path, listing: Listing) -> list[Path]:
    """The pictures of a folder; what else lies there is noted."""
    pictures = []
    for file in _files(folder):
        if is_picture(file) and file.name != SHEET and file.is_file():
            pictures.append(file)
        elif file.name not in _WORDS:
            listing.leave_out(_name_reason(file), file)
    known = {*_IMAGE_FOLDERS, *_MASK_FOLDERS}
    others = [each for each in folder.iterdir() if each.is_dir() and each.name.lower() not in known]
    listing.leave_out("a folder, which is not searched", *others)
    return pictures


def _name_reason(file: Path) -> str:
    if file.name.startswith("._"):
        return "a side file of macOS, no picture"
    if file.name.startswith(".") or file.name.lower() in ("thumbs.db", "desktop.ini"):
        return "a system's file"
    if file.name == SHEET:
        return "the sheet of masks"
    if not file.is_file():
        return "a link that leads nowhere"
    suffix = file.suffix.lower().removeprefix(".")
    return next((reason for suffixes, reason in _REASONS.items() if suffix in suffixes), "not a picture that is read")


def _normal(name: str) -> str:
    """A name in one spelling: macOS writes accents as characters of their own."""
    return unicodedata.normalize("NFC", name)


def _strip_mask_word(stem: str) -> str | None:
    """What a mask's name names; None: it does not begin or end as masks do."""
    ending = next((each for each in _MASK_ENDINGS if stem.lower().endswith(each)), None)
    start = next((each for each in _MASK_STARTS if stem.lower().startswith(each)), None)
    if ending is not None:
        return _normal(stem[: -len(ending)])
    return None if start is None else _normal(stem[len(start) :])


def _match(photographs: Iterable[Path], masks: Sequence[Path], beside: Sequence[Path]) -> dict[Path, Path | None]:
    """Photograph -> mask: by the exact name first, then whatever the case. Of several masks a PNG is taken."""
    found: dict[Path, Path | None] = dict.fromkeys(photographs)
    for fold in (str, str.casefold):
        known: dict[str, Path] = {}
        for mask in sorted({*masks, *beside} - set(found.values()), key=lambda file: file.suffix.lower() != ".png"):
            names = {_strip_mask_word(mask.stem), _normal(mask.stem) if mask in masks else None}
            for name in filter(None, names):
                known.setdefault(fold(name), mask)
        for photograph, mask_file in found.items():
            # IMG_0.JPG.png belongs to IMG_0.JPG, whatever else there is
            keys = [fold(_normal(name)) for name in (photograph.name, photograph.stem)]
            hits = [known[key] for key in keys if key in known]
            if mask_file is None and hits:
                found[photograph] = hits[0]
    return found


def _join_twins(found: dict[Path, Path | None], choose_twin: ChooseTwin, listing: Listing) -> None:
    """Fill `pairs`. Of photographs that differ in their suffix alone one is taken, if not each has its own mask."""
    groups: dict[str, list[Path]] = {}
    for file in found:
        groups.setdefault(_normal(file.stem), []).append(file)
    for files in groups.values():
        masks = {found[file] for file in files}
        if len(files) == 1 or (len(masks) == len(files) and None not in masks):
            listing.pairs |= {file: found[file] for file in files}
            continue
        chosen, mask, reasons = choose_twin(files, next((mask for mask in masks if mask is not None), None))
        listing.pairs[chosen] = mask
        for reason, others in reasons.items():
            listing.leave_out(reason, *others)
