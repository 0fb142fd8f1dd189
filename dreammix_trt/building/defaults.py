"""What requests to a base use unless they say otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dreammix_trt.core.lora import LoraSpec
from dreammix_trt.core.request import Request

#: marks in the name of a few-step LoRA -> its sampler
_FEW_STEP = ((r"(?<![a-z])lcm(?![a-z])", "lcm"), (r"lightning|hyper[-_ ]?sd", "euler"))


@dataclass(frozen=True)
class Defaults:
    """Fields of a request that suit a base, where they differ from the usual; None: the usual."""

    sampler: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Those that are given."""
        return {name: value for name, value in vars(self).items() if value is not None}


def fill_in(given: Defaults, loras: Sequence[LoraSpec], tell: Callable[[str], None]) -> Defaults:
    """The defaults, filled in from the name of a few-step LoRA: nothing else in such a file tells its kind."""
    Request.of(prompt="any", **given.to_dict())  # refuses what no request could have
    for spec in loras:
        text = spec.file.name.lower()
        steps = re.search(r"(\d+)[-_ ]?step", text)
        sampler = next((name for mark, name in _FEW_STEP if re.search(mark, text)), None)
        if sampler:
            found = Defaults(
                given.sampler or sampler,
                given.num_inference_steps or (int(steps[1]) if steps else 8),
                1.0 if given.guidance_scale is None else given.guidance_scale,
            )
            Request.of(prompt="any", **found.to_dict())
            tell(
                f"{spec.file.name}: a few-step LoRA by its name; requests use sampler {found.sampler}, "
                f"{found.num_inference_steps} steps and guidance {found.guidance_scale:g} unless they say otherwise "
                "(--sampler, --steps, --guidance-scale change that)"
            )
            return found
    return given
