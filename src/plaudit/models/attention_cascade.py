"""Attention in two parts that meet in their log-sum-exp: every text by itself, and completions over their prefix.

The tokens of a block's completions all see the whole prefix, so that part needs no mask and no copy of the prefix's
keys: one rectangle of queries over keys per block. What is left is plainly causal: each prefix, which the first
completion simply continues, and each other completion by itself. With parts `j` of one query's keys,

    lse_j = log Σ_{k∈j} exp s_k,   lse = log Σ_j exp lse_j,   out = Σ_j exp(lse_j − lse) out_j.

The backward of a part needs of the softmax only `exp(s − lse)` and `D = Σ grad · out`: handed the *merged* `out` and
`lse`, the stock kernel of each part gives that part's exact share of the gradient, and the shares add up (Dao et al.
2022, "FlashAttention", appendix B.4, applied to a softmax over the union of the parts).
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from plaudit.models.attention_layout import PackedAttention, Sequences

Gradients = tuple[Tensor, Tensor, Tensor]
"""Of queries `[N, h, d]`, keys `[N, g, d]` and values `[N, g, d]`."""


class ForwardKernel(Protocol):
    """Attention of every sequence: `[N, h, d]` queries and `[N, g, d]` keys to `out [N, h, d]`, `lse [N, h]`."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sequences: Sequences,
        *,
        causal: bool,
        scaling: float,
        into: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """With `into`, the result is merged into that; without, the sequences' queries tile the row."""


class BackwardKernel(Protocol):
    """The gradients of every sequence."""

    def __call__(
        self,
        grad_out: Tensor,
        saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        sequences: Sequences,
        *,
        causal: bool,
        scaling: float,
        into: Gradients | None,
    ) -> Gradients:
        """`saved` is query, key, value, merged `out [N, h, d]` and merged `lse [N, h]`.

        With `into`, the gradients are added to those; without, the sequences' queries and keys tile the row.
        """


class CascadeKernel(NamedTuple):
    """A forward kernel and its backward."""

    forward: ForwardKernel
    backward: BackwardKernel


def merge_parts(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys, from the attention over each.

    Args:
        out: `[M, h, d]` over the first set.
        lse: `[M, h]` log-sum-exp of its scores, float32 or better.
        other: `[M, h, d]` over the second set.
        other_lse: `[M, h]`.

    Returns:
        `out [M, h, d]` in its own dtype, `lse [M, h]`.
    """
    merged = torch.logaddexp(lse, other_lse)
    share = (other_lse - merged).exp().unsqueeze(-1)
    # A convex combination; torch.lerp would need equal dtypes.
    return (out + share * (other.to(share.dtype) - out)).to(out.dtype), merged


class CascadeAttention(torch.autograd.Function):
    """`softmax(scaling · q kᵀ) v` by the layout's rule, without a mask, without a copy of any prefix."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention: PackedAttention,
        kernel: CascadeKernel,
        scaling: float,
    ) -> Tensor:
        """`[N, h, d]`, `[N, g, d]`, `[N, g, d]` to `[N, h, d]`."""
        causal, own, shared = attention.layout.causal, attention.own, attention.shared
        out, lse = kernel.forward(query, key, value, own, causal=causal, scaling=scaling, into=None)
        if shared.queries:
            out, lse = kernel.forward(query, key, value, shared, causal=False, scaling=scaling, into=(out, lse))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.attention, ctx.kernel, ctx.scaling = attention, kernel, scaling
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of both parts, added."""
        saved, attention, kernel = ctx.saved_tensors, ctx.attention, ctx.kernel
        causal, scaling = attention.layout.causal, ctx.scaling
        gradients = kernel.backward(grad_out, saved, attention.own, causal=causal, scaling=scaling, into=None)
        if attention.shared.queries:
            kernel.backward(grad_out, saved, attention.shared, causal=False, scaling=scaling, into=gradients)
        return *gradients, None, None, None


def cascade_attention(
    query: Tensor, key: Tensor, value: Tensor, attention: PackedAttention, kernel: CascadeKernel, *, scaling: float
) -> Tensor:
    """Packed attention by parts.

    Args:
        query: `[1, h, N, d]`.
        key: `[1, g, N, d]` with `g` dividing `h`.
        value: `[1, g, N, d]`.
        attention: the layout.
        kernel: what computes a part.
        scaling: factor on the scores.

    Returns:
        `[1, h, N, d]`, a view of `[1, N, h, d]`.
    """
    kind, dtype = query.device.type, value.dtype
    if torch.is_autocast_enabled(kind):
        # The kernels are called below the level at which autocast would do this.
        dtype = torch.get_autocast_dtype(kind)
    rows = (t.squeeze(0).transpose(0, 1).to(dtype) for t in (query, key, value))
    out: Tensor = CascadeAttention.apply(*rows, attention, kernel, scaling)  # type: ignore[no-untyped-call]
    return out.transpose(0, 1).unsqueeze(0)
