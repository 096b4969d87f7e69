"""Q-learning: DQN and Double DQN in environments, soft Q-learning on text, implicit Q-learning on recorded text."""

from typing import Literal

from pydantic import Field, model_validator

from plaudit.configs.base import Config, refuse_unused


class QLearningConfig(Config):
    """A Q-network that learns from replayed steps. The defaults are Stable-Baselines3's zoo for CartPole-v1."""

    name: Literal["dqn", "double_dqn"] = "dqn"
    """`dqn` bootstraps from the target network's best action, `double_dqn` from its value of the learning network's."""
    num_environments: int = Field(default=1, gt=0)
    """Environments played side by side."""
    rollout_steps: int = Field(default=256, gt=0)
    """Steps of each environment between two rounds of updates."""
    gradient_steps: int = Field(default=128, gt=0)
    """Optimizer steps in each round."""
    batch_size: int = Field(default=64, gt=0)
    """Replayed steps per optimizer step."""
    learning_rate: float = Field(default=2.3e-3, gt=0)
    """Adam's rate at the first update."""
    schedule: Literal["constant", "linear"] = "constant"
    """`linear` lets the rate fall to 0 over the run."""
    discount: float = Field(default=0.99, gt=0, le=1)
    """γ, by which a reward counts less for each step that it lies ahead."""
    num_steps: int = Field(default=1, gt=0)
    """n of n-step targets. Above 1 they are off-policy without a correction, which is usual and not exact."""
    hidden: tuple[int, ...] = Field(default=(256, 256), min_length=1)
    """Sizes of the hidden layers, one at least."""
    dueling: bool = False
    """Split the last layer into a value and advantages of mean 0."""
    huber_threshold: float = Field(default=1.0, gt=0)
    """Error at which the loss turns from squared to linear, in units of the return."""
    max_gradient_norm: float | None = Field(default=10.0, gt=0)
    """Gradients are scaled down to this joint norm; None leaves them."""

    buffer_size: int = Field(default=100_000, gt=0)
    """Steps that are remembered; older ones are forgotten."""
    learning_starts: int = Field(default=1000, ge=0)
    """Steps of random play before the first update."""
    prioritised: bool = False
    """Replay surprising steps more often, weighted so that the expected loss is nearly that of uniform replay."""
    priority_exponent: float = Field(default=0.6, ge=0, le=1)
    """How much more: probabilities go with |TD error| to this power; 0 is uniform."""
    importance_exponent: float = Field(default=0.4, ge=0, le=1)
    """How far the weights correct for it at first; grows in a straight line to 1 over the run."""

    target_every: int = Field(default=10, gt=0)
    """Environment steps (of all environments together) between copies of the weights to the target network; checked
    before each round of updates."""
    polyak: float = Field(default=1.0, gt=0, le=1)
    """τ of those copies, `θ⁻ ← τ θ + (1 - τ) θ⁻`. 1 is a hard copy; below 1 one is made after every optimizer step."""

    exploration: Literal["epsilon", "boltzmann"] = "epsilon"
    """ε-greedy, or actions by `softmax(Q / temperature)`."""
    exploration_start: float = Field(default=1.0, ge=0)
    """ε, or the temperature, at the first step."""
    exploration_end: float = Field(default=0.04, ge=0)
    """ε, or the temperature, once the schedule has ended."""
    exploration_fraction: float = Field(default=0.16, gt=0, le=1)
    """Share of the run over which it moves from start to end, in a straight line."""

    @model_validator(mode="after")
    def _check(self) -> "QLearningConfig":
        ends = (self.exploration_start, self.exploration_end)
        if self.exploration == "epsilon" and max(ends) > 1:
            raise ValueError(f"exploration_start and exploration_end: ε is a probability, got {ends[0]} and {ends[1]}")
        if self.exploration == "boltzmann" and min(ends) == 0:
            raise ValueError("exploration_end: a temperature must stay above 0; use epsilon for greedy play")
        if self.batch_size > self.buffer_size:
            raise ValueError(f"batch_size {self.batch_size} is more than buffer_size {self.buffer_size} can hold")
        if not self.prioritised:
            refuse_unused(self, ("priority_exponent", "importance_exponent"), "needs prioritised: true")
        if self.polyak < 1:
            refuse_unused(self, ("target_every",), "is for hard copies: leave polyak at 1, or this out")
        return self


class SoftQConfig(Config):
    """Soft Q-learning on answers: action values whose Boltzmann policy is the language model itself."""

    name: Literal["dqn"] = "dqn"
    """Soft Q-learning; its optimum is that of the penalised reward, as for PPO."""
    kl_coefficient: float = Field(default=0.05, gt=0)
    """β, weight of the divergence from the reference policy, and the temperature of the Boltzmann policy."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """γ, by which a reward counts less for each step that it lies ahead. 1 for text."""
    target_lambda: float = Field(default=0.95, ge=0, le=1)
    """λ of the targets: 0 bootstraps from the critic after one token, 1 waits for the reward of the whole answer."""
    huber_threshold: float = Field(default=1.0, gt=0)
    """Error at which the loss turns from squared to linear, in units of the scaled reward."""
    epochs: int = Field(default=2, gt=0)
    """Passes over each batch of answers."""
    minibatches: int = Field(default=1, gt=0)
    """Optimizer steps per pass, each on its part of the answers."""

    @property
    def needs_critic(self) -> bool:
        """`V` of the state stands in every action value."""
        return True

    @property
    def needs_groups(self) -> bool:
        """No answer is compared with another one."""
        return False

    @property
    def passes(self) -> int:
        """How often each batch of experience is learned from."""
        return self.epochs

    @property
    def least_prompts(self) -> int:
        """How many prompts a batch must have, so that each minibatch gets one."""
        return self.minibatches


class ImplicitQConfig(Config):
    """Implicit Q-learning on recorded answers: action values over the states of a language model that stays so."""

    expectile: float = Field(default=0.7, gt=0, lt=1)
    """τ: ½ values the recorded behaviour, towards 1 the best that was recorded."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """γ, by which a reward counts less for each step that it lies ahead."""
    conservative_coefficient: float = Field(default=0.0, ge=0)
    """Weight of `-log softmax(Q)` at the recorded action, which keeps values of actions that were never seen low."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Adam's rate."""
    polyak: float = Field(default=0.005, gt=0, le=1)
    """τ of the target values, `θ⁻ ← τ θ + (1 - τ) θ⁻` after every step."""


class HeadQConfig(Config):
    """Q-learning on answers with a value for every token of the vocabulary, over the states of a language model."""

    backup: Literal["hard", "soft"] = "soft"
    """What a state is worth: `hard` its best token, which is the optimum of the reward alone; `soft` what the penalised
    reward can reach from there."""
    kl_coefficient: float = Field(default=0.05, gt=0)
    """β of the soft backup, weight of the divergence from the reference policy."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """γ, by which a reward counts less for each step that it lies ahead."""
    huber_threshold: float = Field(default=1.0, gt=0)
    """Error at which the loss turns from squared to linear, in units of the reward."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Adam's rate."""
    polyak: float = Field(default=0.005, gt=0, le=1)
    """τ of the target values, `θ⁻ ← τ θ + (1 - τ) θ⁻` after every step."""

    @model_validator(mode="after")
    def _check(self) -> "HeadQConfig":
        if self.backup == "hard":
            refuse_unused(self, ("kl_coefficient",), "is for backup: soft; the hard one knows no penalty")
        return self
