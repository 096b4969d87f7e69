"""One episode of an agent as a video: by Gymnasium's own recorder where it can, else as an animated picture."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import torch
from gymnasium.error import DependencyNotInstalled
from PIL import Image

from plaudit.rollout.environments import single_observation
from plaudit.rollout.trajectory import StatefulPolicy, StepPolicy

LONGEST = 3000
"""Steps after which an episode that does not end is cut off."""


def check_video(env: str, **options: Any) -> None:
    """See that an environment can be filmed, before anything is learned in it.

    Raises:
        ValueError: if it renders no pictures, or what it renders with is not installed.
    """
    plain = gymnasium.make(env, **options)
    modes = plain.metadata.get("render_modes", ())
    plain.close()
    if "rgb_array" not in modes:
        raise ValueError(f"video: {env} renders no pictures")
    try:
        environment = gymnasium.make(env, render_mode="rgb_array", **options)
        environment.reset(seed=0)
        environment.render()
        environment.close()
    except DependencyNotInstalled as error:
        raise ValueError(f"video: {error}; pip install 'plaudit[video]'") from error


def record_video(env: str, policy: StepPolicy, folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """Record one episode as `agent-episode-0.mp4` (where `moviepy` is installed) or `agent.gif`.

    Raises:
        ValueError: see `check_video`.
    """
    check_video(env, **options)
    folder.mkdir(parents=True, exist_ok=True)
    environment: Any = gymnasium.make(env, render_mode="rgb_array", **options)
    film = find_spec("moviepy") is not None
    if film:
        environment = gymnasium.wrappers.RecordVideo(
            environment, str(folder), episode_trigger=lambda _: True, name_prefix="agent", disable_logger=True
        )
    frames = _play(environment, policy, seed, keep=not film)
    environment.close()
    if film:
        return folder / "agent-episode-0.mp4"
    first, *others = [Image.fromarray(frame) for frame in frames]
    rate = environment.metadata.get("render_fps", 30)
    first.save(folder / "agent.gif", save_all=True, append_images=others, duration=round(1000 / rate), loop=0)
    return folder / "agent.gif"


def _play(environment: Any, policy: StepPolicy, seed: int, *, keep: bool) -> list[Any]:
    """Frames of one episode, the first before any action; none are kept where a recorder keeps them."""
    frames: list[Any] = []
    generator = torch.Generator().manual_seed(seed)
    observation, _ = environment.reset(seed=seed)
    if isinstance(policy, StatefulPolicy):
        policy.end_episodes(torch.ones(len(policy.memory(1)), dtype=torch.bool))
    for _ in range(LONGEST):
        if keep:
            frames.append(environment.render())
        seen = single_observation(environment, observation)
        action = int(policy.sample(seen, generator=generator).actions[0])
        observation, _, terminated, truncated, _ = environment.step(action + int(environment.action_space.start))
        if terminated or truncated:
            break
    if keep:
        frames.append(environment.render())
    return frames
