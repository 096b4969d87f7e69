"""A decoding step of Llama and its kin with few operations: the model's own weights, read without its modules.

At a few million weights most of a step goes into the many small operations of the modules, not into arithmetic. Like
every way of decoding it is held against the plain forward before it is used, see `plaudit.rollout.paths`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from plaudit.models.states import unwrap
from plaudit.rollout.products import Product

LEAN_MODELS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Classes of transformers base models that this step computes; SmolLM and many others are Llamas."""

_FUSE_BELOW = 100_000_000
_WORTH_PREPARING = 1024

Attend = Callable[..., Tensor]
"""`(query [R, h, d], key [R, g, d], value, *, window, scaling) -> [R, h, d]`."""


def lean_step(base: nn.Module, *, rows: int = 1, tokens: int = 1) -> "LeanStep | None":
    """The lean step of this model; None for other architectures and for layers that are not plain (adapters, hooks).

    Args:
        base: a transformers base model.
        rows: about how many rows a step will have.
        tokens: how many it will read in all, prompts included; many are worth laying out the weights for them.
    """
    model: Any = base
    if unwrap(base) is not base or type(model).__name__ not in LEAN_MODELS or model.config.hidden_act != "silu":
        return None
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        parts = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        parts += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        if any(type(part) is not nn.Linear for part in parts):
            return None
    for module in model.modules():
        # Whoever has put himself around a module wants to be asked; `forward` of its own is accelerate's way.
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return None
    return LeanStep(model, rows=rows if tokens >= _WORTH_PREPARING else 0)


class LeanStep:
    """Reads one token per row, or whole prompts; built anew for every call of `generate`, to see weights as they are.

    Small models' matrices of one layer that read the same input are laid side by side, and all are laid out for few
    rows; large ones are left where they are.

    Attributes:
        prepared: whether weights were laid out.
    """

    def __init__(self, model: Any, *, rows: int = 0) -> None:
        """Collect the weights of a model that `lean_step` has found fit; `rows` as for `Product`."""
        self._model = model
        self._fused = sum(parameter.numel() for parameter in model.parameters()) < _FUSE_BELOW
        self._rows = rows if self._fused else 0
        self._layers = [_Layer(self, layer) for layer in model.layers]
        self.prepared = self._layers[0].prepared

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend, only: Tensor | None = None) -> Tensor:
        """Tokens `[R]` at positions `[R]` to states `[R, H]`; attention is left to `attend`.

        With `only`, `[n]` places, to the states `[n, H]` of these: the last layer reads the others for its keys and
        values alone.
        """
        hidden = self._model.embed_tokens(tokens)
        cos, sin = (table[0][:, None] for table in self._model.rotary_emb(hidden[None], positions[None]))
        for layer in self._layers[:-1]:
            hidden = layer(hidden, cos, sin, attend)
        hidden = self._layers[-1](hidden, cos, sin, attend, only)
        norm = self._model.norm
        return rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)

    def product(self, part: nn.Linear) -> Product:
        """The product with a layer's weights."""
        return Product(part.weight, part.bias, rows=self._rows)

    def side_by_side(self, parts: list[nn.Linear]) -> list[Product]:
        """Products that read the same input: one with all weights in small models."""
        if not self._fused or len({part.bias is None for part in parts}) > 1:
            return [self.product(part) for part in parts]
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        weights: list[Tensor] = [part.weight for part in parts]
        return [Product(torch.cat(weights), torch.cat(biases) if biases else None, rows=self._rows)]

    def window(self, attention: Any) -> int | None:
        """The sliding window of a layer, in positions."""
        if hasattr(attention, "sliding_window"):
            return attention.sliding_window  # type: ignore[no-any-return]
        mistral = type(self._model).__name__ == "MistralModel"
        return self._model.config.sliding_window if mistral else None


class _Layer:
    """One layer of the lean step."""

    def __init__(self, step: LeanStep, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._norm, self._second_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._size = attention.head_dim
        self._count = attention.q_proj.out_features // self._size
        self._groups = attention.k_proj.out_features // self._size
        # Qwen 3 normalises each head's query and key.
        self._head_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        self._options = {"window": step.window(attention), "scaling": attention.scaling}
        self._inputs = step.side_by_side([attention.q_proj, attention.k_proj, attention.v_proj])
        self._output, self._down = step.product(attention.o_proj), step.product(mlp.down_proj)
        self._gate, self._up = step.product(mlp.gate_proj), step.product(mlp.up_proj)
        self.prepared = self._down.prepared

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend, only: Tensor | None = None) -> Tensor:
        """States `[R, H]` before the layer to those behind it, of all or of those at the places `only`."""
        rows, norm = hidden.shape[0], self._norm
        normed = rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
        found = [product(normed) for product in self._inputs]
        heads = (found[0] if len(found) == 1 else torch.cat(found, -1)).view(rows, -1, self._size)
        turned, value = heads[:, : self._count + self._groups], heads[:, self._count + self._groups :]
        if self._head_norms is not None:
            parts = zip(self._head_norms, torch.split(turned, [self._count, self._groups], 1), strict=True)
            turned = torch.cat([rms_norm(x, n.weight.shape, n.weight, n.variance_epsilon) for n, x in parts], 1)
        half = self._size // 2
        swapped = torch.cat((-turned[..., half:], turned[..., :half]), -1)
        turned = turned * cos + swapped * sin
        mixed = attend(turned[:, : self._count], turned[:, self._count :], value, **self._options)
        mixed = mixed.reshape(rows, -1)
        if only is not None:
            mixed, hidden = mixed[only], hidden[only]
        hidden = self._output.plus(mixed, hidden)
        norm = self._second_norm
        normed = rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
        return self._down.plus(self._up.times(normed, self._gate.silu(normed)), hidden)
