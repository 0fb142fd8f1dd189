"""A base model -> the directory of ONNX graphs, weights and tables an engine is built from (docs/architecture.md).

Graphs depend on the configuration alone, so a base whose graphs were made before (the embedded model's are shipped)
only needs its weights written; then torch is not imported.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.checkpoint import TOKENIZERS, BaseFiles
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.export.networks import SLOT_RANK, Network, check_fit, networks_of, torch_module, weights_of
from dreammix_trt.export.parity import check_parity, check_sizes

log = logging.getLogger(__name__)

SCHEMA = 1
#: raised when the exporter's code gives other graphs for the same configuration
GRAPH_REVISION = 1
GRAPHS_TABLE = "graphs.json"
#: config entries that do not change a graph
_NO_MATTER = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "sample_size", "scaling_factor", "force_upcast",
    "initializer_factor", "initializer_range", "attention_dropout", "bos_token_id", "pad_token_id",
}  # fmt: skip
Progress = Callable[[str, int, int], None]


def export_base(
    base: BaseFiles,
    out_dir: str | Path,
    *,
    slot_rank: int = SLOT_RANK,
    graphs: str | Path | None = None,
    verify: bool | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `graphs/`, `weights/`, `networks.json`, `base.json` and both tokenizers into `out_dir`.

    graphs: a directory of graphs made before (None: `graphs/` in the base's folder, if any), used when it was made of
    equal configurations and slot rank; verify: compare every graph with torch (None: when graphs are newly exported;
    otherwise the figures of their export are carried along, marked "at export"); progress: called with
    (what, done, total). Gives the content of `networks.json`. Raises `BuildError` when a graph differs from torch by
    more than its bound, `MissingExtraError` when torch is needed and absent.
    """
    out = Path(out_dir)
    for folder in ("graphs", "weights"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    report = progress or (lambda what, done, total: None)
    networks = networks_of(base, slot_rank)
    table = _reused_graphs(base.folder / "graphs" if graphs is None else Path(graphs), networks, out / "graphs")
    reused = table is not None
    if table is None:
        table = _exported_graphs(networks, out / "graphs", report)
    check = not reused if verify is None else verify
    entries: dict[str, Any] = {}
    for number, network in enumerate(networks):
        report(f"{network.name}: weights" + (" and check" if check else ""), number, len(networks))
        entries[network.name] = _written_network(base, network, table, out, check, reused)
    if check:
        table["parity"] = {name: entry["parity"] for name, entry in entries.items()}
    _write_json(out / "graphs" / GRAPHS_TABLE, table)
    _copy_tokenizers(base, out)
    described = {"schema": SCHEMA, "slot_rank": slot_rank, "exporter": table["exporter"], "networks": entries}
    _write_json(out / "networks.json", described)
    _write_json(out / "base.json", _base_facts(base, networks, slot_rank))
    report("done", len(networks), len(networks))
    return described


def make_shipped_graphs(base: BaseFiles, out: str | Path, *, slot_rank: int = SLOT_RANK) -> None:
    """Export and check a base's graphs and put them, without weights, where `export_base(graphs=out)` finds them."""
    out = Path(out)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        export_base(base, scratch, slot_rank=slot_rank, graphs=Path(scratch) / "none", verify=True)
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(Path(scratch) / "graphs", out)


def graphs_digest(networks: tuple[Network, ...]) -> str:
    """sha256 of all that decides the graphs: configurations, inputs, outputs, slots, and the exporter's revision."""
    facts = {network.graph: [network.described(), _canonical(network.configs)] for network in networks}
    return hashlib.sha256(json.dumps([GRAPH_REVISION, facts], sort_keys=True, default=list).encode()).hexdigest()


def _canonical(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: {key: value for key, value in config.items() if key not in _NO_MATTER and not key.startswith("_")}
        for name, config in configs.items()
    }


def _reused_graphs(folder: Path, networks: tuple[Network, ...], out: Path) -> dict[str, Any] | None:
    """Copy graphs made before into `out`; None when there are none for these configurations."""
    path = folder / GRAPHS_TABLE
    if not path.is_file():
        return None
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if table.get("digest") != graphs_digest(networks):
        log.info("%s: made of other configurations or slots; exporting anew", folder)
        return None
    for graph, facts in table["graphs"].items():
        source = folder / f"{graph}.onnx"
        if not source.is_file() or hashlib.sha256(source.read_bytes()).hexdigest() != facts["sha256"]:
            log.warning("%s: missing or changed; exporting anew", source)
            return None
        shutil.copyfile(source, out / source.name)
    return table


def _exported_graphs(networks: tuple[Network, ...], out: Path, report: Progress) -> dict[str, Any]:
    from dreammix_trt.export.onnx_graph import exporter_versions, graph_of

    by_graph = {network.graph: network for network in networks[::-1]}
    graphs: dict[str, Any] = {}
    for number, (name, network) in enumerate(reversed(by_graph.items())):
        report(f"{name}: graph", number, len(by_graph))
        graph = graph_of(network)
        data = graph.proto.SerializeToString()
        (out / f"{name}.onnx").write_bytes(data)
        log.info("%s: %d nodes, %d bytes", name, len(graph.proto.graph.node), len(data))
        stored = {item.name: list(item.dims) for item in graph.proto.graph.initializer}
        weights = {
            weight: {"shape": stored[weight][::-1] if flipped else stored[weight], "transposed": flipped}
            for weight, flipped in graph.transposed.items()
        }
        graphs[name] = {"sha256": hashlib.sha256(data).hexdigest(), "initializers": weights}
    return {
        "schema": SCHEMA,
        "digest": graphs_digest(networks),
        "exporter": exporter_versions(),
        "graphs": graphs,
        "parity": {},
    }


def _written_network(
    base: BaseFiles, network: Network, table: Mapping[str, Any], out: Path, check: bool, reused: bool
) -> dict[str, Any]:
    from safetensors.numpy import save_file

    graph, weights_file = f"graphs/{network.graph}.onnx", f"weights/{network.name}.safetensors"
    weights = weights_of(base, network.name)
    initializers = table["graphs"][network.graph]["initializers"]
    used = {name: weights[name] for name in initializers if name in weights}
    check_fit(network.name, used, {name: tuple(facts["shape"]) for name, facts in initializers.items()})
    save_file(
        {name: _stored(used[name], facts["transposed"]) for name, facts in initializers.items()}, out / weights_file
    )
    entry = {"graph": graph, "weights": weights_file, **network.described(), "initializers": initializers}
    if check:
        module = torch_module(network, weights)
        figures = check_parity(network, out / graph, out / weights_file, module, check_sizes(base.divisor))
        return {**entry, "parity": {**figures, "checked": "at build"}}
    recorded = table["parity"].get(network.name)
    if recorded is None:
        log.warning("%s: its graph was never compared with torch; export with verify", network.name)
        return {**entry, "parity": {"checked": "never"}}
    return {**entry, "parity": {**recorded, "checked": "at export" if reused else "at build"}}


def _stored(weight: NDArray[np.float32], transposed: bool) -> NDArray[np.float32]:
    return np.ascontiguousarray(weight.T if transposed else weight, dtype=np.float32)


def _base_facts(base: BaseFiles, networks: tuple[Network, ...], slot_rank: int) -> dict[str, Any]:
    """What the loop must know of a base; `slots`: network -> number of slots and packed size."""
    slots = {
        network.name: {"count": len(network.slots), "packed": sum(slot.size for slot in network.slots)}
        for network in networks
        if network.slots
    }
    return {
        "schema": SCHEMA,
        "native_side": base.native_side,
        "latent_factor": 8,
        "latent_channels": base.latent_channels,
        "feature_channels": base.feature_channels,
        "divisor": base.divisor,
        "scaling_factor": base.scaling_factor,
        "patched": base.patch is not None,
        "patch_biases": base.patch_biases,
        "pad_tokens": {name: _pad_token(base.folder / name) for name in TOKENIZERS},
        "slot_rank": slot_rank,
        "slots": slots,
    }


def _copy_tokenizers(base: BaseFiles, out: Path) -> None:
    """vocab.json and merges.txt (taken out of tokenizer.json where a folder has only that) and the pad token."""
    for name in TOKENIZERS:
        source, target = base.folder / name, out / name
        target.mkdir(exist_ok=True)
        if (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
            for file in ("vocab.json", "merges.txt"):
                shutil.copyfile(source / file, target / file)
        else:
            _split_tokenizer(source / "tokenizer.json", target)
        _write_json(target / "special_tokens_map.json", {"pad_token": _pad_token(source)})


def _split_tokenizer(path: Path, target: Path) -> None:
    if not path.is_file():
        raise FileFormatError(f"{path.parent}: neither vocab.json with merges.txt nor tokenizer.json")
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (target / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (target / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _pad_token(folder: Path) -> str:
    """What fills a prompt up to 77: by tokenizer_config.json, else special_tokens_map.json, else the end mark."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            token = json.loads((folder / name).read_text(encoding="utf-8")).get("pad_token")
            if token is not None:
                return str(token["content"] if isinstance(token, dict) else token)
    return "<|endoftext|>"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
