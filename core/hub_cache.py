"""Folders of the Hugging Face hub's cache: `models--ORG--NAME/` with `refs/`, `snapshots/` and `blobs/`."""

from __future__ import annotations

from pathlib import Path

from dreammix_trt.core.errors import FileFormatError


def find_snapshot(folder: Path) -> Path:
    """The snapshot that a model's folder in the hub's cache means; any other folder as it is.

    `refs/main` names the snapshot; without it there must be one alone.

    Raises `FileFormatError` where it is not there or where there are several, naming them.
    """
    if folder.name == "snapshots" and (folder.parent / "blobs").is_dir():
        folder = folder.parent
    place = folder / "snapshots"
    if not place.is_dir() or not (folder.name.startswith("models--") or (folder / "blobs").is_dir()):
        return folder
    ref = folder / "refs" / "main"
    if ref.is_file():
        named = place / ref.read_text(encoding="utf-8", errors="replace").strip()
        if named.is_dir() and named.parent == place:
            return named
    snapshots = sorted(each for each in place.iterdir() if each.is_dir())
    if len(snapshots) == 1:
        return snapshots[0]
    if not snapshots:
        raise FileFormatError(f"{folder}: a folder of the hub's cache without a snapshot; download the model again")
    names = ", ".join(each.name for each in snapshots)
    raise FileFormatError(f"{place}: {len(snapshots)} snapshots and no refs/main that names one; give one of {names}")


def find_broken_links(folder: Path) -> list[str]:
    """The names of links in a folder whose files are not there, as an unfinished download leaves them."""
    return sorted(each.name for each in folder.iterdir() if each.is_symlink() and not each.exists())
