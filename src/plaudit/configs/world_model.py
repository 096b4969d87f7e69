"""World model: learn a world from play, then learn to act in dreams of it."""

from typing import Literal

from pydantic import Field, model_validator

from plaudit.configs.base import Config, refuse_unused


class WorldModelConfig(Config):
    """A mixture-density LSTM over codes of observations, and a controller that is trained in its dreams alone."""

    name: Literal["world_model"] = "world_model"
    """`world_model` learns to imagine the environment and a controller inside it."""
    rounds: int = Field(default=1, gt=0)
    """How often world and controller are learned, each time from all play so far. In the first round play is a mix of
    random controllers and chance; in later ones every other batch of steps is the controller's."""
    environments: int = Field(default=8, gt=0)
    """Environments that are played side by side."""

    encoder: Literal["plain", "variational"] = "plain"
    """What the world is learned over: standardised observations, or the code of a variational autoencoder."""
    picture: tuple[int, int, int] | None = None
    """`(height, width, channels)` where observations are pictures; they are then encoded by convolutions."""
    pixel_scale: float = Field(default=255.0, gt=0)
    """What pixels are divided by."""
    code_size: int = Field(default=16, gt=0)
    """Size of the variational code."""
    encoder_epochs: int = Field(default=20, gt=0)
    """Passes over the observations when the autoencoder is learned."""
    observation_noise: float = Field(default=0.1, gt=0)
    """`s`, the deviation of an observation around its reconstruction: smaller keeps more detail in the code."""

    hidden_size: int = Field(default=32, gt=0)
    """Size of the LSTM's memory."""
    components: int = Field(default=5, gt=0)
    """Gaussians in the mixture."""
    segment: int = Field(default=64, gt=0)
    """Steps of a row that the dynamics are learned on; each begins without a memory."""
    epochs: int = Field(default=60, gt=0)
    """Passes over the play when the dynamics are learned."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak rate of Adam for encoder and dynamics; it falls to 0 along half a cosine."""

    controller: Literal["cma", "policy_gradient"] = "cma"
    """A linear controller by the evolution strategy CMA-ES (extra `world`), or PPO in dreams for a small network."""
    generations: int = Field(default=40, gt=0)
    """Generations of the evolution strategy, or batches of dreams for PPO."""
    population: int = Field(default=32, gt=3)
    """Controllers in a generation."""
    dreams: int = Field(default=16, gt=0)
    """Dreams by which each controller is judged; PPO takes `population * dreams` in a batch."""
    horizon: int = Field(default=300, gt=0)
    """Most steps of a dream."""
    temperature: float = Field(default=1.0, ge=0)
    """`τ`: above 1 dreams are less certain than the world seemed, so that a controller cannot live on their faults."""
    initial_spread: float = Field(default=0.5, gt=0)
    """`σ` with which the evolution strategy begins."""
    discount: float = Field(default=0.99, ge=0, le=1)
    """`γ` of PPO in dreams; the evolution strategy goes by the undiscounted return."""

    @model_validator(mode="after")
    def _check_world(self) -> "WorldModelConfig":
        if self.picture is not None and self.encoder == "plain":
            raise ValueError("picture: pixels are no state to predict one by one; use encoder: variational")
        if self.picture is not None and min(self.picture) < 1:
            raise ValueError(f"picture: height, width and channels must be at least 1, got {list(self.picture)}")
        if self.encoder == "plain":
            refuse_unused(
                self, ("code_size", "encoder_epochs", "observation_noise"), "has no effect with encoder: plain"
            )
        if self.picture is None:
            refuse_unused(self, ("pixel_scale",), "is for pictures: give picture, or leave it out")
        if self.controller != "cma":
            refuse_unused(self, ("initial_spread",), "is for controller: cma")
        else:
            refuse_unused(self, ("discount",), "is for controller: policy_gradient; cma goes by the whole return")
        return self
