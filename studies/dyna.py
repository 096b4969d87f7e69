"""Dyna: the mazes of Sutton and Barto with tables, and the dialogue problem with a learned user.

python studies/dyna.py maze
python studies/dyna.py changing
"""

import argparse

import numpy as np

from plaudit.algorithms.dyna import DynaTables
from plaudit.configs.dyna import DynaConfig
from plaudit.rollout.gridworlds import Grid, GridWorld, blocking_maze, dyna_maze, shortcut_maze


def episode_lengths(config: DynaConfig, *, episodes: int, seed: int) -> list[int]:
    """Steps of each episode in the maze of example 8.1."""
    world = GridWorld(dyna_maze())
    tables = DynaTables(config, int(world.observation_space.n), 4, seed=seed)
    lengths = []
    for episode in range(episodes):
        state, steps, ended = int(world.reset(seed=seed if episode == 0 else None)[0]), 0, False
        while not ended:
            action = tables.act(state)
            observation, reward, ended, _, _ = world.step(np.int64(action))
            tables.learn(state, action, reward, int(observation), float(not ended))
            state, steps = int(observation), steps + 1
        lengths.append(steps)
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
    state, total, found = int(world.reset(seed=seed)[0]), 0.0, []
    for _ in range(steps):
        action = tables.act(state)
        observation, reward, ended, _, _ = world.step(np.int64(action))
        tables.learn(state, action, reward, int(observation), float(not ended))
        total += reward
        state = int(world.reset()[0]) if ended else int(observation)
        found.append(total)
    return found


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["maze", "changing"])
    parser.add_argument("--runs", type=int, default=30)
    arguments = parser.parse_args()
    {"maze": maze, "changing": changing}[arguments.part](arguments.runs)


if __name__ == "__main__":
    main()
