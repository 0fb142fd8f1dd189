"""Enrolling on a device: its networks are called one after the other, with arrays that come from the host and go back.

`engine/enrolment.py` says which network is called with what. A call is bound, run and let go, in memory that requests
have between them, so it takes none beside the plan's; the rows are data afterwards, as on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.axes import FACTOR, Sides, Tensor
from dreammix_trt.core.errors import DeviceError
from dreammix_trt.core.networks import kv_name, names_of_group, twin_name
from dreammix_trt.core.seam import Array, DeviceNetworks
from dreammix_trt.core.slots import Slot, names_of_weights
from dreammix_trt.core.subject_tokens import TokenConfig
from dreammix_trt.engine.device.arena import Pieces
from dreammix_trt.engine.device.choices import PRISTINE
from dreammix_trt.engine.device.room import KEYS_AND_VALUES, choose_twin
from dreammix_trt.engine.painting import check_finite

if TYPE_CHECKING:
    from dreammix_trt.engine.device.studio import Studio

#: those that `engine.enrolment` calls
NAMES: Final = (*names_of_group("text"), kv_name("unet"), "vae_encoder", *names_of_group("tokens"))


def measure(networks: DeviceNetworks, config: TokenConfig) -> int:
    """Bytes for the arrays of one call, those of the network with the largest."""
    there = [each for name in NAMES for each in (name, twin_name(name)) if each in networks]
    return max(_lay_arrays(networks, name, config).nbytes for name in there)


def _sides(config: TokenConfig) -> Sides:
    return Sides(1, 1, config.side // FACTOR, config.side // FACTOR)


def _list_tensors(networks: DeviceNetworks, name: str) -> Iterator[Tensor]:
    """A network's inputs and outputs, but for slots' weights, which are elsewhere."""
    weights = names_of_weights(networks.slots(name))
    return (each for each in (*networks.inputs(name), *networks.outputs(name)) if each.name not in weights)


def _lay_arrays(networks: DeviceNetworks, name: str, config: TokenConfig) -> Pieces:
    sides = _sides(config)
    return Pieces({each.name: (sides.shape(each), each.dtype) for each in _list_tensors(networks, name)})


class SingleCalls:
    """A studio's networks as those of the host (`core.seam.Networks`), with the base's own weights.

    studio: whose memory is free: no request is under way.
    config: of the references.
    safe: use the available float32 twins.
    """

    def __init__(self, studio: Studio, config: TokenConfig, safe: bool) -> None:
        self._studio, self._networks, self._config, self._safe = studio, studio.networks, config, safe

    def __contains__(self, name: str) -> bool:
        return name in self._networks

    def slots(self, name: str) -> tuple[Slot, ...]:
        """See `core.seam.Networks`."""
        return self._networks.slots(name)

    def weights(self, name: str) -> Mapping[str, npt.NDArray[Any]]:
        """See `core.seam.Networks`."""
        return self._networks.weights(name)

    def run(self, name: str, **arrays: Any) -> dict[str, npt.NDArray[Any]]:
        """Run a network; floats come back as float32. Raises NotFiniteError, ProfileError."""
        studio, networks = self._studio, self._networks
        actual = choose_twin(networks, name, self._safe)
        studio.residency.need(name, safe=self._safe)
        studio.weights.enter(PRISTINE, [name])
        places = _lay_arrays(networks, actual, self._config).cut(studio.arena[KEYS_AND_VALUES])
        outputs = [tensor.name for tensor in networks.outputs(actual)]
        for each, place in places.items():
            if each not in outputs:
                studio.put(place, np.asarray(arrays[each]).astype(place.dtype).reshape(place.shape))
        merged = {tensor.name for tensor in networks.inputs(actual)}
        held = {each: array for each, array in studio.weights.arrays(name).items() if each in merged}
        self._call(actual, places | held)
        found = {each: _widen(studio.bring(places[each])) for each in outputs}
        check_finite(name, found)
        return found

    def _call(self, actual: str, arrays: Mapping[str, Array]) -> None:
        """Bind a network or its twin, run it, wait, and let it go."""
        studio, sides = self._studio, _sides(self._config)
        with ExitStack() as made:
            workspace, need = studio.arena["workspace"], self._networks.workspace_bytes(actual, sides)
            if need > workspace.nbytes:  # twins are not counted there
                memory = studio.device.allocate(need)
                made.callback(memory.free)
                workspace = Array(memory.pointer, (need,), "uint8")
            bound = self._networks.bind(actual, sides, arrays, workspace)
            made.callback(bound.close)
            try:
                bound.enqueue(studio.stream)
                studio.pace.wait()
            except DeviceError:
                if studio.pace.lost:  # then nothing can be freed
                    made.pop_all()
                raise


def _widen(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.astype(np.float32) if values.dtype == np.float16 else values
