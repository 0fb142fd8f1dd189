"""Engine directories: written from parts in the store and subjects, opened and checked for the runtime.

engine/
  passport.json              what it was made from, hashes of everything
  subjects/NAME.safetensors  factors of each subject
  token_adapter.safetensors  what the base learnt to draw subjects from one picture, if it has that
  networks/PART/             the base's parts, when self-contained; else they are in the store
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dreammix_trt.core.attention_layers import KEY, VALUE
from dreammix_trt.core.errors import EngineError
from dreammix_trt.core.files import atomic_directory, read_json, sha256_of
from dreammix_trt.core.passport import FILE_NAME, SCHEMA, NetworkEntry, Passport, SubjectEntry
from dreammix_trt.core.slots import names_of_weights, slots_of
from dreammix_trt.core.store import Store, check_files
from dreammix_trt.core.subject import Subject, write_subject
from dreammix_trt.core.token_adapter import FILE_NAME as TOKEN_ADAPTER
from dreammix_trt.engine.backends.onnxruntime.engine_set import read_network

BACKENDS = ("onnxruntime", "openvino", "tensorrt-rtx", "tensorrt")
#: in every part: the cost of making it; it does not count in comparing parts
COST = "cost.json"
_PACKAGES = (
    "dreammix-trt",
    "numpy",
    "onnxruntime",
    "openvino",
    "safetensors",
    "tokenizers",
    "tensorrt-rtx",
    "tensorrt",
)


@dataclass(frozen=True)
class OpenedEngine:
    """A checked engine directory.

    parts: part name -> its folder.
    subjects: the subjects' files.
    adapter: the file of the token adapter; None: the base has none.
    """

    passport: Passport
    parts: dict[str, Path]
    subjects: tuple[Path, ...]
    adapter: Path | None = None


def open_engine(path: Path, *, verify: bool = False, store: Path | None = None) -> OpenedEngine:
    """Check an engine directory and find its parts.

    verify: read every file again; else hashes of large unchanged files are remembered.
    store: the store's folder; None: the default one.

    Raises EngineError with the file and the command that rebuilds.
    """
    passport = Passport.read(path)
    remedy = f"build it again: `{passport.command}`"
    own = {entry.file: entry.sha256 for entry in passport.subjects} | passport.base.get("tokens", {})
    check_files(path, own, verify=verify, remedy=remedy)
    if passport.backend not in BACKENDS:
        raise EngineError(
            f"{path} was built for {passport.backend!r}, this version runs {', '.join(BACKENDS)}; {remedy}"
        )
    shelf = Store(store)
    parts = _find_parts(path, passport, shelf, remedy)
    for name, folder in parts.items():
        files = _files_of(path, passport, name, folder, shelf)
        check_files(folder, files, verify=verify, remedy=remedy)
    if passport.networks_at == "store":
        shelf.register(path.resolve(), set(passport.parts.values()))
    adapter = path / TOKEN_ADAPTER if "tokens" in passport.base else None
    return OpenedEngine(passport, parts, tuple(path / entry.file for entry in passport.subjects), adapter)


def check_runnable(path: Path, opened: OpenedEngine, device: str, *, verify: bool = False) -> None:
    """Raise EngineError when an engine cannot run on a device.

    device: "cpu", "cuda", or OpenVINO's name of one.
    verify: look for host code again, where it is remembered that there was none.

    Plans do not run on "cpu", nor when they were built for another GPU, version or platform. Plans with code for the
    host are refused.
    """
    passport = opened.passport
    if passport.backend == "openvino" and device == "cuda":
        raise EngineError(
            f"{path} is for OpenVINO, which does not run on NVIDIA's GPUs; leave device='cuda' (`--device cuda`), or "
            "build one for it with `--target`"
        )
    if passport.backend != "openvino" and device not in ("cpu", "cuda"):
        raise EngineError(
            f"{path} is for {passport.backend}, and device {device!r} is OpenVINO's; build with `--backend openvino`"
        )
    if passport.backend in ("onnxruntime", "openvino"):
        return
    from dreammix_trt.engine.backends.tensorrt.plans import refuse_host_code
    from dreammix_trt.engine.machine import examine, explain_mismatch

    for entry in passport.networks:
        refuse_host_code(opened.parts[entry.name] / entry.file, verify=verify)
    built_for = {
        "backend": passport.backend,
        "version": passport.backend_version,
        "targets": passport.targets,
        "platform": passport.platform,
        "command": passport.command,
    }
    why = explain_mismatch(built_for, examine())
    if why:
        raise EngineError(f"{path}: {why}")
    if device == "cpu":
        raise EngineError(
            f"{path} holds {passport.backend} engines, which run on a GPU: load it with device='cuda' "
            "(`--device cuda`), or build one for the CPU with `--backend onnxruntime`"
        )


def check_engine(path: Path, *, verify: bool = False, store: Path | None = None) -> Passport:
    """The passport of an engine directory. Raises EngineError unless every file is as it was built."""
    return open_engine(path, verify=verify, store=store).passport


def write_engine(
    out: Path,
    *,
    parts: Mapping[str, Path],
    keys: Mapping[str, str],
    files: Mapping[str, str],
    subjects: Sequence[tuple[Subject, str]],
    adapter: Path | None = None,
    self_contained: bool = False,
    **facts: Any,
) -> Passport:
    """Write an engine directory, atomically.

    parts: name -> each part's folder.
    keys: name -> each part's key in the store.
    files: "PART/FILE" -> hash.
    subjects: each with the path of its LoRA.
    adapter: the token adapter's file, which is copied; None: the base has none.
    self_contained: whether the directory has copies of the parts.
    facts: the passport's other fields.

    Returns its passport.
    """
    networks = [(name, read_network(folder)) for name, folder in parts.items() if name != "base"]
    passport = Passport(
        schema=SCHEMA,
        platform=f"{platform.system()} {platform.machine()}",
        parts=dict(keys),
        files=dict(files),
        networks_at="networks" if self_contained else "store",
        versions=_find_versions(),
        networks=tuple(_make_entry(name, entry, parts[name]) for name, entry in networks),
        subjects=(),
        **facts,
    )
    with atomic_directory(out, marker=FILE_NAME) as folder:
        (folder / "subjects").mkdir()
        entries = tuple(_write(folder, subject, source) for subject, source in subjects)
        if adapter is not None:
            shutil.copyfile(adapter, folder / TOKEN_ADAPTER)
        if self_contained:
            for name, part in parts.items():
                shutil.copytree(part, folder / "networks" / name, ignore=shutil.ignore_patterns("manifest.json"))
        passport = replace(passport, subjects=entries)
        passport.write(folder)
    return passport


def _files_of(path: Path, passport: Passport, name: str, folder: Path, shelf: Store) -> dict[str, str]:
    """A part's files and hashes, from the store's own record, or for a self-contained engine from the passport.

    A part that was built again under its key serves every engine that names the key, whatever its bytes are.
    """
    if passport.networks_at == "store":
        return {file: digest for file, digest in shelf.files(passport.parts[name]).items() if file != COST}
    files = {file.partition("/")[2]: digest for file, digest in passport.files.items() if file.startswith(f"{name}/")}
    unknown = [file.name for file in folder.iterdir() if file.is_file() and file.name not in {*files, COST}]
    if unknown or not files:
        raise EngineError(
            f"{folder}: {', '.join(unknown) or 'the part'} is not in the passport of {path}; "
            f"build it again: `{passport.command}`"
        )
    return files


def _find_parts(path: Path, passport: Passport, store: Store, remedy: str) -> dict[str, Path]:
    """The folder of every part. Raises EngineError for a part that the store lacks."""
    if passport.networks_at != "store":
        return {name: path / passport.networks_at / name for name in passport.parts}
    found = {name: store.get(key) for name, key in passport.parts.items()}
    for name, folder in found.items():
        if folder is None:
            raise EngineError(
                f"{path} needs {name} ({passport.parts[name][:12]}), which the store {store.root} lacks; {remedy}, "
                "or ship engines built with --self-contained"
            )
    return {name: folder for name, folder in found.items() if folder is not None}


def _write(folder: Path, subject: Subject, source: str) -> SubjectEntry:
    file = folder / "subjects" / f"{subject.name}.safetensors"
    write_subject(file, subject)
    return SubjectEntry(
        name=subject.name,
        token=subject.token,
        class_name=subject.class_name,
        target="" if subject.kind == "tokens" else subject.target,
        kind=subject.kind,
        file=file.relative_to(folder).as_posix(),
        sha256=sha256_of(file, verify=True),
        bytes=file.stat().st_size,
        source=source,
        source_sha256=subject.source_sha256,
        attributes={kind: list(values) for kind, values in subject.attributes.items()},
    )


def _make_entry(name: str, entry: Mapping[str, Any], folder: Path) -> NetworkEntry:
    weights = set(names_of_weights(slots_of(entry)))
    cost = {"export": read_json(folder / COST)} if (folder / COST).is_file() else {}
    return NetworkEntry(
        name=name,
        file=entry.get("engine") or entry["graph"],
        inputs={
            spec["name"]: list(spec["shape"])
            for spec in entry["inputs"]
            # there are hundreds: the slots list weights, and the UNet's twin for the text makes keys and values
            if spec["name"] not in weights and not spec["name"].endswith((KEY, VALUE))
        },
        slots=len(entry.get("slots", ())),
        parity=dict(entry.get("parity", {})),
        build=dict(entry.get("build", cost)),
    )


def _find_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
