"""CartPole-v1 by Plaudit and by Stable-Baselines3, with the settings that the peer's zoo publishes, seed by seed.

python studies/control_peer.py run dqn --side ours --seeds 0 1 2
python studies/control_peer.py run dqn --side theirs --seeds 0 1 2
python studies/control_peer.py table
python studies/control_peer.py update

`run` adds to `docs/studies/control-peer.jsonl`; a seed that is there is not run again. `table` prints, for each
algorithm and side, the interquartile mean over seeds of the mean return of 100 greedy episodes, with a bootstrap
interval. `update` lets both sides' DQN take the same optimizer steps from the same weights and batches, and prints how
far apart their weights end. Where this interpreter has no `stable_baselines3`, the peer runs in an environment of its
own, which is made when it is first needed.

A row of `run` holds, beside the greedy returns, `curve`: the mean return of the episodes that ended in each tenth of
training, exploration and all. Many episodes under many weights stand behind each of its numbers, only the last weights
behind the greedy ones.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "studies" / "control-peer.jsonl"
EPISODES = 100
STEPS_OF_A_ROUND = 128
TOTAL = {"ppo": 100_000, "a2c": 500_000, "dqn": 50_000}
ALGORITHMS = tuple(TOTAL)


class Curve:
    """Returns of the episodes of training by when they ended, in tenths of the run."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.tenths: list[list[float]] = [[] for _ in range(10)]

    def add(self, step: int, value: float) -> None:
        """An episode that ended after `step` environment steps."""
        self.tenths[min(9, 10 * (step - 1) // self.total)].append(value)

    def means(self) -> list[float | None]:
        """The mean of each tenth; None where no episode ended."""
        return [round(sum(each) / len(each), 1) if each else None for each in self.tenths]


def ours(name: str, seed: int) -> tuple[list[float], Curve]:
    """Train Plaudit's agent; what its greedy policy earns in each episode, and what training earned."""
    from plaudit.algorithms.agents import build_agent, task_sizes
    from plaudit.configs.policy_gradient import PolicyGradientConfig
    from plaudit.configs.q_learning import QLearningConfig
    from plaudit.rollout.environments import Collector, evaluate_policy, make_environments

    configs: dict[str, Any] = {
        "ppo": PolicyGradientConfig(name="ppo", discount=0.98),
        "a2c": PolicyGradientConfig(name="a2c", discount=0.99),
        "dqn": QLearningConfig(name="dqn"),
    }
    trial = make_environments("CartPole-v1", 1)
    agent = build_agent(configs[name], task_sizes(trial), total_steps=TOTAL[name], seed=seed)
    collector = Collector(make_environments("CartPole-v1", agent.num_environments), seed=1000 * seed)
    curve, counted = Curve(TOTAL[name]), 0
    while collector.num_steps_taken < TOTAL[name]:
        agent.update(collector.collect(agent.policy, agent.num_steps))
        for value in collector.episode_returns[counted:]:
            curve.add(collector.num_steps_taken, value)
        counted = len(collector.episode_returns)
    found = evaluate_policy("CartPole-v1", agent.greedy_policy(), num_episodes=EPISODES, seed=12345 + seed)
    return found, curve


def zoo_dqn(environments: Any, seed: int) -> Any:
    """The peer's DQN with the settings of its zoo."""
    from stable_baselines3 import DQN

    return DQN(
        "MlpPolicy", environments, seed=seed, device="cpu", learning_rate=2.3e-3, batch_size=64,
        buffer_size=100_000, learning_starts=1000, gamma=0.99, target_update_interval=10, train_freq=256,
        gradient_steps=128, exploration_fraction=0.16, exploration_final_eps=0.04,
        policy_kwargs={"net_arch": [256, 256]},
    )  # fmt: skip


def theirs(name: str, seed: int) -> tuple[list[float], Curve]:
    """The same by Stable-Baselines3; to be called by an interpreter that has it."""
    import torch
    from stable_baselines3 import A2C, PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    torch.set_num_threads(1)
    environments = make_vec_env("CartPole-v1", n_envs=1 if name == "dqn" else 8, seed=1000 * seed)
    if name == "ppo":
        model: Any = PPO(
            "MlpPolicy", environments, seed=seed, device="cpu", n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98,
            n_epochs=20, ent_coef=0.0, learning_rate=lambda left: 1e-3 * left, clip_range=lambda left: 0.2 * left,
        )  # fmt: skip
    elif name == "a2c":
        model = A2C("MlpPolicy", environments, seed=seed, device="cpu", ent_coef=0.0)
    else:
        model = zoo_dqn(environments, seed)
    curve = Curve(TOTAL[name])

    class Record(BaseCallback):
        def _on_step(self) -> bool:
            for info in self.locals["infos"]:
                if "episode" in info:
                    curve.add(self.num_timesteps, float(info["episode"]["r"]))
            return True

    model.learn(total_timesteps=TOTAL[name], callback=Record())
    judging = make_vec_env("CartPole-v1", n_envs=8, seed=12345 + seed)
    returns, _ = evaluate_policy(
        model, judging, n_eval_episodes=EPISODES, deterministic=True, return_episode_rewards=True
    )
    return [float(value) for value in returns], curve


SIDES: dict[str, Callable[[str, int], tuple[list[float], Curve]]] = {"ours": ours, "theirs": theirs}


def run(name: str, side: str, seed: int) -> dict[str, Any]:
    """One seed of one side as a row of the results."""
    begun = time.process_time()
    returns, curve = SIDES[side](name, seed)
    mean = sum(returns) / len(returns)
    deviation = (sum((value - mean) ** 2 for value in returns) / len(returns)) ** 0.5
    seconds = round(time.process_time() - begun)
    found = {"algorithm": name, "side": side, "seed": seed, "mean": mean, "deviation": round(deviation, 1)}
    return found | {"cpu_seconds": seconds, "cores": os.cpu_count(), "curve": curve.means()}


def interquartile_mean(values: Any) -> Any:
    """Mean over the last axis `[..., n]` of what is left without the lowest and the highest quarter."""
    import numpy as np

    ordered = np.sort(np.asarray(values, dtype=float), -1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def bootstrap_interval(values: Sequence[float], *, draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the interquartile mean, from seeds drawn with replacement."""
    import numpy as np

    drawn = np.random.default_rng(0).choice(np.asarray(values), (draws, len(values)))
    low, high = np.quantile(interquartile_mean(drawn), [0.025, 0.975])
    return float(low), float(high)


def rows() -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table() -> str:
    """The results as a Markdown table."""
    lines = [
        "| algorithm | side | seeds | mean return of each | interquartile mean | 95 % interval | CPU seconds a seed |",
        "|---|---|---|---|---|---|---|",
    ]
    found = rows()
    for name in ALGORITHMS:
        for side, title in (("ours", "Plaudit"), ("theirs", "Stable-Baselines3")):
            chosen = sorted(
                (row for row in found if (row["algorithm"], row["side"]) == (name, side)), key=lambda r: r["seed"]
            )
            if not chosen:
                continue
            means = [row["mean"] for row in chosen]
            low, high = bootstrap_interval(means)
            seconds = sorted(row["cpu_seconds"] for row in chosen)[len(chosen) // 2]
            each = ", ".join(f"{mean:.1f}" for mean in means)
            lines.append(
                f"| {name} | {title} | {len(means)} | {each} | {float(interquartile_mean(means)):.1f} | "
                f"{low:.1f} to {high:.1f} | {seconds} |"
            )
    return "\n".join(lines)


def peer_python() -> Path:
    """An interpreter that has Stable-Baselines3: this one, or that of an environment made for it."""
    if find_spec("stable_baselines3") is not None:
        return Path(sys.executable)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from peers import stable_baselines_python

    return stable_baselines_python()


def peer_script(*arguments: str, script: Path = Path(__file__)) -> str:
    """A script's output when an interpreter runs it that has the peer."""
    call = [str(peer_python()), str(script.resolve()), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(call, check=True, capture_output=True, text=True, env=environment).stdout


def peer_call(name: str, seed: int) -> dict[str, Any]:
    """One seed of the peer, by an interpreter that has it."""
    found: dict[str, Any] = json.loads(peer_script("one", name, "--seeds", str(seed)).splitlines()[-1])
    return found


def their_update(path: Path) -> None:
    """Two rounds of the peer's DQN on random transitions, with all that went in and came out written to `path`."""
    import numpy as np
    import torch
    from stable_baselines3 import DQN
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    model: Any = DQN(
        "MlpPolicy", "CartPole-v1", seed=0, device="cpu", learning_rate=2.3e-3, batch_size=64, gamma=0.99,
        target_update_interval=10, policy_kwargs={"net_arch": [256, 256]},
    )  # fmt: skip
    model.set_logger(configure(None, []))
    generator = np.random.default_rng(0)
    shape = (2 * STEPS_OF_A_ROUND, 64)
    ended = generator.random(shape) < 0.1
    batches = {
        # Large, so that both sides of the Huber loss and the limit of the gradient are met.
        "observations": (40 * generator.normal(size=(*shape, 4))).astype(np.float32),
        "actions": generator.integers(2, size=shape),
        "rewards": (5 * generator.normal(size=shape)).astype(np.float32),
        "ended": ended,
        # A time limit is no end: the peer's memory clears `dones` there.
        "truncated": ended & (generator.random(shape) < 0.5),
        "next_observations": generator.normal(size=(*shape, 4)).astype(np.float32),
    }
    tensors = {name: torch.as_tensor(array) for name, array in batches.items()}
    place = iter(range(shape[0]))

    def sample(*_: Any, **__: Any) -> Any:
        now = next(place)
        here = {name: tensor[now] for name, tensor in tensors.items()}
        dones = (here["ended"] & ~here["truncated"]).float()
        return ReplayBufferSamples(
            here["observations"], here["actions"][:, None], here["next_observations"], dones[:, None],
            here["rewards"][:, None],
        )  # fmt: skip

    model.replay_buffer.sample = sample
    before = [value.detach().clone() for value in model.q_net.parameters()]
    after = []
    for _ in range(2):
        for _ in range(model.target_update_interval):
            model._on_step()
        model.train(STEPS_OF_A_ROUND, 64)
        after.append([value.detach().clone() for value in model.q_net.parameters()])
    torch.save({"before": before, "after": after} | tensors, path)


def compare_update(path: Path) -> str:
    """The same steps by Plaudit's DQN; how far its weights are from the peer's after each round."""
    import torch

    from plaudit.algorithms.base import TaskSizes
    from plaudit.algorithms.dqn import DQN
    from plaudit.configs.q_learning import QLearningConfig
    from plaudit.rollout.replay import ReplayBatch

    given = torch.load(path, weights_only=True)
    config = QLearningConfig(gradient_steps=STEPS_OF_A_ROUND, learning_starts=0)
    agent = DQN(config, TaskSizes(4, 2), total_steps=TOTAL["dqn"], seed=1)
    for mine, its in zip(agent.network.parameters(), given["before"], strict=True):
        mine.data.copy_(its)
    place = iter(range(len(given["actions"])))

    def sample(count: int, **_: Any) -> ReplayBatch:
        here = next(place)
        parts = {name: given[name][here] for name in ("observations", "actions", "next_observations")}
        ends = given["ended"][here] & ~given["truncated"][here]
        return ReplayBatch(
            **parts,
            returns=given["rewards"][here],
            discounts=0.99 * (~ends).float(),
            places=torch.arange(count),
            weights=torch.ones(count),
        )

    agent.replay.sample = sample  # type: ignore[method-assign, assignment]
    lines = []
    for number, after in enumerate(given["after"], 1):
        agent.target.load_state_dict(agent.network.state_dict())
        norms = [agent._step()["gradient_norm"] for _ in range(STEPS_OF_A_ROUND)]
        apart = max(
            float((mine - its).abs().max())
            for mine, its in zip(agent.network.state_dict().values(), after, strict=True)
        )
        moved = max(float((a - b).abs().max()) for a, b in zip(after, given["before"], strict=True))
        lines.append(
            f"round {number}: {STEPS_OF_A_ROUND} steps moved the weights by up to {moved:.4f}; the two sides are apart "
            f"by up to {apart:.1e}; norm of the gradient {min(norms):.2f} to {max(norms):.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("run", "one", "table", "update", "their-update"))
    parser.add_argument("algorithm", choices=ALGORITHMS, nargs="?", default="dqn")
    parser.add_argument("--side", choices=sorted(SIDES), default="ours")
    parser.add_argument("--file", help="of their-update")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    if arguments.task == "table":
        print(table())
        return
    if arguments.task == "their-update":
        their_update(Path(arguments.file))
        return
    if arguments.task == "update":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "update.pt"
            peer_script("their-update", "--file", str(path))
            print(compare_update(path))
        return
    if arguments.task == "one":
        print(json.dumps(run(arguments.algorithm, "theirs", arguments.seeds[0])))
        return
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        if any(
            (row["algorithm"], row["side"], row["seed"]) == (arguments.algorithm, arguments.side, seed)
            for row in rows()
        ):
            continue
        found = (
            run(arguments.algorithm, "ours", seed) if arguments.side == "ours" else peer_call(arguments.algorithm, seed)
        )
        with RESULTS.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
