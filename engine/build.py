"""Engine directories: written from an engine set in the store and subjects, opened and checked for the runtime.

engine/
  passport.json              what it was made from, hashes of everything
  subjects/NAME.safetensors  factors of each subject
  networks/                  the base's engine set, when self-contained; else it lies in the store
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dreammix_trt.core.errors import EngineError
from dreammix_trt.core.files import atomic_directory, read_json, sha256_of
from dreammix_trt.core.passport import FILE_NAME, SCHEMA, NetworkEntry, Passport, SubjectEntry
from dreammix_trt.core.store import Store, check_files
from dreammix_trt.core.subject import Subject, pack, slots_of, write_subject

BACKEND, PRECISION = "onnxruntime", "float32"
_PACKAGES = ("dreammix-trt", "numpy", "onnxruntime", "safetensors", "tokenizers")


@dataclass(frozen=True)
class OpenedEngine:
    """A checked engine directory: its passport, the folder of the base's networks, the subjects' files."""

    passport: Passport
    networks: Path
    subjects: tuple[Path, ...]


def open_engine(path: Path, *, verify: bool = False, store: Path | None = None) -> OpenedEngine:
    """Check an engine directory and find its parts.

    verify: hash every file again; else hashes of large unchanged files are remembered. Raises EngineError naming the
    file and the command that rebuilds.
    """
    passport = Passport.read(path)
    remedy = f"build it again: `{passport.command}`"
    check_files(path, {entry.file: entry.sha256 for entry in passport.subjects}, verify=verify, remedy=remedy)
    if passport.backend != BACKEND:
        raise EngineError(f"{path} was built for {passport.backend!r}, this version runs {BACKEND!r}; {remedy}")
    if passport.networks_at == "store":
        found = Store(store).get(passport.base_key)
        if found is None:
            raise EngineError(
                f"{path} needs the base engine {passport.base_key[:12]}, which {Store(store).root} lacks; {remedy}, "
                "or ship engines built with --self-contained"
            )
        networks = found
    else:
        networks = path / passport.networks_at
    check_files(networks, passport.files, verify=verify, remedy=remedy)
    return OpenedEngine(passport, networks, tuple(path / entry.file for entry in passport.subjects))


def check_engine(path: Path, *, verify: bool = False, store: Path | None = None) -> Passport:
    """The passport of an engine directory all of whose files are as built; EngineError otherwise."""
    return open_engine(path, verify=verify, store=store).passport


def read_networks(networks: Path) -> dict[str, dict[str, Any]]:
    """The table `networks.json` of an engine set: network name -> its files, tensors, slots and parity figures."""
    return dict(read_json(networks / "networks.json")["networks"])


def check_fit(networks: Path, subject: Subject) -> None:
    """Raise FileFormatError (names and shapes listed) for a subject that does not fit the base's slots."""
    table = read_networks(networks)
    for name in subject.factors:
        pack(subject.factors[name], slots_of(table[name]))


def write_engine(
    out: Path,
    *,
    networks: Path,
    base_key: str,
    files: Mapping[str, str],
    base: Mapping[str, Any],
    subjects: Sequence[tuple[Subject, str]],
    created_by: str,
    command: str,
    self_contained: bool = False,
) -> Passport:
    """Write an engine directory, atomically, and return its passport.

    networks: folder of the base's engine set; files: its files' hashes; base: what the passport says of the base;
    subjects: each with the path of the LoRA it came from; command: what makes this engine again.
    """
    table = read_networks(networks)
    passport = Passport(
        schema=SCHEMA, created_by=created_by, backend=BACKEND, precision=PRECISION,
        platform=f"{platform.system()} {platform.machine()}", base_key=base_key,
        networks_at="networks" if self_contained else "store", base=dict(base), versions=_versions(),
        networks=tuple(_entry(name, entry) for name, entry in table.items()), subjects=(), files=dict(files),
        command=command,
    )  # fmt: skip
    with atomic_directory(out, marker=FILE_NAME) as folder:
        (folder / "subjects").mkdir()
        entries = tuple(_write(folder, subject, source) for subject, source in subjects)
        if self_contained:
            shutil.copytree(networks, folder / "networks", ignore=shutil.ignore_patterns("manifest.json"))
        passport = replace(passport, subjects=entries)
        passport.write(folder)
    return passport


def _write(folder: Path, subject: Subject, source: str) -> SubjectEntry:
    file = folder / "subjects" / f"{subject.name}.safetensors"
    write_subject(file, subject)
    return SubjectEntry(
        name=subject.name, token=subject.token, class_name=subject.class_name, target=subject.target,
        file=file.relative_to(folder).as_posix(), sha256=sha256_of(file, verify=True), bytes=file.stat().st_size,
        source=source, source_sha256=subject.source_sha256,
    )  # fmt: skip


def _entry(name: str, entry: Mapping[str, Any]) -> NetworkEntry:
    return NetworkEntry(
        name=name, graph=entry["graph"], weights=entry["weights"],
        inputs={spec["name"]: list(spec["shape"]) for spec in entry["inputs"]}, slots=len(entry.get("slots", ())),
        parity=dict(entry.get("parity", {})),
    )  # fmt: skip


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
