"""Policies with a memory: unrolling a trajectory is stepping through it, also where episodes end and are cut off."""

import torch

from plaudit.models.recurrent import LSTMActorCritic
from plaudit.rollout.recurrent import RecurrentPolicy
from plaudit.rollout.trajectory import new_trajectory


def test_an_unrolled_trajectory_is_one_step_after_the_other_and_looks_ahead_at_the_final_observation():
    draws = torch.Generator().manual_seed(0)
    network = LSTMActorCritic(3, 2, percept_size=5, hidden_size=4)
    rows, steps = 2, 6
    observations, final = (torch.randn(rows, steps, 3, generator=draws) for _ in range(2))
    following = torch.cat([observations[:, 1:], final[:, -1:]], 1)
    continues, truncated = torch.ones(rows, steps), torch.zeros(rows, steps, dtype=torch.bool)
    continues[0, 2], truncated[1, 3] = 0, True
    for row, step in ((0, 2), (1, 3)):  # what is seen last, not the first observation of the next episode
        following[row, step] = final[row, step]
    memory = torch.randn(rows, network.memory_size, generator=draws)
    zeros = torch.zeros(rows, steps)
    found, ahead = RecurrentPolicy(network).unroll(
        new_trajectory(
            actions=zeros.long(), behaviour_logprobs=zeros, rewards=zeros, continues=continues, truncated=truncated,
            mask=torch.ones_like(truncated), observations=observations, next_observations=following, state=memory,
        )
    )  # fmt: skip
    for row in range(rows):
        state = memory[row : row + 1]
        for step in range(steps):
            here, after = network(observations[row : row + 1, step], state)
            torch.testing.assert_close(found.logits[row, step], here.logits[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(found.values[row, step], here.values[0], rtol=0, atol=1e-6)
            if continues[row, step]:
                beyond, _ = network(following[row : row + 1, step], after)
                torch.testing.assert_close(ahead.values[row, step], beyond.values[0], rtol=0, atol=1e-6)
            state = after * float(continues[row, step]) * float(~truncated[row, step])
    assert not ahead.values.requires_grad
    assert found.values.requires_grad
