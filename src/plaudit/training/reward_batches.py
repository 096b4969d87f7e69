"""What a reward model's training step reads: packed records with what people said of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.core.layout import PackedBatch
from plaudit.data.batching import Step, StepSchedule
from plaudit.data.packing import pack_groups
from plaudit.data.records import Comparison
from plaudit.data.splitting import split_group
from plaudit.data.targets import PreferenceTargets, make_targets
from plaudit.data.tokenising import TokenisedBlock, TokenisedGroup
from plaudit.training.reading import TokenisedRecords


@dataclass(frozen=True)
class MicroBatch:
    """Records that go through the network together, or one record in several passes.

    Attributes:
        indices: the records.
        passes: one packed row per pass. A row whose layout has no group of `targets` is idle (see `idle`).
        idle: for each pass whether it only keeps company: other processes have something to do then, and all have to
            call the network equally often.
        targets: what people said about the `P` records; None where every pass is idle.
        losses: the name of each record's loss.
        num_slots: `K`.
    """

    indices: tuple[int, ...]
    passes: tuple[PackedBatch, ...]
    idle: tuple[bool, ...]
    targets: PreferenceTargets | None
    losses: tuple[str, ...]
    num_slots: int

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same micro-batch on `device`."""
        targets = None if self.targets is None else self.targets.to(device)
        passes = tuple(batch.to(device) for batch in self.passes)
        return MicroBatch(self.indices, passes, self.idle, targets, self.losses, self.num_slots)


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

    def micro_batch(self, chosen: Sequence[int], num_passes: int = 1) -> MicroBatch:
        """The records of these indices, ready for the network, on the CPU.

        Args:
            chosen: indices; none for a process that only keeps others company.
            num_passes: how many passes every process makes; a single record above the budget is cut into as many parts
                as it needs, and idle passes fill the number up.

        Raises:
            ValueError: if the record needs more passes.
        """
        groups = [self.tokenised.groups[index] for index in chosen]
        parts = [groups] if groups else []
        if num_passes > 1 and len(groups) == 1:
            budget = self.config.tokens_per_micro_batch
            parts = [[part] for part in split_group(groups[0], budget, packed=self.tokenised.packed)]
        if len(parts) > num_passes:
            raise ValueError(f"record {self.tokenised.names[chosen[0]]} needs {len(parts)} passes, not {num_passes}")
        width = max((group.num_slots for group in groups), default=1)
        causal = self.tokenised.causal
        missing = num_passes - len(parts)
        # Idle passes come first: the last pass keeps its graph, so it had better be one that counts.
        rows = [pack_groups([self._shortest()], causal=causal)] * missing
        rows += [pack_groups(part, causal=causal, num_slots=width) for part in parts]
        targets = self.targets(chosen, width) if groups else None
        losses = tuple(self.losses[index] for index in chosen)
        idle = (True,) * missing + (False,) * len(parts)
        return MicroBatch(tuple(chosen), tuple(rows), idle, targets, losses, width)

    def stream(
        self, schedule: StepSchedule, start: int, stop: int, device: torch.device
    ) -> Iterator[tuple[Step, MicroBatch]]:
        """The micro-batches of steps `start` to `stop` on the device, each with its step."""
        for step in schedule.steps(start, stop):
            for chosen, num_passes in zip(step.micro_batches, step.parts, strict=True):
                yield step, self.micro_batch(chosen, num_passes).to(device)

    def _shortest(self) -> TokenisedGroup:
        """One completion of the record that costs least."""
        group = min(self.tokenised.groups, key=lambda each: each.num_tokens)
        block = group.blocks[0]
        return TokenisedGroup((TokenisedBlock(block.prefix, block.completions[:1], [0]),))
