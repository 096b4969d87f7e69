"""Batching: which records go through the network together, and in which order.

A schedule is a pure function of (seed, epoch): nothing but the number of the next step is needed to resume it.
Orders come from the raw PCG64 stream, which NumPy keeps the same between versions.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal

import numpy as np

Oversize = Literal["own", "refuse"]


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of `0..count-1` that depends on nothing but (seed, epoch)."""
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return [int(i) for i in np.argsort(keys, kind="stable")]


def fill_batches(
    indices: Sequence[int], lengths: Sequence[int], token_budget: int | None, max_items: int | None = None
) -> list[list[int]]:
    """Distribute items over few batches of at most `token_budget` tokens: best fit, longest first.

    Without `max_items` the number of batches is at most 11/9 of the fewest possible, plus 4 (Johnson et al.,
    "Worst-case performance bounds for simple one-dimensional packing algorithms", SIAM J. Comput. 3, 1974). An item
    that is longer than the budget gets a batch of its own.

    Args:
        indices: items to place.
        lengths: tokens of every item, indexed by item.
        token_budget: most tokens of a batch; None for no bound.
        max_items: most items of a batch; None for no bound.

    Returns:
        Batches in the order they were opened, each with its longest item first; every index exactly once.
    """
    if token_budget is None:
        size = max_items or max(1, len(indices))
        return [list(indices[start : start + size]) for start in range(0, len(indices), size)]
    batches: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for index in sorted(indices, key=lambda i: -lengths[i]):
        length = lengths[index]
        place = bisect_left(room, (length, -1))
        if place < len(room):
            left, number = room.pop(place)
            batches[number].append(index)
        else:
            left, number = token_budget, len(batches)
            batches.append([index])
        if left > length and (max_items is None or len(batches[number]) < max_items):
            insort(room, (left - length, number))
    return batches


def fill_padded_batches(
    indices: Sequence[int],
    widths: Sequence[int],
    rows: Sequence[int],
    token_budget: int | None,
    max_items: int | None = None,
) -> list[list[int]]:
    """Distribute items whose rows are padded: neighbours in width share a batch of `rows × widest` tokens or fewer.

    Args:
        indices: items to place.
        widths: columns of every item's longest row, indexed by item.
        rows: rows of every item, indexed by item.
        token_budget: most places (rows times the widest row) of a batch; None for no bound.
        max_items: most items of a batch; None for no bound.

    Returns:
        Batches, widest first; every index exactly once.
    """
    batches: list[list[int]] = []
    width = height = 0
    for index in sorted(indices, key=lambda i: -widths[i]):
        fits = batches and (token_budget is None or (height + rows[index]) * width <= token_budget)
        if fits and (max_items is None or len(batches[-1]) < max_items):
            batches[-1].append(index)
            height += rows[index]
        else:
            batches.append([index])
            width, height = widths[index], rows[index]
    return batches


def deal(batches: Sequence[tuple[list[int], int]], world_size: int) -> list[list[int]]:
    """Deal micro-batches over processes so that each gets as many, and about as much work.

    Sorted by cost, every run of `world_size` neighbours is one round: processes that wait for each other in every pass
    then wait little. Within a round the process with least work so far gets the largest one.

    Args:
        batches: micro-batches, each with its cost.
        world_size: how many processes.

    Returns:
        Rounds end to end: the micro-batch of process `r` in round `j` is number `j · world_size + r`. Empty ones fill
        the last round up.
    """
    work = [0] * world_size
    dealt: list[list[int]] = []
    ordered = sorted(batches, key=lambda batch: -batch[1])
    for start in range(0, len(ordered), world_size):
        hand: list[list[int]] = [[] for _ in range(world_size)]
        takers = sorted(range(world_size), key=lambda rank: work[rank])
        for (batch, cost), rank in zip(ordered[start : start + world_size], takers, strict=False):
            hand[rank] = batch
            work[rank] += cost
        dealt.extend(hand)
    return dealt


class _Filler:
    """What both schedules share: checked lengths and one way of filling batches."""

    def __init__(
        self,
        lengths: Sequence[int],
        token_budget: int | None,
        max_items: int | None,
        rows: Sequence[int] | None,
        oversize: Oversize,
    ) -> None:
        if token_budget is not None and token_budget < 1:
            raise ValueError(f"token_budget is {token_budget}; it must be at least 1")
        if max_items is not None and max_items < 1:
            raise ValueError(f"a batch of {max_items} prompts is not possible; use at least 1")
        if rows is not None and len(rows) != len(lengths):
            raise ValueError(f"{len(rows)} row counts for {len(lengths)} lengths")
        if oversize not in ("own", "refuse"):
            raise ValueError(f'oversize is {oversize!r}; use "own" or "refuse"')
        self.lengths = [int(n) for n in lengths]
        self.rows = None if rows is None else [int(n) for n in rows]
        self.token_budget = token_budget
        self.max_items = max_items
        sizes = self.lengths if rows is None else [n * r for n, r in zip(self.lengths, rows, strict=True)]
        self.sizes = sizes
        self.num_oversize = 0 if token_budget is None else sum(size > token_budget for size in sizes)
        if self.num_oversize and oversize == "refuse":
            worst = max(range(len(sizes)), key=sizes.__getitem__)
            raise ValueError(
                f"{self.num_oversize} of {len(sizes)} groups exceed token_budget {token_budget}; the largest, number "
                f"{worst}, has {sizes[worst]} tokens: raise the budget to that, or use oversize='own'"
            )

    def fill(self, indices: Sequence[int]) -> list[list[int]]:
        if self.rows is not None:
            return fill_padded_batches(indices, self.lengths, self.rows, self.token_budget, self.max_items)
        return fill_batches(indices, self.lengths, self.token_budget, self.max_items)

    def cost(self, batch: Sequence[int]) -> int:
        """Tokens (or places, where rows are padded) of a batch."""
        if self.rows is None:
            return sum(self.lengths[index] for index in batch)
        widest = max((self.lengths[index] for index in batch), default=0)
        return widest * sum(self.rows[index] for index in batch)

    def spread(self, indices: Sequence[int], count: int) -> list[list[int]] | None:
        """At most `count` batches of about the same cost: each item, longest first, goes where least is so far.

        Returns:
            The batches; None where that would break the budget.
        """
        batches: list[list[int]] = [[] for _ in range(count)]
        costs = [(0, number) for number in range(count)]
        for index in sorted(indices, key=lambda i: -self.sizes[i]):
            _, number = heappop(costs)
            batches[number].append(index)
            cost = self.cost(batches[number])
            if self.token_budget is not None and len(batches[number]) > 1 and cost > self.token_budget:
                return None
            heappush(costs, (cost, number))
        return [batch for batch in batches if batch]


class BatchSchedule:
    """Batches under a token budget, for scoring, evaluation and jobs that take one batch per update.

    An epoch is a permutation of all items, cut into windows; a window is sorted by length, filled into batches and
    its batches are shuffled. A wider window wastes less of the budget and mixes less.

    Attributes:
        num_oversize: items longer than the budget; each has a batch of its own.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        token_budget: int | None = None,
        *,
        prompts_per_batch: int | None = None,
        seed: int = 0,
        window: int = 1024,
        shuffle: bool = True,
        rows: Sequence[int] | None = None,
        oversize: Oversize = "own",
    ) -> None:
        """Check and keep what the schedule depends on.

        Args:
            lengths: tokens of every group in a packed row; with `rows`, of its longest row.
            token_budget: most tokens of a batch.
            prompts_per_batch: most groups of a batch; at least one of the two bounds is needed.
            seed: of the order.
            window: how many groups are sorted by length together.
            shuffle: False keeps windows in the order of the data, the same in every epoch.
            rows: rows of every group where batches are padded: a batch then takes `rows × longest row`.
            oversize: "own" gives a group that exceeds the budget its own batch, "refuse" raises.

        Raises:
            ValueError: for bounds that are missing or below 1, or refused groups.
        """
        if token_budget is None and prompts_per_batch is None:
            raise ValueError("give token_budget or prompts_per_batch, or both")
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1")
        self._filler = _Filler(lengths, token_budget, prompts_per_batch, rows, oversize)
        self.num_oversize = self._filler.num_oversize
        self.seed, self.window, self.shuffle = seed, window, shuffle

    def epoch(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch: every index exactly once."""
        count = len(self._filler.lengths)
        order = epoch_order(count, self.seed, epoch) if self.shuffle else list(range(count))
        batches: list[list[int]] = []
        for start in range(0, count, self.window):
            filled = self._filler.fill(order[start : start + self.window])
            if self.shuffle:
                mixed = epoch_order(len(filled), self.seed, epoch)
                filled = [filled[i] for i in mixed]
            batches.extend(filled)
        return batches


@dataclass(frozen=True)
class Step:
    """One update of the weights, as one process sees it.

    Attributes:
        number: counted from 0 over all epochs.
        epoch: from 0.
        position: which step of its epoch, from 0.
        indices: all groups of the step, those of other processes included.
        micro_batches: indices of the groups that go through this process's network together; their gradients add up.
            Every process has as many of them; where there is too little to do some are empty, and the process takes
            part in that pass with a weight of zero.
        parts: for each micro-batch, into how many passes every process cuts it: more than 1 where a group of some
            process exceeds the budget.
    """

    number: int
    epoch: int
    position: int
    indices: tuple[int, ...]
    micro_batches: tuple[tuple[int, ...], ...]
    parts: tuple[int, ...]


class StepSchedule:
    """Steps of a fixed number of prompts, each split into micro-batches under a token budget.

    Which prompts share a step does not depend on the budget or on the number of processes, so neither does the
    gradient (but for rounding): they say only how much goes through a network at once. The last step of an epoch may
    have fewer prompts.

    Attributes:
        num_oversize: groups longer than the budget; each is a micro-batch of its own.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        prompts_per_step: int,
        token_budget: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        window_steps: int = 1,
        rows: Sequence[int] | None = None,
        oversize: Oversize = "own",
        parts: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Check and keep what the schedule depends on.

        Args:
            lengths: tokens of every group in a packed row; with `rows`, of its longest row.
            prompts_per_step: groups per update, of all processes together.
            token_budget: most tokens of a micro-batch; None puts a whole step through at once.
            seed: of the order.
            shuffle: False keeps the order of the data in every epoch.
            window_steps: so many steps are sorted by length together before they are cut (and then shuffled). 1 keeps
                steps unbiased in length, which packed rows need not pay for; more saves padding in padded rows.
            rows: rows of every group where batches are padded.
            oversize: "own" gives a group that exceeds the budget its own micro-batch, "refuse" raises.
            parts: passes that every group needs under the budget (see `plaudit.data.splitting`); default: 1 each.
            rank: which process this is, from 0.
            world_size: how many processes share every step.

        Raises:
            ValueError: for an empty data set, numbers below 1, a rank outside the world, or refused groups.
        """
        if not len(lengths):
            raise ValueError("no groups to schedule")
        if prompts_per_step < 1 or window_steps < 1:
            raise ValueError(
                f"prompts_per_step is {prompts_per_step} and window_steps {window_steps}; both must be at least 1"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} processes, counted from 0")
        if parts is not None and len(parts) != len(lengths):
            raise ValueError(f"{len(parts)} numbers of parts for {len(lengths)} lengths")
        self._filler = _Filler(lengths, token_budget, None, rows, oversize)
        self.num_oversize = self._filler.num_oversize
        self.prompts_per_step, self.seed = prompts_per_step, seed
        self.shuffle, self.window_steps = shuffle, window_steps
        self.parts = parts
        self.rank, self.world_size = rank, world_size

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one epoch, the last of which may be smaller."""
        return -(-len(self._filler.lengths) // self.prompts_per_step)

    def epoch(self, epoch: int) -> list[list[list[int]]]:
        """The steps of an epoch as one process alone would take them, each a list of micro-batches."""
        return [self._filler.fill(step) for step in self._prompts_of_steps(epoch)]

    def steps(self, start: int = 0, stop: int | None = None) -> Iterator[Step]:
        """Steps `start`, `start + 1`, … up to `stop` (without end if None), over epochs: resuming is `steps(done)`."""
        number = start
        while stop is None or number < stop:
            epoch, first = divmod(number, self.steps_per_epoch)
            prompts = self._prompts_of_steps(epoch)
            for position in range(first, len(prompts)):
                if stop is not None and number >= stop:
                    return
                yield self._step(number, epoch, position, prompts[position])
                number += 1

    def _step(self, number: int, epoch: int, position: int, prompts: list[int]) -> Step:
        filled = self._filler.fill(prompts)
        if self.world_size > 1:
            # Best fit leaves the last batch nearly empty: spread evenly wherever that keeps the budget.
            wanted = -(-len(filled) // self.world_size) * self.world_size
            filled = self._filler.spread(prompts, wanted) or filled
            filled = deal([(batch, self._filler.cost(batch)) for batch in filled], self.world_size)
        rounds = [filled[start : start + self.world_size] for start in range(0, len(filled), self.world_size)]
        passes = [max(self._passes(batch) for batch in batches) for batches in rounds]
        mine = tuple(tuple(batches[self.rank]) for batches in rounds)
        return Step(number, epoch, position, tuple(prompts), mine, tuple(passes))

    def _passes(self, batch: Sequence[int]) -> int:
        return 1 if self.parts is None else max((self.parts[index] for index in batch), default=1)

    def _prompts_of_steps(self, epoch: int) -> list[list[int]]:
        count, size = len(self._filler.lengths), self.prompts_per_step
        order = epoch_order(count, self.seed, epoch) if self.shuffle else list(range(count))
        if self.window_steps == 1:
            return [order[start : start + size] for start in range(0, count, size)]
        steps: list[list[int]] = []
        for start in range(0, count, size * self.window_steps):
            window = sorted(order[start : start + size * self.window_steps], key=lambda i: -self._filler.lengths[i])
            cut = [window[at : at + size] for at in range(0, len(window), size)]
            whole = [step for step in cut if len(step) == size]
            mixed = epoch_order(len(whole), self.seed, epoch) if self.shuffle else range(len(whole))
            steps.extend([whole[i] for i in mixed] + cut[len(whole) :])
        return steps
