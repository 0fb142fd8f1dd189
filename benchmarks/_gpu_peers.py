"""The parts `peers-*`: whole pictures by diffusers on the same GPU with the same weights, eager and compiled.

Equal sizes, steps and guidance. Ours does more for a picture (two stages, five VAE encodes); diffusers
gets its VAE in float16, which its users of a fixed VAE have, and, in a row of its own, as it comes: in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _common import median_seconds
from _gpu_full import paint_often
from _gpu_models import (
    PROMPT,
    Front,
    Setting,
    configs_of,
    device_of,
    random_networks,
    sample_picture,
    studio_for,
    tokenizers_of,
)
from _gpu_report import Part
from _sdxl_files import write_tokenizers
from PIL import Image

Paint = Callable[[Mapping[str, Any]], object]


def peers_eager(part: Part, setting: Setting) -> None:
    """Every job by both sides in eager torch."""
    _compare(part, setting, setting.jobs(), compiled=False)


def peers_compiled(part: Part, setting: Setting, job: int) -> None:
    """One job by both sides through torch.compile; job: its number in `Setting.jobs`."""
    if not setting.compiled:
        part.skip("left out, as was asked (--eager)")
        return
    name, fields = list(setting.jobs().items())[job]
    _compare(part, setting, {name: fields}, compiled=True)


def peers_float32(part: Part, setting: Setting) -> None:
    """Diffusers as it comes: the VAE is brought to float32 and back for every picture."""
    with device_of(setting) as device, random_networks(setting, device) as networks:
        paint = painter(part, setting, networks, setting.jobs(), compiled=False, upcast=True)
        for name, fields in setting.jobs().items():
            seconds = median_seconds({"paint": lambda fields=fields: paint(fields)}, repeats=setting.repeats)["paint"]
            part.add(f"{name}: diffusers, eager, VAE in float32 [s]", seconds)


def _compare(part: Part, setting: Setting, jobs: Mapping[str, Mapping[str, Any]], *, compiled: bool) -> None:
    """Rows of both sides and their ratio, a job after the other, so that a part that is stopped has the first."""
    kind = "compiled" if compiled else "eager"
    with device_of(setting) as device, random_networks(setting, device, compiled=compiled) as networks:
        paint = painter(part, setting, networks, jobs, compiled)
        with studio_for(device, networks, tokenizers_of(setting), largest_picture=setting.side**2) as front:
            for name, fields in jobs.items():
                seconds = in_turns(setting, fields, paint, front)
                part.add(f"{name}: diffusers, {kind} [s]", seconds["diffusers"])
                part.add(f"{name}: ours, torch {kind} in the device runtime [s]", seconds["ours"])
                part.add(f"{name}: diffusers / ours, both {kind}", seconds["diffusers"] / seconds["ours"])
    part.note("diffusers computes its VAE in float16")


def in_turns(setting: Setting, fields: Mapping[str, Any], paint: Paint, front: Front) -> dict[str, float]:
    """Median seconds of a whole picture by either, one after the other, so that both meet the same machine."""
    paint_often(front, setting, fields, warm=2, times=0)  # warms up and captures
    works: dict[str, Callable[[], object]] = {
        "diffusers": lambda: paint(fields),
        "ours": lambda: paint_often(front, setting, fields, warm=0, times=1),
    }
    return median_seconds(works, repeats=setting.repeats)


def painter(
    part: Part,
    setting: Setting,
    networks: Any,
    jobs: Mapping[str, Mapping[str, Any]],
    compiled: bool,
    upcast: bool = False,
) -> Paint:
    """Diffusers' side, warm for these jobs: its own pipeline, or where that cannot be imported a loop that does what it
    does."""
    import torch

    with torch.no_grad():
        try:
            paint = pipeline_of(setting, networks, compiled, upcast)
        except (ImportError, RuntimeError, AttributeError, TypeError, ValueError) as error:  # of unlike versions
            part.note(
                "diffusers' inpainting pipeline cannot be used here "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): its UNet, VAE and scheduler run in a "
                "plain loop that does the pipeline's work, without text encoders"
            )
            paint = plain_loop(setting, networks, compiled)
    for fields in jobs.values():
        paint(fields)  # what is counted now, and compiled
    return paint


# ------------------------------------------------------------------------------------------------ models


def state_of(networks: Any, *names: str) -> dict[str, Any]:
    """The weights of loaded torch networks by torch name: the tensors themselves."""
    state: dict[str, Any] = {}
    for name in names:
        state |= networks._made[name].module.network.state_dict()
    return state


def unet_of(setting: Setting, networks: Any, compiled: bool) -> Any:
    """diffusers' UNet over our weights: they are shared, not copied."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs_of(setting)["unet"])
    unet.load_state_dict(state_of(networks, "unet"), assign=True)
    unet.eval().requires_grad_(False)
    if compiled:  # in place: a pipeline asks its UNet for its config
        unet.compile(mode=setting.compile_mode, fullgraph=True, dynamic=False)
    return unet


def vae_of(setting: Setting, networks: Any, upcast: bool = False) -> Any:
    """diffusers' VAE over our weights."""
    import torch
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_config({**configs_of(setting)["vae"], "force_upcast": upcast})
    state = state_of(networks, "vae_encoder", "vae_decoder")
    if upcast:  # the pipeline changes its VAE's weights, not ours
        state = {name: value.clone() for name, value in state.items()}
    vae.load_state_dict(state, assign=True)
    return vae.eval().requires_grad_(False)


def text_encoders_of(setting: Setting, networks: Any) -> dict[str, Any]:
    """transformers' text encoders with our weights."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    found = {}
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        model = kind(CLIPTextConfig(**configs_of(setting)[name])).to(getattr(torch, setting.dtype))
        own, state = set(model.state_dict()), state_of(networks, name)
        if not own & set(state):  # transformers 5 has no prefix
            state = {key.removeprefix("text_model."): value for key, value in state.items()}
        model.load_state_dict({key: value for key, value in state.items() if key in own}, strict=True)
        found[name] = model.to(setting.torch_device).eval().requires_grad_(False)
    return found


# ------------------------------------------------------------------------------------------------ whole pictures


def pipeline_of(setting: Setting, networks: Any, compiled: bool, upcast: bool) -> Paint:
    """diffusers' `StableDiffusionXLInpaintPipeline`, every noise level of it (strength 1)."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLInpaintPipeline
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizers(Path(folder), configs_of(setting))
        tokenizers = {name: CLIPTokenizer.from_pretrained(Path(folder) / name) for name in ("tokenizer", "tokenizer_2")}
    scheduler = EulerDiscreteScheduler.from_config(configs_of(setting)["scheduler"])
    pipeline = StableDiffusionXLInpaintPipeline(
        vae=vae_of(setting, networks, upcast),
        unet=unet_of(setting, networks, compiled),
        **tokenizers,
        **text_encoders_of(setting, networks),
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    image, mask = (Image.fromarray(picture) for picture in sample_picture(setting.side))

    def paint(fields: Mapping[str, Any]) -> object:
        generator = torch.Generator(setting.torch_device).manual_seed(0)
        done = pipeline(
            prompt=PROMPT,
            image=image,
            mask_image=mask,
            height=setting.side,
            width=setting.side,
            strength=1.0,
            num_inference_steps=fields["num_inference_steps"],
            guidance_scale=fields["guidance_scale"],
            generator=generator,
        )
        check_calls(pipeline.num_timesteps, fields)
        return done

    return paint


def plain_loop(setting: Setting, networks: Any, compiled: bool) -> Paint:
    """What the pipeline does, in its order, with the text's embeddings given: two encodes, steps with the background
    put back after each, a decode."""
    import torch
    from diffusers import EulerDiscreteScheduler

    unet, vae = unet_of(setting, networks, compiled), vae_of(setting, networks)
    scheduler = EulerDiscreteScheduler.from_config(configs_of(setting)["scheduler"])
    place = {"device": setting.torch_device, "dtype": getattr(torch, setting.dtype)}
    image, mask = sample_picture(setting.side)
    config, side = unet.config, setting.side // 8
    pooled_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    scale = vae.config.scaling_factor

    def encode_picture(picture: Any) -> Any:
        return scale * vae.encode(picture).latent_dist.sample()

    def paint(fields: Mapping[str, Any]) -> object:
        with torch.no_grad():
            return paint_picture(fields)

    def paint_picture(fields: Mapping[str, Any]) -> Any:
        torch.manual_seed(0)
        rows = 2 if fields["guidance_scale"] > 1 else 1
        text = torch.randn(rows, 77, config.cross_attention_dim, **place)
        pooled = torch.randn(rows, pooled_width, **place)
        ids = torch.tensor([[setting.side, setting.side, 0, 0, setting.side, setting.side]] * rows, **place)
        picture = torch.from_numpy(image).permute(2, 0, 1)[None].to(**place) / 127.5 - 1
        hole = torch.from_numpy(mask)[None, None].to(**place) / 255
        background = encode_picture(picture)
        encode_picture(picture * (hole < 0.5))  # the pipeline makes it for every UNet
        hole = torch.nn.functional.interpolate(hole, size=(side, side))
        scheduler.set_timesteps(fields["num_inference_steps"], device=setting.torch_device)
        noise = torch.randn_like(background)
        latents, calls = noise * scheduler.init_noise_sigma, 0
        for number, step in enumerate(scheduler.timesteps):
            given = scheduler.scale_model_input(torch.cat([latents] * rows), step)
            told = {"text_embeds": pooled, "time_ids": ids}
            eps = unet(given, step, encoder_hidden_states=text, added_cond_kwargs=told, return_dict=False)[0]
            calls += 1
            if rows == 2:
                negative, positive = eps.chunk(2)
                eps = negative + fields["guidance_scale"] * (positive - negative)
            latents = scheduler.step(eps, step, latents, return_dict=False)[0]
            known = background
            if number + 1 < len(scheduler.timesteps):
                known = scheduler.add_noise(background, noise, scheduler.timesteps[number + 1 : number + 2])
            latents = (1 - hole) * known + hole * latents
        check_calls(calls, fields)
        decoded = vae.decode(latents.to(place["dtype"]) / scale, return_dict=False)[0]
        values = (decoded[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).float().cpu().numpy()
        return np.rint(255 * values).astype(np.uint8)

    return paint


def check_calls(calls: int, fields: Mapping[str, Any]) -> None:
    """Both sides must take the same number of steps."""
    if calls != fields["num_inference_steps"]:
        raise ValueError(f"diffusers ran its UNet {calls} times for {fields['num_inference_steps']} steps")
