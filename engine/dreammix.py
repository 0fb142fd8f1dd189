"""The runtime's front door: load an engine directory, inpaint pictures with the subjects in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from dreammix_trt.core.errors import EngineError, InputError
from dreammix_trt.core.noise import NoiseProvider, SeededNoise
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import Schedule, make_schedule
from dreammix_trt.core.subject import Subject, pack, packed_size, read_subject
from dreammix_trt.engine import kernels
from dreammix_trt.engine.backends.onnxruntime.engine_set import REBUILD, EngineSet
from dreammix_trt.engine.canvas.frames import Canvas
from dreammix_trt.engine.canvas.geometry import Size
from dreammix_trt.engine.canvas.pictures import PictureIn, Source, read_image, read_mask
from dreammix_trt.engine.host.denoiser import Denoiser, EngineDenoiser
from dreammix_trt.engine.host.stages import Clock, Facts, Networks, Painter, Text, Timed, painted
from dreammix_trt.engine.result import Result, StepEvent, read_request, save
from dreammix_trt.engine.text import Tokenizer, apply_tas, plan_tas

if TYPE_CHECKING:
    from dreammix_trt.engine.device.plan import Options
    from dreammix_trt.engine.device.studio import Studio, Work
    from dreammix_trt.engine.drivers.device import Device, Stream
    from dreammix_trt.engine.seam import DeviceNetworks

__all__ = ["DreamMix", "Job", "Result", "StepEvent", "read_request", "save"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_UNETS = ("unet", "unet_raw")
_REMEMBERED_TEXTS = 256
_TOKEN = "sks"
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Closable(Protocol):
    """Something with an owner."""

    def close(self) -> None: ...


class Job(NamedTuple):
    """One request with its pictures; noise: providers, one a picture (default: seeded)."""

    image: Source
    mask_image: Source
    request: Request
    noise: NoiseProvider | Sequence[NoiseProvider] | None = None


class DreamMix:
    """An engine ready to paint. Use it as a context manager, or call `close`; after that it raises EngineError.

    defaults: fields of `Request` that its base was made for (a few-step base: sampler, guidance_scale,
    num_inference_steps); they hold for prompts given as text, where the caller does not say otherwise. studio: where
    requests run on a GPU (`on_device` makes both). Not thread-safe: one request at a time per object; `another` gives a
    second one on the same GPU.
    """

    def __init__(
        self,
        networks: Networks | DeviceNetworks,
        facts: Facts,
        tokenizers: Sequence[Tokenizer],
        subjects: Sequence[Subject] = (),
        *,
        denoiser: Denoiser | None = None,
        defaults: Mapping[str, Any] = _NOTHING,
        studio: Studio | None = None,
        owned: Sequence[Closable] = (),
    ) -> None:
        self.networks, self.facts = networks, facts
        self._studio, self._owned = studio, tuple(owned)
        self.defaults = _checked(defaults)
        self._closed = False
        self.tokenizers = tuple(tokenizers)
        self._denoiser = denoiser
        self._subjects: dict[str, tuple[Subject, dict[str, F32]]] = {}
        self._texts: dict[tuple[str, str, bool], tuple[F32, F32]] = {}
        self._names = [name for name in (*_TEXT_ENCODERS, *_UNETS) if name in networks]
        if studio is None:
            self._off = {name: np.zeros(packed_size(networks.slots(name)), np.float32) for name in self._names}
        for subject in subjects:
            self._add(subject, subject.name)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        verify: bool = False,
        store: str | os.PathLike[str] | None = None,
        device: str = "cpu",
        **options: Any,
    ) -> DreamMix:
        """Load an engine directory that `dreammix-trt build` made.

        threads: for the networks and the kernels; None: all cores. verify: hash every file again. store: where the
        base engines are, when not in the default place. device: "cpu", or "cuda": requests run on the GPU as a whole;
        then options are those of `dreammix_trt.engine.device.plan.Options` (pictures, largest_picture, subjects,
        residency, ...). Raises InputError for device and options, EngineError saying what is wrong and how to rebuild,
        MissingExtraError for packages that a GPU needs, DeviceError for a GPU that cannot be used, OutOfMemoryError
        with the memory plan.
        """
        from dreammix_trt.engine.directory import check_runnable, open_engine

        chosen = _device_options(device, options)
        opened = open_engine(Path(path), verify=verify, store=Path(store) if store else None)
        check_runnable(Path(path), opened)
        tokenizers = [Tokenizer.load(opened.parts["base"] / name) for name in ("tokenizer", "tokenizer_2")]
        subjects = [read_subject(file) for file in opened.subjects]
        if device == "cuda":
            from dreammix_trt.engine.device.loading import open_device

            if threads is not None:
                kernels.set_threads(threads)
            owned = open_device(opened, Path(store) if store else None)
            return cls.on_device(
                owned.device,
                owned.networks,
                tokenizers,
                subjects,
                chosen,
                stream=owned.stream,
                owned=(owned,),
            )
        if opened.passport.backend != "onnxruntime":
            raise EngineError(
                f"{path} holds {opened.passport.backend} engines, which run on a GPU: load it with device='cuda' "
                "(`--device cuda`), or build one for the CPU with `--backend onnxruntime`"
            )
        networks = EngineSet.load(opened.parts, threads, device)
        kernels.set_threads(networks.threads)
        networks.prepare()
        defaults = getattr(networks.facts, "defaults", None) or _NOTHING
        return cls(networks, networks.facts, tokenizers, subjects, defaults=defaults)

    @classmethod
    def on_device(
        cls,
        device: Device,
        networks: DeviceNetworks,
        tokenizers: Sequence[Tokenizer],
        subjects: Sequence[Subject] = (),
        options: Options | None = None,
        *,
        stream: Stream | None = None,
        owned: Sequence[Closable] = (),
    ) -> DreamMix:
        """A DreamMix whose requests run on a device as a whole.

        stream: where the networks must run, if it matters to them (`Studio`). owned: closed, in order, when this is
        closed or cannot be made; device and networks are not, unless they are among them.
        """
        from dreammix_trt.engine.device.studio import Studio

        with ExitStack() as made:
            for each in reversed(owned):
                made.callback(each.close)
            studio = Studio(device, networks, tokenizers, options, stream)
            made.callback(studio.close)
            defaults = getattr(networks.facts, "defaults", None) or _NOTHING
            runtime = cls(
                networks, networks.facts, tokenizers, subjects, defaults=defaults, studio=studio, owned=(studio, *owned)
            )
            made.pop_all()
            return runtime

    def another(self) -> DreamMix:
        """A second DreamMix on the same GPU: the same weights, memory and a stream of its own, so that both can be
        used at once, each by one thread. Close it before this one. Raises EngineError on the CPU, and where the memory
        plan or the back end does not let networks be shared; OutOfMemoryError."""
        self._ready()
        if self._studio is None:
            raise EngineError("another() shares a GPU; on the CPU load the engine a second time")
        subjects = [replace(subject, name=name) for name, (subject, _) in self._subjects.items()]
        studio = self._studio.another()
        try:
            return DreamMix(
                studio.shared, self.facts, self.tokenizers, subjects, defaults=self.defaults, studio=studio,
                owned=(studio,),
            )  # fmt: skip
        except BaseException:
            studio.close()
            raise

    @property
    def studio(self) -> Studio | None:
        """Where requests run on a GPU: its memory plan, timings, residents. None on the CPU."""
        return self._studio

    def close(self) -> None:
        """Release the networks; any use after this raises EngineError, closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as owned:
            if isinstance(self.networks, EngineSet):
                owned.callback(self.networks.close)
            for each in reversed(self._owned):
                owned.callback(each.close)

    def __enter__(self) -> DreamMix:
        self._ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def subjects(self) -> tuple[str, ...]:
        """Names of the loaded subjects; the first is the default."""
        return tuple(self._subjects)

    def add_subject(self, path: str | os.PathLike[str], name: str | None = None) -> str:
        """Load another subject of the same base: a subject file, or an engine directory with subjects in it.

        Returns its name (the first one's). A loaded subject of the same name is replaced. Raises FileFormatError when
        it does not fit this base.
        """
        self._ready()
        source = Path(path)
        files = sorted((source / "subjects").glob("*.safetensors")) if source.is_dir() else [source]
        if not files:
            raise EngineError(f"{source} holds no subject (subjects/*.safetensors); make one with `dreammix-trt build`")
        if name is not None and len(files) > 1:
            raise InputError(f"name is {name!r}, but {source} holds {len(files)} subjects; name one of their files")
        names = [self._add(subject, name or subject.name) for subject in map(read_subject, files)]
        return names[0]

    def request(self, prompt: str, **fields: Any) -> Request:
        """The request of a prompt: `fields` of `Request` as given, else the base's `defaults`, else Request's own."""
        return Request.of(**{**self.defaults, **fields, "prompt": prompt})

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

        image, mask_image: path, PIL image or uint8 array of equal size. prompt: text, which makes a request as
        `request` does, or a whole Request, taken as it is; fields: any field of `Request` (seed, substitute,
        num_inference_steps, ...). noise: where the random numbers come from, one provider a picture; default: the
        seed. Raises InputError naming the value that cannot be used.
        """
        return _last(self.iterate(image, mask_image, prompt, noise=noise, keep_stages=keep_stages, **fields))

    def inpaint_batch(self, jobs: Sequence[Job]) -> list[Result]:
        """Several requests, one result each, in order. All are checked before the first is painted.

        jobs: (image, mask_image, request) each, the request of `request(prompt, ...)`. On a GPU pictures of equal frame
        and steps share a batch of up to `pictures`, whatever their subjects, prompts and sizes; on the CPU they are
        painted one after the other. Raises InputError naming the value that cannot be used.
        """
        if self._studio is not None:
            laid_out = [self._laid_out(self._studio, Job(*job)) for job in jobs]
            for _ in self._device_events(self._studio, laid_out, keep_stages=False):
                pass
            return [job.finished for job in laid_out if job.finished is not None]
        prepared = [self._prepared(Job(*job)) for job in jobs]
        return [_last(self._events(work, keep_stages=False)) for work in prepared]

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
        request = prompt.replace(**fields) if isinstance(prompt, Request) else self.request(prompt, **fields)
        job = Job(image, mask_image, request, noise)
        if self._studio is not None:
            return self._device_events(self._studio, [self._laid_out(self._studio, job)], keep_stages)
        return self._events(self._prepared(job), keep_stages)

    def rows_of(self, subject: str) -> dict[str, F32]:
        """A loaded subject's packed factors: network -> float32 (P,)."""
        return dict(self._subjects[subject][1]) if self._studio is None else self._packed(self._subjects[subject][0])

    def _prepared(self, job: Job) -> _Work:
        """Check everything of a job and do what its pictures share."""
        self._ready()
        clock, request = Clock(), _request_of(job)
        networks = Timed(cast(Networks, self.networks), clock, self._ready)  # without a studio they are the host's
        with clock("read"):
            source = read_image(job.image)
            mask = read_mask(job.mask_image, source.size)
        with clock("canvas"):
            canvas = laid(source.rgb, mask, request, self.facts)
        schedule = make_schedule(request, raw_unet="unet_raw" in self.networks)
        subject, token, rows = self._chosen(request)
        with clock("text"):
            texts = self._texts_of(request, networks, subject, token, rows)
        seeds = tuple(request.seed + k for k in range(request.num_images_per_prompt))
        noises = _providers(job.noise, seeds)
        painters = [
            Painter(canvas, request, schedule, texts, rows, noise, networks, self.facts, clock=clock)
            for noise in noises
        ]
        denoiser = self._denoiser or EngineDenoiser(networks, self._names)
        return _Work(source, request, schedule, seeds, painters, denoiser, clock)

    def _events(self, work: _Work, keep_stages: bool) -> Iterator[StepEvent]:
        """One picture after the other, so that each is the same to the bit however many there are."""
        clock, total = work.clock, len(work.schedule) * len(work.painters)
        images = []
        for number, painter in enumerate(work.painters):
            painter.shown = {} if keep_stages and number == 0 else None
            steps = painted([painter], work.schedule, work.denoiser)
            for done in range(len(work.schedule)):
                with clock("loop"):
                    taken = next(steps)
                index = number * len(work.schedule) + done
                look = partial(painter.decoded, taken.x0)
                event = StepEvent(index, total, taken.step.stage, number, look, painter, taken)
                if done + 1 < len(work.schedule):
                    yield event
            finished = painter.finish(taken.x)
            with clock("write"):
                images.append(_written(work.source, finished))
            if number + 1 < len(work.painters):
                yield event
        shown = {name: _rgb(picture) for name, picture in (work.painters[0].shown or {}).items()}
        result = Result(images, work.request, work.seeds, work.schedule, dict(clock.seconds), shown)
        yield replace(event, result=result)

    def _laid_out(self, studio: Studio, job: Job) -> _LaidOut:
        """Check everything of a job that runs on a device, and lay its pictures out; touches no device."""
        self._ready()
        clock, request = Clock(), _request_of(job)
        if job.noise is not None:
            raise InputError("noise is given, but on a GPU it is drawn there, from the seed: load with device='cpu'")
        with clock("read"):
            source = read_image(job.image)
            mask = read_mask(job.mask_image, source.size)
        name, token = self._named(request)
        if "unet_raw" in studio.shared and not studio.has_raw_unet:  # the memory plan left it away: say what is painted
            request = request.replace(patched_fraction=1.0)
        with clock("canvas"):
            canvas = laid(source.rgb, mask, request, self.facts, studio.networks.frames())
            schedule = make_schedule(request, raw_unet=studio.has_raw_unet)
            seeds = tuple(request.seed + k for k in range(request.num_images_per_prompt))
            first = studio.work(canvas, request, schedule, seeds[0], name, token)
            works = [replace(first, picture=replace(first.picture, seed=seed)) for seed in seeds]
        return _LaidOut(source, request, schedule, seeds, works, clock)

    def _device_events(self, studio: Studio, jobs: Sequence[_LaidOut], keep_stages: bool) -> Iterator[StepEvent]:
        """The pictures of all jobs in batches of equal shape; a job's result comes with its last picture's last
        step."""
        total = sum(len(job.schedule) * len(job.works) for job in jobs)
        images: dict[int, list[Image.Image]] = {}
        shown: dict[int, dict[str, Image.Image]] = {}
        index = 0
        for batch in _batches(jobs, studio.options.pictures):
            (job, k), count = batch[0], len(batch)
            steps = len(jobs[job].schedule)
            with closing(studio.paint([jobs[j].works[n] for j, n in batch])) as painting:
                for progress in painting:
                    if isinstance(progress, list):
                        break
                    done, look = count * (progress.step.index + 1) - 1, partial(progress.preview, 0)
                    event = StepEvent(index + done, total, progress.step.stage, k, look)
                    if progress.step.index + 1 < steps:
                        yield event
                for place, ((job, k), pixels) in enumerate(zip(batch, cast(list[U8], progress), strict=True)):
                    with jobs[job].clock("write"):
                        images.setdefault(job, []).append(_written(jobs[job].source, pixels))
                    if keep_stages and k == 0:
                        pictures = studio.stages(place, jobs[job].works[k].picture)
                        shown[job] = {name: _rgb(picture) for name, picture in pictures.items()}
                    jobs[job].charge(studio.timings, len(batch))
                    if len(images[job]) == len(jobs[job].works):
                        jobs[job].finished = jobs[job].result(images[job], shown.get(job, {}))
                        yield replace(event, picture=k, result=jobs[job].finished)
                    elif place + 1 == len(batch):
                        yield event
            index += steps * count

    def _ready(self) -> None:
        if self._closed:
            raise EngineError("this engine was closed: load it again with DreamMix.load, or use it before close()")

    def _add(self, subject: Subject, name: str) -> str:
        if self._studio is not None:
            self._studio.add_subject(name, subject)
        self._subjects[name] = (subject, {} if self._studio is not None else self._packed(subject))
        self._texts = {key: value for key, value in self._texts.items() if key[1] != name}
        return name

    def _packed(self, subject: Subject) -> dict[str, F32]:
        return {each: pack(subject.factors_for(each), self.networks.slots(each), subject.scale) for each in self._names}

    def _named(self, request: Request) -> tuple[str, str]:
        """(name, token) of the request's subject; ("", "sks") for none."""
        name = request.subject if request.subject is not None else next(iter(self._subjects), "")
        if name == "":
            return "", _TOKEN
        if name not in self._subjects:
            known = ", ".join(map(repr, self._subjects)) or "none"
            raise InputError(f"subject is {name!r}; loaded are: {known}; load it with add_subject, or give '' for none")
        return name, self._subjects[name][0].token or _TOKEN

    def _chosen(self, request: Request) -> tuple[str, str, dict[str, F32]]:
        """(name, token, packed rows) of the request's subject."""
        name, token = self._named(request)
        return name, token, self._subjects[name][1] if name else self._off

    def _texts_of(
        self, request: Request, networks: Networks, subject: str, token: str, rows: Mapping[str, F32]
    ) -> dict[str, Text]:
        """Each stage's text: encoded prompts, decomposed by TAS where the request says so."""

        def encoded(prompt: str) -> tuple[F32, F32]:
            return self._encoded(prompt, networks, subject, rows, request.truncate_prompt)

        tokens, pooled = less_tokens, less_pooled = encoded(request.prompt)
        if request.substitute:
            prefix = f"a photo of a {token}" if request.substitute_prefix is None else request.substitute_prefix
            words, prompt = request.substitute, request.prompt
            plan = plan_tas(self.tokenizers[0], prompt, words, prefix, request.indexing, token)
            less_tokens, less_pooled = apply_tas(plan, tokens, pooled, *encoded(plan.text))
        negative = np.zeros_like(tokens), np.zeros_like(pooled)
        if request.guided and request.negative_prompt is not None:
            negative = encoded(request.negative_prompt)
        texts = {}
        for stage in ("lcg", "gch"):
            positive = (
                less_tokens if f"tokens_{stage}" in request.tas_stages else tokens,
                less_pooled if f"pooled_{stage}" in request.tas_stages else pooled,
            )
            both = [negative, positive] if request.guided else [positive]
            texts[stage] = Text(np.stack([pair[0] for pair in both]), np.stack([pair[1] for pair in both]))
        return texts

    def _encoded(
        self, prompt: str, networks: Networks, subject: str, rows: Mapping[str, F32], truncate: bool
    ) -> tuple[F32, F32]:
        """(tokens (77, D), pooled (Dp,)) of a prompt with a subject's text factors; remembered."""
        key = (prompt, subject, truncate)
        if key not in self._texts:
            ids = [tokenizer.encode(prompt, truncate)[None] for tokenizer in self.tokenizers]
            outputs = [
                networks.run(name, input_ids=row, lora=rows[name][None])
                for name, row in zip(_TEXT_ENCODERS, ids, strict=True)
            ]
            if len(self._texts) >= _REMEMBERED_TEXTS:
                self._texts.clear()
            hidden = np.concatenate([output["hidden"][0] for output in outputs], axis=-1)
            self._texts[key] = (hidden, outputs[1]["pooled"][0])
        return self._texts[key]


class _Work(NamedTuple):
    """A job that has been checked and prepared."""

    source: PictureIn
    request: Request
    schedule: Schedule
    seeds: tuple[int, ...]
    painters: list[Painter]
    denoiser: Denoiser
    clock: Clock


@dataclass
class _LaidOut:
    """A job for a device: checked, nothing of it uploaded yet."""

    source: PictureIn
    request: Request
    schedule: Schedule
    seeds: tuple[int, ...]
    works: list[Work]
    clock: Clock
    finished: Result | None = None

    def charge(self, timings: Mapping[str, float], pictures: int) -> None:
        """Add a picture's share of its batch's device seconds."""
        for phase, seconds in timings.items():
            self.clock.seconds[phase] = self.clock.seconds.get(phase, 0.0) + seconds / pictures

    def result(self, images: list[Image.Image], shown: dict[str, Image.Image]) -> Result:
        return Result(images, self.request, self.seeds, self.schedule, dict(self.clock.seconds), shown)


def _batches(jobs: Sequence[_LaidOut], most: int) -> Iterator[list[tuple[int, int]]]:
    """Pictures as (job, number), at most `most` of equal shape and steps together, in order of their first."""
    variants = [job.works[0].picture.variant for job in jobs]  # a job's pictures differ in their seeds alone
    waiting = [(job, k) for job, laid_out in enumerate(jobs) for k in range(len(laid_out.works))]
    while waiting:
        batch = [each for each in waiting if variants[each[0]] == variants[waiting[0][0]]][:most]
        waiting = [each for each in waiting if each not in batch]
        yield batch


def _request_of(job: Job) -> Request:
    if not isinstance(job.request, Request):
        raise InputError(f"a job's request is a {type(job.request).__name__}: give dm.request(prompt, ...)")
    return job.request


def _written(source: PictureIn, pixels: U8) -> Image.Image:
    """A finished picture as the user's own kind of image."""
    return source.with_pixels(pixels) if pixels.shape[:2] == source.size else _rgb(pixels)


def _device_options(device: str, options: Mapping[str, Any]) -> Options:
    """The options of a device; unknown devices, options and values are refused before anything is opened."""
    from dreammix_trt.engine.device.plan import Options

    if device not in ("cpu", "cuda"):
        raise InputError(
            f"device is {device!r}; allowed: cpu, cuda (the first GPU; CUDA_VISIBLE_DEVICES=1 makes it another)"
        )
    known = [each.name for each in fields(Options)]
    for name in options:
        if name not in known:
            raise InputError(f"there is no option {name!r}; those of device='cuda' are {', '.join(known)}")
        if device != "cuda":
            raise InputError(f"{name} needs device='cuda' (`--device cuda`); leave it out on the CPU")
    return Options(**options)


def _checked(defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """A base's request defaults, refused as a whole where a request would refuse one of them."""
    try:
        Request.of(**{"prompt": "", **defaults})
    except (InputError, TypeError) as error:
        raise EngineError(f"the base's request defaults cannot be used: {error}; {REBUILD}") from error
    return MappingProxyType(dict(defaults))


def laid(image: U8, mask: U8, request: Request, facts: Facts, sizes: Sequence[Size] | None = None) -> Canvas:
    """The canvas of a request; reference mode stretches to reference_resize, or to the base's native square.

    sizes: the only frames the engines take, where they do not take all (`Canvas.of`).
    """
    native, divisor = facts.native_side, facts.divisor
    if request.reference_resize is None or request.reference_resize == (native, native):
        return Canvas.of(image, mask, mode=request.mode, native=native, divisor=divisor, sizes=sizes)
    height, width = request.reference_resize
    image, mask = (kernels.resize(array, height, width, "bicubic") for array in (image, mask))
    checked = Canvas.of(image, mask, native=native, divisor=divisor, sizes=sizes)
    return replace(checked, mode=request.mode)


def _providers(given: NoiseProvider | Sequence[NoiseProvider] | None, seeds: Sequence[int]) -> Sequence[NoiseProvider]:
    if given is None:
        return [SeededNoise(seed, kernels.normals) for seed in seeds]
    providers = given if isinstance(given, Sequence) else [given]
    if len(providers) != len(seeds):
        raise InputError(f"noise: {len(providers)} providers for {len(seeds)} pictures; give one for each")
    return providers


def _rgb(picture: U8) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(picture))


def _last(events: Iterator[StepEvent]) -> Result:
    for event in events:
        result = event.result
    assert result is not None
    return result
