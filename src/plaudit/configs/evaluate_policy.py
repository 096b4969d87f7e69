"""Measuring language models that were aligned against the one that they started from."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from plaudit.configs.base import Config
from plaudit.configs.data import DataConfig
from plaudit.configs.evaluate import named_source
from plaudit.configs.generation import SamplingConfig
from plaudit.configs.rewards import RewardsConfig

START = "start"
"""What the starting model is called."""


class EvaluatePolicyConfig(Config):
    """Measure language models on held-out prompts against the model that they started from: did it help?"""

    policies: tuple[str, ...] = ()
    """Folders or names of language models, or JSON Lines of completions made elsewhere (`{"prompt", "completions",
    "finished"}`), each as `place` or `name=place`. `run/step=place` is one checkpoint of a run: the points of a run are
    joined and fitted."""
    reference: str | None = None
    """The starting model, as `policies`; divergences are measured to it, best of n is drawn from it."""
    data: tuple[str | DataConfig, ...] = ()
    """Held-out prompts: files, folders or datasets of prompts, demonstrations or comparisons; nothing that any of the
    models was trained on. Other keys of a row are columns that rewards may read."""
    limit: int | None = Field(default=200, ge=1)
    """Answer at most this many different prompts, the first ones; None answers all."""

    rewards: tuple[str, ...] = ()
    """What scores the answers, as `name=REWARD` with the folder of a reward model, a server's address, a rule or a
    function by name: `proxy=runs/reward/model`, `brief=length_penalty=0.01`, `gold=my_rewards.py:right`."""
    sums: dict[str, RewardsConfig] = Field(default_factory=dict)
    """More rewards by name: weighted sums, as training uses them."""
    proxy: str | None = None
    """The name of the reward that was optimised and that chooses the best of n; None takes `proxy`, else the first."""
    gold: str | None = None
    """The name of the reward that is really wanted; None takes `gold` where there is one."""

    samples: int = Field(default=4, ge=1)
    """Answers of every model to each prompt."""
    best_of: int = Field(default=16, ge=0)
    """Answers of the starting model from which best-of-n curves are estimated, n up to this many; 0 draws no curve."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """How the models answer; its seed is not used, `seed` is."""
    seed: int = Field(default=0, ge=0)
    """Seed of the answers and of the bootstrap."""

    length_control: bool = True
    """Also estimate win rates for answers of equal length, by a logistic regression on the difference of lengths."""
    resamples: int = Field(default=2000, ge=0)
    """Resamples of the bootstrap over prompts (or their groups); 0 gives no intervals."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """How often an interval should hold."""
    examples: int = Field(default=8, ge=0)
    """Prompts whose answers are shown side by side, evenly from the most improved to the most worsened."""

    token_budget: int = Field(default=8192, gt=0)
    """Most tokens in one forward pass over finished answers."""
    max_rows: int = Field(default=256, ge=1)
    """Most answers that are generated together."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto` takes an accelerator where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision to load the models in; divergences of a few hundredths need float32."""
    trust_remote_code: bool = False
    """Let code in the models' folders run."""

    output: Path = Path("runs/policy-evaluation")
    """Folder of `report.html`, `report.json`, the CSV tables, the plots and all answers with their rewards."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluatePolicyConfig":
        names = [name for name, _ in self.named_policies()]
        rewards = [*(name for name, _ in self.named_rewards()), *self.sums]
        for key, given in (("policies", names), ("rewards", rewards)):
            if repeated := sorted({name for name in given if given.count(name) > 1}):
                raise ValueError(f"{key}: two are called {repeated[0]!r}; tell them apart with name=…")
        if START in names:
            raise ValueError(f"policies: {START!r} is the name of the starting model; call the policy something else")
        for name, part in self.sums.items():
            used = [part.normalise, *(inner.normalise for inner in part.parts.values())]
            changing = [normalisation for normalisation in used if normalisation not in ("none", "stored")]
            if changing:
                raise ValueError(
                    f"sums: {name!r} is normalised by {changing[0]!r}, which makes the rewards of different models "
                    "alike; leave it out to compare them"
                )
        return self

    def named_policies(self) -> list[tuple[str, str]]:
        """`(name, folder or file)` of every policy."""
        return [named_source(source) for source in self.policies]

    def named_rewards(self) -> list[tuple[str, str]]:
        """`(name, reward as it is written)` of every reward of `rewards`.

        Raises:
            ValueError: for one without a name.
        """
        found = []
        for text in self.rewards:
            name, given, reward = text.partition("=")
            if not (given and name and reward) or "/" in name:
                raise ValueError(f"rewards: {text!r} has no name; write name=REWARD, for example proxy={text}")
            found.append((name, reward))
        return found
