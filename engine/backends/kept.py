"""What a back end made of a part for this machine, kept in the store, so that the next start finds it.

A store that fills up or cannot be written costs time alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dreammix_trt.core.files import sha256_of
from dreammix_trt.core.store import Store
from dreammix_trt.engine.hardware import name_processor, read_processor_features

log = logging.getLogger(__name__)
Made = TypeVar("Made")


def list_facts(
    name: str, folder: Path, entry: Mapping[str, Any], sides: Mapping[str, int], **maker: object
) -> dict[str, Any]:
    """What decides what is made of a part; the key of what is kept.

    name: of the network.
    folder: the part.
    entry: its `network.json`.
    sides: of all named axes; {}: any.
    maker: who makes it, and how: version, settings.
    """
    files = {file: sha256_of(folder / file) for file in (entry["graph"], entry.get("weights")) if file}
    processor = [name_processor(), *read_processor_features()]
    return {"kind": "session", "part": name, "files": files, "sides": dict(sides), "processor": processor, **maker}


def take_or_make(
    shelf: Store, facts: Mapping[str, Any], take: Callable[[Path], Made], make: Callable[[Path | None], Made]
) -> Made:
    """Take what is kept, or make it and keep it.

    shelf: where it is kept.
    facts: of `list_facts`.
    take: folder -> what is kept there. What it cannot take is made anew and replaced.
    make: folder, or None -> the same, newly made, and written to the folder where there is one.

    Raises what `make` raises without a folder.
    """
    key, name = shelf.key(facts), facts["part"]
    kept = shelf.get_sound(key)
    if kept is not None:
        try:
            return take(kept)
        except Exception as error:  # back ends have classes of their own
            log.warning("%s: cannot be used (%s); %s is made again", kept, error, name)
    made = None
    try:
        if kept is not None:
            shelf.remove(key)
        with shelf.put(key, facts) as place:
            if place is not None:  # else another process has just kept it
                made = make(place)
    except Exception as error:  # a full disk, which back ends may meet first; a device that exports nothing
        log.debug("%s: what was made of it is not kept (%s)", name, error)
    return make(None) if made is None else made
