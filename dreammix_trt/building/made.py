"""What an engine's passport says of how it was made, and whether the one that is there was made the same way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreammix_trt import __version__
from dreammix_trt.building.calibrated import describe_float8
from dreammix_trt.building.ingredients import Ingredients
from dreammix_trt.building.order import BuildOrder, describe_lora
from dreammix_trt.building.subjects import MadeSubject
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import EngineError
from dreammix_trt.core.passport import Passport
from dreammix_trt.engine.directory import check_engine


def describe_made(order: BuildOrder, ingredients: Ingredients, made: Sequence[MadeSubject]) -> dict[str, Any]:
    """Fields of the passport that are known before anything is built; the precision is not."""
    files, engine = ingredients.base, ingredients.engine
    baked = [*order.base_specs, *order.subject_specs] if order.merge else order.base_specs
    facts = {
        "name": files.name,
        "remarks": list_remarks(files),
        "native_side": files.native_side,
        "slots": order.slots,
        "files": files.hash_contents(),
        **({"asuka": files.asuka.hash_files()} if files.asuka else {}),
        **({"tokens": files.tokens.hash_files()} if files.tokens else {}),
        "head": files.head_padding if files.has_head else None,
        "loras": [describe_lora(spec, "both") for spec in baked],
        "merged": made[0].subject.name if order.merge else None,
        "defaults": ingredients.defaults,
        **describe_float8(ingredients.networks, ingredients.calibration),
    }
    return {
        "created_by": f"dreammix-trt {__version__}",
        "base_key": ingredients.base_key,
        "base": facts,
        "backend": engine.backend,
        "backend_version": engine.version,
        "targets": list(engine.gpus),
        "command": order.command(ingredients.defaults),
    }


def find_same(order: BuildOrder, ingredients: Ingredients, made: Sequence[MadeSubject]) -> Passport | None:
    """The passport of the engine in the order's place.

    None where there is none, something of it is missing, or another order or other files made it.
    """
    try:
        there = check_engine(order.place, store=Path(order.store) if order.store else None)
    except EngineError:
        return None
    told, wanted = there.to_dict(), json.loads(json.dumps(describe_made(order, ingredients, made)))
    subjects = [
        [each.name, each.token, each.class_name, each.source, each.source_sha256, each.attributes]
        for each in there.subjects
    ]
    same = all(told[name] == value for name, value in wanted.items())
    return there if same and subjects == [_describe(each) for each in made] else None


def list_remarks(files: BaseFiles) -> list[str]:
    """What is odd about a base."""
    asuka = files.asuka.find_doubts(files.hash_contents) if files.asuka else []
    tokens = files.tokens.find_doubts(files.hash_contents) if files.tokens else []
    return [*files.remarks, *asuka, *tokens]


def _describe(made: MadeSubject) -> list[Any]:
    subject = made.subject
    attributes = {kind: list(values) for kind, values in subject.attributes.items()}
    return [subject.name, subject.token, subject.class_name, made.sources, subject.source_sha256, attributes]
