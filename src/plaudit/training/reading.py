"""Records for a run: read from files or handed over, split, checked for what they can teach, tokenised, counted."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from plaudit.configs.base import ConfigError
from plaudit.configs.data import DataConfig, SplitKey
from plaudit.configs.reward import RewardTrainingConfig
from plaudit.configs.sft import SftConfig
from plaudit.configs.training import RecordsConfig, TrainingConfig
from plaudit.core.layout import PackedBatch
from plaudit.data.batching import StepSchedule, fill_batches, fill_padded_batches
from plaudit.data.io import ReadResult, read_data, read_demonstration_data
from plaudit.data.packing import pack_groups
from plaudit.data.prompts import read_prompts, unique_prompts
from plaudit.data.records import Comparison, Demonstration, PromptRecord
from plaudit.data.splits import prompt_key, split_comparisons
from plaudit.data.splitting import part_counts
from plaudit.data.token_cache import TokenCache, cache_folder
from plaudit.data.tokenising import TextTokeniser, TextTooLongError, TokenisedGroup
from plaudit.training.messages import say, warn

SECONDS_WORTH_KEEPING = 1.0
"""Texts that are tokenised faster than this are not worth a file."""

Record = TypeVar("Record", Comparison, Demonstration, PromptRecord)
Learnable = TypeVar("Learnable", Comparison, Demonstration)


@dataclass
class RecordCounts:
    """What became of the records of one kind: `read = used + refused`, the refused by reason."""

    read: int = 0
    used: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in self.refused.most_common())
        total = sum(self.refused.values())
        return f"{self.read} read, {self.used} used, {total} refused" + (f" ({reasons})" if reasons else "")


@dataclass(frozen=True)
class TokenisedRecords(Generic[Learnable]):
    """Records that will be used, each with its token ids.

    Attributes:
        records: in reading order.
        groups: one per record.
        names: one per record: its id, or its number.
        counts: of everything that was read.
        causal: whether the model reads from left to right.
        packed: whether it reads packed rows; padded ones cost rows times the longest.
    """

    records: list[Learnable]
    groups: list[TokenisedGroup]
    names: list[str]
    counts: RecordCounts
    causal: bool
    packed: bool

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each record takes in a packed row."""
        return [group.num_tokens for group in self.groups]

    def schedule(self, config: TrainingConfig, *, rank: int = 0, world_size: int = 1) -> StepSchedule:
        """Which records each optimizer step sees, in which micro-batches of this process."""
        budget = config.tokens_per_micro_batch
        return StepSchedule(
            self.lengths if self.packed else [group.longest for group in self.groups],
            prompts_per_step=config.records_per_step,
            token_budget=budget,
            seed=config.seed,
            window_steps=config.window_steps,
            rows=None if self.packed else [group.num_completions for group in self.groups],
            parts=part_counts(self.groups, budget, packed=self.packed),
            rank=rank,
            world_size=world_size,
        )

    def micro_batches(self, token_budget: int) -> list[tuple[list[int], int]]:
        """All records once, in as few passes as the budget allows, each time with the passes it takes: to evaluate."""
        everything = list(range(len(self)))
        if self.packed:
            filled = fill_batches(everything, self.lengths, token_budget)
        else:
            widths, rows = [g.longest for g in self.groups], [g.num_completions for g in self.groups]
            filled = fill_padded_batches(everything, widths, rows, token_budget)
        parts = part_counts(self.groups, token_budget, packed=self.packed)
        return [(chosen, max(parts[index] for index in chosen)) for chosen in filled]

    @property
    def shortest(self) -> int:
        """The record that costs least, for a pass that only keeps other processes company."""
        return min(range(len(self)), key=lambda index: self.groups[index].num_tokens)

    def pack(self, chosen: Sequence[int]) -> PackedBatch:
        """The records of these indices as one packed row, on the CPU."""
        return pack_groups([self.groups[index] for index in chosen], causal=self.causal)


@dataclass
class Split(Generic[Record]):
    """Training and held-out records with their counts, before tokenising."""

    train: list[Record]
    held_out: list[Record]
    train_counts: RecordCounts
    held_out_counts: RecordCounts


def read_training_comparisons(
    config: RewardTrainingConfig, train: Sequence[Comparison] | None, held_out: Sequence[Comparison] | None
) -> Split[Comparison]:
    """The comparisons of a run, from `config.data` and `config.held_out` unless they are handed over.

    Raises:
        ConfigError: if there is no source of training records, or one in two places.
        ValueError: from the reader, with file and line.
    """

    def read(sources: Sequence[str | DataConfig]) -> tuple[list[Comparison], RecordCounts]:
        return _read_all([read_data(source) for source in source_configs(config, sources)])

    split = _gather(read, config.data, config.held_out, train, held_out)
    if config.held_out_fraction is not None:
        _hold_out(split, config.held_out_fraction, config.split_by)
    return split


def read_training_demonstrations(
    config: SftConfig, train: Sequence[Demonstration] | None, held_out: Sequence[Demonstration] | None
) -> Split[Demonstration]:
    """The demonstrations of a run; as `read_training_comparisons`."""

    def read(sources: Sequence[str | DataConfig]) -> tuple[list[Demonstration], RecordCounts]:
        return read_demonstration_sources(config, sources)

    split = _gather(read, config.data, config.held_out, train, held_out)
    if config.held_out_fraction is not None:
        _hold_out(split, config.held_out_fraction, config.split_by)
    return split


def read_demonstration_sources(
    config: RecordsConfig, sources: Sequence[str | DataConfig]
) -> tuple[list[Demonstration], RecordCounts]:
    """All demonstrations of several files, folders or dataset names, with their counts."""
    return _read_all([read_demonstration_data(source) for source in source_configs(config, sources)])


def read_run_prompts(
    config: RecordsConfig, train: Sequence[PromptRecord] | None, held_out: Sequence[PromptRecord] | None
) -> Split[PromptRecord]:
    """The prompts of a run; as `read_training_comparisons`. Each prompt is kept once."""

    def read(sources: Sequence[str | DataConfig]) -> tuple[list[PromptRecord], RecordCounts]:
        records, counts = _read_all([read_prompts(source) for source in source_configs(config, sources)])
        return unique_prompts(records), counts

    split = _gather(read, config.data, config.held_out, train, held_out)
    if config.held_out_fraction is not None:
        _hold_out(split, config.held_out_fraction, config.split_by)
    return split


def source_configs(config: RecordsConfig, sources: Sequence[str | DataConfig]) -> list[DataConfig]:
    """Each source with all its options: a plain name takes the run's, a mapping has its own."""
    return [
        DataConfig(
            path=source,
            format=config.format,
            on_error=config.on_error,
            annotators=config.annotators,
            group_key=config.group_key,
            limit=config.limit,
        )
        if isinstance(source, str)
        else source
        for source in sources
    ]


def _read_all(results: Sequence[ReadResult[Record]]) -> tuple[list[Record], RecordCounts]:
    records: list[Record] = []
    counts = RecordCounts()
    for result in results:
        records += result.records
        counts.read, counts.used = counts.read + result.read, counts.used + result.used
        counts.refused.update(result.refused)
    return records, counts


def tokenise_records(
    records: Sequence[Learnable],
    counts: RecordCounts,
    tokeniser: TextTokeniser,
    *,
    packed: bool,
    on_error: str,
    why_unusable: Callable[[Learnable], str | None] = lambda record: None,
    kind: str,
    quiet: bool = False,
    token_cache: str = "off",
) -> TokenisedRecords[Learnable]:
    """Tokenise what can be used; what teaches nothing or does not fit is refused, counted by reason, and said.

    Args:
        records: as read.
        counts: their counts so far; brought up to date.
        tokeniser: of the model.
        packed: whether the model reads packed rows.
        on_error: with `refuse` the first text that does not fit stops the run, with `skip` it is counted.
        why_unusable: a reason, or None for a usable record.
        kind: what the records are, for the message.
        quiet: do not print the counts.
        token_cache: folder in which token ids are kept; `auto` or `off` (see `TrainingConfig`).

    Raises:
        ValueError: for a text that does not fit (see `on_error`), naming the record; or if no record is left.
    """
    kept: list[Learnable] = []
    groups: list[TokenisedGroup] = []
    names: list[str] = []
    cache = _open_cache(token_cache, tokeniser)
    started = time.perf_counter()
    for number, record in enumerate(records):
        name = record.id or f"{kind} number {number}"
        reason = why_unusable(record)
        if reason is None:
            completions = record.completions if isinstance(record, Comparison) else (record.completion,)
            try:
                group = (cache or tokeniser).group(record.prompt, completions)
            except TextTooLongError as error:
                if on_error == "refuse":
                    raise TextTooLongError(f"{name}: {error}; on_error: skip leaves such records out") from error
                reason = "too long"
        if reason is not None:
            counts.refused[reason] += 1
            counts.used -= 1
            continue
        kept.append(record)
        groups.append(group)
        names.append(name)
    if cache is not None and cache.misses and time.perf_counter() - started >= SECONDS_WORTH_KEEPING:
        cache.write()
    if not quiet:
        say(f"{kind}s: {counts}")
        if cache is not None and cache.hits:
            say(f"{kind}s: token ids of {cache.hits} were kept from an earlier run (token_cache: {token_cache})")
        if truncated := tokeniser.counts["prompts_truncated"]:
            say(f"{kind}s: {truncated} prompts cut from the left to fit {tokeniser.max_length} tokens")
        if shortened := tokeniser.counts["completions_truncated"]:
            say(f"{kind}s: {shortened} completions cut from the right to fit {tokeniser.max_length} tokens")
    if not kept:
        raise ValueError(f"no usable {kind} is left: {counts}")
    return TokenisedRecords(kept, groups, names, counts, tokeniser.causal, packed)


def _open_cache(choice: str, tokeniser: TextTokeniser) -> TokenCache | None:
    if choice == "off":
        return None
    return TokenCache(cache_folder() / "tokens" if choice == "auto" else Path(choice), tokeniser)


def _gather(
    read: Callable[[Sequence[str | DataConfig]], tuple[list[Record], RecordCounts]],
    data: Sequence[str | DataConfig],
    held_out_data: Sequence[str | DataConfig],
    train: Sequence[Record] | None,
    held_out: Sequence[Record] | None,
) -> Split[Record]:
    """Training and held-out records, each from exactly one place."""
    for key, given, handed in (("data", data, train), ("held_out", held_out_data, held_out)):
        if given and handed is not None:
            raise ConfigError(f"{key}: {len(given)} sources are configured, but records were handed over as well")
    if not data and train is None:
        raise ConfigError("data: name at least one file of records, for example --data train.jsonl")
    train_records, train_counts = read(data) if train is None else _handed(train)
    held_records, held_counts = read(held_out_data) if held_out is None else _handed(held_out)
    shared = {prompt_key(each.prompt) for each in train_records} & {prompt_key(each.prompt) for each in held_records}
    if shared:
        warn(f"{len(shared)} prompts stand in the training and in the held-out records: the evaluation flatters")
    return Split(train_records, held_records, train_counts, held_counts)


def _handed(records: Sequence[Record]) -> tuple[list[Record], RecordCounts]:
    return list(records), RecordCounts(read=len(records), used=len(records))


def _hold_out(split: Split[Record], fraction: float, key: SplitKey) -> None:
    """Move a share of the training records to the held-out side; the refused stay counted with the training part."""
    parts = split_comparisons(split.train, fractions={"train": 1 - fraction, "held_out": fraction}, key=key)
    split.train, split.held_out = parts["train"], parts["held_out"]
    count = len(split.held_out)
    split.train_counts.read -= count
    split.train_counts.used -= count
    split.held_out_counts = RecordCounts(read=count, used=count)
