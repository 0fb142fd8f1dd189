"""The command line: photographs -> LoRA -> engine -> picture, one command each.

Errors raised on purpose become one message on stderr and an exit code here, and only here. With --json they become an
object on stdout as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer

from dreammix_trt import __version__
from dreammix_trt.attributes_cli import EXAMPLES as ATTRIBUTES_EXAMPLES
from dreammix_trt.attributes_cli import PANELS as ATTRIBUTES_PANELS
from dreammix_trt.attributes_cli import attributes
from dreammix_trt.build_cli import EXAMPLES as BUILD_EXAMPLES
from dreammix_trt.build_cli import PANELS as BUILD_PANELS
from dreammix_trt.build_cli import build
from dreammix_trt.calibrate_cli import EXAMPLES as CALIBRATE_EXAMPLES
from dreammix_trt.calibrate_cli import PANELS as CALIBRATE_PANELS
from dreammix_trt.calibrate_cli import calibrate
from dreammix_trt.core.errors import Cancelled, DreamMixError, InputError
from dreammix_trt.core.files import is_full
from dreammix_trt.distill_cli import EXAMPLES as DISTILL_EXAMPLES
from dreammix_trt.distill_cli import PANELS as DISTILL_PANELS
from dreammix_trt.distill_cli import distill
from dreammix_trt.doctor_cli import doctor
from dreammix_trt.enroll_cli import EXAMPLES as ENROLL_EXAMPLES
from dreammix_trt.enroll_cli import PANELS as ENROLL_PANELS
from dreammix_trt.enroll_cli import enroll
from dreammix_trt.eval_cli import EXAMPLES as EVAL_EXAMPLES
from dreammix_trt.eval_cli import PANELS as EVAL_PANELS
from dreammix_trt.eval_cli import evaluate
from dreammix_trt.inpaint_cli import EXAMPLES as INPAINT_EXAMPLES
from dreammix_trt.inpaint_cli import PANELS as INPAINT_PANELS
from dreammix_trt.inpaint_cli import inpaint
from dreammix_trt.many_cli import BUILD_EXAMPLES as BUILD_MANY_EXAMPLES
from dreammix_trt.many_cli import BUILD_PANELS as BUILD_MANY_PANELS
from dreammix_trt.many_cli import TRAIN_EXAMPLES as TRAIN_MANY_EXAMPLES
from dreammix_trt.many_cli import TRAIN_PANELS as TRAIN_MANY_PANELS
from dreammix_trt.many_cli import build_many, train_many
from dreammix_trt.regularize_cli import EXAMPLES as REGULARIZE_EXAMPLES
from dreammix_trt.regularize_cli import PANELS as REGULARIZE_PANELS
from dreammix_trt.regularize_cli import regularize
from dreammix_trt.remove_cli import EXAMPLES as REMOVE_EXAMPLES
from dreammix_trt.remove_cli import PANELS as REMOVE_PANELS
from dreammix_trt.remove_cli import remove
from dreammix_trt.serve_cli import EXAMPLES as SERVE_EXAMPLES
from dreammix_trt.serve_cli import PANELS as SERVE_PANELS
from dreammix_trt.serve_cli import serve
from dreammix_trt.store_cli import store_app
from dreammix_trt.terminal import (
    App,
    AsJson,
    Force,
    LogLevel,
    Quiet,
    Seed,
    Store,
    Threads,
    begin_messages,
    prepare_streams,
    print_json,
    print_line,
    print_table,
    say,
    say_error,
    show_progress,
)
from dreammix_trt.train_asuka_cli import EXAMPLES as TRAIN_ASUKA_EXAMPLES
from dreammix_trt.train_asuka_cli import PANELS as TRAIN_ASUKA_PANELS
from dreammix_trt.train_asuka_cli import train_asuka
from dreammix_trt.train_cli import EXAMPLES as TRAIN_EXAMPLES
from dreammix_trt.train_cli import PANELS as TRAIN_PANELS
from dreammix_trt.train_cli import train
from dreammix_trt.train_tokens_cli import EXAMPLES as TRAIN_TOKENS_EXAMPLES
from dreammix_trt.train_tokens_cli import PANELS as TRAIN_TOKENS_PANELS
from dreammix_trt.train_tokens_cli import train_tokens

_NAME = "dreammix-trt"
#: click's errors of use; typer exports the most special of them alone
_UsageError: type[Exception] = typer.BadParameter.__bases__[0].__bases__[0]

app = App(name=_NAME, help="Put a subject you have photographs of into a marked region of any picture, edited by text.")


def main() -> None:
    """Run the command line; the one place where errors become exit codes."""
    prepare_streams()
    sys.exit(_run())


def _run() -> int:
    try:
        code = app(prog_name=_NAME, standalone_mode=False)
    except DreamMixError as error:
        return _fail(error)
    except _UsageError as error:
        return _explain_usage(error)
    except typer.Abort:
        code = Cancelled.exit_code
    except Exception as error:
        if isinstance(error, OSError) and is_full(error) and error.filename is None:  # else our message names it
            return _fail(DreamMixError(f"the output cannot be written: {error.strerror}"))
        _print_error(type(error).__name__, str(error), 1)
        raise
    if code == Cancelled.exit_code:
        return _fail(Cancelled("stopped"))
    return code if isinstance(code, int) else 0


def _fail(error: DreamMixError) -> int:
    if isinstance(error, Cancelled):
        say(str(error))
    else:
        say_error(str(error))
    _print_error(type(error).__name__, str(error), error.exit_code)
    return error.exit_code


def _explain_usage(error: Exception) -> int:
    """Wrong use as click found it: the same as an InputError, and where to read on."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError" and context is not None:
        return InputError.exit_code  # the help has been printed
    message = getattr(error, "format_message", error.__str__)().replace("Value error, ", "")
    value = _find_value(getattr(getattr(error, "param", None), "opts", ()))
    if value is not None and repr(value) not in message:
        message = f"{message.rstrip('.')} (it is {value!r})"
    command = context.command_path if context is not None else _NAME
    joint = " See" if message.endswith("?") else "; see"
    return _fail(InputError(f"{message.rstrip('.')}{joint} `{command} --help`"))


def _find_value(options: Sequence[str]) -> str | None:
    """What the user gave for an option of these names; click's messages leave it out for numbers."""
    words = sys.argv[1:]
    for number, word in enumerate(words):
        name, sign, value = word.partition("=")
        if name in options and name.startswith("-"):
            return value if sign else next(iter(words[number + 1 :]), None)
    return None


def _print_error(kind: str, message: str, exit_code: int) -> None:
    """An error as JSON on stdout, where the user asked for JSON. Wrong use is found before options are known."""
    if "--json" in sys.argv[1:]:
        with suppress(OSError):  # nobody reads it
            print_json({"error": {"kind": kind, "message": message, "exit_code": exit_code}})


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    log_level: LogLevel = None,
    quiet: Quiet = False,
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version and leave.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """Put a subject you have photographs of into a marked region of any picture, edited by text."""
    begin_messages(log_level, quiet)


app.add_typer(store_app, name="store")
app.command("doctor")(doctor)


app.command(epilog=ATTRIBUTES_EXAMPLES, panels=ATTRIBUTES_PANELS)(attributes)
app.command(epilog=REGULARIZE_EXAMPLES, panels=REGULARIZE_PANELS)(regularize)
app.command(epilog=TRAIN_EXAMPLES, panels=TRAIN_PANELS)(train)
app.command("train-many", epilog=TRAIN_MANY_EXAMPLES, panels=TRAIN_MANY_PANELS)(train_many)
app.command(epilog=DISTILL_EXAMPLES, panels=DISTILL_PANELS)(distill)
app.command("train-asuka", epilog=TRAIN_ASUKA_EXAMPLES, panels=TRAIN_ASUKA_PANELS)(train_asuka)
app.command("train-tokens", epilog=TRAIN_TOKENS_EXAMPLES, panels=TRAIN_TOKENS_PANELS)(train_tokens)
app.command(epilog=BUILD_EXAMPLES, panels=BUILD_PANELS)(build)
app.command("build-many", epilog=BUILD_MANY_EXAMPLES, panels=BUILD_MANY_PANELS)(build_many)
app.command(epilog=CALIBRATE_EXAMPLES, panels=CALIBRATE_PANELS)(calibrate)


@app.command()
def inspect(
    engine: Annotated[Path, typer.Argument(help="An engine directory.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file again.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Print what an engine was made from."""
    from dreammix_trt.core.passport import Passport
    from dreammix_trt.engine.directory import check_engine

    passport = Passport.read(engine)
    if verify:
        check_engine(engine, verify=True, store=store)
    if as_json:
        print_json(passport.to_dict())
        return
    for title, rows in passport.describe():
        print_table([[str(cell) for cell in row] for row in rows], title=title)
    if verify:
        print_line("every file agrees with its hash")


app.command(epilog=ENROLL_EXAMPLES, panels=ENROLL_PANELS)(enroll)
app.command(epilog=INPAINT_EXAMPLES, panels=INPAINT_PANELS)(inpaint)
app.command(epilog=REMOVE_EXAMPLES, panels=REMOVE_PANELS)(remove)
app.command(epilog=SERVE_EXAMPLES, panels=SERVE_PANELS)(serve)
app.command("eval", epilog=EVAL_EXAMPLES, panels=EVAL_PANELS)(evaluate)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where pictures, LoRA, engine and report go.")] = Path(
        "demo"
    ),
    threads: Threads = None,
    seed: Seed = 7,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Render a subject, train it, build its engine, inpaint with it: one contact sheet and a report."""
    from dreammix_trt.demo import check_folder, run_demo

    if not force:
        check_folder(out)
    with show_progress("demo") as update:
        pages = run_demo(out, seed=seed, threads=threads, progress=update)
    if as_json:
        print_json({"sheet": str(pages.sheet), "report": str(pages.report)})
        return
    print_line(f"contact sheet: {pages.sheet}\nreport:        {pages.report}")


@app.command("train-base")
def train_base(
    out: Annotated[Path, typer.Option("--out", "-o", help="The model folder to write; it is replaced whole.")],
    work: Annotated[
        Path | None, typer.Option(help="Stages and checkpoints; a stopped run goes on from them. Default: OUT.work.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="What it trains on.")] = "cpu",
    processes: Annotated[int, typer.Option(min=1, help="CPU processes of one thread each.")] = 2,
    minutes_scale: Annotated[
        float, typer.Option(min=0.0, help="Multiplies the steps and time limits of every stage.")
    ] = 1.0,
    native_size: Annotated[int, typer.Option(min=64, help="Side in pixels of the pictures it knows.")] = 256,
    seed: Seed = 0,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps of everything, to see that it runs.")] = False,
) -> None:
    """Train the embedded micro-SDXL again from nothing, in hours (see docs/model-card.md)."""
    from dreammix_trt.core.extras import require_training

    require_training()
    from dreammix_trt.trainer.micro.__main__ import make_settings, train_again

    settings = make_settings(
        out,
        work,
        device=device,
        processes=processes,
        minutes_scale=minutes_scale,
        native_size=native_size,
        seed=seed,
        smoke=smoke,
    )
    train_again(settings)
