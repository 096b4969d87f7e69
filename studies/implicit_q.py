"""Implicit Q-learning on a problem of which every answer can be listed: exact values beside learned ones.

python studies/implicit_q.py exact
python studies/implicit_q.py learned --seeds 0 1 2 3 4

`exact` solves what implicit Q-learning aims at when everything was recorded, with the reference as the behaviour:
`V(s)` is the τ-expectile of `Q(s, a)` over the behaviour's tokens, `Q = r + V(s')`, longest prefixes first. `learned`
fits the same by `plaudit.algorithms.implicit_q` on answers that were sampled from the behaviour, and nothing else.
Both are decoded by `π ∝ π_b exp(β' (Q - V))` at `β' = 1/β`, where soft values give the optimum `π*`.
"""

import argparse
import time
from itertools import product

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from plaudit.algorithms.implicit_q import ImplicitQ
from plaudit.configs.q_learning import ImplicitQConfig
from plaudit.core.q_learning import advantage_weighted_logprobs
from plaudit.models.q_heads import QHeads
from plaudit.rollout.token_mdp import TokenMDP
from plaudit.rollout.trajectory import new_trajectory

EXPECTILES = (0.5, 0.7, 0.9, 0.99, 0.999, 0.999999)
STRINGS = (1000, 10_000, 100_000)
STEPS = 800
NEVER = -20.0
"""A value so low that decoding never takes the step."""


def expectiles(values: Tensor, weights: Tensor, expectile: float) -> Tensor:
    """The τ-expectiles of `values [..., V]` with probabilities `weights [..., V]`: `Σ w |τ - 1[u < 0]| u = 0`, `[...]`.

    `u = value - level`. Iterated from the mean: the weights of the sides, then the level that balances them.
    """
    level = (weights * values).sum(-1, keepdim=True)
    for _ in range(200):
        sides = weights * torch.where(values > level, expectile, 1 - expectile)
        level = (sides * values).sum(-1, keepdim=True) / sides.sum(-1, keepdim=True)
    return level.squeeze(-1)


def solved(problem: TokenMDP, expectile: float) -> tuple[Tensor, Tensor]:
    """`V [S]` and `Q [S, A]` of implicit Q-learning with everything recorded, from the longest prefixes back."""
    behaviour = problem.reference_logprobs[0].exp()
    values = torch.zeros(problem.num_prefixes, dtype=torch.float64)
    action_values = problem.rewards[0].clone()
    lengths = torch.tensor([len(prefix) for prefix in problem.prefixes])
    for length in range(problem.max_length - 1, -1, -1):
        rows = lengths == length
        after = problem.next_prefix[rows]
        action_values[rows] += torch.where(after >= 0, values[after.clamp(min=0)], 0.0)
        values[rows] = expectiles(action_values[rows], behaviour[rows], expectile)
    return values, action_values


def decode(problem: TokenMDP, action_values: Tensor) -> Tensor:
    """The policy `[1, S, A]` that action values `[S, A]` make of the behaviour."""
    reference = problem.reference_logprobs
    return advantage_weighted_logprobs(reference, action_values.view(reference.shape), scale=1 / problem.coefficient)


def show(problem: TokenMDP, label: str, values: Tensor, action_values: Tensor) -> str:
    """A row: how far from two exact answers, and what decoding makes of the values."""
    behaviour = problem.evaluate(problem.reference_logprobs, coefficient=0.0).action_values[0]
    apart = [(action_values - other).abs().max() for other in (behaviour, problem.hard_solution().action_values[0])]
    logprobs = decode(problem, action_values)
    reached = [problem.expected_reward(logprobs)[0], problem.objective(logprobs), problem.gap(logprobs)]
    divergence = problem.kl(logprobs, problem.optimal_solution().logprobs)[0].abs()
    return f"| {label} | {' | '.join(f'{float(each):.4f}' for each in (values[0], *apart, *reached, divergence))} |"


def exact(problem: TokenMDP) -> None:
    """The table of what the method aims at, and of what else could be decoded."""
    print("| values | V(root) | farthest from Q of the behaviour | from the hard optimum | E[r] | J | gap | KL to π* |")
    print(f"|{'---|' * 8}")
    for expectile in EXPECTILES:
        print(show(problem, f"expectile {expectile:g}", *solved(problem, expectile)))
    for label, solution in (
        ("the behaviour's, exact", problem.evaluate(problem.reference_logprobs, coefficient=0.0)),
        ("hard optimum, exact", problem.hard_solution()),
        ("soft optimum, exact", problem.optimal_solution()),
    ):
        print(show(problem, label, solution.values[0], solution.action_values[0]))
    best = problem.optimal_solution()
    print(f"\nπ*: E[r] {problem.expected_reward(best.logprobs)[0]:.3f}, J* {best.values[0, 0]:.3f}; "
          f"π_ref: {problem.objective(problem.reference_logprobs):.3f}")  # fmt: skip


def recorded(problem: TokenMDP, strings: int, seed: int) -> Tensor:
    """How often each step `[S, A]` stands in answers that were sampled from the behaviour."""
    prompts = torch.zeros(strings, dtype=torch.int64)
    found = problem.sample(problem.policy(), prompts, generator=torch.Generator().manual_seed(seed))
    assert found.observations is not None
    steps = (found.observations * problem.vocabulary + found.actions)[found.mask]
    size = problem.num_prefixes * problem.vocabulary
    return torch.bincount(steps, minlength=size).view(problem.num_prefixes, problem.vocabulary)


def learned(problem: TokenMDP, counts: Tensor, expectile: float) -> tuple[Tensor, Tensor]:
    """`V [S]` and `Q [S, A]` of heads over one-hot states, by Adam on recorded steps, its rate falling to 0."""
    states, actions = counts.nonzero(as_tuple=True)
    after = problem.next_prefix[states, actions]
    # Steps that are alike have equal losses: each stands once and weighs as often as it was recorded.
    batch = new_trajectory(
        actions=actions[:, None],
        behaviour_logprobs=torch.zeros(len(states), 1, dtype=torch.float64),
        rewards=problem.rewards[0, states, actions][:, None],
        continues=(after >= 0).double()[:, None],
        mask=torch.ones(len(states), 1, dtype=torch.bool),
    )
    weights = (counts[states, actions] / counts.sum()).double()[:, None]
    table = torch.eye(problem.num_prefixes, dtype=torch.float64)
    before, following = table[states][:, None], table[after.clamp(min=0)][:, None]
    heads = QHeads(problem.num_prefixes, problem.vocabulary, dtype=torch.float64)
    heads.value.bias.requires_grad_(False)
    optimizer = torch.optim.Adam([heads.weight, heads.value.weight], lr=0.05, eps=1e-12)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    learner = ImplicitQ(ImplicitQConfig(expectile=expectile, polyak=0.1), heads, optimizer)
    for _ in range(STEPS):
        learner.update(before, following, batch, weights=weights)
        schedule.step()
    with torch.no_grad():
        return heads.values(table), heads.action_values(table)


def table_of_learned(problem: TokenMDP, seeds: list[int]) -> None:
    """Learned beside exact: how far the values are off where something was recorded, and what decoding reaches."""
    behaviour, best = problem.reference_logprobs[0].exp(), problem.optimal_solution().logprobs
    columns = (
        *("answers", "expectile", "steps never recorded", "mean error of Q", "V(root), exact", "V(root)"),
        *("gap", "without those steps", "gap, exact", "KL to π*", "CPU s"),
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for strings, expectile in product(STRINGS, (0.5, 0.9)):
        exact_values, exact_q = solved(problem, expectile)
        rows = []
        begun = time.process_time()
        for seed in seeds:
            counts = recorded(problem, strings, seed)
            values, action_values = learned(problem, counts, expectile)
            shares = counts / counts.sum()
            logprobs = decode(problem, action_values)
            rows.append(
                [
                    float((behaviour * (counts == 0))[counts.sum(1) > 0].mean()),
                    float((shares * (action_values - exact_q).abs()).sum()),
                    float(values[0]),
                    problem.gap(logprobs),
                    problem.gap(decode(problem, action_values.masked_fill(counts == 0, NEVER))),
                    float(problem.kl(logprobs, best)[0]),
                ]
            )
        unseen, error, root, gap, without, divergence = ([row[place] for row in rows] for place in range(6))
        seconds = (time.process_time() - begun) / len(seeds)
        cells = [f"{strings:,}", expectile, f"{100 * np.mean(unseen):.2f} %", f"{np.mean(error):.3f}"]
        cells += [f"{exact_values[0]:.3f}", interval(root), interval(gap), interval(without)]
        cells += [f"{problem.gap(decode(problem, exact_q)):.3f}", interval(divergence), f"{seconds:.1f}"]
        print(f"| {' | '.join(map(str, cells))} |")


def interval(values: list[float]) -> str:
    """Mean and half a 95 % interval by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["exact", "learned"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of learned: two or more")
    arguments = parser.parse_args()
    problem = TokenMDP()
    exact(problem) if arguments.part == "exact" else table_of_learned(problem, arguments.seeds)


if __name__ == "__main__":
    main()
