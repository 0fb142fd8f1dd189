"""Pictures of what a LoRA can do so far, painted by the runtime that will paint it when it is finished.

They show the words, the schedule, the two stages and the rounding of the product, which pictures from the trainer's own
UNet would not.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dreammix_trt.core.checkpoint import EMBEDDED, BaseFiles
from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.files import read_json, write_json
from dreammix_trt.core.lora import LoraSpec
from dreammix_trt.core.masks import read_mask
from dreammix_trt.core.networks import unets_of
from dreammix_trt.core.passport import Passport
from dreammix_trt.core.pictures import read_image
from dreammix_trt.core.remarks import keep_remarks
from dreammix_trt.core.subject import Subject, write_subject

if TYPE_CHECKING:
    from dreammix_trt.core.network_weights import BaseLora
    from dreammix_trt.engine.dreammix import DreamMix
    from dreammix_trt.trainer.photographs import PhotographFile

log = logging.getLogger(__name__)

#: module by its diffusers name -> (down (rank, in), up (out, rank)), tensors or arrays
Factors = Mapping[str, tuple[Any, Any]]
FOLDER = "validation"
_LIST = "painted.json"
_NAME = "trained"
_MARGIN = 0.1  # of the subject's box: a mask that its own outline does not give away
_SCENES, _SCENE_SEED = 2, 90_700


@dataclass(frozen=True)
class Place:
    """A picture and the region of it to fill.

    name: for people and file names.
    image: RGB.
    mask: L, white where it is painted.
    """

    name: str
    image: Image.Image
    mask: Image.Image


@dataclass(frozen=True)
class Painted:
    """One validation picture. step: after so many steps of the optimizer; file: its PNG, which holds the request."""

    step: int
    prompt: str
    place: str
    file: Path


def keep_painted(work: Path, painted: Sequence[Painted]) -> None:
    """Note in a work folder which pictures its training has painted, for a run that goes on."""
    rows = [{**asdict(each), "file": each.file.name} for each in painted]
    (work / FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(work / FOLDER / _LIST, {"schema": 1, "painted": rows})


def read_painted(work: Path) -> list[Painted]:
    """What `keep_painted` noted, as far as the pictures are still there.

    Raises FileFormatError for a damaged list.
    """
    place = work / FOLDER / _LIST
    if not place.is_file():
        return []
    try:
        rows = [
            Painted(int(row["step"]), str(row["prompt"]), str(row["place"]), work / FOLDER / Path(row["file"]).name)
            for row in read_json(place)["painted"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{place}: damaged ({error}); remove it, and earlier pictures are forgotten") from error
    return [each for each in rows if each.file.is_file()]


class Validator:
    """Paints fixed prompts with fixed seeds into fixed places. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        folder: str | Path,
        base: BaseFiles,
        prompts: Sequence[str],
        *,
        token: str,
        class_name: str,
        base_loras: Sequence[tuple[BaseLora, str]] = (),
        engine: str | Path | None = None,
        photographs: Sequence[PhotographFile] = (),
        image: str | Path | None = None,
        mask: str | Path | None = None,
        seed: int = 0,
        num_inference_steps: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Check everything and load the engine, before a training starts.

        folder: where the pictures go, as `validation/STEP-PLACE-PROMPT.png`.
        base: that is trained on.
        prompts: what is painted, each into each place.
        token, class_name: the subject's.
        base_loras: merged into the base that is trained on, each with its file's hash.
        engine: of the same base, with slots; None: built for the embedded base, which takes a second.
        photographs: of the subject; the first is a place of its own where no other is given.
        image, mask: a place, in the place of the usual ones; mask None: the picture's own transparency.
        seed: of the first prompt's pictures; the next prompt has the next seed.
        num_inference_steps: None: as the engine's base has it.
        threads: for painting on the CPU.

        Raises InputError for a base without an engine, an engine without slots or of another base, no prompt, and a
        picture or mask that cannot be used; EngineError for an engine that cannot be loaded.
        """
        if not prompts:
            raise InputError("no prompt is given for validation pictures; give one, for example: a photo of a sks mug")
        self._prompts, self._seed = tuple(prompts), seed
        self._fields: dict[str, Any] = (
            {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
        )
        self._words: dict[str, Any] = {"token": token, "class_name": class_name}
        self._folder = Path(folder) / FOLDER
        self._places = _choose_places(base, photographs, image, mask)
        with ExitStack() as owned:
            self._scratch = Path(owned.enter_context(tempfile.TemporaryDirectory(prefix="dreammix-validation-")))
            place = _find_engine(base, base_loras, engine, self._scratch)
            self._dm = owned.enter_context(_load_engine(place, threads))
            self._base_key = Passport.read(place).base_key
            self._check_prompts()
            self._owned = owned.pop_all()

    def _check_prompts(self) -> None:
        """Lay out every picture and take no step, so that what cannot be painted is refused before the training."""
        with keep_remarks(tell=False):
            for place in self._places:
                for prompt in self._prompts:
                    self._dm.iterate(place.image, place.mask, prompt, subject="", **self._fields)

    def paint(self, step: int, factors: Factors) -> list[Painted]:
        """Paint every prompt into every place.

        step: how many steps of the optimizer were taken.
        factors: of the LoRA now; {}: the base alone.

        Raises InputError for a prompt that the engine cannot paint, FileFormatError for factors that do not fit it.
        """
        self._take(factors)
        self._folder.mkdir(parents=True, exist_ok=True)
        return [
            self._paint(step, number, prompt, place)
            for place in self._places
            for number, prompt in enumerate(self._prompts)
        ]

    def close(self) -> None:
        """Release the engine and what was built for it."""
        self._owned.close()

    def __enter__(self) -> Validator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, factors: Factors) -> None:
        """Make the engine's subject the present factors."""
        pairs = {name: (_to_array(down).T, _to_array(up).T) for name, (down, up) in factors.items()}
        found = {network: pairs for network in unets_of("patched")} if pairs else {}
        file = self._scratch / "subject.safetensors"
        if found:
            write_subject(file, Subject(_NAME, factors=found, base_key=self._base_key, **self._words))
            self._dm.add_subject(file, _NAME)
        elif _NAME in self._dm.subjects:
            self._dm.remove_subject(_NAME)

    def _paint(self, step: int, number: int, prompt: str, place: Place) -> Painted:
        from dreammix_trt.engine.dreammix import save

        subject = _NAME if _NAME in self._dm.subjects else ""
        seed = self._seed + number
        made = self._dm.inpaint(place.image, place.mask, prompt, subject=subject, seed=seed, **self._fields)
        file = self._folder / f"{step:06d}-{place.name}-{number + 1}.png"
        save(made, file)
        return Painted(step, prompt, place.name, file)


def _to_array(values: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A tensor or array as float32."""
    return np.asarray(values.detach().cpu().float() if hasattr(values, "detach") else values, np.float32)


# -- the engine -------------------------------------------------------------------------------------------------------


def _find_engine(
    base: BaseFiles, loras: Sequence[tuple[BaseLora, str]], engine: str | Path | None, scratch: Path
) -> Path:
    """The engine's folder, checked; for the embedded base one that is built now."""
    if engine is not None:
        _check_engine(base, loras, Path(engine))
        return Path(engine)
    if base.folder.resolve() != EMBEDDED.resolve():
        raise InputError(
            f"validation pictures are painted by an engine of the same base, and none of {base.name} is given: build "
            f"one without a subject, `dreammix-trt build --base {base.folder} --out ENGINE`, and give "
            "--validate-engine ENGINE"
        )
    from dreammix_trt.building import build

    build(out=scratch / "engine", base_loras=[_spec_of(lora) for lora, _ in loras])
    return scratch / "engine"


def _check_engine(base: BaseFiles, loras: Sequence[tuple[BaseLora, str]], engine: Path) -> None:
    passport = Passport.read(engine)
    again = f"build one for it: `dreammix-trt build --base {base.folder} --out ENGINE`"
    if not passport.base.get("slots"):
        raise InputError(
            f"{engine} has no slots, so no LoRA can be put into it while it trains; {again}, without --no-slots and "
            "--merge"
        )
    theirs, own = passport.base.get("files") or {}, base.hash_contents()
    differing = sorted(name for name in {*theirs, *own} if theirs.get(name) != own.get(name))
    if differing:
        raise InputError(
            f"{engine} is of another base, {passport.base.get('name')!r}: {', '.join(differing[:3])}"
            f"{', ...' if len(differing) > 3 else ''} differ from those of {base.name}, which is trained on; {again}"
        )
    _compare_weights(base, loras, engine, passport)


def _compare_weights(base: BaseFiles, loras: Sequence[tuple[BaseLora, str]], engine: Path, passport: Passport) -> None:
    """Say so where the engine's weights are not those that are trained on, though the base is the same."""
    from dreammix_trt.building.engine_options import EngineOptions
    from dreammix_trt.building.ingredients import Ingredients
    from dreammix_trt.building.order import describe_lora

    trained = Ingredients(base, slots=True, engine=EngineOptions(), loras=loras, defaults={})
    if passport.base_key == trained.base_key:
        return
    log.warning(
        "%s paints with other weights than those that are trained on, and its pictures show the LoRA on them: it has "
        "--base-lora %s, the training %s (where these are the same, a file's contents or --patch-biases differ); it "
        "was built by: %s",
        engine,
        ", ".join(passport.base.get("loras", ())) or "none",
        ", ".join(describe_lora(_spec_of(lora), "both") for lora, _ in loras) or "none",
        passport.command,
    )


def _spec_of(merged: BaseLora) -> LoraSpec:
    """A LoRA as `build` takes it."""
    return LoraSpec(merged.lora.source_path, merged.scale, merged.target)


def _load_engine(engine: Path, threads: int | None) -> DreamMix:
    from dreammix_trt.engine.dreammix import DreamMix

    on_gpu = Passport.read(engine).backend.startswith("tensorrt")
    return DreamMix.load(engine, threads=threads, device="cuda" if on_gpu else "cpu")


# -- places -----------------------------------------------------------------------------------------------------------


def _choose_places(
    base: BaseFiles, photographs: Sequence[PhotographFile], image: str | Path | None, mask: str | Path | None
) -> list[Place]:
    if image is not None:
        return [_read_place(image, mask)]
    if mask is not None:
        raise InputError(f"a mask for validation pictures is given, {mask}, but no picture; give --validation-image")
    if base.folder.resolve() == EMBEDDED.resolve():
        return _render_places(base.native_side)
    if not photographs:
        raise InputError("validation pictures have no place: give photographs, or --validation-image")
    return [_place_of(photographs[0])]


def _read_place(image: str | Path, mask: str | Path | None) -> Place:
    picture = read_image(image, name="validation image")
    region = read_mask(mask, picture, name="validation mask")
    return Place("place", Image.fromarray(picture.on(255)), Image.fromarray(region))


def _render_places(side: int) -> list[Place]:
    """Rooms of the embedded model's own world, which it was not trained in."""
    from dreammix_trt.trainer.micro.world import held_out_scenes, show_mask

    scenes = held_out_scenes(_SCENES, _SCENE_SEED, side)
    return [
        Place(f"room{number}", Image.fromarray(scene.background), show_mask(mask))
        for number, (scene, mask) in enumerate(scenes, 1)
    ]


def _place_of(photograph: PhotographFile) -> Place:
    """The subject's own place in a photograph: its box, a little larger."""
    read = photograph.read()
    height, width = read.subject.shape
    x0, y0, x1, y1 = read.box
    dx, dy = round((x1 - x0) * _MARGIN), round((y1 - y0) * _MARGIN)
    mask = np.zeros((height, width), np.uint8)
    mask[max(0, y0 - dy) : y1 + dy, max(0, x0 - dx) : x1 + dx] = 255
    return Place("photograph", Image.fromarray(read.image), Image.fromarray(mask))
