"""The weights of LoRA slots for each role: the base's own, but for those that a subject changes, merged when needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

from dreammix_trt.core.merging import check_subject, list_changes, merge_weights
from dreammix_trt.core.networks import twin_name
from dreammix_trt.core.seam import Networks
from dreammix_trt.core.subject import NOBODY, Role, Subject
from dreammix_trt.engine import kernels
from dreammix_trt.engine.runtime import find_subject

Arrays = Mapping[str, npt.NDArray[Any]]
WeightsOf = Callable[[str], Arrays]  # network -> weights that are not the base's own, by input
#: bytes of merged weights that are kept beside those of the present role; a full UNet has 2 GB in float16
_MOST_KEPT = 256 << 20


class HostWeights:
    """Merges the subjects of an engine. Merged weights are kept, within limits, for the roles used last.

    networks: of the base, whose own weights are never written.
    """

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._subjects: dict[str, Subject] = {}
        self._merged: dict[tuple[Role, str], Arrays] = {}  # by network; the role used last is the last one

    def add(self, name: str, subject: Subject) -> None:
        """Make a subject known, in place of one of the same name. Raises FileFormatError when it does not fit."""
        check_subject(subject, self._networks)
        self._drop(name)
        self._subjects[name] = subject

    def remove(self, name: str) -> None:
        """Forget a subject at all its strengths."""
        del self._subjects[name]
        self._drop(name)

    def use(self, role: Role, safe: bool = False) -> WeightsOf:
        """The weights of a role: network -> input -> merged weight, of the inputs that its subject changes.

        They stay good when the subject is removed or replaced meanwhile.

        safe: of the networks' twins, where they exist.

        Raises EngineError for a subject that was removed.
        """
        if role.name == NOBODY.name:
            return lambda network: {}
        known, subject = self._subjects.get(role.name), find_subject(self._subjects, role)
        used: dict[str, Arrays] = {}

        def find(network: str) -> Arrays:
            if network not in used:
                actual = twin_name(network) if safe and twin_name(network) in self._networks else network
                found = self._merged.pop((role, actual), None) if self._subjects.get(role.name) is known else None
                used[network] = self._merge(network, actual, subject) if found is None else found
                if self._subjects.get(role.name) is known:
                    self._merged[role, actual] = used[network]
                    self._trim(role)
            return used[network]

        return find

    def _merge(self, network: str, actual: str, subject: Subject) -> Arrays:
        """Merge a subject into the weights of `actual`: the network or its twin."""
        if subject.scale == 0:
            return {}
        changes = list_changes(subject.factors_for(network), self._networks.slots(actual), subject.scale)
        return merge_weights(self._networks.weights(actual), changes, kernels.merge_weight)

    def _trim(self, present: Role) -> None:
        """Forget what was not used for the longest time, beyond what may be kept."""
        sizes = {key: sum(array.nbytes for array in held.values()) for key, held in self._merged.items()}
        others = [key for key in sizes if key[0] != present]
        left = sum(sizes[key] for key in others)
        for key in others:
            if left <= _MOST_KEPT:
                return
            left -= sizes[key]
            del self._merged[key]

    def _drop(self, name: str) -> None:
        self._merged = {key: held for key, held in self._merged.items() if key[0].name != name}
