"""Low-rank adapters through peft. The head and the aggregation are never frozen: they are trained and saved in full."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from plaudit.configs.model import LoraConfig
from plaudit.models.states import unwrap

if TYPE_CHECKING:
    from plaudit.models.reward_model import RewardModel


def add_lora(model: "RewardModel", config: LoraConfig, *, seed: int = 0) -> None:
    """Freeze the backbone and put adapters into it; the head and the aggregation stay trainable.

    Args:
        model: the reward model, changed in place.
        config: rank, scale and layers.
        seed: seed of the adapters' weights; the global generator is left as it was.

    Raises:
        ImportError: if peft is not installed.
        ValueError: if the model has adapters already.
    """
    if has_lora(model):
        raise ValueError("the model has adapters already; merge them first")
    model.backbone = wrap_lora(model.backbone, config, seed=seed)


def wrap_lora(model: nn.Module, config: LoraConfig, *, seed: int = 0) -> nn.Module:
    """A transformers model with adapters and everything else frozen.

    An adapter adds `alpha / rank · B A` to its layer, with `B = 0` at first (Hu et al. 2021): outputs do not change.

    Args:
        model: the model; its layers are replaced in place.
        config: rank, scale and layers.
        seed: seed of the adapters' weights; the global generator is left as it was.

    Returns:
        The model in peft's wrapper.

    Raises:
        ImportError: if peft is not installed.
    """
    peft = _peft()
    targets = config.target_modules
    adapter = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped: nn.Module = peft.get_peft_model(model, adapter)
    return wrapped


def has_lora(model: "RewardModel") -> bool:
    """Whether the backbone carries adapters."""
    return unwrap(model.backbone) is not model.backbone


def merge_lora(model: "RewardModel") -> None:
    """Add the adapters into the backbone's weights, in place; every weight is trainable again, scores stay the same."""
    if has_lora(model):
        backbone: Any = model.backbone
        model.backbone = backbone.merge_and_unload()
        model.backbone.requires_grad_(True)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need peft: pip install 'plaudit[lora]'") from error
    return peft
