"""Training a reward model from what people preferred."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from plaudit.configs.data import DataConfig
from plaudit.configs.model import RewardModelConfig
from plaudit.configs.training import TrainingConfig

PAIR_LOSSES = ("auto", "pairwise", "davidson", "rao_kupper")


class RewardTrainingConfig(TrainingConfig):
    """Train a reward model from comparisons: rankings, picks, votes, scores, labels or ratings."""

    model: RewardModelConfig
    """The backbone, the aggregation and the head."""

    demonstrations: tuple[str | DataConfig, ...] = ()
    """Completions that people wrote; after training their scores average 0. Without them the training completions'."""

    loss: Literal[
        "auto",
        "best_of_k",
        "votes",
        "pairwise",
        "plackett_luce",
        "davidson",
        "rao_kupper",
        "regression",
        "classification",
    ] = "auto"
    """`auto` goes by each record's judgement: rankings and scores `pairwise` (one completion alone: `regression`),
    picks `best_of_k`, votes `votes`, labels `classification`, ratings `regression`. Any other name holds for all."""
    head_start: Literal["random", "fitted"] = "random"
    """Where the head starts: drawn (see `model.initial_spread`), or `fitted`, at its best on the untouched backbone, by
    one forward pass over the training data and a convex fit whose ridge is chosen by cross-fitting. Calmer and often
    better where judgements are few (Kumar et al. 2022)."""
    margin: Literal["none", "record", "constant", "scores"] = "none"
    """What is demanded beyond winning a pair: nothing, the record's own margin, `margin_size`, or `margin_size` times
    the gap between the people's scores."""
    margin_size: float = Field(default=1.0, ge=0)
    """The constant margin, or the factor on score gaps."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a pair was judged the wrong way round: pairs only."""
    tie_threshold: float = Field(default=0.0, ge=0)
    """Scores that differ by less than this count as tied; 0 ties only equal ones."""
    top: int | None = Field(default=None, gt=0)
    """`plackett_luce` reads only the first `top` places of a ranking."""
    centring: float = Field(default=0.0, ge=0)
    """Weight of the mean squared score, which keeps scores near 0 (Eisenstein et al. 2023 use 0.01)."""
    shuffled_pairs: bool = False
    """Each pair of a ranking becomes a batch element of its own, shuffled among the others, with the prompt's weight
    shared among its pairs. The way InstructGPT warns against: for comparison only."""
    stop_on: Literal["auto", "log_loss", "loss"] = "auto"
    """The held-out value that patience and the best checkpoint go by: the Bradley-Terry `log_loss` of pairs, or the
    training `loss`. `auto` takes `log_loss` where there are judged pairs and the loss is not an absolute one."""
    normalise: bool = True
    """Shift scores after training so that demonstrations average 0; never done for absolute losses."""

    output: Path = Path("runs/reward")
    """Folder of the run: `model/`, `checkpoints/`, `metrics.jsonl`, `configuration.yaml`, `result.json`."""

    @model_validator(mode="after")
    def _check_reward(self) -> "RewardTrainingConfig":
        pair_loss = self.loss in PAIR_LOSSES
        if self.margin != "none" and not pair_loss:
            raise ValueError(f"margin: {self.margin} has no meaning for loss: {self.loss}; it belongs to pairs")
        if self.margin != "none" and self.loss in ("davidson", "rao_kupper"):
            raise ValueError(f"margin: {self.margin} cannot be combined with the tie model {self.loss}")
        if self.label_smoothing and self.loss not in ("auto", "pairwise"):
            raise ValueError(f"label_smoothing: {self.label_smoothing} has no meaning for loss: {self.loss}")
        if self.shuffled_pairs and self.loss not in ("auto", "pairwise"):
            raise ValueError(f"shuffled_pairs needs loss: pairwise, not {self.loss}")
        if self.top is not None and self.loss != "plackett_luce":
            raise ValueError(f"top: {self.top} is an option of loss: plackett_luce, not of {self.loss}")
        if self.loss in ("auto", "regression", "classification") or not self.model.attributes:
            return self
        raise ValueError(f"loss: {self.loss} compares one score; a model with attributes needs regression or auto")
