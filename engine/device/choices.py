"""What a role means on a device: a set of factors and a strength, of a subject, of the token adapter, or of both.

Where both are used, the subject's factors at its strength and the adapter's are stacked along the rank, as on the host,
and stay so for the roles used last. Subjects of tokens alone share the adapter's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Final, NamedTuple

from dreammix_trt.core.merging import SlottedNetworks, check_subject
from dreammix_trt.core.subject import Pairs as LayerPairs
from dreammix_trt.core.subject import Role, Subject, stack_pairs
from dreammix_trt.engine.device.factors import Factors, FactorSet, Pair, Pairs
from dreammix_trt.engine.device.slot_layout import SlottedNetwork
from dreammix_trt.engine.runtime import find_subject

_MOST_STACKED: Final = 4


class Chosen(NamedTuple):
    """A role at the time when it was chosen. It stays what it is though the subject is removed or replaced.

    factors: None: the weights are the base's own.
    scale: the strength at which they are merged: the subject's times the role's; 1 where it is in the factors.
    """

    factors: FactorSet | None
    scale: float

    @property
    def label(self) -> tuple[int, float]:
        """Equal for those whose weights are equal."""
        return (self.factors.number if self.factors else 0), self.scale


PRISTINE: Final = Chosen(None, 0.0)


class Choices:
    """The subjects that a runtime knows.

    reading: what the token adapter adds for subjects of tokens; None: there is no adapter.
    """

    def __init__(
        self,
        networks: SlottedNetworks,
        slotted: Mapping[str, SlottedNetwork],
        factors: Factors,
        reading: Subject | None = None,
    ) -> None:
        self._networks, self._slotted, self._factors, self._reading = networks, slotted, factors, reading
        self._known: dict[str, Subject] = {}
        self._stacked: OrderedDict[Role, FactorSet] = OrderedDict()  # the role used last is the last one

    def add(self, name: str, subject: Subject) -> None:
        """Make a subject known, and its factors resident; see `DeviceWeights.add`."""
        check_subject(subject, self._networks)
        if subject.tokens is not None:
            self.check_adapter()
        self._factors.add(name, self._list_pairs(subject.factors_for))
        self._known[name] = subject
        self._unstack(name)

    def remove(self, name: str) -> None:
        """Forget a subject at all its strengths."""
        del self._known[name]
        self._factors.remove(name)
        self._unstack(name)

    def check_adapter(self) -> None:
        """Raise FileFormatError where the slots do not take the adapter's factors, as in an engine without any."""
        if self._reading is not None:
            check_subject(self._reading, self._networks)

    def choose(self, role: Role) -> Chosen:
        """What a role means now. Raises EngineError for a subject that was removed."""
        factors, scale = None, find_subject(self._known, role).scale if role.name else 0.0
        if scale != 0:
            factors = self._factors.find(role.name)
        own = Chosen(factors, scale) if factors and factors.pairs else PRISTINE
        if not role.adapted or not self._adapter.pairs:
            return own
        return Chosen(self._adapter if own is PRISTINE else self._stack(role), 1.0)

    @cached_property
    def _adapter(self) -> FactorSet:
        """The token adapter's factors."""
        return self._factors.make("", self._list_pairs(self._reading.factors_for) if self._reading else {})

    def _stack(self, role: Role) -> FactorSet:
        """A subject's factors at its strength, and the adapter's."""
        assert self._reading is not None
        both = find_subject(self._known, role), self._reading
        if role not in self._stacked:
            pairs = self._list_pairs(
                lambda network: stack_pairs((each.factors_for(network), each.scale) for each in both)
            )
            self._stacked[role] = self._factors.make(role.name, pairs)
        self._stacked.move_to_end(role)
        if len(self._stacked) > _MOST_STACKED:
            self._stacked.popitem(last=False)
        return self._stacked[role]

    def _unstack(self, name: str) -> None:
        for role in [role for role in self._stacked if role.name == name]:
            del self._stacked[role]

    def _list_pairs(self, factors_for: Callable[[str], LayerPairs]) -> Pairs:
        """factors_for: network -> module -> (A, B)."""
        found = {}
        for name, network in self._slotted.items():
            factors = factors_for(name)
            for number, slot in enumerate(network.slots):
                if slot.module in factors:
                    found[name, number] = Pair(slot, *factors[slot.module])
        return found
