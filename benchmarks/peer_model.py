"""What the peers train (transformers and torch alone): the weights that Plaudit trains, and the same pairs."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

TRAINER: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1e6,
    "gradient_checkpointing": False,
    "bf16": False,
    "logging_strategy": "no",
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""What every trainer of TRL gets: float32 and nothing but the steps."""


class MeanPooledEncoder(PreTrainedModel):
    """An encoder whose score is a linear function of the mean over all token states, as Plaudit's `mean` over the text.

    BERT's own classification head reads a pooler that sentence encoders do not train, so it is not used here. Collators
    of pairs hand over no token types; they are 1 behind the first separator, as the tokenizer gives them.
    """

    base_model_prefix = "backbone"

    def __init__(self, config: Any, backbone: nn.Module, head: nn.Linear, separator_id: int) -> None:
        """Put backbone and head together."""
        super().__init__(config)
        self.backbone, self.head, self.separator_id = backbone, head, separator_id

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
        """Scores `[B, 1]` of rows `[B, T]`."""
        separators = input_ids == self.separator_id
        types = (separators.cumsum(1) - separators.long() > 0).long()
        states = self.backbone(input_ids, attention_mask=attention_mask, token_type_ids=types).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        return SequenceClassifierOutput(logits=self.head((states * mask).sum(1) / mask.sum(1)))


def load(folder: Path) -> nn.Module:
    """The classifier of a prepared folder."""
    if not (folder / "backbone").exists():
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32)
        return model
    config = AutoConfig.from_pretrained(folder / "backbone", num_labels=1)
    backbone = AutoModel.from_pretrained(folder / "backbone", add_pooling_layer=False, dtype=torch.float32)
    head = nn.Linear(config.hidden_size, 1)
    head.load_state_dict(torch.load(folder / "head.pt", weights_only=True))
    separator = json.loads((folder / "steps.json").read_text())["separator_id"]
    return MeanPooledEncoder(config, backbone, head, separator)


@torch.no_grad()
def move_weights(model: nn.Module, size: float = 0.01) -> None:
    """Add the same noise to a language model in every worker, so that it differs from the reference it started as."""
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device), alpha=size)


def shared_names(model: nn.Module) -> dict[str, Tensor]:
    """The parameters under names that every worker uses: the backbone's own, and `head.…`."""
    named = {}
    for name, parameter in model.named_parameters():
        for start, replacement in (("model.", ""), ("backbone.", ""), ("score.", "head.")):
            if name.startswith(start):
                name = replacement + name.removeprefix(start)
                break
        named[name] = parameter
    return named


def exploded_pairs(steps: list[list[dict[str, Any]]]) -> list[list[tuple[list[int], list[int]]]]:
    """Every untied pair of every step as (better, worse) token ids, shuffled within its step as such data is."""
    rng, result = random.Random(0), []
    for step in steps:
        pairs = [(group["rows"][better], group["rows"][worse]) for group in step for better, worse in group["pairs"]]
        rng.shuffle(pairs)
        result.append(pairs)
    return result
