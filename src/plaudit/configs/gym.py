"""Learning to act in a Gymnasium environment."""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from plaudit.configs.agents import AgentConfig
from plaudit.configs.bonus import BonusConfig
from plaudit.configs.q_learning import QLearningConfig
from plaudit.configs.training import FolderConfig


class GymConfig(FolderConfig):
    """Train an agent in an environment with discrete actions, or evaluate one that was saved."""

    env: str = "CartPole-v1"
    """Name of the environment, as Gymnasium knows it: actions `Discrete`, observations `Box` or `Discrete`. With
    `module:name` the module is imported first."""
    env_options: dict[str, Any] = Field(default={})
    """Options of the environment, such as `{map_name: 4x4}`."""
    algorithm: AgentConfig = QLearningConfig()
    """The agent, by name or with its options."""
    total_steps: int = Field(default=50_000, gt=0)
    """Environment steps of the whole run, all environments together; schedules run over them."""
    bonus: BonusConfig | None = Field(default=None, discriminator="kind")
    """Pay the agent for what is new: `count` or `rnd`; none pays the environment's reward alone. For environments whose
    rewards are too rare to be met by chance."""

    evaluate: Path | None = None
    """Folder of a saved agent: play with it and train nothing; `env` is that of the agent if not given."""
    episodes: int = Field(default=20, gt=0)
    """Episodes of each evaluation, played without exploration."""
    episode_limit: int = Field(default=3000, gt=0)
    """Steps after which an episode of an evaluation is cut off, in an environment that has no time limit: an agent that
    does not explore may go in a circle for ever."""
    video: bool = False
    """Record one episode of the trained agent, where the environment renders pictures."""

    seed: int = Field(default=0, ge=0)
    """Decides weights, exploration and the environments' own randomness."""
    output: Path = Path("runs/gym")
    """Folder of the run: `model/` (the agent), `curve.csv` and `curve.png`, `checkpoints/`, `metrics.jsonl`,
    `result.json`, `video/`."""
    evaluate_every: int | None = Field(default=None, gt=0)
    """Environment steps between evaluations; None: ten in a run. Always also after the last step."""
    save_every: int | None = Field(default=None, gt=0)
    """Environment steps between checkpoints; None: a tenth of the run. The last one is always saved."""
    log_every: int = Field(default=10, gt=0)
    """Updates between printed lines; `metrics.jsonl` and the trackers get every update."""

    @model_validator(mode="after")
    def _check_gym(self) -> "GymConfig":
        if self.evaluate is not None and self.resume:
            raise ValueError("evaluate plays with a saved agent and resume goes on training: give one of them")
        if isinstance(self.algorithm, QLearningConfig) and self.evaluate is None:
            self._check_learning_starts(self.algorithm)
        if self.bonus is not None and self.algorithm.name == "a3c":
            raise ValueError("bonus: what is new would have to be known to all workers of a3c; use a2c")
        return self

    def _check_learning_starts(self, algorithm: QLearningConfig) -> None:
        """A run that ends before it has begun to learn would save what its weights were at first."""
        each = algorithm.num_environments * algorithm.rollout_steps
        played = -(-self.total_steps // each) * each
        if played <= algorithm.learning_starts:
            raise ValueError(
                f"total_steps: {self.total_steps} ends before anything is learned, since algorithm.learning_starts is "
                f"{algorithm.learning_starts}: play longer, or begin earlier"
            )
