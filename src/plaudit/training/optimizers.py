"""Optimizers with sensible parameter groups, and gradient clipping."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plaudit.configs.training import OptimizerConfig
from plaudit.training.messages import warn

OPTIMIZERS = ("adamw", "sgd")
FUSED_DEVICES = ("cpu", "cuda")
LOSS_PREFIX = "objective."
"""How the names of parameters start that the loss learns, such as a tie parameter."""


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    head_learning_rate: float | None = None,
    head_prefixes: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Split the trainable parameters into groups by learning rate and weight decay.

    Vectors and scalars (norms, biases, a tie parameter) and embeddings are not decayed: pulling them towards 0 does
    not simplify the function, it only shrinks scales that the network must win back (Loshchilov and Hutter 2019
    decay all; leaving these out is the practice since GPT-2). Parameters whose name starts with one of
    `head_prefixes` may have their own rate: a fresh head on a pretrained backbone wants a larger one.

    Args:
        model: whose `named_parameters` with `requires_grad` are taken, each once (tied ones are not doubled).
        learning_rate: peak rate of the backbone.
        weight_decay: of matrices that are not embeddings.
        head_learning_rate: peak rate of the head; None means `learning_rate`.
        head_prefixes: how the names of head parameters start.

    Returns:
        Groups with `params`, `lr`, `peak_lr`, `weight_decay` and `name`, in a fixed order, without empty ones.

    Raises:
        ValueError: if nothing is trainable.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "head" if any(name.startswith(prefix) for prefix in head_prefixes) else "backbone"
        # What the loss itself learns is never in shards, and one group cannot hold both kinds.
        part = "loss" if name.startswith(LOSS_PREFIX) else part
        # Mixtures of experts keep the biases of all experts in one matrix.
        decayed = parameter.ndim >= 2 and id(parameter) not in embeddings and not name.endswith("bias")
        groups.setdefault((part, decayed), []).append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameters")
    head_rate = learning_rate if head_learning_rate is None else head_learning_rate
    rates = {"backbone": learning_rate, "head": head_rate, "loss": head_rate}
    return [
        {
            "params": groups[part, decayed],
            "lr": rates[part],
            "peak_lr": rates[part],
            "weight_decay": weight_decay if decayed else 0.0,
            "name": f"{part}/{'decayed' if decayed else 'not decayed'}",
        }
        for part, decayed in sorted(groups)
    ]


def make_optimizer(
    groups: list[dict[str, Any]],
    *,
    name: str,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    momentum: float = 0.0,
) -> torch.optim.Optimizer:
    """AdamW (decoupled decay) or plain SGD (with momentum where it is not 0) over `groups`.

    One fused kernel updates a whole group where the device has one; the default loop over parameters takes four times
    as long on the CPU. A fused optimizer also takes a tensor `found_inf`: where it is 1 the weights stay.

    Raises:
        ValueError: for an unknown name.
    """
    fused = all(each.device.type in FUSED_DEVICES and each.is_floating_point() for g in groups for each in g["params"])
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=epsilon, fused=fused)
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=momentum, fused=fused)
    raise ValueError(f"optimizer {name!r} is unknown: use one of {', '.join(OPTIMIZERS)}")


def build_optimizer(
    trained: nn.Module, settings: OptimizerConfig, *, head_prefixes: tuple[str, ...] = ()
) -> torch.optim.Optimizer:
    """The optimizer that a configuration asks for, over the trainable parameters of `trained`."""
    groups = parameter_groups(
        trained,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        head_learning_rate=settings.head_learning_rate,
        head_prefixes=head_prefixes,
    )
    coarse = {str(each.dtype) for each in trained.parameters() if each.requires_grad and each.dtype.itemsize < 4}
    if coarse:
        kinds = ", ".join(sorted(coarse)).replace("torch.", "")
        warn(
            f"weights in {kinds} are trained: updates below 1/256 of a weight are lost to rounding; "
            "model.dtype: float32 with precision: bf16 keeps them"
        )
    return make_optimizer(
        groups, name=settings.name, betas=settings.betas, epsilon=settings.epsilon, momentum=settings.momentum
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their joint Euclidean norm is at most `max_norm`; None measures and leaves them.

    Gradients in shards count with those of all processes, each of which has to call this.

    Returns:
        The norm before clipping, a scalar; not finite when a gradient is not.
    """
    held = [parameter for parameter in parameters if parameter.grad is not None]
    sharded = [parameter for parameter in held if isinstance(parameter.grad, DTensor)]
    plain = [parameter for parameter in held if not isinstance(parameter.grad, DTensor)]
    norms = []
    for kind in (sharded, plain):
        if kind or (kind is plain and not sharded):
            norm = torch.nn.utils.get_total_norm([each.grad for each in kind if each.grad is not None])
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    joint = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None:
        for kind in (sharded, plain):
            torch.nn.utils.clip_grads_with_norm_(kind, max_norm, joint)
    return joint
