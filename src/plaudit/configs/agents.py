"""Every agent that `plaudit gym` can train, and every algorithm of `plaudit align`, as unions told apart by `name`.

A family has a configuration in a file of its own whose `name` is a `Literal` of its names, and joins the union here.
"""

from typing import Annotated

from pydantic import Field

from plaudit.configs.a3c import A3CConfig
from plaudit.configs.acer import AcerConfig, AcerTextConfig
from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.configs.dyna import DynaConfig
from plaudit.configs.feudal import FeudalConfig, FeudalTextConfig
from plaudit.configs.option_critic import OptionCriticConfig, StyledConfig
from plaudit.configs.policy_gradient import PolicyGradientConfig
from plaudit.configs.q_learning import QLearningConfig, SoftQConfig
from plaudit.configs.world_model import WorldModelConfig

AgentConfig = Annotated[
    PolicyGradientConfig
    | QLearningConfig
    | DynaConfig
    | AcerConfig
    | A3CConfig
    | OptionCriticConfig
    | FeudalConfig
    | WorldModelConfig,
    Field(discriminator="name"),
]
"""What learns in environments; `plaudit.algorithms.agents` makes it."""

AlignAlgorithm = Annotated[
    AlgorithmConfig | AcerTextConfig | SoftQConfig | StyledConfig | FeudalTextConfig, Field(discriminator="name")
]
"""What improves a language model in `plaudit align`; `plaudit.algorithms.build` makes it. A member has the properties
of `AlgorithmConfig` that `AlignConfig` reads: `needs_critic`, `needs_groups`, `passes`, `least_prompts`."""
