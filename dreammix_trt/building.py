"""Build: base checkpoint -> ONNX engine set in the store; LoRA -> subject; both -> engine directory.

The only place that knows the exporter and the engine. A base is exported once per store; after that a subject costs
seconds and needs no torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreammix_trt import __version__
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.files import check_place, sha256_of
from dreammix_trt.core.lora import Lora, read_lora
from dreammix_trt.core.passport import FILE_NAME as PASSPORT
from dreammix_trt.core.store import Store
from dreammix_trt.core.subject import Subject, pack, slots_of, subject_from_lora
from dreammix_trt.engine.build import BACKEND, PRECISION, check_fit, read_networks, write_engine

if TYPE_CHECKING:
    from dreammix_trt.core.passport import Passport

Update = Callable[[str, float, str], None]
_ENGINE_SET = 1  # the layout and meaning of an engine set; part of the key


def build(
    lora: str | Path | None = None,
    *,
    out: str | Path,
    base: str | Path | None = None,
    patch: str | Path | None = None,
    head: str | Path | None = None,
    name: str | None = None,
    merge: bool = False,
    slot_rank: int = 8,
    patch_biases: bool = False,
    store: str | Path | None = None,
    self_contained: bool = False,
    progress: Update | None = None,
) -> Passport:
    """Make the engine directory `out` and return its passport.

    lora: file or folder of the subject; None: a base alone. base: diffusers folder, default the embedded model; patch,
    head: default those beside the base. name: the subject's, default from the LoRA's folder. merge: bake the subject
    into weights of its own. slot_rank: largest LoRA rank that subjects of this base may have. self_contained: copy the
    base's engines into `out`. progress(name, fraction, message) is told of each network.

    Raises FileFormatError, InputError, BuildError; `out` is then as it was.
    """
    update = progress or (lambda *_: None)
    if not 1 <= slot_rank <= 256:
        raise InputError(f"slot_rank is {slot_rank}; allowed: 1 to 256")
    check_place(out, PASSPORT)
    shelf = Store(Path(store) if store else None)
    files = BaseFiles.open(base, patch, head, patch_biases)
    if merge and lora is None:
        raise InputError("merge needs a LoRA to bake in: give --lora, or leave --merge")
    factors = read_lora(lora) if lora is not None else None
    subject = _subject(factors, Path(lora), name) if factors and lora is not None else None
    parts = _key_parts(files, slot_rank, subject if merge else None)
    key = shelf.key(parts)
    networks = shelf.sound(key)
    if networks is None:
        _export(shelf, key, parts, files, slot_rank, factors if merge else None, update)
        networks = shelf.get(key)
    assert networks is not None
    update("base", 1.0, "in the store")
    kept: list[tuple[Subject, str]] = []
    if subject is not None and not merge:
        check_fit(networks, subject)
        kept = [(replace(subject, base_key=key), str(lora))]
    facts = {
        "name": files.folder.name, "native_side": files.native_side, "slot_rank": slot_rank, "files": parts["base"],
        "merged": subject.name if merge and subject else None,
    }  # fmt: skip
    return write_engine(
        Path(out), networks=networks, base_key=key, files=shelf.files(key), base=facts, subjects=kept,
        created_by=f"dreammix-trt {__version__}", self_contained=self_contained,
        command=_command(
            lora=lora, out=out, base=base, patch=patch, head=head, name=name, merge=merge, slot_rank=slot_rank,
            patch_biases=patch_biases, self_contained=self_contained, store=store,
        ),
    )  # fmt: skip


def _subject(lora: Lora, path: Path, name: str | None) -> Subject:
    facts = lora.metadata
    chosen = name or _file_name(path)
    if not re.fullmatch(r"[\w.-]+", chosen) or chosen.startswith("."):
        raise InputError(
            f"--name {chosen!r}: a subject's name has letters, digits, '_', '-' and '.' only, as it names a file"
        )
    return subject_from_lora(
        lora,
        chosen,
        facts.get("token", "sks"),
        facts.get("class_name", ""),
        source_sha256=sha256_of(lora.source_path, verify=True),
    )


def _file_name(path: Path) -> str:
    """A subject's name from its LoRA's place: the folder that says most."""
    parts = [part for part in (path.absolute().parts if path.is_dir() else path.absolute().with_suffix("").parts)]
    dull = {"lora", "out", "output", "pytorch_lora_weights"}
    told = [part for part in reversed(parts) if part.lower() not in dull and not part.startswith("checkpoint-")]
    return re.sub(r"[^\w.-]+", "-", told[0]).strip("-.") or "subject" if told else "subject"


def _key_parts(files: BaseFiles, slot_rank: int, merged: Subject | None) -> dict[str, Any]:
    """Everything that changes the engine set, and nothing else."""
    return {
        "engine_set": _ENGINE_SET,
        "version": __version__,
        "base": files.content_hashes(),
        "patch_biases": files.patch_biases,
        "slot_rank": slot_rank,
        "backend": BACKEND,
        "precision": PRECISION,
        "merged": merged.source_sha256 if merged else None,
    }


def _export(
    shelf: Store, key: str, parts: dict[str, Any], files: BaseFiles, slot_rank: int, merged: Lora | None, update: Update
) -> None:
    """Export the base into the store; graphs are compared with torch where torch is installed."""
    from dreammix_trt.export.onnx_export import export_base

    with shelf.put(key, parts) as folder:
        if folder is None:  # another process has just built it
            return
        export_base(
            files, folder, slot_rank=slot_rank, verify=find_spec("torch") is not None,
            progress=lambda what, done, total: update(what, done / max(1, total), f"{done}/{total}"),
        )  # fmt: skip
        if merged is not None:
            _merge(folder, merged)


def _merge(networks: Path, lora: Lora) -> None:
    """Bake a LoRA into the weight files of an engine set: W + B A in float32, where W lies as the graph wants it."""
    from safetensors.numpy import load_file, save_file

    table = read_networks(networks)
    for name, factors in lora.factors.items():
        entry = table[name]
        pack(factors, slots_of(entry))  # refuses what does not fit, with names and shapes
        weights = load_file(networks / entry["weights"])
        for module, (a, b) in factors.items():
            weight, delta = f"{module}.weight", a @ b
            weights[weight] += delta if entry["initializers"][weight]["transposed"] else delta.T
        save_file(weights, networks / entry["weights"])


def _command(**options: Any) -> str:
    """The command line that makes this engine again."""
    words = ["dreammix-trt", "build"]
    for option, value in options.items():
        if value is None or value is False or (option, value) == ("slot_rank", 8):
            continue
        words.append(f"--{option.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return shlex.join(words)
