"""Products of few rows with weights that stay as they are for many steps: laid out once for the processor.

With some rows instead of thousands a product spends much of its time reading and rearranging the weights. oneDNN, which
torch brings along, can keep them in the order in which it reads them, and adds, multiplies or applies SiLU on the way
out. Where that is not possible the same methods do it by torch's plain operations.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from plaudit.core.linear import can_lay_out


class Product:
    """`x Wᵀ + b` for rows `[R, in]`, the weights as they were when it was made.

    Attributes:
        prepared: whether the weights were laid out for oneDNN.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, rows: int = 0) -> None:
        """Keep the weight; lay it out where that is possible and wanted.

        Args:
            weight: `[out, in]`.
            bias: `[out]` or None.
            rows: about how many rows there will be; 0 leaves the weight as it is.
        """
        self._weight, self._bias = weight.detach(), None if bias is None else bias.detach()
        self.prepared = rows > 0 and can_lay_out(weight)
        if self.prepared:
            operations: Any = torch.ops.mkldnn
            self._laid_out = operations._reorder_linear_weight(self._weight.contiguous(), rows)
            self._plain = operations._linear_pointwise
            self._binary = operations._linear_pointwise.binary

    def __call__(self, rows: Tensor) -> Tensor:
        """`x Wᵀ + b`, `[R, out]`."""
        if not self.prepared:
            return linear(rows, self._weight.to(rows.dtype), self._bias)
        found: Tensor = self._plain(rows, self._laid_out, self._bias, "none", [], "")
        return found

    def silu(self, rows: Tensor) -> Tensor:
        """`silu(x Wᵀ + b)`, `[R, out]`."""
        if not self.prepared:
            return silu(linear(rows, self._weight, self._bias))
        found: Tensor = self._plain(rows, self._laid_out, self._bias, "swish", [], "")
        return found

    def times(self, rows: Tensor, factor: Tensor) -> Tensor:
        """`(x Wᵀ + b) · factor`, element by element, `[R, out]`."""
        if not self.prepared:
            return linear(rows, self._weight, self._bias) * factor
        found: Tensor = self._binary(rows, factor, self._laid_out, self._bias, "mul")
        return found

    def plus(self, rows: Tensor, term: Tensor) -> Tensor:
        """`x Wᵀ + b + term`, `[R, out]`."""
        if not self.prepared:
            return linear(rows, self._weight, self._bias) + term
        found: Tensor = self._binary(rows, term, self._laid_out, self._bias, "add")
        return found
