"""Write the model folder: diffusers' layout, fp16 weights, the Fooocus patch and head; all or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from dreammix_trt.core.keymap import sgm_to_diffusers
from dreammix_trt.trainer.micro.networks import TextEncoders, TrainedHead, build_unet
from dreammix_trt.trainer.micro.patch import Entry, load_patch, make_patch, save_patch

PATCH_FILE, HEAD_FILE, RECORD_FILE = "micro.fooocus.patch", "inpaint_head.pth", "training.json"
State = Mapping[str, torch.Tensor]


def sgm_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """diffusers name -> sgm name (without ``diffusion_model.``) for every tensor of this UNet."""
    names = {ours: theirs.removeprefix("diffusion_model.") for theirs, ours in sgm_to_diffusers(unet.config).items()}
    return {name: names[name] for name in unet.state_dict()}


def write_model(
    out: Path,
    tokenizers: Path,
    vae: AutoencoderKL,
    text: TextEncoders,
    raw: State,
    tuned: State | None,
    head: torch.Tensor,
    native: int,
    record: dict[str, Any],
    extras: tuple[Path, ...] = (),
) -> None:
    """Replace `out` by a complete model folder.

    raw, tuned: UNet states (tuned None: an empty delta); head: (C, 5, 3, 3); tokenizers: folder holding both;
    extras: files copied beside (the classifier). Files of other owners already in `out` (ONNX graphs) are kept.
    """
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    unet = build_unet(native)
    unet.load_state_dict(raw)
    unet.half().save_pretrained(part / "unet")
    raw16 = {name: value.clone() for name, value in unet.state_dict().items()}
    _half_copy(vae, AutoencoderKL.from_config(vae.config)).save_pretrained(part / "vae")
    fresh = TextEncoders(text.one.config.vocab_size, text.one.config.bos_token_id, text.one.config.eos_token_id)
    fresh.load_state_dict(text.state_dict())
    fresh.half()
    _save_encoder(fresh.one, part / "text_encoder")
    _save_encoder(fresh.two, part / "text_encoder_2")
    for folder in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tokenizers / folder, part / folder)
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    ).save_pretrained(part / "scheduler")
    (part / "model_index.json").write_text(json.dumps(_INDEX, indent=2) + "\n")
    save_patch(make_patch(raw16, tuned or raw16, sgm_names(unet)), part / PATCH_FILE)
    torch.save(OrderedDict(head=head.detach().half().contiguous()), part / HEAD_FILE)
    (part / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")
    for extra in extras:
        if extra.exists():
            shutil.copy2(extra, part / extra.name)
    for path in part.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if out.exists():
        for foreign in out.iterdir():
            if not (part / foreign.name).exists():
                (shutil.copytree if foreign.is_dir() else shutil.copy2)(foreign, part / foreign.name)
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        os.replace(out, old)
    os.replace(part, out)
    shutil.rmtree(old, ignore_errors=True)


_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.30.2",
    "feature_extractor": [None, None],
    "force_zeros_for_empty_prompt": False,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _save_encoder(encoder: Any, folder: Path) -> None:
    """As SDXL's files have it: every tensor of the transformer under ``text_model.`` (transformers 5 drops that)."""
    encoder.save_pretrained(folder)
    state = {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": value.contiguous()
        for name, value in encoder.state_dict().items()
        if not name.endswith("position_ids")
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def load_encoder(encoder: Any, folder: Path) -> None:
    """Fill a CLIP text encoder in fp32 from such a folder, whatever prefix this transformers version uses."""
    saved = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    wanted = encoder.state_dict()
    prefixed = any(name.startswith("text_model.") for name in wanted)
    state = {name if prefixed else name.removeprefix("text_model."): value for name, value in saved.items()}
    missing = [name for name in wanted if name not in state and not name.endswith("position_ids")]
    if missing:
        raise KeyError(f"{folder}: lacks {missing[:3]}")
    encoder.load_state_dict(state, strict=False)


def _half_copy(source: torch.nn.Module, target: Any) -> Any:
    target.load_state_dict(source.state_dict())
    return target.half()


def read_head(model_dir: Path) -> TrainedHead:
    """The head in fp32."""
    weight = torch.load(model_dir / HEAD_FILE, weights_only=True)["head"].float()
    head = TrainedHead(weight.shape[0])
    head.load_state_dict({"head": weight})
    return head


def read_patch(model_dir: Path) -> dict[str, Entry]:
    return load_patch(model_dir / PATCH_FILE)
