"""Folding the normalising shift into the weights, where that is exact."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from plaudit.models.saving import saved_form
from plaudit.models.states import unwrap

if TYPE_CHECKING:
    from plaudit.models.reward_model import RewardModel

_FINAL_NORMS = ("ln_f", "final_layer_norm", "final_layernorm", "norm", "decoder.final_layer_norm")


@torch.no_grad()
def fold_shift(model: "RewardModel") -> bool:
    """Make raw scores equal to normalised ones by moving the stored mean, and `b`, to where every tool sees them.

    A model in Plaudit's own form has a bias: `b ← b − mean`. A last-token decoder that others open has none; where its
    final normalisation layer has a bias `β` (GPT-2, GPT-NeoX, Phi, OPT, Starcoder 2) and there is one output,
    `β ← β + (b − mean) W/|W|²`, `b ← 0` gives the same scores exactly, since nothing but the head reads those states.
    RMS-normalised decoders (Llama and most since) have no place for it: the shift stays in `plaudit.json`.

    Args:
        model: changed in place where folding is possible.

    Returns:
        Whether it was folded.
    """
    form = saved_form(model)
    if form in ("own", "adapter"):
        model.head.bias.sub_(model.normalisation_mean)
    elif form == "classifier" and model.num_outputs == 1 and (norm := final_norm(model)) is not None:
        weight = model.head.weight[0]
        step = (model.head.bias[0] - model.normalisation_mean[0]) / weight.square().sum()
        norm.bias.add_((step * weight).to(norm.bias.dtype))
        model.head.bias.zero_()
    else:
        return False
    model.normalisation_mean.zero_()
    return True


def final_norm(model: "RewardModel") -> nn.LayerNorm | None:
    """The decoder's last layer, where that is a LayerNorm with a bias."""
    plain: Any = unwrap(model.backbone)
    for name in _FINAL_NORMS:
        try:
            module = plain.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            return module
    return None
