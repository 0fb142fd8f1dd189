"""The parts of one base: what each is made of, which the store has, and making the others.

    graph    a traced ONNX graph without weights; of the configuration alone
    range    which units of a float16 VAE must stay float32; of its weights
    onnx     one network: graph and weights
    engine   one network's TensorRT plan, made of its onnx part
    base     tokenizers and what the loop must know

A key holds everything that changes a part, and nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from dreammix_trt.core.axes import FACTOR
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.errors import BuildError, FileFormatError, InputError, MissingExtraError
from dreammix_trt.core.files import read_json, sha256_of, write_json
from dreammix_trt.core.network_weights import BaseLora, weights_of
from dreammix_trt.core.networks import KINDS, Network, Precision, describe_networks, is_twin, kind_of
from dreammix_trt.core.packing import pack
from dreammix_trt.core.slots import LORA_SIDES
from dreammix_trt.core.store import Store
from dreammix_trt.core.subject import Subject
from dreammix_trt.engine.backends.tensorrt.profiles import Profile, profiles_for
from dreammix_trt.engine.canvas.geometry import profile_sizes
from dreammix_trt.engine.canvas.tiles import SIDE, needs_tiles
from dreammix_trt.engine.directory import BACKENDS, COST
from dreammix_trt.export.onnx_export import (
    SCHEMA,
    export_facts,
    export_network,
    find_shipped_graph,
    graph_digest,
    write_graph,
)

GIB = 1 << 30
_MOST_CONTEXT = 4096  # rows of a condition; a typing error costs an hour of building else
#: what tracing a full-size UNet holds at once (measured: 4.9 GiB, with what the networks before it left 7)
_TRACING = 7 * GIB
_MESSAGES = {"graph": "tracing", "onnx": "weights", "range": "looking for overflow", "base": "tokenizers"}


@dataclass(frozen=True)
class EngineOptions:
    """What to build for.

    backend: "onnxruntime", "tensorrt-rtx" or "tensorrt"; default: tensorrt-rtx where targets are named, else
        onnxruntime.
    precision: "float32" or "float16"; default: float16 for TensorRT, float32 for ONNX Runtime.
    targets: GPUs as "sm_89", several if wanted, or "current".
    shapes: "static" (the base's native square) or "dynamic" (sides from 0.69 to 1.31 of it within its area, in two
        profiles).
    pictures: most in a batch.
    workspace: most bytes of scratch memory on the GPU.
    context: lengths of the text condition, each with profiles of its own (77: the text alone).
    vae_images: pictures on which a float16 VAE is looked at for overflow, besides the built-in ones.
    safe_vae: build a float16 VAE in float32 too, for pictures that are too much for it.
    """

    backend: str = ""
    precision: Precision | str = ""
    targets: tuple[str, ...] = ()
    shapes: str = "static"
    pictures: int = 1
    workspace: int | None = None
    context: tuple[int, ...] = (TOKENS,)
    vae_images: tuple[Path, ...] = ()
    safe_vae: bool = True

    def __post_init__(self) -> None:
        backend = self.backend or ("tensorrt-rtx" if self.targets else "onnxruntime")
        object.__setattr__(self, "backend", backend)
        object.__setattr__(self, "precision", self.precision or ("float16" if self.plans else "float32"))

    @property
    def plans(self) -> bool:
        """Whether plans are built, not just graphs."""
        return self.backend != "onnxruntime"

    @property
    def fused(self) -> bool:
        """Whether attention and group norm are single operators in the graphs."""
        return self.plans and self.precision == "float16"

    @property
    def version(self) -> str:
        """Of the back end's package; raises MissingExtraError when it is not installed."""
        from dreammix_trt.engine.machine import find_versions

        found = find_versions()
        version = found.get(self.backend) or (found.get("onnxruntime-gpu") if not self.plans else None)
        if version is None:
            extra = {"tensorrt-rtx": "rtx", "tensorrt": "trt"}.get(self.backend)
            package = f"dreammix-trt[{extra}]" if extra else self.backend
            raise MissingExtraError(f"{self.backend} is not installed, building for it needs it: pip install {package}")
        return version

    def check(self) -> None:
        """Raise InputError for what cannot be built, before anything is read."""
        for name, allowed in (
            ("backend", BACKENDS),
            ("precision", ("float32", "float16")),
            ("shapes", ("static", "dynamic")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.targets and not self.plans:
            raise InputError(f"targets are {', '.join(self.targets)}, but onnxruntime builds for no GPU in particular")
        if not 1 <= self.pictures <= 64:
            raise InputError(f"pictures is {self.pictures}; allowed: 1 to 64")
        if not self.context or any(not TOKENS <= length <= _MOST_CONTEXT for length in self.context):
            raise InputError(
                f"context is {','.join(map(str, self.context)) or 'empty'}; allowed: lengths from {TOKENS} to "
                f"{_MOST_CONTEXT}"
            )
        for image in self.vae_images:
            if not Path(image).is_file():
                raise InputError(f"{image}: no such picture (vae_images)")
        if self.vae_images and self.precision != "float16":
            raise InputError("vae_images are given, but only a float16 VAE is looked at for overflow")
        if not self.safe_vae and self.precision != "float16":
            raise InputError("safe_vae is off, but only a float16 VAE is built in float32 too; leave --no-safe-vae")
        if self.plans:
            from dreammix_trt.engine.backends.tensorrt.builder import check_targets

            _ = self.version
            check_targets(self.backend, self.targets)
        elif (self.shapes, self.pictures, self.workspace, self.context) != ("static", 1, None, (TOKENS,)):
            raise InputError(
                "shapes, pictures, workspace and context are TensorRT's; graphs for onnxruntime take any shape, batch "
                "and condition"
            )

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPUs that plans are for, by name also where "current" was asked for."""
        if not self.plans:
            return ()
        from dreammix_trt.engine.backends.tensorrt.builder import name_targets

        return name_targets(self.targets)

    def words(self) -> dict[str, Any]:
        """The options of the command line that say the same."""
        usual = EngineOptions(backend=self.backend)
        given: dict[str, Any] = {"backend": self.backend if self.plans else None, "target": list(self.targets)}
        given["precision"] = self.precision if self.precision != usual.precision else None
        given["shapes"] = self.shapes if self.shapes != usual.shapes else None
        given["pictures"] = self.pictures if self.pictures != usual.pictures else None
        given["workspace"] = self.workspace >> 20 if self.workspace else None  # the option counts MiB
        given["context"] = ",".join(map(str, self.context)) if self.context != usual.context else None
        given["vae_image"] = [str(image) for image in self.vae_images]
        given["no_safe_vae"] = not self.safe_vae
        return given


@dataclass
class Parts:
    """The parts of a base: `made` makes those the store lacks and gives each one's folder; `keys` are known then.

    user: the engine directory to be; loras: merged into the weights, each with its file's hash; defaults: of requests;
    verify: see `export_network`; update(part, fraction, message), tell(text): progress, and what a person should know.
    """

    shelf: Store
    user: Path
    base: BaseFiles
    slot_rank: int
    engine: EngineOptions
    loras: Sequence[tuple[BaseLora, str]]
    defaults: Mapping[str, Any]
    verify: bool | None
    update: Callable[[str, float, str], None]
    tell: Callable[[str], None]

    def __post_init__(self) -> None:
        self.keys: dict[str, str] = {}
        self._touched: set[str] = set()
        self._inner: list[float] = []  # seconds spent in the parts made on the way, per part under way

    @property
    def base_key(self) -> str:
        """Which weights and slots these are, whatever the back end and precision."""
        sources = {kind.component: self._sources(kind.name) for kind in KINDS}
        return Store.key({"sources": sources, "slot_rank": self.slot_rank})

    def check_fit(self, subject: Subject) -> None:
        """Raise FileFormatError (names and shapes listed) for a subject that does not fit the base's slots."""
        slots = {network.name: network.slots for network in self._networks()}
        for name, factors in subject.factors.items():
            if name not in slots:
                raise FileFormatError(
                    f"subject {subject.name}: has factors for {name}, which this base does not have; "
                    "give its LoRA the target 'patched'"
                )
            try:
                pack(factors, slots[name])
            except FileFormatError as error:
                raise FileFormatError(f"subject {subject.name}: {error}") from error

    def _networks(self) -> tuple[Network, ...]:
        networks = describe_networks(self.base, self.slot_rank, self._precision(), self.engine.fused)
        return tuple(network for network in networks if self.engine.safe_vae or not is_twin(network.name))

    def made(self) -> dict[str, Path]:
        """Folder of every part the runtime needs, made where the store lacked it."""
        networks = self._networks()
        for lora, _ in self.loras:
            if not any(lora.touches(network.name) for network in networks):
                raise FileFormatError(
                    f"{lora.lora.source_path}: changes nothing here: its target is {lora.target!r}, and this base has "
                    f"the networks {', '.join(network.name for network in networks)}"
                )
        self._announce(networks)
        folders = {network.name: self._network(network) for network in networks}
        facts = {
            "native_side": self.base.native_side,
            "configs": self.base.configs,
            "slot_rank": self.slot_rank,
            "tokenizer": self.base.content_hashes("tokenizer"),
            "defaults": dict(self.defaults),
            "head": self.base.head_padding if self.base.has_head else None,
            "patched": self.base.patch is not None,
            "patch_biases": self.base.patch_biases,
        }
        made = self._part(
            "base", "base", facts, lambda out: export_facts(self.base, self.slot_rank, out, self.defaults)
        )
        return {**folders, "base": made}

    def files(self) -> dict[str, str]:
        """Of every file "PART/FILE" -> sha256, but for the cost of its making: a part made again is the same part."""
        return {
            f"{name}/{file}": digest
            for name, key in self.keys.items()
            for file, digest in self.shelf.files(key).items()
            if file != COST
        }

    def _precision(self) -> Precision:
        return "float16" if self.engine.precision == "float16" else "float32"

    def _network(self, network: Network) -> Path:
        network = self._ranged(network)
        facts = self._onnx_facts(network)
        if not self.engine.plans:
            return self._part(network.name, "onnx", facts, lambda out: self._export(network, out))
        built = self._plan_facts(network, facts)
        return self._part(network.name, "engine", built, lambda out: self._build(network, facts, out))

    def _plan_facts(self, network: Network, onnx_facts: Mapping[str, Any]) -> dict[str, Any]:
        from dreammix_trt.engine.backends.tensorrt.builder import REVISION

        return {
            "revision": REVISION,
            "onnx": self._key(network.name, "onnx", onnx_facts),
            "backend": self.engine.backend,
            "version": self.engine.version,
            "targets": sorted(self.engine.gpus),
            "workspace": self.engine.workspace,
            "profiles": [profile.to_dict() for profile in self._profiles(network.name, network.describe()["inputs"])],
            **self._machine(),
        }

    def _profiles(self, name: str, inputs: Sequence[Mapping[str, Any]]) -> tuple[Profile, ...]:
        """Of a network with these inputs. Where frames are so large that the VAE gets them in tiles, it takes tiles."""
        side, divisor, shapes = self.base.native_side, self.base.divisor, self.engine.shapes

        def made(shapes: str, side: int) -> tuple[Profile, ...]:
            return profiles_for(
                inputs,
                pictures=self.engine.pictures,
                shapes=shapes,
                latent_side=side // FACTOR,
                step=divisor // FACTOR,
                contexts=sorted(set(self.engine.context)),
            )

        frames = [(side, side)] if shapes == "static" else profile_sizes(side, divisor)
        if kind_of(name).call != "vae" or not any(needs_tiles(*frame) for frame in frames):
            return made(shapes, side)
        tile = made("static", FACTOR * SIDE)
        return tile if shapes == "static" else (*made(shapes, side), *tile)

    def _machine(self) -> dict[str, Any]:
        """What else decides a plan that is built for the GPU at hand."""
        if self.engine.backend == "tensorrt-rtx" and "current" not in self.engine.targets:
            return {}
        from dreammix_trt.engine.hardware import ask_driver

        return {"gpus": [[gpu.name, gpu.capability] for gpu in ask_driver().gpus[:1]]}

    def _onnx_facts(self, network: Network) -> dict[str, Any]:
        return {"layout": SCHEMA, "graph": graph_digest(network), "sources": self._sources(network.name)}

    def _sources(self, name: str) -> dict[str, Any]:
        """Everything that decides the weights of a network: for half a VAE, all of the VAE."""
        component = kind_of(name).component
        touching = [[digest, lora.scale, lora.target] for lora, digest in self.loras if lora.touches(name)]
        biases = {"patch_biases": self.base.patch_biases} if component == "unet" and self.base.patch else {}
        return {"files": self.base.content_hashes(component), "loras": touching, **biases}

    def _ranged(self, network: Network) -> Network:
        """A float16 VAE with the units marked that overflow in it."""
        if not network.kind.twin or network.precision != "float16":
            return network
        from dreammix_trt.export.vae_range import REVISION, Kind, wide_units

        images = self.engine.vae_images
        facts = {
            "revision": REVISION,
            "sources": self._sources(network.name),
            "config": self.base.configs["vae"],
            "images": [sha256_of(image) for image in images],
        }

        def look(out: Path) -> None:
            write_json(out / "range.json", wide_units(self.base, cast(Kind, network.name), images).to_dict())

        report = read_json(self._part(network.name, "range", facts, look) / "range.json")
        if report["units"]:
            self.tell(
                f"{network.name}: activations reach {max(report['peaks'].values()):.3g}, too large for float16; "
                f"{report['units'][0]} to {report['units'][-1]} stay float32"
            )
        return replace(network, wide=tuple(report["units"]))

    def _export(self, network: Network, out: Path) -> None:
        loras, before = [lora for lora, _ in self.loras], self._sources(network.name)
        export_network(self.base, network, self._graph(network), out, loras=loras, verify=self.verify)
        if self._sources(network.name) != before:
            raise BuildError(f"{network.name}: its files changed while they were read; build again")

    def _graph(self, network: Network) -> Path:
        shipped = find_shipped_graph(network)
        if shipped:
            return shipped
        facts = {"digest": graph_digest(network)}
        return self._part(network.graph, "graph", facts, lambda out: write_graph(network, out))

    def _build(self, network: Network, onnx_facts: Mapping[str, Any], out: Path) -> None:
        """The plan of a network, from its onnx part (made first, where the store lacks it)."""
        from dreammix_trt.engine.backends.tensorrt.builder import build_engine

        source = self._part(network.name, "onnx", onnx_facts, lambda folder: self._export(network, folder))
        entry = read_json(source / "network.json")
        profiles = self._profiles(network.name, entry["inputs"])
        report = build_engine(
            source / entry["graph"],
            out / f"{network.graph}.engine",
            backend=self.engine.backend,
            profiles=profiles,
            targets=self.engine.targets,
            workspace=self.engine.workspace,
            progress=lambda fraction, phase: self.update(network.name, fraction, phase),
        )
        if report.decomposed:
            self.tell(f"{network.name}: no fused kernel for some attention; {report.decomposed} may be taken apart")
        kept = {key: value for key, value in entry.items() if key not in ("graph", "weights", "initializers")}
        told = report.to_dict()
        told["inputs"] = [tensor for tensor in told["inputs"] if not tensor["name"].endswith(LORA_SIDES)]
        told["profiles"] = [
            {name: span for name, span in profile.to_dict().items() if not name.endswith(LORA_SIDES)}
            for profile in profiles
        ]  # of a thousand LoRA factors the slots say enough
        build = {**told, "export": read_json(source / COST)}
        write_json(out / "network.json", {**kept, "engine": f"{network.graph}.engine", "build": build})

    def _key(self, name: str, kind: str, facts: Mapping[str, Any]) -> str:
        return Store.key({"kind": kind, "part": name, **facts})

    def _part(self, name: str, kind: str, facts: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The folder of a part, made with `make(folder)` where the store lacks it."""
        key = self._key(name, kind, facts)
        if kind in ("engine", "base") or (kind == "onnx" and not self.engine.plans):
            self.keys[name] = key
        self._touched.add(key)
        self.shelf.register(self.user, self._touched)  # so that nobody prunes it while this build goes on
        found = self.shelf.sound(key)
        if found is None:
            self.update(name, 0.0, _MESSAGES.get(kind, "starting"))
            with self.shelf.put(key, {"kind": kind, "part": name, **facts}) as folder:
                if folder is not None:  # else another process has just made it
                    self._costed(make, folder)
            found = self.shelf.get(key)
        assert found is not None
        if name in self.keys and self.keys[name] == key:
            self.update(name, 1.0, "in the store")
        return found

    def _costed(self, make: Callable[[Path], None], folder: Path) -> None:
        """Make a part and note beside it what that took, without the parts made on the way."""
        from dreammix_trt.engine.hardware import MemoryWatch, give_back_memory

        started = time.perf_counter()
        self._inner.append(0.0)
        with MemoryWatch() as watch:
            make(folder)
        spent, inner = time.perf_counter() - started, self._inner.pop()
        if self._inner:
            self._inner[-1] += spent
        give_back_memory()
        cost = {"seconds": spent - inner, "peak_rss": watch.rss, "peak_anonymous": watch.anonymous}
        write_json(folder / COST, cost)

    def _announce(self, networks: Sequence[Network]) -> None:
        """Say before the start what is to be made and what that needs; refuse when it is not there."""
        from dreammix_trt.engine.backends.tensorrt.builder import Estimate, check_room, estimate

        needs = []
        for network in networks:
            weights = weights_of(self.base, network.name, [lora for lora, _ in self.loras])  # refuses what does not fit
            if network.kind.twin and network.precision == "float16":
                # small, and which units are float32 is not known yet
                continue
            facts = self._onnx_facts(network)
            if self.engine.plans and self.shelf.get(
                self._key(network.name, "engine", self._plan_facts(network, facts))
            ):
                continue
            size = 2 if network.precision == "float16" else 4
            count = size * sum(math.prod(weights.shape(name)) for name in weights)
            if self.shelf.get(self._key(network.name, "onnx", facts)) is None:
                needs.append(Estimate(_TRACING if count > GIB else 0, count))
            if self.engine.plans:
                needs.append(estimate(4 << 20, count, self.engine.backend))
        if not needs:
            return
        total = Estimate(max(need.host_bytes for need in needs), sum(need.disk_bytes for need in needs))
        if total.disk_bytes > GIB:
            self.tell(
                f"building needs up to {total.host_bytes / GIB:.1f} GiB of memory at a time and "
                f"{total.disk_bytes / GIB:.1f} GiB of disk in {self.shelf.root}"
            )
        check_room(total, self.shelf.root)
