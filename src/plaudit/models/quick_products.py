"""A forward pass of anyone's model with the products of `plaudit.core.linear`: its code stays untouched."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from plaudit.core.linear import FEWEST_ROWS, can_lay_out, quick_linear

LEAST_WORK = 1 << 30
"""Rows times weights of linear layers from which these products are quicker. oneDNN compiles code for every number of
rows, which differs from step to step, and for every shape of weight, half a millisecond each time: of a small model's
step that was a quarter."""


class _QuickProducts(TorchFunctionMode):
    """Every `torch.nn.functional.linear` inside becomes `quick_linear`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called by torch in place of any of its functions."""
        return (quick_linear if func is torch.nn.functional.linear else func)(*args, **(kwargs or {}))


def quick_products(model: nn.Module, rows: int) -> AbstractContextManager[object]:
    """A context for one forward of a model over so many rows; it does nothing where there is nothing to gain.

    Not for models that recompute in the backward pass, which happens outside and has to keep the same tensors, nor
    for those with compiled parts.

    Args:
        model: the model; float32 on the CPU, or nothing happens.
        rows: tokens that go through at once.
    """
    if rows < FEWEST_ROWS or not can_lay_out(next(model.parameters())):
        return nullcontext()
    weights = 0
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) or module._compiled_call_impl is not None:
            return nullcontext()
        weights += module.weight.numel() if isinstance(module, nn.Linear) else 0
    return _QuickProducts() if rows * weights >= LEAST_WORK else nullcontext()
