"""Aggregation and head alone, on the token states of a frozen backbone that are computed once and kept.

A hundredth of the price of fine-tuning, so that losses and aggregations can be compared over folds and seeds. The
numbers say what a choice does for a linear readout of a general-purpose encoder, not for a fine-tuned one.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.core.layout import scatter_to_table
from plaudit.data.packing import pack_groups
from plaudit.data.records import Comparison
from plaudit.data.targets import make_targets
from plaudit.data.tokenising import TokenisedGroup
from plaudit.models.reward_model import RewardModel
from plaudit.training.objectives import PreferenceObjective, loss_of, tie_rate, why_unusable
from plaudit.training.schedules import learning_rate_factor

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 12, 16, 3e-3, 1e-2


class States:
    """Token ids and last-layer states of every comparison, each text put through the backbone once."""

    def __init__(self, settings: dict[str, Any], records: Sequence[Comparison]) -> None:
        model = RewardModel.from_backbone(RewardTrainingConfig.model_validate(settings).model).eval()
        self.model = model
        self.places = {id(record): place for place, record in enumerate(records)}
        self.groups: list[TokenisedGroup] = []
        self.states: list[Tensor] = []
        for record in records:
            group = model.text_tokeniser.group(record.prompt, list(record.completions))
            with torch.no_grad():
                self.states.append(model.states(pack_groups([group], causal=model.causal)))
            self.groups.append(group)

    def table(self, model: RewardModel, records: Sequence[Comparison]) -> Tensor:
        """Scores `[P, K]` of some records by a model's aggregation and head."""
        places = [self.places[id(record)] for record in records]
        batch = pack_groups([self.groups[place] for place in places], causal=model.causal)
        states = torch.cat([self.states[place] for place in places])
        return scatter_to_table(model.head_scores(states, batch).squeeze(-1), batch.layout)


def train_head(
    states: States, settings: dict[str, Any], train: Sequence[Comparison], test: Sequence[Comparison]
) -> list[list[float]]:
    """Train aggregation and head by AdamW with a linear schedule for a fixed number of epochs; score `test`."""
    config = RewardTrainingConfig.model_validate(settings)
    torch.manual_seed(config.seed)
    parts = replace(
        states.model.parts, aggregation=config.model.aggregation, aggregate_over=config.model.aggregate_over
    )
    model = RewardModel(states.model.backbone, states.model.tokenizer, parts, packed=False, seed=config.seed)
    records = [record for record in train if why_unusable(record, config) is None]
    objective = PreferenceObjective(config, initial_tie_rate=tie_rate(records, config.tie_threshold))
    trained = [*model.aggregation.parameters(), *model.head.parameters(), *objective.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    order, step = random.Random(config.seed), 0
    total = EPOCHS * -(-len(records) // BATCH)
    for _ in range(EPOCHS):
        order.shuffle(records)
        for start in range(0, len(records), BATCH):
            chosen = records[start : start + BATCH]
            scores = states.table(model, chosen)
            targets = make_targets(chosen, num_slots=scores.shape[1], tie_threshold=config.tie_threshold)
            losses = [loss_of(record, config) for record in chosen]
            loss, _ = objective(scores, scores, targets, losses, normaliser=float(len(chosen)))
            optimizer.zero_grad()
            loss.backward()
            factor = learning_rate_factor(step, total_steps=total, schedule="linear", warmup_steps=total // 10)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * factor
            optimizer.step()
            step += 1
    with torch.no_grad():
        return [states.table(model, [record])[0].tolist() for record in test]
