"""Plaudit's DQN and Stable-Baselines3's, whole runs from the same draws: are they the same algorithm?

python studies/dqn_coupled.py
python studies/dqn_coupled.py --total 4096 --limit 60

Seeds compare what two sides earn by chance; this compares what they do. Both begin with the same weights in the same
environment, and what a run draws (whether to explore, which action then, which steps to replay) is drawn beforehand and
handed to both. All else is each side's own code: schedules, memory, time limits, copies of the target, steps of the
optimizer. Printed are the first step at which they acted otherwise or an episode ended for one side alone, if there is
one, and how far their weights are apart at the end.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from control_peer import TOTAL, peer_script, zoo_dqn

BATCH, ROUND, UPDATES = 64, 256, 128
ENVIRONMENT = "CartPole-v1"


class Draws:
    """All that a run draws, from a seed: `explore`, `actions` by environment step, `places` by optimizer step."""

    def __init__(self, total: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        steps = -(-total // ROUND) * ROUND
        self.explore = generator.random(steps)
        self.actions = generator.integers(2, size=steps)
        self.places = generator.random((steps // ROUND * UPDATES, BATCH))


def theirs(path: Path, total: int, limit: int, seed: int) -> None:
    """The peer's run, with what it did written to `path`; to be called by an interpreter that has it."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    draws = Draws(total, seed)
    environments = make_vec_env(ENVIRONMENT, n_envs=1, seed=seed, env_kwargs={"max_episode_steps": limit})
    model = zoo_dqn(environments, seed)
    taken: dict[str, list[Any]] = {"actions": [], "ended": [], "epsilon": []}
    weights = [flat(model.q_net)]
    updates = iter(draws.places)

    class Record(BaseCallback):
        def _on_step(self) -> bool:
            taken["actions"].append(int(self.locals["actions"][0]))
            taken["ended"].append(bool(self.locals["dones"][0]))
            taken["epsilon"].append(model.exploration_rate)
            return True

        def _on_rollout_start(self) -> None:
            weights.append(flat(model.q_net))

    def integers(low: int, high: int, size: Any) -> np.ndarray:
        # The first call of a batch asks for steps, the second for environments, of which there is one.
        return np.zeros(size, dtype=np.int64) if high == 1 else (next(updates) * high).astype(np.int64)

    def action() -> np.int64:
        # `num_timesteps` counts the steps that are done: it is the number of the one to come.
        return np.int64(draws.actions[model.num_timesteps])

    def chance() -> float:
        return float(draws.explore[model.num_timesteps])

    with (
        mock.patch.object(model.action_space, "sample", action),
        mock.patch("numpy.random.rand", chance),
        mock.patch("numpy.random.randint", integers),
    ):
        model.learn(total_timesteps=total, callback=Record())
    weights.append(flat(model.q_net))
    tensors = {name: torch.from_numpy(np.array(each)) for name, each in taken.items()}
    torch.save({"weights": torch.stack(weights)} | tensors, path)


def ours(begin: torch.Tensor, total: int, limit: int, seed: int) -> dict[str, torch.Tensor]:
    """Plaudit's run from the weights `begin`, and what it did."""
    from plaudit.algorithms.agents import build_agent, task_sizes
    from plaudit.configs.q_learning import QLearningConfig
    from plaudit.rollout.environments import Collector, make_environments
    from plaudit.rollout.trajectory import Sampled

    draws = Draws(total, seed)
    environments = make_environments(ENVIRONMENT, 1, max_episode_steps=limit)
    agent: Any = build_agent(QLearningConfig(name="dqn"), task_sizes(environments), total_steps=total, seed=seed)
    # A copy: the parameters become views of it.
    torch.nn.utils.vector_to_parameters(begin.clone(), agent.network.parameters())
    agent.target.load_state_dict(agent.network.state_dict())
    updates, epsilons, policy, replay = iter(draws.places), [], agent.policy, agent.replay

    @torch.no_grad()
    def sample(observations: torch.Tensor, *, generator: object = None) -> Sampled:
        values = policy.action_values(observations)
        explores = policy.steps < policy.random_steps or draws.explore[policy.steps] < policy.amount
        action = torch.tensor([int(draws.actions[policy.steps])]) if explores else values.argmax(-1)
        logprobs = policy.logprobs(values)
        # The draw stands in for one from this distribution: uniform at first, ε-greedy then.
        chance = 1.0 if policy.steps < policy.random_steps else policy.amount
        torch.testing.assert_close(float(logprobs.exp().min()), chance / 2, rtol=1e-6, atol=1e-7)
        epsilons.append(policy.amount)
        policy.steps += 1
        return Sampled(action, logprobs.gather(1, action[:, None])[:, 0], values.amax(-1))

    def replayed(count: int, *, discount: float, **_: Any) -> Any:
        places = torch.from_numpy((next(updates) * replay.size).astype(np.int64))
        return replay._batch(places, torch.ones(count), discount, 1)

    policy.sample, replay.sample = sample, replayed
    collector, weights, rows = Collector(environments, seed=seed), [flat(agent.network)], []
    while collector.num_steps_taken < total:
        weights.append(flat(agent.network))
        rows.append(collector.collect(policy, agent.num_steps))
        agent.update(rows[-1])
    weights.append(flat(agent.network))
    environments.close()
    return {
        "weights": torch.stack(weights),
        "actions": torch.cat([row.actions[0] for row in rows]),
        "ended": torch.cat([(row.continues[0] == 0) | row.truncated[0] for row in rows]),
        "truncated": torch.cat([row.truncated[0] for row in rows]),
        "epsilon": torch.tensor(epsilons, dtype=torch.float64),
    }


def flat(network: torch.nn.Module) -> torch.Tensor:
    """A copy of all weights in one row."""
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone()


def report(mine: dict[str, torch.Tensor], its: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Where the two runs part, if they do."""
    differ = torch.nonzero((mine["actions"] != its["actions"]) | (mine["ended"] != its["ended"])).flatten()
    apart = (mine["weights"] - its["weights"]).abs().amax(1)
    rounds = torch.nonzero(apart).flatten()
    return {
        "steps": len(mine["actions"]),
        "episodes": int(mine["ended"].sum()),
        "of_them_cut_by_the_time_limit": int(mine["truncated"].sum()),
        "optimizer_steps": (int((mine["weights"].diff(dim=0).abs().amax(1) > 0).sum())) * UPDATES,
        "first_step_that_differs": int(differ[0]) if len(differ) else None,
        # The peer sets its ε after the first step, which is random anyway.
        "epsilon_apart": float((mine["epsilon"] - its["epsilon"])[1:].abs().max()),
        "first_round_with_other_weights": int(rounds[0]) if len(rounds) else None,
        "weights_apart_at_the_end": float(apart[-1]),
        "weights_moved": float((its["weights"][-1] - its["weights"][0]).abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total", type=int, default=TOTAL["dqn"], help="environment steps")
    parser.add_argument("--limit", type=int, default=500, help="steps after which an episode is cut off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--theirs", type=Path, help="run the peer's side alone and write it here")
    chosen = parser.parse_args()
    if chosen.theirs is not None:
        theirs(chosen.theirs, chosen.total, chosen.limit, chosen.seed)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "theirs.pt"
        options = [f"--{name}={getattr(chosen, name)}" for name in ("total", "limit", "seed")]
        peer_script(*options, f"--theirs={path}", script=Path(__file__))
        its = torch.load(path, weights_only=True)
    print(json.dumps(report(ours(its["weights"][0], chosen.total, chosen.limit, chosen.seed), its)))


if __name__ == "__main__":
    sys.exit(main())
