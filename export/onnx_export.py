"""Turns a base model into the parts that engines are built from: a folder per network, and one for what they share.

A network's part is `GRAPH.onnx` (its weights are external, at offsets in the next file; any ONNX tool opens it),
`GRAPH.safetensors`, `GRAPH.slots.safetensors` (the base's own weights of its LoRA slots, which are inputs of the graph)
and `network.json`. The part `base` is `base.json` and both tokenizers. A graph depends only on the
configuration: traced once, it serves both UNets, every checkpoint of that shape, and machines without torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.axes import FLOAT8
from dreammix_trt.core.base_tokenizers import TOKENIZERS
from dreammix_trt.core.checkpoint import EMBEDDED, BaseFiles
from dreammix_trt.core.extras import list_missing
from dreammix_trt.core.files import read_json, write_json
from dreammix_trt.core.keymap import blocks_of
from dreammix_trt.core.network_weights import BaseLora, weights_of
from dreammix_trt.core.networks import Fused, Network, Precision, describe_networks, plain_name
from dreammix_trt.core.slots import gather_weight, names_of_weights
from dreammix_trt.core.tensors import Weights, map_tensors, write_tensors
from dreammix_trt.export.onnx_graph import Weight, place_weights
from dreammix_trt.export.parity import check_parity, choose_sizes
from dreammix_trt.export.torch_module import check_fit, make_torch_module

log = logging.getLogger(__name__)

SCHEMA = 3
#: increase it when the exporter's code makes other graphs for the same configuration
GRAPH_REVISION = 3
#: torch and ONNX Runtime together need eight bytes per parameter; `benchmarks/full_size.py` checks larger networks in
#: two processes
CHECKED_PARAMETERS = 200_000_000
#: config entries that do not change a graph
_IRRELEVANT = {
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "sample_size",
    "scaling_factor",
    "force_upcast",
    "initializer_factor",
    "initializer_range",
    "attention_dropout",
    "bos_token_id",
    "pad_token_id",
}
Progress = Callable[[str, int, int], None]


def export_base(
    base: BaseFiles,
    out_dir: str | Path,
    *,
    slots: bool = True,
    precision: Precision = "float32",
    fused: Fused = False,
    verify: bool | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Write every part of a base into folders of `out_dir`.

    Uses the graphs shipped with this package where they fit. Builds call the functions below one by one instead, so
    that each finished part is kept.

    slots: whether the weights of LoRA slots are inputs.
    precision, fused: see `Network`.
    verify: see `export_network`.
    progress: called with (what, done, total).

    Returns network -> its `network.json`.
    """
    out, networks = Path(out_dir), describe_networks(base, slots, precision, fused)
    report = progress or (lambda what, done, total: None)
    entries = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, network in enumerate(networks):
            report(network.name, number, len(networks))
            graph = find_shipped_graph(network) or Path(scratch) / network.graph
            if not graph.exists():
                graph.mkdir()
                write_graph(network, graph)
            (out / network.name).mkdir(parents=True)
            entries[network.name] = export_network(base, network, graph, out / network.name, verify=verify)
        (out / "base").mkdir()
        export_facts(base, slots, out / "base")
    report("done", len(networks), len(networks))
    return entries


def write_graph(network: Network, folder: Path) -> None:
    """Trace a network. Needs torch.

    folder: gets `graph.onnx` without weights and `graph.json`, which says what weights the graph needs.
    """
    from dreammix_trt.export.onnx_graph import exporter_versions, trace_graph

    graph = trace_graph(network)
    data = graph.proto.SerializeToString()
    log.info("%s: %d nodes, %d bytes", network.graph, len(graph.proto.graph.node), len(data))
    (folder / "graph.onnx").write_bytes(data)
    facts = {
        "schema": SCHEMA,
        "digest": graph_digest(network),
        "sha256": hashlib.sha256(data).hexdigest(),
        "exporter": exporter_versions(),
        "inputs": [item.name for item in graph.proto.graph.input],
        "weights": {name: list(weight) for name, weight in graph.weights.items()},
        "parity": {},
    }
    write_json(folder / "graph.json", facts)


def find_shipped_graph(network: Network) -> Path | None:
    """Find a graph with equal configurations and slots that was shipped with this package.

    Graphs beside a user's checkpoint are never used: the key of a part would not distinguish them from honest ones.

    Returns its folder, or None.
    """
    folder = EMBEDDED / "graphs" / network.graph
    if not (folder / "graph.json").is_file() or not (folder / "graph.onnx").is_file():
        return None
    facts = read_json(folder / "graph.json")
    if facts.get("digest") != graph_digest(network):
        return None
    if hashlib.sha256((folder / "graph.onnx").read_bytes()).hexdigest() != facts["sha256"]:
        log.warning("%s: changed since it was made; exporting again", folder)
        return None
    return folder


def make_shipped_graphs(base: BaseFiles, out: str | Path, *, slots: bool = True) -> None:
    """Trace and check the graphs of a base and write them without weights.

    out: the folder `graphs` of the embedded model, where `find_shipped_graph` looks.
    slots: whether the weights of LoRA slots are inputs.
    """
    out = Path(out)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        scratch = Path(name)
        for network in describe_networks(base, slots):
            graph = scratch / "graphs" / network.graph
            if not graph.exists():
                graph.mkdir(parents=True)
                write_graph(network, graph)
            (scratch / network.name).mkdir()
            entry = export_network(base, network, graph, scratch / network.name, verify=True)
            facts = read_json(graph / "graph.json")
            write_json(graph / "graph.json", {**facts, "parity": {**facts["parity"], network.name: entry["parity"]}})
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(scratch / "graphs", out)


def export_network(
    base: BaseFiles,
    network: Network,
    graph: Path,
    out: Path,
    *,
    loras: Sequence[BaseLora] = (),
    verify: bool | None = None,
) -> dict[str, Any]:
    """Write the part of one network. Weights go from the checkpoint to the part with one tensor in memory at a time.

    graph: the folder of its graph.
    out: the folder of the part.
    loras: merged into the weights.
    verify: whether to compare ONNX Runtime with torch. None: if torch is installed and the network is small enough;
        otherwise the figures from the making of the graph are copied and marked "at export".

    Returns its `network.json`. Raises `BuildError` when the graph differs from torch by more than its bound, and
    `FileFormatError` for weights that do not fit the graph or float16.
    """
    facts = read_json(graph / "graph.json")
    weights, file = weights_of(base, network.name, loras), out / f"{network.graph}.safetensors"
    wanted = {name: Weight(dtype, tuple(shape), turned) for name, (dtype, shape, turned) in facts["weights"].items()}
    _check_fit(network, weights, wanted)
    if network.float8:
        wanted = _write_quantized(network, graph / "graph.onnx", wanted, file)
    else:
        shutil.copyfile(graph / "graph.onnx", file.with_suffix(".onnx"))
    _write_weights(network, weights, wanted, file)
    described = network.describe()  # without inputs that have no effect: weights of a text encoder's unused last layer
    described["inputs"] = [spec for spec in described["inputs"] if spec["name"] in facts["inputs"]]
    slots = _write_slot_weights(network, weights, described["inputs"], file.with_suffix(".slots.safetensors"))
    entry = {
        "schema": SCHEMA,
        "graph": f"{network.graph}.onnx",
        "weights": file.name,
        **({"slot_weights": slots.name} if slots else {}),
        "exporter": facts["exporter"],
        **described,
        "initializers": {name: weight.transposed for name, weight in wanted.items()},
    }
    entry["parity"] = _find_parity(base, network, weights, facts, out, verify)
    write_json(out / "network.json", entry)
    return entry


def export_facts(base: BaseFiles, slots: bool, out: Path, defaults: Mapping[str, Any] | None = None) -> None:
    """Write the part `base`: the facts for the sampling loop (`base.json`) and both tokenizers.

    slots: whether the weights of LoRA slots are inputs.
    out: the folder of the part.
    defaults: fields of a request that suit this base (a few-step LoRA's sampler, steps and guidance).
    """
    facts = {
        "schema": SCHEMA,
        "native_side": base.native_side,
        "latent_factor": 8,
        "latent_channels": base.latent_channels,
        "feature_channels": base.feature_channels,
        "divisor": base.divisor,
        "scaling_factor": base.scaling_factor,
        "patched": base.patch is not None,
        "patch_biases": base.patch_biases,
        "head": base.head_padding if base.has_head else None,
        "pad_tokens": {name: base.tokenizers.pad_token(name) for name in TOKENIZERS},
        "slots": slots,
        "defaults": dict(defaults or {}),
        "unet": blocks_of(base.configs["unet"]),
        **describe_prior_side(base),
    }
    write_json(out / "base.json", facts)
    for name in TOKENIZERS:
        (out / name).mkdir()
        base.tokenizers.write(name, out / name)


def describe_prior_side(base: BaseFiles) -> dict[str, Any]:
    """What `base.json` says of ASUKA's prior: the side of its pictures; nothing where the base has none."""
    side = base.asuka.prior_side if base.asuka else None
    return {} if side is None else {"prior_side": side}


def graph_digest(network: Network) -> str:
    """sha256 of everything that decides a graph: configs, tensors, slots, precision, and the exporter's revision."""
    facts = [GRAPH_REVISION, network.describe(), _strip_configs(network.configs)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=list).encode()).hexdigest()


def _strip_configs(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: {key: value for key, value in config.items() if key not in _IRRELEVANT and not key.startswith("_")}
        for name, config in configs.items()
    }


def _write_quantized(network: Network, graph: Path, wanted: Mapping[str, Weight], file: Path) -> dict[str, Weight]:
    """Write the graph of a network with quantised layers, beside its weights; returns the forms that it needs."""
    import onnx

    from dreammix_trt.export.quantize import quantize_graph

    model, forms = quantize_graph(onnx.load(graph, load_external_data=False), network, wanted)
    place_weights(model.graph, forms, file.name)
    file.with_suffix(".onnx").write_bytes(model.SerializeToString())
    return forms


def _check_fit(network: Network, weights: Weights, wanted: Mapping[str, Weight]) -> None:
    """Raise `FileFormatError` for weights, those of slots too, that do not fit the graph."""
    shapes = {name: form.shape[::-1] if form.transposed else form.shape for name, form in wanted.items()}
    shapes |= {f"{slot.module}.weight": (slot.outputs, slot.inputs) for slot in network.slots}
    check_fit(network.name, {name: weights.shape(name) for name in shapes if name in weights}, shapes)


def _write_weights(network: Network, weights: Weights, wanted: Mapping[str, Weight], file: Path) -> None:
    """Write the weights as the graph needs them, without those that have no effect (a text encoder's last layer)."""

    def read(name: str) -> NDArray[np.float32]:
        if wanted[name].dtype == FLOAT8:
            return weights[name] / np.float32(network.float8[name.removesuffix(".weight")][1])
        return weights[name].T if wanted[name].transposed else weights[name]

    write_tensors(file, {name: (form.dtype, form.shape) for name, form in wanted.items()}, read)


def _write_slot_weights(
    network: Network, weights: Weights, inputs: Sequence[Mapping[str, Any]], file: Path
) -> Path | None:
    """Write the slots' weights as the graph's inputs want them; returns the file, or None where there are none.

    Where an input wants E4M3 codes they are float16 in the file: a subject is added to them before they are rounded.

    inputs: that the graph has.
    """
    kept_as = {FLOAT8: "float16"}
    shapes = {spec["name"]: (kept_as.get(spec["dtype"], str(spec["dtype"])), tuple(spec["shape"])) for spec in inputs}
    names = [name for name in names_of_weights(network.slots) if name in shapes]

    if names:
        wanted = {name: shapes[name] for name in names}
        write_tensors(file, wanted, lambda name: gather_weight(name, wanted[name][1], network.slots, weights))
    return file if names else None


def _find_parity(
    base: BaseFiles, network: Network, weights: Weights, facts: Mapping[str, Any], out: Path, verify: bool | None
) -> dict[str, Any]:
    size = sum(math.prod(weights.shape(name)) for name in weights)
    if network.float8 or network.precision == "bfloat16":  # they differ by more than any bound for faults
        return {"checked": "not", "parameters": size}
    possible = not list_missing(("torch", "diffusers"))
    if verify or (verify is None and possible and size <= CHECKED_PARAMETERS):
        return {**_check_graph(network, weights, out / f"{network.graph}.onnx", base.divisor), "checked": "at build"}
    recorded = facts["parity"].get(plain_name(network.name)) if base.folder == EMBEDDED else None
    return {**recorded, "checked": "at export"} if recorded else {"checked": "not", "parameters": size}


def _check_graph(network: Network, weights: Weights, graph: Path, divisor: int) -> dict[str, Any]:
    """Compare a graph with torch: with random weights in its slots, and with the base's own, which lie beside it."""
    sizes = choose_sizes(divisor)
    found = check_parity(network, graph, make_torch_module(network, weights), sizes)
    if network.slots:
        held = map_tensors(graph.with_suffix(".slots.safetensors"))
        plain = network.without_slots()
        own = check_parity(plain, graph, make_torch_module(plain, weights), sizes[:1], given=held)
        found |= {figure: max(found[figure], own[figure]) for figure in ("max_abs", "max_rel")}
    return found
