"""Sums, means, variances and soft maxima over the entries that count. Masks: True means "counts"."""

import torch
from torch import Tensor

Dim = int | tuple[int, ...] | None


def _check(values: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask must be boolean (True = counts), got {mask.dtype}")
    if mask.shape != values.shape:
        raise ValueError(f"mask of shape {tuple(mask.shape)} for values of shape {tuple(values.shape)}")


def masked_sum(values: Tensor, mask: Tensor, dim: Dim = None) -> Tensor:
    """Sum of the entries that count: `Σ_i m_i v_i`.

    Args:
        values: any shape; what stands at masked places, even NaN, never matters and gets gradient 0.
        mask: boolean, same shape.
        dim: dimensions to reduce; None reduces all.

    Returns:
        `values` reduced over `dim`; 0 where nothing counts.

    Raises:
        ValueError: if the mask is not boolean or differs in shape.
    """
    _check(values, mask)
    kept = values.masked_fill(~mask, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: Dim = None) -> Tensor:
    """Mean of the entries that count: `Σ m v / Σ m`, 0 where nothing counts.

    Args and errors as in `masked_sum`. Shapes: as `masked_sum`.
    """
    count = (mask.sum() if dim is None else mask.sum(dim)).clamp_min(1)
    return masked_sum(values, mask, dim) / count.to(values.dtype)


def masked_variance(values: Tensor, mask: Tensor, dim: Dim = None, *, unbiased: bool = True) -> Tensor:
    """Variance of the entries that count: `Σ m (v - mean)² / (n - 1)`, or `/ n` with `unbiased=False`.

    Computed in two passes, so that a large common offset does not cancel the digits.

    Args:
        values: any shape.
        mask: boolean, same shape.
        dim: dimensions to reduce; None reduces all.
        unbiased: divide by `n - 1`.

    Returns:
        `values` reduced over `dim`; 0 where fewer than two entries count (one with `unbiased=False`).

    Raises:
        ValueError: as `masked_sum`.
    """
    mean = masked_mean(values, mask, dim)
    kept_dims = tuple(range(values.ndim)) if dim is None else dim
    for axis in sorted([kept_dims] if isinstance(kept_dims, int) else [axis % values.ndim for axis in kept_dims]):
        mean = mean.unsqueeze(axis)
    count = (mask.sum() if dim is None else mask.sum(dim)).to(values.dtype)
    divisor = (count - 1 if unbiased else count).clamp_min(1)
    return masked_sum((values - mean).square(), mask, dim) / divisor


def masked_whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale to unit (unbiased) variance and, by default, shift to mean 0: `(v - mean) / sqrt(variance + eps)`.

    Args:
        values: any shape; statistics are taken over all entries that count.
        mask: boolean, same shape.
        shift_mean: False keeps the mean where it was.
        eps: added to the variance.

    Returns:
        the shape of `values`; 0 where masked.

    Raises:
        ValueError: as `masked_sum`.
    """
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_variance(values, mask) + eps)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask, 0.0)


def masked_logsumexp(values: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """`log Σ_i m_i exp(v_i)` along `dim`; 0 (with gradient 0) where nothing counts, so that no NaN is born there.

    Args:
        values: any shape.
        mask: boolean, same shape.
        dim: the dimension to reduce.

    Returns:
        `values` without `dim`.

    Raises:
        ValueError: as `masked_sum`.
    """
    _check(values, mask)
    empty = ~mask.any(dim, keepdim=True)
    filled = values.masked_fill(~mask, float("-inf")).masked_fill(empty, 0.0)
    return torch.logsumexp(filled, dim).masked_fill(empty.squeeze(dim), 0.0)


def masked_log_softmax(values: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Log-probabilities of a softmax over the entries that count; 0 at masked places (a place to ignore, not a 1).

    Args:
        values: any shape.
        mask: boolean, same shape.
        dim: the dimension of the distribution.

    Returns:
        the shape of `values`.

    Raises:
        ValueError: as `masked_sum`.
    """
    total = masked_logsumexp(values, mask, dim).unsqueeze(dim)
    return (values.masked_fill(~mask, 0.0) - total).masked_fill(~mask, 0.0)
