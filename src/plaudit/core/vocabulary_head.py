"""The language-model head by chunks of tokens: what its log-probabilities and their gradients have in common."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from plaudit.core.linear import FEWEST_ROWS, can_lay_out, laid_out_product

# 64 MiB of float32 logits at a time: large enough for full speed, small beside any model that needs the chunking.
_LOGITS_PER_CHUNK = 1 << 24
# A processor's cache holds less, and its allocator hands out blocks above 32 MiB with fresh pages every time; products
# of fewer rows than this are slow, though.
_LOGITS_PER_CHUNK_CPU = 1 << 21
_FEWEST_ROWS_CPU = 128
# Rows times numbers of the weight; below, compiling oneDNN's code for this number of rows takes longer than it gains.
_LEAST_WORK = 1 << 27


class HeadOptions(NamedTuple):
    """How logits are made: rows at a time, the model's soft cap (or None), the temperature they are divided by."""

    chunk: int
    softcap: float | None
    temperature: float


class HeadGradients(NamedTuple):
    """Gradients of states `[N, H]`, weight `[V, H]` and bias `[V]`; None for those that were not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def head_options(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    chunk: int | None,
    softcap: float | None,
    temperature: float = 1.0,
) -> HeadOptions:
    """Options for states `[N, H]`, weight `[V, H]`, targets `[N]` and bias `[V]`, once these fit together.

    Raises:
        ValueError: if shapes do not fit, or `chunk` or `temperature` is not positive.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, H] and [V, H]")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be [N] = [{hidden.shape[0]}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [V] = [{weight.shape[0]}]")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return HeadOptions(chunk or _chunk_rows(weight), softcap, temperature)


def _chunk_rows(weight: Tensor) -> int:
    most = max(1, _LOGITS_PER_CHUNK // weight.shape[0])
    if weight.device.type != "cpu":
        return most
    return min(most, max(_FEWEST_ROWS_CPU, _LOGITS_PER_CHUNK_CPU // weight.shape[0]))


def head_product(hidden: Tensor, weight: Tensor, options: HeadOptions) -> Callable[[Tensor], Tensor]:
    """`h -> h W^T` for the chunks of states `[N, H]`; on the CPU the weight is laid out once for all of them."""
    worth_it = hidden.shape[0] >= FEWEST_ROWS and hidden.shape[0] * weight.numel() >= _LEAST_WORK
    if worth_it and hidden.dtype == torch.float32 and can_lay_out(weight):
        return laid_out_product(weight, min(options.chunk, hidden.shape[0]))
    return lambda rows: rows @ weight.to(rows.dtype).T


def head_logits(
    hidden: Tensor, product: Callable[[Tensor], Tensor], bias: Tensor | None, options: HeadOptions
) -> Tensor:
    """`z = c tanh((h W^T + bias) / c) / τ`, `[n, V]` in at least float32; the product runs in the dtype of `hidden`."""
    logits = product(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    return logits if options.temperature == 1.0 else logits / options.temperature


def head_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: HeadOptions,
    needed: tuple[bool, bool, bool],
    slopes: Callable[[slice, Tensor], Tensor],
    kept: Callable[[slice], Tensor] | None = None,
) -> HeadGradients:
    """Backward through the head: every chunk of logits is computed again, or was kept, and is handed to `slopes`.

    Args:
        hidden: `[N, H]`.
        weight: `[V, H]`; its gradient is summed in float32 (or its own wider dtype).
        bias: `[V]` or None.
        options: as in the forward.
        needed: whether the gradients of `hidden`, `weight` and `bias` are asked for.
        slopes: from a slice of the rows and their logits `z [n, V]`, which it may overwrite, to `∂ loss / ∂ z`.
        kept: from a slice of `chunk` rows to a fresh tensor of their logits; None computes them again.

    Returns:
        the gradients, in the dtypes of what they belong to.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    grad_hidden = torch.empty_like(hidden) if needed[0] else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
    grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None
    # The weight is laid out for no product that is not taken.
    logits_of = kept or _computed_again(hidden, weight, bias, options)
    back = head_product(hidden, weight.T, options) if needed[0] else None
    for start in range(0, hidden.shape[0], options.chunk):
        part = slice(start, start + options.chunk)
        logits = logits_of(part)
        capped = None if options.softcap is None else (logits / (options.softcap / options.temperature)).square()
        grad_logits = slopes(part, logits)
        if capped is not None:
            grad_logits *= 1 - capped
        if options.temperature != 1.0:
            grad_logits /= options.temperature
        if grad_bias is not None:
            grad_bias += grad_logits.sum(0)
        grad_logits = grad_logits.to(hidden.dtype)
        if grad_hidden is not None and back is not None:
            grad_hidden[part] = back(grad_logits)
        if grad_weight is not None:
            grad_weight += grad_logits.T @ hidden[part]
    return HeadGradients(
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def _computed_again(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions
) -> Callable[[slice], Tensor]:
    """From a slice of the rows to their logits `[n, V]`, as the forward had them."""
    product = head_product(hidden, weight, options)
    return lambda part: head_logits(hidden[part], product, bias, options)
