"""What networks in torch are made of so that their graphs are small and typed: operators, marks, reshapes.

Outside a trace all of it is plain torch. `export/onnx_graph.py` turns the marks and operators into standard ones.
"""

# mypy: disallow-subclassing-any=False

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dreammix_trt.core.networks import Fused

#: domain of the operators in the trace that `onnx_graph` turns into standard ones
DOMAIN = "dreammix"
#: parts of the queries where TensorRT has no kernel for a whole attention: scores of 32 MiB stay in a GPU's cache
QUERY_TILES = 16
#: wider heads (the VAE's single one) have no fused kernel in TensorRT
WIDEST_HEAD = 256


def reshape_like_onnx(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshape like ONNX's Reshape. torch's own reshape would put the kept axes into the graph as shape arithmetic.

    shape: 0 keeps an axis, one -1 takes what remains.
    """
    if not torch.jit.is_tracing():
        return x.reshape([x.shape[axis] if side == 0 else side for axis, side in enumerate(shape)])
    result: Tensor = _Reshape.apply(x, tuple(int(side) for side in shape))
    return result


def split_like_onnx(x: Tensor, parts: int, axis: int) -> list[Tensor]:
    """Split an axis, whose size is a multiple of `parts`, into that many equal parts, without shape arithmetic."""
    if not torch.jit.is_tracing():
        return list(torch.chunk(x, parts, axis))
    return list(_Split.apply(x, parts, axis))


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: int, axis: int) -> tuple[Tensor, ...]:
        return tuple(part.clone() for part in torch.chunk(x, parts, axis))

    @staticmethod
    def symbolic(g: Any, x: Any, parts: int, axis: int) -> Any:
        return g.op("Split", x, axis_i=axis, num_outputs_i=parts, outputs=parts)


class _Reshape(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x.reshape([x.shape[axis] if side == 0 else side for axis, side in enumerate(shape)])

    @staticmethod
    def symbolic(g: Any, x: Any, shape: tuple[int, ...]) -> Any:
        return g.op("Reshape", x, g.op("Constant", value_t=torch.tensor(shape, dtype=torch.int64)))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for q (B, T, C), k and v (B, S, C); causal: no token sees later ones.

    bias: (B, 1, 1, S), added to the scores of each key. Then it is always written out: such networks are small.

    Where it is written out for TensorRT, a tile of the queries is done after the other: the scores of SDXL's VAE at
    1024 x 1024 are then 32 MiB at a time instead of 512.
    """
    width = int(q.shape[-1]) // heads
    if _fused and bias is None and (width <= WIDEST_HEAD or causal):
        attended: Tensor = _Attention.apply(q, k, v, heads, causal)
        return attended
    length = int(q.shape[1])
    q, k, v = (reshape_like_onnx(x, (0, 0, heads, -1)).transpose(1, 2) for x in (q, k, v))
    if torch.jit.is_tracing():
        if _fused is True and bias is None:
            tiles = split_like_onnx(q * width**-0.5, QUERY_TILES, 2)
            x = torch.cat([torch.softmax(tile @ k.transpose(-1, -2), dim=-1) @ v for tile in tiles], 2)
            return reshape_like_onnx(x.transpose(1, 2), (0, 0, -1))
        scores = (q * width**-0.5) @ k.transpose(-1, -2)
        if causal:  # within float16's range, too; exp(-30000) is 0 in both
            scores = scores + torch.from_numpy(np.triu(np.full((length, length), -30000.0, np.float32), 1))
        if bias is not None:
            scores = scores + bias
        x = torch.softmax(scores, dim=-1) @ v
    else:  # torch's own kernel: faster, and an independent check of the lines above
        x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    return reshape_like_onnx(x.transpose(1, 2), (0, 0, -1))


_fused: Fused = False


@contextmanager
def fuse_operators(on: Fused = True) -> Iterator[None]:
    """Trace attention and group norm as single operators (opset 23) instead of writing them out.

    on: whether to do so inside the block; "attention": that one alone.
    """
    global _fused
    before, _fused = _fused, on
    try:
        yield
    finally:
        _fused = before


class _Attention(torch.autograd.Function):
    """ONNX's Attention on (B, T, C) tensors, computed with torch's own kernel."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        x = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return x.transpose(1, 2).flatten(2)

    @staticmethod
    def symbolic(g: Any, q: Any, k: Any, v: Any, heads: int, causal: bool) -> Any:
        out = g.op(f"{DOMAIN}::Attention", q, k, v, q_num_heads_i=heads, kv_num_heads_i=heads, is_causal_i=int(causal))
        return out.setType(q.type())


class _GroupNorm(torch.autograd.Function):
    """ONNX's GroupNormalization (opset 21)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        return nn.functional.group_norm(x, groups, weight, bias, eps)

    @staticmethod
    def symbolic(g: Any, x: Any, weight: Any, bias: Any, groups: int, eps: float) -> Any:
        out = g.op(f"{DOMAIN}::GroupNormalization", x, weight, bias, num_groups_i=groups, epsilon_f=eps)
        return out.setType(x.type())


def narrow(x: Tensor) -> Tensor:
    """Mark in the graph that from here on the network's own precision is enough. `widen` marks that float32 is needed.

    Outside a trace both do nothing; `torch_backend` converts at these places when it runs a module in float16.
    """
    if not torch.jit.is_tracing():
        return x
    marked: Tensor = _Mark.apply(x, "Narrow")
    return marked


def widen(x: Tensor) -> Tensor:
    """Mark in the graph that from here on float32 is needed, see `narrow`."""
    if not torch.jit.is_tracing():
        return x
    marked: Tensor = _Mark.apply(x, "Wide")
    return marked


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, kind: str) -> Any:
        return g.op(f"{DOMAIN}::{kind}", x).setType(x.type())


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    if _fused is True:
        result: Tensor = _GroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
        return result
    return nn.functional.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
