"""Sutton and Barto's example 6.7: how often Q-learning goes left, and Double Q-learning does not.

python studies/maximisation_bias.py

From A, right ends with 0; left leads to B with 0, where each of ten actions ends with a reward from N(-0.1, 1). Left is
wrong by 0.1, and a maximum over ten noisy values makes it look right. At the end ε = 0.1 leaves 5 % of it.
"""

import argparse

import torch

from plaudit.algorithms.tabular_q import TabularQ

A, B, LEFT = 0, 1, 0
ACTIONS = 10


def share_of_left(num_runs: int, episodes: int = 300, *, double: bool, seed: int = 0) -> torch.Tensor:
    """`[episodes]`, the share of runs whose first action in an episode is left."""
    allowed = torch.zeros(2, ACTIONS, dtype=torch.bool)
    allowed[A, :2] = allowed[B] = True
    learner = TabularQ(num_runs, allowed, double=double, seed=seed)
    rewards = torch.Generator().manual_seed(seed + 1)
    start, nowhere = torch.full((num_runs,), A), torch.zeros(num_runs, dtype=torch.float64)
    second = torch.full((num_runs,), B)
    everyone = torch.ones(num_runs, dtype=torch.bool)
    shares = []
    for _ in range(episodes):
        first = learner.act(start)
        left = first == LEFT
        shares.append(left.double().mean())
        learner.learn(start, first, nowhere, second, ~left, everyone)
        drawn = torch.randn(num_runs, generator=rewards, dtype=torch.float64) - 0.1
        learner.learn(second, learner.act(second), drawn, second, everyone, left)
    return torch.stack(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    runs = parser.parse_args().runs
    print("| share of left at episode | 50 | 100 | 300 |")
    print("|---|---|---|---|")
    for name, double in (("Q-learning", False), ("Double Q-learning", True)):
        shares = share_of_left(runs, double=double)
        print(f"| {name} | " + " | ".join(f"{100 * shares[episode - 1]:.1f} %" for episode in (50, 100, 300)) + " |")


if __name__ == "__main__":
    main()
