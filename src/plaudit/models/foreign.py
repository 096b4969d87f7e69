"""Reward models that others saved: sequence classification folders, bare value heads, and adapters with a head."""

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from plaudit.models.backbone import (
    DTYPES,
    fit_tokenizer,
    grow_embeddings,
    is_causal,
    load_backbone,
    load_tokenizer,
    longest_text,
)
from plaudit.models.saving import load_native, parts_from, weight_files

if TYPE_CHECKING:
    from plaudit.models.reward_model import RewardModel

logger = logging.getLogger(__name__)

_HEAD = re.compile(r"(^|\.)(score|value_head|reward_head|regression_layer|v_head|rm_head)(\.summary)?\.(weight|bias)$")


def load_foreign(
    folder: Path,
    *,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **changes: Any,
) -> "RewardModel":
    """Open somebody else's reward model.

    Decoders become backbone + last token + head and can be packed; encoders keep their own classification head and
    run as padded rows. Several labels become attributes that weigh equally. OpenRLHF's `mean` and `std`, where the
    configuration has them, become the normalisation.

    Args:
        folder: the folder.
        dtype: of the backbone; None is what its configuration says.
        attn_implementation: `auto`, `packed` or `padded`.
        trust_remote_code: whether code in the folder may run.
        changes: fields of `RewardModelParts` to set, e.g. `max_length` or `template`.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        ValueError: if it is not a reward model: no trained head, or several that could be one.
    """
    from plaudit.models.reward_model import RewardModel

    if (folder / "adapter_config.json").is_file():
        backbone, tokenizer, weight, bias = _load_adapter(folder, dtype, trust_remote_code)
        config: Any = backbone.config
    else:
        if not (folder / "config.json").is_file():
            inside = folder / "model"
            hint = f"; did you mean {inside}?" if (inside / "config.json").is_file() else ""
            raise ValueError(f"{folder}: no model here (neither config.json nor adapter_config.json){hint}")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        chosen = dtype or str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
        if not is_causal(config):
            native = load_native(folder, dtype=chosen, trust_remote_code=trust_remote_code)
            return _native_model(native, config, tokenizer, attn_implementation, changes)
        weight, bias = _find_head(folder, int(config.get_text_config().hidden_size))
        backbone = load_backbone(folder, dtype=chosen, trust_remote_code=trust_remote_code)
    fit_tokenizer(backbone, tokenizer)
    saved = _parts(config, tokenizer, "last", weight.shape[0], name=str(folder))
    model = RewardModel(backbone, tokenizer, parts_from(saved, attn_implementation, changes), initialise=False)
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(torch.zeros(weight.shape[0]) if bias is None else bias)
    _take_normalisation(model, config)
    return model.eval()


def _native_model(
    native: nn.Module, config: Any, tokenizer: Any, attn_implementation: str | None, changes: dict[str, Any]
) -> "RewardModel":
    from plaudit.models.reward_model import RewardModel

    saved = _parts(config, tokenizer, "native", int(config.num_labels), name=None)
    parts = parts_from(saved, attn_implementation, changes)
    model = RewardModel(native, tokenizer, parts, packed=False, initialise=False)
    _take_normalisation(model, config)
    return model.eval()


def _parts(config: Any, tokenizer: Any, aggregation: str, outputs: int, *, name: str | None) -> dict[str, Any]:
    names: tuple[str, ...] = ()
    if outputs > 1:
        labels = getattr(config, "id2label", None) or {}
        names = tuple(str(labels.get(i, labels.get(str(i), f"output_{i}"))) for i in range(outputs))
        logger.warning("the model has %d outputs %s; their total weighs them equally", outputs, names)
    return {
        "aggregation": aggregation,
        "attributes": names,
        "attribute_weights": (1.0 / outputs,) * outputs if names else (),
        "max_length": longest_text(config, tokenizer),
        "backbone_name": name,
    }


def _find_head(folder: Path, hidden_size: int) -> tuple[Tensor, Tensor | None]:
    """The one linear head in a folder's weights: `[A, H]` and, where there is one, its bias `[A]`."""
    files = weight_files(folder)
    if not files:
        raise ValueError(f"{folder}: no safetensors weights; convert them first (pickled weights are not opened)")
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name).float() for name in file.keys() if _HEAD.search(name)}  # noqa: SIM118
    weights = {name: value for name, value in found.items() if name.endswith("weight") and value.ndim == 2}
    weights = {name: value for name, value in weights.items() if value.shape[1] == hidden_size}
    if len(weights) != 1:
        what = f"several heads {sorted(weights)}" if weights else "no reward head"
        hint = "" if weights else "; train one on it with plaudit reward --model.backbone"
        raise ValueError(f"{folder}: {what} among its weights, so its scores would be random or a guess{hint}")
    name, weight = next(iter(weights.items()))
    return weight, found.get(name.removesuffix("weight") + "bias")


def _load_adapter(
    folder: Path, dtype: str | None, trust_remote_code: bool
) -> tuple[nn.Module, Any, Tensor, Tensor | None]:
    """Adapters that were trained on a sequence classification model, merged; the head must be among them."""
    import peft

    description = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = description["base_model_name_or_path"]
    weight, bias = _find_adapter_head(folder)
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    config.num_labels = weight.shape[0]
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(folder if has_tokenizer else base, trust_remote_code=trust_remote_code)
    chosen = dtype or str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    classifier = AutoModelForSequenceClassification.from_pretrained(
        base, config=config, dtype=DTYPES[chosen], trust_remote_code=trust_remote_code
    )
    grow_embeddings(classifier, len(tokenizer))
    merged = peft.PeftModel.from_pretrained(classifier, str(folder)).merge_and_unload()
    backbone: nn.Module = merged.base_model
    return backbone, tokenizer, weight, bias


def _find_adapter_head(folder: Path) -> tuple[Tensor, Tensor | None]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name).float() for name in file.keys() if _HEAD.search(name)}  # noqa: SIM118
    weights = [name for name in found if name.endswith("weight") and "lora_" not in name]
    if len(weights) != 1:
        raise ValueError(
            f"{folder}: the adapters come without a trained head ({sorted(found)}); scores would be random"
        )
    return found[weights[0]], found.get(weights[0].removesuffix("weight") + "bias")


def _take_normalisation(model: "RewardModel", config: Any) -> None:
    mean, std = getattr(config, "mean", None), getattr(config, "std", None)
    if isinstance(mean, (int, float)) and isinstance(std, (int, float)) and std > 0 and model.num_outputs == 1:
        model.set_normalisation(float(mean), float(std))
