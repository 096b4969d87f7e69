"""Tabular Dyna: learning from each real step, and from imagined ones between them."""

from typing import Literal

from pydantic import Field, model_validator

from plaudit.configs.base import Config, refuse_unused


class DynaConfig(Config):
    """Dyna-Q, Dyna-Q+ (`bonus` above 0) and prioritised sweeping on discrete observations."""

    name: Literal["dyna"] = "dyna"
    """`dyna` plans with a table of what it has seen, for discrete observations."""
    planning_steps: int = Field(default=10, ge=0)
    """Imagined steps after each real one; 0 is plain Q-learning."""
    planning: Literal["uniform", "prioritised"] = "uniform"
    """Which steps are imagined: any that were seen, or those whose value is most wrong, backwards from a surprise."""
    threshold: float = Field(default=1e-4, ge=0)
    """`prioritised`: an error up to this is not worth imagining."""
    bonus: float = Field(default=0.0, ge=0)
    """`κ` of Dyna-Q+: an imagined reward has `κ √(steps since this was last tried)` added. Finds out when the world has
    changed; 0 is Dyna-Q."""
    learning_rate: float = Field(default=0.1, gt=0, le=1)
    """`α`, how far an action value moves towards its target."""
    discount: float = Field(default=0.95, ge=0, le=1)
    """`γ`."""
    exploration: float = Field(default=0.1, ge=0, le=1)
    """`ε`, share of actions that are drawn at random while learning."""

    @model_validator(mode="after")
    def _check_dyna(self) -> "DynaConfig":
        if self.bonus and self.planning == "prioritised":
            raise ValueError(
                "bonus: time since a step was tried grows everywhere at once, which no queue of priorities follows; "
                "use planning: uniform"
            )
        if self.planning != "prioritised":
            refuse_unused(self, ("threshold",), "is for planning: prioritised")
        if self.bonus and not self.planning_steps:
            raise ValueError("bonus: it is added to imagined rewards, so planning_steps must be at least 1")
        return self
