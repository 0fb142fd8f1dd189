"""`dreammix-trt store`: what is in the store, whether it is sound, and removing what no engine needs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dreammix_trt.core.errors import DreamMixError, InputError
from dreammix_trt.core.files import size_text
from dreammix_trt.core.store import Entry, Store
from dreammix_trt.terminal import App, AsJson, print_json, print_line, print_table, say, show_progress, warn

if TYPE_CHECKING:
    from dreammix_trt.core.store_prune import Pruning

store_app = App(help="See, check and tidy the store of what bases are built into.")

StorePath = Annotated[
    Path | None, typer.Option("--store", help="Which store; default: in DREAMMIX_HOME, else in your data directory.")
]


@dataclass(frozen=True)
class Damage:
    """A part whose files are not what was built: what is wrong, and the commands that build it again."""

    key: str
    what: str
    commands: tuple[str, ...]


@store_app.command("list")
def list_parts(store: StorePath = None, as_json: AsJson = False) -> None:
    """List every part with the engines that need it."""
    shelf = Store(store)
    entries = shelf.entries()
    if as_json:
        print_json({"store": str(shelf.root), "entries": [_record(entry) for entry in entries]})
        return
    if not entries:
        print_line(f"{shelf.root} is empty")
        return
    rows = []
    for entry in entries:
        kind = entry.kind if entry.complete else f"{entry.kind}, damaged"
        first, *more = [str(engine) for engine in entry.users] or ["-"]
        rows.append((kind, _title(entry), size_text(entry.bytes), _age(entry.modified), entry.key[:12], first))
        rows += [("", "", "", "", "", user) for user in more]
    print_table(rows, header=("kind", "name", "size", "age", "key", "needed by"), right=(2,))


@store_app.command()
def size(store: StorePath = None, as_json: AsJson = False) -> None:
    """Say how much is in the store, by kind, and how much its disk has left."""
    shelf = Store(store)
    entries = shelf.entries()
    kinds: dict[str, list[Entry]] = {}
    for entry in entries:
        kinds.setdefault(entry.kind, []).append(entry)
    sizes = {kind: sum(entry.bytes for entry in found) for kind, found in kinds.items()}
    free = shelf.free()
    if as_json:
        counts = {kind: {"parts": len(found), "bytes": sizes[kind]} for kind, found in kinds.items()}
        total = {"bytes": sum(sizes.values()), "free": free}
        print_json({"store": str(shelf.root), **total, "kinds": counts})
        return
    rows = [(kind, _parts(len(found)), size_text(sizes[kind])) for kind, found in kinds.items()]
    print_table([*rows, ("all", _parts(len(entries)), size_text(sum(sizes.values())))])
    left = "unknown" if free is None else size_text(free)
    print_line(f"{shelf.root}: {left} free on its disk")


@store_app.command()
def verify(
    keys: Annotated[list[str] | None, typer.Argument(help="Keys, or how they begin; none: every part.")] = None,
    store: StorePath = None,
    as_json: AsJson = False,
) -> None:
    """Hash every file again; exit code 1 when one is not what was built."""
    shelf = Store(store)
    chosen = _chosen(shelf, keys or [])
    damages = _damages(shelf, chosen)
    if as_json:
        found = [{"key": each.key, "what": each.what, "commands": list(each.commands)} for each in damages]
        print_json({"store": str(shelf.root), "parts": len(chosen), "damaged": found})
    for each in damages:
        again = " or ".join(f"`{command}`" for command in each.commands)
        remedy = f"build it again: {again}" if again else "no engine needs it: `dreammix-trt store prune` removes it"
        warn(f"{each.what}; {remedy}")
    if damages:
        raise typer.Exit(DreamMixError.exit_code)
    if not as_json:
        print_line(f"{_parts(len(chosen))}: every file is what was built")


@store_app.command()
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Small parts that save work, such as traced graphs, go too.")
    ] = False,
    keep_onnx: Annotated[
        bool, typer.Option("--keep-onnx", help="Keep the ONNX of engines, to build them for other GPUs.")
    ] = False,
    forget_missing: Annotated[
        bool, typer.Option("--forget-missing", help="Engine directories that are not where they were are gone.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    store: StorePath = None,
    as_json: AsJson = False,
) -> None:
    """Remove what no engine needs; what one needs always stays."""
    from dreammix_trt.core.store_prune import plan_pruning
    from dreammix_trt.core.store_prune import prune as carry_out

    shelf = Store(store)
    plan = plan_pruning(shelf, everything=everything, keep_onnx=keep_onnx, forget_missing=forget_missing)
    if not as_json:
        _show(plan)
    freed, left = 0, list[Entry]()
    if not dry_run and (plan.goes or plan.leftovers or plan.forgotten) and (yes or _ask(plan, as_json)):
        freed, left = carry_out(shelf, plan)
        for entry in left:
            say(f"{entry.kind} {_title(entry)} stays: an engine has come to need it, or it is being built")
        if not as_json:
            print_line(f"{size_text(freed)} freed")
    if as_json:
        record = {"store": str(shelf.root), "dry_run": dry_run, "bytes": plan.bytes if dry_run else freed}
        print_json(record | _plan_record(plan, left))


def _chosen(shelf: Store, keys: Sequence[str]) -> list[Entry]:
    """The parts whose keys begin with one of `keys`; all where none is given. InputError for one that fits no part."""
    entries = shelf.entries()
    for key in keys:
        if not any(entry.key.startswith(key) for entry in entries):
            raise InputError(
                f"the store {shelf.root} has no part whose key begins with {key!r}; `dreammix-trt store list` shows "
                "which there are"
            )
    return [entry for entry in entries if not keys or entry.key.startswith(tuple(keys))]


def _damages(shelf: Store, entries: Sequence[Entry]) -> list[Damage]:
    """Read every file of these parts again and say which parts are damaged; the progress goes to stderr."""
    damages = []
    total, done = sum(entry.bytes for entry in entries) or 1, 0
    with show_progress("store") as update:
        for entry in entries:
            update("reading", done / total, f"{_title(entry)}, {size_text(done)} of {size_text(total)}")
            fault = _fault(shelf, entry)
            if fault:
                damages.append(Damage(entry.key, f"{entry.kind} {_title(entry)}: {fault}", _commands(entry.users)))
            done += entry.bytes
    return damages


def _fault(shelf: Store, entry: Entry) -> str | None:
    from dreammix_trt.core.store import check_files

    try:
        check_files(shelf.root / entry.key, shelf.files(entry.key), verify=True, remedy="")
    except DreamMixError as error:
        return str(error).rpartition("; ")[0] or str(error)
    return None if entry.complete else f"{shelf.root / entry.key}: its manifest belongs to another part"


def _commands(engines: Sequence[Path]) -> tuple[str, ...]:
    """What built these engines, as their passports say."""
    from dreammix_trt.core.files import read_json
    from dreammix_trt.core.passport import FILE_NAME

    commands = [read_json(engine / FILE_NAME).get("command") for engine in engines]
    return tuple(str(command) for command in commands if command)


def _show(plan: Pruning) -> None:
    """Say what goes, what stays because of whom, and what follows from it."""
    rows = []
    for entry in plan.goes:
        why = "no engine needs it" if entry.complete else "damaged, and no engine needs it"
        rows.append(("goes", f"{entry.kind} {_title(entry)}", size_text(entry.bytes), why))
    for path in plan.leftovers:
        rows.append(("goes", "unfinished", "", f"{path.name}: left by a build that was killed"))
    for entry, why in plan.stays:
        rows.append(("stays", f"{entry.kind} {_title(entry)}", size_text(entry.bytes), why))
    print_table(rows, right=(2,))
    if plan.exported_again:
        names = ", ".join(plan.exported_again)
        print_line(f"building {names} for another GPU will export the ONNX again; --keep-onnx keeps it")
    for path in plan.lost:
        print_line(f"{path} is not there now, its parts stay; --forget-missing if it is gone")
    for path in plan.forgotten:
        print_line(f"{path} is not there: forgotten")
    print_line(f"{size_text(plan.bytes)} to free" if plan.goes or plan.leftovers else "nothing to remove")


def _plan_record(plan: Pruning, left: Sequence[Entry]) -> dict[str, Any]:
    """A plan as JSON; left: the parts that stayed after all."""
    return {
        "goes": [_record(entry) for entry in plan.goes if entry not in left],
        "stays": [{**_record(entry), "why": why} for entry, why in plan.stays]
        + [{**_record(entry), "why": "needed or built meanwhile"} for entry in left],
        "leftovers": [str(path) for path in plan.leftovers],
        "missing": [str(path) for path in plan.lost],
        "forgotten": [str(path) for path in plan.forgotten],
        "exported_again": list(plan.exported_again),
    }


def _ask(plan: Pruning, as_json: bool) -> bool:
    if as_json or not sys.stdin.isatty():
        raise InputError(
            f"nothing was removed, as nobody can be asked here: --yes removes {_parts(len(plan.goes))} "
            f"({size_text(plan.bytes)}), --dry-run only shows what would go"
        )
    return typer.confirm("remove them?", err=True)


def _record(entry: Entry) -> dict[str, Any]:
    return {
        "key": entry.key,
        "kind": entry.kind,
        "name": entry.name,
        "bytes": entry.bytes,
        "modified": entry.modified,
        "users": [str(engine) for engine in entry.users],
        "complete": entry.complete,
        "parts": dict(entry.parts),
    }


def _title(entry: Entry) -> str:
    """The name, and the GPUs a plan is for."""
    targets = entry.parts.get("targets")
    return f"{entry.name} ({', '.join(map(str, targets))})" if isinstance(targets, list) and targets else entry.name


def _age(modified: float) -> str:
    seconds = max(0.0, time.time() - modified)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _parts(count: int) -> str:
    return f"{count} {'part' if count == 1 else 'parts'}"
