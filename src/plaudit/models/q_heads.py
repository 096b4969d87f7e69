"""Action values over the vocabulary as a second output matrix, and the language model that it makes of another one."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from plaudit.models.causal_lm import CausalLM
from plaudit.models.states import unwrap


class QHeads(nn.Module):
    """`Q(s, ·) = W_q h(s)` and `V(s) = w · h(s) + b` over states `[..., H]`; all zero at first.

    Attributes:
        weight: `W_q`, `[A, H]`.
        value: `w` and `b`.
    """

    def __init__(self, hidden_size: int, num_actions: int, *, dtype: torch.dtype = torch.float32) -> None:
        """Heads over states of `hidden_size` for `num_actions` actions (tokens)."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_actions, hidden_size, dtype=dtype))
        self.value = nn.Linear(hidden_size, 1, dtype=dtype)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def action_values(self, states: Tensor) -> Tensor:
        """`[..., H]` to `[..., A]`."""
        return states @ self.weight.T

    def chosen(self, states: Tensor, actions: Tensor) -> Tensor:
        """`Q(s, a)` of states `[..., H]` and actions `[...]` int64, without the values of all the others."""
        return (states * self.weight[actions]).sum(-1)

    def values(self, states: Tensor) -> Tensor:
        """`[..., H]` to `[...]`."""
        found: Tensor = self.value(states).squeeze(-1)
        return found


def with_action_values(model: CausalLM, heads: QHeads, *, scale: float) -> CausalLM:
    """The language model `π ∝ π_model exp(κ Q)`: a copy whose output matrix is `W_lm + κ W_q`.

    It samples, is evaluated and is saved as any other. Where the model reads its tokens by its output matrix, the copy
    has one of each.

    Args:
        model: whose states the heads read.
        heads: over its vocabulary.
        scale: `κ`; `1/β` for soft action values.

    Raises:
        ValueError: if the heads do not fit, the model has adapters, or it bends its logits (soft-capping), so that no
            matrix does what is wanted.
    """
    if unwrap(model.model) is not model.model:
        raise ValueError("a model with adapters has no output matrix of its own to change: merge them first")
    weight, _, softcap = model.head
    if softcap is not None:
        raise ValueError("this model caps its logits, so adding action values to its output matrix is not exact")
    if weight.shape != heads.weight.shape:
        raise ValueError(f"heads of shape {tuple(heads.weight.shape)} do not fit an output of {tuple(weight.shape)}")
    changed = copy.deepcopy(model)
    plain: Any = changed.model
    layer = plain.get_output_embeddings()
    # Also undoes a tie to the embeddings of what is read, which must stay as they are.
    layer.weight = nn.Parameter((weight + scale * heads.weight.to(weight.dtype)).detach().clone())
    plain.config.get_text_config().tie_word_embeddings = False
    plain.config.tie_word_embeddings = False
    return changed
