"""A base's networks in torch on a GPU, as the device runtime runs them: eager or compiled, any precision, any frame.

A back end of the seam (core/seam.py, `DeviceNetworks`). torch and CUDA's runtime share the device's primary context, so
the runtime's memory and streams serve torch as they are. Importing it imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreammix_trt.core.axes import Sides, Tensor
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import EngineError, InputError
from dreammix_trt.core.network_weights import BaseLora, weights_of
from dreammix_trt.core.networks import SLOT_RANK, Network, describe_networks, is_twin, plain_name, twin_name
from dreammix_trt.core.seam import Array, BaseFacts
from dreammix_trt.core.slots import Slot
from dreammix_trt.export.torch_backend.bound import TorchBound, memory_error, view_array
from dreammix_trt.export.torch_backend.resident import Resident, Shapes, Values, draw_weight, give_back
from dreammix_trt.export.torch_module import check_fit

DTYPES = ("float16", "bfloat16", "float32")
COMPILED = ("unet", "vae_encoder", "vae_decoder")  # graphs; the others run once a prompt and are small
MODE = "max-autotune-no-cudagraphs"  # the runtime captures graphs itself


class TorchNetworks:
    """See the module. Made by `of` or `random`; `close` or a with statement gives the memory back.

    In float16 and bfloat16 every network has a twin NAME_float32 of the weights before they were rounded. A network may
    be bound before it is loaded. Times and sizes are float32 always, and arrays of a bfloat16 network float32, as
    numpy has no bfloat16. Frame sides must be multiples of the base's divisor.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        facts: Any,
        values: Values,
        device: str,
        dtype: str,
        compile: bool | str,
        resident: Collection[str] | None,
    ) -> None:
        self.facts, self.device, self._mode = facts, _device(device), MODE if compile is True else compile or ""
        self._networks = {network.name: network for network in networks}
        own = getattr(torch, dtype)
        self._made = {
            name: Resident(network, values, torch.float32 if is_twin(name) else own, self.device)
            for name, network in self._networks.items()
        }
        usual = [name for name in self._networks if not is_twin(name)]
        try:
            for name in usual if resident is None else resident:
                self.load(name)
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(
        cls,
        base: BaseFiles,
        *,
        device: str = "cuda",
        dtype: str = "float16",
        compile: bool | str = False,
        slot_rank: int = SLOT_RANK,
        loras: Sequence[BaseLora] = (),
        names: Collection[str] | None = None,
        wide: Mapping[str, Sequence[str]] | None = None,
        facts: Any = None,
        resident: Collection[str] | None = None,
    ) -> TorchNetworks:
        """The networks of a base, its weights read one tensor at a time.

        device: "cuda", "cuda:1", "cpu"; dtype: one of `DTYPES`; compile: torch.compile the UNets and the VAE (True:
        `MODE`, or another mode's name), which the first `enqueue` of every `bind` waits for; slot_rank 0: no LoRA
        inputs; loras: merged into the weights; names: these networks only; wide: units of a float16 VAE that stay
        float32, by network (None: those that `vae_range` finds, seconds for SDXL; {}: none); facts: what `.facts`
        gives (None: the base's own, without defaults); resident: the networks whose weights come now (none, to plan
        memory first); None: all but float32 twins.

        Raises InputError for unknown options, EngineError for a device that torch has not, and what `load` raises.
        """

        def values(network: Network, shapes: Shapes) -> Callable[[str], Any]:
            weights = weights_of(base, network.name, loras)
            check_fit(network.name, {name: weights.shape(name) for name in weights}, shapes)
            return lambda name: torch.from_numpy(np.array(weights[name]))

        found = _list_networks(base, slot_rank, dtype, names)
        if dtype == "float16":
            found = [replace(network, wide=_wide_units(base, network, wide)) for network in found]
        return cls(found, facts or _facts(base), values, device, dtype, compile, resident)

    @classmethod
    def random(
        cls,
        configs: Mapping[str, dict[str, Any]],
        facts: Any = None,
        *,
        device: str = "cuda",
        dtype: str = "float16",
        compile: bool | str = False,
        slot_rank: int = SLOT_RANK,
        names: Collection[str] | None = None,
        patched: bool = True,
        seed: int = 0,
        resident: Collection[str] | None = None,
    ) -> TorchNetworks:
        """Networks of these configs ("unet", "vae", "text_encoder", "text_encoder_2") with random weights.

        They are drawn on the device, one tensor at a time, of a spread that keeps activations of order one; the same
        for the same seed, whatever the dtype, on one kind of device. patched: with `unet_raw` and a head, as a patched
        base has them. device "meta": sizes without memory; nothing can be bound. Else as `of`.
        """
        nowhere = Path("random") if patched else None
        base, place = BaseFiles(Path("random"), nowhere, nowhere, False, configs), _device(device)

        def values(network: Network, shapes: Shapes) -> Callable[[str], Any]:
            return lambda name: draw_weight((seed, plain_name(network.name), name), shapes[name], place)

        listed = _list_networks(base, slot_rank, dtype, names)
        return cls(listed, facts or _facts(base), values, device, dtype, compile, resident)

    def __enter__(self) -> TorchNetworks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._networks

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The LoRA slots of a network, in packed order."""
        return self._networks[name].slots if name in self._networks else ()

    def inputs(self, name: str) -> tuple[Any, ...]:
        """`Tensor`s (name, numpy dtype, shape with names of dynamic sides); LoRA factors are one packed `lora`."""
        return self._network(name).inputs

    def outputs(self, name: str) -> tuple[Any, ...]:
        """As `inputs`."""
        return self._network(name).outputs

    def frames(self) -> None:
        """Any size."""

    def contexts(self) -> tuple[int, ...] | None:
        """Any."""
        return None

    @property
    def most_pictures(self) -> None:
        """Any batch."""

    def weight_bytes(self, name: str) -> int:
        """Device memory of a network's weights while loaded."""
        self._network(name)
        return self._made[name].nbytes

    def workspace_bytes(self, name: str, sides: Sides) -> int:
        """0: torch allocates its own, a pool for each `bind`, as large as the activations of one pass need at once."""
        return 0

    def bind(self, name: str, sides: Sides, arrays: Mapping[str, Array], workspace: Array | None = None) -> TorchBound:
        """Fix shapes and addresses; arrays the network does not know are left out. The weights need not be there.

        Raises EngineError for arrays that are missing or of another shape or dtype.
        """
        network = self._network(name)
        inputs, outputs = (
            tuple(self._tensor(name, spec, sides, arrays) for spec in specs)
            for specs in (network.inputs, network.outputs)
        )
        mode = self._mode if network.graph in COMPILED and not is_twin(name) else ""
        return TorchBound(self._made[name], inputs, outputs, mode)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The networks whose weights are on the device now."""
        return tuple(name for name, resident in self._made.items() if resident.loaded)

    def unload(self, name: str) -> None:
        """Move a network's weights to pinned host memory, where they stay from then on.

        The caller has synchronised: nothing of the network may be under way. After `load` the weights lie elsewhere:
        what is bound goes on, but a graph captured before must be captured again. Raises MemoryError.
        """
        self._network(name)
        with memory_error(name):
            self._made[name].unload()

    def load(self, name: str) -> None:
        """Make the weights, or bring them back; waits.

        Raises FileFormatError for weights that do not fit the base's config or leave float16's range, MemoryError; then
        nothing has changed.
        """
        self._network(name)
        with memory_error(name):
            self._made[name].load()

    def close(self) -> None:
        """Give all weights back; what is bound is of no more use."""
        for resident in self._made.values():
            resident.close()
        self._networks, self._made = {}, {}
        give_back(self.device)

    def _network(self, name: str) -> Network:
        if name not in self._networks:
            raise EngineError(f"there is no network {name!r} here; there are {', '.join(self._networks) or 'none'}")
        return self._networks[name]

    def _tensor(self, name: str, spec: Tensor, sides: Sides, arrays: Mapping[str, Array]) -> torch.Tensor:
        array, shape = arrays.get(spec.name), sides.shape(spec)
        if array is None:
            raise EngineError(f"{name}: no array for {spec.name}; bind one of {shape} {spec.dtype}")
        if tuple(array.shape) != shape or array.dtype != spec.dtype:
            raise EngineError(
                f"{name}: {spec.name} is bound to {tuple(array.shape)} {array.dtype}; it takes {shape} {spec.dtype}"
            )
        return view_array(array, self.device)


def _facts(base: BaseFiles) -> BaseFacts:
    return BaseFacts(base.native_side, base.divisor, base.scaling_factor, base.feature_channels, {})


def _list_networks(base: BaseFiles, slot_rank: int, dtype: str, names: Collection[str] | None) -> list[Network]:
    """The networks and, but for float32, their twins."""
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    plain = {network.name: network for network in describe_networks(base, slot_rank)}
    unknown = sorted(set(names or ()) - set(plain))
    if unknown:
        raise InputError(f"names: {', '.join(unknown)}; this base has {', '.join(plain)}")
    chosen = {name: network for name, network in plain.items() if names is None or name in names}
    if dtype == "float32":
        return [*chosen.values()]
    own = (
        {network.name: network for network in describe_networks(base, slot_rank, "float16")}
        if dtype == "float16"
        else plain
    )
    return [*(own[name] for name in chosen), *(replace(chosen[name], name=twin_name(name)) for name in chosen)]


def _wide_units(base: BaseFiles, network: Network, given: Mapping[str, Sequence[str]] | None) -> tuple[str, ...]:
    from dreammix_trt.export.vae_range import wide_units

    if given is not None:
        return tuple(given.get(network.name, ()))
    if network.name == "vae_encoder":
        return wide_units(base, "vae_encoder").units
    return wide_units(base, "vae_decoder").units if network.name == "vae_decoder" else ()


def _device(name: str) -> torch.device:
    """With its index."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device is {name!r}: {error}") from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise EngineError("torch finds no CUDA device; use device='cpu' (`dreammix-trt doctor` tells more)")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
