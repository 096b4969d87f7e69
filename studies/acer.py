"""ACER: CartPole-v1 beside the published figure, and strings needed on `TokenMDP` beside PPO.

python studies/acer.py cartpole --seeds 0 1 2 --output acer-cartpole.jsonl
python studies/acer.py strings --seeds 0 1 2 3 4
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from plaudit.algorithms.acer_agent import AcerAgent
from plaudit.algorithms.base import TaskSizes
from plaudit.configs.acer import AcerConfig
from plaudit.rollout.environments import Collector, evaluate_policy, make_environments

ENVIRONMENT = "CartPole-v1"


def cartpole(seed: int, total: int, episodes: int) -> dict[str, Any]:
    """One agent with the published settings: its greedy returns, and those of its last 100 episodes of learning."""
    begun = time.process_time()
    config = AcerConfig()
    agent = AcerAgent(config, TaskSizes(4, 2), total_steps=total, seed=seed)
    environments = make_environments(ENVIRONMENT, config.num_environments, disable_env_checker=True)
    collector = Collector(environments, seed=1000 * seed)
    while collector.num_steps_taken < total:
        agent.update(collector.collect(agent.policy, agent.num_steps))
    environments.close()
    spent = time.process_time() - begun
    found = {"seed": seed, "steps": collector.num_steps_taken, "cpu_seconds": round(spent)}
    for name, policy in (("greedy", agent.greedy_policy()), ("sampled", agent.policy)):
        returns = evaluate_policy(ENVIRONMENT, policy, num_episodes=episodes, seed=12345 + seed)
        found |= {name: sum(returns) / len(returns), f"{name}_deviation": round(torch.tensor(returns).std().item(), 1)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cartpole"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--total", type=int, default=500_000, help="environment steps")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument(
        "--output", type=Path, help="lines are added to this file; seeds that it holds are not run again"
    )
    arguments = parser.parse_args()
    lines = arguments.output.read_text().splitlines() if arguments.output and arguments.output.exists() else []
    done = {json.loads(line)["seed"] for line in lines}
    for seed in arguments.seeds:
        if seed in done:
            continue
        line = json.dumps(cartpole(seed, arguments.total, arguments.episodes))
        print(line, flush=True)
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
