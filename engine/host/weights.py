"""The weights of LoRA slots for each role: the base's own, but for those that a subject changes, merged when needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy.typing as npt

from dreammix_trt.core.merging import check_subject, list_changes, merge_weights
from dreammix_trt.core.networks import twin_name
from dreammix_trt.core.seam import Networks
from dreammix_trt.core.subject import Role, Subject, stack_pairs
from dreammix_trt.core.token_adapter import TokenAdapter
from dreammix_trt.core.token_factors import read_as_subject
from dreammix_trt.engine import kernels
from dreammix_trt.engine.runtime import find_subject

Arrays = Mapping[str, npt.NDArray[Any]]
WeightsOf = Callable[[str], Arrays]  # network -> weights that are not the base's own, by input
#: bytes of merged weights that are kept beside those of the present role; a full UNet has 2 GB in float16
_MOST_KEPT = 256 << 20


class HostWeights:
    """Merges the subjects of an engine. Merged weights are kept, within limits, for the roles used last.

    networks: of the base, whose own weights are never written.
    adapter: whose factors are merged for subjects of tokens; None: there are none.
    """

    def __init__(self, networks: Networks, adapter: TokenAdapter | None = None) -> None:
        self._networks, self._adapter = networks, adapter
        self._subjects: dict[str, Subject] = {}
        self._merged: dict[tuple[Role, str], Arrays] = {}  # by network; the role used last is the last one

    def add(self, name: str, subject: Subject) -> None:
        """Make a subject known, in place of one of the same name. Raises FileFormatError when it does not fit."""
        check_subject(subject, self._networks)
        if subject.tokens is not None:
            self.check_adapter()
        self._drop(name)
        self._subjects[name] = subject

    def check_adapter(self) -> None:
        """Raise FileFormatError where the slots do not take the adapter's factors, as in an engine without any."""
        check_subject(self._reading, self._networks)

    def remove(self, name: str) -> None:
        """Forget a subject at all its strengths."""
        del self._subjects[name]
        self._drop(name)

    def use(self, role: Role, safe: bool = False) -> WeightsOf:
        """The weights of a role: network -> input -> merged weight, of the inputs that subject or adapter change.

        They stay good when the subject is removed or replaced meanwhile.

        safe: of the networks' twins, where they exist.

        Raises EngineError for a subject that was removed.
        """
        if not role.name and not role.adapted:
            return lambda network: {}
        known = self._subjects.get(role.name)
        subjects = [find_subject(self._subjects, role)] if role.name else []
        subjects += [self._reading] if role.adapted else []
        used: dict[str, Arrays] = {}

        def find(network: str) -> Arrays:
            if network not in used:
                actual = twin_name(network) if safe and twin_name(network) in self._networks else network
                found = self._merged.pop((role, actual), None) if self._subjects.get(role.name) is known else None
                used[network] = self._merge(network, actual, subjects) if found is None else found
                if self._subjects.get(role.name) is known:
                    self._merged[role, actual] = used[network]
                    self._trim(role)
            return used[network]

        return find

    def _merge(self, network: str, actual: str, subjects: Sequence[Subject]) -> Arrays:
        """Merge subjects into the weights of `actual`: the network or its twin."""
        pairs = stack_pairs((each.factors_for(network), each.scale) for each in subjects if each.scale != 0)
        changes = list_changes(pairs, self._networks.slots(actual))
        return merge_weights(self._networks.weights(actual), changes, kernels.merge_weight) if pairs else {}

    @cached_property
    def _reading(self) -> Subject:
        """What the adapter learnt to read tokens with, as a subject; read at first use."""
        return read_as_subject(self._adapter)

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
