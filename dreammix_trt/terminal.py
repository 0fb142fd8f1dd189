"""What the commands share: where they write, how progress looks, and options that several or all of them have.

Progress and messages go to stderr, `--json` output and nothing else to stdout. No line is broken: a path can be copied
whole, and a terminal wraps by itself. What a stream's encoding lacks is written as an escape.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, TypeVar, get_args, get_origin

import typer
from rich.console import Console

from dreammix_trt.core.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress

out_console = Console(emoji=False, highlight=False)
err_console = Console(stderr=True, emoji=False, highlight=False)

#: without a terminal: seconds until the first line of a long work, between two at first, and between two equal ones
FIRST_LINE, NEXT_LINE, SAME_LINE = 5.0, 10.0, 60.0
EVERYWHERE = "Everywhere"
PANELS_FROM = 78  # columns; panels would cut the names of options in a narrower terminal
_F = TypeVar("_F", bound=Callable[..., Any])

Threads = Annotated[int | None, typer.Option(help="CPU threads; default: all cores.", min=1, max=1024)]
Store = Annotated[
    Path | None,
    typer.Option(help="Where base engines are kept; default: in DREAMMIX_HOME, else in your data directory."),
]
Base = Annotated[
    Path | None,
    typer.Option(help="The base: diffusers folder or single-file checkpoint; default: the embedded micro-SDXL."),
]
Patch = Annotated[
    Path | None, typer.Option(help="*.fooocus.patch; default: the one in the base's folder, or beside its file.")
]
Head = Annotated[Path | None, typer.Option(help="inpaint_head.pth; default: like the patch.")]
Vae = Annotated[Path | None, typer.Option(help="Another VAE: folder or file.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Another tokenizer's folder; default: the base's, or CLIP's.")]
BaseLoras = Annotated[
    list[str] | None, typer.Option(help="A few-step or style LoRA for the base's weights, FILE[:scale[:target]].")
]
PatchBiases = Annotated[bool, typer.Option("--patch-biases", help="Apply the patch's biases too (Fooocus).")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else, also for an error.")
]
SetFields = Annotated[
    list[str] | None, typer.Option("--set", help="Any other field of a request as NAME=VALUE (JSON).")
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace what is there.")]
Seed = Annotated[int, typer.Option(help="The same seed, the same result.")]
LogLevel = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR"] | None,
    typer.Option(
        help="How much is logged on stderr; default: WARNING.", case_sensitive=False, rich_help_panel=EVERYWHERE
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="On stderr only warnings and errors.", rich_help_panel=EVERYWHERE)
]


@dataclass
class _State:
    quiet: bool = False


_state = _State()


class App(typer.Typer):
    """A group of commands. It and each of them take `--log-level`, `--quiet` and `-h`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            no_args_is_help=True,
            pretty_exceptions_enable=False,
            rich_markup_mode="rich" if typer.get_terminal_size().columns >= PANELS_FROM else None,
            context_settings={"help_option_names": ["-h", "--help"]},
            **settings,
        )
        self.callback()(choose_messages)

    def command(  # type: ignore[override]
        self, name: str | None = None, *, panels: Mapping[str, Sequence[str]] | None = None, **settings: Any
    ) -> Callable[[_F], _F]:
        """Register a function as a command.

        panels: title -> the parameters that its help shows under it; the others stand under "Options".
        """
        register = super().command(name, **settings)
        titles = {parameter: title for title, names in (panels or {}).items() for parameter in names}

        def decorate(function: _F) -> _F:
            register(_extend(function, titles))
            return function

        return decorate


class _OnConsole(logging.Handler):
    """What is logged, on stderr; a warning looks like every other warning."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno == logging.WARNING:
            warn(text)
        else:
            err_console.print(f"{record.levelname} {record.name}: {text}", markup=False, soft_wrap=True)


def begin_messages(log_level: str | None, quiet: bool) -> None:
    """Set how much is written on stderr, as the command line begins."""
    _state.quiet = quiet
    logging.basicConfig(format="%(message)s", handlers=[_OnConsole()])
    logging.getLogger().setLevel(log_level or "WARNING")


def choose_messages(log_level: LogLevel = None, quiet: Quiet = False) -> None:
    """Set how much is written on stderr, as a command begins; what is not given stays."""
    _state.quiet = _state.quiet or quiet
    if log_level is not None:
        logging.getLogger().setLevel(log_level)


def _extend(function: Callable[..., Any], titles: Mapping[str, str]) -> Callable[..., Any]:
    """A command's function with the options of every command, and with titles for panels of its help."""
    signature = inspect.signature(function, eval_str=True)
    own = [_put_under(parameter, titles.get(parameter.name)) for parameter in signature.parameters.values()]
    shared = inspect.signature(choose_messages, eval_str=True).parameters

    @functools.wraps(function)
    def run(**arguments: Any) -> Any:
        choose_messages(**{name: arguments.pop(name) for name in shared})
        return function(**arguments)

    parameters = [*own, *shared.values()]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _put_under(parameter: inspect.Parameter, title: str | None) -> inspect.Parameter:
    """The parameter with a title for its panel; None: as it is."""
    if title is None:
        return parameter
    annotated = get_origin(parameter.annotation) is Annotated
    kind, option = get_args(parameter.annotation) if annotated else (parameter.annotation, typer.Option())
    option = copy(option)
    option.rich_help_panel = title
    return parameter.replace(annotation=Annotated[kind, option])


def prepare_streams() -> None:
    """Let stdout and stderr write every character: as an escape where their encoding lacks it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def write_messages(stream: TextIO) -> Iterator[None]:
    """Send messages, progress, and what goes to stdout into a stream, as plain lines, while the block runs."""
    global out_console, err_console
    former = out_console, err_console
    out_console, err_console = (Console(file=stream, emoji=False, highlight=False) for _ in former)
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield
    finally:
        out_console, err_console = former


def say(text: str) -> None:
    """A line on stderr, as it is; nothing with --quiet."""
    if not _state.quiet:
        err_console.print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """A warning on stderr, also with --quiet."""
    err_console.print(f"[bold yellow]warning:[/] {escape(text)}", soft_wrap=True)


def say_error(text: str) -> None:
    """An error on stderr."""
    err_console.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)


def print_json(record: Any) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(record, indent=2))


def print_line(text: str) -> None:
    """A line on stdout, as it is."""
    out_console.print(text, markup=False, soft_wrap=True)


def print_table(
    rows: Sequence[Sequence[str]], *, title: str = "", header: Sequence[str] = (), right: Sequence[int] = ()
) -> None:
    """Print columns on stdout. No cell is broken or cut.

    Without a header, the cells of a row stand below each other on a terminal that is too narrow.

    right: numbers of the columns that are aligned to the right.
    """
    from rich.cells import cell_len

    lines = [header, *rows] if header else list(rows)
    widths = [
        max(map(cell_len, column)) for column in zip_longest(*(row for row in lines if len(row) > 1), fillvalue="")
    ]
    if title:
        print_line(title)
    indent = "  " if title else ""
    narrow = not header and out_console.is_terminal and sum(widths) + 2 * len(widths) + len(indent) > out_console.width
    for row in lines:
        if narrow:
            print_line("\n".join(indent + ("    " if column else "") + cell for column, cell in enumerate(row) if cell))
            continue
        cells = []
        for column, cell in enumerate(row):
            gap = " " * (widths[column] - cell_len(cell)) if len(row) > 1 else ""
            cells.append(gap + cell if column in right else cell + gap)
        print_line((indent + "  ".join(cells)).rstrip())


def escape(text: str) -> str:
    """Text that rich does not read as markup."""
    from rich.markup import escape as escape_markup

    return escape_markup(text)


@contextlib.contextmanager
def show_progress(title: str) -> Iterator[Callable[..., None]]:
    """Progress on stderr; yields `update(name, fraction, message)`.

    On a terminal these are bars. Elsewhere long work prints a plain line now and then. With --quiet there is nothing.
    """
    if _state.quiet:
        yield lambda *_: None
        return
    if not err_console.is_interactive:
        with _Lines(title) as lines:
            yield lines
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=err_console, transient=True) as progress:
        yield _Bars(progress, title)


class _Bars:
    """One line of the progress display a name."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress, self._title = progress, title
        self._tasks: dict[str, Any] = {}

    def __call__(self, name: str, fraction: float, message: str = "") -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(f"{self._title}: {name}", total=1.0, note="")
        self._progress.update(self._tasks[name], completed=fraction, note=message)


class _Lines:
    """Plain lines of where a work is, the rarer the longer it takes; a thread says them, also where a step is long."""

    def __init__(self, title: str) -> None:
        self._title, self._state = title, ("", 0.0, "")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._say_now_and_then, daemon=True)

    def __enter__(self) -> _Lines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def __call__(self, name: str, fraction: float, message: str = "") -> None:
        self._state = (name, fraction, message)

    def _say_now_and_then(self) -> None:
        begun = time.monotonic()
        pause, said, said_at = FIRST_LINE, ("", -1.0, ""), 0.0
        while not self._ended.wait(pause):
            spent = time.monotonic() - begun
            pause = max(NEXT_LINE, spent / 10)
            if self._state == said and spent - said_at < SAME_LINE:
                continue
            said, said_at = self._state, spent
            name, fraction, message = said
            what = f"{name} {fraction:.0%}" if name else "begins"
            say(f"{self._title}: {what} after {spent:.0f} s{f', {message}' if message else ''}")


def parse_fields(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; the value is JSON, or plain text where it is not."""
    fields: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator:
            raise InputError(f"--set {pair!r} is not of the form NAME=VALUE, such as lcg_fraction=0.5")
        try:
            fields[name] = json.loads(text)
        except (ValueError, RecursionError):  # not JSON, or a number of thousands of digits
            fields[name] = text
    return fields
