"""Requests on the host: numpy, the C++ kernels, and networks that take and return arrays.

It paints one picture at a time, so each picture is the same to the bit however many are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import EngineError
from dreammix_trt.core.networks import twin_name
from dreammix_trt.core.noise import SeededNoise
from dreammix_trt.core.seam import BaseFacts, Networks
from dreammix_trt.core.slots import Slot
from dreammix_trt.core.subject import Subject
from dreammix_trt.core.token_adapter import TokenAdapter
from dreammix_trt.engine import kernels
from dreammix_trt.engine.canvas.geometry import Size
from dreammix_trt.engine.enrolment import Reference, make_rows
from dreammix_trt.engine.host.clock import PhaseClock
from dreammix_trt.engine.host.denoiser import Denoiser, EngineDenoiser
from dreammix_trt.engine.host.painter import HostPainter, Sitting
from dreammix_trt.engine.host.texts import HostTexts
from dreammix_trt.engine.host.weights import HostWeights
from dreammix_trt.engine.painting import check_finite, paint_safely, run_safely
from dreammix_trt.engine.runtime import Painted, Painting, Work, check_parts
from dreammix_trt.engine.text import Tokenizer

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


class HostRuntime:
    """See `engine.runtime.Runtime`.

    networks: those of a base.
    denoiser: in place of the base's UNets.
    adapter: the base's token adapter, if it has one.
    """

    most_pictures = 1
    frames: Sequence[Size] | None = None
    contexts: Sequence[int] | None = None
    lost_raw_unet = False

    def __init__(
        self,
        networks: Networks,
        facts: BaseFacts,
        denoiser: Denoiser | None = None,
        adapter: TokenAdapter | None = None,
    ) -> None:
        self.networks, self.facts, self.adapter = networks, facts, adapter
        self.timings: Mapping[str, float] = {}
        self._denoiser, self._closed, self._texts = denoiser, False, HostTexts()
        self._weights = HostWeights(networks, adapter)

    @property
    def has_raw_unet(self) -> bool:
        """Whether steps run on the unpatched UNet."""
        return "unet_raw" in self.networks

    def add_subject(self, name: str, subject: Subject) -> None:
        """Check that a subject fits, and keep it. Its weights are merged when a picture needs them."""
        self._weights.add(name, subject)
        self._texts.forget(name)

    def remove_subject(self, name: str) -> None:
        """Forget a subject at all its strengths."""
        self._weights.remove(name)
        self._texts.forget(name)

    def make_rows(self, references: Sequence[Reference], class_name: str, tokenizers: Sequence[Tokenizer]) -> F32:
        """Make the rows of a subject; see `engine.runtime.Runtime`. After an overflow with the available twins."""
        assert self.adapter is not None
        self._weights.check_adapter()

        def make(safe: bool) -> F32:
            networks = _Watched(self.networks, PhaseClock(), safe, self._check_open)
            assert self.adapter is not None
            return make_rows(references, class_name, tokenizers, networks, self.facts, self.adapter.config)

        return run_safely(make, self.networks.__contains__, "while enrolling")

    def check(self, work: Work) -> Hashable:
        """A value that no other picture has: no picture shares a batch with another."""
        check_parts(work.request, self.networks.__contains__)
        if work.canvas.sizes is not None:
            for stage in {step.stage for step in work.schedule}:  # refuse a frame now, not after the first stage
                work.canvas.work_size(work.canvas.box(work.request.field_of(stage)))
        return id(work)

    def paint(self, batch: Sequence[Work], keep: Collection[int] = ()) -> Painting:
        """Paint one picture; see `engine.runtime.Runtime.paint`."""
        (work,) = batch
        clock, shown = PhaseClock(), dict[str, U8]()

        def open_painter(safe: bool) -> HostPainter:
            networks = _Watched(self.networks, clock, safe, self._check_open)
            weights = self._weights.use(work.subject, safe)
            with clock("text"):
                texts = self._texts.compose(work.prompts, networks, weights, safe)
            noise = work.noise or SeededNoise(work.seed, kernels.normals)
            sitting = Sitting(work.canvas, work.request, work.schedule, texts, weights, noise, work.prior_image)
            denoiser = self._denoiser or EngineDenoiser(networks)
            kept = shown if 0 in keep else None
            return HostPainter(
                sitting, networks, self.facts, denoiser, clock=clock, shown=kept, looking=networks.without_check()
            )

        (pixels,) = yield from paint_safely(open_painter, self.networks.__contains__)
        self.timings = dict(clock.seconds)
        yield [Painted(pixels, shown)]

    def another(self) -> HostRuntime:
        """Always raises EngineError: networks on the CPU share the cores."""
        raise EngineError("another() shares a GPU; on the CPU load the engine a second time")

    def close(self) -> None:
        """Refuse further work. The networks belong to the caller."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("this engine was closed: load it again with DreamMix.load, or use it before close()")


class _Watched:
    """Networks whose calls are charged to "network:NAME" on a clock, and whose values must be finite.

    safe: use float32 twins where they exist.
    ready: raises when the networks may no longer be used.
    checks: whether values must be finite.
    """

    def __init__(
        self, networks: Networks, clock: PhaseClock, safe: bool, ready: Callable[[], None], checks: bool = True
    ) -> None:
        self._networks, self._clock, self._safe, self._ready, self._checks = networks, clock, safe, ready, checks

    def without_check(self) -> _Watched:
        """The same networks for previews: looking must not change the result of a request."""
        return _Watched(self._networks, self._clock, self._safe, self._ready, checks=False)

    def __contains__(self, name: str) -> bool:
        return name in self._networks

    def slots(self, name: str) -> tuple[Slot, ...]:
        return self._networks.slots(name)

    def weights(self, name: str) -> Mapping[str, npt.NDArray[Any]]:
        return self._networks.weights(name)

    def run(self, name: str, **arrays: Any) -> dict[str, npt.NDArray[Any]]:
        self._ready()
        actual = twin_name(name) if self._safe and twin_name(name) in self._networks else name
        with self._clock(f"network:{name}"):
            outputs = self._networks.run(actual, **arrays)
        if self._checks:
            check_finite(name, outputs)
        return outputs
