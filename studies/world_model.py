"""World models: CartPole in the dream, and the hidden mood of a dialogue's user, with their controls.

python studies/world_model.py cartpole --seeds 0 1 2
python studies/world_model.py dialogue --seeds 0 1 2 3 4
"""

import argparse
import json
import time

import torch

from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.world_dialogue import evolve_speaker, fit_latent_user, matched_moves
from plaudit.algorithms.world_learning import evolve_controller
from plaudit.algorithms.world_model import WorldModel
from plaudit.configs.world_model import WorldModelConfig
from plaudit.models.user import LatentUser
from plaudit.models.world import RecurrentDynamics
from plaudit.rollout.dialogue import DialogueMDP
from plaudit.rollout.environments import Collector, evaluate_policy, make_environments
from plaudit.rollout.imagination import LinearController, World, WorldPolicy
from plaudit.rollout.imagined_dialogue import imagined_dialogue, user_tables


def cartpole(seeds: list[int], real_steps: int, episodes: int, options: dict[str, object]) -> None:
    """20,000 real steps of mixed play, world and controller learned without another; then 100 real episodes."""
    for seed in seeds:
        begun = time.process_time()
        config = WorldModelConfig.model_validate(options)
        agent = WorldModel(config, TaskSizes(4, 2), total_steps=real_steps, seed=seed)
        collector = Collector(make_environments("CartPole-v1", agent.num_environments), seed=1000 * seed)
        metrics: dict[str, float] = {}
        while agent.rounds_done < config.rounds:
            metrics = agent.update(collector.collect(agent.policy, agent.num_steps))
        played = torch.tensor(collector.episode_lengths, dtype=torch.float64)
        seconds = time.process_time() - begun
        line = {"seed": seed, "played_mean": played.mean().item(), "played_longest": played.max().item()}
        line |= {"cpu_seconds": round(seconds)} | metrics

        def judged(policy: WorldPolicy, seed: int = seed) -> dict[str, float]:
            found = torch.tensor(
                evaluate_policy("CartPole-v1", policy, num_episodes=episodes, seed=12345 + seed), dtype=torch.float64
            )
            return {"mean": found.mean().item(), "deviation": found.std().item(), "least": found.min().item()}

        line["learned"] = judged(agent.greedy_policy())
        # Control 1: the same evolution in a world that was never learned (with the same encoder and starts).
        blank = RecurrentDynamics(4, 2, hidden_size=config.hidden_size, components=config.components, seed=seed)
        controller, dreamed = evolve_controller(blank, agent.starts(), config, seed=seed)
        line["untrained_world"] = judged(WorldPolicy(World(agent.world.encoder, blank), controller, agent.prepare))
        line["untrained_dream"] = dreamed["dream/mean_return"]
        # Control 2: random controllers on the learned world's features.
        generator = torch.Generator().manual_seed(seed)
        returns = [
            judged(
                WorldPolicy(
                    agent.world,
                    LinearController(torch.randn(agent.controller.weights.shape, generator=generator)),
                    agent.prepare,
                )
            )["mean"]
            for _ in range(3)
        ]
        line["random_controllers"] = returns
        print(json.dumps(line), flush=True)
        collector.environments.close()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["cartpole", "dialogue"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--real-steps", type=int, default=20_000)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--set", nargs="*", default=[], help="options of the world model, such as temperature=1.2")
    arguments = parser.parse_args()
    if arguments.part == "dialogue":
        dialogue(arguments.seeds)
        return
    options = dict(each.split("=", 1) for each in arguments.set)
    cartpole(arguments.seeds, arguments.real_steps, arguments.episodes, options)


if __name__ == "__main__":
    main()
