"""World models: CartPole in the dream, and the hidden mood of a dialogue's user, with their controls.

python studies/world_model.py cartpole --seeds 0 1 2 3 4 5 6 7 8 9
python studies/world_model.py cartpole --seeds 0 1 2 --embedded
python studies/world_model.py table
python studies/world_model.py dialogue --seeds 0 1 2 3 4
python studies/world_model.py hills --seeds 0 2 4
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from control_peer import bootstrap_interval, interquartile_mean

from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.deep_dyna import user_loss
from plaudit.algorithms.world_controllers import evolve_controller
from plaudit.algorithms.world_dialogue import evolve_speaker, fit_latent_user, matched_moves
from plaudit.algorithms.world_model import WorldModel
from plaudit.configs.world_model import WorldModelConfig
from plaudit.models.user import LatentUser
from plaudit.models.world import RecurrentDynamics
from plaudit.rollout.dialogue import DialogueMDP
from plaudit.rollout.environments import Collector, MakeEnvironment, evaluate_policy, make_environments
from plaudit.rollout.imagination import LinearController, World, WorldPolicy
from plaudit.rollout.imagined_dialogue import imagined_dialogue, turns_of, user_tables
from plaudit.rollout.trajectory import StepPolicy

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "studies" / "world-model-cartpole.jsonl"
EMBEDDED = {"encoder": "variational", "code_size": 6, "observation_noise": 0.02}


class Embedded(gymnasium.ObservationWrapper[np.ndarray, int, np.ndarray]):
    """CartPole seen through 24 sensors, `tanh(W s + b)` with `W, b` drawn once: no number of it is the state."""

    def __init__(self, environment: gymnasium.Env[np.ndarray, int]) -> None:
        super().__init__(environment)
        draws = np.random.default_rng(0)
        # In units of what play sees: position, speed, angle, angular speed.
        self.weights = draws.normal(0, 0.7, (24, 4)) / np.array([1.0, 1.0, 0.1, 1.0])
        self.shifts = draws.normal(0, 0.5, 24)
        self.observation_space = gymnasium.spaces.Box(-1, 1, (24,), np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """What the sensors say, `[24]`."""
        return np.asarray(np.tanh(self.weights @ observation + self.shifts), dtype=np.float32)


def embedded_cartpole() -> gymnasium.Env[np.ndarray, int]:
    """CartPole-v1 behind `Embedded`."""
    return Embedded(gymnasium.make("CartPole-v1"))


def judged(place: str | MakeEnvironment, policy: StepPolicy, *, episodes: int, seed: int) -> dict[str, float]:
    """Real returns of fresh episodes."""
    found = torch.tensor(evaluate_policy(place, policy, num_episodes=episodes, seed=12345 + seed), dtype=torch.float64)
    return {"mean": found.mean().item(), "deviation": found.std().item(), "least": found.min().item()}


def cartpole_seed(
    seed: int, *, real_steps: int, episodes: int, embedded: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """Real steps of mixed play, world and controller learned without another; then real episodes, and the controls."""
    begun = time.process_time()
    place: str | MakeEnvironment = embedded_cartpole if embedded else "CartPole-v1"
    config = WorldModelConfig.model_validate((EMBEDDED if embedded else {}) | options)
    agent = WorldModel(config, TaskSizes(24 if embedded else 4, 2), total_steps=real_steps, seed=seed)
    collector = Collector(make_environments(place, agent.num_environments), seed=1000 * seed)
    metrics: dict[str, float] = {}
    while agent.rounds_done < config.rounds:
        metrics = agent.update(collector.collect(agent.policy, agent.num_steps))
    collector.environments.close()
    row: dict[str, Any] = {"seed": seed, "embedded": embedded, "cpu_seconds": round(time.process_time() - begun)}
    # Mixed play is many short episodes and a few lucky long ones; nothing has been learned yet while it lasts.
    row |= {
        "mean_length_of_play": float(np.mean(collector.episode_lengths)),
        "episodes_of_play": len(collector.episode_lengths),
    }
    row |= metrics
    row["learned"] = judged(place, agent.greedy_policy(), episodes=episodes, seed=seed)
    # Control 1: the same evolution in a world that was never learned (with the same encoder and starts).
    blank = RecurrentDynamics(agent.world.dynamics.code_size, 2, hidden_size=config.hidden_size, seed=seed)
    controller, _ = evolve_controller(blank, agent.starts(), config, seed=seed)
    untrained = WorldPolicy(World(agent.world.encoder, blank), controller, agent.prepare)
    row["untrained_world"] = judged(place, untrained, episodes=episodes, seed=seed)
    # Control 2: random controllers on the learned world's features.
    generator, shape = torch.Generator().manual_seed(seed), (2, agent.world.dynamics.feature_size + 1)
    row["random_controllers"] = [
        judged(
            place,
            WorldPolicy(agent.world, LinearController(torch.randn(shape, generator=generator)), agent.prepare),
            episodes=20,
            seed=seed,
        )["mean"]
        for _ in range(3)
    ]
    return row


def cartpole(seeds: list[int], results: Path, **options: Any) -> None:
    """Adds the seeds that `results` does not have yet."""
    for seed in seeds:
        if not any((row["seed"], row["embedded"]) == (seed, options["embedded"]) for row in rows(results)):
            row = cartpole_seed(seed, **options)
            print(json.dumps(row), flush=True)
            with results.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")


def rows(results: Path) -> list[dict[str, Any]]:
    """The seeds so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(results: Path) -> None:
    """The seeds as a Markdown table, with the interquartile mean and its bootstrap interval."""
    print("| observations | controller | mean return of each seed | interquartile mean | 95 % interval |")
    print("|---|---|---|---|---|")
    for embedded in (False, True):
        found = sorted((row for row in rows(results) if row["embedded"] == embedded), key=lambda row: row["seed"])
        if not found:
            continue
        means = {
            "of the learned world": [row["learned"]["mean"] for row in found],
            "of an untrained world": [row["untrained_world"]["mean"] for row in found],
            "random, mean of three": [float(np.mean(row["random_controllers"])) for row in found],
        }
        for label, each in means.items():
            low, high = bootstrap_interval(each)
            shown = ", ".join(f"{mean:.0f}" for mean in each)
            print(
                f"| {'24 sensors' if embedded else 'state'} | {label} | {shown} | "
                f"{float(interquartile_mean(each)):.1f} | {low:.1f} to {high:.1f} |"
            )


def dialogue_row(seed: int, label: str, user: LatentUser, mdp: DialogueMDP) -> None:
    """How near a learned user is to the true one, and what a speaker that planned in it is worth."""
    best, start = mdp.optimal_solution().values[0].item(), mdp.objective(mdp.reference_logprobs).item()
    speaker, dreamed = evolve_speaker(user, mdp, generations=40)
    world = imagined_dialogue(mdp, *user_tables(user, mdp))
    moves = (matched_moves(user, mdp.mood_moves) - mdp.mood_moves).abs().sum(-1).mean() / 2
    asked = torch.tensor([len(state) // 2 < mdp.num_turns - 1 for state in mdp.states])
    replies = (world.reply_probabilities - mdp.reply_probabilities)[asked].abs().sum(-1).mean() / 2
    share, planned = (
        (mdp.objective(each).item() - start) / (best - start) for each in (speaker, world.optimal_solution().logprobs)
    )
    cells = [f"{moves:.3f}", f"{replies:.3f}", f"{dreamed:.2f}", f"{share:.3f}", f"{planned:.3f}", f"{best:.2f}"]
    print(f"| {seed} | {label} | {' | '.join(cells)} |", flush=True)


def dialogue(seeds: list[int]) -> None:
    """The user learned from N real dialogues by the reference; then a speaker that no real dialogue taught."""
    head = (
        "moves: mean total variation | replies: mean total variation | dreamed J | real J, share of the way | planning"
    )
    print(f"| user | real dialogues | {head} | J* |\n|---|---|---|---|---|---|---|---|")
    for seed in seeds:
        mdp = DialogueMDP(seed=seed)
        sizes = {"num_words": mdp.num_words, "num_replies": mdp.num_replies, "num_moods": mdp.num_moods}
        for count in (30, 100, 1000):
            real = mdp.sample(mdp.policy(), count, generator=torch.Generator().manual_seed(seed))
            user = fit_latent_user(real, **sizes, seed=seed, restarts=3, steps=300)
            dialogue_row(seed, str(count), user, mdp)
        dialogue_row(seed, "0: never learned", LatentUser(*sizes.values(), seed=seed), mdp)


def hills(seeds: list[int]) -> None:
    """How well five starts fit the same 1000 dialogues, and how far their transition matrices are from the true one."""
    print(
        "| user | loss of the true user | loss of each start | moves: mean total variation of each |\n|---|---|---|---|"
    )
    for seed in seeds:
        mdp = DialogueMDP(seed=seed)
        true = LatentUser(mdp.num_words, mdp.num_replies, mdp.num_moods).double()
        with torch.no_grad():
            true.first_logits.copy_(mdp.first_mood.log())
            true.move_logits.copy_(mdp.mood_moves.log())
            true.reply_logits.copy_(mdp.mood_replies.log())
            true.mood_rewards.copy_(mdp.mood_rewards)
        real = mdp.sample(mdp.policy(), 1000, generator=torch.Generator().manual_seed(seed))
        sizes = {"num_words": mdp.num_words, "num_replies": mdp.num_replies, "num_moods": mdp.num_moods}
        users = [fit_latent_user(real, **sizes, seed=seed + 7 * start, restarts=1, steps=300) for start in range(5)]
        with torch.no_grad():
            losses = [float(user_loss(user, *turns_of(real))) for user in (true, *users)]
        away = [(matched_moves(user, mdp.mood_moves) - mdp.mood_moves).abs().sum(-1).mean() / 2 for user in users]
        shown = ", ".join(f"{loss:.4f}" for loss in losses[1:])
        print(f"| {seed} | {losses[0]:.4f} | {shown} | {', '.join(f'{each:.2f}' for each in away)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["cartpole", "table", "dialogue", "hills"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--real-steps", type=int, default=20_000)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--embedded", action="store_true", help="CartPole through sensors, encoded by a VAE")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows of CartPole are kept")
    parser.add_argument("--set", nargs="*", default=[], help="options of the world model, such as temperature=1.2")
    arguments = parser.parse_args()
    if arguments.part == "dialogue":
        dialogue(arguments.seeds)
    elif arguments.part == "hills":
        hills(arguments.seeds)
    elif arguments.part == "table":
        table(arguments.results)
    else:
        cartpole(
            arguments.seeds,
            arguments.results,
            real_steps=arguments.real_steps,
            episodes=arguments.episodes,
            embedded=arguments.embedded,
            options=dict(each.split("=", 1) for each in arguments.set),
        )


if __name__ == "__main__":
    main()
