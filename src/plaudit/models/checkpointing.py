"""Gradient checkpointing of transformers models, under the name that the installed version has for it."""

from typing import Any

from torch import nn

from plaudit.models.states import unwrap


def enable_checkpointing(model: nn.Module, *, use_reentrant: bool = False) -> None:
    """Recompute activations in the backward pass instead of keeping them; the gradients are the same.

    Args:
        model: a transformers model, with or without adapters.
        use_reentrant: torch's older variant; it needs inputs that require a gradient, which is arranged.
    """
    plain: Any = unwrap(model)
    enable = getattr(plain, "activation_checkpointing_enable", None)
    if enable is None:
        plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    else:
        enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        plain.enable_input_require_grads()


def disable_checkpointing(model: nn.Module) -> None:
    """Keep activations again."""
    plain: Any = unwrap(model)
    disable = getattr(plain, "activation_checkpointing_disable", None) or plain.gradient_checkpointing_disable
    disable()
