"""ONNX -> TensorRT plan, in the same code for both packages.

TensorRT-RTX builds for any of its GPUs, on a machine without one. TensorRT 11 builds for the GPU of this machine.

The graph decides the precision: both packages type networks strongly. Neither has a switch for the accumulator of a
float16 product, so they choose its width. A graph that must have float32 sums casts its operands. Plans are never made
version compatible: such plans carry host code, and a plan with host code is refused.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from dreammix_trt.core.errors import BuildError, EngineError, InputError
from dreammix_trt.core.files import atomic_file
from dreammix_trt.engine import hardware
from dreammix_trt.engine.backends.tensorrt.callbacks import HEARD, Events, get_logger, make_monitor, make_writer
from dreammix_trt.engine.backends.tensorrt.kernel_list import KernelCounts, count_kernels
from dreammix_trt.engine.backends.tensorrt.package import PACKAGES, Package, list_targets, load
from dreammix_trt.engine.backends.tensorrt.plans import holds_host_code, open_guarded_runtime, refuse_host_code
from dreammix_trt.engine.backends.tensorrt.profiles import Profile, Shape, fits, profiles_for

__all__ = [
    "BuildReport", "Estimate", "PlanTensor", "Profile", "build_engine", "check_room", "check_targets", "estimate_build",
    "fits", "holds_host_code", "list_targets", "name_targets", "open_guarded_runtime", "profiles_for",
    "refuse_host_code",
]  # fmt: skip

GIB: Final = 1 << 30
REVISION: Final = 3  # rises when `build_engine` builds something else from the same input; 3: one stream
MESSAGES: Final = 20  # kept of a build, each once
Progress = Callable[[float, str], None]
DTYPES: Final = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn", "INT64": "int64",
    "INT32": "int32", "INT8": "int8", "UINT8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class PlanTensor:
    """An input or output of the parsed network.

    shape: -1 is a dynamic side.
    """

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class BuildReport:
    """What a build did and took.

    seconds: wall time.
    engine_bytes: size of the plan.
    layers: of the parsed network.
    decomposed: how many attentions had no fused kernel.
    version: of the package.
    targets: the GPUs it was built for.
    inputs, outputs: of the network.
    messages: warnings, each once, at most MESSAGES.
    peak_rss: most memory of this process in bytes; None: unknown.
    peak_anonymous: the same without mapped files.
    kernels: what the plan launches, for each profile; TensorRT 11, which builds elsewhere, does not say it.
    """

    seconds: float
    engine_bytes: int
    layers: int
    decomposed: int
    backend: str
    version: str
    targets: tuple[str, ...]
    inputs: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    messages: tuple[str, ...]
    peak_rss: int | None = None
    peak_anonymous: int | None = None
    kernels: tuple[KernelCounts, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a passport."""
        return asdict(self)


@dataclass(frozen=True)
class Estimate:
    """What a build will need, in bytes.

    host_bytes: memory that cannot be dropped.
    disk_bytes: for the plan.
    """

    host_bytes: int
    disk_bytes: int


def build_engine(
    onnx: Path,
    out: Path,
    *,
    backend: str,
    profiles: Sequence[Profile],
    targets: Sequence[str] = (),
    workspace: int | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Build the plan of a network.

    onnx: a file, with external data beside it (read in place, by location, offset and length).
    out: where the plan is written, completely or not at all.
    profiles: shapes that the plan takes.
    targets: GPUs such as "sm_89", or "current"; TensorRT builds only for the GPU of this machine.
    workspace: the most bytes of scratch memory on the GPU; None: no limit.
    progress: called in the caller's thread with a fraction that never falls and the phase. An exception in it, or
        Ctrl-C, ends the build at its next step and leaves no file.

    Raises InputError for targets, EngineError for a missing package or GPU, BuildError for a network that cannot be
    built and for a full disk.
    """
    trt = load(backend)
    build = _Build(trt, backend, onnx, tuple(profiles), workspace, _find_capabilities(trt, backend, targets))
    if not onnx.is_file():
        raise BuildError(f"{onnx} is missing; export the networks again with `dreammix-trt build`")
    say = progress or (lambda fraction, phase: None)
    with atomic_file(out) as temporary, hardware.MemoryWatch() as watch, temporary.open("wb") as stream:
        report = _follow(build, stream, say)
        say(1.0, "done")
    return replace(report, targets=name_targets(targets), peak_rss=watch.rss, peak_anonymous=watch.anonymous)


def estimate_build(onnx_bytes: int, weight_bytes: int, backend: str) -> Estimate:
    """An upper bound of what building a network will need.

    onnx_bytes: of the graph file.
    weight_bytes: of the weights beside it.

    TensorRT-RTX 1.7, measured: the builder holds linear weights once or twice and convolutions twice, and writes the
    plan in pieces of 64 MiB (linears of 400 and 1200 MiB: 640 and 1445 MiB; convolutions of 450 MiB: 1014 MiB; a full
    UNet of 4.8 GiB: 12.0 GiB). TensorRT, which also times kernels on the GPU, was not measured: twice that.
    """
    host = 5 * GIB // 8 + weight_bytes * 12 // 5 + 8 * onnx_bytes
    disk = weight_bytes * 101 // 100 + 4 * onnx_bytes + (16 << 20)
    return Estimate(host if PACKAGES[backend].ahead else 2 * host, disk)


def check_room(need: Estimate, folder: Path) -> None:
    """Raise BuildError when memory (within the limits of the container) or the disk of `folder` will not suffice."""
    _, memory = hardware.measure_memory()
    disk = hardware.disk_free(folder)
    if memory is not None and memory < need.host_bytes:
        raise BuildError(
            f"the build needs {_spell_gib(need.host_bytes)} of memory and {_spell_gib(memory)} are free; end other "
            "programs, or build on a larger computer (tensorrt-rtx needs no GPU for that) and copy the engine"
        )
    if disk is not None and disk < need.disk_bytes:
        raise BuildError(
            f"{folder}: the engine needs {_spell_gib(need.disk_bytes)} and {_spell_gib(disk)} are free there; free "
            "some (`dreammix-trt store prune`), or choose another place with --store"
        )


@dataclass
class _Build:
    """One build, in its own thread. Call `run` once; `events` reports its progress; `cancelled` ends it."""

    trt: Any
    backend: str
    onnx: Path
    profiles: tuple[Profile, ...]
    workspace: int | None
    capabilities: tuple[Any, ...]
    events: Events = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def title(self) -> str:
        return PACKAGES[self.backend].title

    def run(self, stream: BinaryIO) -> BuildReport:
        """Parse, build, write. The package's messages arrive in this thread as well."""
        heard = HEARD.messages = []
        lists = HEARD.lists = []
        started = time.perf_counter()
        try:
            trt, builder = self.trt, self.trt.Builder(get_logger(self.trt))
            network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            self.events.put((0.0, "reading the network"))
            self._parse(network, heard)
            config = self._make_config(builder, network)
            decomposed = self._write_plan(builder, network, config, stream, heard)
            return BuildReport(
                seconds=time.perf_counter() - started,
                engine_bytes=stream.tell(),
                layers=network.num_layers,
                decomposed=decomposed,
                backend=self.backend,
                version=str(trt.__version__),
                targets=(),
                inputs=_read_tensors(network.get_input, network.num_inputs),
                outputs=_read_tensors(network.get_output, network.num_outputs),
                messages=_keep_messages(heard),
                kernels=count_kernels(lists),
            )
        finally:
            HEARD.messages = HEARD.lists = None
            self.events.put(None)

    def _parse(self, network: Any, heard: list[tuple[str, str]]) -> None:
        parser = self.trt.OnnxParser(network, get_logger(self.trt))
        if parser.parse_from_file(str(self.onnx)) and network.num_outputs:
            return
        weights = next((found[1] for _, text in heard if (found := re.search(r"WeightsContext\S+ (.+)", text))), None)
        if weights:
            raise BuildError(f"{self.onnx}: its weights are missing or cut ({weights}); export the networks again")
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        what = "; ".join(
            _describe_error(error.node_operator(), error.node_name(), error.desc()) for error in errors[:3]
        )
        raise BuildError(
            f"{self.onnx}: {self.title} {self.trt.__version__} cannot read it: {what or 'there is no network in it'}; "
            "export it again with `dreammix-trt build`, or use `--backend onnxruntime`"
        )

    def _make_config(self, builder: Any, network: Any) -> Any:
        trt, config = self.trt, builder.create_builder_config()
        config.set_flag(trt.BuilderFlag.TF32)
        config.progress_monitor = make_monitor(trt, self.events, self.cancelled)
        if self.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.workspace)
        config.max_aux_streams = 0  # plans are captured in graphs of one stream; forks cost launches there
        if PACKAGES[self.backend].ahead:
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # contexts never allocate while they run
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # prints the kernels; the plan keeps its size
        if self.capabilities:
            config.num_compute_capabilities = len(self.capabilities)
            for index, capability in enumerate(self.capabilities):
                config.set_compute_capability(capability, index)
        self._fix_sides(network)
        for profile in self.profiles:
            self._check(profile, network)
            ranges = builder.create_optimization_profile()
            for name, (low, usual, high) in profile.shapes.items():
                ranges.set_shape(name, low, usual, high)
            config.add_optimization_profile(ranges)
        return config

    def _fix_sides(self, network: Any) -> None:
        """Make sides static that no profile varies: the builder then computes with them."""
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            spans = [profile.shapes.get(tensor.name) for profile in self.profiles]
            if not spans or any(span is None or len(span[0]) != len(tensor.shape) for span in spans):
                continue  # `_check` reports what is wrong
            sides = zip(*(shape for span in spans if span for shape in span), strict=True)
            tensor.shape = [
                values[0] if have == -1 and len(set(values)) == 1 else have
                for have, values in zip(tuple(tensor.shape), sides, strict=True)
            ]

    def _check(self, profile: Profile, network: Any) -> None:
        wanted = {tensor.name: tensor.shape for tensor in _read_tensors(network.get_input, network.num_inputs)}
        if profile.shapes.keys() != wanted.keys():
            alone = [sorted(names) for names in (wanted.keys() - profile.shapes.keys(), profile.shapes.keys() - wanted)]
            raise BuildError(
                f"{self.onnx} and the profile differ: inputs without one are {', '.join(alone[0][:6]) or 'none'}, "
                f"profiles without an input {', '.join(alone[1][:6]) or 'none'}"
            )
        for name, shape in wanted.items():
            for given in profile.shapes[name]:
                if len(given) != len(shape) or any(
                    have not in (-1, side) for have, side in zip(shape, given, strict=True)
                ):
                    raise BuildError(
                        f"{self.onnx}: its input {name} is {list(shape)}, but the profile has {list(given)}"
                    )
            if any(sorted(sides) != list(sides) for sides in zip(*profile.shapes[name], strict=True)):
                raise BuildError(f"{self.onnx}: the profile's shapes of {name} do not grow: {profile.shapes[name]}")

    def _write_plan(
        self, builder: Any, network: Any, config: Any, stream: BinaryIO, heard: list[tuple[str, str]]
    ) -> int:
        """Write the plan. Returns the number of attentions that had to be taken apart for it."""
        decomposed = 0
        while not self._try_build(builder, network, config, stream):
            unfused = any("decomposable" in text for _, text in heard)
            if self.cancelled.is_set() or decomposed or not unfused:
                raise self._explain_failure(heard)
            # Some attention has a width or type without a fused kernel: let it be products and a softmax.
            decomposed = _allow_decomposition(self.trt, network)
            heard[:] = [entry for entry in heard if entry[0] == "WARNING"]
            stream.seek(0)
            stream.truncate()
        return decomposed

    def _try_build(self, builder: Any, network: Any, config: Any, stream: BinaryIO) -> bool:
        writer = make_writer(self.trt, stream)
        done = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.error is not None:  # the builder itself ignores a write that failed
            raise writer.error
        return bool(done)

    def _explain_failure(self, heard: list[tuple[str, str]]) -> BuildError:
        said = [text for level, text in heard if level != "WARNING" and _NO_DRIVER not in text]
        text = " ".join((said or [text for _, text in heard] or ["no reason given"])[-1].split())
        remedy = next((remedy for mark, remedy in _REMEDIES if mark in text), _REMEDIES[-1][1])
        return BuildError(f"{self.onnx}: {self.title} {self.trt.__version__} cannot build it: {text[:600]}; {remedy}")


_NO_DRIVER = "(cudaError 35"  # follows every other error where there is no driver
_REMEDIES: Final = (
    ("OutOfMemory", "give it more with --workspace"),
    ("workspace", "give it more with --workspace"),
    ("no optimization profile", "the network has dynamic sides and needs a profile for them"),
    ("Cuda Runtime", "this needs an NVIDIA driver; name the GPU with --target to build without one"),
    ("", "use `--backend onnxruntime`, and report this with the network's networks.json"),
)


def _follow(build: _Build, stream: BinaryIO, say: Progress) -> BuildReport:
    """Run a build in a thread, so that Ctrl-C and `say` reach this one. Any exception here ends the build."""
    with ThreadPoolExecutor(1, thread_name_prefix="tensorrt build") as pool:
        future = pool.submit(build.run, stream)
        try:
            for fraction, phase in _read_events(build, future):
                say(0.99 * fraction, phase)
            return future.result()
        except BaseException:
            build.cancelled.set()
            raise


def _read_events(build: _Build, future: Future[BuildReport]) -> Iterator[tuple[float, str]]:
    while True:
        try:
            event = build.events.get(timeout=0.2)  # a bounded wait, so that Ctrl-C works on every system
        except queue.Empty:
            if future.done():
                return
            continue
        if event is None:
            return
        yield event


def check_targets(backend: str, targets: Sequence[str]) -> None:
    """Raise InputError for GPUs that the back end cannot build for, EngineError where it is missing or needs a GPU."""
    _find_capabilities(load(backend), backend, targets)


def _find_capabilities(trt: Any, backend: str, targets: Sequence[str]) -> tuple[Any, ...]:
    """The builder's values for the GPUs to build for; empty where it builds for the GPU of this machine."""
    package = PACKAGES[backend]
    if not package.ahead:
        _check_at_hand(package, targets)
        return ()
    known = list_targets(trt)
    if not targets:
        raise InputError(f"name the GPUs to build for with --target: {', '.join(known)}, or current")
    if "current" in targets:
        if len(targets) > 1:
            raise InputError(f"targets are {', '.join(targets)}; current cannot be combined with others")
        if problem := _find_gpu_problem():
            raise EngineError(f"the target is current, but {problem}; name the GPU instead, e.g. --target sm_89")
        return (trt.ComputeCapability.CURRENT,)
    for target in targets:
        if target not in known:
            raise InputError(
                f"{package.title} {trt.__version__} cannot build for {target!r}; "
                f"it knows {', '.join(known)}, and current"
            )
    if len(set(targets)) < len(targets):
        raise InputError(f"targets are {', '.join(targets)}; name each once")
    return tuple(known[target] for target in targets)


def _check_at_hand(package: Package, targets: Sequence[str]) -> None:
    driver = hardware.ask_driver()
    if not driver.gpus:
        raise EngineError(
            f"{package.title} builds only for the GPU of this machine, and {driver.problem}; "
            "use `--backend tensorrt-rtx --target sm_89`, which builds without one"
        )
    here = driver.gpus[0]
    if any(target not in ("current", here.capability) for target in targets):
        raise InputError(
            f"{package.title} builds only for the GPU of this machine, {here.name} ({here.capability}), not for "
            f"{', '.join(targets)}; build there, or use `--backend tensorrt-rtx`"
        )


def name_targets(targets: Sequence[str]) -> tuple[str, ...]:
    """Names of the GPUs to build for. "current", or none, is the GPU of this machine."""
    if targets and "current" not in targets:
        return tuple(targets)
    return tuple(gpu.capability for gpu in hardware.ask_driver().gpus[:1])


def _find_gpu_problem() -> str | None:
    driver = hardware.ask_driver()
    return None if driver.gpus else driver.problem


def _allow_decomposition(trt: Any, network: Any) -> int:
    """Let every attention be taken apart where no fused kernel takes it. Returns how many there are."""
    count = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings return layers as their base class
            layer.attention.decomposable = True
            count += 1
    return count


def _read_tensors(get: Callable[[int], Any], count: int) -> tuple[PlanTensor, ...]:
    tensors = [get(index) for index in range(count)]
    return tuple(
        PlanTensor(str(tensor.name), DTYPES.get(tensor.dtype.name, tensor.dtype.name.lower()), tuple(tensor.shape))
        for tensor in tensors
    )


def _keep_messages(heard: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    texts = (" ".join(text.split())[:500] for _, text in heard if _NO_DRIVER not in text)
    return tuple(dict.fromkeys(texts))[:MESSAGES]


def _describe_error(operator: str, node: str, reason: str) -> str:
    where = f"{operator} {node!r}: " if operator else ""
    return where + " ".join(reason.partition("[checkMacros.cpp")[0].split())[:300]  # without the missing driver


def _spell_gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
