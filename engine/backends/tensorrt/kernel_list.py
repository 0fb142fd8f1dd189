"""What a plan will launch, read from the list of kernels that the builder prints (docs/reading-a-plan.md).

With detailed verbosity the builder ends with one message, a line a kernel: name, kind, inputs, constants, outputs. The
plan keeps its size. So a plan can be judged where no GPU is: how many launches, whether attention is
one kernel, whether a residual is added where the product is made, what is copied about.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final

MARK: Final = ", LayerType: "
NARROW: Final = 16  # a product with a side of at most this many is a LoRA's factor, not a layer
_PART = re.compile(r"_myl(\d+)_\d+$")
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([\d,-]*)\].*?Datatype: (\w+)")
_SECTION = re.compile(r"(?:^|, )(Inputs|Constants|Outputs): \[(.*?)\](?=, (?:Constants|Outputs|TacticName):|$)")
_WORD = re.compile(r"[A-Z][a-z]*")
_BYTES: Final[Mapping[str, int]] = {
    "Float": 4, "Half": 2, "BFloat16": 2, "Int64": 8, "Int32": 4, "Int8": 1, "UInt8": 1, "Bool": 1, "FP8": 1,
}  # fmt: skip
_MOVING: Final = frozenset({"Move", "Resh", "Tran", "Slic", "Conc"})
_SYNCHRONISING: Final = frozenset({"signal", "wait"})


@dataclass(frozen=True)
class KernelTensor:
    """What a kernel reads or writes. shape: a side of -1 is known at run time."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Its size; sides that are not known count as 1."""
        return math.prod(max(1, side) for side in self.shape) * _BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class Kernel:
    """One line of the list.

    kind: the builder's word: "gemm" and "correlation" (a convolution) come from a library, "runtime_fusion" is a
        product with what is done to its result, "kgen" is generated, "signal" and "wait" join streams.
    """

    name: str
    kind: str
    inputs: tuple[KernelTensor, ...]
    constants: tuple[KernelTensor, ...]
    outputs: tuple[KernelTensor, ...]

    @cached_property
    def steps(self) -> tuple[str, ...]:
        """What a generated kernel does, in the builder's short words: ("Fc", "Add", "Add")."""
        found = re.match(r"__myl_([A-Za-z]+)_myl\d+_\d+$", self.name)
        return tuple(_WORD.findall(found[1])) if found else ()

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix product."""
        return self.kind == "gemm" or "Fc" in self.steps

    @property
    def narrow(self) -> bool:
        """Whether it is a product with a side of a LoRA's rank."""
        tensors = (*self.inputs, *self.constants, *self.outputs)
        matrices = [tensor.shape for tensor in tensors if len(tensor.shape) > 1]
        return self.multiplies and any(1 < shape[-1] <= NARROW for shape in matrices)

    @property
    def wide(self) -> bool:
        """Whether it is a product or convolution of float32 values."""
        makes = self.multiplies or self.kind == "correlation"
        return makes and any(tensor.dtype == "Float" for tensor in (*self.inputs, *self.outputs))

    @property
    def attends(self) -> bool:
        """Whether it is a whole attention: both products and the softmax between them."""
        return "_mha_" in self.name

    @property
    def scores(self) -> bool:
        """Whether it is a softmax of its own: then an attention's scores lie in memory."""
        return not self.attends and {"Exp", "Sub"} <= set(self.steps)

    @property
    def adds_residual(self) -> bool:
        """Whether a product or convolution adds another value of its result's size before it is written."""
        (out, *rest) = self.outputs or (KernelTensor("", (), ""),)
        size = math.prod(out.shape)
        same = [tensor for tensor in self.inputs if math.prod(tensor.shape) == size]
        if self.kind == "correlation":  # its picture and the residual; the picture may have another number of channels
            return not rest and len(self.inputs) > 1
        if self.kind != "runtime_fusion" or not self.multiplies or self.steps.count("Add") < 2:
            return False
        return bool(same)

    @property
    def moves(self) -> bool:
        """Whether it only copies values to other places."""
        return bool(self.steps) and set(self.steps) <= _MOVING and bool(self.inputs)


@dataclass(frozen=True)
class KernelCounts:
    """The kernels of one profile of a plan, counted.

    total: launches.
    kinds: by the builder's kind.
    products: matrix products.
    narrow_products: those with a side of a LoRA's rank.
    wide_products: products and convolutions of float32 values.
    attentions: attentions that are one kernel each.
    scores: softmaxes that are kernels of their own: an attention's scores lie in memory.
    residuals: products and convolutions that also add a residual.
    copies: kernels that only copy.
    waits: kernels that join streams.
    constant_bytes: of the weights and tables in the plan, each once.
    largest_bytes: of the largest value between two kernels.
    """

    total: int
    kinds: Mapping[str, int]
    products: int
    narrow_products: int
    wide_products: int
    attentions: int
    scores: int
    residuals: int
    copies: int
    waits: int
    constant_bytes: int
    largest_bytes: int

    @classmethod
    def of(cls, kernels: Sequence[Kernel]) -> KernelCounts:
        """Count the kernels of one profile."""
        constants = {tensor.name: tensor.nbytes for kernel in kernels for tensor in kernel.constants}
        return cls(
            total=len(kernels),
            kinds=dict(sorted(Counter(kernel.kind for kernel in kernels).items())),
            products=sum(kernel.multiplies for kernel in kernels),
            narrow_products=sum(kernel.narrow for kernel in kernels),
            wide_products=sum(kernel.wide for kernel in kernels),
            attentions=sum(kernel.attends for kernel in kernels),
            scores=sum(kernel.scores for kernel in kernels),
            residuals=sum(kernel.adds_residual for kernel in kernels),
            copies=sum(kernel.moves for kernel in kernels),
            waits=sum(kernel.kind in _SYNCHRONISING for kernel in kernels),
            constant_bytes=sum(constants.values()),
            largest_bytes=max((tensor.nbytes for kernel in kernels for tensor in kernel.outputs), default=0),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `network.json`."""
        return asdict(self)


def read_kernels(messages: Iterable[str]) -> tuple[tuple[Kernel, ...], ...]:
    """Read the builder's list of kernels, one group for each profile of the plan.

    messages: of the builder; those that are no lists are left out.

    Returns no groups where the builder printed no list (TensorRT 11 prints another).
    """
    groups: dict[str, list[Kernel]] = {}
    for message in messages:
        for line in message.splitlines():
            if line.startswith("Name: ") and MARK in line:
                kernel = _read_kernel(line)
                part = _PART.search(kernel.name)
                groups.setdefault(part[1] if part else "0", []).append(kernel)
    return tuple(tuple(groups[part]) for part in sorted(groups, key=int))


def count_kernels(messages: Iterable[str]) -> tuple[KernelCounts, ...]:
    """Count the kernels in the builder's list, for each profile of the plan."""
    return tuple(KernelCounts.of(kernels) for kernels in read_kernels(messages))


def _read_kernel(line: str) -> Kernel:
    name, _, rest = line.removeprefix("Name: ").partition(MARK)
    kind, _, rest = rest.partition(", ")
    sections = {title: _read_tensors(text) for title, text in _SECTION.findall(rest)}
    given = (sections.get(title, ()) for title in ("Inputs", "Constants", "Outputs"))
    return Kernel(name, kind, *given)


def _read_tensors(text: str) -> tuple[KernelTensor, ...]:
    return tuple(
        KernelTensor(name, tuple(int(side) for side in shape.split(",") if side), dtype)
        for name, shape, dtype in _TENSOR.findall(text)
    )
