"""One episode of an agent as a film, or as an animated picture where nothing is installed that writes films.

Gymnasium's own recorder is not used: it asks for `moviepy`, which holds Pillow back below 12.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
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
    """Record one episode as `agent.mp4` (where `imageio-ffmpeg` is installed) or `agent.gif`.

    Raises:
        ValueError: see `check_video`.
    """
    check_video(env, **options)
    folder.mkdir(parents=True, exist_ok=True)
    environment: Any = gymnasium.make(env, render_mode="rgb_array", **options)
    save, name = (_save_film, "agent.mp4") if find_spec("imageio_ffmpeg") is not None else (_save_pictures, "agent.gif")
    save(folder / name, _frames(environment, policy, seed), environment.metadata.get("render_fps", 30))
    environment.close()
    return folder / name


def _frames(environment: Any, policy: StepPolicy, seed: int) -> Iterator[Any]:
    """Pictures `[height, width, 3]` of one episode, the first before any action."""
    generator = torch.Generator().manual_seed(seed)
    observation, _ = environment.reset(seed=seed)
    if isinstance(policy, StatefulPolicy):
        policy.end_episodes(torch.ones(len(policy.memory(1)), dtype=torch.bool))
    for _ in range(LONGEST):
        yield environment.render()
        seen = single_observation(environment, observation)
        action = int(policy.sample(seen, generator=generator).actions[0])
        observation, _, terminated, truncated, _ = environment.step(action + int(environment.action_space.start))
        if terminated or truncated:
            break
    yield environment.render()


def _save_film(path: Path, frames: Iterator[Any], rate: float) -> None:
    import imageio_ffmpeg

    first = next(frames)
    height, width, _ = first.shape
    # The colours of most players come in squares of two by two, so sides have to be even.
    film = imageio_ffmpeg.write_frames(str(path), (width, height), fps=rate, macro_block_size=2)
    film.send(None)
    for frame in chain([first], frames):
        film.send(np.ascontiguousarray(frame))
    film.close()


def _save_pictures(path: Path, frames: Iterator[Any], rate: float) -> None:
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=round(1000 / rate), loop=0)
