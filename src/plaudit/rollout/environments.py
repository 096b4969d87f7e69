"""Gymnasium environments as a source of trajectories; `TokenMDP` and `DialogueMDP` as Gymnasium environments.

Terminations and truncations are kept apart from end to end: a termination is `continues` 0, a truncation is `truncated`
with the value of the environment's **final observation** in `next_values`. Needs the extra `control`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from torch import Tensor

from plaudit.rollout.dialogue import DialogueMDP
from plaudit.rollout.token_mdp import TokenMDP
from plaudit.rollout.trajectory import StatefulPolicy, StepPolicy, Trajectory, new_trajectory

MakeEnvironment = Callable[[], gymnasium.Env[Any, Any]]

EPISODE_LIMIT = 3000
"""Steps after which an episode that is only watched is cut off, where nothing else would."""


class TokenMDPEnvironment(gymnasium.Env[np.int64, np.int64]):
    """A `TokenMDP` as a Gymnasium environment: observation = state (prompt and prefix), action = token.

    The reward is the task's, without a penalty. An episode is one string; its last observation is the state in which
    the last token was chosen, since nothing follows. `reset(options={"prompt": p})` chooses the prompt.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 Gymnasium's own form

    def __init__(self, mdp: TokenMDP | None = None) -> None:
        self.mdp = mdp or TokenMDP()
        self.observation_space = spaces.Discrete(self.mdp.num_states)
        self.action_space = spaces.Discrete(self.mdp.vocabulary)
        self._prompt = self._prefix = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.int64, dict[str, Any]]:
        """Begin a string for a random prompt, or for `options["prompt"]`."""
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(self.mdp.num_prompts))
        self._prompt, self._prefix = int((options or {}).get("prompt", drawn)), 0
        return self._observation(), {"prompt": self._prompt}

    def step(self, action: np.int64) -> tuple[np.int64, float, bool, bool, dict[str, Any]]:
        """Append a token; terminated where the string is complete, never truncated."""
        reward = float(self.mdp.rewards[self._prompt, self._prefix, int(action)])
        following = int(self.mdp.next_prefix[self._prefix, int(action)])
        self._prefix = self._prefix if following < 0 else following
        return self._observation(), reward, following < 0, False, {"prompt": self._prompt}

    def _observation(self) -> np.int64:
        return np.int64(self._prompt * self.mdp.num_prefixes + self._prefix)


class DialogueEnvironment(gymnasium.Env[np.int64, np.int64]):
    """A `DialogueMDP` as a Gymnasium environment: observation = the dialogue so far, action = word.

    The user's reply is drawn by the environment's generator; the reward is the expected one, `r(s, a)`, without a
    penalty. The last observation of an episode is the dialogue before the last word, since nobody answers that.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 Gymnasium's own form

    def __init__(self, mdp: DialogueMDP | None = None) -> None:
        self.mdp = mdp or DialogueMDP()
        self.observation_space = spaces.Discrete(self.mdp.num_states)
        self.action_space = spaces.Discrete(self.mdp.num_words)
        self._state = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.int64, dict[str, Any]]:
        """Begin a dialogue."""
        super().reset(seed=seed)
        self._state = 0
        return np.int64(0), {}

    def step(self, action: np.int64) -> tuple[np.int64, float, bool, bool, dict[str, Any]]:
        """Say a word and hear the reply; terminated after the last turn, never truncated."""
        reward = float(self.mdp.rewards[self._state, int(action)])
        chances = self.mdp.reply_probabilities[self._state, int(action)].numpy()
        reply = int(self.np_random.choice(len(chances), p=chances))
        following = int(self.mdp.next_state[self._state, int(action), reply])
        self._state = self._state if following < 0 else following
        return np.int64(self._state), reward, following < 0, False, {}


def make_environments(name: str | MakeEnvironment, num_environments: int, **options: Any) -> SyncVectorEnv:
    """Several copies of an environment side by side, reset in the same step in which they end.

    `Box` observations of more or fewer than one dimension, such as pictures, come as one vector.

    Args:
        name: a name that Gymnasium knows, such as `CartPole-v1`, or a function that makes one environment.
        num_environments: `B`.
        **options: for `gymnasium.make`.

    Raises:
        ValueError: for fewer than one environment, a name that Gymnasium does not know or whose packages are missing,
            or spaces that are not `Box` or `Discrete` observations and `Discrete` actions.
    """
    if num_environments < 1:
        raise ValueError(f"num_environments must be at least 1, got {num_environments}")
    plain = name if callable(name) else lambda: gymnasium.make(name, **options)

    def make() -> gymnasium.Env[Any, Any]:
        environment = plain()
        seen = environment.observation_space
        flat = isinstance(seen, spaces.Box) and len(seen.shape) != 1
        return gymnasium.wrappers.FlattenObservation(environment) if flat else environment

    try:
        environments = SyncVectorEnv([make] * num_environments, autoreset_mode=AutoresetMode.SAME_STEP)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise ValueError(f"env: {' '.join(str(error).replace('`', '').split())}") from error
    except TypeError as error:
        if not options:
            raise
        raise ValueError(f"env_options: {', '.join(options)}: {error}") from error
    seen, done = environments.single_observation_space, environments.single_action_space
    if not isinstance(seen, spaces.Box | spaces.Discrete) or not isinstance(done, spaces.Discrete):
        environments.close()
        raise ValueError(f"env: Box or Discrete observations and Discrete actions are needed, got {seen} and {done}")
    return environments


@dataclass
class Collector:
    """Steps environments with a policy and hands out trajectories `[B, T]`; episodes go on across calls.

    Attributes:
        environments: from `make_environments` (`SAME_STEP` autoreset).
        seed: of the environments, which get `seed`, `seed + 1`, …, and of the actions.
        episode_returns, episode_lengths: of every episode that ended, in order of ending.
        num_steps_taken: environment steps so far, all environments together.
    """

    environments: SyncVectorEnv
    seed: int = 0
    episode_returns: list[float] = field(default_factory=list)
    episode_lengths: list[int] = field(default_factory=list)
    num_steps_taken: int = 0

    def __post_init__(self) -> None:
        if self.environments.autoreset_mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                f"the environments reset by {self.environments.autoreset_mode}; make them with `make_environments` "
                "(SAME_STEP), or the step after every end would be counted as an action"
            )
        self.generator = torch.Generator().manual_seed(self.seed)
        done = self.environments.single_action_space
        # Gymnasium lets discrete spaces begin at any number; here they begin at 0.
        self._first_action = int(done.start) if isinstance(done, spaces.Discrete) else 0
        observations, _ = self.environments.reset(seed=self.seed)
        self._observations = self._seen(observations)
        self._returns = np.zeros(self.environments.num_envs)
        self._lengths = np.zeros(self.environments.num_envs, dtype=np.int64)

    @torch.no_grad()
    def collect(self, policy: StepPolicy, num_steps: int) -> Trajectory:
        """The next `num_steps` steps of every environment.

        Returns:
            a trajectory `[B, T]` with `observations` and `next_observations` `[B, T, ...]`; where an episode ended,
            the latter is its final observation, not the first of the next episode. `values` and `next_values` are the
            policy's; `state` is the memory before the first step of a policy that has one (`StatefulPolicy`).
        """
        columns: dict[str, list[Tensor]] = {}
        stateful = policy if isinstance(policy, StatefulPolicy) else None
        memory = None if stateful is None else stateful.memory(self.environments.num_envs).clone()
        for _ in range(num_steps):
            drawn = policy.sample(self._observations, generator=self.generator)
            step = self._step(drawn.actions)
            step |= {"actions": drawn.actions, "behaviour_logprobs": drawn.logprobs, "values": drawn.values}
            step |= drawn.columns or {}
            if stateful is not None:
                stateful.end_episodes(step["terminated"] | step["truncated"])
            for name, tensor in step.items():
                columns.setdefault(name, []).append(tensor)
        stacked = {name: torch.stack(tensors, 1) for name, tensors in columns.items()}
        terminated = stacked.pop("terminated")
        dtype = stacked["behaviour_logprobs"].dtype
        stacked["rewards"] = stacked["rewards"].to(dtype)
        return new_trajectory(
            **stacked,
            next_values=policy.values(stacked["next_observations"]),
            continues=(~terminated).to(dtype),
            mask=torch.ones_like(terminated),
            state=memory,
        )

    def _step(self, actions: Tensor) -> dict[str, Tensor]:
        before = self._observations
        chosen = actions.cpu().numpy() + self._first_action
        observations, rewards, terminated, truncated, infos = self.environments.step(chosen)
        ended = terminated | truncated
        after = self._seen(observations)
        final = after.clone()
        for place in np.flatnonzero(ended):
            final[place] = self._seen(np.asarray(infos["final_obs"][place]))
        self._observations = after
        self._count(rewards, ended)
        return {
            "observations": before,
            "next_observations": final,
            "rewards": torch.as_tensor(rewards),
            "terminated": torch.as_tensor(terminated),
            # Both at once is an end: there is no future to bootstrap from.
            "truncated": torch.as_tensor(truncated & ~terminated),
        }

    def _seen(self, observations: Any) -> Tensor:
        return _from_space(self.environments.single_observation_space, observations)

    def _count(self, rewards: Any, ended: Any) -> None:
        self.num_steps_taken += len(ended)
        self._returns += rewards
        self._lengths += 1
        self.episode_returns += self._returns[ended].tolist()
        self.episode_lengths += self._lengths[ended].tolist()
        self._returns[ended] = 0
        self._lengths[ended] = 0


def as_observations(observations: Any) -> Tensor:
    """Gymnasium's observations as int64 (discrete) or float32 tensors of the same shape; a copy."""
    table = np.asarray(observations)
    return torch.tensor(table, dtype=torch.int64 if np.issubdtype(table.dtype, np.integer) else torch.float32)


def single_observation(environment: gymnasium.Env[Any, Any], observation: Any) -> Tensor:
    """An observation of one environment as policies see it: `[1, O]`, or `[1]` where it is discrete."""
    found = _from_space(environment.observation_space, np.asarray(observation)[None])
    return found.flatten(1) if found.is_floating_point() else found


def _from_space(space: spaces.Space[Any], observations: Any) -> Tensor:
    """Discrete observations as int64 from 0, those of a `Box` as floating point, whole numbers too."""
    found = as_observations(observations)
    return found - int(space.start) if isinstance(space, spaces.Discrete) else found.float()


def has_time_limit(environment: gymnasium.Env[Any, Any]) -> bool:
    """Whether Gymnasium cuts off the environment's episodes. One that does so by itself says nothing of it."""
    return environment.spec is not None and environment.spec.max_episode_steps is not None


def evaluate_policy(
    name: str | MakeEnvironment,
    policy: StepPolicy,
    *,
    num_episodes: int,
    seed: int = 0,
    num_environments: int = 8,
    episode_limit: int = EPISODE_LIMIT,
    **options: Any,
) -> list[float]:
    """Returns (undiscounted) of whole episodes that begin fresh.

    Each environment plays the same number of episodes (rounded up), so that short episodes are not over-represented.

    Args:
        name: as in `make_environments`.
        policy: acts by its own `sample`; pass a greedy one for greedy play.
        num_episodes: at least this many are played, exactly this many are returned.
        seed: of environments and actions.
        num_environments: how many play side by side.
        episode_limit: steps after which an episode is cut off where the environment has no time limit: a policy that
            acts without chance may go in a circle for ever.
        **options: for `gymnasium.make`.
    """

    def make() -> gymnasium.Env[Any, Any]:
        environment = name() if callable(name) else gymnasium.make(name, **options)
        return environment if has_time_limit(environment) else TimeLimit(environment, episode_limit)

    each = -(-num_episodes // num_environments)
    collector = Collector(make_environments(make, num_environments), seed=seed)
    played: list[list[float]] = [[] for _ in range(num_environments)]
    running = np.zeros(num_environments)
    while min(map(len, played)) < each:
        step = collector.collect(policy, 1)
        running += step.rewards[:, 0].double().numpy()
        for place in torch.nonzero((step.continues[:, 0] == 0) | step.truncated[:, 0]).flatten().tolist():
            played[place].append(float(running[place]))
            running[place] = 0
    collector.environments.close()
    return [episode for index in range(each) for episode in (one[index] for one in played)][:num_episodes]
