"""Dyna: the mazes of Sutton and Barto with tables, and the dialogue problem with a learned user.

python studies/dyna.py maze
python studies/dyna.py changing
python studies/dyna.py dialogue
"""

import argparse
import itertools
import math
import time

import numpy as np
import torch

from plaudit.algorithms.build import build_algorithm
from plaudit.algorithms.deep_dyna import DialogueDyna
from plaudit.algorithms.dyna import DynaTables
from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.configs.dyna import DynaConfig
from plaudit.models.user import RecurrentUser
from plaudit.rollout.dialogue import DialogueMDP
from plaudit.rollout.gridworlds import Grid, GridWorld, blocking_maze, dyna_maze, shortcut_maze


def episode_lengths(config: DynaConfig, *, episodes: int, seed: int) -> list[int]:
    """Steps of each episode in the maze of example 8.1."""
    world = GridWorld(dyna_maze())
    tables = DynaTables(config, int(world.observation_space.n), 4, seed=seed)
    lengths, steps = [], 0
    for _, ended in tables.play(world, seed=seed):
        steps += 1
        if ended:
            lengths.append(steps)
            steps = 0
        if len(lengths) == episodes:
            break
    return lengths


def maze(runs: int) -> None:
    """Mean steps of episodes 1, 2, 3 and of the last ten of fifty."""
    print("| planning steps | episode 1 | episode 2 | episode 3 | last 10 of 50 |\n|---|---|---|---|---|")
    for label, options in {
        "0": {"planning_steps": 0},
        "5": {"planning_steps": 5},
        "50": {"planning_steps": 50},
        "5, prioritised": {"planning_steps": 5, "planning": "prioritised"},
    }.items():
        config = DynaConfig(discount=0.95, learning_rate=0.1, exploration=0.1, **options)
        found = np.array([episode_lengths(config, episodes=50, seed=seed) for seed in range(runs)])
        first = " | ".join(
            f"{found[:, place].mean():.1f} ± {found[:, place].std(ddof=1) / runs**0.5:.1f}" for place in range(3)
        )
        last = found[:, -10:].mean(1)
        print(f"| {label} | {first} | {last.mean():.2f} ± {last.std(ddof=1) / runs**0.5:.2f} |", flush=True)


def rewards_over_time(
    config: DynaConfig, grids: tuple[Grid, Grid], *, change_at: int, steps: int, seed: int
) -> list[float]:
    """Reward so far after every step, in a maze that changes after `change_at` steps."""
    world = GridWorld(grids[0], later=[(change_at, grids[1])])
    tables = DynaTables(config, int(world.observation_space.n), 4, seed=seed)
    rewards = (reward for reward, _ in itertools.islice(tables.play(world, seed=seed), steps))
    return list(itertools.accumulate(rewards))


CHANGING = {
    "blocking": {
        "grids": blocking_maze,
        "change_at": 1000,
        "steps": 3000,
        "bonus": 1e-4,
        "planning_steps": 10,
        "found": 40,
    },
    "shortcut": {
        "grids": shortcut_maze,
        "change_at": 3000,
        "steps": 6000,
        "bonus": 1e-3,
        "planning_steps": 50,
        "found": 70,
    },
}
"""Examples 8.2 and 8.3. The book does not say κ, n and α; these are those of the replication that most people read
(ShangtongZhang/reinforcement-learning-an-introduction): α = 1. `found`: rewards in the last 1000 steps above which the
new way was found; 16 steps one way, 10 the other, so that at most 62 and 100 are there to be had."""


def changing(runs: int) -> None:
    """Reward gathered before the change and after it, and in the last thousand steps, by Dyna-Q and Dyna-Q+."""
    print("| maze | agent | before the change | after it | last 1000 steps | runs that found the new way |")
    print("|---|---|---|---|---|---|")
    for name, setting in CHANGING.items():
        for label, bonus in (("Dyna-Q", 0.0), ("Dyna-Q+", setting["bonus"])):
            config = DynaConfig(learning_rate=1.0, planning_steps=setting["planning_steps"], bonus=bonus)
            options = {key: setting[key] for key in ("change_at", "steps")}
            found = np.array(
                [rewards_over_time(config, setting["grids"](), **options, seed=seed) for seed in range(runs)]
            )
            at = setting["change_at"] - 1
            last = found[:, -1] - found[:, -1001]
            cells = [found[:, at].mean(), (found[:, -1] - found[:, at]).mean(), last.mean()]
            quick = f"{(last > setting['found']).sum()} of {runs}"
            shown = " | ".join(f"{value:.1f}" for value in cells)
            print(f"| {name} | {label} | {shown} | {quick} |", flush=True)


def share_of_the_way(
    imagined: int, *, rate: float, seed: int, most: int, shuffled: bool = False, batch: int = 8
) -> tuple[list[float], float]:
    """`(J - J_ref) / (J* - J_ref)` after every batch of real dialogues, exactly; and the processor time.

    It ends when three batches in a row were at 95 % or more, or `most` real dialogues were used.
    """
    mdp, begun = DialogueMDP(seed=seed), time.process_time()
    policy = mdp.policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    algorithm = build_algorithm(AlgorithmConfig(name="rloo", kl_coefficient=mdp.coefficient), policy, optimizer)
    user = RecurrentUser(mdp.num_words, mdp.num_replies, seed=seed)
    dyna = DialogueDyna(mdp, policy, algorithm, user, imagined=imagined, seed=seed, shuffled=shuffled)
    generator, group = torch.Generator().manual_seed(seed), torch.zeros(batch, dtype=torch.int64)
    best, start = mdp.optimal_solution().values[0], mdp.objective(mdp.reference_logprobs)
    found: list[float] = []
    while dyna.num_real < most and not (len(found) >= 3 and min(found[-3:]) >= 0.95):
        dyna.update(mdp.sample(policy, batch, generator=generator).with_fields(group_ids=group))
        found.append(float((mdp.objective(policy.logprobs().detach()) - start) / (best - start)))
    return found, time.process_time() - begun


DIALOGUE: dict[str, dict[str, object]] = {
    "n = 0, rate .05": {"imagined": 0, "rate": 0.05, "most": 2400},
    "n = 0, rate .1": {"imagined": 0, "rate": 0.1, "most": 2400},
    "n = 0, rate .2": {"imagined": 0, "rate": 0.2, "most": 2400},
    "n = 5, rate .05": {"imagined": 5, "rate": 0.05, "most": 800},
    "n = 20, rate .05": {"imagined": 20, "rate": 0.05, "most": 400},
    "n = 20, rate .05, wrong user": {"imagined": 20, "rate": 0.05, "most": 400, "shuffled": True},
}
"""The optimizer's rate is that of Adam; without imagination a higher one is the fair alternative."""


def dialogue(seeds: int) -> None:
    """Real dialogues until 95 % of the way from the reference to the optimum, on as many users as seeds."""
    print("| arm | real dialogues until 95 %, by seed | median | at the end, where it was not reached | CPU seconds |")
    print("|---|---|---|---|---|")
    for label, options in DIALOGUE.items():
        needed, ends, seconds = [], [], 0.0
        for seed in range(seeds):
            found, taken = share_of_the_way(seed=seed, **options)  # type: ignore[arg-type]
            reached = len(found) >= 3 and min(found[-3:]) >= 0.95
            needed.append(8.0 * len(found) if reached else math.inf)
            ends += [] if reached else [f"{np.mean(found[-5:]):.2f}"]
            seconds += taken
        shown = ", ".join("never" if value == math.inf else f"{value:.0f}" for value in needed)
        median = float(np.median(needed))
        middle = f"more than {options['most']}" if median == math.inf else f"{median:.0f}"
        print(f"| {label} | {shown} | {middle} | {', '.join(ends)} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["maze", "changing", "dialogue"])
    parser.add_argument("--runs", type=int, help="30 of the mazes; 5 users of the dialogue")
    arguments = parser.parse_args()
    part, runs = {"maze": (maze, 30), "changing": (changing, 30), "dialogue": (dialogue, 5)}[arguments.part]
    part(arguments.runs or runs)


if __name__ == "__main__":
    main()
