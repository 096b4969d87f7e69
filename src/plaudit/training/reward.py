"""Train a reward model from what people preferred: `main(config)`, one visible loop over the services beside it."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.data.prefetch import prefetched
from plaudit.data.records import Comparison, Demonstration
from plaudit.models.reward_model import RewardModel
from plaudit.training.compiling import compile_model
from plaudit.training.estimates import Estimate, estimate_run
from plaudit.training.folder import check_output, output_folder
from plaudit.training.head_fit import fit_head
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
from plaudit.training.optimizers import clip_gradients
from plaudit.training.precision import pick_device, threads
from plaudit.training.processes import Processes, joined
from plaudit.training.random_state import reseed, seeded
from plaudit.training.reading import (
    RecordCounts,
    read_demonstration_sources,
    read_training_comparisons,
    tokenise_records,
)
from plaudit.training.results import ENDS, TrainingResult, count_table, save_whole
from plaudit.training.reward_batches import RewardData
from plaudit.training.reward_trainer import RewardTrainer
from plaudit.training.run import Run
from plaudit.training.session import Session, records_hash


@dataclass(frozen=True, kw_only=True)
class RewardTrainingResult(TrainingResult):
    """How a reward model's training ended; see `TrainingResult`.

    Attributes:
        normalisation: mean and standard deviation stored with the model; None where scores were not shifted.
        tie_parameter: the learned tie parameter of `davidson` or `rao_kupper`.
    """

    normalisation: ScoreStatistics | None = None
    tie_parameter: float | None = None


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
    with joined(config, dry_run=dry_run) as processes, seeded(config.seed), threads(config.threads):
        config = processes.quieted(config)
        if not dry_run:
            processes.from_first(lambda: check_output(config))
        trainer, hashed, counts = prepare(config, train, held_out, model, processes, fit=not dry_run)
        texts, demonstration_counts = _demonstrations(trainer, demonstrations)
        if texts:
            counts["demonstrations"] = demonstration_counts
        if dry_run:
            return _estimate(trainer)
        with output_folder(config, processes):
            session = trainer.session(hashed)
            reseed(config.seed, processes.rank)
            stopped_by = run_steps(trainer, session)
            statistics, folder, metrics, final = None, None, session.state.evaluation, trainer.model
            if stopped_by in ENDS:
                metrics = session.keep_best_weights()
                statistics = _normalise(trainer, texts)
                final = trainer.network.whole(trainer.model)
                folder = _save_model(trainer, final, hashed)
            final.eval()
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
                model=final,
                normalisation=statistics,
                tie_parameter=None if tie is None else tie.item(),
            )
            if processes.first:
                result.write()
            return result


def prepare(
    config: RewardTrainingConfig,
    train: Sequence[Comparison] | None = None,
    held_out: Sequence[Comparison] | None = None,
    model: RewardModel | None = None,
    processes: Processes | None = None,
    *,
    fit: bool = True,
) -> tuple[RewardTrainer, str, dict[str, RecordCounts]]:
    """Read and tokenise the records and build the model; with `fit`, its head starts where `head_start` says.

    Returns:
        The trainer, the hash of the training records, and the counts by kind of record.
    """
    split = read_training_comparisons(config, train, held_out)
    processes = processes or Processes(device=pick_device(config.device))
    model = RewardModel.from_backbone(config.model) if model is None else model
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    if config.compile:
        compile_model(model, processes.device, quiet=config.quiet)
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
    if fit and config.head_start == "fitted":
        fitted = fit_head(model.to(processes.device), objective, data, token_budget=config.tokens_per_micro_batch)
        if not config.quiet:
            say(f"reward: head fitted on the untouched backbone, ridge {fitted.ridge:.3g}")
    hashed = records_hash(data.tokenised.records)
    processes.require_same(training_records=hashed)
    trainer = RewardTrainer(config, model, objective, data, held, processes)
    processes.require_same(held_out_records=trainer.held_out_hash)
    return trainer, hashed, counts


def run_steps(trainer: RewardTrainer, session: Session) -> str:
    """The loop: from where the session stands to the end of the run; returns what ended it."""
    config, train = trainer.config, trainer.train
    world = trainer.processes
    schedule = train.tokenised.schedule(config, rank=world.rank, world_size=world.world_size)
    weights, names = train.weights, train.tokenised.names
    lengths = train.tokenised.lengths
    evaluates = trainer.held_out is not None
    run = Run(config, session, steps_per_epoch=schedule.steps_per_epoch, evaluates=evaluates, label="reward")
    trainer.trained.train()
    batches = train.stream(schedule, run.state.step, run.total_steps, trainer.device)
    with run, prefetched(batches, config.prefetch) as stream:
        for step, micro_batches in groupby(stream, key=itemgetter(0)):
            if run.finished:
                break
            run.begin_step()
            trainer.network.begin_step(sum(step.parts))
            weight_sum = sum(weights[index] for index in step.indices)
            losses: list[Tensor] = []
            tally: dict[str, Tensor] = {}
            for _, micro in micro_batches:
                if run.stopping:
                    return run.break_off()
                loss, sums = trainer.backward(micro, weight_sum)
                losses.append(loss)
                tally = {name: value + tally.get(name, 0) for name, value in sums.items()}
            trainer.network.sum_gradients(trainer.objective.parameters())
            norm = clip_gradients(trainer.trained.parameters(), config.optimizer.max_gradient_norm)
            run.update(
                losses,
                norm,
                tally,
                trained=trainer.trained,
                record_names=[[names[index] for index in chosen] for chosen in step.micro_batches],
                tokens=sum(lengths[index] for index in step.indices),
                records=len(step.indices),
                summarise=mean_metrics,
            )
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
        token_cache=config.token_cache,
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
        token_cache=config.token_cache,
    )
    return tokenised.records, counts


def _normalise(trainer: RewardTrainer, demonstrations: list[Demonstration]) -> ScoreStatistics | None:
    config = trainer.config
    if not config.normalise or any(name in ABSOLUTE_LOSSES for name in trainer.train.losses):
        return None
    # No comparison says anything about the bias: what training left there is rounding, and other tools cannot hold it.
    torch.nn.init.zeros_(trainer.model.head.bias)
    comparisons = trainer.train.tokenised.records
    budget = config.tokens_per_micro_batch
    with trainer.autocast() if trainer.network.strategy == "fsdp" else nullcontext():
        statistics = normalise_model(
            trainer.model, comparisons, demonstrations, token_budget=budget, network=trainer.network
        )
    if not config.quiet:
        source = "demonstrations" if demonstrations else "training completions"
        shown = ", ".join(f"{mean:.4f} ± {std:.4f}" for mean, std in zip(statistics.mean, statistics.std, strict=True))
        say(f"reward: raw scores of {source} over {statistics.num_prompts} prompts: {shown}; that mean is the new zero")
    return statistics


def _save_model(trainer: RewardTrainer, model: RewardModel, data_hash: str) -> Path:
    """Save the model in the first process, and say what other tools will not see of it."""
    extra = {"training": trainer.config.model_dump(mode="json")}
    notes: list[str] = []
    folder = trainer.processes.from_first(
        lambda: save_whole(
            lambda partial: notes.extend(model.save_pretrained(partial, data_hash=data_hash, extra=extra)),
            trainer.config.output / "model",
        )
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
