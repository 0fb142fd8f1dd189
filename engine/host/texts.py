"""Prompts on the host: both text encoders, attribute removal, and the condition of each stage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.networks import names_of_group
from dreammix_trt.core.seam import Networks
from dreammix_trt.core.subject import Role
from dreammix_trt.engine.host.weights import WeightsOf
from dreammix_trt.engine.prompts import Prompt, PromptPlan, RowSource, weigh_text
from dreammix_trt.engine.text import apply_tas

F32 = npt.NDArray[np.float32]
Encoded = tuple[F32, F32]  # token rows (77 for each chunk, D), pooled vector (Dp,)
_MOST_KEPT = 256


@dataclass(frozen=True)
class Text:
    """A stage's condition for one picture: rows [negative, positive], or positive alone.

    tokens: (R, L, D).
    pooled: (R, Dp).
    appended: how many of the L rows, the last ones, are a subject's and not the text's.
    """

    tokens: F32
    pooled: F32
    appended: int = 0


class HostTexts:
    """Encodes prompts, and remembers the results."""

    def __init__(self) -> None:
        self._kept: dict[tuple[bool, Role, bytes], tuple[list[F32], F32]] = {}

    def forget(self, subject: str | None = None) -> None:
        """Drop what was encoded.

        subject: only what was encoded with this subject's weights; None: all.
        """
        self._kept = {key: value for key, value in self._kept.items() if subject is not None and key[1].name != subject}

    def compose(self, plan: PromptPlan, networks: Networks, weights: WeightsOf, safe: bool) -> dict[str, Text]:
        """Make the condition of each stage.

        weights: network -> the weights that the subject changes.
        safe: encode with the twins.

        Returns stage -> its condition.
        """

        def encode(*prompts: Prompt) -> Encoded:
            chunks = [self._weigh(prompt, plan, networks, weights, safe) for prompt in prompts]
            return np.concatenate([tokens for tokens, _ in chunks]), chunks[0][1]

        tokens, pooled = encode(*plan.prompt)
        encoded: dict[RowSource, Encoded] = {"prompt": (tokens, pooled)}
        encoded["zeros"] = np.zeros_like(tokens), np.zeros_like(pooled)
        if plan.tas is not None and plan.eliminated is not None:
            encoded["decomposed"] = apply_tas(plan.tas, tokens, pooled, *encode(plan.eliminated))
        if plan.negative:
            encoded["negative"] = encode(*plan.negative)
        texts: dict[str, Text] = {}
        for stage, rows in plan.stages.items():
            stacked = np.stack([encoded[row.tokens][0] for row in rows])
            if plan.appended is not None:
                stacked = np.concatenate([stacked, plan.appended], axis=1)
            texts[stage] = Text(stacked, np.stack([encoded[row.pooled][1] for row in rows]), plan.extra)
        return texts

    def _weigh(self, prompt: Prompt, plan: PromptPlan, networks: Networks, weights: WeightsOf, safe: bool) -> Encoded:
        """A prompt's encoding, its weights applied."""
        halves, pooled = self._encode(prompt, networks, weights, safe)
        tokens = np.concatenate(halves, axis=-1)
        if prompt.weights is None or plan.empty is None:
            return tokens, pooled
        empty, _ = self._encode(plan.empty, networks, weights, safe)
        widths = [half.shape[-1] for half in halves]
        return weigh_text(tokens, np.concatenate(empty, axis=-1), prompt.weights, widths), pooled

    def _encode(self, prompt: Prompt, networks: Networks, weights: WeightsOf, safe: bool) -> tuple[list[F32], F32]:
        """Both encoders' token rows (77, d), and the pooled vector (Dp,); weights are not looked at."""
        key = (safe, prompt.subject, prompt.ids.tobytes())
        if key not in self._kept:
            outputs = [
                networks.run(name, input_ids=ids[None], **weights(name))
                for name, ids in zip(names_of_group("text"), prompt.ids, strict=True)
            ]
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept[key] = ([output["hidden"][0] for output in outputs], outputs[-1]["pooled"][0])
        return self._kept[key]
