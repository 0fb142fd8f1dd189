"""The web API of AUTOMATIC1111 as far as inpainting goes, for clients that speak it."""

from __future__ import annotations

import base64
import io
import json
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi import Request as HttpRequest
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from dreammix_trt.service.a1111_fields import FIELDS, SAMPLERS, read_img2img
from dreammix_trt.service.forms import read_json
from dreammix_trt.service.house import Here
from dreammix_trt.service.jobs import Job
from dreammix_trt.service.previews import Watcher
from dreammix_trt.service.refusals import Refusal, describe_errors, invalid
from dreammix_trt.service.schemas import describe_json

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])


class Painted(BaseModel):
    """Pictures in base64 (PNG), the fields as they were sent without pictures, and how it was painted, as JSON."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class Progress(BaseModel):
    """Of the oldest img2img that has not ended; all zero when there is none."""

    progress: float
    eta_relative: float
    state: dict[str, Any]
    current_image: str | None
    textinfo: str | None = None


class Sampler(BaseModel):
    """A sampler by its names there and here."""

    name: str
    aliases: list[str]
    options: dict[str, str]


class Checkpoint(BaseModel):
    """An engine."""

    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str = ""
    config: str | None = None


class Lora(BaseModel):
    """A subject: `<lora:NAME:WEIGHT>` in a prompt chooses it."""

    name: str
    alias: str
    path: str = ""
    metadata: dict[str, Any]


@router.post(
    "/img2img",
    responses=describe_errors(
        "invalid_request", "too_large", "queue_full", "draining", "timed_out", "cancelled", "too_slow"
    ),
    openapi_extra=describe_json({"type": "object", "properties": FIELDS, "required": ["init_images"]}),
)
async def post_img2img(http: HttpRequest, house: Here) -> Painted:
    """Repaint what is white in `mask`. A client that goes away cancels it."""
    body = await read_json(http)
    asked = await run_in_threadpool(read_img2img, body, house.settings)
    served = house.choose_engine(asked.model)
    request = served.make_request(asked.fields)
    watcher = _OnDemand()
    job = await house.accept(served, asked.image, asked.mask, request, door="a1111", watcher=watcher)
    try:
        await house.wait_for(job, http)
    except Refusal:
        if job.so_far is None:
            raise
    images = await run_in_threadpool(_encode, job) if asked.sends else []
    sent = {name: value for name, value in body.items() if name not in ("init_images", "mask")}
    return Painted(images=images, parameters=sent, info=json.dumps(_describe(job)))


@router.get("/progress", responses=describe_errors("invalid_request"))
async def get_progress(house: Here, skip_current_image: Annotated[bool, Query()] = False) -> Progress:
    """How far the oldest img2img is. Its picture comes with the question after the next step."""
    running = [job for job in house.jobs.list_open("a1111") if job.state == "running"]
    state: dict[str, Any] = {"skipped": False, "interrupted": False, "stopping_generation": False}
    if not running:
        idle = {"job": "", "job_count": 0, "job_no": 0, "sampling_step": 0, "sampling_steps": 0}
        return Progress(progress=0.0, eta_relative=0.0, state=state | idle, current_image=None)
    (step, steps), ran = running[0].steps, running[0].seconds["ran"]
    image = None if skip_current_image else _look(running[0])
    state |= {"job": running[0].id[:6], "job_count": len(house.jobs.list_open("a1111")), "job_no": 0}
    state |= {
        "sampling_step": step,
        "sampling_steps": steps,
        "job_timestamp": running[0].created.strftime("%Y%m%d%H%M%S"),
    }
    eta = ran * (steps - step) / step if step else 0.0
    return Progress(progress=step / steps, eta_relative=round(eta, 3), state=state, current_image=image)


@router.post("/interrupt", responses=describe_errors())
async def post_interrupt(house: Here) -> dict[str, Any]:
    """Stop every running img2img after its present step; it answers with the picture as it is then."""
    for job in house.jobs.list_open("a1111"):
        if job.state == "running":
            job.interrupt()
    return {}


@router.post("/skip", responses=describe_errors())
async def post_skip(house: Here) -> dict[str, Any]:
    """The same as interrupt."""
    return await post_interrupt(house)


@router.get("/samplers", responses=describe_errors())
async def get_samplers(house: Here) -> list[Sampler]:
    """The samplers."""
    return [Sampler(name=name, aliases=[ours], options={}) for name, ours in SAMPLERS.items()]


@router.get("/sd-models", responses=describe_errors())
async def get_models(house: Here) -> list[Checkpoint]:
    """The engines."""
    return [Checkpoint(title=name, model_name=name) for name in house.engines]


@router.get("/loras", responses=describe_errors())
async def get_loras(house: Here) -> list[Lora]:
    """The subjects of the first engine."""
    cards = house.first.cards.values()
    return [Lora(name=each.name, alias=each.token or each.name, metadata={"class": each.class_name}) for each in cards]


@router.get("/options", responses=describe_errors())
async def get_options(house: Here) -> dict[str, Any]:
    """What stands fast here."""
    return {"sd_model_checkpoint": house.first.name, "samples_format": "png"}


@router.post(
    "/options",
    responses=describe_errors("invalid_request", "too_large", "queue_full", "draining", "too_slow"),
    openapi_extra=describe_json({"type": "object"}),
)
async def post_options(http: HttpRequest, house: Here) -> dict[str, Any]:
    """Nothing can be set for everybody: other values than those that stand are refused."""
    fixed = await get_options(house)
    for name, value in (await read_json(http)).items():
        if name not in fixed or value != fixed[name]:
            raise invalid(
                name[:40], "cannot be set for everybody; an img2img chooses its engine with override_settings"
            )
    return {}


class _OnDemand(Watcher):
    """Sees one step each time when somebody has asked for it."""

    def __init__(self) -> None:
        super().__init__(self._take_wish, "png")
        self.asked = False

    def _take_wish(self, before: int, now: int, total: int) -> bool:
        asked, self.asked = self.asked, False
        return asked


def _look(job: Job) -> str | None:
    """The latest picture of a job in base64, and a wish for the next one."""
    for watcher in job.watchers:
        if isinstance(watcher, _OnDemand):
            watcher.asked = True
            return base64.b64encode(watcher.previews[-1].data).decode() if watcher.previews else None
    return None


def _encode(job: Job) -> list[str]:
    if job.result is None:
        assert job.so_far is not None
        to = io.BytesIO()
        job.so_far.save(to, "PNG")  # without the request, which makes another picture
        return [base64.b64encode(to.getvalue()).decode()]
    return [base64.b64encode(job.result.to_bytes("png", k)).decode() for k in range(len(job.result.images))]


def _describe(job: Job) -> dict[str, Any]:
    """What clients show of a picture; the words are A1111's."""
    result, image = job.result, job.result.images[0] if job.result else job.so_far
    assert image is not None
    request = result.request if result else job.request
    seeds = list(result.seeds) if result else [-1 if request.seed is None else request.seed]
    texts = [result.pick(k)[1].request.to_json() for k in range(len(seeds))] if result else [""]
    return {
        "prompt": request.prompt, "all_prompts": [request.prompt] * len(seeds),
        "negative_prompt": request.negative_prompt or "", "seed": seeds[0], "all_seeds": seeds,
        "width": image.width, "height": image.height, "sampler_name": request.sampler,
        "cfg_scale": request.guidance_scale, "steps": request.num_inference_steps,
        "batch_size": len(seeds), "denoising_strength": request.strength,
        "infotexts": texts, "warnings": list(result.warnings) if result else ["it was interrupted"],
    }  # fmt: skip
