"""Gradient checkpointing of transformers models, under the name that the installed version has for it."""

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

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


def checkpoint_in_evaluation(model: nn.Module) -> None:
    """Let a model that recomputes do so in evaluation mode as well; nothing else of the mode changes.

    Transformers asks a layer's own `training` flag whether to recompute. That flag alone is raised here, those of the
    layer's parts (attention, dropout modules, adapters) stay down. `eval()` takes it back.

    Args:
        model: a transformers model in evaluation mode, after `enable_checkpointing`.

    Raises:
        ValueError: if the model's layers do not recompute, or drop out by themselves, which the flag would switch on.
    """
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    layers = [layer for layer in layers if layer.gradient_checkpointing]
    name = type(unwrap(model)).__name__
    if not layers:
        raise ValueError(f"gradient_checkpointing: the layers of {name} cannot recompute; leave it out")
    for layer in layers:
        dropped = [key for key, value in vars(layer).items() if "drop" in key and isinstance(value, float) and value]
        if dropped:
            raise ValueError(f"gradient_checkpointing: {name} drops out ({dropped[0]}); set its dropout to 0")
    for layer in layers:
        layer.training = True


def disable_checkpointing(model: nn.Module) -> None:
    """Keep activations again."""
    plain: Any = unwrap(model)
    disable = getattr(plain, "activation_checkpointing_disable", None) or plain.gradient_checkpointing_disable
    disable()
