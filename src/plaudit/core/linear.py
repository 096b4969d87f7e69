"""Products of many rows with a weight on the CPU, by the kernels of oneDNN, which torch brings along.

For float32 torch asks its BLAS (MKL in the usual builds). On many processors oneDNN is faster at the shapes of a
language model's layers: on an otherwise idle AMD core 97 to 103 Gflop/s for `x Wᵀ` and `g W` against 65 to 87, and
slower at `gᵀ x`, which therefore stays with BLAS. Numbers differ by the order of summation alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FEWEST_ROWS = 128
"""Rows from which laying out the weight, once per product, is worth it."""


def can_lay_out(weight: Tensor) -> bool:
    """Whether a weight `[out, in]` can be laid out for oneDNN: plain float32 on a CPU, without autocast."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    # Subclasses (several processes' shares, tracing) know nothing of these operators.
    if type(weight) not in (Tensor, torch.nn.Parameter) or (weight.requires_grad and torch.compiler.is_compiling()):
        return False
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    # Names that torch's own compiler uses; not every build has them.
    return available and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
    )


def laid_out_product(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """`x -> x Wᵀ` for about `rows` rows `[n, in]` at a time, with the weight laid out once; without gradients.

    Args:
        weight: `[out, in]`, for which `can_lay_out` holds.
        rows: about how many rows go through at once.
    """
    operations: Any = torch.ops.mkldnn
    weight = weight.detach()
    laid_out = operations._reorder_linear_weight(weight.contiguous(), rows)

    def product(x: Tensor) -> Tensor:
        found: Tensor = operations._linear_pointwise(x, laid_out, None, "none", [], "")
        return found

    return product


class _Linear(torch.autograd.Function):
    """`y = x Wᵀ + b` and its gradients `g W`, `gᵀ x`, `Σ g`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        operations: Any = torch.ops.mkldnn
        laid_out = operations._reorder_linear_weight(weight.detach().contiguous(), x.shape[0])
        found: Tensor = operations._linear_pointwise(x, laid_out, bias, "none", [], "")
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = laid_out_product(weight.t(), grad.shape[0])(grad) if wants_x else None
        grad_weight = grad.t() @ x if wants_weight else None
        return grad_x, grad_weight, grad.sum(0) if ctx.has_bias and wants_bias else None


def quick_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`y = x Wᵀ + b`, differentiable once: through oneDNN where that can be and is worth it, else as torch does it.

    Args:
        x: `[…, in]`.
        weight: `[out, in]`.
        bias: `[out]` or None.

    Returns:
        `[…, out]`.
    """
    rows = x.numel() // max(1, x.shape[-1])
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.dtype == torch.float32 and (bias is None or bias.ndim == 1)
    if not plain or rows < FEWEST_ROWS or weight.ndim != 2 or not can_lay_out(weight):
        return torch.nn.functional.linear(x, weight, bias)
    found: Tensor = _Linear.apply(x.reshape(rows, -1), weight, bias)  # type: ignore[no-untyped-call]
    return found.view(*x.shape[:-1], -1)
