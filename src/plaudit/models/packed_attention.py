"""Packed attention through transformers' `AttentionInterface`: model code stays untouched, the layout rides along.

The layout travels as a keyword argument of the model call, never as a global: a global that is cleared before the
backward pass gives silently wrong gradients under gradient checkpointing.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from plaudit.models.attention_backends import BACKENDS, pick_backend
from plaudit.models.attention_layout import AttentionOptions, PackedAttention
from plaudit.models.attention_reference import explicit_attention

__all__ = [
    "BACKENDS",
    "LAYOUT_ARGUMENT",
    "PACKED_ATTENTION",
    "AttentionOptions",
    "PackedAttention",
    "packed_attention_forward",
    "register_packed_attention",
]

PACKED_ATTENTION = "plaudit_packed"
"""The name under which transformers knows this attention."""

LAYOUT_ARGUMENT = "packed_attention"
"""The keyword argument of the model call that carries a `PackedAttention`."""


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
    factor = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    options = AttentionOptions(scaling=factor, window=sliding_window, dropout=dropout, softcap=softcap, sinks=s_aux)
    if decoding is not None:
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
        return _stock_explicit(module, query, key, value, attention_mask, options), None
    num_tokens = packed_attention.layout.num_tokens
    if query.shape[0] != 1 or query.shape[2] != num_tokens or key.shape[2] != num_tokens:
        raise ValueError(
            f"packed attention got queries {tuple(query.shape)} and keys {tuple(key.shape)} for a layout of "
            f"{num_tokens} tokens; a packed row is one row and uses no cache"
        )
    packed_attention.calls += 1
    if query.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        # Rotary tables are float32 there, and with them queries and keys: half precision is what attention runs in.
        query, key, value = (t.to(torch.get_autocast_dtype("cuda")) for t in (query, key, value))
    backend = pick_backend(packed_attention, query, key, value, options)
    output = BACKENDS[backend](query, key, value, packed_attention, options)
    return output.transpose(1, 2).contiguous(), None


def _stock_explicit(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    # The stock mask is None where it would be plainly causal.
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        if getattr(module, "is_causal", True):
            attention_mask = attention_mask.tril(keys - queries)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    output = explicit_attention(query, key, value, attention_mask[..., :keys], options)
    return output.transpose(1, 2).contiguous()


def register_packed_attention() -> None:
    """Make `PACKED_ATTENTION` known to transformers; registering twice changes nothing.

    The stock mask function is registered with it, so that calls without a layout get the masks they expect.
    """
    AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
