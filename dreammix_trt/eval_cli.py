"""`dreammix-trt eval`: an engine paints a protocol, and what it painted is measured and shown."""

from __future__ import annotations

from collections.abc import Mapping
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
    from dreammix_trt.evaluation.protocol import Protocol

Engine = Annotated[Path | None, typer.Argument(help="An engine directory.")]
ProtocolFolder = Annotated[
    Path | None, typer.Argument(metavar="PROTOCOL", help="Folder with protocol.json, scenes/ and subjects/.")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for pictures, tables and page.")]
Example = Annotated[
    Path | None, typer.Option(help="Write a small protocol of the embedded model's world there, and leave.")
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
"""
PANELS = {
    "What is painted": ("subjects", "set_field", "example"),
    "What it is measured by": ("clip", "dino", "inception", "real", "lpips", "references"),
    "What is written": ("out", "update_every", "force", "as_json"),
    "What it runs on": ("device", "threads", "store", "verify"),
}


def evaluate(
    engine: Engine = None,
    protocol: ProtocolFolder = None,
    out: Out = None,
    subjects: Subjects = None,
    set_field: SetFields = None,
    example: Example = None,
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
    if example is not None:
        _write_example(example, given=[each for each in (engine, protocol, out) if each is not None], as_json=as_json)
        return
    if engine is None or protocol is None or out is None:
        raise InputError(
            "give ENGINE, PROTOCOL and --out FOLDER; `dreammix-trt eval --example FOLDER` writes a protocol"
        )
    from dreammix_trt.core.passport import Passport
    from dreammix_trt.engine.dreammix import DreamMix
    from dreammix_trt.evaluation import running
    from dreammix_trt.evaluation.metrics.choice import Weights, choose_metrics
    from dreammix_trt.evaluation.painter import EnginePainter
    from dreammix_trt.evaluation.reading import read_protocol

    passport = Passport.read(engine)
    asked = read_protocol(protocol, parse_fields(set_field or []))
    weights = Weights(clip, dino, inception, lpips, real, _find_judge(passport))
    metrics = choose_metrics(asked, weights)
    options = _choose_options(device, asked)
    with (
        DreamMix.load(engine, threads=threads, verify=verify, store=store, device=device, **options) as dm,
        show_progress("evaluating") as update,
    ):
        summary = running.evaluate(
            asked,
            EnginePainter(dm, passport, subjects),
            metrics,
            out,
            facts=_list_facts(engine, passport, weights),
            references=references,
            force=force,
            update_every=update_every,
            progress=update,
        )
    _report(summary, out, as_json)


def _write_example(folder: Path, given: list[Path], *, as_json: bool) -> None:
    from dreammix_trt.evaluation.example import write_example

    if given:
        raise InputError(f"--example writes a protocol and leaves; leave out {', '.join(map(str, given))}")
    with show_progress("rendering") as update:
        write_example(folder, progress=update)
    if as_json:
        print_json({"protocol": str(folder)})
    say(f"{folder}: a protocol; its subjects' photographs in {folder / 'subjects'} are for `dreammix-trt train`")


def _find_judge(passport: Passport) -> Path | None:
    """The embedded model's folder, where the engine was made of its contents, whatever that base is called."""
    from dreammix_trt.core.checkpoint import BaseFiles

    own = BaseFiles.open()
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


def _list_facts(engine: Path, passport: Passport, weights: Weights) -> dict[str, Any]:
    """What a run is to be repeated from: the engine, the weights of the metrics, versions."""
    import platform
    from dataclasses import asdict
    from importlib.metadata import PackageNotFoundError, version

    from dreammix_trt.core.files import sha256_of
    from dreammix_trt.core.passport import FILE_NAME

    versions = {"python": platform.python_version()}
    for package in ("dreammix-trt", "numpy", "pillow", "onnxruntime", "torch", "transformers", "flip-evaluator"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    made = {"passport_sha256": sha256_of(engine / FILE_NAME), "base": passport.base.get("name", "")}
    made |= {"base_key": passport.base_key, "backend": passport.backend, "precision": passport.precision}
    networks = {name: str(path) for name, path in asdict(weights).items() if path is not None and name != "judge"}
    return {"engine": made, "weights": networks, "versions": versions, "platform": platform.platform()}


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
