"""Schedules: every index once, budgets kept, pure functions of (seed, epoch), resumable anywhere, little waste."""

from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plaudit.data.batching import BatchSchedule, StepSchedule, epoch_order, fill_batches, fill_padded_batches

lengths_strategy = st.lists(st.integers(1, 100), min_size=1, max_size=60)


def test_fill_batches_by_hand() -> None:
    # Longest first: 7 opens A, 5 opens B, 4 fits neither 10-7 but B (5 left), 3 fills A, 2 opens C.
    assert fill_batches(range(5), [3, 7, 2, 5, 4], 10) == [[1, 0], [3, 4], [2]]
    assert fill_batches([4, 2], [3, 7, 2, 5, 4], 10) == [[4, 2]]
    assert fill_batches(range(5), [1] * 5, None, 2) == [[0, 1], [2, 3], [4]]
    assert fill_batches(range(4), [1] * 4, 100, 3) == [[0, 1, 2], [3]]
    assert fill_batches([], [], 10) == []
    assert fill_batches(range(2), [50, 3], 10) == [[0], [1]]


def test_best_fit_takes_the_fullest_batch_with_room() -> None:
    # 6 and 7 open A and B; 3 goes where it fits exactly (B), not to the first with room (A).
    assert fill_batches(range(3), [6, 7, 3], 10) == [[1, 2], [0]]


def test_fill_padded_batches_by_hand() -> None:
    # Widths 9, 8, 4, 4 with 2, 1, 2, 3 rows: 9 takes 2·9; 8 makes 3·9 = 27; 4 would make 5·9 = 45 > 30.
    assert fill_padded_batches(range(4), [4, 9, 8, 4], [2, 2, 1, 3], 30) == [[1, 2], [0, 3]]
    assert fill_padded_batches(range(4), [4, 9, 8, 4], [2, 2, 1, 3], None, 3) == [[1, 2, 0], [3]]


@settings(max_examples=80, deadline=None)
@given(
    lengths=lengths_strategy,
    budget=st.integers(10, 200),
    most=st.none() | st.integers(1, 5),
    window=st.integers(1, 70),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_batches_hold_every_index_once_within_bounds(
    lengths: list[int], budget: int, most: int | None, window: int, seed: int, shuffle: bool
) -> None:
    schedule = BatchSchedule(lengths, budget, prompts_per_batch=most, seed=seed, window=window, shuffle=shuffle)
    batches = schedule.epoch(1)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= budget for batch in batches)
    assert most is None or max(map(len, batches)) <= most
    again = BatchSchedule(lengths, budget, prompts_per_batch=most, seed=seed, window=window, shuffle=shuffle)
    assert again.epoch(1) == batches
    if not shuffle:
        assert schedule.epoch(0) == batches


@settings(max_examples=60, deadline=None)
@given(data=st.data(), lengths=lengths_strategy, budget=st.integers(10, 300))
def test_padded_batches_stay_within_the_padded_budget(data: st.DataObject, lengths: list[int], budget: int) -> None:
    rows = data.draw(st.lists(st.integers(1, 9), min_size=len(lengths), max_size=len(lengths)))
    batches = BatchSchedule(lengths, budget, rows=rows).epoch(0)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(rows[i] for i in batch) * max(lengths[i] for i in batch) <= budget


@settings(max_examples=80, deadline=None)
@given(
    lengths=lengths_strategy,
    budget=st.none() | st.integers(10, 200),
    size=st.integers(1, 20),
    window=st.integers(1, 4),
    start=st.integers(0, 30),
)
def test_steps_hold_every_index_once_and_resume_anywhere(
    lengths: list[int], budget: int | None, size: int, window: int, start: int
) -> None:
    schedule = StepSchedule(lengths, prompts_per_step=size, token_budget=budget, seed=7, window_steps=window)
    steps = list(schedule.steps(stop=start + 12))
    assert [step.number for step in steps] == list(range(start + 12))
    assert list(schedule.steps(start, start + 12)) == steps[start:]
    for epoch in range((start + 12) // schedule.steps_per_epoch):
        mine = [step for step in steps if step.epoch == epoch]
        assert [step.position for step in mine] == list(range(schedule.steps_per_epoch))
        assert sorted(i for step in mine for i in step.indices) == list(range(len(lengths)))
        assert all(len(step.indices) == size for step in mine[:-1])
        assert [[list(b) for b in step.micro_batches] for step in mine] == schedule.epoch(epoch)
    for step in steps:
        for batch in step.micro_batches:
            assert budget is None or len(batch) == 1 or sum(lengths[i] for i in batch) <= budget


def test_the_budget_does_not_change_which_prompts_share_a_step() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 50, 40)]
    small, large = (StepSchedule(lengths, prompts_per_step=8, token_budget=b, seed=3) for b in (60, 1000))
    for one, other in zip(small.steps(0, 12), large.steps(0, 12), strict=True):
        assert sorted(one.indices) == sorted(other.indices)
        assert len(one.micro_batches) > len(other.micro_batches) == 1


def test_epochs_and_seeds_differ_and_the_order_is_fixed_for_good() -> None:
    assert sorted(epoch_order(50, 0, 0)) == list(range(50))
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    # Written down once: a change of this order would break the resuming of every run that is under way.
    assert epoch_order(8, 0, 0) == FIRST_ORDER


FIRST_ORDER = [3, 2, 1, 6, 0, 7, 4, 5]


def test_order_is_uniform_enough() -> None:
    """Over 2000 epochs each of 5 items stands in each place 400 times, within five standard deviations (17.9 each)."""
    counts = np.zeros((5, 5))
    for epoch in range(2000):
        counts[np.arange(5), epoch_order(5, 1, epoch)] += 1
    assert np.abs(counts - 400).max() < 5 * 17.9


def test_little_of_the_budget_is_wasted() -> None:
    """Lengths as in real comparisons (log-normal, mean about 400): more than 98 % of the budget is used."""
    lengths = np.random.default_rng(1).lognormal(5.8, 0.6, 4000).astype(int).clip(1, 4096).tolist()
    batches = BatchSchedule(lengths, 8192, window=1024).epoch(0)
    assert sum(lengths) / (8192 * len(batches)) > 0.98
    # In a small step of 32 prompts the number of micro-batches is at most one above the least possible.
    schedule = StepSchedule(lengths, prompts_per_step=32, token_budget=8192)
    for step in islice(schedule.steps(), 125):
        total = sum(lengths[i] for i in step.indices)
        assert len(step.micro_batches) <= -(-total // 8192) + 1


def test_windows_bound_the_sorting_and_save_padding() -> None:
    lengths = np.random.default_rng(2).integers(10, 500, 1000).tolist()

    def places(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    rows = [1] * 1000
    narrow = BatchSchedule(lengths, 4000, rows=rows, window=10).epoch(0)
    wide = BatchSchedule(lengths, 4000, rows=rows, window=500).epoch(0)
    assert places(wide) < 1.1 * sum(lengths) < places(narrow)
    # Without shuffling, nothing leaves its window.
    for batch in BatchSchedule(lengths, 4000, window=50, shuffle=False).epoch(0):
        assert len({i // 50 for i in batch}) == 1


def test_sorted_windows_of_steps_save_padding_and_keep_the_short_step_last() -> None:
    lengths = np.random.default_rng(4).integers(10, 500, 100).tolist()
    schedule = StepSchedule(lengths, prompts_per_step=8, window_steps=4, rows=[1] * 100)
    sizes = [sum(map(len, step)) for step in schedule.epoch(0)]
    assert sizes == [8] * 12 + [4]
    spread = [max(lengths[i] for i in s.indices) - min(lengths[i] for i in s.indices) for s in schedule.steps(0, 12)]
    assert np.mean(spread) < 200 < 490


def test_oversize_groups_have_their_own_batch_or_are_refused() -> None:
    schedule = StepSchedule([5, 30, 4], prompts_per_step=3, token_budget=10, shuffle=False)
    assert schedule.num_oversize == 1
    assert schedule.epoch(0) == [[[1], [0, 2]]]
    with pytest.raises(ValueError, match="1 of 3 groups exceed token_budget 10; the largest, number 1, has 30"):
        StepSchedule([5, 30, 4], prompts_per_step=3, token_budget=10, oversize="refuse")
    with pytest.raises(ValueError, match="number 0, has 12 tokens"):
        BatchSchedule([4], 10, rows=[3], oversize="refuse")
    assert BatchSchedule([10], 10, oversize="refuse").num_oversize == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give token_budget or prompts_per_batch"),
        ({"token_budget": 0}, "token_budget is 0"),
        ({"prompts_per_batch": 0}, "batch of 0 prompts"),
        ({"token_budget": 5, "window": 0}, "window is 0"),
        ({"token_budget": 5, "rows": [1, 2]}, "2 row counts for 1 lengths"),
        ({"token_budget": 5, "oversize": "cut"}, "oversize is 'cut'"),
    ],
)
def test_wrong_arguments_of_batches_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchSchedule([1], **arguments)  # type: ignore[arg-type]


def test_wrong_arguments_of_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="no groups"):
        StepSchedule([], prompts_per_step=1)
    with pytest.raises(ValueError, match="prompts_per_step is 0"):
        StepSchedule([1], prompts_per_step=0)
    with pytest.raises(ValueError, match="window_steps 0"):
        StepSchedule([1], prompts_per_step=1, window_steps=0)
    assert BatchSchedule([], 5).epoch(0) == []


@settings(max_examples=60, deadline=None)
@given(
    lengths=lengths_strategy,
    budget=st.none() | st.integers(10, 200),
    size=st.integers(1, 20),
    world=st.integers(2, 5),
)
def test_processes_get_equal_numbers_of_micro_batches_of_the_same_step(
    lengths: list[int], budget: int | None, size: int, world: int
) -> None:
    options: dict[str, Any] = {"prompts_per_step": size, "token_budget": budget, "seed": 7}
    alone = list(StepSchedule(lengths, **options).steps(0, 5))
    parts = [1 + n // 40 for n in lengths]
    ranks = [
        list(StepSchedule(lengths, **options, parts=parts, rank=rank, world_size=world).steps(0, 5))
        for rank in range(world)
    ]
    for number, together in enumerate(zip(*ranks, strict=True)):
        assert len({len(step.micro_batches) for step in together}) == 1
        assert len({step.parts for step in together}) == 1
        assert all(step.indices == alone[number].indices for step in together)
        dealt = [i for step in together for batch in step.micro_batches for i in batch]
        assert sorted(dealt) == sorted(alone[number].indices)
        for step in together:
            for batch, passes in zip(step.micro_batches, step.parts, strict=True):
                assert budget is None or len(batch) < 2 or sum(lengths[i] for i in batch) <= budget
                assert all(parts[i] <= passes for i in batch)


def test_work_is_balanced_between_processes() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(20, 400, 640)]
    for world in (2, 4):
        options: dict[str, Any] = {"prompts_per_step": 32, "token_budget": 8192, "world_size": world}
        ranks = [list(StepSchedule(lengths, **options, rank=rank).steps(0, 20)) for rank in range(world)]
        for together in zip(*ranks, strict=True):
            work = [sum(lengths[i] for batch in step.micro_batches for i in batch) for step in together]
            assert max(work) <= 1.1 * sum(work) / world
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        StepSchedule(lengths, prompts_per_step=4, rank=2, world_size=2)


def test_work_is_not_spread_evenly_at_the_price_of_the_budget() -> None:
    """5 + 5 and 4 + 3 + 3 fill two batches of 10; longest first they would take 9 and 11."""
    lengths = [5, 5, 4, 3, 3]
    for rank in (0, 1):
        schedule = StepSchedule(lengths, prompts_per_step=5, token_budget=10, rank=rank, world_size=2)
        (step,) = schedule.steps(0, 1)
        assert [sum(lengths[index] for index in chosen) for chosen in step.micro_batches] == [10]
