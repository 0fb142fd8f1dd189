"""Calibration: a base's own requests run with its networks in torch, to find what its UNets need to compute in E4M3.

Every finished step of the work is in the file at once, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dreammix_trt.core.calibration import FILE_NAME, Calibration, is_kept, key_of_unet, weight_of_step
from dreammix_trt.core.checkpoint import EMBEDDED, BaseFiles
from dreammix_trt.core.errors import BuildError, InputError, MissingExtraError
from dreammix_trt.core.files import explain_write_errors
from dreammix_trt.core.keymap import blocks_of
from dreammix_trt.core.pictures import read_image, readable_suffixes
from dreammix_trt.core.remarks import remark
from dreammix_trt.core.seam import BaseFacts, Networks
from dreammix_trt.engine import DreamMix
from dreammix_trt.on_torch import open_tokenizers

if TYPE_CHECKING:
    from dreammix_trt.export.calibrating import Watched

#: what a base that is not ours is asked for
PROMPTS = (
    "a photo of a red ceramic mug on a wooden table",
    "a portrait of an old man with a white beard, soft window light",
    "a golden retriever sitting in tall grass at sunset",
    "a glass bottle of perfume on black velvet, studio light",
    "a modern white armchair in a sunlit living room",
    "an oil painting of a sailing ship in a storm",
    "a bowl of ramen with egg and green onions, steam",
    "a blue sports car parked on a wet street at night, neon signs",
    "a young woman in a yellow raincoat, shallow depth of field",
    "a stack of old leather books beside a candle",
    "a robot made of brushed steel, product photo",
    "a bouquet of pink peonies in a clear vase",
    "a snow covered mountain under a starry sky",
    "a black and white cat sleeping on a striped blanket",
    "a plush toy dinosaur on a child's bed",
    "a vintage camera on a map, top view",
)
SAVED_EVERY = 16  # layers
LEAST_STEPS = 6  # with fewer no step is the unpatched UNet's
SHARES = (0.25, 0.75)  # of the picture's side: the masks of the built-in set
Update = Callable[[str, float, str], None]


@dataclass(frozen=True)
class Case:
    """One request of the calibration.

    picture: uint8 (height, width, 3); mask: bool (height, width).
    """

    name: str
    prompt: str
    picture: np.ndarray[Any, np.dtype[np.uint8]]
    mask: np.ndarray[Any, np.dtype[np.bool_]]
    seed: int


@dataclass(frozen=True)
class CalibrationOptions:
    """How a base is calibrated.

    prompts: texts to paint; empty: the built-in ones, in the model's own words for the embedded model.
    images: pictures to paint into; empty: drawn ones.
    count: requests.
    steps: of each; with fewer than six a request leaves a UNet out.
    probes: calls of each UNet on which the error of every layer is measured; 0: errors are not measured, and only the
        layers that are never quantised stay float16.
    side: of the pictures, in pixels; None: the base's native side. A smaller one is faster.
    device: "cpu" or "cuda".
    threads: of the CPU; None: all cores.
    """

    prompts: Sequence[str] = ()
    images: Sequence[Path] = ()
    count: int = 16
    steps: int = 10
    probes: int = 2
    side: int | None = None
    device: str = "cpu"
    threads: int | None = None

    def check(self) -> None:
        """Raise InputError for what cannot be done."""
        for name, low in (("count", 1), ("steps", LEAST_STEPS), ("probes", 0)):
            if getattr(self, name) < low:
                raise InputError(f"{name} is {getattr(self, name)}; allowed: {low} and more")
        if self.side is not None and (self.side < 64 or self.side % 64):
            raise InputError(f"side is {self.side}; allowed: multiples of 64 pixels")
        if self.device not in ("cpu", "cuda"):
            raise InputError(f"device is {self.device!r}; allowed: cpu, cuda")


def calibrate(base: BaseFiles, out: Path, options: CalibrationOptions, update: Update) -> Calibration:
    """Calibrate the UNets of a base, or go on with what `out` holds.

    out: the file; complete when this returns, sound at any time.
    update: called with (what, fraction, message).

    Raises MissingExtraError without torch, InputError for options, for a place that cannot be written and for a file
    of another base, FileFormatError for files that cannot be read and weights that do not work, and BuildError when
    the requests left a UNet out.
    """
    options.check()
    _check_place(out)
    try:
        from dreammix_trt.export.calibrating import UNETS, Watched
        from dreammix_trt.export.torch_backend.engine_set import TorchEngineSet
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed, calibrating needs it: pip install 'dreammix-trt[export]'"
        ) from error
    networks = TorchEngineSet(base, slots=False, device=options.device, one_unet=base.folder != EMBEDDED)
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    unets = [name for name in UNETS if name in networks]
    state = _open_state(base, out, unets)
    watched = Watched(networks)
    with open_torch(base, watched, options.side) as dm:
        cases = list(draw_cases(base, options))
        for number, case in enumerate(cases):
            if case.name not in state.runs:
                update("requests", number / len(cases), case.prompt)
                _paint(dm, case, options.steps)
                state = state.see(case.name, watched.take())
                state.write(out)
        update("requests", 1.0, f"{len(state.runs)} in {out}")
        if options.probes:
            state = _measure(dm, watched, cases[0], options, state, out, update)
    _check_all_seen(state, unets, out)
    update("errors", 1.0, f"in {out}")
    return state


def open_torch(base: BaseFiles, networks: Networks, side: int | None = None) -> DreamMix:
    """A base's networks on the host, ready to paint.

    networks: a `TorchEngineSet`, or what wraps one.
    side: taken for the base's native side; None: its own.
    """
    blocks = blocks_of(base.configs["unet"])
    facts = BaseFacts(side or base.native_side, base.divisor, base.scaling_factor, base.feature_channels, unet=blocks)
    return DreamMix.on_host(networks, facts, open_tokenizers(base))


def draw_cases(base: BaseFiles, options: CalibrationOptions) -> Iterator[Case]:
    """The requests: the same in every run with the same options."""
    side = options.side or base.native_side
    own = list(_draw_own(side, options.count) if base.folder == EMBEDDED else _draw_synthetic(side, options.count))
    prompts = islice(cycle(options.prompts or [prompt for prompt, _, _ in own]), options.count)
    images = islice(cycle(options.images), options.count) if options.images else [None] * options.count
    for number, (prompt, image, (_, picture, mask)) in enumerate(zip(prompts, images, own, strict=False)):
        shown = picture if image is None else _read_picture(image, side)
        where = image.name if image is not None else "drawn"
        yield Case(f"{number}: {prompt} ({where}, {side}x{side}, {options.steps} steps)", prompt, shown, mask, number)


def _draw_own(side: int, count: int) -> Iterator[tuple[str, Any, Any]]:
    """Scenes of the embedded model's world, with what it calls them; not those by which it is judged."""
    from dreammix_trt.trainer.micro.captions import describe
    from dreammix_trt.trainer.micro.world import draw_mask, random_attributes, render_scene

    rng = np.random.default_rng([78, 1])
    for _ in range(count):
        what = random_attributes(rng)
        scene = render_scene(rng, what, side, object_size=float(rng.uniform(*SHARES)) * side)
        yield describe(what), scene.background, draw_mask(rng, scene.box, side, side)


def _draw_synthetic(side: int, count: int) -> Iterator[tuple[str, Any, Any]]:
    """Gradients with noise whose spectrum falls as in photographs, and boxes as masks."""
    rng = np.random.default_rng([78, 2])
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1 / side
    y, x = np.mgrid[:side, :side] / side
    for prompt in islice(cycle(PROMPTS), count):
        noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, side, side))) / frequency, (side, side))
        noise = noise.mean(0) + 0.5 * noise
        slopes = rng.uniform(-1, 1, (3, 2, 1, 1))
        picture = 127 + 60 * (slopes[:, 0] * (x - 0.5) + slopes[:, 1] * (y - 0.5)) + 45 * noise / noise.std()
        mask = np.zeros((side, side), np.bool_)
        height, width = (int(share * side) for share in rng.uniform(*SHARES, 2))
        top, left = int(rng.integers(0, side - height + 1)), int(rng.integers(0, side - width + 1))
        mask[top : top + height, left : left + width] = True
        yield prompt, np.clip(picture, 0, 255).astype(np.uint8).transpose(1, 2, 0), mask


def _read_picture(path: Path, side: int) -> Any:
    """The largest square of a picture, uint8 (side, side, 3)."""
    from PIL import ImageOps

    square = ImageOps.fit(Image.fromarray(read_image(path).seen), (side, side), Image.Resampling.LANCZOS)
    return np.asarray(square)


def list_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder, sorted. Raises InputError where there are none."""
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in readable_suffixes())
    if not found:
        raise InputError(f"{folder}: no pictures there; it may hold {', '.join(sorted(readable_suffixes()))}")
    return found


def _check_place(out: Path) -> None:
    """Raise InputError for a file that cannot be written. Leaves no trace."""
    if out.is_dir():
        raise InputError(f"--out {out} is a directory; name a file in it, such as {out / FILE_NAME}")
    with explain_write_errors(out):
        nearest = next(folder for folder in out.absolute().parents if folder.exists())
        if not nearest.is_dir():
            raise InputError(f"--out {out} cannot be made: {nearest} is a file, not a directory")
        tempfile.TemporaryFile(dir=nearest).close()


def _check_all_seen(state: Calibration, unets: Sequence[str], out: Path) -> None:
    """Raise BuildError when nothing was recorded of a UNet."""
    unseen = [name for name in unets if not state.layers.get(name)]
    if unseen:
        raise BuildError(
            f"{out}: its {len(state.runs)} requests never ran {', '.join(unseen)}, so a build in fp8 would know "
            "nothing of it; run `dreammix-trt calibrate` again with more --steps: it goes on"
        )


def _open_state(base: BaseFiles, out: Path, unets: Sequence[str]) -> Calibration:
    sources = {name: key_of_unet(base, name) for name in unets}
    if not out.exists():
        return Calibration(base.name, sources)
    state = Calibration.read(out)
    if state.sources != sources:
        raise InputError(
            f"--out {out} is the calibration of {state.base}, and its weights are not those of {base.name}; name "
            "another file, or delete it"
        )
    return state


def _measure(
    dm: DreamMix,
    watched: Watched,
    case: Case,
    options: CalibrationOptions,
    state: Calibration,
    out: Path,
    update: Update,
) -> Calibration:
    """Measure the errors of the layers that have none yet, in the steps of one request that count most."""
    wanted = {
        name: [layer for layer, found in layers.items() if found.error is None and not is_kept(layer)]
        for name, layers in state.layers.items()
    }
    if not any(wanted.values()):
        return state
    watched.keep = True
    _paint(dm, case, options.steps)
    watched.keep = False
    watched.take()
    for name, layers in wanted.items():
        calls = [arrays for called, arrays in watched.calls if called == name]
        if layers and not calls:
            remark(
                f"{name}: its layers' errors were not measured, as none of the {options.steps} steps ran it; run again "
                "with more --steps"
            )
            continue
        calls.sort(key=lambda arrays: weight_of_step(float(arrays["timestep"][0])), reverse=True)
        errors = watched.measure_errors(name, calls[: options.probes], state.scales_of_all(name), layers)
        for number, (layer, error) in enumerate(zip(layers, errors, strict=True)):
            update("errors", number / len(layers), f"{name}: {layer}")
            state = state.weigh(name, {layer: error})
            if number % SAVED_EVERY == 0:
                state.write(out)
        state.write(out)
    return state


def _paint(dm: DreamMix, case: Case, steps: int) -> None:
    mask = Image.fromarray(case.mask.astype(np.uint8) * 255)
    dm.inpaint(Image.fromarray(case.picture), mask, case.prompt, seed=case.seed, num_inference_steps=steps)
