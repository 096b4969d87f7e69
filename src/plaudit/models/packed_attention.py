"""Packed attention through transformers' `AttentionInterface`: model code stays untouched, the layout rides along.

The layout travels as a keyword argument of the model call, never as a global: a global that is cleared before the
backward pass gives silently wrong gradients under gradient checkpointing.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from plaudit.core.layout import PackedLayout

PACKED_ATTENTION = "plaudit_packed"
"""The name under which transformers knows this attention."""

LAYOUT_ARGUMENT = "packed_attention"
"""The keyword argument of the model call that carries a `PackedAttention`."""

PackedBackend = Callable[..., Tensor]
"""`(query, key, value, attention, *, window, scaling, dropout, softcap, sinks) -> [1, heads, N, d]`; see
`reference_backend`."""


def allowed_pairs(layout: PackedLayout, window: int | None = None) -> Tensor:
    """Which token may attend to which, as the layout's rule says.

    `allowed(q, k) = b_q == b_k and (s_k == s_q or s_k == 0) and (not causal or p_k <= p_q)`; a window `w` adds
    `p_q - p_k < w` (causal) or `|p_q - p_k| < w` (bidirectional), measured in positions. This is the exclusive bound
    that transformers hands to every attention function (its bidirectional models pass half the window plus one).

    Args:
        layout: `N` tokens.
        window: the `sliding_window` argument of the layer, or None for full attention.

    Returns:
        `[N, N]` bool, rows are queries; every token may attend to itself.
    """
    return visible_pairs(layout.block_ids, layout.segment_ids, layout.positions, causal=layout.causal, window=window)


def visible_pairs(blocks: Tensor, segments: Tensor, positions: Tensor, *, causal: bool, window: int | None) -> Tensor:
    """The rule of `allowed_pairs` over index tensors `[n]`: `[n, n]` bool."""
    allowed = (segments[None, :] == segments[:, None]) | (segments[None, :] == 0)
    allowed &= blocks[:, None] == blocks[None, :]
    distance = positions[:, None] - positions[None, :]
    if causal:
        allowed &= distance >= 0
    if window is not None:
        allowed &= (distance if causal else distance.abs()) < window
    return allowed


class PackedAttention:
    """What one packed forward hands to every attention layer: the layout, its masks (made once), a call counter."""

    def __init__(self, layout: PackedLayout, backend: str = "blocks") -> None:
        if backend not in BACKENDS:
            raise ValueError(f"unknown packed attention backend {backend!r}; known: {', '.join(sorted(BACKENDS))}")
        self.layout = layout
        self.backend = backend
        self.calls = 0
        self._masks: dict[int | None, Tensor] = {}
        self._block_sizes: list[int] | None = None
        self._block_masks: dict[int | None, list[Tensor | None]] = {}

    def mask(self, window: int | None) -> Tensor:
        """`[1, 1, N, N]` bool for this window size, built at the first layer that asks and kept for the others."""
        if window not in self._masks:
            self._masks[window] = allowed_pairs(self.layout, window)[None, None]
        return self._masks[window]

    @property
    def block_sizes(self) -> list[int]:
        """Tokens of every block, in the row's order; one wait for the device in a forward."""
        if self._block_sizes is None:
            self._block_sizes = torch.bincount(self.layout.block_ids).tolist()
        return self._block_sizes

    def block_masks(self, window: int | None) -> list[Tensor | None]:
        """`[1, 1, n, n]` bool for every block of `n` tokens; None where the block is plainly causal (or plainly full).

        That is a block of one completion without a window: its segments form one text.
        """
        if window not in self._block_masks:
            layout, found = self.layout, list[Tensor | None]()
            segments = torch.split(layout.segment_ids, self.block_sizes)
            positions = torch.split(layout.positions, self.block_sizes)
            several = torch.stack([segment[-1] > 1 for segment in segments]).tolist()
            for segment, position, has_siblings in zip(segments, positions, several, strict=True):
                mask = None
                if has_siblings or window is not None:
                    same = torch.zeros_like(segment)
                    mask = visible_pairs(same, segment, position, causal=layout.causal, window=window)[None, None]
                found.append(mask)
            self._block_masks[window] = found
        return self._block_masks[window]


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention written out, for what the fused kernel cannot express: soft-capped scores and attention sinks.

    `softmax(cap · tanh(scaling · q kᵀ / cap))`; a sink is one more logit per head that takes probability and gives
    nothing (Gemma 2, section 2; gpt-oss). The softmax is taken in float32.

    Args:
        query: `[B, h, Q, d]`.
        key: `[B, h, S, d]`, already repeated to the number of query heads.
        value: `[B, h, S, d]`.
        mask: broadcastable to `[B, h, Q, S]`: bool, True attends, or additive.
        scaling: factor on the scores.
        dropout: probability of dropping an attention weight.
        softcap: the cap, or None.
        sinks: `[h]` logits, or None.

    Returns:
        `[B, h, Q, d]`.
    """
    scores = (query @ key.transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat((scores, sink), -1).softmax(-1, dtype=torch.float32)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=torch.float32)
    weights = nn.functional.dropout(weights, dropout, training=dropout > 0.0)
    return weights.to(value.dtype) @ value


def reference_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: PackedAttention,
    *,
    window: int | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The reference: one boolean mask over the whole row, handed to torch's scaled-dot-product attention.

    Args:
        query: `[1, h, N, d]`.
        key: `[1, g, N, d]` with `g` dividing `h` (grouped-query attention).
        value: `[1, g, N, d]`.
        attention: the layout and its masks.
        window: sliding window in positions, or None.
        scaling: factor on the scores.
        dropout: attention dropout.
        softcap: cap on the scores, or None.
        sinks: `[h]` sink logits, or None.

    Returns:
        `[1, h, N, d]`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    mask = attention.mask(window)
    if softcap is None and sinks is None:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    return explicit_attention(query, key, value, mask, scaling=scaling, dropout=dropout, softcap=softcap, sinks=sinks)


def block_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: PackedAttention,
    *,
    window: int | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Block after block: time and memory grow with the sum of the squared block sizes, not with the squared row.

    Arguments and result as for `reference_backend`. The row is cut by one `split` (slices would each allocate a whole
    row of zeros in their backward).
    """
    groups = query.shape[1] // key.shape[1]
    parts = [t.split(attention.block_sizes, dim=2) for t in (query, repeat_kv(key, groups), repeat_kv(value, groups))]
    causal = attention.layout.causal
    outputs = []
    for q, k, v, mask in zip(*parts, attention.block_masks(window), strict=True):
        if softcap is None and sinks is None:
            outputs.append(
                nn.functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=causal and mask is None
                )
            )
            continue
        if mask is None:
            mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
            mask = mask.tril() if causal else mask
        outputs.append(
            explicit_attention(q, k, v, mask, scaling=scaling, dropout=dropout, softcap=softcap, sinks=sinks)
        )
    return torch.cat(outputs, dim=2)


BACKENDS: dict[str, PackedBackend] = {"blocks": block_backend, "reference": reference_backend}
"""Ways to compute packed attention, by name; every one must equal `reference_backend`."""


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_attention: PackedAttention | None = None,
    decoding: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer.

    With a layout it attends by the layout's rule and ignores `attention_mask`; without one it is the stock sdpa
    function (written out where that cannot express soft-caps or sinks), so that plain forward and `generate` match.

    Args:
        module: the attention layer.
        query: `[B, h, Q, d]`.
        key: `[B, g, S, d]`.
        value: `[B, g, S, d]`.
        attention_mask: the stock mask `[B, 1, Q, S]`, or None for plain causal.
        dropout: attention dropout.
        scaling: factor on the scores; None is `1/√d`.
        sliding_window: the layer's window; exclusive bound.
        softcap: cap on the scores (Gemma 2).
        s_aux: `[h]` attention sinks (gpt-oss).
        packed_attention: the layout, when the row is packed.
        decoding: what holds the keys and values while text is generated (`rollout.decoding.SharedPrefixDecoder`); it
            then does all the work.
        kwargs: what else the stock function takes.

    Returns:
        `([B, Q, h, d], None)`.

    Raises:
        ValueError: if a packed call has more than one row, or its length is not the layout's.
    """
    if decoding is not None:
        factor = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        attended: Tensor = decoding.attend(
            query, key, value, window=sliding_window, scaling=factor, softcap=softcap, sinks=s_aux
        )
        return attended, None
    if packed_attention is None:
        if softcap is None and s_aux is None:
            result: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
            return result
        return _stock_explicit(module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux), None
    num_tokens = packed_attention.layout.num_tokens
    if query.shape[0] != 1 or query.shape[2] != num_tokens or key.shape[2] != num_tokens:
        raise ValueError(
            f"packed attention got queries {tuple(query.shape)} and keys {tuple(key.shape)} for a layout of "
            f"{num_tokens} tokens; a packed row is one row and uses no cache"
        )
    packed_attention.calls += 1
    output = BACKENDS[packed_attention.backend](
        query,
        key,
        value,
        packed_attention,
        window=sliding_window,
        scaling=1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling,
        dropout=dropout,
        softcap=softcap,
        sinks=s_aux,
    )
    return output.transpose(1, 2).contiguous(), None


def _stock_explicit(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    # The stock mask is None where it would be plainly causal.
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        if getattr(module, "is_causal", True):
            attention_mask = attention_mask.tril(keys - queries)
    groups = query.shape[1] // key.shape[1]
    output = explicit_attention(
        query,
        repeat_kv(key, groups),
        repeat_kv(value, groups),
        attention_mask[..., :keys],
        scaling=1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling,
        dropout=dropout,
        softcap=softcap,
        sinks=sinks,
    )
    return output.transpose(1, 2).contiguous()


def register_packed_attention() -> None:
    """Make `PACKED_ATTENTION` known to transformers; registering twice changes nothing.

    The stock mask function is registered with it, so that calls without a layout get the masks they expect.
    """
    AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
