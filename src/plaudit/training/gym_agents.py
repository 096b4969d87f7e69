"""A saved agent: a folder of safetensors and JSON from which it plays again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import nn

import plaudit
from plaudit.algorithms.agents import build_agent
from plaudit.algorithms.base import Agent, TaskSizes
from plaudit.configs.agents import AgentConfig
from plaudit.rollout.trajectory import StepPolicy

WEIGHTS, DESCRIPTION = "agent.safetensors", "agent.json"


@dataclass(frozen=True, kw_only=True)
class SavedAgent:
    """An agent as it was saved.

    Attributes:
        policy: plays without exploration.
        config: of its family.
        sizes: of that environment.
        env, env_options: the environment that it learned in.
    """

    policy: StepPolicy
    config: Any
    sizes: TaskSizes
    env: str
    env_options: dict[str, Any]


def save_agent(
    folder: Path, agent: Agent, config: AgentConfig, sizes: TaskSizes, *, env: str, env_options: dict[str, Any]
) -> None:
    """Write what the agent needs to play (not to go on learning) into an existing folder.

    Raises:
        ValueError: if its greedy policy is no module, so that it is not known what to save.
    """
    policy = agent.greedy_policy()
    if not isinstance(policy, nn.Module):
        raise ValueError(f"{type(policy).__name__} is no torch module, so the agent cannot be saved")
    weights = {name: tensor.detach().contiguous().clone() for name, tensor in policy.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    description = {
        "plaudit": plaudit.__version__,
        "env": env,
        "env_options": env_options,
        "observation_size": sizes.observation_size,
        "num_actions": sizes.num_actions,
        "algorithm": config.model_dump(mode="json"),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def load_agent(folder: Path) -> SavedAgent:
    """The agent that `save_agent` wrote.

    Raises:
        ValueError: if the folder holds none.
    """
    inner = folder / "model"
    folder = inner if not (folder / DESCRIPTION).is_file() and (inner / DESCRIPTION).is_file() else folder
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(f"evaluate: {folder} holds no agent ({DESCRIPTION} is missing)")
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    config: Any = TypeAdapter(AgentConfig).validate_python(description["algorithm"])
    sizes = TaskSizes(description["observation_size"], description["num_actions"])
    policy = build_agent(config, sizes, total_steps=1).greedy_policy()
    assert isinstance(policy, nn.Module)  # save_agent takes no other
    policy.load_state_dict(load_file(folder / WEIGHTS))
    return SavedAgent(
        policy=policy,
        config=config,
        sizes=sizes,
        env=description["env"],
        env_options=dict(description["env_options"]),
    )


def check_fits(saved: SavedAgent, sizes: TaskSizes, env: str) -> None:
    """See that an agent can play in an environment.

    Raises:
        ValueError: if it was made for other observations or actions.
    """
    if saved.sizes != sizes:
        raise ValueError(
            f"env: {env} has {sizes.observation_size} observations and {sizes.num_actions} actions, but this agent "
            f"learned in {saved.env} with {saved.sizes.observation_size} and {saved.sizes.num_actions}; leave env and "
            "env_options out to play there"
        )
