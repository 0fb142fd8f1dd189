"""`dreammix-trt eval`: an engine paints a protocol, and what it painted is measured and shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dreammix_trt.core.errors import InputError
from dreammix_trt.painting_cli import Device, Verify
from dreammix_trt.terminal import (
    AsJson,
    Force,
    SetFields,
    Store,
    Threads,
    parse_fields,
    print_json,
    print_table,
    say,
    show_progress,
)

if TYPE_CHECKING:
    from dreammix_trt.core.passport import Passport
    from dreammix_trt.evaluation.metrics.choice import Weights
    from dreammix_trt.evaluation.painter import Painter
    from dreammix_trt.evaluation.protocol import Protocol

Engine = Annotated[Path | None, typer.Argument(help="An engine directory. Left out with --pictures.")]
ProtocolFolder = Annotated[
    Path | None,
    typer.Argument(
        metavar="PROTOCOL", help="Folder with protocol.json, scenes/ and subjects/; or MISATO's: image/ and mask/."
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for pictures, tables and page.")]
Example = Annotated[
    Path | None, typer.Option(help="Write a small protocol of the embedded model's world there, and leave.")
]
Pairs = Annotated[
    int | None,
    typer.Option(min=1, max=100_000, help="With --example: this many empty rooms with holes instead; resumable."),
]
Seed = Annotated[int | None, typer.Option(min=0, help="With --example: which of them; default: 0.")]
Pictures = Annotated[
    Path | None, typer.Option(help="Measure these finished pictures, SCENE.png, instead of painting with an engine.")
]
PromptText = Annotated[
    str | None,
    typer.Option("--prompt", "-p", help="What holes are removed with, instead of the protocol's own prompt."),
]
Subjects = Annotated[
    Path | None, typer.Option(help="LoRAs of subjects that the engine lacks: NAME.safetensors, or folders NAME.")
]
References = Annotated[
    Path | None,
    typer.Option(
        help="Compare with these pictures (the `pictures` of another run) instead of the scenes' surroundings."
    ),
]
Clip = Annotated[Path | None, typer.Option(help="Folder of a CLIP as transformers saves it: CLIP-T and CLIP-I.")]
Dino = Annotated[Path | None, typer.Option(help="Folder of a DINO or DINOv2 as transformers saves it.")]
Inception = Annotated[Path | None, typer.Option(help="Weights of FID's Inception v3 (pt_inception-2015-12-05).")]
Lpips = Annotated[Path | None, typer.Option(help="AlexNet's weights as torchvision has them, for LPIPS.")]
Real = Annotated[Path | None, typer.Option(help="Folder of real pictures for FID; default: the scenes.")]
UpdateEvery = Annotated[int, typer.Option(min=1, help="Pictures after which tables and page are written.")]

EXAMPLES = """
Examples:

dreammix-trt eval --example protocol/

dreammix-trt eval engines/micro protocol/ --subjects loras/ -o report/

dreammix-trt eval engines/sdxl benchmark/ --subjects loras/ --clip clip-vit-large-patch14/ -o report/

dreammix-trt eval --example rooms/ --pairs 2000

dreammix-trt eval MISATO/512/ --pictures results/ --inception inception_v3_google-0cc3c7bd.pth -o report/
"""
PANELS = {
    "What is painted": ("subjects", "prompt", "set_field", "pictures", "example", "pairs", "seed"),
    "What it is measured by": ("clip", "dino", "inception", "real", "lpips", "references"),
    "What is written": ("out", "update_every", "force", "as_json"),
    "What it runs on": ("device", "threads", "store", "verify"),
}


def evaluate(
    engine: Engine = None,
    protocol: ProtocolFolder = None,
    out: Out = None,
    subjects: Subjects = None,
    prompt: PromptText = None,
    set_field: SetFields = None,
    pictures: Pictures = None,
    example: Example = None,
    pairs: Pairs = None,
    seed: Seed = None,
    clip: Clip = None,
    dino: Dino = None,
    inception: Inception = None,
    real: Real = None,
    lpips: Lpips = None,
    references: References = None,
    update_every: UpdateEvery = 25,
    device: Device = "cpu",
    threads: Threads = None,
    store: Store = None,
    verify: Verify = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Paint a protocol of subjects, scenes and prompts with an engine, and measure what it painted."""
    painted_with = {
        "subjects": subjects,
        "threads": threads,
        "store": store,
        "verify": verify,
        "device": device != "cpu",
    }
    if example is not None:
        measured_by = {"clip": clip, "dino": dino, "inception": inception, "real": real, "lpips": lpips}
        others = {"references": references, "prompt": prompt, "set": set_field, "force": force}
        _refuse(
            {**painted_with, **measured_by, **others}, "--example writes a protocol, and neither paints nor measures"
        )
        given = [each for each in (engine, protocol, out, pictures) if each is not None]
        _write_example(example, given, pairs, seed or 0, as_json=as_json)
        return
    if pairs is not None:
        raise InputError("--pairs says how many rooms --example writes; give both, or neither")
    _refuse({"seed": seed}, "it is of the rooms that --example writes; a picture's seed is the protocol's")
    if pictures is not None:
        _refuse(painted_with, "the pictures of --pictures are finished, and no engine paints")
    engine, place, out = _sort_places(engine, protocol, out, pictures)
    from dreammix_trt.core.passport import Passport
    from dreammix_trt.evaluation import running
    from dreammix_trt.evaluation.metrics.choice import Weights, choose_metrics
    from dreammix_trt.evaluation.reading import read_protocol

    passport = None if engine is None else Passport.read(engine)
    asked = read_protocol(place, parse_fields(set_field or []), prompt)
    weights = Weights(clip, dino, inception, lpips, real, _find_judge(passport, asked))
    metrics = choose_metrics(asked, weights)
    loading = {"threads": threads, "verify": verify, "store": store, "device": device}
    with (
        _open_painter(engine, passport, asked, pictures, subjects, loading) as painter,
        show_progress("evaluating") as update,
    ):
        summary = running.evaluate(
            asked,
            painter,
            metrics,
            out,
            facts={**_describe_painter(engine, passport, pictures), **_list_facts(weights)},
            references=references,
            force=force,
            update_every=update_every,
            progress=update,
        )
    _report(summary, out, as_json)


def _refuse(given: dict[str, Any], why: str) -> None:
    """Raise InputError for options that would be ignored. given: by name; None or False: not given."""
    names = [f"--{name}" for name, value in given.items() if value is not None and value is not False]
    if names:
        raise InputError(f"{', '.join(names)} cannot be used here: {why}; leave {'it' if len(names) == 1 else 'them'}")


def _sort_places(
    engine: Path | None, protocol: Path | None, out: Path | None, pictures: Path | None
) -> tuple[Path | None, Path, Path]:
    """Engine (None with finished pictures), protocol and place of results, as the arguments mean them."""
    if pictures is not None and engine is not None and protocol is None:
        engine, protocol = None, engine
    if protocol is None or out is None or (engine is None) == (pictures is None):
        raise InputError(
            "give ENGINE, PROTOCOL and --out FOLDER, or PROTOCOL, --pictures FOLDER and --out FOLDER; "
            "`dreammix-trt eval --example FOLDER` writes a protocol"
        )
    return engine, protocol, out


@contextmanager
def _open_painter(
    engine: Path | None,
    passport: Passport | None,
    protocol: Protocol,
    pictures: Path | None,
    subjects: Path | None,
    loading: dict[str, Any],
) -> Iterator[Painter]:
    """The engine, loaded, or the finished pictures."""
    from dreammix_trt.evaluation.painter import EnginePainter, FinishedPainter

    if pictures is not None:
        yield FinishedPainter(pictures, protocol)
        return
    from dreammix_trt.engine.dreammix import DreamMix

    assert engine is not None and passport is not None
    with DreamMix.load(engine, **loading, **_choose_options(loading["device"], protocol)) as dm:
        yield EnginePainter(dm, passport, subjects)


def _write_example(folder: Path, given: list[Path], pairs: int | None, seed: int, *, as_json: bool) -> None:
    from dreammix_trt.evaluation.example import write_example
    from dreammix_trt.evaluation.pairs import write_pairs

    if given:
        raise InputError(f"--example writes a protocol and leaves; leave out {', '.join(map(str, given))}")
    with show_progress("rendering") as update:
        if pairs is None:
            write_example(folder, seed=seed, progress=update)
        else:
            write_pairs(folder, pairs, seed=seed, progress=update)
    if as_json:
        print_json({"protocol": str(folder)})
    if pairs is None:
        say(f"{folder}: a protocol; its subjects' photographs in {folder / 'subjects'} are for `dreammix-trt train`")
    else:
        say(f"{folder}: a protocol of {pairs} empty rooms; each is the truth of its hole")


def _find_judge(passport: Passport | None, protocol: Protocol) -> Path | None:
    """The embedded model's folder, where the engine was made of its contents; without one, as the protocol says."""
    from dreammix_trt.core.checkpoint import BaseFiles

    own = BaseFiles.open()
    if passport is None:
        return own.folder if protocol.name.partition(" ")[0] == own.folder.name else None
    same = _list_weights(passport.base.get("files", {})) == _list_weights(own.hash_contents())
    return own.folder if same else None


def _list_weights(files: Mapping[str, Any]) -> dict[str, Any]:
    """Of the hashes of a base's files, all but those of configs: another native side is the same world."""
    return {name: digest for name, digest in files.items() if not name.endswith("config.json")}


def _choose_options(device: str, protocol: Protocol) -> dict[str, Any]:
    """The runtime's options; those of a GPU set aside memory for one picture at a time."""
    if device != "cuda":
        return {}
    from dreammix_trt.core.pictures import read_image

    sizes = [read_image(scene.image).size for scene in protocol.scenes]
    return {"largest_picture": max(height * width for height, width in sizes), "subjects": 1, "texts": 1, "shapes": 2}


def _describe_painter(engine: Path | None, passport: Passport | None, pictures: Path | None) -> dict[str, Any]:
    """What painted, for the run's facts."""
    from dreammix_trt.core.files import sha256_of
    from dreammix_trt.core.passport import FILE_NAME

    if engine is None or passport is None:
        return {"pictures_given": str(pictures)}
    made = {"passport_sha256": sha256_of(engine / FILE_NAME), "base": passport.base.get("name", "")}
    made |= {"base_key": passport.base_key, "backend": passport.backend, "precision": passport.precision}
    return {"engine": made}


def _list_facts(weights: Weights) -> dict[str, Any]:
    """What a run is to be repeated from, beside what painted: the weights of the metrics, versions."""
    import platform
    from dataclasses import asdict
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    packages = ("dreammix-trt", "numpy", "pillow", "onnxruntime", "torch", "transformers", "flip-evaluator")
    for package in (*packages, "scikit-learn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    networks = {name: str(path) for name, path in asdict(weights).items() if path is not None and name != "judge"}
    return {"weights": networks, "versions": versions, "platform": platform.platform()}


def _report(summary: dict[str, Any], out: Path, as_json: bool) -> None:
    from dreammix_trt.evaluation.results import PAGE

    page = out / PAGE
    if as_json:
        print_json({"page": str(page), **summary})
    else:
        tasks = list(summary["tasks"])
        rows = []
        for metric, facts in summary["metrics"].items():
            means = [_spell(summary["tasks"][task].get(metric)) for task in tasks]
            if not facts["measured"]:
                means = [*[""] * len(tasks), f"not measured: {facts['missing']}"]
            rows.append([f"{metric}{f' [{unit}]' if (unit := facts['unit']) else ''}", *means])
        print_table(rows, header=["", *tasks])
    counts = summary["pictures"]
    say(f"{page} ({counts['measured']} pictures, {counts['painted_now']} of them painted now)")


def _spell(mean: dict[str, Any] | None) -> str:
    if mean is None:
        return "-"
    interval = f" [{mean['low']:.4g}, {mean['high']:.4g}]" if "low" in mean else ""
    return f"{mean['mean']:.4g}{interval}"
