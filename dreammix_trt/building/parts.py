"""The parts of one base, and making those that the store lacks.

graph    a traced ONNX graph without weights; of the configuration alone
range    which units of a float16 VAE must stay float32; of its weights
onnx     one network: graph and weights
engine   one network's TensorRT plan, made of its onnx part
base     tokenizers and what the loop must know
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

from dreammix_trt.building.ingredients import Ingredients
from dreammix_trt.building.needs import check_needs
from dreammix_trt.building.part_store import PartStore
from dreammix_trt.core.errors import BuildError, FileFormatError
from dreammix_trt.core.files import read_json, share_file, write_json
from dreammix_trt.core.networks import Network
from dreammix_trt.core.slots import names_of_weights
from dreammix_trt.engine.directory import COST
from dreammix_trt.export.onnx_export import export_facts, export_network, find_shipped_graph, graph_digest, write_graph


class Parts:
    """Makes the parts of a base.

    ingredients: what they are made of.
    store: where they lie; told the progress.
    verify: see `export_network`.
    tell: called with what a person should know.
    """

    def __init__(
        self, ingredients: Ingredients, store: PartStore, verify: bool | None, tell: Callable[[str], None]
    ) -> None:
        self._ingredients, self._store, self._verify, self._tell = ingredients, store, verify, tell
        self._base, self._engine = ingredients.base, ingredients.engine

    def make(self) -> dict[str, Path]:
        """Folder of every part the runtime needs, made where the store lacked it."""
        networks = self._ingredients.networks
        for lora in self._ingredients.merged:
            if not any(lora.touches(network.name) for network in networks):
                raise FileFormatError(
                    f"{lora.lora.source_path}: changes nothing here: its target is {lora.target!r}, and this base has "
                    f"the networks {', '.join(network.name for network in networks)}"
                )
        check_needs(self._ingredients, self._store, self._tell)
        folders = {network.name: self.make_network(network) for network in networks}
        return {**folders, "base": self._make_base()}

    def _make_base(self) -> Path:
        base, slots, defaults = self._base, self._ingredients.slots, self._ingredients.defaults

        def make(out: Path) -> None:
            export_facts(base, slots, out, defaults)

        return self._store.provide("base", "base", self._ingredients.of_base(), make, needed=True)

    def make_network(self, network: Network) -> Path:
        """Folder of one network, made where the store lacked it."""
        network = self._mark_wide(network)
        if not self._engine.plans:
            return self._make_onnx(network, needed=True)
        facts = self._ingredients.of_plan(network)
        return self._store.provide(
            network.name, "engine", facts, lambda out: self._build_plan(network, out), needed=True
        )

    def _mark_wide(self, network: Network) -> Network:
        """A float16 VAE with the units marked that overflow in it."""
        if network.kind.call != "vae" or network.precision != "float16":
            return network
        from dreammix_trt.export.vae_range import Kind, find_wide_units

        def look(out: Path) -> None:
            found = find_wide_units(self._base, cast(Kind, network.name), self._engine.vae_images)
            write_json(out / "range.json", found.to_dict())

        folder = self._store.provide(network.name, "range", self._ingredients.of_range(network), look)
        report = read_json(folder / "range.json")
        if report["units"]:
            self._tell(
                f"{network.name}: activations reach {max(report['peaks'].values()):.3g}, too large for float16; "
                f"{report['units'][0]} to {report['units'][-1]} stay float32"
            )
        return replace(network, wide=tuple(report["units"]))

    def _make_onnx(self, network: Network, *, needed: bool) -> Path:
        facts = self._ingredients.of_onnx(network)
        return self._store.provide(network.name, "onnx", facts, lambda out: self._export(network, out), needed=needed)

    def _export(self, network: Network, out: Path) -> None:
        before = self._ingredients.sources_of(network.name)
        graph, loras = self._find_graph(network), self._ingredients.merged
        export_network(self._base, network, graph, out, loras=loras, verify=self._verify)
        if self._ingredients.sources_of(network.name) != before:
            raise BuildError(f"{network.name}: its files changed while they were read; build again")

    def _find_graph(self, network: Network) -> Path:
        network = network.plain  # layers are quantised in the graph of the network without
        shipped = find_shipped_graph(network)
        if shipped:
            return shipped
        facts = {"digest": graph_digest(network)}
        return self._store.provide(network.graph, "graph", facts, lambda out: write_graph(network, out))

    def _build_plan(self, network: Network, out: Path) -> None:
        """The plan of a network, from its onnx part (made first, where the store lacks it)."""
        from dreammix_trt.engine.backends.tensorrt.builder import build_engine

        source = self._make_onnx(network, needed=False)
        entry = read_json(source / "network.json")
        profiles = self._ingredients.profiles_of(network.name, entry["inputs"])
        report = build_engine(
            source / entry["graph"],
            out / f"{network.graph}.engine",
            backend=self._engine.backend,
            profiles=profiles,
            targets=self._engine.targets,
            workspace=self._engine.workspace,
            progress=lambda fraction, phase: self._store.update(network.name, fraction, phase),
        )
        if report.decomposed:
            self._tell(f"{network.name}: no fused kernel for some attention; {report.decomposed} may be taken apart")
        kept = {key: value for key, value in entry.items() if key not in ("graph", "weights", "initializers")}
        if "slot_weights" in entry:
            share_file(source / entry["slot_weights"], out / entry["slot_weights"])
        weights, told = set(names_of_weights(network.slots)), report.to_dict()
        told["inputs"] = [tensor for tensor in told["inputs"] if tensor["name"] not in weights]
        told["profiles"] = [
            {name: span for name, span in profile.to_dict().items() if name not in weights} for profile in profiles
        ]  # of hundreds of weights the slots say enough
        build = {**told, "export": read_json(source / COST)}
        write_json(out / "network.json", {**kept, "engine": f"{network.graph}.engine", "build": build})
