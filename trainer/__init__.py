"""Photographs to LoRA, and the recipe of the embedded micro-SDXL."""
