"""A head fitted on the token states of a frozen backbone, which are computed once and kept.

A hundredth of the price of fine-tuning, so that losses and aggregations can be compared over all folds. The numbers
say what a choice does for a linear readout of a general-purpose encoder, not for a fine-tuned one. The head is the
optimum of its loss with a ridge that is chosen inside the training folds (`plaudit.training.head_fit`): there is no
randomness in it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.core.layout import scatter_to_table
from plaudit.data.packing import pack_groups
from plaudit.data.records import Comparison
from plaudit.data.splits import split_keys
from plaudit.data.targets import make_targets
from plaudit.data.tokenising import TokenisedGroup
from plaudit.models.reward_model import RewardModel
from plaudit.training.head_fit import choose_ridge, fit_linear
from plaudit.training.objectives import PreferenceObjective, loss_of, tie_rate, why_unusable


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
        self.width = max(group.num_slots for group in self.groups)
        self.pooled: dict[tuple[str, str], Tensor] = {}

    def features(self, config: RewardTrainingConfig) -> Tensor:
        """`agg(h)` of every completion by a configuration's aggregation: `[P, K, H]`.

        Raises:
            ValueError: for an aggregation with weights of its own, which would have to be trained.
        """
        name = (config.model.aggregation, config.model.aggregate_over)
        if name not in self.pooled:
            parts = replace(self.model.parts, aggregation=name[0], aggregate_over=name[1])
            aggregation = RewardModel(self.model.backbone, self.model.tokenizer, parts, packed=False).aggregation
            if any(True for _ in aggregation.parameters()):
                raise ValueError(f"aggregation {name[0]!r} has weights of its own; it cannot be fitted in one go")
            rows = []
            for group, states in zip(self.groups, self.states, strict=True):
                layout = pack_groups([group], causal=self.model.causal, num_slots=self.width).layout
                rows.append(scatter_to_table(aggregation(states.float(), layout), layout)[0])
            self.pooled[name] = torch.stack(rows)
        return self.pooled[name]


def fitted_scores(
    states: States, settings: dict[str, Any], train: Sequence[Comparison], test: Sequence[Comparison]
) -> list[list[float]]:
    """Fit a head to `train` and score `test` with it."""
    config = RewardTrainingConfig.model_validate(settings)
    features = states.features(config)
    records = [record for record in train if why_unusable(record, config) is None]
    objective = PreferenceObjective(config, initial_tie_rate=tie_rate(records, config.tie_threshold))
    targets = make_targets(records, num_slots=states.width, tie_threshold=config.tie_threshold)
    losses = [loss_of(record, config) for record in records]
    inside = features[[states.places[id(record)] for record in records]]
    tried = choose_ridge(inside, targets, losses, split_keys(records, "prompt"), objective)
    weight, _ = fit_linear(inside, targets, losses, objective, ridge=min(tried, key=lambda each: tried[each]))
    return [(features[states.places[id(record)], : len(record.completions)] @ weight[0]).tolist() for record in test]
