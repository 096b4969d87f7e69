"""The parts of a reward model's training, and what they do with one micro-batch."""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.core.layout import scatter_to_table
from plaudit.core.preference_losses import pairwise_ranking_loss
from plaudit.models.reward_model import RewardModel
from plaudit.training.accumulation import backward_in_parts
from plaudit.training.objectives import PAIR_SUMS, PreferenceObjective, mean_metrics
from plaudit.training.optimizers import build_optimizer
from plaudit.training.parallel import Network
from plaudit.training.precision import autocast
from plaudit.training.processes import Processes
from plaudit.training.reward_batches import MicroBatch, RewardData
from plaudit.training.session import Session, records_hash

HEAD_PREFIXES = ("model.head.", "model.aggregation.", "objective.")


@dataclass
class RewardTrainer:
    """The parts of one training run, put together by `main`.

    Attributes:
        model: the reward model.
        objective: the loss, with its tie parameter where it learns one.
        train: comparisons to learn from.
        held_out: comparisons to evaluate on, or None.
        processes: who shares the run.
        network: the model as all of them call it.
    """

    config: RewardTrainingConfig
    model: RewardModel
    objective: PreferenceObjective
    train: RewardData
    held_out: RewardData | None
    processes: Processes
    network: Network = field(init=False)
    trained: nn.ModuleDict = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.network = Network(self.model, self.processes, precision=self.config.precision)
        self.trained = nn.ModuleDict({"model": self.model, "objective": self.objective}).to(self.device)
        self.optimizer = build_optimizer(self.trained, self.config.optimizer, head_prefixes=HEAD_PREFIXES)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.processes.device

    @property
    def held_out_hash(self) -> str:
        """SHA-256 of the held-out records: which weights are the best depends on them."""
        return records_hash([] if self.held_out is None else self.held_out.tokenised.records)

    def session(self, data_hash: str) -> Session:
        """What is saved of the run and found again."""
        return Session(
            self.config,
            self.trained,
            self.optimizer,
            data_hash=data_hash,
            held_out_hash=self.held_out_hash,
            processes=self.processes,
        )

    def scores(self, micro: MicroBatch, number: int = 0) -> Tensor:
        """Scores of one pass of a micro-batch, `[P, K]` or `[P, K, A]` in float32, 0 where another pass has the score.

        An idle pass goes through the network too, and comes out as zeros with a graph.
        """
        batch = micro.passes[number]
        with self.autocast():
            scores: Tensor = self.network(batch)
        if micro.idle[number]:
            table: Tensor = scores.new_zeros((len(micro.indices), micro.num_slots, *scores.shape[1:]))
            return table + 0.0 * scores.sum()
        return scatter_to_table(scores, batch.layout)

    def loss(
        self, table: Tensor, micro: MicroBatch, weight_sum: float, *, smoothing: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The share of a micro-batch in the loss of a step whose records weigh `weight_sum`, from its score table."""
        if micro.targets is None:
            return table.sum(), {name: table.new_zeros(()) for name in PAIR_SUMS}
        total = self.model.total(table)
        found: tuple[Tensor, dict[str, Tensor]] = self.objective(
            table, total, micro.targets, micro.losses, normaliser=weight_sum, smoothing=smoothing
        )
        return found

    def backward(self, micro: MicroBatch, weight_sum: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradient of a micro-batch's share; returns the detached share and the sums for the metrics."""
        return backward_in_parts(
            [partial(self.scores, micro, number) for number in range(len(micro.passes))],
            lambda table: self.loss(table, micro, weight_sum),
            device=self.device,
        )

    def micro_batch_loss(self, chosen: Sequence[int], weight_sum: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The share of these training records in the loss of a step, in one pass and with its graph."""
        micro = self.train.micro_batch(chosen).to(self.device)
        return self.loss(self.scores(micro), micro, weight_sum)

    def autocast(self) -> AbstractContextManager[object]:
        """The number format of the backbone."""
        return autocast(self.device, self.config.precision)

    @torch.no_grad()
    def evaluate(self, data: RewardData) -> dict[str, float]:
        """Held-out metrics without dropout, smoothing, margins or centring; each process looks at its share.

        Returns:
            `loss` (the training loss), `accuracy` and `margin` over judged untied pairs, `mean_reward`, and `log_loss`:
            `-(1/n_x) Σ log σ(r_w − r_l)` averaged over the prompts that have such pairs, in nats.
        """
        weight_sum = sum(data.weights)
        sums: Counter[str] = Counter()
        self.trained.eval()
        batches = data.tokenised.micro_batches(self.config.tokens_per_micro_batch)
        for chosen, parts in self.processes.share(batches):
            micro = data.micro_batch(chosen, parts).to(self.device)
            table = sum((self.scores(micro, number) for number in range(1, parts)), self.scores(micro))
            part, more = self.loss(table, micro, weight_sum, smoothing=False)
            sums.update({"loss": part.item(), **{name: value.item() for name, value in more.items()}})
            total, targets = self.model.total(table), micro.targets
            if targets is None:
                continue
            pair_part, pair_metrics = pairwise_ranking_loss(
                total, targets.tiers, targets.judged, weights=targets.weights, normaliser=1.0
            )
            sums.update({"log_loss": pair_part.item(), "paired_weight": pair_metrics["weight_sum"].item()})
        self.trained.train()
        self.network.reshard()
        found = self.processes.add(sums)
        metrics = {"loss": found["loss"], **mean_metrics(found)}
        paired = found.get("paired_weight", 0.0)
        return metrics | ({"log_loss": found["log_loss"] / paired} if paired else {})
