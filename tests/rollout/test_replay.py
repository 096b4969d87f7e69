"""The memory of steps: what is drawn, n-step returns against a plain loop, priorities against the formula."""

import numpy as np
import pytest
import torch

from plaudit.rollout.replay import Replay, SumTree
from plaudit.rollout.trajectory import new_trajectory


def steps(first, count, rows=1, ends=(), cuts=()):
    """Step `t` of row `b` has observation `100 b + t`, reward `t`; ends and cuts are times."""
    times = torch.arange(first, first + count).expand(rows, count)
    seen = (times + 100 * torch.arange(rows)[:, None]).float().unsqueeze(-1)
    ended = torch.tensor([[t in ends for t in range(first, first + count)]] * rows)
    cut = torch.tensor([[t in cuts for t in range(first, first + count)]] * rows)
    return new_trajectory(
        actions=times % 3,
        behaviour_logprobs=torch.zeros(rows, count),
        rewards=times.float(),
        continues=(~ended).float(),
        truncated=cut,
        mask=torch.ones(rows, count, dtype=torch.bool),
        observations=seen,
        next_observations=seen + 0.5,
    )


def test_the_oldest_steps_are_forgotten_and_every_other_one_is_drawn_alike():
    replay = Replay(8, 2)
    replay.add(steps(0, 3, rows=2))
    assert replay.size == 6
    replay.add(steps(3, 3, rows=2))
    assert replay.size == 8
    batch = replay.sample(8000, discount=0.9, generator=torch.Generator().manual_seed(0))
    drawn, counts = batch.observations.unique(return_counts=True)
    assert drawn.tolist() == [2, 3, 4, 5, 102, 103, 104, 105]
    assert counts.min() > 900
    assert torch.equal(batch.next_observations, batch.observations + 0.5)
    assert torch.equal(batch.actions, (batch.observations[:, 0].long() % 100) % 3)
    assert bool((batch.weights == 1).all())
    replay.add(steps(6, 9, rows=2))  # more than there is room for
    assert replay.sample(500, discount=0.9).returns.unique().tolist() == [11, 12, 13, 14]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
def test_returns_over_several_steps_are_those_of_a_plain_loop(num_steps):
    replay, discount = Replay(10, 1), 0.9
    ends, cuts = (7,), (10,)
    for first in range(0, 14, 2):
        replay.add(steps(first, 2, ends=ends, cuts=cuts))
    batch = replay.sample(400, discount=discount, num_steps=num_steps, generator=torch.Generator().manual_seed(0))
    for row, first in enumerate(batch.observations[:, 0].long().tolist()):
        total, factor = 0.0, 1.0
        for time in range(first, min(first + num_steps, 14)):
            total, factor, last = total + factor * time, factor * discount, time
            if time in ends or time in cuts:
                break
        assert batch.returns[row].item() == pytest.approx(total)
        assert batch.next_observations[row].item() == last + 0.5
        # At a time limit what follows still counts; at an end nothing does.
        assert batch.discounts[row].item() == pytest.approx(0.0 if last in ends else factor)


def test_a_sum_tree_is_a_table_of_cumulative_sums():
    for size in (1, 2, 5, 8, 13):
        generator = np.random.default_rng(size)
        tree, table = SumTree(size), np.zeros(size)
        for _ in range(20):
            places = generator.integers(size, size=3)
            priorities = generator.random(3) * (generator.random(3) > 0.2)
            for place, priority in zip(places, priorities, strict=True):
                tree.set(torch.tensor([place]), torch.tensor([priority]))
                table[place] = priority
            assert tree.total == pytest.approx(table.sum())
        table += 0.1
        tree.set(torch.arange(size), torch.tensor(table))
        drawn = tree.sample(20_000, torch.Generator().manual_seed(0))
        shares = np.bincount(drawn.numpy(), minlength=size) / 20_000
        np.testing.assert_allclose(shares, table / table.sum(), atol=2e-3)  # one draw from each equal slice
        np.testing.assert_allclose(tree.probabilities(torch.arange(size)).numpy(), table / table.sum(), rtol=1e-12)
    tree.set(torch.arange(12), torch.zeros(12))
    assert tree.sample(100).unique().tolist() == [12]  # what has priority 0 is never drawn
    with pytest.raises(ValueError, match="finite"):
        tree.set(torch.tensor([0]), torch.tensor([float("nan")]))


def test_surprising_steps_are_drawn_more_often_and_weighted_down_for_it():
    replay = Replay(6, 1, priority_exponent=0.5)
    replay.add(steps(0, 5))
    errors = torch.tensor([0.0, 1.0, 4.0, 9.0, 16.0])
    replay.set_errors(torch.arange(5), -errors)  # the sign does not matter
    batch = replay.sample(10_000, discount=1.0, importance_exponent=1.0, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(batch.places, minlength=5) / 10_000
    wanted = (errors + 1e-6).sqrt() / (errors + 1e-6).sqrt().sum()
    torch.testing.assert_close(shares, wanted.float(), atol=2e-3, rtol=0)
    # With β = 1 the weighted mean of anything is its plain mean, up to the largest weight.
    seen = wanted[batch.places].unique()
    torch.testing.assert_close(batch.weights.unique().flip(0), (seen.min() / seen).float(), rtol=1e-4, atol=1e-4)
    replay.add(steps(5, 1))  # a new step is as likely as the most surprising one
    batch = replay.sample(10_000, discount=1.0, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(batch.places, minlength=6) / 10_000
    assert shares[5].item() == pytest.approx(shares[4].item(), abs=2e-3)


def test_a_memory_goes_on_from_its_state():
    for exponent in (None, 0.6):
        first, second = Replay(6, 2, priority_exponent=exponent), Replay(6, 2, priority_exponent=exponent)
        first.add(steps(0, 5, rows=2))
        first.set_errors(torch.tensor([0, 4]), torch.tensor([3.0, 2.0]))
        second.load_state_dict(first.state_dict())
        drawn = [
            each.sample(50, discount=0.9, num_steps=2, generator=torch.Generator().manual_seed(3))
            for each in (first, second)
        ]
        assert all(torch.equal(*pair) for pair in zip(*drawn, strict=True))
        # The next steps are of a new episode: what goes before them was cut off where it stood.
        second.add(steps(5, 1, rows=2))
        found = second._batch(torch.tensor([3, 4]), torch.ones(2), 0.9, 2)
        assert found.returns.tolist() == pytest.approx([3 + 0.9 * 4, 4])
        assert found.discounts.tolist() == pytest.approx([0.81, 0.9])


def test_what_cannot_be_remembered_is_refused():
    with pytest.raises(ValueError, match="nothing is remembered"):
        Replay(4, 1).sample(2, discount=1.0)
    with pytest.raises(ValueError, match="2 rows"):
        Replay(4, 2).add(steps(0, 2))
    with pytest.raises(ValueError, match=r"trajectory\.observations"):
        Replay(4, 1).add(steps(0, 2).with_fields(observations=None))
    with pytest.raises(ValueError, match="at least 1"):
        Replay(0, 1)
