"""What the tests of algorithms share: learning on a `TokenMDP`, and expectations by enumeration."""

import itertools

import torch

from plaudit.algorithms.build import build_algorithm
from plaudit.configs.algorithm import AlgorithmConfig


def greedy_returns(mdp, logits, discount=1.0):
    """`[P]`: the discounted reward of the answer that takes the likeliest token everywhere."""
    best = logits.detach().argmax(-1).view(mdp.num_prompts, -1)
    found = []
    for prompt in range(mdp.num_prompts):
        prefix, total, factor = 0, 0.0, 1.0
        while prefix >= 0:
            token = int(best[prompt, prefix])
            total += factor * float(mdp.rewards[prompt, prefix, token])
            prefix, factor = int(mdp.next_prefix[prefix, token]), factor * discount
        found.append(total)
    return torch.tensor(found, dtype=torch.float64)


def learn(mdp, options, *, updates, rows=256, samples=4, rate=0.1, seed=0):
    """The table of log-probabilities after `updates` batches of `rows` sampled strings, the rate decayed to 0."""
    policy = mdp.policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    config = AlgorithmConfig(**{"kl_coefficient": mdp.coefficient} | options)
    algorithm = build_algorithm(config, policy, optimizer, total_updates=updates)
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(rows) // samples
    prompts = groups % mdp.num_prompts
    for _ in range(updates):
        found = mdp.sample(policy, prompts, generator=generator).with_fields(group_ids=groups)
        baselines = None
        if algorithm.needs_greedy:
            baselines = greedy_returns(mdp, policy.logits, config.discount)[prompts]
        algorithm.update(found, baselines=baselines, generator=generator)
        schedule.step()
    return mdp.logprob_table(policy).detach()


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
