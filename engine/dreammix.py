"""The runtime's front door: load an engine directory, inpaint pictures with the subjects in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from dreammix_trt.core.errors import EngineError, InputError
from dreammix_trt.core.noise import NoiseProvider, SeededNoise
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import Schedule, make_schedule
from dreammix_trt.core.subject import Subject, pack, packed_size, read_subject
from dreammix_trt.engine import kernels
from dreammix_trt.engine.canvas import Canvas
from dreammix_trt.engine.denoiser import Denoiser, EngineDenoiser
from dreammix_trt.engine.loop import Clock, Picture, Sampler, Text
from dreammix_trt.engine.networks import EngineSet, Networks
from dreammix_trt.engine.pictures import PictureIn, Source, read_image, read_mask
from dreammix_trt.engine.text import Tokenizer, apply_tas, plan_tas

F32 = npt.NDArray[np.float32]
_METADATA = "dreammix"  # the PNG text chunk that holds the request
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_UNETS = ("unet", "unet_raw")


@dataclass(frozen=True)
class Result:
    """What a request gave.

    images: PIL images of the input's size and kind (RGB, RGBA, L), one a picture. seeds: of each. timings: seconds per
    phase, summed over the pictures; "network:..." are the networks. stages: named pictures of what each stage did, when
    asked for.
    """

    images: list[Image.Image]
    request: Request
    seeds: tuple[int, ...]
    schedule: Schedule
    timings: dict[str, float]
    stages: dict[str, Image.Image] = field(default_factory=dict)


@dataclass(frozen=True)
class StepEvent:
    """One step is done. index runs from 0 to total - 1 over all pictures of the request; `picture` says which one.

    result: set in the last event.
    """

    index: int
    total: int
    stage: str
    picture: int
    _sampler: Sampler = field(repr=False)
    _x0: F32 = field(repr=False)
    result: Result | None = None

    def preview(self) -> Image.Image:
        """What the network now believes the stage's frame looks like; costs one VAE decoding."""
        return Image.fromarray(self._sampler.preview(self._x0))


class DreamMix:
    """An engine ready to paint. Use it as a context manager, or call `close`.

    Not thread-safe: one request at a time per object.
    """

    def __init__(
        self, networks: Networks, tokenizers: Sequence[Tokenizer], subjects: Sequence[Subject] = (), *, denoiser: Denoiser | None = None
    ) -> None:
        self.networks = networks
        self._tokenizers = tuple(tokenizers)
        self._denoiser = denoiser or EngineDenoiser(networks)
        self._subjects: dict[str, tuple[Subject, dict[str, F32]]] = {}
        self._texts: dict[tuple[str, str, bool], tuple[F32, F32]] = {}
        self._off = {name: np.zeros(packed_size(networks.slots(name)), np.float32) for name in (*_TEXT_ENCODERS, *_UNETS)}
        for subject in subjects:
            self._add(subject, subject.name)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, threads: int | None = None, verify: bool = False, store: str | os.PathLike[str] | None = None
    ) -> DreamMix:
        """Load an engine directory that `dreammix-trt build` made.

        threads: for the networks and the kernels; None: all cores. verify: hash every file again. store: where the
        base engines are, when not in the default place. Raises EngineError saying what is wrong and how to rebuild.
        """
        from dreammix_trt.engine.build import open_engine

        if threads:
            kernels.set_threads(threads)
        opened = open_engine(Path(path), verify=verify, store=Path(store) if store else None)
        networks = EngineSet.load(opened.networks, threads)
        tokenizers = [Tokenizer.load(opened.networks / name) for name in ("tokenizer", "tokenizer_2")]
        return cls(networks, tokenizers, [read_subject(file) for file in opened.subjects])

    def close(self) -> None:
        """Release the networks."""
        if isinstance(self.networks, EngineSet):
            self.networks.close()

    def __enter__(self) -> DreamMix:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def subjects(self) -> tuple[str, ...]:
        """Names of the loaded subjects; the first is the default."""
        return tuple(self._subjects)

    def add_subject(self, path: str | os.PathLike[str], name: str | None = None) -> str:
        """Load another subject of the same base: a subject file, or an engine directory with subjects in it.

        Returns its name (the first one's). Raises FileFormatError when it does not fit this base.
        """
        source = Path(path)
        files = sorted((source / "subjects").glob("*.safetensors")) if source.is_dir() else [source]
        if not files:
            raise EngineError(f"{source} holds no subject (subjects/*.safetensors); make one with `dreammix-trt build --lora`")
        names = [self._add(subject, name or subject.name) for subject in map(read_subject, files)]
        return names[0]

    def inpaint(
        self,
        image: Source,
        mask_image: Source,
        prompt: str | Request,
        *,
        noise: NoiseProvider | Sequence[NoiseProvider] | None = None,
        keep_stages: bool = False,
        **fields: Any,
    ) -> Result:
        """Paint the marked region (mask above 127) of a picture of any size.

        image, mask_image: path, PIL image or uint8 array of equal size. prompt: text, or a whole Request; fields: any
        field of `Request` (seed, substitute, num_inference_steps, ...). noise: where the random numbers come from, one
        provider a picture; default: the seed. Raises InputError naming the value that cannot be used.
        """
        last = None
        for event in self.iterate(image, mask_image, prompt, noise=noise, keep_stages=keep_stages, **fields):
            last = event
        assert last is not None and last.result is not None
        return last.result

    def inpaint_batch(self, jobs: Sequence[tuple[Source, Source, Request]]) -> list[Result]:
        """Several requests, one result each. All are checked before the first is painted."""
        prepared = [self._prepare(image, mask, request) for image, mask, request in jobs]
        return [self._finish(work) for work in prepared]

    def iterate(
        self,
        image: Source,
        mask_image: Source,
        prompt: str | Request,
        *,
        noise: NoiseProvider | Sequence[NoiseProvider] | None = None,
        keep_stages: bool = False,
        **fields: Any,
    ) -> Iterator[StepEvent]:
        """Like `inpaint`, yielding after each step; the last event has the result. Leaving the iteration cancels.

        Bad input is refused here, before the first step.
        """
        request = prompt.replace(**fields) if isinstance(prompt, Request) else Request.of(prompt=prompt, **fields)
        return self._events(self._prepare(image, mask_image, request, noise), keep_stages)

    # -- inside

    def _add(self, subject: Subject, name: str) -> str:
        names = [*_TEXT_ENCODERS, *_UNETS]
        rows = {n: pack(subject.factors_for(n), self.networks.slots(n), subject.scale) for n in names if n in self.networks}
        self._subjects[name] = (subject, {**self._off, **rows})
        self._texts = {key: value for key, value in self._texts.items() if key[1] != name}
        return name

    def _chosen(self, request: Request) -> tuple[str, str, dict[str, F32]]:
        """(name, token, packed rows) of the request's subject."""
        name = request.subject if request.subject is not None else next(iter(self._subjects), "")
        if name == "":
            return "", "sks", self._off
        if name not in self._subjects:
            known = ", ".join(self._subjects) or "none"
            raise InputError(f"subject={name!r}: no such subject is loaded (there is: {known}); add it with add_subject")
        subject, rows = self._subjects[name]
        return name, subject.token or "sks", rows

    def _prepare(
        self, image: Source, mask_image: Source, request: Request, noise: NoiseProvider | Sequence[NoiseProvider] | None = None
    ) -> _Work:
        clock = Clock()
        if "unet_raw" not in self.networks and request.patched_fraction < 1:
            request = request.replace(patched_fraction=1.0)
        with clock("read"):
            picture = read_image(image)
            mask = read_mask(mask_image, picture.size)
        facts = self.networks.facts
        with clock("canvas"):
            canvas = Canvas.of(picture.rgb, mask, mode=request.mode, native=facts.native_side, divisor=facts.divisor)  # type: ignore[arg-type]
        schedule = make_schedule(request)
        name, token, rows = self._chosen(request)
        with clock("text"):
            texts = self._condition(request, schedule, name, token, rows, clock)
        count = request.num_images_per_prompt
        seeds = tuple((request.seed + k) % 2**64 for k in range(count))
        if noise is None:
            providers: list[NoiseProvider] = [SeededNoise(seed, kernels.normals) for seed in seeds]
        else:
            providers = list(noise) if isinstance(noise, Sequence) else [noise]
        if len(providers) != count:
            raise InputError(f"noise: {len(providers)} providers for {count} pictures; give one for each")
        pictures = [Picture(canvas, texts, rows, provider) for provider in providers]
        return _Work(picture, request, schedule, seeds, pictures, clock)

    def _events(self, work: _Work, keep_stages: bool) -> Iterator[StepEvent]:
        """One picture after the other, so that each is the same to the bit whatever the count is."""
        images: list[Image.Image] = []
        stages: dict[str, Image.Image] = {}
        total = len(work.schedule) * len(work.pictures)
        for number, picture in enumerate(work.pictures):
            sampler = Sampler(
                work.request, work.schedule, [picture], self.networks, self._denoiser, clock=work.clock, keep_stages=keep_stages and number == 0
            )
            held: StepEvent | None = None
            for progress in sampler.steps():
                if held is not None:
                    yield held
                index = number * len(work.schedule) + progress.step.index
                held = StepEvent(index, total, progress.step.stage, number, sampler, progress.x0)
            assert held is not None
            finished = sampler.finish()[0]
            with work.clock("write"):
                images.append(work.finished(finished))
            stages |= {name: Image.fromarray(array) for name, array in sampler.stages.items()}
            if number + 1 < len(work.pictures):
                yield held
        result = Result(images, work.request, work.seeds, work.schedule, dict(work.clock.seconds), stages)
        yield StepEvent(held.index, total, held.stage, held.picture, held._sampler, held._x0, result)

    def _finish(self, work: _Work) -> Result:
        result = [event.result for event in self._events(work, False)][-1]
        assert result is not None
        return result

    def _condition(
        self, request: Request, schedule: Schedule, name: str, token: str, rows: Mapping[str, F32], clock: Clock
    ) -> dict[str, Text]:
        """Text conditioning of each stage: encoded prompts, decomposed by TAS where the request says so."""
        tokens, pooled = self._encoded(request.prompt, name, rows, request.truncate_prompt, clock)
        less_tokens, less_pooled = tokens, pooled
        if request.substitute:
            plan = plan_tas(
                self._tokenizers[0], request.prompt, request.substitute, request.substitute_prefix,
                request.tas_indexing, token,  # type: ignore[arg-type]
            )  # fmt: skip
            removed = self._encoded(plan.text, name, rows, request.truncate_prompt, clock)
            less_tokens, less_pooled = apply_tas(plan, tokens, pooled, *removed)
        if request.negative_prompt is None:
            negative = (np.zeros_like(tokens), np.zeros_like(pooled))
        else:
            negative = self._encoded(request.negative_prompt, name, rows, request.truncate_prompt, clock)
        texts = {}
        for stage in ("lcg", "gch"):
            positive = (
                less_tokens if f"tokens:{stage}" in request.tas_stages else tokens,
                less_pooled if f"pooled:{stage}" in request.tas_stages else pooled,
            )
            both = [negative, positive] if schedule.guided else [positive]
            texts[stage] = Text(np.stack([pair[0] for pair in both]), np.stack([pair[1] for pair in both]))
        return texts

    def _encoded(self, prompt: str, name: str, rows: Mapping[str, F32], truncate: bool, clock: Clock) -> tuple[F32, F32]:
        """(tokens (77, D), pooled (Dp,)) of a prompt with a subject's text factors; remembered."""
        key = (prompt, name, truncate)
        if key not in self._texts:
            if len(self._texts) >= 256:
                self._texts.clear()
            ids = [tokenizer.encode(prompt, truncate)[None] for tokenizer in self._tokenizers]
            outputs = []
            for network, row in zip(_TEXT_ENCODERS, ids, strict=True):
                with clock(f"network:{network}"):
                    outputs.append(self.networks.run(network, input_ids=row, lora=rows[network][None]))
            hidden = np.concatenate([out["hidden"] for out in outputs], axis=-1)
            self._texts[key] = (hidden[0], outputs[1]["pooled"][0])
        return self._texts[key]


@dataclass
class _Work:
    """A request that has been checked and prepared."""

    source: PictureIn
    request: Request
    schedule: Schedule
    seeds: tuple[int, ...]
    pictures: list[Picture]
    clock: Clock

    def finished(self, rgb: npt.NDArray[np.uint8]) -> Image.Image:
        """A finished canvas as an image of the input's kind (reference mode: RGB at the base's size)."""
        if rgb.shape[:2] != self.source.size:
            return Image.fromarray(rgb)
        return self.source.with_pixels(rgb)


def save(result: Result, path: str | os.PathLike[str], *, index: int = 0, metadata: bool = True) -> None:
    """Write one picture of a result (.png, .jpg, .webp), atomically.

    A PNG carries the request that makes exactly this picture, unless `metadata` is off; `read_request` reads it back.
    """
    from dreammix_trt.core.files import atomic_file

    target, options = Path(path), dict[str, Any]()
    image = result.images[index]
    if target.suffix.lower() == ".png":
        info = PngImagePlugin.PngInfo()
        if metadata:
            request = result.request.replace(seed=result.seeds[index], num_images_per_prompt=1)
            info.add_itxt(_METADATA, request.to_json())
        options["pnginfo"] = info
    elif target.suffix.lower() in (".jpg", ".jpeg"):
        image, options["quality"] = image.convert("RGB"), 95
    with atomic_file(target) as temporary:
        kind = Image.registered_extensions().get(target.suffix.lower())
        if kind is None:
            raise InputError(f"{target}: unknown picture format {target.suffix!r}; use .png, .jpg or .webp")
        image.save(temporary, kind, **options)


def read_request(path: str | os.PathLike[str]) -> Request:
    """The request in a JSON file or in the metadata of a PNG that `save` wrote."""
    source = Path(path)
    try:
        if source.suffix.lower() == ".png":
            with Image.open(source) as image:
                text = image.info.get(_METADATA)
            if not isinstance(text, str):
                raise InputError(f"{source} carries no request: it was not made here, or metadata was switched off")
        else:
            text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{source} is missing: give a request's JSON file or a PNG made here") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read as a request ({error}): give its JSON or a PNG made here") from error
    return Request.from_json(text)
