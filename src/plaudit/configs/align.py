"""Aligning a language model with a reward by reinforcement learning."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from plaudit.configs.acer import AcerTextConfig
from plaudit.configs.agents import AlignAlgorithm
from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.configs.base import Config
from plaudit.configs.generation import SamplingConfig
from plaudit.configs.q_learning import SoftQConfig
from plaudit.configs.refresh import RefreshConfig
from plaudit.configs.rewards import RewardPartConfig, RewardsConfig
from plaudit.configs.sft import LanguageModelConfig
from plaudit.configs.training import OptimizerConfig, RunConfig

ELSEWHERE = {
    "a3c": "on text it is a2c whose answers other processes sample: algorithm: {name: a2c, importance_cap: 2} with "
    "asynchronous: {workers: 2}",
    "double_dqn": "the soft backup of dqn takes no maximum over noisy values, so there is nothing to correct: "
    "algorithm: dqn",
    "dyna": "on single answers it is any of them with refresh_reward, a model of the annotator that learns on; "
    "imagined dialogues are plaudit.algorithms.deep_dyna, from Python",
    "world_model": "it dreams of an environment that is seen step by step: plaudit gym --algorithm world_model; "
    "of text it is a model of whom one talks to, for dialogues: plaudit.algorithms.world_dialogue, from Python",
    "best_of_n": "it trains nothing: plaudit evaluate policy measures it, and plaudit generate --samples with plaudit "
    "score picks the best of several answers",
    "ilql": "it learns from recorded answers, not from sampled ones: plaudit.algorithms.implicit_q, from Python",
}
"""Families that `plaudit align` has under another name, or that are used elsewhere."""


class GuardsConfig(Config):
    """When a run says that it is going bad, and when it stops."""

    kl_limit: float | None = Field(default=50.0, gt=0)
    """Nats per answer from the reference above which it warns; past it a reward model is rarely right."""
    stop_kl: float | None = Field(default=None, gt=0)
    """Nats per answer from the reference at which the run saves and stops."""
    entropy_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Warn when the entropy has fallen to this share of its first value: answers become all alike."""
    ratio_limit: float = Field(default=10.0, gt=1)
    """Warn when an action (a token, or with `view: answer` a whole answer) has become this many times as likely, or
    unlikely, within one batch."""
    length_factor: float = Field(default=2.0, gt=1)
    """Warn when answers have become this many times as long as at first."""
    unfinished: float = Field(default=0.5, ge=0, le=1)
    """Warn when more than this share of answers reaches the token limit without an end."""
    equal_groups: float = Field(default=0.9, ge=0, le=1)
    """Warn when in more than this share of prompts all answers earn the same: nothing can be learned from them."""


class AsynchronousConfig(Config):
    """Answers are sampled by other processes while the learner learns from earlier ones."""

    workers: int = Field(default=1, gt=0)
    """Processes that answer, each with a copy of the model, on the CPU: an iteration each, so `max_staleness + 1` are
    the most that can be busy."""
    max_staleness: int = Field(default=1, ge=0)
    """How many updates old the weights may be that wrote an answer when it is learned from; 0 waits for every update,
    which is the synchronous run."""

    @model_validator(mode="after")
    def _check_workers(self) -> "AsynchronousConfig":
        if self.workers > self.max_staleness + 1:
            raise ValueError(
                f"workers: {self.workers}, but with max_staleness {self.max_staleness} answers of at most "
                f"{self.max_staleness + 1} iterations are written at a time; the others would only hold memory"
            )
        return self


class AlignConfig(RunConfig):
    """Sample answers, score them, improve the policy on them, and again: prompts come from `data`."""

    model: LanguageModelConfig
    """The policy's start, which is also the reference; usually the model folder of a fine-tuning run."""
    reward: str | None = None
    """The reward: a reward model's folder or name, a rule, a server's address, or a function by name
    (`my_rewards.py:polite`). Its numbers are divided by their running standard deviation. For more than one, or another
    scale, give `rewards`."""
    rewards: RewardsConfig | None = None
    """A weighted sum of rewards, each with its scale and limits; parts of weight 0 are only logged."""
    refresh_reward: RefreshConfig | None = None
    """Judge the policy's own answers now and then, and let the reward model learn from that; None never does."""
    missing_end_penalty: float = Field(default=1.0, ge=0)
    """Taken off the (scaled) reward of an answer that reaches the token limit without an end."""

    algorithm: AlignAlgorithm = AlgorithmConfig()
    """The algorithm and its options."""
    critic: Literal["auto", "separate", "shared"] = "auto"
    """Where an algorithm learns a value: a model of its own (`separate`, `auto`) or a head on the policy (`shared`)."""
    critic_start: Literal["policy", "reward"] = "policy"
    """Where a separate critic starts: as a copy of the policy, or of the reward model (which must read its tokens).
    `algorithm.critic_warmup` lets it learn alone at first."""

    sampling: SamplingConfig = SamplingConfig()
    """How answers are sampled while learning."""
    final_temperature: float | None = Field(default=None, gt=0)
    """The temperature moves in a straight line from `sampling.temperature` to this; it moves the objective too."""
    allow_filtered_sampling: bool = False
    """Permit top-k, top-p and min-p while learning: samples are then not the policy's own, which biases gradients
    unless `algorithm.importance_cap` corrects for it."""
    asynchronous: AsynchronousConfig | None = None
    """Sample in other processes while learning; needs `algorithm.importance_cap` where answers may be stale. None
    samples and learns by turns."""
    prompts_per_iteration: int = Field(default=32, gt=0)
    """Prompts answered between two updates of the behaviour."""
    samples_per_prompt: int = Field(default=4, gt=0)
    """Answers to each."""
    max_rows: int = Field(default=256, gt=0)
    """Most answers that are sampled together (those to one prompt always are): fewer need less memory for keys and
    values, and more time."""
    iterations: int = Field(default=100, gt=0)
    """How often answers are sampled and learned from."""

    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-5, weight_decay=0.0, epsilon=1e-5, schedule="linear", warmup=0.0
    )
    """Optimizer; its schedule runs over the iterations. `head_learning_rate` is that of what starts afresh: the
    critic's head, styles, a manager."""
    guards: GuardsConfig = GuardsConfig()
    """Warnings in plain words, and what stops the run."""

    evaluation_samples: int = Field(default=1, gt=0)
    """Answers to each held-out prompt at an evaluation, sampled as in training."""
    samples_logged: int = Field(default=4, ge=0)
    """Answers of each iteration that are written to `samples.jsonl` as text."""

    output: Path = Path("runs/align")
    """Folder of the run: `model/` (the policy), `checkpoints/`, `metrics.jsonl`, `samples.jsonl`, `result.json`, and
    `models/` where earlier policies are kept."""
    evaluate_every: int | None = Field(default=10, gt=0)
    """Iterations between evaluations on held-out prompts; also before the first and after the last."""
    save_every: int | None = Field(default=10, gt=0)
    """Iterations between checkpoints; the last one is always saved."""
    keep_model_every: int | None = Field(default=None, gt=0)
    """Iterations between copies of the policy as it is then, `models/00010/`, plain transformers folders like `model/`:
    the points of a run for `plaudit evaluate policy run/10=…`. None keeps the last one alone."""
    log_every: int = Field(default=1, gt=0)
    """Iterations between printed lines."""

    def reward_config(self) -> RewardsConfig | None:
        """The rewards of the run; None where they are handed over in Python."""
        if self.reward is None:
            return self.rewards
        part = RewardPartConfig(reward=self.reward, normalise="running_scale")
        return RewardsConfig(parts={"reward": part})

    def temperature(self, iteration: int) -> float:
        """The sampling temperature of an iteration, counted from 0."""
        start = self.sampling.temperature
        if self.final_temperature is None or self.iterations == 1:
            return start
        return start + (self.final_temperature - start) * min(1.0, iteration / (self.iterations - 1))

    @field_validator("reward", mode="before")
    @classmethod
    def _one_reward(cls, value: Any) -> Any:
        if isinstance(value, dict):
            raise ValueError("reward is a single one, as text; a sum of several with its parts stands under `rewards`")
        return value

    @model_validator(mode="before")
    @classmethod
    def _say_where_it_is(cls, values: Any) -> Any:
        chosen = values.get("algorithm") if isinstance(values, dict) else None
        name = chosen.get("name") if isinstance(chosen, dict) else chosen
        if isinstance(name, str) and name in ELSEWHERE:
            raise ValueError(f"algorithm.name: {name}: {ELSEWHERE[name]}")
        return values

    @model_validator(mode="after")
    def _check_align(self) -> "AlignConfig":
        if self.reward is not None and self.rewards is not None:
            raise ValueError("give reward (one) or rewards (a weighted sum), not both")
        if self.refresh_reward is not None and self.refresh_reward.every >= self.iterations:
            raise ValueError(
                f"refresh_reward.every: {self.refresh_reward.every} of {self.iterations} iterations: the first refresh "
                "would come when all is over"
            )
        if self.sampling.method != "sample":
            raise ValueError(f"sampling.method: {self.sampling.method}: learning needs samples; use method: sample")
        lora = self.model.lora
        if self.model.dropout or (lora is not None and lora.dropout):
            raise ValueError(
                "model.dropout, model.lora.dropout: dropout is off while a policy is aligned, for its updates have to "
                "see the policy that sampled; leave it out"
            )
        if self.sampling.seed:
            raise ValueError(f"sampling.seed: {self.sampling.seed}: all draws of a run follow from seed; give that")
        filtered = [name for name in ("top_k", "top_p", "min_p") if getattr(self.sampling, name) is not None]
        if filtered and not self.allow_filtered_sampling:
            raise ValueError(
                f"sampling.{filtered[0]}: answers would not be samples of the policy, so its gradient would be wrong; "
                "leave it out, or set allow_filtered_sampling: true"
            )
        self._check_replay(filtered)
        self._check_asynchronous()
        self._check_comparing()
        algorithm = self.algorithm
        if algorithm.needs_groups and self.samples_per_prompt < 2:
            raise ValueError(
                f"algorithm {algorithm.name} compares answers to one prompt: samples_per_prompt must be ≥ 2"
            )
        warmup = getattr(algorithm, "critic_warmup", None)
        if warmup is not None and warmup >= self.iterations:
            raise ValueError(
                f"algorithm.critic_warmup: {warmup} of {self.iterations} iterations: the policy would never learn"
            )
        if not algorithm.needs_critic and (self.critic != "auto" or self.critic_start != "policy"):
            raise ValueError(f"critic: algorithm {algorithm.name} as it is set has no learned value")
        if self.critic == "shared" and self.critic_start == "reward":
            raise ValueError("critic_start: reward is for critic: separate; a shared one reads the policy's states")
        if self.prompts_per_iteration < algorithm.least_prompts:
            raise ValueError(
                f"algorithm.minibatches: {algorithm.least_prompts} of {self.prompts_per_iteration} prompts: answers to "
                "one prompt stay together, so there must be at least as many prompts"
            )
        return self

    def _check_comparing(self) -> None:
        if self.rewards is None or not self.rewards.compares_answers:
            return
        reason = (
            "with normalise: group, group_mean or rank an answer is rewarded by comparison with others to its prompt"
        )
        if self.samples_per_prompt < 2:
            raise ValueError(f"samples_per_prompt: {self.samples_per_prompt}: {reason}; give 2 or more")
        if self.evaluation_samples < 2 and (self.held_out or self.held_out_fraction):
            raise ValueError(f"evaluation_samples: {self.evaluation_samples}: {reason}; give 2 or more")
        if getattr(self.algorithm, "baseline", None) == "greedy":
            raise ValueError(
                f"algorithm.baseline: greedy: {reason}, and there is one greedy answer; use another baseline"
            )

    def _check_replay(self, filtered: list[str]) -> None:
        algorithm = self.algorithm
        if not isinstance(algorithm, AcerTextConfig):
            return
        answers = self.prompts_per_iteration * self.samples_per_prompt
        if algorithm.replay_ratio and answers > algorithm.buffer_size:
            raise ValueError(
                f"algorithm.buffer_size: {algorithm.buffer_size} answers are remembered, but an iteration has {answers}"
            )
        if self.critic_start == "reward":
            raise ValueError(
                "critic_start: reward: the critic of acer has a value for every token, which a reward model has not; "
                "leave critic_start out"
            )
        if filtered:
            raise ValueError(
                f"sampling.{filtered[0]}: acer remembers whole distributions, not what was left of them; leave it out"
            )
        if self.refresh_reward is not None:
            raise ValueError(
                "refresh_reward: acer learns again from answers whose rewards the old reward model gave; use an "
                "algorithm that remembers none, for example ppo"
            )

    def _check_asynchronous(self) -> None:
        algorithm = self.algorithm
        # Soft Q-learning has the same optimum whatever sampled its answers, so it needs no weights.
        if self.asynchronous is None or isinstance(algorithm, SoftQConfig):
            return
        if isinstance(algorithm, AcerTextConfig):
            raise ValueError(
                f"asynchronous: algorithm {algorithm.name} needs the whole distributions that answers were drawn from, "
                "which workers do not send; it reuses answers by itself"
            )
        if self.asynchronous.max_staleness and algorithm.importance_cap is None:
            raise ValueError(
                f"asynchronous.max_staleness: {self.asynchronous.max_staleness}: answers of older weights have to be "
                "weighed; set algorithm.importance_cap, for example 2"
            )
