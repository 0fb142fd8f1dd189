"""The embedded micro-SDXL: its procedural world and the recipe that makes its weights from nothing.

``world``, ``captions`` and ``judge`` are numpy only; the rest imports torch, diffusers and transformers. Run the whole
recipe with ``python -m dreammix_trt.trainer.micro --out DIR``.
"""
