"""One decoding step of Llama and its kin with few operations: the model's own weights, read without its modules.

At a few million weights most of a step goes into the many small operations of the modules, not into arithmetic. Like
every way of decoding it is held against the plain forward before it is used, see `plaudit.rollout.paths`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from plaudit.models.states import unwrap

LEAN_MODELS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Classes of transformers base models that this step computes; SmolLM and many others are Llamas."""

_FUSE_BELOW = 100_000_000

Attend = Callable[..., Tensor]
"""`(query [1, h, R, d], key [1, g, R, d], value, *, window, scaling, softcap, sinks) -> [1, R, h, d]`."""


def lean_step(base: nn.Module) -> "LeanStep | None":
    """The lean step of this model; None for other architectures and for layers that are not plain (adapters, hooks)."""
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
    return LeanStep(model)


class LeanStep:
    """Reads one token per row; built anew for every batch, so that it sees the weights as they are.

    Small models' matrices of one layer that read the same input are laid side by side; large ones are left where they
    are.
    """

    def __init__(self, model: Any) -> None:
        """Collect the weights of a model that `lean_step` has found fit."""
        self._model = model
        self._fused = sum(parameter.numel() for parameter in model.parameters()) < _FUSE_BELOW
        self._layers = [self._collect(layer) for layer in model.layers]

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Tokens `[R]` at positions `[R]` to states `[R, H]`; attention is left to `attend`."""
        hidden = self._model.embed_tokens(tokens)
        cos, sin = (table[0][:, None] for table in self._model.rotary_emb(hidden[None], positions[None]))
        size, half = cos.shape[-1], cos.shape[-1] // 2
        rows, width = hidden.shape
        for layer, (inputs, gates) in zip(self._model.layers, self._layers, strict=True):
            attention = layer.self_attn
            norm = layer.input_layernorm
            normed = rms_norm(hidden, (width,), norm.weight, norm.variance_epsilon)
            heads = _project(normed, inputs).view(rows, -1, size)
            count = attention.q_proj.out_features // size
            groups = attention.k_proj.out_features // size
            turned, value = heads[:, : count + groups], heads[:, count + groups :]
            if hasattr(attention, "q_norm"):
                parts = zip((attention.q_norm, attention.k_norm), torch.split(turned, [count, groups], 1), strict=True)
                turned = torch.cat([rms_norm(x, (size,), n.weight, n.variance_epsilon) for n, x in parts], 1)
            swapped = torch.cat((-turned[..., half:], turned[..., :half]), -1)
            turned = turned * cos + swapped * sin
            query, key = turned[:, :count], turned[:, count:]
            mixed = attend(
                *(part.transpose(0, 1)[None] for part in (query, key, value)),
                window=self._window(attention),
                scaling=attention.scaling,
                softcap=None,
                sinks=None,
            )
            output = attention.o_proj
            hidden = hidden + linear(mixed.reshape(rows, -1), output.weight, output.bias)
            norm = layer.post_attention_layernorm
            normed = rms_norm(hidden, (width,), norm.weight, norm.variance_epsilon)
            gate, up = _project(normed, gates).chunk(2, -1)
            down = layer.mlp.down_proj
            hidden = hidden + linear(silu(gate) * up, down.weight, down.bias)
        norm = self._model.norm
        return rms_norm(hidden, (width,), norm.weight, norm.variance_epsilon)

    def _collect(self, layer: Any) -> tuple[list[tuple[Tensor, Tensor | None]], list[tuple[Tensor, Tensor | None]]]:
        attention, mlp = layer.self_attn, layer.mlp
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        return self._side_by_side(inputs), self._side_by_side([mlp.gate_proj, mlp.up_proj])

    def _side_by_side(self, parts: list[nn.Linear]) -> list[tuple[Tensor, Tensor | None]]:
        if not self._fused or len({part.bias is None for part in parts}) > 1:
            return [(part.weight, part.bias) for part in parts]
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        weights: list[Tensor] = [part.weight for part in parts]
        return [(torch.cat(weights), torch.cat(biases) if biases else None)]

    def _window(self, attention: Any) -> int | None:
        if hasattr(attention, "sliding_window"):
            return attention.sliding_window  # type: ignore[no-any-return]
        mistral = type(self._model).__name__ == "MistralModel"
        return self._model.config.sliding_window if mistral else None


def _project(states: Tensor, parts: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    found = [linear(states, weight, bias) for weight, bias in parts]
    return found[0] if len(found) == 1 else torch.cat(found, -1)
