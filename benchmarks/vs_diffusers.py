"""How much faster is a whole picture than with diffusers' own SDXL inpainting pipeline?

Same weights (the patched UNet of the embedded model), same size, steps, guidance and threads, both on the CPU, eager
diffusers against the engine, alternating in one run; medians of at least five. Ours does more work for a picture (two
stages, five VAE encodes, TAS when asked); diffusers gets no such handicap.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import Benchmark, embedded_engine, median_seconds, sample_place


def diffusers_pipeline(threads: int) -> Any:
    """StableDiffusionXLInpaintPipeline on the embedded model's weights, fp32, patched UNet."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLInpaintPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from dreammix_trt.core.checkpoint import BaseFiles

    torch.set_num_threads(threads)
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


def main() -> int:
    """Print the two medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    image, mask = sample_place(given.size)
    prompt = "a red striped mug on a table"
    pipeline = diffusers_pipeline(given.threads)

    def theirs() -> None:
        pipeline(
            prompt=prompt,
            image=image,
            mask_image=mask,
            height=given.size,
            width=given.size,
            strength=0.9999,
            num_inference_steps=given.steps,
            guidance_scale=4.0,
        )

    with embedded_engine(given.threads) as dm:

        def ours() -> None:
            dm.inpaint(image, mask, prompt, num_inference_steps=given.steps, seed=3)

        seconds = median_seconds({"diffusers": theirs, "dreammix-trt": ours}, repeats=max(5, given.repeats))
    bench = Benchmark("vs_diffusers", threads=given.threads)
    bench.add(f"diffusers eager, {given.steps} steps, {given.size}x{given.size} [s]", seconds["diffusers"])
    bench.add(f"dreammix-trt, two stages, {given.steps} steps [s]", seconds["dreammix-trt"])
    bench.add("speed-up", seconds["diffusers"] / seconds["dreammix-trt"], bound=">= 3")
    return bench.finish(as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
