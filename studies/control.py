"""CartPole-v1 by PPO and A2C with the settings that Stable-Baselines3's zoo publishes: returns of each seed.

python studies/control.py ppo --seeds 0 1 2
python studies/control.py a2c --seeds 0 1
"""

import argparse
import json
import time

import torch

from plaudit.algorithms.build import build_algorithm
from plaudit.algorithms.control import learn
from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.models.control import ActorCriticNetwork
from plaudit.rollout.control import ControlPolicy
from plaudit.rollout.environments import Collector, evaluate_policy, make_environments

ENVIRONMENTS = 8
SETTINGS = {
    "ppo": {
        "config": {"name": "ppo", "discount": 0.98, "gae_lambda": 0.8, "epochs": 20, "clip_schedule": "linear"},
        "steps": 32,
        "total": 100_000,
        "schedule": "linear",
    },
    "a2c": {
        "config": {"name": "a2c", "discount": 0.99, "gae_lambda": 1.0},
        "steps": 5,
        "total": 500_000,
        "schedule": "constant",
    },
}


def train(name: str, seed: int, *, total: int | None = None) -> ControlPolicy:
    """One agent; `total` environment steps, those of the published settings where None."""
    chosen = SETTINGS[name]
    policy = ControlPolicy(ActorCriticNetwork(4, 2, seed=seed))
    updates = (total or chosen["total"]) // (ENVIRONMENTS * chosen["steps"])
    if name == "ppo":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, eps=1e-5)
    else:
        optimizer = torch.optim.RMSprop(policy.parameters(), lr=7e-4, alpha=0.99, eps=1e-5)
    config = AlgorithmConfig(**chosen["config"], value_coefficient=0.5, kl_placement="none")
    algorithm = build_algorithm(config, policy, optimizer, max_gradient_norm=0.5, total_updates=updates)
    collector = Collector(make_environments("CartPole-v1", ENVIRONMENTS), seed=1000 * seed)
    learn(
        algorithm,
        policy,
        optimizer,
        collector,
        num_steps=chosen["steps"],
        num_updates=updates,
        schedule=chosen["schedule"],
        generator=torch.Generator().manual_seed(seed),
    )
    collector.environments.close()
    return policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", choices=sorted(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--total", type=int, help="environment steps, instead of the published number")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        begun = time.process_time()
        policy = train(arguments.algorithm, seed, total=arguments.total)
        greedy = ControlPolicy(policy.network, greedy=True)
        returns = evaluate_policy("CartPole-v1", greedy, num_episodes=arguments.episodes, seed=12345 + seed)
        spread = torch.tensor(returns).std().item()
        line = {"seed": seed, "mean": sum(returns) / len(returns), "deviation": round(spread, 1)}
        print(json.dumps(line | {"cpu_seconds": round(time.process_time() - begun)}), flush=True)


if __name__ == "__main__":
    main()
