"""What the tests of algorithms share: expectations by enumeration, and an environment that is solved at once."""

import itertools

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from plaudit.algorithms.build import build_algorithm
from plaudit.configs.algorithm import AlgorithmConfig


def expected_step(mdp, logits, options, *, samples=1, baselines=None, values=None):
    """`E[Δθ]` of one step of plain gradient ascent with rate 1 on one group of `samples` strings, from all groups.

    The problem has one prompt. Returns the change of the logits `[S, V]`.
    """
    weights = mdp.string_logprobs(logits.log_softmax(-1))[0].exp()
    policy = mdp.policy()
    total = torch.zeros_like(logits[0])
    config = AlgorithmConfig(**{"kl_coefficient": mdp.coefficient} | options)
    for group in itertools.product(range(mdp.num_strings), repeat=samples):
        with torch.no_grad():
            policy.logits.copy_(logits[0])
            policy.critic.copy_(torch.zeros_like(policy.critic) if values is None else values)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        algorithm = build_algorithm(config, policy, optimizer)
        batch = mdp.enumerate(policy).select(torch.tensor(group))
        algorithm.update(batch, baselines=None if baselines is None else baselines.expand(samples))
        total += weights[list(group)].prod() * (policy.logits.detach() - logits[0])
    return total


SMALL = {"vocabulary": 3, "max_length": 3}
TINY = {"vocabulary": 3, "max_length": 2}


def random_logits(mdp, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mdp.reference_logprobs.shape, generator=generator, dtype=torch.float64)


class Echo(gymnasium.Env):
    """Pays 1 for the action that equals the observation; every episode is cut off after 8 steps."""

    states, limit = 4, 8
    observation_space = spaces.Discrete(4)
    action_space = spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.state = 0, int(self.np_random.integers(self.states))
        return np.int64(self.state), {}

    def step(self, action):
        paid = float(int(action) == self.state)
        self.time, self.state = self.time + 1, int(self.np_random.integers(self.states))
        return np.int64(self.state), paid, False, self.time >= self.limit, {}


class TwoArms(gymnasium.Env):
    """One choice between 0.5 and 1, then the end."""

    observation_space = spaces.Discrete(1)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.int64(0), {}

    def step(self, action):
        return np.int64(0), 0.5 + 0.5 * float(action), True, False, {}
