"""A loss over scores that do not fit into one pass: the same gradient, a part at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

Extra = TypeVar("Extra")


def backward_in_parts(
    parts: Sequence[Callable[[], Tensor]],
    loss: Callable[[Tensor], tuple[Tensor, Extra]],
    *,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Extra]:
    """Add the gradient of `loss(Σ_j parts_j())` to all parameters, with the graph of one part in memory at a time.

    By the chain rule `∇_θ L(s_1(θ) + … + s_n(θ)) = Σ_j (∂L/∂s) ∂s_j/∂θ`: first all parts are scored (only the last one
    with a graph), the loss gives `∂L/∂s`, then every other part is scored again, with a graph, and that gradient sent
    back through it (Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", 2021,
    section 3.2). The cost is one more forward of all parts but one. A part that is scored again draws the random
    numbers of its first time, so dropout drops the same places and the gradient belongs to the loss that is returned.
    Parameters that the loss itself reads (a tie parameter) get their gradient once.

    Args:
        parts: functions that score a part: `[P, K]` (or `[P, K, A]`), 0 where another part has the score.
        loss: from the whole table to a scalar and whatever else is made of it.
        device: where the parts draw their random numbers, besides the CPU.

    Returns:
        The detached loss, and the second result of `loss`.

    Raises:
        ValueError: if there is no part.
    """
    if not parts:
        raise ValueError("no part to score")
    *others, last = parts
    states, tables = [], []
    for part in others:
        states.append(_generator_states(device))
        with torch.no_grad():
            tables.append(part())
    graph = last()
    # With one part the graph goes through: there is nothing to put together.
    whole = graph if not others else sum(tables, graph.detach()).requires_grad_()
    value, extra = loss(whole)
    value.backward()  # type: ignore[no-untyped-call]
    if others:
        gradient = torch.zeros_like(whole) if whole.grad is None else whole.grad
        graph.backward(gradient)  # type: ignore[no-untyped-call]
        for part, state in zip(others, states, strict=True):
            with _replayed(state, device):
                part().backward(gradient)  # type: ignore[no-untyped-call]
    return value.detach(), extra


def _generator_states(device: torch.device | str) -> tuple[Tensor, Tensor | None]:
    on_cuda = torch.device(device).type == "cuda"
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_cuda else None


@contextmanager
def _replayed(state: tuple[Tensor, Tensor | None], device: torch.device | str) -> Iterator[None]:
    """Random numbers from an earlier state on; afterwards the generators are where they were."""
    before = _generator_states(device)
    _set_generators(state, device)
    try:
        yield
    finally:
        _set_generators(before, device)


def _set_generators(state: tuple[Tensor, Tensor | None], device: torch.device | str) -> None:
    on_host, on_device = state
    torch.set_rng_state(on_host)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, device)
