"""A base's networks in torch on a GPU for the device runtime: eager or compiled, in any precision, for any frame.

A back end of the seam (core/seam.py, `DeviceNetworks`). torch and CUDA's runtime share the device's primary context, so
torch can use the runtime's memory and streams directly. Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from dreammix_trt.core.axes import Sides, Tensor
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import EngineError, InputError
from dreammix_trt.core.keymap import blocks_of
from dreammix_trt.core.network_weights import BaseLora, weights_of
from dreammix_trt.core.networks import Network, describe_networks, is_twin, plain_name, twin_name
from dreammix_trt.core.seam import Array, BaseFacts
from dreammix_trt.core.slots import Slot
from dreammix_trt.export.torch_backend.bound import TorchBound, translate_memory_errors, view_array
from dreammix_trt.export.torch_backend.resident import Resident, Shapes, Values, draw_weight, give_back
from dreammix_trt.export.torch_module import check_fit

DTYPES = ("float16", "bfloat16", "float32")
#: graphs to compile; the others run once per prompt and are small
COMPILED = ("unet", "vae_encoder", "vae_decoder", "asuka_decoder")
MODE = "max-autotune-no-cudagraphs"  # the runtime captures graphs itself


class TorchNetworks:
    """The networks of a base. Make it with `of` or `random`; `close` or a with statement gives the memory back.

    In float16 and bfloat16 every network that is not float32 in every build has a twin NAME_float32 with the weights
    before rounding. A network may be bound before it is loaded. Times and sizes are always float32. The arrays of a
    bfloat16 network are float32, because numpy has no bfloat16. Frame sides must be multiples of the base's divisor.
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
        self.facts, self.device, self._mode = facts, _find_device(device), MODE if compile is True else compile or ""
        self._networks = {network.name: network for network in networks}
        own = getattr(torch, dtype)
        self._made = {
            name: Resident(network, values, torch.float32 if is_twin(name) or network.kind.wide else own, self.device)
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
        slots: bool = True,
        loras: Sequence[BaseLora] = (),
        names: Collection[str] | None = None,
        wide: Mapping[str, Sequence[str]] | None = None,
        facts: Any = None,
        resident: Collection[str] | None = None,
    ) -> TorchNetworks:
        """Make the networks of a base. Reads weights one tensor at a time.

        device: "cuda", "cuda:1" or "cpu".
        dtype: one of `DTYPES`.
        compile: whether to torch.compile the UNets and the VAE. True: in mode `MODE`; or the name of another mode. The
            first `enqueue` of every `bind` waits for it.
        slots: whether the weights of LoRA slots are inputs; else no subject can be chosen.
        loras: merged into the weights.
        names: make only these networks.
        wide: network -> units of a float16 VAE that stay float32. None: those that `vae_range` finds, which takes
            seconds for SDXL; {}: none.
        facts: the value of `.facts`; None: the base's own, without defaults.
        resident: the networks to load now; empty: none, to plan memory first; None: all except float32 twins.

        Raises InputError for unknown options, EngineError for a device that torch does not have, and what `load`
        raises.
        """

        def values(network: Network, shapes: Shapes) -> Callable[[str], Any]:
            weights = weights_of(base, network.name, loras)
            check_fit(network.name, {name: weights.shape(name) for name in weights}, shapes)
            return lambda name: torch.from_numpy(np.array(weights[name]))

        found = _list_networks(base, slots, dtype, names)
        if dtype == "float16":
            found = [replace(network, wide=_choose_wide_units(base, network, wide)) for network in found]
        return cls(found, facts or _facts_of(base), values, device, dtype, compile, resident)

    @classmethod
    def random(
        cls,
        configs: Mapping[str, dict[str, Any]],
        facts: Any = None,
        *,
        device: str = "cuda",
        dtype: str = "float16",
        compile: bool | str = False,
        slots: bool = True,
        names: Collection[str] | None = None,
        patched: bool = True,
        seed: int = 0,
        resident: Collection[str] | None = None,
    ) -> TorchNetworks:
        """Make networks with random weights.

        Weights are drawn on the device, one tensor at a time, with a spread that keeps activations near one. The same
        seed gives the same weights in every dtype, on one kind of device.

        configs: of "unet", "vae", "text_encoder" and "text_encoder_2".
        device: as for `of`, or "meta": sizes without memory; nothing can be bound.
        patched: whether to make `unet_raw` and a head, as a patched base has them.
        seed: of the weights.
        dtype, compile, slots, names, facts, resident: as for `of`.
        """
        nowhere = Path("random") if patched else None
        base, place = BaseFiles(Path("random"), nowhere, nowhere, False, configs), _find_device(device)

        def values(network: Network, shapes: Shapes) -> Callable[[str], Any]:
            return lambda name: draw_weight((seed, plain_name(network.name), name), shapes[name], place)

        listed = _list_networks(base, slots, dtype, names)
        return cls(listed, facts or _facts_of(base), values, device, dtype, compile, resident)

    def __enter__(self) -> TorchNetworks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._networks

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The LoRA slots of a network."""
        return self._networks[name].slots if name in self._networks else ()

    def weights(self, name: str) -> Mapping[str, npt.NDArray[Any]]:
        """The base's own weights of the slots, in host memory from the first use on. Raises as `load`."""
        self._network(name)
        return self._made[name].slot_weights

    def inputs(self, name: str) -> tuple[Any, ...]:
        """The inputs of a network as `Tensor`s; the weights of slots are the last ones."""
        return self._network(name).inputs

    def outputs(self, name: str) -> tuple[Any, ...]:
        """The outputs of a network as `Tensor`s."""
        return self._network(name).outputs

    def frames(self) -> None:
        """None: frames of any size."""

    def contexts(self) -> tuple[int, ...] | None:
        """None: conditions of any length."""
        return None

    @property
    def most_pictures(self) -> None:
        """None: batches of any size."""

    @property
    def captures(self) -> bool:
        """On a GPU."""
        return bool(self.device.type == "cuda")

    def weight_bytes(self, name: str) -> int:
        """The device memory of a network's own weights while loaded."""
        self._network(name)
        return self._made[name].nbytes

    def workspace_bytes(self, name: str, sides: Sides) -> int:
        """0: torch allocates a pool for each `bind`, as large as the activations of one pass."""
        return 0

    def bind(self, name: str, sides: Sides, arrays: Mapping[str, Array], workspace: Array | None = None) -> TorchBound:
        """Fix shapes and addresses. The weights need not be loaded.

        sides: of the named axes.
        arrays: by name; those that the network does not know are ignored.
        workspace: not used.

        Raises EngineError for arrays that are missing or have another shape or dtype.
        """
        network = self._network(name)
        inputs, outputs = (
            tuple(self._view_tensor(name, spec, sides, arrays) for spec in specs)
            for specs in (network.inputs, network.outputs)
        )
        mode = self._mode if network.graph in COMPILED and not is_twin(name) else ""
        return TorchBound(self._made[name], inputs, outputs, mode)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The networks whose weights are on the device now."""
        return tuple(name for name, resident in self._made.items() if resident.loaded)

    def unload(self, name: str) -> None:
        """Move the weights of a network to pinned host memory. A copy stays there from then on.

        Synchronise before: nothing of the network may be running. `load` puts the weights at other addresses: what is
        bound stays usable, but graphs must be captured again.

        Raises MemoryError.
        """
        self._network(name)
        with translate_memory_errors(name):
            self._made[name].unload()

    def load(self, name: str) -> None:
        """Make the weights of a network, or bring them back. Waits until they are there.

        Raises FileFormatError for weights that do not fit the base's config or leave float16's range, and MemoryError.
        After an error nothing has changed.
        """
        self._network(name)
        with translate_memory_errors(name):
            self._made[name].load()

    def close(self) -> None:
        """Free all weights. What is bound can no longer be used."""
        for resident in self._made.values():
            resident.close()
        self._networks, self._made = {}, {}
        give_back(self.device)

    def _network(self, name: str) -> Network:
        if name not in self._networks:
            raise EngineError(f"there is no network {name!r} here; there are {', '.join(self._networks) or 'none'}")
        return self._networks[name]

    def _view_tensor(self, name: str, spec: Tensor, sides: Sides, arrays: Mapping[str, Array]) -> torch.Tensor:
        array, shape = arrays.get(spec.name), sides.shape(spec)
        if array is None:
            raise EngineError(f"{name}: no array for {spec.name}; bind one of {shape} {spec.dtype}")
        if tuple(array.shape) != shape or array.dtype != spec.dtype:
            raise EngineError(
                f"{name}: {spec.name} is bound to {tuple(array.shape)} {array.dtype}; it takes {shape} {spec.dtype}"
            )
        return view_array(array, self.device)


def _facts_of(base: BaseFiles) -> BaseFacts:
    blocks = blocks_of(base.configs["unet"])
    side = base.asuka.prior_side if base.asuka else None
    return BaseFacts(base.native_side, base.divisor, base.scaling_factor, base.feature_channels, {}, blocks, side)


def _list_networks(base: BaseFiles, slots: bool, dtype: str, names: Collection[str] | None) -> list[Network]:
    """List the networks and, unless dtype is float32, their twins."""
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    plain = {network.name: network for network in describe_networks(base, slots)}
    unknown = sorted(set(names or ()) - set(plain))
    if unknown:
        raise InputError(f"names: {', '.join(unknown)}; this base has {', '.join(plain)}")
    chosen = {name: network for name, network in plain.items() if names is None or name in names}
    if dtype == "float32":
        return [*chosen.values()]
    own = (
        {network.name: network for network in describe_networks(base, slots, "float16")}
        if dtype == "float16"
        else plain
    )
    twins = (replace(each, name=twin_name(name)) for name, each in chosen.items() if not each.kind.wide)
    return [*(own[name] for name in chosen), *twins]


def _choose_wide_units(base: BaseFiles, network: Network, given: Mapping[str, Sequence[str]] | None) -> tuple[str, ...]:
    from dreammix_trt.export.vae_range import Kind, find_wide_units

    if given is not None:
        return tuple(given.get(network.name, ()))
    narrow = network.kind.call == "vae" and not is_twin(network.name)
    return find_wide_units(base, cast(Kind, network.name)).units if narrow else ()


def _find_device(name: str) -> torch.device:
    """The torch device of a name, with its index."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device is {name!r}: {error}") from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise EngineError("torch finds no CUDA device; use device='cpu' (`dreammix-trt doctor` says more)")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
