"""The trainer of token adapters on a tiny random base, in a second: what its tests share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.subject_tokens import TokenConfig
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.processes import Processes
from dreammix_trt.trainer.tokens.encoding import ObjectEncoder
from dreammix_trt.trainer.tokens.objects import FolderObjects
from dreammix_trt.trainer.tokens.recipes import SMALL, TokenRecipe
from dreammix_trt.trainer.tokens.shelf import Shelf
from dreammix_trt.trainer.tokens.training import TokensTrained, train_tokens
from tests.support.training import write_photographs, write_regular


def tiny_recipe(**fields: Any) -> TokenRecipe:
    """Three steps of two rows, a checkpoint after the second."""
    small = {
        "steps": 3,
        "batch": 2,
        "rank": 2,
        "objects": 2,
        "views": 2,
        "warmup": 1,
        "checkpoint_every": 2,
        "words": 0.0,
    }
    return replace(SMALL, **small | fields)


def write_objects(folder: Path) -> Path:
    """A mug with two photographs, one of them captioned, and two regular mugs of one picture each."""
    write_photographs(folder / "mug" / "mine")
    (folder / "mug" / "mine" / "image" / "00.txt").write_text("a photo of a\nred mug \n")
    write_regular(folder / "regular_mug")
    return folder


def fill_shelf(base: BaseFiles, objects: Path, folder: Path, **fields: Any) -> Shelf:
    """A shelf of what `write_objects` wrote, encoded."""
    shelf = Shelf(folder, FolderObjects(objects), tiny_recipe(**fields), 0)
    shelf.fill(lambda: open_encoder(base), Processes(), lambda _: None)
    return shelf


def open_encoder(base: BaseFiles) -> ObjectEncoder:
    """Of a base, on the CPU."""
    return ObjectEncoder(base, TokenConfig.of_base(base.configs), Hardware())


def train(out: Path, base: BaseFiles, objects: Path | None, **fields: Any) -> TokensTrained:
    """`tiny_recipe` on one thread, unless `fields` say otherwise."""
    given = {"recipe": tiny_recipe(), "threads": 1} | fields
    return train_tokens(out, objects, base=base, **given)
