"""Attention whose arithmetic can be replaced: the exporter puts operators in its place."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

#: (q, k, v, heads, bias) -> attended, see `attend`
Attend = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for q, k, v (B, T, C).

    bias: (B, 1, 1, T), added to the scores of each key.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class Attending(nn.Module):
    """A module that attends. Setting `attend` on an instance replaces the arithmetic."""

    attend: Attend = staticmethod(attend)
