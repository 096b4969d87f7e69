"""Attention written out, and the reference that every other backend of packed attention has to equal."""

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv

from plaudit.models.attention_layout import AttentionOptions, PackedAttention


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    options: AttentionOptions,
) -> Tensor:
    """Attention written out, for what the fused kernel cannot express: soft-capped scores and attention sinks.

    `softmax(cap · tanh(scaling · q kᵀ / cap))`; a sink is one more logit per head that takes probability and gives
    nothing (Gemma 2, section 2; gpt-oss). The softmax is taken in float32.

    Args:
        query: `[B, h, Q, d]`.
        key: `[B, h, S, d]`, already repeated to the number of query heads.
        value: `[B, h, S, d]`.
        mask: broadcastable to `[B, h, Q, S]`: bool, True attends, or additive.
        options: of the layer; its window has to be in the mask.

    Returns:
        `[B, h, Q, d]`.
    """
    scores = (query @ key.transpose(-1, -2)) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if options.sinks is not None:
        sink = options.sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat((scores, sink), -1).softmax(-1, dtype=torch.float32)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=torch.float32)
    weights = nn.functional.dropout(weights, options.dropout, training=options.dropout > 0.0)
    return weights.to(value.dtype) @ value


def reference_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: PackedAttention,
    options: AttentionOptions,
) -> Tensor:
    """The reference: one boolean mask over the whole row, handed to torch's scaled-dot-product attention.

    Args:
        query: `[1, h, N, d]`.
        key: `[1, g, N, d]` with `g` dividing `h` (grouped-query attention).
        value: `[1, g, N, d]`.
        attention: the layout and its masks.
        options: of the layer.

    Returns:
        `[1, h, N, d]`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    mask = attention.mask(options.window)
    if options.softcap is None and options.sinks is None:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=options.dropout, scale=options.scaling
        )
    return explicit_attention(query, key, value, mask, options)
