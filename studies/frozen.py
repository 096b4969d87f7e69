"""A head fitted on the token states of a frozen backbone, which are computed once and kept.

A hundredth of the price of fine-tuning, so that losses and aggregations can be compared over all folds. The numbers
say what a choice does for a linear readout of a general-purpose encoder, not for a fine-tuned one. The head is the
optimum of its loss with a ridge that is chosen inside the training folds (`plaudit.training.head_fit`): there is no
randomness in it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.core.layout import scatter_to_table
from plaudit.data.packing import pack_groups
from plaudit.data.records import Comparison
from plaudit.data.splits import split_keys
from plaudit.data.targets import make_targets
from plaudit.models.aggregation import build_aggregation
from plaudit.models.reward_model import RewardModel
from plaudit.training.head_fit import choose_ridge, fit_linear
from plaudit.training.objectives import PreferenceObjective, loss_of, tie_rate, why_unusable

READ = (
    ("mean", "completion"),
    ("mean", "text"),
    ("sum", "completion"),
    ("discounted_sum", "completion"),
    ("last", "completion"),
)
"""Aggregations without weights of their own, and the tokens they read."""
LEARNED = ("weighted_sum", "attention")
"""Aggregations with weights of their own, which are fitted beside the head (see `pooling.py`)."""
TOKENS_OF = (4, 5)
"""Layers whose states are kept token by token, for those."""


@dataclass(frozen=True)
class Fit:
    """A head that was fitted to some records, and what it was fitted with.

    Attributes:
        records: those of them that teach the loss anything.
        weight: `[L·H]`.
        ridge: the chosen `λ`.
        spread: `[L·H]`, the deviation of each feature over their completions.
    """

    records: list[Comparison]
    weight: Tensor
    ridge: float
    spread: Tensor


class States:
    """What every aggregation reads of every layer, for every comparison: each text goes through the backbone once.

    Attributes:
        width: the largest number of completions, `K`.
        tables: by aggregation, `[P, K, L, H]` with the embeddings and then every layer of the backbone.
        tokens: by (record, completion), `[T, 2H]`, the answer's tokens at the layers `TOKENS_OF`, in half precision.
    """

    def __init__(self, settings: dict[str, Any], records: Sequence[Comparison], file: Path) -> None:
        self.places = {id(record): place for place, record in enumerate(records)}
        self.width = max(len(record.completions) for record in records)
        if not file.exists():
            started = time.perf_counter()
            torch.save(read_states(settings, records, self.width, file.with_suffix("")), file)
            print(f"states of {len(records)} comparisons in {time.perf_counter() - started:.0f} s", flush=True)
        self.tables: dict[tuple[str, str], Tensor] = torch.load(file)
        self.tokens: dict[tuple[int, int], Tensor] = {}
        self.parts = sorted(file.with_suffix("").glob("*-tokens.pt"))

    def tokens_of(self, records: Sequence[Comparison]) -> list[list[Tensor]]:
        """`[T, 2H]` of every completion of these records; read from the disk at the first call."""
        if not self.tokens:
            for part in self.parts:
                self.tokens |= torch.load(part)
        places = [self.places[id(record)] for record in records]
        return [
            [self.tokens[place, slot] for slot in range(len(record.completions))]
            for place, record in zip(places, records, strict=True)
        ]

    def features(self, config: RewardTrainingConfig) -> Tensor:
        """`agg(h)` of every completion by a configuration's aggregation and layers: `[P, K, L·H]`.

        Raises:
            ValueError: for an aggregation with weights of its own, which would have to be trained.
        """
        name = (config.model.aggregation, config.model.aggregate_over)
        if name not in self.tables:
            raise ValueError(f"aggregation {name} cannot be fitted in one go; it can be one of {READ}")
        table = self.tables[name]
        last = config.model.backbone_layers or table.shape[2] - 1
        layers = config.model.read_layers or (last,)
        chosen = list(range(last + 1)) if layers == "all" else list(layers)
        return table[:, :, chosen].flatten(2).float()


@torch.no_grad()
def read_states(
    settings: dict[str, Any], records: Sequence[Comparison], width: int, folder: Path, *, groups_at_once: int = 8
) -> dict[tuple[str, str], Tensor]:
    """Put every text through the whole backbone: the tables of `States`, in half precision.

    What has been read is kept in `folder`, 32 comparisons to a file, so that a reading that was stopped goes on.
    """
    folder.mkdir(exist_ok=True)
    layers = {"model": {"backbone_layers": None, "read_layers": "all", "aggregation": "mean"}}
    config = RewardTrainingConfig.model_validate({**settings, "model": {**settings["model"], **layers["model"]}})
    model = RewardModel.from_backbone(config.model).eval()
    groups = [model.text_tokeniser.group(record.prompt, list(record.completions)) for record in records]
    size = model.head.weight.shape[1]
    depth = len(model.parts.read_layers)
    hidden = size // depth
    readers = {name: build_aggregation(name[0], size, over=name[1]) for name in READ}
    tables = {name: torch.zeros(len(records), width, depth, hidden, dtype=torch.half) for name in READ}
    order = sorted(range(len(groups)), key=lambda place: groups[place].longest)
    for start in range(0, len(order), 32):
        part = order[start : start + 32]
        file = folder / f"{start}.pt"
        if not file.exists():
            tokens: dict[tuple[int, int], Tensor] = {}
            for at in range(0, len(part), groups_at_once):
                chosen = part[at : at + groups_at_once]
                batch = pack_groups([groups[place] for place in chosen], causal=model.causal, num_slots=width)
                states = model.states(batch)
                for name, reader in readers.items():
                    table = scatter_to_table(reader(states, batch.layout), batch.layout)
                    tables[name][chosen] = table.unflatten(-1, (depth, -1)).half()
                layout, by_layer = batch.layout, states.unflatten(-1, (depth, -1))
                for c, (group, slot) in enumerate(zip(layout.group_index, layout.slot_index, strict=True)):
                    own = by_layer[layout.completion_starts[c] : layout.completion_ends[c], list(TOKENS_OF)]
                    tokens[chosen[int(group)], int(slot)] = own.flatten(1).half()
            torch.save(tokens, folder / f"{start}-tokens.pt")
            torch.save({name: table[part] for name, table in tables.items()}, file)
        for name, table in torch.load(file).items():
            tables[name][part] = table
    return tables


def fit(
    states: States, config: RewardTrainingConfig, train: Sequence[Comparison], features: Tensor | None = None
) -> Fit:
    """Fit a head to `train`, its ridge chosen by cross-fitting over the prompts.

    Args:
        states: of all records.
        config: the loss, and which states are read.
        train: the records to learn from.
        features: `[P, K, F]` of all records; None takes what `config` reads.
    """
    records = [record for record in train if why_unusable(record, config) is None]
    features = states.features(config) if features is None else features
    inside = features[[states.places[id(record)] for record in records]]
    objective = PreferenceObjective(config, initial_tie_rate=tie_rate(records, config.tie_threshold))
    targets = make_targets(records, num_slots=states.width, tie_threshold=config.tie_threshold)
    losses = [loss_of(record, config) for record in records]
    tried = choose_ridge(inside, targets, losses, split_keys(records, "prompt"), objective)
    ridge = min(tried, key=lambda each: tried[each])
    weight, _ = fit_linear(inside, targets, losses, objective, ridge=ridge)
    return Fit(records, weight[0], ridge, inside[targets.mask].std(0).clamp(min=1e-8))


def fitted_scores(
    states: States,
    settings: dict[str, Any],
    train: Sequence[Comparison],
    test: Sequence[Comparison],
    features: Tensor | None = None,
) -> list[list[float]]:
    """Fit a head to `train` and score `test` with it."""
    config = RewardTrainingConfig.model_validate(settings)
    features = states.features(config) if features is None else features
    weight = fit(states, config, train, features).weight
    return [(features[states.places[id(record)], : len(record.completions)] @ weight).tolist() for record in test]
