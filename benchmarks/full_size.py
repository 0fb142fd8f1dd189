"""Does a real-size SDXL go through: checkpoint, patch, head and LoRAs in, engines for an RTX 4090 out, without a GPU?

Writes the files a user would hold (random weights, exact formats), builds a base and two subjects by the command line,
and runs the UNet once in torch and in ONNX Runtime, in processes of their own. `--width 0.2` is the same in miniature.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _asuka_files import asuka_config, write_asuka_folder
from _common import Benchmark
from _sdxl_files import sdxl_configs, write_head, write_lora, write_patch, write_single_file, write_tokenizers
from _token_files import write_token_adapter

GIB, MIB = 1 << 30, 1 << 20
LATENT = 32
#: what is told of each profile's kernels, by the names of `KernelCounts`
KERNELS = (
    "total", "products", "narrow_products", "wide_products", "attentions", "scores", "residuals", "copies", "waits",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=float, default=1.0, help="1.0: SDXL itself; 0.2: miniature, some minutes")
    parser.add_argument("--folder", type=Path, help="where files, store and engines go, and stay (default: temporary)")
    parser.add_argument("--target", action="append", help="GPUs to build for (default: sm_89)")
    parser.add_argument("--shapes", default="static", choices=("static", "dynamic"))
    parser.add_argument("--precision", default="float16", choices=("float16", "fp8"), help="fp8: UNets in E4M3")
    parser.add_argument("--only", choices=("asuka", "tokens"), help="these networks alone, without the base's own")
    parser.add_argument("--no-call", action="store_true", help="without the UNet call")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    name = "full_size" if given.width == 1 else f"full_size_{given.width:g}"
    name += "_fp8" if given.precision == "fp8" else ""
    name += f"_{given.only}" if given.only else ""
    bench = Benchmark(name if given.shapes == "static" else f"{name}_{given.shapes}")
    folder = given.folder or Path(tempfile.mkdtemp(prefix="full-size-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        files = written(bench, folder, given.width)
        if given.only:
            build_alone(bench, folder, files, given.only, given.target or ["sm_89"], given.shapes)
            return bench.finish(as_json=given.json)
        if given.precision == "fp8":
            files["calibration"] = write_ranges(folder / "calibration.json", files)
        engines(bench, folder, files, given.target or ["sm_89"], given.shapes)
        if not given.no_call and given.precision != "fp8":
            unet_call(bench, folder, files)
    finally:
        if given.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    return bench.finish(as_json=given.json)


def written(bench: Benchmark, folder: Path, width: float) -> dict[str, Path]:
    """What a user would hold, by option name; files that are there are kept."""
    configs = sdxl_configs(width)
    files = {
        "base": folder / "sdxl.safetensors",
        "patch": folder / "inpaint_v26.fooocus.patch",
        "head": folder / "fooocus_inpaint_head.pth",
        "mug": folder / "mug.safetensors",
        "teapot": folder / "teapot.safetensors",
        "asuka": folder / "asuka",
        "tokens": folder / "token_adapter.safetensors",
    }
    started = time.perf_counter()
    if not files["teapot"].exists():
        write_single_file(files["base"], configs)
        write_patch(files["patch"], configs)
        write_head(files["head"], configs)
        write_lora(files["mug"], configs)
        write_lora(files["teapot"], configs, seed=9, dialect="kohya_sgm")
        bench.add("files: written [s]", time.perf_counter() - started)
    if not (files["asuka"] / "config.json").exists():
        write_asuka_folder(files["asuka"], asuka_config(configs, width))
    if not files["tokens"].exists():
        write_token_adapter(files["tokens"], configs)
    if width != 1:
        write_tokenizers(folder / "tokenizers", configs)
        files["tokenizer"] = folder / "tokenizers"
    for key in ("base", "patch", "mug"):
        bench.add(f"files: {key} [MiB]", files[key].stat().st_size / MIB)
    return files


def write_ranges(file: Path, files: dict[str, Path]) -> Path:
    """A calibration as `dreammix-trt calibrate` writes it, with made-up ranges.

    Pictures of random weights mean nothing, and running a full-size base takes hours without a GPU. All layers but
    those that are never quantised compute in E4M3.
    """
    from dreammix_trt.core.calibration import Calibration, Layer, key_of_unet
    from dreammix_trt.core.checkpoint import BaseFiles
    from dreammix_trt.core.networks import describe_networks
    from dreammix_trt.export.calibrating import UNETS, list_layers
    from dreammix_trt.export.torch_module import make_torch_module

    base = BaseFiles.open(files["base"], files["patch"], files["head"], tokenizer=files.get("tokenizer"))
    unets = [network for network in describe_networks(base, False) if network.name in UNETS]
    layers = {name: Layer(16.0, 0.5) for name in list_layers(make_torch_module(unets[0]).network)}
    sources = {network.name: key_of_unet(base, network.name) for network in unets}
    Calibration(base.name, sources, ("made up",), dict.fromkeys(sources, layers)).write(file)
    return file


def engines(bench: Benchmark, folder: Path, files: dict[str, Path], targets: list[str], shapes: str) -> None:
    """A base with its first subject, then a second subject, each by the command line."""
    common = ["--base", files["base"], "--patch", files["patch"], "--head", files["head"], "--asuka", files["asuka"]]
    common += ["--tokenizer", files["tokenizer"]] if "tokenizer" in files else []
    if "calibration" in files:
        common += ["--precision", "fp8", "--calibration", files["calibration"]]
    common += ["--store", folder / "store", "--shapes", shapes]
    common += [word for target in targets for word in ("--target", target)]
    first = seconds_of("build", "--out", folder / "engine-mug", "--lora", files["mug"], *common, folder=folder)
    bench.add("whole set: wall [s]", first, bound="<= 1500")
    passport = json.loads((folder / "engine-mug" / "passport.json").read_text())
    for network in passport["networks"]:
        parts_of(bench, folder, passport, network)
    add_asuka(bench, [each for each in passport["networks"] if each["name"].startswith("asuka_")])
    kinds = {"graph": "tracing", "onnx": "export", "engine": "engines"}
    costs = all_costs(folder / "store")
    for kind, said in kinds.items():
        if costs[kind]:
            peak = max(cost["peak_anonymous"] for cost in costs[kind]) / GIB
            bench.add(f"{said}: wall of all [s]", sum(cost["seconds"] for cost in costs[kind]))
            bench.add(f"{said}: peak anonymous memory [GiB]", peak, bound="<= 12")
    stored = sum(file.stat().st_size for file in (folder / "store").rglob("*") if file.is_file())
    bench.add("store: all parts [GiB]", stored / GIB)
    second = seconds_of("build", "--out", folder / "engine-teapot", "--lora", files["teapot"], *common, folder=folder)
    bench.add("second subject: wall [s]", second, bound="<= 10")
    size = sum(file.stat().st_size for file in (folder / "engine-teapot").rglob("*") if file.is_file())
    bench.add("second subject: bytes [MB]", size / 1e6, bound="<= 25")


def parts_of(bench: Benchmark, folder: Path, passport: dict[str, Any], network: dict[str, Any]) -> None:
    """The rows of one network: what its export and its engine took and weigh."""
    manifest = json.loads((folder / "store" / passport["parts"][network["name"]] / "manifest.json").read_text())
    add_parts(bench, folder / "store" / manifest["parts"]["onnx"], network)
    name, build = network["name"], network["build"]
    if "float8" in passport["base"] and name in passport["base"]["float8"]["unets"]:
        bench.add(f"{name}: plan in E4M3 [GB]", build["engine_bytes"] / 1e9, bound="<= 2.8")


def add_parts(bench: Benchmark, onnx: Path, network: dict[str, Any]) -> None:
    """onnx: folder of the graph that the engine was built of."""
    name, build = network["name"], network["build"]
    size = sum(file.stat().st_size for file in onnx.iterdir() if file.suffix in (".onnx", ".safetensors"))
    rows = {
        "export [s]": build["export"]["seconds"],
        "ONNX [MiB]": size / MIB,
        "engine [s]": build["seconds"],
        "engine: peak memory [GiB]": build["peak_rss"] / GIB,
        "engine: of that anonymous [GiB]": build["peak_anonymous"] / GIB,
        "engine [MiB]": build["engine_bytes"] / MIB,
    }
    for number, counts in enumerate(build.get("kernels", ())):
        profile = f"profile {number}: "
        rows |= {f"{profile}{what.replace('_', ' ')}": counts[what] for what in KERNELS}
        rows[f"{profile}largest value between kernels [MiB]"] = counts["largest_bytes"] / MIB
    for what, value in rows.items():
        bench.add(f"{name}: {what}", value)
    if build["messages"]:
        bench.add(f"{name}: builder's warnings", "; ".join(build["messages"])[:200])


def build_alone(
    bench: Benchmark, folder: Path, files: dict[str, Path], group: str, targets: list[str], shapes: str
) -> None:
    """Plans of a group's networks alone, of the same parts as a build of the whole base makes."""
    from dreammix_trt.building.engine_options import EngineOptions
    from dreammix_trt.building.ingredients import Ingredients
    from dreammix_trt.building.part_store import PartStore
    from dreammix_trt.building.parts import Parts
    from dreammix_trt.core.checkpoint import BaseFiles
    from dreammix_trt.core.store import Store

    sources = {"tokenizer": files.get("tokenizer"), group: files[group]}
    base = BaseFiles.open(files["base"], files["patch"], files["head"], **sources)
    ingredients = Ingredients(base, True, EngineOptions(targets=tuple(targets), shapes=shapes), (), {})
    shelf = Store(folder / "store")
    store = PartStore(shelf, folder / f"engine-{group}", lambda *told: sys.stderr.write(f"{told}\n"))
    parts = Parts(ingredients, store, None, lambda text: bench.add("told", text[:200]))
    made = []
    for network in ingredients.networks:
        if network.kind.group == group:
            place = parts.make_network(network)
            entry = json.loads((place / "network.json").read_text())
            manifest = json.loads((place / "manifest.json").read_text())
            add_parts(bench, folder / "store" / manifest["parts"]["onnx"], {**entry, "name": network.name})
            made.append(entry)
    if group == "asuka":
        add_asuka(bench, made)
    else:
        add_tokens(bench, files[group], made)


def add_tokens(bench: Benchmark, adapter: Path, networks: list[dict[str, Any]]) -> None:
    """What a token adapter takes beside the base."""
    builds = [network["build"] for network in networks]
    seconds = sum(build["seconds"] + build["export"]["seconds"] for build in builds)
    bench.add("tokens: adapter [MiB]", adapter.stat().st_size / MIB)
    bench.add("tokens: export and engines of the networks [s]", seconds, bound="<= 240")
    bench.add("tokens: engines [MiB]", sum(build["engine_bytes"] for build in builds) / MIB)
    peak = max(max(build["peak_anonymous"], build["export"]["peak_anonymous"]) for build in builds) / GIB
    bench.add("tokens: peak anonymous memory [GiB]", peak, bound="<= 12")


def add_asuka(bench: Benchmark, networks: list[dict[str, Any]]) -> None:
    """What ASUKA's networks take beside the base, the decoder's float32 twin as well."""
    builds = [network["build"] for network in networks]
    seconds = sum(build["seconds"] + build["export"]["seconds"] for build in builds)
    bench.add("asuka: export and engines of both networks [s]", seconds, bound="<= 240")
    peak = max(max(build["peak_anonymous"], build["export"]["peak_anonymous"]) for build in builds) / GIB
    bench.add("asuka: peak anonymous memory [GiB]", peak, bound="<= 12")


def all_costs(store: Path) -> dict[str, list[dict[str, float]]]:
    """What making the parts took, by kind; an export's own, without the tracing inside it."""
    found: dict[str, list[dict[str, float]]] = {"graph": [], "onnx": [], "engine": []}
    for manifest in store.glob("*/manifest.json"):
        kind = json.loads(manifest.read_text())["parts"].get("kind")
        if kind in found:
            found[kind].append(json.loads((manifest.parent / "cost.json").read_text()))
    return found


def seconds_of(*words: object, folder: Path) -> float:
    """Wall seconds of one `dreammix-trt` command."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "dreammix_trt", *map(str, words)]
    subprocess.run(command, check=True, env={**os.environ, "DREAMMIX_HOME": str(folder / "home")})
    return time.perf_counter() - started


def unet_call(bench: Benchmark, folder: Path, files: dict[str, Path]) -> None:
    """One call of the patched UNet with a LoRA in its slots: torch in float32 against the float16 graph."""
    passport = json.loads((folder / "engine-mug" / "passport.json").read_text())
    manifest = json.loads((folder / "store" / passport["parts"]["unet"] / "manifest.json").read_text())
    onnx = folder / "store" / manifest["parts"]["onnx"]
    inputs = folder / "inputs.npz"
    paths = [str(files[key]) for key in ("base", "patch", "head", "mug")] + [str(files.get("tokenizer", ""))]
    for kind, source in (("make inputs", ""), ("torch", ""), ("onnxruntime", str(onnx))):
        code = f"import full_size; full_size.child({kind!r}, {str(inputs)!r}, {source!r}, {paths!r})"
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "DREAMMIX_HOME": str(folder / "home")},
        )
        if kind != "make inputs":
            figures = json.loads(done.stdout.splitlines()[-1])
            bench.add(f"UNet call at {LATENT}x{LATENT}, {kind} [s]", figures["seconds"])
            bench.add(f"UNet call, {kind}: peak memory [GiB]", figures["peak"] / GIB)
    truth, found = (np.load(inputs.with_suffix(f".{kind}.npy")) for kind in ("torch", "onnxruntime"))
    error = float(np.abs(found - truth).max() / np.abs(truth).max())
    bench.add("UNet call: largest difference / largest value", error, bound="<= 0.02")
    rms = float(np.sqrt(np.mean((found - truth) ** 2) / np.mean(truth**2)))
    bench.add("UNet call: rms difference / rms value", rms)
    bench.add("UNet call: rms of eps", float(np.sqrt(np.mean(truth**2))))


def child(kind: str, inputs: str, onnx: str, paths: list[str]) -> None:
    """One side of `unet_call`, in a process of its own."""
    from dreammix_trt.core.checkpoint import BaseFiles
    from dreammix_trt.core.lora import read_lora
    from dreammix_trt.core.merging import list_changes, merge_weights
    from dreammix_trt.core.network_weights import weights_of
    from dreammix_trt.core.networks import describe_networks
    from dreammix_trt.core.slots import gather_weight, names_of_weights
    from dreammix_trt.export.parity import OnnxNetwork, run_torch
    from dreammix_trt.export.torch_module import make_torch_module

    base = BaseFiles.open(*paths[:3], tokenizer=paths[4] or None)
    network = next(each for each in describe_networks(base, precision="float16", fused=True) if each.name == "unet")
    if kind == "make inputs":
        made = network.draw_example({"pictures": 1, "rows": 2, "h": LATENT, "w": LATENT})
        factors, held = read_lora(paths[3], base.configs["unet"]).factors["unet"], weights_of(base, "unet")
        for name in names_of_weights(network.slots):
            made[name] = gather_weight(name, made[name].shape, network.slots, held).astype(np.float16)
        made |= merge_weights(made, list_changes(factors, network.slots))
        np.savez(inputs, **made)
        return
    arrays = dict(np.load(inputs))
    run = (
        (lambda: run_torch(make_torch_module(network, weights_of(base, "unet")), network, arrays))
        if kind == "torch"
        else (lambda: OnnxNetwork(Path(onnx) / "unet.onnx", light=True).run(**arrays))
    )
    started = time.perf_counter()
    eps = run()["eps"]
    seconds = time.perf_counter() - started
    np.save(Path(inputs).with_suffix(f".{kind}.npy"), eps.astype(np.float32))
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak": peak}))


if __name__ == "__main__":
    sys.exit(main())
