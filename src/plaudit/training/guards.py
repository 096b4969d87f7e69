"""What stops a run before the weights move: a loss or a gradient that is not finite, with the records that did it."""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plaudit.core.finite import NonFiniteError


def require_finite_losses(losses: Sequence[float], record_ids: Sequence[Sequence[str]], *, step: int) -> None:
    """Stop if a micro-batch's loss is not finite.

    Args:
        losses: one number per micro-batch of the step.
        record_ids: for every micro-batch, the ids of its records.
        step: the number of the step, for the message.

    Raises:
        NonFiniteError: naming the records of each offending micro-batch.
    """
    bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        names = [record for index in bad for record in record_ids[index]]
        raise NonFiniteError(
            f"step {step}: the loss is {losses[bad[0]]}, so the weights were left as they were. "
            f"{_records(names)}. Look at these records, lower the learning rate, or train in float32"
        )


def require_finite_gradient(
    norm: float, model: nn.Module | None, record_ids: Sequence[Sequence[str]], *, step: int
) -> None:
    """Stop if the norm of the whole gradient is not finite.

    Raises:
        NonFiniteError: naming the records of the step and, where the model still has its gradients, the first
            parameters with such a one.
    """
    if math.isfinite(norm):
        return
    names = [
        name for name, parameter in (() if model is None else model.named_parameters()) if _not_finite(parameter.grad)
    ]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    where = f"in {shown}" if names else "although each entry is finite (it overflows when squared)"
    where = "" if model is None else where
    raise NonFiniteError(
        f"step {step}: the norm of the gradient is {norm} {where}, so the weights were left as they were. "
        f"{_records([record for micro in record_ids for record in micro])}. "
        "Lower the learning rate or train in float32"
    )


def _not_finite(gradient: Tensor | None) -> bool:
    # Of a gradient in shards each process sees its own rows.
    own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return own is not None and not bool(own.isfinite().all())


def _records(names: Sequence[str], limit: int = 32) -> str:
    shown = ", ".join(names[:limit])
    return f"Records: {shown}" + (f" and {len(names) - limit} more" if len(names) > limit else "")
