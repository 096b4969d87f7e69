"""Heads on states that stay as they are, a target that follows them, and what moves both."""

import copy
from typing import Any

import torch
from torch import Tensor

from plaudit.algorithms.stepping import follow, guarded_step
from plaudit.models.q_heads import QHeads


class FollowedHeads:
    """Heads `θ` that an optimizer moves, and `θ⁻`, which begins as their copy and follows: `θ⁻ ← τ θ + (1 - τ) θ⁻`.

    Attributes:
        heads, target: `θ` and `θ⁻`.
        optimizer: over the heads.
    """

    def __init__(self, heads: QHeads, optimizer: torch.optim.Optimizer | None, *, learning_rate: float) -> None:
        """Move these heads by this optimizer; by Adam at the rate where none is given."""
        self.heads = heads
        self.target = copy.deepcopy(heads).requires_grad_(False)
        self.optimizer = optimizer or torch.optim.Adam(heads.parameters(), lr=learning_rate)

    def step(self, loss: Tensor, *, share: float, where: str) -> None:
        """One optimizer step down a loss of the heads, then the target by its share `τ`.

        Raises:
            NonFiniteError: if the loss is not finite, naming `where`; the weights have not been moved.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        guarded_step(self.optimizer, float(loss.detach()), max_norm=None, where=where)
        follow(self.target.parameters(), self.heads.parameters(), share=share)

    def state_dict(self) -> dict[str, Any]:
        """Both heads and the optimizer."""
        return {
            "heads": self.heads.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.heads.load_state_dict(state["heads"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
