"""What `vs_diffusers.py` lets run in turns on the CPU: ours, diffusers eager and compiled, optimum-onnx."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from _common import embedded_engine, sample_place
from _sdxl_files import sdxl_configs, write_folder

EAGER, COMPILED, OPTIMUM = "diffusers eager", "diffusers torch.compile", "optimum-onnx"
PLAIN, HALF = "ours float32 (ONNX Runtime)", "ours bfloat16 (OpenVINO)"
PROMPT = "a red striped mug on a table"
Works = dict[str, Callable[[], Any]]
Absent = dict[str, str]


def pictures(opened: ExitStack, threads: int, steps: int, size: int, *, compiled: bool) -> tuple[Works, Absent]:
    """Whole pictures of the embedded model: name -> paint one; and why others are absent."""
    image, mask = sample_place(size)
    fields: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 4.0}
    theirs = {**fields, "height": size, "width": size, "strength": 1.0, "image": image, "mask_image": mask}
    works, absent = Works(), find_absent(compiled)
    eager = make_pipeline(threads)
    works[EAGER] = lambda: eager(prompt=PROMPT, **theirs)
    if compiled:
        import torch

        fast = make_pipeline(threads)
        fast.unet = torch.compile(fast.unet)
        works[COMPILED] = lambda: fast(prompt=PROMPT, **theirs)
    if OPTIMUM not in absent:
        onnx = make_optimum(opened, threads, eager)
        works[OPTIMUM] = lambda: onnx(prompt=PROMPT, **theirs)
    plain = opened.enter_context(embedded_engine(threads))
    works[PLAIN] = lambda: plain.inpaint(image, mask, PROMPT, seed=3, **fields)
    if HALF not in absent:
        half = opened.enter_context(embedded_engine(threads, "openvino", "bfloat16"))
        works[HALF] = lambda: half.inpaint(image, mask, PROMPT, seed=3, **fields)
    return works, absent


def unets(
    opened: ExitStack, threads: int, folder: Path, steps: int, side: int, *, compiled: bool
) -> tuple[Works, Absent]:
    """One call of a UNet of width 0.2 with random weights: name -> call; and why others are absent."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(threads)
    place = write_folder(folder / "base", sdxl_configs(0.2, side=8 * side), dtype="float32")
    network = UNet2DConditionModel.from_pretrained(place / "unet", local_files_only=True).eval()
    sample = _draw_inputs(network.config, side)
    told = {name: torch.from_numpy(array) for name, array in sample.items()}

    def call(module: Any) -> Callable[[], Any]:
        def run() -> Any:
            with torch.inference_mode():
                conditions = {"text_embeds": told["text_embeds"], "time_ids": told["time_ids"]}
                arrays = told["sample"], told["timestep"], told["encoder_hidden_states"]
                return module(*arrays, added_cond_kwargs=conditions, return_dict=False)[0].float().numpy()

        return run

    works, absent = Works({EAGER: call(network)}), find_absent(compiled)
    absent.setdefault(OPTIMUM, "it has no call of a UNet alone with these inputs")
    if compiled:
        works[COMPILED] = call(torch.compile(network))
    works[PLAIN] = _call_ours(opened, threads, folder, place, sample, steps, "onnxruntime", "float32")
    if HALF not in absent:
        works[HALF] = _call_ours(opened, threads, folder, place, sample, steps, "openvino", "bfloat16")
    _check_alike(works)
    return works, absent


def find_absent(compiled: bool) -> Absent:
    """What cannot be measured here, and why."""
    absent = {} if compiled else {COMPILED: "left out (--no-compiled)"}
    if importlib.util.find_spec("optimum") is None or importlib.util.find_spec("optimum.onnxruntime") is None:
        absent[OPTIMUM] = f"not installed; optimum-onnx 0.1 needs transformers < 4.58, here {version('transformers')}"
    if importlib.util.find_spec("openvino") is None:
        absent[HALF] = "openvino is not installed"
    else:
        from dreammix_trt.engine.backends.openvino.compiling import has_bfloat16

        if not has_bfloat16():
            absent[HALF] = "this processor has neither AVX-512 BF16 nor AMX"
    return absent


def make_pipeline(threads: int) -> Any:
    """StableDiffusionXLInpaintPipeline on the embedded model's weights, float32, patched UNet."""
    import diffusers
    import torch
    import transformers
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLInpaintPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from dreammix_trt.core.checkpoint import BaseFiles

    torch.set_num_threads(threads)
    for package in (diffusers, transformers):
        package.logging.set_verbosity_error()
        package.logging.disable_progress_bar()
    base = BaseFiles.open()
    folder = base.folder
    options = {"local_files_only": True, "torch_dtype": torch.float32}
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", **options)
    unet.load_state_dict({name: torch.from_numpy(value) for name, value in base.unet_patched_state().items()})
    pipeline = StableDiffusionXLInpaintPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae", **options),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", **options),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", **options),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_optimum(opened: ExitStack, threads: int, eager: Any) -> Any:
    """The same pipeline exported and run by optimum-onnx."""
    from optimum.onnxruntime import ORTStableDiffusionXLInpaintPipeline

    from dreammix_trt.core.onnx_runtime import import_onnxruntime

    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads
    folder = opened.enter_context(tempfile.TemporaryDirectory())
    eager.save_pretrained(folder)
    pipeline = ORTStableDiffusionXLInpaintPipeline.from_pretrained(folder, export=True, session_options=options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _call_ours(
    opened: ExitStack,
    threads: int,
    folder: Path,
    place: Path,
    sample: dict[str, Any],
    steps: int,
    backend: str,
    precision: str,
) -> Callable[[], Any]:
    """A call of our UNet; the text's keys and values are made in every `steps`-th."""
    from dreammix_trt.building import EngineOptions, build
    from dreammix_trt.engine import DreamMix

    engine = EngineOptions(backend=backend, precision=precision, look=0 if precision == "bfloat16" else None)
    build(base=place, out=folder / backend, engine=engine, store=folder / "store", verify=False)
    dm = opened.enter_context(DreamMix.load(folder / backend, threads=threads, store=folder / "store"))
    calls, attended = count(), dict[str, Any]()
    own = {name: array for name, array in sample.items() if name != "encoder_hidden_states"}

    def run() -> Any:
        if next(calls) % steps == 0:
            attended.update(dm.networks.run("unet_kv", encoder_hidden_states=sample["encoder_hidden_states"]))
        return dm.networks.run("unet", **own, **attended)["eps"]

    return run


def _draw_inputs(config: Any, side: int) -> dict[str, Any]:
    """Inputs of a UNet for two rows; the feature of a head that the base does not have is zero."""
    rng = np.random.default_rng(0)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    shapes = {
        "sample": (2, 4, side, side),
        "encoder_hidden_states": (2, 77, config.cross_attention_dim),
        "text_embeds": (2, pooled),
    }
    drawn: dict[str, Any] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    drawn["timestep"] = np.full(2, 500, np.float32)
    drawn["time_ids"] = np.full((2, 6), 8 * side, np.float32)
    drawn["inpaint_feature"] = np.zeros((1, config.block_out_channels[0], side, side), np.float32)
    return drawn


def _check_alike(works: Works) -> None:
    """Raise AssertionError where a network does not compute what diffusers does.

    Random weights multiply roundings, so bfloat16 may be further off; how its pictures look is checked at a build.
    """
    truth = works[EAGER]()
    for name, work in works.items():
        error = float(np.linalg.norm(work() - truth) / np.linalg.norm(truth))
        assert error < (0.2 if name == HALF else 1e-3), f"{name} is {error:.2g} off"
