import statistics

import pytest
import torch

from plaudit.core.advantages import (
    RunningMean,
    group_mean_advantages,
    group_standardised_advantages,
    leave_one_out_advantages,
    over_steps,
)

KINDS = [group_mean_advantages, leave_one_out_advantages, group_standardised_advantages]
NAN = float("nan")


def test_by_hand():
    rewards = torch.tensor([1.0, 10.0, 3.0, NAN, 8.0, 20.0], dtype=torch.float64)
    groups = torch.tensor([5, 2, 5, 2, 5, 9])
    valid = torch.tensor([True, True, True, False, True, True])
    # Group 5: 1, 3, 8 with mean 4; groups 2 and 9 have one valid row each.
    advantages, usable = group_mean_advantages(rewards, groups, valid)
    assert advantages.tolist() == [-3, 0, -1, 0, 4, 0]
    assert usable.tolist() == [True, False, True, False, True, False]
    assert leave_one_out_advantages(rewards, groups, valid)[0].tolist() == [-4.5, 0, -1.5, 0, 6, 0]
    spread = statistics.stdev([1, 3, 8])
    expected = [-3 / spread, 0, -1 / spread, 0, 4 / spread, 0]
    found = group_standardised_advantages(rewards, groups, valid, eps=0.0)[0].masked_fill(~usable, 0.0)
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_plain_loop_over_groups(kind):
    rewards, groups = torch.randn(60, dtype=torch.float64), torch.randint(0, 15, (60,))
    valid = torch.rand(60) > 0.3
    advantages, usable = kind(rewards, groups, valid)
    for i in range(60):
        mates = [rewards[j].item() for j in range(60) if groups[j] == groups[i] and valid[j]]
        if not valid[i] or len(mates) < 2:
            assert advantages[i] == 0
            assert not usable[i]
            continue
        own, mean = rewards[i].item(), statistics.mean(mates)
        others = (sum(mates) - own) / (len(mates) - 1)
        expected = {
            group_mean_advantages: own - mean,
            leave_one_out_advantages: own - others,
            group_standardised_advantages: (own - mean) / (statistics.stdev(mates) + 1e-4),
        }[kind]
        assert advantages[i].item() == pytest.approx(expected, abs=1e-10)
        assert usable[i]


@pytest.mark.parametrize("kind", KINDS)
def test_identities(kind):
    rewards, groups = torch.randn(12, dtype=torch.float64), torch.arange(12) % 3
    valid = torch.ones(12, dtype=torch.bool)
    advantages, _ = kind(rewards, groups, valid)
    shift = torch.tensor([5.0, -70.0, 900.0], dtype=torch.float64)[groups]
    torch.testing.assert_close(kind(rewards + shift, groups, valid)[0], advantages, rtol=0, atol=1e-10)
    order = torch.randperm(12)
    torch.testing.assert_close(kind(rewards[order], groups[order], valid[order])[0], advantages[order])
    assert advantages[groups == 1].sum().abs() < 1e-12
    if kind is group_standardised_advantages:
        torch.testing.assert_close(
            kind(7 * rewards, groups, valid, eps=0.0)[0], kind(rewards, groups, valid, eps=0.0)[0]
        )
        assert kind(rewards, groups, valid, eps=0.0)[0][groups == 2].std().item() == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_extremes(kind):
    equal = torch.tensor([0.1, 0.1, 0.1, 1e4, -1e4])
    groups = torch.tensor([0, 0, 0, 1, 1])
    valid = torch.ones(5, dtype=torch.bool)
    advantages, usable = kind(equal, groups, valid)
    assert advantages[:3].tolist() == [0, 0, 0]
    assert usable.all()
    assert torch.isfinite(advantages).all()
    # Equal rewards that float32 cannot average exactly, and small differences on a large offset.
    thirds = torch.tensor([1234.5678, 1234.5678, 1234.5678, 4e6 + 1, 4e6])
    assert kind(thirds, groups, valid)[0][:3].tolist() == [0, 0, 0]
    assert kind(thirds, groups, valid)[0][3:].tolist() == kind(thirds - 4e6, groups, valid)[0][3:].tolist()
    with pytest.raises(ValueError, match="valid must be boolean"):
        kind(equal, groups, valid.float())
    nothing, usable = kind(torch.full((5,), NAN), groups, ~valid)
    assert nothing.tolist() == [0] * 5
    assert not usable.any()
    with pytest.raises(ValueError, match="group_ids"):
        kind(equal, groups[:, None], valid)
    with pytest.raises(ValueError, match=r"\[B\]"):
        kind(equal[:, None], groups, valid)


def test_running_mean_by_hand_and_without_its_own_samples():
    state = RunningMean()
    assert state.mean == 0
    state = state.updated(torch.tensor([1.0, NAN, 3.0]), torch.tensor([True, False, True]))
    assert state == RunningMean(4.0, 2.0)
    assert state.updated(torch.tensor([8.0]), torch.tensor([True])).mean == 4
    assert state.updated(torch.tensor([8.0]), torch.tensor([True]), decay=0.5).mean == 5
    assert state.updated(torch.tensor([8.0]), torch.tensor([True]), decay=0.0).mean == 8
    with pytest.raises(ValueError, match="decay"):
        state.updated(torch.tensor([8.0]), torch.tensor([True]), decay=1.5)


def test_over_steps():
    mask = torch.tensor([[True, True], [False, True]])
    assert over_steps(torch.tensor([2.0, 3.0]), mask).tolist() == [[2, 2], [0, 3]]
    with pytest.raises(ValueError, match="advantages"):
        over_steps(torch.ones(2, 1), mask)
