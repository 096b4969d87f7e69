"""Supervised fine-tuning on demonstrations: `main(config)`, one visible loop over the services beside it."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from plaudit.configs.sft import SftConfig
from plaudit.core.layout import PackedBatch
from plaudit.core.transfer import to_device
from plaudit.data.batching import Step, StepSchedule
from plaudit.data.prefetch import prefetched
from plaudit.data.records import Demonstration
from plaudit.models.aggregation import TokenSpans
from plaudit.models.beside import files_of
from plaudit.models.causal_lm import CausalLM
from plaudit.models.states import unwrap
from plaudit.models.steering import steering_beside
from plaudit.training.compiling import compile_model
from plaudit.training.estimates import Estimate, estimate_run
from plaudit.training.folder import check_output, output_folder
from plaudit.training.messages import say
from plaudit.training.optimizers import build_optimizer, clip_gradients
from plaudit.training.parallel import Network
from plaudit.training.precision import autocast, pick_device, threads
from plaudit.training.processes import Processes, joined
from plaudit.training.random_state import reseed, seeded
from plaudit.training.reading import RecordCounts, TokenisedRecords, read_training_demonstrations, tokenise_records
from plaudit.training.results import ENDS, TrainingResult, count_table, save_whole
from plaudit.training.run import Run
from plaudit.training.session import Session, records_hash


@dataclass(frozen=True)
class MicroBatch:
    """Records that go through the network together.

    Attributes:
        indices: the records.
        batch: their tokens as one packed row; without records that of the shortest, which counts nothing.
        weights: of the records, `[P]` float32.
    """

    indices: tuple[int, ...]
    batch: PackedBatch
    weights: Tensor


@dataclass
class SftTrainer:
    """The parts of one run, put together by `prepare`.

    Attributes:
        model: the language model.
        train: demonstrations to learn from.
        held_out: demonstrations to evaluate on, or None.
        processes: who shares the run.
        network: the model as all of them call it.
    """

    config: SftConfig
    model: CausalLM
    train: TokenisedRecords[Demonstration]
    held_out: TokenisedRecords[Demonstration] | None
    processes: Processes
    network: Network = field(init=False)
    trained: nn.ModuleDict = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.network = Network(
            self.model, self.processes, method="completion_logprobs", precision=self.config.precision
        )
        self.trained = nn.ModuleDict({"model": self.model}).to(self.device)
        self.optimizer = build_optimizer(self.trained, self.config.optimizer)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.processes.device

    @property
    def held_out_hash(self) -> str:
        """SHA-256 of the held-out records: which weights are the best depends on them."""
        return records_hash([] if self.held_out is None else self.held_out.records)

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

    def micro_batch(self, data: TokenisedRecords[Demonstration], chosen: Sequence[int]) -> MicroBatch:
        """The records of these indices, on this process's device; none where it only keeps the others company."""
        weights = torch.tensor([data.records[index].weight for index in chosen])
        batch = data.pack(chosen or [data.shortest])
        return MicroBatch(tuple(chosen), batch.to(self.device), to_device(weights, self.device))

    def stream(self, schedule: StepSchedule, start: int, stop: int) -> Iterator[tuple[Step, MicroBatch]]:
        """The micro-batches of steps `start` to `stop`, each with its step."""
        for step in schedule.steps(start, stop):
            for chosen in step.micro_batches:
                yield step, self.micro_batch(self.train, chosen)

    def loss(self, micro: MicroBatch, token_weight: float) -> Tensor:
        """The share of some records in the mean loss per completion token.

        Equation: `-(1/W) Σ_i w_i Σ_t log p(y_it | x_i, y_i<t)`, `W = Σ_i w_i n_i` over the whole step, `n_i` the
        number of completion tokens that something predicts (`predicted_tokens`). Prompt tokens are only read.

        Args:
            micro: the records; without any the loss is 0.
            token_weight: `W`.

        Returns:
            A scalar in nats, float32.
        """
        with autocast(self.device, self.config.precision):
            found: tuple[Tensor, TokenSpans] = self.network(micro.batch)
        logprobs, spans = found
        if not micro.indices:
            return 0.0 * logprobs.sum()
        return -(logprobs * micro.weights[micro.batch.layout.group_index[spans.owner]]).sum() / token_weight

    @torch.no_grad()
    def evaluate(self, data: TokenisedRecords[Demonstration]) -> dict[str, float]:
        """Held-out `loss` in nats per completion token, without dropout, and `perplexity`, its exponential.

        Each process looks at its share of the records.
        """
        total = sum(token_weights(data))
        self.trained.eval()
        batches = data.micro_batches(self.config.tokens_per_micro_batch)
        share = sum(
            self.loss(self.micro_batch(data, chosen), total).item() for chosen, _ in self.processes.share(batches)
        )
        self.trained.train()
        self.network.reshard()
        loss = self.processes.add({"loss": share})["loss"]
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def predicted_tokens(data: TokenisedRecords[Demonstration]) -> list[int]:
    """Completion tokens of each record that something predicts: all, but for the first one after an empty prompt."""
    return [
        sum(len(ids) - (not block.prefix) for block in group.blocks for ids in block.completions)
        for group in data.groups
    ]


def token_weights(data: TokenisedRecords[Demonstration]) -> list[float]:
    """Each record's weight times its predicted tokens: what its loss counts in the mean."""
    return [record.weight * count for record, count in zip(data.records, predicted_tokens(data), strict=True)]


def main(
    config: SftConfig,
    *,
    dry_run: bool = False,
    train: Sequence[Demonstration] | None = None,
    held_out: Sequence[Demonstration] | None = None,
    model: CausalLM | None = None,
) -> TrainingResult | Estimate:
    """Train a language model on demonstrations and save it as `<output>/model`, a plain transformers folder.

    Args:
        config: everything about the run.
        dry_run: only say what the run would need; nothing is written.
        train: demonstrations to learn from, instead of `config.data`.
        held_out: demonstrations to evaluate on, instead of `config.held_out`.
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
        trainer, hashed, counts = prepare(config, train, held_out, model, processes)
        if dry_run:
            return _estimate(trainer)
        with output_folder(config, processes):
            session = trainer.session(hashed)
            reseed(config.seed, processes.rank)
            stopped_by = run_steps(trainer, session)
            folder, metrics, final = None, session.state.evaluation, trainer.model
            if stopped_by in ENDS:
                metrics = session.keep_best_weights()
                final = trainer.network.whole(trainer.model)
                folder = processes.from_first(lambda: save_whole(final.save_pretrained, config.output / "model"))
                if not config.quiet:
                    say(f"sft: saved {folder}")
            final.eval()
            result = TrainingResult(
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
            )
            if processes.first:
                result.write()
            return result


def prepare(
    config: SftConfig,
    train: Sequence[Demonstration] | None = None,
    held_out: Sequence[Demonstration] | None = None,
    model: CausalLM | None = None,
    processes: Processes | None = None,
) -> tuple[SftTrainer, str, dict[str, RecordCounts]]:
    """Read and tokenise the records and build the model.

    Returns:
        The trainer, the hash of the training records, and the counts by kind of record.

    Raises:
        ValueError: for a start that has styles or goals, and for records that cannot be read.
    """
    _refuse_steering(config, model)
    split = read_training_demonstrations(config, train, held_out)
    processes = processes or Processes(device=pick_device(config.device))
    model = CausalLM.from_backbone(config.model) if model is None else model
    if config.gradient_checkpointing:
        plain: Any = unwrap(model.model)
        plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if config.compile:
        compile_model(model.model, processes.device, quiet=config.quiet)
    counts = {"demonstrations": split.train_counts}
    data = _tokenise(config, model, split.train, split.train_counts, "demonstration")
    held = None
    if split.held_out:
        counts["held-out demonstrations"] = split.held_out_counts
        held = _tokenise(config, model, split.held_out, split.held_out_counts, "held-out demonstration")
    hashed = records_hash(data.records)
    processes.require_same(training_records=hashed)
    trainer = SftTrainer(config, model, data, held, processes)
    processes.require_same(held_out_records=trainer.held_out_hash)
    return trainer, hashed, counts


def run_steps(trainer: SftTrainer, session: Session) -> str:
    """The loop: from where the session stands to the end of the run; returns what ended it."""
    config, train = trainer.config, trainer.train
    schedule = train.schedule(config, rank=trainer.processes.rank, world_size=trainer.processes.world_size)
    weights, lengths, names = token_weights(train), train.lengths, train.names
    evaluates = trainer.held_out is not None
    run = Run(config, session, steps_per_epoch=schedule.steps_per_epoch, evaluates=evaluates, label="sft")
    trainer.trained.train()
    batches = trainer.stream(schedule, run.state.step, run.total_steps)
    with run, prefetched(batches, config.prefetch) as stream:
        for step, micro_batches in groupby(stream, key=itemgetter(0)):
            if run.finished:
                break
            run.begin_step()
            trainer.network.begin_step(len(step.micro_batches))
            token_weight = sum(weights[index] for index in step.indices)
            losses: list[Tensor] = []
            for _, micro in micro_batches:
                if run.stopping:
                    return run.break_off()
                loss = trainer.loss(micro, token_weight)
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
            norm = clip_gradients(trainer.trained.parameters(), config.optimizer.max_gradient_norm)
            run.update(
                losses,
                norm,
                {},
                trained=trainer.trained,
                record_names=[[names[index] for index in chosen] for chosen in step.micro_batches],
                tokens=sum(lengths[index] for index in step.indices),
                records=len(step.indices),
            )
            if trainer.held_out is not None and run.evaluation_due:
                run.end_evaluation(trainer.evaluate(trainer.held_out), monitored="loss")
            run.save_if_due()
        return run.finished or "epochs"


def _refuse_steering(config: SftConfig, model: CausalLM | None) -> None:
    """Styles and goals bend the words that the states below them predict; trained without them, both would be lost."""
    backbone = config.model.backbone
    found = model.steering if model is not None else None if backbone is None else steering_beside(backbone)
    if found is not None:
        raise ValueError(
            f"model.backbone: {backbone or 'the model'} has {found.kind} beside it, which fine-tuning does not know: "
            "it would train the language model without them, and they would not fit it afterwards. To go on without "
            f"them, copy the folder and leave out {files_of(found.kind)[0]}"
        )


def _tokenise(
    config: SftConfig, model: CausalLM, records: list[Demonstration], counts: RecordCounts, kind: str
) -> TokenisedRecords[Demonstration]:
    return tokenise_records(
        records,
        counts,
        model.text_tokeniser(template=config.model.template, too_long=config.model.too_long),
        packed=model.packed,
        on_error=config.on_error,
        why_unusable=lambda record: "weight 0" if record.weight == 0 else None,
        kind=kind,
        quiet=config.quiet,
        token_cache=config.token_cache,
    )


def _estimate(trainer: SftTrainer) -> Estimate:
    schedule = trainer.train.schedule(trainer.config)
    first = next(iter(schedule.steps(0, 1)))
    estimate = estimate_run(
        trainer.config,
        trainer.trained,
        lambda chosen: trainer.loss(trainer.micro_batch(trainer.train, chosen), 1.0),
        micro_batches=first.micro_batches,
        lengths=trainer.train.lengths,
        held_out_lengths=[] if trainer.held_out is None else trainer.held_out.lengths,
        steps_per_epoch=schedule.steps_per_epoch,
        device=trainer.device,
    )
    estimate.print()
    return estimate
