"""A job on its way to a result: check it, frame its pictures, paint them in batches, report each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.masks import read_mask
from dreammix_trt.core.noise import NoiseProvider
from dreammix_trt.core.pictures import PictureIn, read_image
from dreammix_trt.core.remarks import keep_remarks, remark
from dreammix_trt.core.request import Request, draw_seed
from dreammix_trt.core.schedule import Schedule, make_schedule
from dreammix_trt.core.seam import BaseFacts
from dreammix_trt.core.sources import Source
from dreammix_trt.core.token_rows import Tokens
from dreammix_trt.engine import kernels
from dreammix_trt.engine.canvas.frames import Canvas
from dreammix_trt.engine.canvas.geometry import Size, feather_width
from dreammix_trt.engine.host.clock import PhaseClock
from dreammix_trt.engine.imprint import Origin
from dreammix_trt.engine.painting import Progress, batch_by_shape
from dreammix_trt.engine.prompts import plan_prompts
from dreammix_trt.engine.result import Result, StepEvent
from dreammix_trt.engine.retrieval import Retriever, choose_substitute, retrieve
from dreammix_trt.engine.roster import Cast
from dreammix_trt.engine.runtime import Painted, Runtime, Work
from dreammix_trt.engine.text import Tokenizer

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


class Job(NamedTuple):
    """One request with its pictures.

    mask_image: None: the picture's own transparency; what is transparent is repainted.
    noise: a provider for each picture; None: the seed.
    retriever: finds the words of substitute="auto".
    prior_image: what ASUKA's prior sees in place of the picture, of its size; None: the picture.
    """

    image: Source
    mask_image: Source | None
    request: Request
    noise: NoiseProvider | Sequence[NoiseProvider] | None = None
    retriever: Retriever = retrieve
    prior_image: Source | None = None


@dataclass
class LaidOut:
    """A job that is checked and ready. None of it has run yet.

    source: the user's picture.
    shapes: for each picture, what the pictures of its batch must share.
    origin: what paints it.
    warnings: what its user should know of its pictures and words.
    images: finished so far.
    stages: named pictures of what each stage did, where they were asked for.
    finished: the result, after the last picture.
    """

    source: PictureIn
    request: Request
    schedule: Schedule
    seeds: tuple[int, ...]
    works: list[Work]
    shapes: list[Any]
    clock: PhaseClock
    origin: Origin
    warnings: tuple[str, ...]
    images: list[Image.Image] = field(default_factory=list)
    stages: dict[str, Image.Image] = field(default_factory=dict)
    finished: Result | None = None

    def take(self, picture: Painted, timings: Mapping[str, float], count: int) -> None:
        """Add the next finished picture. The last picture makes the result.

        timings: seconds of its batch by phase.
        count: pictures in that batch; each gets an equal share of the seconds.
        """
        with self.clock("write"):
            self.images.append(_write(self.source, picture.pixels, self.works[len(self.images)].canvas))
        self.stages |= {name: _to_image(pixels) for name, pixels in picture.stages.items()}
        for phase, seconds in timings.items():
            self.clock.seconds[phase] = self.clock.seconds.get(phase, 0.0) + seconds / count
        if len(self.images) == len(self.works):
            spent = dict(self.clock.seconds)
            self.finished = Result(
                self.images, self.request, self.seeds, self.schedule, spent, self.stages, self.origin, self.warnings
            )


def _write(source: PictureIn, pixels: U8, canvas: Canvas) -> Image.Image:
    """A finished picture as an image of the user's own kind, and visible as far as it was pasted."""
    if pixels.shape[:2] != source.size:
        return _to_image(pixels)
    return source.with_pixels(pixels, None if source.alpha is None else canvas.feather)


def _to_image(pixels: U8) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels))


def lay_out(
    job: Job,
    runtime: Runtime,
    tokenizers: Sequence[Tokenizer],
    choose: Callable[[Request], Cast],
    origin: Origin,
) -> LaidOut:
    """Check a whole job and prepare its pictures. Runs no network. Warnings are logged, and kept for the result.

    choose: request -> what it draws.
    origin: what paints it, without the subject.

    Raises InputError that names the value at fault.
    """
    clock, request = PhaseClock(), job.request
    if not isinstance(request, Request):
        raise InputError(f"a job's request is a {type(request).__name__}: give dm.request(prompt, ...)")
    seed = draw_seed() if request.seed is None else request.seed
    request = request.replace(seed=seed)
    if runtime.lost_raw_unet:  # the request of the result says what was painted
        request = request.replace(patched_fraction=1.0)
    with keep_remarks() as remarks:
        cast = choose(request)
        subject = cast.subject
        request, reasons = choose_substitute(request, subject, job.retriever)
        for reason in reasons:
            remark(reason)
        if runtime.lost_raw_unet and subject.target == "raw":
            remark(
                f"subject {subject.name!r} acts on the second UNet alone (target raw), for which there is no memory "
                "(residency 'one-unet'), so these factors do nothing: build it with target patched or both, or free "
                "memory"
            )
        with clock("read"):
            source = read_image(job.image)
            mask = read_mask(job.mask_image, source)
        with clock("canvas"):
            canvas = lay_canvas(source.seen, mask, request, runtime.facts, runtime.frames)
            canvas = _limit_feather(canvas, request)
        prior_image = _read_prior_image(job.prior_image, request, source, canvas)
    schedule = make_schedule(request, raw_unet=runtime.has_raw_unet)
    seeds = tuple(seed + k for k in range(request.num_images_per_prompt))
    noises = _check_noise(job.noise, seeds)
    prompts = plan_prompts(
        tokenizers,
        request,
        cast.role,
        subject.token,
        lay_rows(cast.tokens, request),
        contexts=runtime.contexts,
        caption_words=subject.caption_words,
    )
    works = [
        Work(canvas, request, schedule, seed, cast.role, prompts, noise, prior_image)
        for seed, noise in zip(seeds, noises, strict=True)
    ]
    with keep_remarks() as more:
        shapes = [runtime.check(work) for work in works]
    for warning in prompts.warnings:
        remark(warning)
    told = {"subject": subject.name, "subject_sha256": subject.source_sha256, "token_subject": cast.token_subject}
    origin = replace(origin, **told)
    said = (*remarks, *more, *prompts.warnings)
    return LaidOut(source, request, schedule, seeds, works, shapes, clock, origin, said)


def lay_rows(tokens: Tokens | None, request: Request) -> F32 | None:
    """A subject's rows for every row of the condition, with guidance or without: float32 (1 or 2, K, D), or None."""
    if tokens is None:
        return None
    chosen = tokens.rows[: request.token_count] * np.float32(request.token_weight)
    return np.repeat(chosen[None], 2 if request.guided else 1, axis=0)


def lay_canvas(image: U8, mask: U8, request: Request, facts: BaseFacts, sizes: Sequence[Size] | None = None) -> Canvas:
    """Make the canvas of a request. Reference mode stretches it to reference_resize, or to the base's native square.

    image: uint8 (H, W, 3).
    mask: uint8 (H, W).
    sizes: the only frame sizes that the engines take; None: all (`Canvas.of`).
    """
    native, divisor, feather = facts.native_side, facts.divisor, request.feather
    if request.reference_resize is None or request.reference_resize == (native, native):
        return Canvas.of(image, mask, mode=request.mode, native=native, divisor=divisor, sizes=sizes, feather=feather)
    height, width = request.reference_resize
    image, mask = (kernels.resize(array, height, width, "bicubic") for array in (image, mask))
    checked = Canvas.of(image, mask, native=native, divisor=divisor, sizes=sizes, feather=feather)
    return replace(checked, mode=request.mode)


def _read_prior_image(given: Source | None, request: Request, source: PictureIn, canvas: Canvas) -> U8 | None:
    """What ASUKA's prior is to see, uint8 of the canvas' size. Raises InputError where it cannot be used."""
    if given is None:
        return None
    if request.prior is None:
        raise InputError(
            "prior_image is given, but prior is None, so nothing would look at it; give a prior, or omit it"
        )
    seen = read_image(given)
    if seen.size != source.size:
        sizes = " and ".join("{1}x{0}".format(*size) for size in (seen.size, source.size))
        raise InputError(f"prior_image and image are of {sizes} pixels; they must be of equal size")
    remark("prior_image is no part of the request: whoever repeats it must give the same one again")
    return kernels.resize(seen.seen, *canvas.size, "bicubic") if canvas.mode == "reference" else seen.seen


def _limit_feather(canvas: Canvas, request: Request) -> Canvas:
    """Let an asked feather end within the last stage's frame, whose rim would show; the usual width is always left."""
    if request.feather is None or canvas.mode == "reference":
        return canvas
    room = canvas.measure_room(request.field_of("gch" if request.local_steps < request.steps else "lcg"))
    width = max(room, feather_width(canvas.size))
    if request.feather <= width:
        return canvas
    remark(f"feather is {request.feather}, but the frame ends near the mask, and {width} pixels of it are used")
    return replace(canvas, feather_pixels=width)


def paint_jobs(
    runtime: Runtime, jobs: Sequence[LaidOut], keep_stages: bool, check_open: Callable[[], None]
) -> Iterator[StepEvent]:
    """Paint the pictures of all jobs in batches of equal shape, one subject after the other.

    keep_stages: whether results have pictures of what each stage did.
    check_open: raises when the runtime may no longer be used.

    Yields an event after each step. A job's result comes with the last step of its last picture.
    """
    pictures = [(job, k) for job in jobs for k in range(len(job.works))]
    shapes, roles = [job.shapes[k] for job, k in pictures], [job.works[k].subject for job, k in pictures]
    total, index = sum(len(job.schedule) for job, _ in pictures), 0
    for numbers in batch_by_shape(shapes, runtime.most_pictures, roles):
        check_open()
        batch = [pictures[number] for number in numbers]
        (job, first), count = batch[0], len(batch)
        keep = [place for place, (_, k) in enumerate(batch) if keep_stages and k == 0]
        with closing(runtime.paint([each.works[k] for each, k in batch], keep)) as painting:
            event: StepEvent | None = None
            for progress in painting:
                if isinstance(progress, list):
                    assert event is not None
                    yield from _take_in(batch, progress, runtime.timings, event)
                    break
                done = count * (progress.step.index + 1)
                event = _make_event(job, progress, index + done - 1, total, first)
                if progress.step.index + 1 < len(job.schedule):
                    yield event
                    check_open()
        index += len(job.schedule) * count


def _make_event(job: LaidOut, progress: Progress, index: int, total: int, picture: int) -> StepEvent:
    """The event of a batch's progress; its preview is of the batch's first picture."""

    def look(whole: bool) -> Image.Image:
        pixels = progress.preview(0, whole)
        return _write(job.source, pixels, job.works[0].canvas) if whole else _to_image(pixels)

    return StepEvent(index, total, progress.step.stage, picture, look, progress.taken)


def _take_in(
    batch: Sequence[tuple[LaidOut, int]], painted: Sequence[Painted], timings: Mapping[str, float], last: StepEvent
) -> Iterator[StepEvent]:
    """Give finished pictures to their jobs. Yields the event of the last step once for each job that is done."""
    for place, ((job, k), picture) in enumerate(zip(batch, painted, strict=True)):
        job.take(picture, timings, len(batch))
        if job.finished is not None:
            yield replace(last, picture=k, result=job.finished)
        elif place + 1 == len(batch):
            yield last


def _check_noise(
    given: NoiseProvider | Sequence[NoiseProvider] | None, seeds: Sequence[int]
) -> Sequence[NoiseProvider | None]:
    """One provider a picture, or None for each where the caller gives none."""
    if given is None:
        return [None] * len(seeds)
    providers = given if isinstance(given, Sequence) else [given]
    if len(providers) != len(seeds):
        raise InputError(f"noise: {len(providers)} providers for {len(seeds)} pictures; give one for each")
    return providers
