"""What the commands share: where they write, how progress looks, and options that several of them have.

Progress and messages go to stderr, `--json` output and nothing else to stdout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress

out_console = Console()
err_console = Console(stderr=True)

Threads = Annotated[int | None, typer.Option(help="CPU threads; default: all cores.", min=1, max=1024)]
Store = Annotated[Path | None, typer.Option("--store", help="Where base engines are kept (default: DREAMMIX_HOME).")]
Base = Annotated[
    Path | None,
    typer.Option(help="The base: diffusers folder or single-file checkpoint; default: the embedded micro-SDXL."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def say(text: str) -> None:
    """A line on stderr, as it is."""
    err_console.print(text, markup=False, highlight=False, soft_wrap=True)


def escape(text: str) -> str:
    """Text that rich does not read as markup."""
    from rich.markup import escape as escape_markup

    return escape_markup(text)


@contextmanager
def show_progress(title: str) -> Iterator[Any]:
    """A progress bar on stderr; yields `update(name, fraction, message)`."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err_console, transient=True) as progress:
        yield _Updater(progress, title)


class _Updater:
    """One line of the progress display a name."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress, self._title = progress, title
        self._tasks: dict[str, Any] = {}

    def __call__(self, name: str, fraction: float, message: str = "") -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(f"{self._title}: {name}", total=1.0, note="")
        self._progress.update(self._tasks[name], completed=fraction, note=escape(message))
