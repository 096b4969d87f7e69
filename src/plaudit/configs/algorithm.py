"""Which policy-gradient algorithm improves a policy, and every one of its options.

One family, one set of options: an algorithm's name fills in what was not given (`DEFAULTS`), and that is all it does.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from plaudit.configs.base import Config, refuse_unused

AlgorithmName = Literal["reinforce", "rloo", "grpo", "reinforce_pp", "actor_critic", "a2c", "ppo", "dpo"]
Baseline = Literal["none", "running_mean", "prompt_mean", "leave_one_out", "prompt_standardised", "greedy", "value"]
View = Literal["token", "answer"]
Surrogate = Literal["policy_gradient", "clip", "kl", "both", "preference"]
KlPlacement = Literal["reward", "loss", "none"]
KlEstimator = Literal["k1", "k2", "k3"]
Reduction = Literal["per_token", "per_sequence", "sequence_sum", "per_prompt"]

GROUP_BASELINES = ("prompt_mean", "leave_one_out", "prompt_standardised")
"""Baselines that compare an answer with the other answers to its prompt: they need two or more."""

LATER_STEPS = (
    "clip_low",
    "clip_high",
    "clip_schedule",
    "dual_clip",
    "old_kl_coefficient",
    "old_kl_target",
    "value_clip",
)
"""Options that say how far the steps on a batch may go from where the first one began."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "reinforce": {"baseline": "running_mean"},
    "rloo": {"baseline": "leave_one_out", "view": "answer"},
    "grpo": {
        "baseline": "prompt_standardised",
        "surrogate": "clip",
        "reduction": "per_sequence",
        "kl_placement": "loss",
    },
    "reinforce_pp": {
        "baseline": "none",
        "surrogate": "clip",
        "whiten_advantages": True,
        "reduction": "per_token",
    },
    "actor_critic": {"baseline": "value", "num_steps": 1, "reduction": "per_token"},
    "a2c": {"baseline": "value", "gae_lambda": 1.0, "reduction": "per_token"},
    "ppo": {
        "baseline": "value",
        "surrogate": "clip",
        "whiten_advantages": True,
        "epochs": 4,
        "reduction": "per_token",
    },
    "dpo": {
        "baseline": "none",
        "view": "answer",
        "surrogate": "preference",
        "kl_placement": "loss",
        "reduction": "per_prompt",
    },
}
"""What each name fills in; what it does not mention is filled in alike for all (`AlgorithmConfig.resolved`)."""

ALLOWED_BASELINES: dict[str, tuple[str, ...]] = {
    "rloo": ("leave_one_out",),
    "grpo": GROUP_BASELINES,
    "reinforce_pp": ("none", "prompt_mean"),
    "actor_critic": ("value",),
    "a2c": ("value",),
    "dpo": ("none",),
}
"""Names that stand for a certain baseline; `reinforce` and `ppo` take any."""


@dataclass(frozen=True, kw_only=True)
class AlgorithmSettings:
    """An `AlgorithmConfig` with nothing left open: what the algorithms read. Fields mean what they mean there.

    What an algorithm has no use for has its neutral value: no clip is infinity, an unused coefficient is 0.
    """

    name: AlgorithmName
    baseline: Baseline
    baseline_decay: float
    view: View
    discount: float
    gae_lambda: float
    critic_lambda: float | None
    num_steps: int | None
    whiten_advantages: bool
    surrogate: Surrogate
    clip_low: float
    clip_high: float
    clip_schedule: Literal["constant", "linear"]
    dual_clip: float | None
    old_kl_coefficient: float
    old_kl_target: float | None
    epochs: int
    minibatches: int
    target_kl: float | None
    value_coefficient: float
    value_clip: float | None
    critic_warmup: int
    entropy_coefficient: float
    kl_coefficient: float
    kl_placement: KlPlacement
    kl_estimator: KlEstimator
    kl_target: float | None
    kl_adaptation: float
    reduction: Reduction
    importance_cap: float | None
    normalise_lengths: bool


class AlgorithmConfig(Config):
    """A policy-gradient algorithm by name, and options that replace what its name stands for.

    An option that is not given takes the value that its algorithm stands for.
    """

    name: AlgorithmName = "ppo"
    """`reinforce`, `rloo`, `grpo`, `reinforce_pp` (REINFORCE++), `actor_critic` (one step), `a2c`, `ppo`, or `dpo`
    (pairs of a prompt's answers, labelled by the reward; with one iteration that is DPO on a fixed set of pairs)."""
    baseline: Baseline | None = None
    """What an answer's return is compared with: nothing, the running mean of returns, the mean of its prompt
    (`prompt_mean`), that without itself (`leave_one_out`), mean and deviation of its prompt (`prompt_standardised`),
    the greedy answer (`greedy`, ReMax) or a learned `value`."""
    baseline_decay: float | None = Field(default=None, gt=0, le=1)
    """What the weight of earlier returns in `running_mean` is multiplied by at each update; 0.9 if not given."""
    view: View | None = None
    """What an action is: each `token`, or the whole `answer`."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """γ, by which a reward counts less for each step that it lies ahead. 1 for text."""
    gae_lambda: float | None = Field(default=None, ge=0, le=1)
    """λ of advantages with a learned value: 1 is return minus value, 0 the one-step error; 0.95 if not given (1
    for `a2c`)."""
    critic_lambda: float | None = Field(default=None, ge=0, le=1)
    """λ of what the learned value is taught: 1 is the whole return. That of the advantages if not given."""
    num_steps: int | None = Field(default=None, gt=0)
    """n of n-step advantages with a learned value, in place of λ (1 for `actor_critic`)."""
    whiten_advantages: bool | None = None
    """Shift and scale advantages over the whole batch to mean 0 and deviation 1."""
    surrogate: Surrogate | None = None
    """What is maximised: the plain `policy_gradient`, the ratio clipped (`clip`), the ratio with a penalty on
    KL(old‖new) (`kl`), or `both`; `preference` (of `dpo` alone) is the likelihood of the pairs' labels."""
    clip_low: float | None = Field(default=None, gt=0, lt=1)
    """ε below 1 at which the ratio is clipped; 0.2 if not given."""
    clip_high: float | None = Field(default=None, gt=0)
    """ε above 1 at which the ratio is clipped; `clip_low` if not given."""
    clip_schedule: Literal["constant", "linear"] | None = None
    """`linear` lets both clips shrink to 0 over the run; `constant` if not given."""
    dual_clip: float | None = Field(default=None, gt=1)
    """With negative advantages the objective is at least this multiple of them; unbounded if not given."""
    old_kl_coefficient: float | None = Field(default=None, gt=0)
    """Weight of KL(old‖new) with the surrogates `kl` and `both`; 1 if not given."""
    old_kl_target: float | None = Field(default=None, gt=0)
    """That weight is adapted towards this KL(old‖new) per action (the mean over a batch's steps, before each one is
    taken); fixed if not given."""
    epochs: int | None = Field(default=None, gt=0)
    """Passes over each batch of experience; 4 for `ppo` and 1 for the others if not given."""
    minibatches: int | None = Field(default=None, gt=0)
    """Optimizer steps per pass, each on its part of the rows; 1 if not given."""
    target_kl: float | None = Field(default=None, gt=0)
    """No further step on a batch once KL(old‖new) per action is above 1.5 times this."""
    value_coefficient: float | None = Field(default=None, ge=0)
    """Weight of the squared error of the learned value; 0.1 if not given."""
    value_clip: float | None = Field(default=None, gt=0)
    """How far a value may move from the old one before its error stops counting, in units of the return; not clipped if
    not given."""
    critic_warmup: int | None = Field(default=None, ge=0)
    """Updates at the start in which the learned value alone learns and the policy stays as it is; 0 if not given."""
    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus, which keeps the policy exploring."""
    kl_coefficient: float = Field(default=0.05, ge=0)
    """β, weight of the divergence from the reference policy."""
    kl_placement: KlPlacement | None = None
    """Where that divergence is charged: in the `reward` of each token, as a `loss` term, or not at all (`none`, which
    is for tasks without a reference)."""
    kl_estimator: KlEstimator | None = None
    """How it is estimated from samples; `k1` in the reward (exact optimum) and `k3` as a loss if not given. `k2` and
    `k3` in the reward hold nothing near the reference and end at one answer."""
    kl_target: float | None = Field(default=None, gt=0)
    """β is adapted towards this divergence per answer, in nats; fixed if not given."""
    kl_adaptation: float | None = Field(default=None, gt=0, lt=5)
    """Gain of adapted coefficients: they change by at most a fifth of it per update; 0.1 if not given."""
    reduction: Reduction | None = None
    """How steps are put together: mean over tokens (`per_token`), over answers of their mean (`per_sequence`) or of
    their sum (`sequence_sum`, the gradient of the objective), or over prompts (`per_prompt`)."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Experience of another policy is weighed by its ratio to the old one, at most this; not weighed if not given."""
    normalise_lengths: bool | None = None
    """With `view: answer` and a ratio: the ratio is that of the mean log-probability per token (GSPO)."""

    def stands_for(self) -> dict[str, Any]:
        """What the name fills in."""
        return dict(DEFAULTS[self.name])

    def resolved(self) -> AlgorithmSettings:
        """Every option with its value; raises nothing, since the configuration was checked when it was made."""
        chosen: dict[str, Any] = {"surrogate": "policy_gradient", "view": "token", "reduction": "sequence_sum"}
        chosen |= {"kl_placement": "reward", "whiten_advantages": False, "normalise_lengths": False}
        chosen |= {"epochs": 1, "minibatches": 1, "clip_schedule": "constant", "kl_adaptation": 0.1}
        chosen |= {"baseline_decay": 0.9, "critic_warmup": 0}
        own = self.stands_for()
        if self.gae_lambda is not None or self.num_steps is not None:
            own.pop("gae_lambda", None)
            own.pop("num_steps", None)
        chosen |= own
        chosen |= {key: value for key in AlgorithmConfig.model_fields if (value := getattr(self, key)) is not None}
        critic = chosen["baseline"] == "value"
        clipped = chosen["surrogate"] in ("clip", "both")
        clip_low = chosen.get("clip_low", 0.2) if clipped else float("inf")
        in_loss = chosen["kl_placement"] == "loss"
        filled = {
            "gae_lambda": 0.95 if critic else 1.0,
            "clip_low": clip_low,
            "clip_high": clip_low,
            "old_kl_coefficient": 1.0 if chosen["surrogate"] in ("kl", "both") else 0.0,
            "value_coefficient": 0.1 if critic else 0.0,
            "kl_estimator": "k3" if in_loss else "k1",
        }
        open_ones = (
            "critic_lambda",
            "num_steps",
            "dual_clip",
            "old_kl_target",
            "target_kl",
            "value_clip",
            "kl_target",
            "importance_cap",
        )
        settings: dict[str, Any] = dict.fromkeys(open_ones) | filled | chosen
        if settings["kl_placement"] == "none":
            settings["kl_coefficient"] = 0.0
        return AlgorithmSettings(**settings)

    @property
    def needs_critic(self) -> bool:
        """Whether a value is learned beside the policy."""
        return self.resolved().baseline == "value"

    @property
    def needs_groups(self) -> bool:
        """Whether each prompt needs two or more answers."""
        settings = self.resolved()
        return settings.baseline in GROUP_BASELINES or settings.surrogate == "preference"

    @property
    def first_step_is_on_policy(self) -> bool:
        """Whether the old policy of a batch is the one that its first step begins with, so that all ratios are 1."""
        return True

    @property
    def passes(self) -> int:
        """How often each batch of experience is learned from."""
        return self.resolved().epochs

    @property
    def least_prompts(self) -> int:
        """How many prompts a batch must have, so that each minibatch gets one."""
        return self.resolved().minibatches

    @model_validator(mode="after")
    def _check(self) -> "AlgorithmConfig":
        settings = self.resolved()
        self._check_preference(settings)
        self._check_baseline(settings)
        self._check_surrogate(settings)
        self._check_divergence(settings)
        if settings.view == "answer":
            self._refuse(
                ("gae_lambda", "critic_lambda", "num_steps"),
                "has no meaning with view: answer, which has one step only",
            )
        elif self.normalise_lengths:
            raise ValueError("normalise_lengths: true is for view: answer")
        return self

    def _check_preference(self, settings: AlgorithmSettings) -> None:
        if (settings.surrogate == "preference") != (self.name == "dpo"):
            raise ValueError(
                f"surrogate: {settings.surrogate} with name: {self.name}: preference is dpo's, and its only"
            )
        if self.name != "dpo":
            return
        for name, value in DEFAULTS["dpo"].items():
            if getattr(settings, name) != value:
                raise ValueError(f"{name}: {getattr(settings, name)}: dpo knows {value} only")
        if self.kl_coefficient == 0:
            raise ValueError("kl_coefficient: 0: the rewards of dpo are β log π/π_ref, so β must be positive")
        unused = ("kl_estimator", "whiten_advantages", "importance_cap", "normalise_lengths", "target_kl")
        self._refuse(unused, "has no meaning for dpo, which compares whole answers without a ratio")

    def _check_baseline(self, settings: AlgorithmSettings) -> None:
        allowed = ALLOWED_BASELINES.get(self.name)
        if allowed and settings.baseline not in allowed:
            raise ValueError(
                f"baseline: {settings.baseline}: {self.name} stands for {' or '.join(allowed)}; for another baseline "
                "use reinforce or ppo"
            )
        if self.gae_lambda is not None and self.num_steps is not None:
            raise ValueError("give gae_lambda or num_steps, not both: they are two ways to the same advantage")
        if settings.baseline != "value":
            of_critics = (
                "gae_lambda",
                "critic_lambda",
                "num_steps",
                "value_coefficient",
                "value_clip",
                "critic_warmup",
            )
            self._refuse(of_critics, f"needs a learned value, but the baseline is {settings.baseline}")
        if settings.baseline != "running_mean":
            self._refuse(("baseline_decay",), f"is for the baseline running_mean, not {settings.baseline}")

    def _check_surrogate(self, settings: AlgorithmSettings) -> None:
        surrogate = settings.surrogate
        if surrogate not in ("clip", "both"):
            self._refuse(
                ("clip_low", "clip_high", "clip_schedule"), f"needs the surrogate clip or both, not {surrogate}"
            )
        if surrogate not in ("kl", "both"):
            self._refuse(("old_kl_coefficient", "old_kl_target"), f"needs the surrogate kl or both, not {surrogate}")
        if surrogate == "policy_gradient":
            self._refuse(("dual_clip",), "needs a surrogate with a ratio (clip, kl, both)")
            if self.normalise_lengths:
                raise ValueError("normalise_lengths: true needs a surrogate with a ratio (clip, kl, both)")
            if settings.epochs > 1:
                raise ValueError(
                    f"epochs: {settings.epochs}: the plain policy gradient is right only for the policy that sampled; "
                    "use surrogate: clip, kl or both for more than one pass"
                )
        if settings.epochs * settings.minibatches == 1:
            self._refuse(("target_kl",), "stops further steps on a batch, but there is only one; raise epochs")
            if self.first_step_is_on_policy:
                self._refuse(
                    LATER_STEPS,
                    "bounds how far steps on a batch go from where it was sampled; the first one begins there, and "
                    "there is no other: raise epochs or minibatches",
                )

    def _check_divergence(self, settings: AlgorithmSettings) -> None:
        if settings.kl_placement == "none":
            self._refuse(("kl_estimator", "kl_target"), "has no effect with kl_placement: none")
            # 0 says the same as none.
            if self.kl_coefficient:
                refuse_unused(self, ("kl_coefficient",), "has no effect with kl_placement: none")
        if settings.kl_placement == "loss" and settings.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator: k1 as a loss has expected gradient 0, so it controls nothing; use k2 or k3, or "
                "kl_placement: reward"
            )
        if settings.kl_target is not None and settings.kl_coefficient == 0:
            raise ValueError(f"kl_target: {settings.kl_target} adapts a coefficient of 0 by factors; start above 0")
        if settings.kl_target is None and settings.old_kl_target is None:
            self._refuse(("kl_adaptation",), "adapts nothing without kl_target or old_kl_target")

    def _refuse(self, names: tuple[str, ...], reason: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None:
                raise ValueError(f"{name}: {value} {reason}")
