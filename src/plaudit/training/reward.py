"""Train a reward model from what people preferred: `main(config)`, one visible loop over the services beside it."""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.core.layout import scatter_to_table
from plaudit.core.preference_losses import pairwise_ranking_loss
from plaudit.data.records import Comparison, Demonstration
from plaudit.data.targets import PreferenceTargets, make_targets
from plaudit.models.reward_model import RewardModel
from plaudit.training.estimates import Estimate, estimate_run
from plaudit.training.guards import require_finite_gradient, require_finite_losses
from plaudit.training.messages import say
from plaudit.training.normalisation import ScoreStatistics, normalise_model
from plaudit.training.objectives import (
    ABSOLUTE_LOSSES,
    PreferenceObjective,
    explode_pairs,
    loss_of,
    mean_metrics,
    tie_rate,
    why_unusable,
)
from plaudit.training.optimizers import build_optimizer, clip_gradients
from plaudit.training.precision import autocast, pick_device
from plaudit.training.random_state import seeded
from plaudit.training.reading import (
    RecordCounts,
    TokenisedRecords,
    read_demonstration_sources,
    read_training_comparisons,
    tokenise_records,
)
from plaudit.training.results import ENDS, TrainingResult, count_table, save_whole
from plaudit.training.run import Run
from plaudit.training.session import Session, check_output, prepare_output, records_hash

HEAD_PREFIXES = ("model.head.", "model.aggregation.", "objective.")


@dataclass(frozen=True, kw_only=True)
class RewardTrainingResult(TrainingResult):
    """How a reward model's training ended; see `TrainingResult`.

    Attributes:
        normalisation: mean and standard deviation stored with the model; None where scores were not shifted.
        tie_parameter: the learned tie parameter of `davidson` or `rao_kupper`.
    """

    normalisation: ScoreStatistics | None = None
    tie_parameter: float | None = None


@dataclass(frozen=True)
class RewardData:
    """The tokenised comparisons of one side of the split, and the loss of each."""

    tokenised: TokenisedRecords[Comparison]
    losses: list[str]
    config: RewardTrainingConfig

    @property
    def weights(self) -> list[float]:
        """The records' weights."""
        return [record.weight for record in self.tokenised.records]

    def targets(self, chosen: Sequence[int], num_slots: int) -> PreferenceTargets:
        """What people said about the records of these indices."""
        model = self.config.model
        named = dict(zip(model.attributes, model.attribute_weights, strict=True)) if model.attribute_weights else None
        return make_targets(
            [self.tokenised.records[index] for index in chosen],
            num_slots=num_slots,
            attributes=model.attributes,
            tie_threshold=self.config.tie_threshold,
            attribute_weights=named,
        )


@dataclass
class RewardTrainer:
    """The parts of one training run, put together by `main`.

    Attributes:
        model: the reward model.
        objective: the loss, with its tie parameter where it learns one.
        train: comparisons to learn from.
        held_out: comparisons to evaluate on, or None.
        device: where the model is.
    """

    config: RewardTrainingConfig
    model: RewardModel
    objective: PreferenceObjective
    train: RewardData
    held_out: RewardData | None
    device: torch.device
    trained: nn.ModuleDict = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.trained = nn.ModuleDict({"model": self.model, "objective": self.objective}).to(self.device)
        self.optimizer = build_optimizer(self.trained, self.config.optimizer, head_prefixes=HEAD_PREFIXES)

    def scores(self, data: RewardData, chosen: Sequence[int]) -> tuple[Tensor, Tensor, PreferenceTargets]:
        """Scores `[P, K]` or `[P, K, A]`, their totals `[P, K]`, and the targets of some records; float32."""
        batch = data.tokenised.pack(chosen).to(self.device)
        with self.autocast():
            scores = scatter_to_table(self.model(batch), batch.layout)
        return scores, self.model.total(scores), data.targets(chosen, batch.layout.num_slots).to(self.device)

    def micro_batch_loss(self, chosen: Sequence[int], weight_sum: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The share of these training records in the loss of a step whose records weigh `weight_sum` together."""
        scores, total, targets = self.scores(self.train, chosen)
        losses = [self.train.losses[index] for index in chosen]
        loss, sums = self.objective(scores, total, targets, losses, normaliser=weight_sum)
        return loss, sums

    def autocast(self) -> AbstractContextManager[object]:
        """The number format of the backbone."""
        return autocast(self.device, self.config.precision)

    @torch.no_grad()
    def evaluate(self, data: RewardData) -> dict[str, float]:
        """Held-out metrics without dropout, smoothing, margins or centring.

        Returns:
            `loss` (the training loss), `accuracy` and `margin` over judged untied pairs, `mean_reward`, and `log_loss`:
            `-(1/n_x) Σ log σ(r_w − r_l)` averaged over the prompts that have such pairs, in nats.
        """
        weight_sum = sum(data.weights)
        loss = log_loss = paired_weight = 0.0
        sums: Counter[str] = Counter()
        self.trained.eval()
        for chosen in data.tokenised.micro_batches(self.config.tokens_per_micro_batch):
            scores, total, targets = self.scores(data, chosen)
            names = [data.losses[index] for index in chosen]
            part, more = self.objective(scores, total, targets, names, normaliser=weight_sum, smoothing=False)
            pair_part, pair_metrics = pairwise_ranking_loss(
                total, targets.tiers, targets.judged, weights=targets.weights, normaliser=1.0
            )
            loss, log_loss = loss + part.item(), log_loss + pair_part.item()
            paired_weight += pair_metrics["weight_sum"].item()
            sums.update({name: value.item() for name, value in more.items()})
        self.trained.train()
        metrics = {"loss": loss, **mean_metrics(sums)}
        return metrics | ({"log_loss": log_loss / paired_weight} if paired_weight else {})


def main(
    config: RewardTrainingConfig,
    *,
    dry_run: bool = False,
    train: Sequence[Comparison] | None = None,
    held_out: Sequence[Comparison] | None = None,
    demonstrations: Sequence[Demonstration] | None = None,
    model: RewardModel | None = None,
) -> RewardTrainingResult | Estimate:
    """Train a reward model and save it as `<output>/model`.

    Args:
        config: everything about the run.
        dry_run: only say what the run would need; nothing is written.
        train: comparisons to learn from, instead of `config.data`.
        held_out: comparisons to evaluate on, instead of `config.held_out`.
        demonstrations: what the scores' zero is taken from, instead of `config.demonstrations`.
        model: a model to go on training, instead of building `config.model`; it is changed.

    Returns:
        The result with the model; in a dry run the estimate.

    Raises:
        ValueError: for data, configurations and folders that cannot be used, and for non-finite losses.
    """
    started = time.perf_counter()
    with seeded(config.seed):
        if not dry_run:
            check_output(config)
        trainer, hashed, counts = prepare(config, train, held_out, model)
        texts, demonstration_counts = _demonstrations(trainer, demonstrations)
        if texts:
            counts["demonstrations"] = demonstration_counts
        if dry_run:
            return _estimate(trainer)
        prepare_output(config)
        session = Session(config, trainer.trained, trainer.optimizer, data_hash=hashed)
        stopped_by = run_steps(trainer, session)
        statistics, folder, metrics = None, None, session.state.evaluation
        if stopped_by in ENDS:
            metrics = session.keep_best_weights()
            statistics = _normalise(trainer, texts)
            folder = _save_model(trainer, hashed)
        trainer.model.eval()
        tie = trainer.objective.tie_parameter
        result = RewardTrainingResult(
            output=config.output,
            model_folder=folder,
            stopped_by=stopped_by,
            steps=session.state.step,
            best_step=session.best.step,
            tokens=session.state.tokens,
            seconds=time.perf_counter() - started,
            metrics=metrics,
            records=count_table(**counts),
            model=trainer.model,
            normalisation=statistics,
            tie_parameter=None if tie is None else tie.item(),
        )
        result.write()
        return result


def prepare(
    config: RewardTrainingConfig,
    train: Sequence[Comparison] | None = None,
    held_out: Sequence[Comparison] | None = None,
    model: RewardModel | None = None,
) -> tuple[RewardTrainer, str, dict[str, RecordCounts]]:
    """Read and tokenise the records and build the model.

    Returns:
        The trainer, the hash of the training records, and the counts by kind of record.
    """
    split = read_training_comparisons(config, train, held_out)
    device = pick_device(config.device)
    model = RewardModel.from_backbone(config.model) if model is None else model
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    usable = [record for record in split.train if why_unusable(record, config) is None]
    if config.shuffled_pairs:
        unusable = [record for record in split.train if why_unusable(record, config) is not None]
        pairs = explode_pairs(usable, config.tie_threshold)
        split.train_counts.read += len(pairs) - len(usable)
        split.train_counts.used += len(pairs) - len(usable)
        split.train = pairs + unusable
    counts = {"comparisons": split.train_counts}
    data = _tokenise(config, model, split.train, split.train_counts, "comparison")
    held = None
    if split.held_out:
        counts["held-out comparisons"] = split.held_out_counts
        held = _tokenise(config, model, split.held_out, split.held_out_counts, "held-out comparison")
    objective = PreferenceObjective(config, initial_tie_rate=tie_rate(usable, config.tie_threshold))
    trainer = RewardTrainer(config, model, objective, data, held, device)
    return trainer, records_hash(data.tokenised.records), counts


def run_steps(trainer: RewardTrainer, session: Session) -> str:
    """The loop: from where the session stands to the end of the run; returns what ended it."""
    config, train = trainer.config, trainer.train
    schedule = train.tokenised.schedule(config)
    weights, names = train.weights, train.tokenised.names
    lengths = train.tokenised.lengths
    evaluates = trainer.held_out is not None
    run = Run(config, session, steps_per_epoch=schedule.steps_per_epoch, evaluates=evaluates, label="reward")
    trainer.trained.train()
    with run:
        for step in schedule.steps(run.state.step, run.total_steps):
            if run.finished:
                break
            run.begin_step()
            weight_sum = sum(weights[index] for index in step.indices)
            losses: list[Tensor] = []
            tally: dict[str, Tensor] = {}
            for chosen in step.micro_batches:
                if run.stop.requested:
                    return run.break_off()
                loss, sums = trainer.micro_batch_loss(chosen, weight_sum)
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
                tally = {name: value + tally.get(name, 0) for name, value in sums.items()}
            norm = clip_gradients(trainer.trained.parameters(), config.optimizer.max_gradient_norm)
            # One wait for the device in a step: everything that is looked at comes over together.
            numbers = torch.stack([*losses, norm, *tally.values()]).tolist()
            step_losses, norm_value = numbers[: len(losses)], numbers[len(losses)]
            record_names = [[names[index] for index in chosen] for chosen in step.micro_batches]
            require_finite_losses(step_losses, record_names, step=step.number)
            require_finite_gradient(norm_value, trainer.trained, record_names, step=step.number)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad(set_to_none=True)
            sums_now = dict(zip(tally, numbers[len(losses) + 1 :], strict=True))
            metrics = {"loss": sum(step_losses), **mean_metrics(sums_now), "gradient_norm": norm_value}
            run.end_step(metrics, tokens=sum(lengths[index] for index in step.indices), records=len(step.indices))
            if trainer.held_out is not None and run.evaluation_due:
                evaluation = trainer.evaluate(trainer.held_out)
                run.end_evaluation(evaluation, monitored=monitored_metric(config, trainer.held_out, evaluation))
            run.save_if_due()
        return run.finished or "epochs"


def monitored_metric(config: RewardTrainingConfig, held_out: RewardData, evaluation: dict[str, float]) -> str:
    """The held-out value that patience and the best checkpoint go by.

    Raises:
        ValueError: if `stop_on: log_loss` was asked for and no held-out record has a judged pair.
    """
    if config.stop_on == "loss":
        return "loss"
    if config.stop_on == "log_loss":
        if "log_loss" not in evaluation:
            raise ValueError("stop_on: log_loss needs held-out records with judged pairs; use stop_on: loss")
        return "log_loss"
    absolute = any(name in ABSOLUTE_LOSSES for name in held_out.losses)
    return "loss" if absolute or "log_loss" not in evaluation else "log_loss"


def _tokenise(
    config: RewardTrainingConfig, model: RewardModel, records: list[Comparison], counts: RecordCounts, kind: str
) -> RewardData:
    tokenised = tokenise_records(
        records,
        counts,
        model.text_tokeniser,
        packed=model.packed,
        on_error=config.on_error,
        why_unusable=lambda record: why_unusable(record, config),
        kind=kind,
        quiet=config.quiet,
    )
    return RewardData(tokenised, [loss_of(record, config) for record in tokenised.records], config)


def _demonstrations(
    trainer: RewardTrainer, handed: Sequence[Demonstration] | None
) -> tuple[list[Demonstration], RecordCounts]:
    """The demonstrations that fit, looked at before the first step: they are scored after the last."""
    config, model = trainer.config, trainer.model
    if handed is None:
        records, counts = read_demonstration_sources(config, config.demonstrations)
    else:
        records, counts = list(handed), RecordCounts(read=len(handed), used=len(handed))
    if not records:
        return records, counts
    tokenised = tokenise_records(
        records,
        counts,
        model.text_tokeniser,
        packed=model.packed,
        on_error=config.on_error,
        kind="demonstration",
        quiet=config.quiet,
    )
    return tokenised.records, counts


def _normalise(trainer: RewardTrainer, demonstrations: list[Demonstration]) -> ScoreStatistics | None:
    config = trainer.config
    if not config.normalise or any(name in ABSOLUTE_LOSSES for name in trainer.train.losses):
        return None
    # No comparison says anything about the bias: what training left there is rounding, and other tools cannot hold it.
    torch.nn.init.zeros_(trainer.model.head.bias)
    comparisons = trainer.train.tokenised.records
    statistics = normalise_model(trainer.model, comparisons, demonstrations, token_budget=config.tokens_per_micro_batch)
    if not config.quiet:
        source = "demonstrations" if demonstrations else "training completions"
        shown = ", ".join(f"{mean:.4f} ± {std:.4f}" for mean, std in zip(statistics.mean, statistics.std, strict=True))
        say(f"reward: raw scores of {source} over {statistics.num_prompts} prompts: {shown}; that mean is the new zero")
    return statistics


def _save_model(trainer: RewardTrainer, data_hash: str) -> Path:
    """Save the model, and say what other tools will not see of it."""
    extra = {"training": trainer.config.model_dump(mode="json")}
    notes: list[str] = []
    folder = save_whole(
        lambda partial: notes.extend(trainer.model.save_pretrained(partial, data_hash=data_hash, extra=extra)),
        trainer.config.output / "model",
    )
    if not trainer.config.quiet:
        for note in notes:
            say(f"reward: {note}")
        say(f"reward: saved {folder}")
    return folder


def _estimate(trainer: RewardTrainer) -> Estimate:
    schedule = trainer.train.tokenised.schedule(trainer.config)
    first = next(iter(schedule.steps(0, 1)))
    weight_sum = float(len(first.indices))

    def trial(chosen: Sequence[int]) -> Tensor:
        return trainer.micro_batch_loss(chosen, weight_sum)[0]

    estimate = estimate_run(
        trainer.config,
        trainer.trained,
        trial,
        micro_batches=first.micro_batches,
        lengths=trainer.train.tokenised.lengths,
        held_out_lengths=[] if trainer.held_out is None else trainer.held_out.tokenised.lengths,
        steps_per_epoch=schedule.steps_per_epoch,
        device=trainer.device,
    )
    estimate.print()
    return estimate
