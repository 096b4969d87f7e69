"""Supervised fine-tuning on what people wrote."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from plaudit.configs.base import Config
from plaudit.configs.model import LoraConfig
from plaudit.configs.training import TrainingConfig


class LanguageModelConfig(Config):
    """A causal language model: pretrained by name, or random weights of a given size."""

    backbone: str | None = None
    """Name or folder of a causal language model to start from; None starts from random weights."""
    model_type: str | None = None
    """Architecture for random weights, by its transformers name, e.g. `llama`."""
    backbone_config: dict[str, Any] | None = None
    """Sizes for random weights, the keys of that architecture's transformers configuration."""
    tokenizer: str | None = None
    """Name or folder of the tokenizer; None takes the backbone's own."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""
    attn_implementation: Literal["auto", "packed", "padded"] = "auto"
    """`packed` lays texts end to end without padding; `padded` is plain rows with the same numbers; `auto` packs the
    architectures that are known to be right and pass the probe."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Every dropout probability of the model."""
    lora: LoraConfig | None = None
    """Train adapters instead of the whole model; they are merged into the saved one."""
    trust_remote_code: bool = False
    """Whether code that comes with a model may run on this machine."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest text in tokens; None takes what the model and its tokenizer allow."""
    template: Literal["auto", "chat", "plain", "raw"] = "auto"
    """How a conversation becomes text: the tokenizer's chat template where it has one, else the plain one."""
    too_long: Literal["refuse", "truncate_prompt"] = "refuse"
    """What happens to longer texts: refused, or the prompt loses tokens on the left; a completion is never cut."""
    seed: int = 0
    """Seed of random weights."""

    @model_validator(mode="after")
    def _combinations(self) -> "LanguageModelConfig":
        if (self.backbone is None) == (self.model_type is None):
            raise ValueError("give either backbone (pretrained) or model_type (random weights), not both or neither")
        if self.backbone is not None and self.backbone_config is not None:
            raise ValueError("backbone_config is for random weights; a pretrained backbone brings its own")
        if self.model_type is not None and self.tokenizer is None:
            raise ValueError(f"model_type {self.model_type!r} starts from random weights: name a tokenizer as well")
        return self


class SftConfig(TrainingConfig):
    """Train a language model on demonstrations; only the tokens of the completions count."""

    model: LanguageModelConfig
    """The model to start from."""

    output: Path = Path("runs/sft")
    """Folder of the run: `model/`, `checkpoints/`, `metrics.jsonl`, `configuration.yaml`, `result.json`."""

    @model_validator(mode="after")
    def _check_sft(self) -> "SftConfig":
        if self.optimizer.head_learning_rate is not None:
            raise ValueError("optimizer.head_learning_rate is for reward heads; a language model has none of its own")
        return self
