"""Playing with a saved agent, and what is said of an environment and of what was earned in it."""

import sys
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from plaudit.algorithms.agents import task_sizes
from plaudit.algorithms.base import TaskSizes
from plaudit.configs.gym import GymConfig
from plaudit.rollout.environments import evaluate_policy, has_time_limit, make_environments
from plaudit.training.gym_agents import check_fits, load_agent
from plaudit.training.gym_video import record_video
from plaudit.training.messages import say
from plaudit.training.precision import threads
from plaudit.training.random_state import seeded

EVALUATION_SEED = 0x5EED
"""Added to the run's seed for the environments of evaluations, which are the same every time."""


def look_at(config: GymConfig, env: str, options: dict[str, Any]) -> TaskSizes:
    """The sizes of an environment; says so where its episodes have no time limit.

    Raises:
        ValueError: see `make_environments`.
    """
    environments = make_environments(env, 1, **options)
    sizes, limited = task_sizes(environments), has_time_limit(environments.envs[0])
    environments.close()
    if not limited and not config.quiet:
        say(
            f"gym: {env} has no time limit; episodes of evaluations are cut off after {config.episode_limit} steps "
            "(episode_limit), those of training with env_options.max_episode_steps alone"
        )
    return sizes


def play(config: GymConfig, folder: Path) -> list[float]:
    """Play with a saved agent and say what it earned; with `config.video` record an episode into its folder."""
    saved = load_agent(folder)
    env = config.env if "env" in config.model_fields_set else saved.env
    # Another environment does not have the options of the agent's own.
    options = config.env_options or (saved.env_options if env == saved.env else {})
    with seeded(config.seed), threads(config.threads):
        check_fits(saved, look_at(config, env, options), env)
        returns = evaluate_policy(
            env,
            saved.policy,
            num_episodes=config.episodes,
            seed=config.seed + EVALUATION_SEED,
            num_environments=min(8, config.episodes),
            episode_limit=config.episode_limit,
            **options,
        )
    sys.stdout.write(f"{saved.config.name} in {env}: {summary(returns)}\n")
    if config.video:
        sys.stdout.write(f"{record_video(env, saved.policy, folder / 'video', seed=config.seed, **options)}\n")
    return returns


def summary(returns: list[float]) -> str:
    """Returns of episodes in a line."""
    return (
        f"return {mean(returns):.4g} over {len(returns)} episodes, standard deviation {pstdev(returns):.3g}, least "
        f"{min(returns):.4g}, most {max(returns):.4g}"
    )
