import dataclasses

import pytest
import torch

from plaudit.rollout.trajectory import Trajectory, concatenate, new_trajectory


def rows(num_rows, num_steps, first=0, **others):
    numbers = torch.arange(first, first + num_rows * num_steps).view(num_rows, num_steps)
    return new_trajectory(
        actions=numbers,
        behaviour_logprobs=-numbers.double(),
        rewards=numbers.double(),
        continues=torch.ones(num_rows, num_steps, dtype=torch.float64),
        mask=torch.ones(num_rows, num_steps, dtype=torch.bool),
        **others,
    )


def test_what_is_not_given_is_neutral():
    found = rows(2, 3)
    assert torch.equal(found.old_logprobs, found.behaviour_logprobs)
    assert torch.equal(found.reference_logprobs, found.behaviour_logprobs)
    assert found.values.abs().sum() == 0
    assert not found.truncated.any()
    assert (found.num_rows, found.num_steps) == (2, 3)
    recomputed = found.with_fields(old_logprobs=torch.zeros(2, 3, dtype=torch.float64))
    assert recomputed.old_logprobs.sum() == 0
    assert found.old_logprobs.sum() != 0


def test_select_and_move_take_every_field():
    found = rows(3, 2, group_ids=torch.tensor([7, 8, 9]), observations=torch.randn(3, 2, 4))
    for chosen in (torch.tensor([2, 0]), torch.tensor([False, True, True])):
        part = found.select(chosen)
        assert set(part.tensors()) == set(found.tensors())
        for name, tensor in part.tensors().items():
            assert torch.equal(tensor, found.tensors()[name][chosen])
    assert all(tensor.device.type == "meta" for tensor in found.to("meta").tensors().values())


def test_concatenate_fills_up_with_masked_steps():
    long, short = rows(1, 3, group_ids=torch.tensor([1])), rows(2, 2, first=10, group_ids=torch.tensor([2, 2]))
    found = concatenate([long, short])
    assert found.actions.tolist() == [[0, 1, 2], [10, 11, 0], [12, 13, 0]]
    assert found.mask.tolist() == [[True] * 3, [True, True, False], [True, True, False]]
    assert found.group_ids.tolist() == [1, 2, 2]
    assert torch.equal(concatenate([long]).rewards, long.rewards)
    with pytest.raises(ValueError, match="some trajectories have group_ids"):
        concatenate([long, rows(1, 1)])
    with pytest.raises(ValueError, match="no trajectory"):
        concatenate([])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rewards", torch.ones(2), "rewards must have shape"),
        ("rewards", torch.ones(2, 3, dtype=torch.int64), "rewards must be floating point"),
        ("mask", torch.ones(2, 3), "mask must be boolean"),
        ("truncated", torch.ones(2, 3), "truncated must be boolean"),
        ("continues", torch.ones(2, 3, dtype=torch.bool), "continues must be floating point"),
        ("observations", torch.ones(2, 4), "observations must begin with shape"),
        ("group_ids", torch.ones(3), "group_ids must begin with shape"),
    ],
)
def test_faults_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        rows(2, 3).with_fields(**{field: value})


def test_the_design_has_no_done():
    names = {field.name for field in dataclasses.fields(Trajectory)}
    assert "done" not in names
    assert {"continues", "truncated", "mask", "next_values", "behaviour_logprobs", "old_logprobs"} <= names
