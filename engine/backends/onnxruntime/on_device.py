"""A base's networks on ONNX Runtime's CUDA provider, bound to the runtime's own memory and stream.

A back end of `networks.DeviceNetworks`. It serves every GPU that ONNX Runtime does and needs no engine built for it;
the price is one launch after the other, as it cannot be captured (`OnnxBound.capturable`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.axes import Sides, Tensor
from dreammix_trt.core.errors import DeviceError, EngineError, InputError, OutOfMemoryError
from dreammix_trt.core.networks import is_twin
from dreammix_trt.core.onnx_runtime import KEEP_QUANTIZERS, import_onnxruntime
from dreammix_trt.core.seam import Array, BaseFacts, Stream
from dreammix_trt.core.slots import Slot, slots_of
from dreammix_trt.engine.backends.onnxruntime.engine_set import (
    REBUILD,
    list_parts,
    map_weights,
    read_facts,
    read_network,
)
from dreammix_trt.engine.canvas.geometry import Size
from dreammix_trt.engine.hardware import count_cores

if TYPE_CHECKING:
    import onnxruntime

log = logging.getLogger(__name__)
#: the first ONNX Runtime whose CUDA provider has flash and memory-efficient kernels for ONNX's Attention
ATTENTION_FROM = (1, 25)
_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
PROVIDERS = {"cuda": _CUDA, "cpu": _CPU}


class OnnxNetworks:
    """See the module. One session per network, made by `open` or `load`. `close` or a with statement frees them.

    ONNX Runtime ties a session to one stream when it is made. So these networks belong to one stream of the runtime,
    and each of several contexts on a device needs its own networks.
    """

    def __init__(
        self,
        parts: Mapping[str, Path],
        facts: BaseFacts,
        entries: Mapping[str, Mapping[str, Any]],
        stream: Stream,
        *,
        provider: str = "cuda",
        memory_limit: int | None = None,
    ) -> None:
        self.facts, self._parts, self._entries, self._stream = facts, parts, entries, stream
        self.provider, self._providers = provider, _choose_providers(provider, stream, memory_limit)
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._weights: dict[str, dict[str, npt.NDArray[Any]]] = {}
        self.bound: list[OnnxBound] = []

    @classmethod
    def open(
        cls,
        parts: str | Path | Mapping[str, Path],
        stream: Stream,
        *,
        provider: str = "cuda",
        memory_limit: int | None = None,
        resident: Collection[str] | None = None,
    ) -> OnnxNetworks:
        """Open the networks of a base.

        parts: name -> folder, or the folder that holds them all.
        stream: the only one in which they will run.
        provider: "cuda", or "cpu", which runs on host memory where `enqueue` is called.
        memory_limit: bytes that one network's scratch memory and weights may take; None: no limit.
        resident: the networks that get a session now (none, to plan memory first); None: all but float32 twins.

        Raises EngineError for parts that are not valid, lack a file, or are engines of another back end, InputError for
        unknown providers, DeviceError where ONNX Runtime has no CUDA, OutOfMemoryError.
        """
        if provider not in PROVIDERS:
            raise InputError(f"provider is {provider!r}; allowed: {', '.join(PROVIDERS)}")
        places = parts if isinstance(parts, Mapping) else list_parts(Path(parts))
        entries = {name: read_network(folder) for name, folder in places.items() if name != "base"}
        for name, entry in entries.items():
            if not entry.get("graph"):
                raise EngineError(f"{places[name]}: {name} is not an ONNX graph; build with `--backend onnxruntime`")
            for file in filter(None, map(entry.get, ("graph", "weights", "slot_weights"))):
                if not (places[name] / file).is_file():
                    raise EngineError(f"{places[name] / file}: missing, so {name} cannot run; {REBUILD}")
        if provider == "cuda":
            _warn_of_old_kernels(entries)
        facts = read_facts(places["base"])
        opened = cls(places, facts, entries, stream, provider=provider, memory_limit=memory_limit)
        usual = [name for name in entries if not is_twin(name)]
        for name in usual if resident is None else resident:
            opened.load(name)
        return opened

    def __enter__(self) -> OnnxNetworks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The LoRA slots of a network."""
        return slots_of(self._entries[name]) if name in self._entries else ()

    def weights(self, name: str) -> Mapping[str, npt.NDArray[Any]]:
        """The base's own weights of the slots, mapped from their file at first use."""
        if name not in self._weights:
            self._weights[name] = map_weights(self._parts[name], self._entry(name))
        return self._weights[name]

    def inputs(self, name: str) -> tuple[Tensor, ...]:
        """Those in `network.json`."""
        return tuple(map(Tensor.of, self._entry(name)["inputs"]))

    def outputs(self, name: str) -> tuple[Tensor, ...]:
        """Those in `network.json`."""
        return tuple(map(Tensor.of, self._entry(name)["outputs"]))

    def frames(self) -> tuple[Size, ...] | None:
        """None: any size."""
        return None

    def contexts(self) -> tuple[int, ...] | None:
        """None: any length."""
        return None

    @property
    def most_pictures(self) -> int | None:
        """None: any batch."""
        return None

    @property
    def captures(self) -> bool:
        """Never (`OnnxBound.capturable`)."""
        return False

    def weight_bytes(self, name: str) -> int:
        """The size of the weights' file: ONNX Runtime takes at least that much."""
        file = self._entry(name).get("weights")
        return (self._parts[name] / file).stat().st_size if file else 0

    def workspace_bytes(self, name: str, sides: Sides) -> int:
        """0: ONNX Runtime allocates its own."""
        return 0

    def bind(self, name: str, sides: Sides, arrays: Mapping[str, Array], workspace: Array | None = None) -> OnnxBound:
        """Fix shapes and addresses. Arrays that the network does not know are ignored.

        Raises EngineError for arrays that are missing or of another shape or dtype.
        """
        found: dict[str, Array] = {}
        for tensor in (*self.inputs(name), *self.outputs(name)):
            array, shape = arrays.get(tensor.name), sides.shape(tensor)
            if array is None:
                raise EngineError(f"{name}: no array for {tensor.name}; bind one of {shape} {tensor.dtype}")
            if array.shape != shape or array.dtype != tensor.dtype:
                raise EngineError(
                    f"{name}: {tensor.name} is bound to {array.shape} {array.dtype}; it takes {shape} {tensor.dtype}"
                )
            found[tensor.name] = array
        bound = OnnxBound(self, name, {tensor.name for tensor in self.inputs(name)}, found)
        self.bound.append(bound)
        return bound

    @property
    def loaded(self) -> tuple[str, ...]:
        """The networks that have a session now."""
        return tuple(self._sessions)

    def unload(self, name: str) -> None:
        """Drop a network's session and all its memory. Nothing of it may still run in the stream."""
        self._entry(name)
        for bound in self.bound:
            if bound.name == name:
                bound.lapse()
        self._sessions.pop(name, None)

    def load(self, name: str) -> None:
        """Make a session again from the files: seconds for a large network. Raises EngineError, OutOfMemoryError."""
        self._entry(name)
        if name not in self._sessions:
            self._sessions[name] = self._open_session(name)

    def session(self, name: str) -> onnxruntime.InferenceSession:
        """The session of a loaded network."""
        if name not in self._sessions:
            raise EngineError(f"{name} cannot run: load it first")
        return self._sessions[name]

    def serves(self, stream: Stream) -> bool:
        """Whether work that is enqueued in a stream runs there; in host memory always, as all runs at once."""
        return self.provider == "cpu" or stream.handle == self._stream.handle

    def close(self) -> None:
        """Free every session."""
        for bound in self.bound:
            bound.lapse()
        self._sessions.clear()
        self._entries = {}

    def _entry(self, name: str) -> Mapping[str, Any]:
        if name not in self._entries:
            raise EngineError(f"there is no network {name!r} here; there are {', '.join(self._entries) or 'none'}")
        return self._entries[name]

    def _open_session(self, name: str) -> onnxruntime.InferenceSession:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = count_cores() if self.provider == "cpu" else 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry(*KEEP_QUANTIZERS)
        graph = self._parts[name] / self._entries[name]["graph"]
        try:
            session = ort.InferenceSession(str(graph), options, providers=self._providers)
        except Exception as error:  # ONNX Runtime raises its own unrelated classes
            raise _explain_failure(f"{graph}: {name} cannot be loaded", error, REBUILD) from error
        if PROVIDERS[self.provider] not in session.get_providers():  # it warns and takes the CPU
            raise DeviceError(f"ONNX Runtime cannot use this GPU for {name} (see `dreammix-trt doctor`)")
        return session


class OnnxBound:
    """A network bound to arrays. The binding is made again when the network was unloaded and loaded."""

    def __init__(self, networks: OnnxNetworks, name: str, inputs: set[str], arrays: Mapping[str, Array]) -> None:
        self._networks, self.name, self._inputs = networks, name, inputs
        self._arrays: Mapping[str, Array] | None = arrays
        self._bound: Any = None  # holds the session, too

    @property
    def capturable(self) -> bool:
        """Never.

        Within a pass ONNX Runtime takes scratch memory from an arena that passes share, so a graph would hold addresses
        that other passes use as well. A first pass, or a larger one, allocates. Its own graphs (`enable_cuda_graph`)
        cannot be part of a caller's.
        """
        return False

    def enqueue(self, stream: Stream) -> None:
        """Run once in the stream of the networks (provider "cpu": now).

        ONNX Runtime's host thread prepares shapes as it goes, but does not wait for the device.

        Raises EngineError for another stream, when it is closed or its network unloaded, and for ONNX Runtime's own
        errors; OutOfMemoryError.
        """
        if not self._networks.serves(stream):
            raise EngineError(f"{self.name} runs in the stream that it was opened with alone; open networks for each")
        session = self._networks.session(self.name)
        if self._bound is None:
            self._bound = self._bind_arrays(session)
        try:
            session.run_with_iobinding(self._bound, self._run_options)
        except Exception as error:  # ONNX Runtime raises its own unrelated classes
            raise _explain_failure(f"{self.name} failed", error, "see ONNX Runtime's message") from error

    def close(self) -> None:
        """Forget the arrays; again does nothing."""
        self._arrays = self._bound = None
        if self in self._networks.bound:
            self._networks.bound.remove(self)

    def lapse(self) -> None:
        """Drop the session: its memory is free when nobody holds it."""
        self._bound = None

    @cached_property
    def _run_options(self) -> onnxruntime.RunOptions:
        """Of every run: it does not wait for the device."""
        options = import_onnxruntime().RunOptions()
        options.log_severity_level = 3
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def _bind_arrays(self, session: onnxruntime.InferenceSession) -> Any:
        if self._arrays is None:
            raise EngineError(f"{self.name} cannot run: it is closed, bind it again")
        binding = session.io_binding()
        for name, array in self._arrays.items():
            bind = binding.bind_input if name in self._inputs else binding.bind_output
            bind(name, self._networks.provider, 0, np.dtype(array.dtype).type, array.shape, array.pointer)
        return binding


def _warn_of_old_kernels(entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Warn where this ONNX Runtime has no kernel on GPUs for attention as a single operator."""
    version = str(import_onnxruntime().__version__)
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if number < ATTENTION_FROM and any(entry.get("fused") == "attention" for entry in entries.values()):
        log.warning(
            "onnxruntime-gpu %s computes attention in parts, or on the processor: install %s or newer",
            version,
            ".".join(map(str, ATTENTION_FROM)),
        )


def _choose_providers(
    provider: str, stream: Stream, memory_limit: int | None
) -> list[str | tuple[str, dict[str, str]]]:
    """The providers of a session. Raises DeviceError where ONNX Runtime cannot use them."""
    ort = import_onnxruntime()
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise DeviceError(
            f"ONNX Runtime has no {PROVIDERS[provider]} here: `pip install onnxruntime-gpu`, then "
            "`dreammix-trt doctor --mend`, as it shares its folder with onnxruntime"
        )
    if provider == "cpu":
        return [_CPU]
    if not stream.handle:  # for 0 ONNX Runtime makes its own stream
        raise DeviceError("ONNX Runtime cannot run in the default stream; make one for it")
    options = {
        "device_id": "0",
        "user_compute_stream": str(stream.handle),
        "do_copy_in_default_stream": "1",
        "enable_cuda_graph": "0",
        "arena_extend_strategy": "kSameAsRequested",  # by default it takes up to twice as much as it needs
    }
    if memory_limit is not None:
        options["gpu_mem_limit"] = str(memory_limit)
    return [(_CUDA, options), _CPU]


def _explain_failure(what: str, error: Exception, remedy: str) -> EngineError:
    """The error with a remedy. Only ONNX Runtime's message shows lack of memory."""
    text = " ".join(str(error).split())
    if any(sign in text for sign in ("Failed to allocate memory", "out of memory", "Available memory of")):
        return OutOfMemoryError(f"{what}: the device has too little memory ({text}); take a smaller batch or frame")
    return EngineError(f"{what} ({text}); {remedy}")
