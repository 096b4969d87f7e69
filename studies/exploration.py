"""A corridor that chance does not cross: how often an agent gets to its end with each bonus, and with none.

python studies/exploration.py --seeds 0 1 2 3 4

Right leads on, left back to the start, only the last of 20 cells pays: one try in 2^20 gets there by chance, and 8192
steps of PPO (3000 of Double DQN, whose corridor has 10 cells) are about 400 tries.
"""

import argparse
import time
from functools import partial

from plaudit.algorithms.agents import build_agent
from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.curious import CuriousAgent, build_bonus
from plaudit.configs.bonus import BonusConfig, CountBonusConfig, DistillationBonusConfig
from plaudit.configs.policy_gradient import PolicyGradientConfig
from plaudit.configs.q_learning import QLearningConfig
from plaudit.rollout.corridor import ReturningCorridor
from plaudit.rollout.environments import Collector, evaluate_policy, make_environments

BONUSES: dict[str, BonusConfig | None] = {
    "nothing": None,
    "counts": CountBonusConfig(scale=0.1),
    "random network distillation": DistillationBonusConfig(scale=0.1),
}
AGENTS: dict[str, tuple[PolicyGradientConfig | QLearningConfig, int, int]] = {
    "PPO": (PolicyGradientConfig(name="ppo", hidden=(32,), learning_rate=5e-3, epochs=4, discount=0.95), 20, 8192),
    "Double DQN": (
        QLearningConfig(
            name="double_dqn",
            learning_starts=64,
            rollout_steps=32,
            gradient_steps=8,
            batch_size=64,
            hidden=(32,),
            learning_rate=3e-3,
            discount=0.95,
            exploration_start=0.1,
            exploration_end=0.1,
            target_every=200,
        ),
        10,
        3000,
    ),
}
"""Options, cells of the corridor, and steps."""


def crossings(
    config: PolicyGradientConfig | QLearningConfig, bonus: BonusConfig | None, *, length: int, steps: int, seed: int
) -> tuple[int, bool]:
    """How often the end was reached while learning, and whether the greedy policy goes there afterwards."""
    sizes, make = TaskSizes(length + 1, 2), partial(ReturningCorridor, length)
    agent = build_agent(config, sizes, total_steps=steps, seed=seed)
    if bonus is not None:
        agent = CuriousAgent(agent, build_bonus(bonus, sizes, seed=seed))
    collector = Collector(make_environments(make, agent.num_environments), seed=seed)
    while collector.num_steps_taken < steps:
        agent.update(collector.collect(agent.policy, agent.num_steps))
    collector.environments.close()
    (found,) = evaluate_policy(make, agent.greedy_policy(), num_episodes=1, num_environments=1)
    return round(sum(collector.episode_returns)), found == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", nargs="+", default=list(AGENTS), choices=list(AGENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    print("| agent | bonus | times at the end, by seed | the greedy policy goes there | CPU seconds a run |")
    print("|---|---|---|---|---|")
    for agent in arguments.agents:
        config, length, steps = AGENTS[agent]
        for label, bonus in BONUSES.items():
            begun = time.process_time()
            found = [crossings(config, bonus, length=length, steps=steps, seed=seed) for seed in arguments.seeds]
            each = (time.process_time() - begun) / len(found)
            times = ", ".join(str(count) for count, _ in found)
            print(f"| {agent} | {label} | {times} | {sum(good for _, good in found)} of {len(found)} | {each:.1f} |")


if __name__ == "__main__":
    main()
