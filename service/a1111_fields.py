"""A1111's img2img as a request of ours. Every field is looked at: one that would change nothing here is refused by name
unless it has the value that means "as usual"."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.pictures import read_image
from dreammix_trt.service.forms import check_picture
from dreammix_trt.service.refusals import Refusal, invalid
from dreammix_trt.service.settings import Settings

#: its names of samplers -> ours
SAMPLERS = {"DPM++ 2M SDE": "dpmpp_2m_sde", "DPM++ 2M SDE Karras": "dpmpp_2m_sde", "Euler": "euler", "LCM": "lcm"}
#: what clients send where their user has chosen nothing: the engine's own sampler
_USUAL_SAMPLERS = (None, "", "Euler a", "Automatic")
#: fields without a counterpart, and the values with which clients say nothing
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "resize_mode": (0,), "image_cfg_scale": (None, 1.5), "inpainting_fill": (0, 1),
    "inpaint_full_res_padding": (0, 32), "initial_noise_multiplier": (None, 1), "styles": (None, []),
    "subseed": (-1,), "subseed_strength": (0,), "seed_resize_from_h": (0, -1), "seed_resize_from_w": (0, -1),
    "restore_faces": (None, False), "tiling": (None, False), "do_not_save_samples": (False, True),
    "do_not_save_grid": (False, True), "eta": (None, 0, 1), "s_churn": (None, 0), "s_tmax": (None, 0),
    "s_tmin": (None, 0), "s_noise": (None, 1), "s_min_uncond": (None, 0),
    "override_settings_restore_afterwards": (True, False), "scheduler": (None, "", "automatic", "Automatic", "Karras"),
    "script_name": (None, ""), "script_args": (None, []), "save_images": (None, False), "alwayson_scripts": (None, {}),
    "include_init_images": (None, False), "latent_mask": (None,), "mask_round": (None, True),
    "refiner_checkpoint": (None, ""), "refiner_switch_at": (None, 0), "disable_extra_networks": (None, False),
    "firstpass_image": (None,), "comments": (None, {}), "infotext": (None, ""), "force_task_id": (None,),
}  # fmt: skip
#: what each field that is read may be, for OpenAPI
FIELDS: Mapping[str, Any] = {
    "init_images": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1},
    "mask": {"type": ["string", "null"]}, "prompt": {"type": "string"}, "negative_prompt": {"type": ["string", "null"]},
    "inpainting_mask_invert": {"type": ["integer", "boolean", "null"]}, "mask_blur": {"type": ["integer", "null"]},
    "inpaint_full_res": {"type": ["integer", "boolean", "null"]}, "seed": {"type": ["integer", "null"]},
    "steps": {"type": ["integer", "null"]}, "cfg_scale": {"type": ["number", "null"]},
    "batch_size": {"type": ["integer", "null"]}, "n_iter": {"type": ["integer", "null"]},
    "denoising_strength": {"type": ["number", "null"]}, "width": {"type": ["integer", "null"]},
    "height": {"type": ["integer", "null"]}, "sampler_name": {"type": ["string", "null"]},
    "sampler_index": {"type": ["string", "null"]}, "send_images": {"type": ["boolean", "null"]},
    "override_settings": {"type": ["object", "null"]},
}  # fmt: skip
_LORA = re.compile(r"<lora:([^:<>]+)(?::([^:<>]*))?>")


@dataclass(frozen=True)
class Img2Img:
    """What an img2img asks for.

    image: the bytes of its picture; mask: uint8 (H, W), what is above 127 is repainted; None: its transparency.
    fields: of a `Request`.
    model: the engine; None: the first.
    sends: whether the answer is to have the pictures.
    """

    image: bytes
    mask: npt.NDArray[np.uint8] | None
    fields: dict[str, Any]
    model: str | None
    sends: bool


def read_img2img(body: Mapping[str, Any], settings: Settings) -> Img2Img:
    """Read a body. Decodes the mask, so it is called outside the event loop. Raises Refusal that names the field."""
    _check_known(body)
    images = body.get("init_images")
    if not isinstance(images, list) or len(images) != 1:
        raise invalid("init_images", "must be a list of one picture in base64")
    image = read_base64(images[0], "init_images")
    height, width = check_picture(image, "init_images", settings)
    for name, own in (("width", width), ("height", height)):
        if body.get(name) not in (None, 512, own):
            raise invalid(name, f"is {body[name]!r}, but a result has the size of its picture, {own}; leave it out")
    mask = None
    if body.get("mask"):
        data = read_base64(body["mask"], "mask")
        check_picture(data, "mask", settings)
        mask = _read_mask(data, _read_flag(body, "inpainting_mask_invert", False))
    elif _read_flag(body, "inpainting_mask_invert", False):
        raise invalid("inpainting_mask_invert", "needs a mask")
    return Img2Img(image, mask, _read_fields(body), _read_model(body), _read_flag(body, "send_images", True))


def read_base64(text: Any, name: str) -> bytes:
    """A file in base64, or as a data URL. Nothing is fetched. Raises Refusal for anything else."""
    if not isinstance(text, str):
        raise invalid(name, "must be a picture in base64")
    start, comma, _ = text[:100].partition(",")
    if start.startswith("data:") and comma:
        text = text[len(start) + 1 :]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise invalid(name, "is not base64; URLs and paths are not read here") from None


def _check_known(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise invalid(name, f"is {str(value)[:60]!r}, which is not supported here; leave it out")
        elif name not in FIELDS:
            raise invalid(name[:40], "is not supported here; leave it out")


def _read_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"prompt": body.get("prompt", "")}
    fields |= _read_lora(fields["prompt"]) if isinstance(fields["prompt"], str) else {}
    names = {
        "negative_prompt": "negative_prompt", "steps": "num_inference_steps", "cfg_scale": "guidance_scale",
        "denoising_strength": "strength",
    }  # fmt: skip
    fields |= {ours: body[theirs] for theirs, ours in names.items() if body.get(theirs) is not None}
    seed = body.get("seed", -1)
    fields["seed"] = None if seed in (-1, None) else seed
    batches = [body.get(name) for name in ("batch_size", "n_iter")]
    for name, count in zip(("batch_size", "n_iter"), batches, strict=True):
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 1024):
            raise invalid(name, f"is {str(count)[:60]!r}; allowed: a whole number from 1 to 1024")
    fields["num_images_per_prompt"] = (batches[0] or 1) * (batches[1] or 1)
    blur = body.get("mask_blur")
    if blur is not None:
        if not isinstance(blur, int) or isinstance(blur, bool) or not 0 <= blur <= 1024:
            raise invalid("mask_blur", f"is {str(blur)[:60]!r}; allowed: a whole number from 0 to 1024")
        fields["feather"] = int(2.5 * blur + 0.5)  # how far a Gaussian's window reaches there
    if not _read_flag(body, "inpaint_full_res", True):
        fields["lcg_field"] = 1.0  # both stages see the whole picture
    sampler = body.get("sampler_name") or body.get("sampler_index")
    if sampler not in _USUAL_SAMPLERS:
        if not isinstance(sampler, str) or sampler not in SAMPLERS:
            raise invalid("sampler_name", f"is {str(sampler)[:60]!r}; there are {', '.join(SAMPLERS)}")
        fields["sampler"] = SAMPLERS[sampler]
    return fields


def _read_lora(prompt: str) -> dict[str, Any]:
    """The prompt without `<lora:NAME:WEIGHT>`, which chooses the subject."""
    found = _LORA.findall(prompt)
    if not found:
        return {}
    if len(found) > 1:
        raise invalid("prompt", f"names {len(found)} LoRAs; a picture has one subject")
    name, weight = found[0]
    try:
        scale = float(weight) if weight else 1.0
    except ValueError:
        raise invalid("prompt", f"has a LoRA of weight {weight[:40]!r}, which is no number") from None
    text = _LORA.sub("", prompt).strip()
    return {"prompt": text, "subject": name, **({} if scale == 1.0 else {"subject_scale": scale})}


def _read_model(body: Mapping[str, Any]) -> str | None:
    settings = body.get("override_settings") or {}
    if not isinstance(settings, dict):
        raise invalid("override_settings", "must be an object")
    for name in settings:
        if name != "sd_model_checkpoint":
            raise invalid("override_settings", f"has {name[:40]!r}; sd_model_checkpoint alone is supported")
    model = settings.get("sd_model_checkpoint")
    if model is not None and not isinstance(model, str):
        raise invalid("override_settings", "has an sd_model_checkpoint that is no text")
    return model


def _read_flag(body: Mapping[str, Any], name: str, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if value not in (0, 1):
        raise invalid(name, f"is {str(value)[:60]!r}; allowed: 0, 1, false, true")
    return bool(value)


def _read_mask(data: bytes, invert: bool) -> npt.NDArray[np.uint8]:
    """A mask as A1111 takes it: grey values, white is repainted; of a picture with transparency its alpha, where that
    says anything."""
    try:
        picture = read_image(data, name="mask")
    except InputError as error:
        raise Refusal("invalid_request", str(error), "mask") from None
    alpha = picture.alpha
    varies = alpha is not None and alpha.min() != alpha.max()
    grey = alpha if alpha is not None and varies else np.asarray(Image.fromarray(picture.rgb).convert("L"))
    return np.ascontiguousarray(255 - grey if invert else grey)
