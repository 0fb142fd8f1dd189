"""The passport of an engine directory: what it was made from, and where its base is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

from dreammix_trt.core.errors import DreamMixError, EngineError
from dreammix_trt.core.files import read_json, write_json

SCHEMA = 3  # 2 has subjects' factors as inputs, in slots of a rank
FILE_NAME = "passport.json"
PLACES: Final = ("store", "networks")
_HEADS = {"replicate": "Fooocus' patch and head", "zeros": "a UNet of nine channels", "None": "no patch, no head"}
Rows = list[tuple[str, ...]]
_T = TypeVar("_T")


@dataclass(frozen=True)
class SubjectEntry:
    """One subject in the engine.

    target: the UNet weights that it changes; "": none.
    file: its path below the engine directory.
    sha256, bytes: hash and size of the file.
    source, source_sha256: the LoRA that it was made from, and its hash.
    attributes: what is seen of it, kind -> values; {}: nobody knows.
    kind: "lora", "tokens" or "lora+tokens".
    """

    name: str
    token: str
    class_name: str
    target: str
    file: str
    sha256: str
    bytes: int
    source: str
    source_sha256: str
    attributes: dict[str, list[str]] = field(default_factory=dict)
    kind: str = "lora"


@dataclass(frozen=True)
class NetworkEntry:
    """One network of the base.

    file: ONNX, or a plan.
    inputs: input name -> sides, each a number or the name of an axis.
    slots: the number of LoRA slots.
    parity: how well it agreed with torch.
    build: how a plan was built; empty for ONNX.
    """

    name: str
    file: str
    inputs: dict[str, list[int | str]]
    slots: int
    parity: dict[str, Any]
    build: dict[str, Any]


@dataclass(frozen=True)
class Passport:
    """Everything that `inspect` prints and `load` checks.

    backend, backend_version: the library that runs it.
    targets: the GPUs that its plans are for ("sm_89").
    base_key: names the weights and slots, independent of the back end.
    parts: part -> its key in the store.
    networks_at: "store", or the directory below this one that has the parts ("networks").
    base: name, hashes of the source files, native side, whether it has slots, LoRAs in the weights.
    versions: of the packages that made it.
    files: "PART/FILE" -> hash.
    command: builds it again.
    """

    schema: int
    created_by: str
    backend: str
    backend_version: str
    targets: list[str]
    precision: str
    platform: str
    base_key: str
    parts: dict[str, str]
    networks_at: str
    base: dict[str, Any]
    versions: dict[str, str]
    networks: tuple[NetworkEntry, ...]
    subjects: tuple[SubjectEntry, ...]
    files: dict[str, str]
    command: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def write(self, folder: Path) -> None:
        """Write `passport.json`."""
        write_json(folder / FILE_NAME, self.to_dict())

    @classmethod
    def read(cls, folder: str | Path) -> Passport:
        """Read and check `passport.json` of an engine directory.

        Raises EngineError that says what is wrong and how to build it again.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise EngineError(_explain_absence(Path(folder)))
        try:
            record = read_json(path)
        except DreamMixError as error:
            raise EngineError(f"{error}; build it again: `dreammix-trt build --out {folder}`") from error
        schema = record.get("schema")
        if schema != SCHEMA:
            newer = isinstance(schema, int) and schema > SCHEMA
            what = "upgrade dreammix-trt, or build" if newer else "build"
            command = str(record.get("command") or f"dreammix-trt build --out {folder}")
            command = re.sub(r" --slot-rank 0(?!\d)", " --no-slots", command)  # what schema 2 called it
            command = re.sub(r" --slot-rank \d+", "", command)
            raise EngineError(
                f"{path} has schema {schema!r}, this version reads {SCHEMA}; {what} it again: `{command}`"
            )
        try:
            return cls._of(record)
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"{path} is damaged ({error}); build it again: `dreammix-trt build --out {folder}`"
            ) from error

    @classmethod
    def _of(cls, record: Mapping[str, Any]) -> Passport:
        lists = {"networks": NetworkEntry, "subjects": SubjectEntry}
        plain = {name: value for name, value in record.items() if name not in lists}
        entries: dict[str, tuple[Any, ...]] = {
            name: tuple(_build_typed(kind, _fill_in(kind, entry)) for entry in record[name])
            for name, kind in lists.items()
        }
        passport = _build_typed(cls, {**plain, **entries})
        if passport.networks_at not in PLACES:
            raise ValueError(f"networks_at is {passport.networks_at!r}, expected one of {', '.join(PLACES)}")
        if not isinstance(passport.base.get("files", {}), dict):
            raise TypeError(f"base.files is {passport.base['files']!r}, not of type dict")
        if not _is_hashes(passport.base.get("tokens", {})):
            raise TypeError(f"base.tokens is {passport.base['tokens']!r}, not a hash by name")
        if not isinstance(passport.base.get("defaults", {}), dict):
            raise TypeError(f"base.defaults is {passport.base['defaults']!r}, not of type dict")
        for name in ("loras", "remarks"):
            if not all(isinstance(each, str) for each in passport.base.get(name, [])):
                raise TypeError(f"base.{name} is {passport.base[name]!r}, not a list of texts")
        if passport.parts.keys() != {"base", *(entry.name for entry in passport.networks)}:
            raise ValueError(f"its parts are {', '.join(passport.parts)}, its networks others")
        for name, key in passport.parts.items():
            if not re.fullmatch(r"\w+", name) or not re.fullmatch(r"[0-9a-f]{64}", key):
                raise ValueError(f"part {name!r} with the key {key!r}")
        for entry in passport.networks:
            if Path(entry.file).name != entry.file:
                raise ValueError(f"{entry.file!r} lies outside its part")
            if not all(isinstance(shape, list) for shape in entry.inputs.values()):
                raise TypeError(f"the inputs of {entry.name} are {entry.inputs!r}, not lists of sides")
        for subject in passport.subjects:
            if not all(isinstance(each, list) and all(map(_is_text, each)) for each in subject.attributes.values()):
                raise TypeError(f"the attributes of {subject.name} are {subject.attributes!r}, not lists of words")
        for file in (*passport.files, *(entry.file for entry in passport.subjects)):
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise ValueError(f"{file!r} lies outside the directory")
        return passport

    def describe(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        """Tables of short texts for a person to read, each with its title."""
        base = self.base
        facts: Rows = [
            ("made by", self.created_by),
            ("back end", f"{self.backend} {self.backend_version}, {self.precision}, {self.platform}"),
            *([("GPUs", ", ".join(self.targets))] if self.targets else []),
            ("base", f"{base.get('name')}, native {base.get('native_side')}x{base.get('native_side')}"),
            (
                "base engine",
                f"{self.base_key[:16]} in the {'store' if self.networks_at == 'store' else 'directory itself'}",
            ),
            ("inpainting", _HEADS.get(str(base.get("head", "")), "unknown")),
            *(("remark", str(text)) for text in base.get("remarks", ())),
            ("LoRA slots", "none: no subject can be added" if base.get("slots") is False else "of any rank"),
            *(("token adapter", digest[:12]) for digest in base.get("tokens", {}).values()),
            *(("FP8", text) for text in _describe_float8(base.get("float8"))),
            ("LoRAs in the weights", ", ".join(base.get("loras", ())) or "none"),
            ("request defaults", ", ".join(f"{k} {v}" for k, v in base.get("defaults", {}).items()) or "the usual"),
            ("built with", self.command),
        ]
        subjects: Rows = [
            (
                entry.name,
                f'"a {f"{entry.token} {entry.class_name}".strip()}"',
                "in the weights" if base.get("merged") == entry.name else _describe_parts(entry),
                entry.source,
                "; ".join(f"{kind}: {', '.join(values)}" for kind, values in entry.attributes.items()),
            )
            for entry in self.subjects
        ] or [("none",)]
        networks: Rows = [
            (
                entry.name,
                ", ".join(f"{name} {'x'.join(str(side) for side in shape)}" for name, shape in entry.inputs.items()),
                f"{entry.slots} LoRA slots" if entry.slots else "",
                _describe_parity(entry.parity),
                _describe_build(entry.build),
            )
            for entry in self.networks
        ]
        sources: Rows = [(name, str(digest)[:16]) for name, digest in base.get("files", {}).items()]
        versions: Rows = list(self.versions.items())
        return [
            ("Engine", facts),
            ("Subjects", subjects),
            ("Networks", networks),
            ("Made from", sources),
            ("Versions", versions),
        ]


def _describe_parts(entry: SubjectEntry) -> str:
    size = f"{entry.bytes / 1024:.0f} KiB"
    return size if entry.kind == "lora" else f"{entry.kind}, {size}"


def _describe_parity(record: Mapping[str, Any]) -> str:
    error, when = record.get("max_rel"), record.get("checked", "")
    return (
        f"against torch, {when}: {error:.1e} of the maximum" if isinstance(error, float) else "not compared with torch"
    )


def _describe_float8(record: Any) -> list[str]:
    """A line for the UNets whose layers compute in E4M3; none where none do."""
    try:
        said = [
            f"{name}: {found['layers']} layers in E4M3, {len(found['kept_in_float16'])} kept in float16"
            for name, found in record["unets"].items()
        ]
        return [f"{'; '.join(said)} (calibrated with {record['requests']} requests)"] if said else []
    except (KeyError, TypeError, AttributeError):
        return []


def _describe_build(record: Mapping[str, Any]) -> str:
    """Say what the export and the plan of a network took."""
    export, said = record.get("export"), []
    if isinstance(export, dict):
        said.append(f"exported in {_describe_cost(export)}")
    if isinstance(record.get("engine_bytes"), int):
        said.append(f"{record['engine_bytes'] / (1 << 20):.0f} MiB, built in {_describe_cost(record)}")
    totals = [str(counts["total"]) for counts in record.get("kernels") or () if "total" in counts]
    if totals:
        said.append(f"{' or '.join(dict.fromkeys(totals))} kernels a call")
    return "; ".join(said)


def _describe_cost(record: Mapping[str, Any]) -> str:
    seconds, peak = record.get("seconds"), record.get("peak_anonymous")
    memory = f" with {peak / (1 << 30):.1f} GiB" if isinstance(peak, int) else ""
    return f"{seconds:.0f} s{memory}" if isinstance(seconds, int | float) else "unknown time"


def _is_hashes(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _fill_in(kind: type, record: Any) -> Any:
    """A record with the attributes that passports of this schema have not had from its beginning."""
    return (
        {"attributes": {}, "kind": "lora", **record} if kind is SubjectEntry and isinstance(record, Mapping) else record
    )


def _build_typed(kind: type[_T], record: Mapping[str, Any]) -> _T:
    """Make a dataclass from plain JSON values. Raises TypeError when a field is not of its annotated type."""
    hints = get_type_hints(kind)
    if not isinstance(record, Mapping) or record.keys() != hints.keys():
        raise TypeError(f"a {kind.__name__} has the fields {', '.join(hints)}")
    for name, hint in hints.items():
        wanted = get_origin(hint) or hint
        if not isinstance(record[name], wanted) or isinstance(record[name], bool):
            raise TypeError(f"{name} is {record[name]!r}, not of type {wanted.__name__}")
        inner = get_args(hint)
        if wanted is dict and inner[1] is str and not all(isinstance(value, str) for value in record[name].values()):
            raise TypeError(f"{name} holds something other than text")
    return kind(**record)


#: what lies in a folder that is no engine -> what the folder is; the first match applies
_OTHER_FOLDERS = {
    f"*/{FILE_NAME}": "it holds engines, name one: {found}",
    "pytorch_lora_weights.safetensors": "it is a LoRA: `dreammix-trt build --lora {folder} --out ENGINE`",
    "model_index.json": "it is a base: `dreammix-trt build --base {folder} --out ENGINE`",
    "unet/config.json": "it is a base: `dreammix-trt build --base {folder} --out ENGINE`",
    "users/*.json": "it is a store: `dreammix-trt store list --store {folder}`",
    "image/*": "it looks like photographs: `dreammix-trt train {folder} --class-name WORD --out LORA`",
}


def _explain_absence(folder: Path) -> str:
    """Why a path without a passport is no engine directory, what it is instead, and what an engine looks like."""
    place = folder.absolute()
    start = f"{folder} is not an engine directory"
    if not place.exists():
        return f"{start}: it does not exist; make one with `dreammix-trt build --out {folder}`"
    around = next((parent for parent in place.resolve().parents if (parent / FILE_NAME).is_file()), None)
    if around is not None:
        return f"{start} but in one; name {around}"
    looks = f"an engine directory has {FILE_NAME} and subjects/, and `dreammix-trt build --out ENGINE` makes it"
    if place.is_file():
        return f"{start} but a file; {looks}"
    for pattern, remark in _OTHER_FOLDERS.items():
        found = ", ".join(str(folder / path.parent.name) for path in sorted(place.glob(pattern))[:5])
        if found:
            return f"{start}: {remark.format(folder=folder, found=found)}; {looks}"
    return f"{start}: it has no {FILE_NAME}; {looks}"
