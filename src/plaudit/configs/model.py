"""What a reward model is made of."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from plaudit.configs.base import Config

Aggregation = Literal["auto", "last", "mean", "sum", "weighted_sum", "discounted_sum", "attention", "transformer"]

AttentionImplementation = Literal["auto", "packed", "padded", "blocks", "flash_attn", "flex", "reference", "varlen"]


class LoraConfig(Config):
    """Low-rank adapters on the backbone (needs the `lora` extra); the reward head is trained in full beside them."""

    rank: int = Field(default=8, ge=1)
    """Rank of each adapter."""

    alpha: float = Field(default=16.0, gt=0)
    """Scale: an adapter adds `alpha / rank · B A` to its layer."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""

    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get an adapter, or every linear layer."""


class RewardModelConfig(Config):
    """A backbone, how its token states become one vector, and the reward head on top."""

    backbone: str | None = None
    """Name or folder of a causal language model or encoder to start from; None starts from random weights."""

    model_type: str | None = None
    """Architecture for random weights, by its transformers name, e.g. `llama` or `bert`."""

    backbone_config: dict[str, Any] | None = None
    """Sizes for random weights, the keys of that architecture's transformers configuration."""

    backbone_layers: int | None = Field(default=None, ge=1)
    """Keep only the first layers of a pretrained backbone: faster, and where the last layers are made for another task
    (sentence encoders) a middle layer often says more. None keeps all."""

    frozen_layers: int | None = Field(default=None, ge=0)
    """Keep the embeddings and this many first layers of a pretrained backbone as they are, and train the others. Where
    judgements are few, less is forgotten, and a step costs less. None trains all."""

    read_layers: tuple[int, ...] | Literal["all"] | None = None
    """Whose states the aggregation reads, side by side, so that the head weighs them: numbers of layers (0 is the
    embeddings), or `all`. None reads the last layer alone. Where judgements are few, a fitted head on several layers
    of an encoder knows more than one on any of them (see the study on real data)."""

    tokenizer: str | None = None
    """Name or folder of the tokenizer; None takes the backbone's own."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the backbone's weights; the head is always float32."""

    attn_implementation: AttentionImplementation = "auto"
    """`packed` processes a shared prompt once and never pads; `padded` is plain rows with the same numbers; `auto`
    packs the architectures that are known to be right and pass the probe. A packed backend may be named too: `blocks`,
    `varlen`, `flash_attn`, `flex`, `reference`; unnamed, the fastest that works on the device is taken."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Every dropout probability of the backbone."""

    aggregation: Aggregation = "auto"
    """How token states become one vector; `auto` is `last` for decoders and `mean` for encoders."""

    aggregate_over: Literal["completion", "text"] = "completion"
    """Whether the aggregation reads the completion's tokens alone or the prompt's as well."""

    discount: float = Field(default=0.99, gt=0, le=1)
    """Weight `γ^t` of the t-th token in a `discounted_sum`."""

    attributes: tuple[str, ...] = ()
    """Names of several outputs; empty is one output."""

    attribute_weights: tuple[float, ...] | None = None
    """Weight of each attribute in the total; None weighs them equally, `1/A` each."""

    initial_spread: float = Field(default=1.0, ge=0)
    """Standard deviation of a fresh head's first scores. 1 is the published choice; where judgements are few, a head
    that starts at 0 has no noise to unlearn (see the study on real data)."""

    lora: LoraConfig | None = None
    """Train adapters instead of the whole backbone."""

    trust_remote_code: bool = False
    """Whether code that comes with a backbone may run on this machine."""

    max_length: int | None = Field(default=None, ge=2)
    """Longest text in tokens; None takes what the backbone and its tokenizer allow."""

    too_long: Literal["refuse", "truncate_prompt", "truncate"] = "refuse"
    """What happens to longer texts: refused; the prompt loses tokens from its left; or (`truncate`) answers that do not
    fit beside a quarter of `max_length` for the prompt lose tokens from their right as well. All of it is counted."""

    template: Literal["auto", "chat", "plain", "raw"] = "auto"
    """How a conversation becomes text: the tokenizer's chat template where it has one, else the plain one. An encoder
    reads prompt and answer as a pair of texts with `auto`, and as one text with `plain` or `raw`, which suits sentence
    encoders: they were never shown pairs."""

    seed: int = 0
    """Seed of the head, of the aggregation and of random backbones."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if (self.backbone is None) == (self.model_type is None):
            raise ValueError("give either backbone (pretrained) or model_type (random weights), not both or neither")
        if self.backbone is not None and self.backbone_config is not None:
            raise ValueError("backbone_config is for random weights; a pretrained backbone brings its own")
        layers = self.read_layers
        if isinstance(layers, tuple) and (not layers or min(layers) < 0 or len(set(layers)) < len(layers)):
            raise ValueError(f"read_layers {layers}: name each layer once, from 0 (the embeddings) on")
        if self.backbone_layers is not None and (self.backbone is None or self.lora is not None):
            raise ValueError("backbone_layers cuts a pretrained backbone that is trained in full; leave it out here")
        if self.frozen_layers is not None and (self.backbone is None or self.lora is not None):
            raise ValueError("frozen_layers keeps layers of a pretrained backbone without adapters; leave it out here")
        if self.model_type is not None and self.tokenizer is None:
            raise ValueError(f"model_type {self.model_type!r} starts from random weights: name a tokenizer as well")
        if len(set(self.attributes)) != len(self.attributes):
            raise ValueError(f"attributes {self.attributes} repeat a name")
        if self.attribute_weights is not None and len(self.attribute_weights) != len(self.attributes):
            raise ValueError(f"{len(self.attribute_weights)} attribute_weights for {len(self.attributes)} attributes")
        if self.aggregation == "last" and self.aggregate_over == "text":
            raise ValueError("aggregation `last` always reads the completion's last token; leave out aggregate_over")
        return self
