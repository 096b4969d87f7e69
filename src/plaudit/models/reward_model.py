"""The reward model: a backbone, an aggregation of its token states, and a linear reward head."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plaudit.configs.model import RewardModelConfig
from plaudit.core.layout import PackedBatch
from plaudit.data.packing import unpack_rows
from plaudit.data.records import Prompt
from plaudit.data.tokenising import TextTokeniser
from plaudit.models.aggregation import build_aggregation
from plaudit.models.backbone import backbone_from_config, is_causal, load_tokenizer, longest_text
from plaudit.models.checkpointing import disable_checkpointing, enable_checkpointing
from plaudit.models.heads import initialise_head
from plaudit.models.probe import backend_name, choose_path
from plaudit.models.scoring import score_groups
from plaudit.models.states import packed_states, padded_states, row_arguments, unwrap

NATIVE = "native"
"""The aggregation of models by others whose own classification head reads the states."""


@dataclass(frozen=True)
class ScoreResult:
    """The scores of one prompt's `K` completions; raw and normalised stand side by side, so neither is mistaken.

    Attributes:
        raw: `[K]` float32 on the CPU, `W·agg(h) + b`, the weighted total where there are several attributes.
        normalised: `[K]`, raw minus the stored mean: 0 is an average demonstration; differences stay log-odds.
        attributes: `[K, A]` raw score per attribute; None with one output.
    """

    raw: Tensor
    normalised: Tensor
    attributes: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RewardModelParts:
    """What a reward model is, apart from its weights; saved in `plaudit.json`.

    Attributes:
        aggregation: name of the aggregation; `native` for a classification model that brings its own.
        aggregate_over: `completion` or `text`.
        discount: `γ` of a discounted sum.
        attributes: names of several outputs; empty is one output.
        attribute_weights: their weights in the total.
        read_layers: whose states are read, side by side (0 is the embeddings); empty is the last layer.
        max_length: most tokens of a text.
        attn_implementation: `auto`, `packed`, `padded` or a packed backend's name.
        backbone_name: where the backbone came from; None for random weights.
        template: which template the tokeniser uses, see `plaudit.data.tokenising.TextTokeniser`.
        too_long: its policy for texts that are too long.
    """

    aggregation: str
    aggregate_over: str = "completion"
    discount: float = 0.99
    attributes: tuple[str, ...] = ()
    attribute_weights: tuple[float, ...] = ()
    read_layers: tuple[int, ...] = ()
    max_length: int
    attn_implementation: str = "auto"
    backbone_name: str | None = None
    template: str = "auto"
    too_long: str = "refuse"


class RewardModel(nn.Module):
    """`r(x, y) = W · agg(h_1 … h_T) + b`: one score per completion, or one per completion and attribute.

    Attributes:
        backbone: the transformers base model, possibly with adapters.
        aggregation: the module that turns token states into one vector per completion, float32.
        head: `W` and `b`, float32.
        tokenizer: the backbone's tokenizer, with a pad token that is not its end token.
        parts: what it is made of.
        causal: True for decoders.
        packed: whether forwards are packed; otherwise padded rows with the same numbers.
        normalisation_mean: `[max(A, 1)]` mean raw score that `normalised` subtracts.
        normalisation_std: `[max(A, 1)]` standard deviation that was seen with it; stored, not applied.
        is_normalised: whether `set_normalisation` was called; a bool tensor, so that checkpoints carry it.
    """

    normalisation_mean: Tensor
    normalisation_std: Tensor
    is_normalised: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: Any,
        parts: RewardModelParts,
        *,
        packed: bool | None = None,
        seed: int = 0,
        initialise: bool = True,
    ) -> None:
        """Put the parts together and initialise the head (see `plaudit.models.heads.initialise_head`).

        Args:
            backbone: a transformers base model.
            tokenizer: its tokenizer.
            parts: what to build on top.
            packed: True or False where the path is already known; None decides by `parts.attn_implementation`.
            seed: seed of the aggregation's and the head's weights; the global generator is left as it was.
            initialise: False where the head's weights are loaded right after.

        Raises:
            ValueError: if the aggregation is unknown, or packing was asked for and is not possible.
        """
        super().__init__()
        config: Any = unwrap(backbone).config
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.parts = parts
        self.causal = is_causal(config)
        wanted = parts.attn_implementation
        self.packed = choose_path(backbone, causal=self.causal, wanted=wanted) if packed is None else packed
        self.text_tokeniser = TextTokeniser(
            tokenizer,
            causal=self.causal,
            max_length=parts.max_length,
            too_long=parts.too_long,  # type: ignore[arg-type]
            template=parts.template,  # type: ignore[arg-type]
        )
        text: Any = config.get_text_config()
        deepest = max(parts.read_layers, default=0)
        if deepest > text.num_hidden_layers:
            raise ValueError(f"read_layers: {deepest} asked for, but there are {text.num_hidden_layers} layers")
        hidden_size = int(text.hidden_size) * max(len(parts.read_layers), 1)
        outputs = self.num_outputs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # A native model's own head reads the states; the last token stands in for the unused aggregation.
            name = "last" if parts.aggregation == NATIVE else parts.aggregation
            self.aggregation = build_aggregation(name, hidden_size, over=parts.aggregate_over, discount=parts.discount)
            self.head = nn.Linear(self.aggregation.output_size, outputs)  # type: ignore[arg-type]
        self.head.requires_grad_(parts.aggregation != NATIVE)
        device = next(backbone.parameters()).device
        self.aggregation.to(device)
        self.head.to(device)
        self.register_buffer("normalisation_mean", torch.zeros(outputs, device=device))
        self.register_buffer("normalisation_std", torch.ones(outputs, device=device))
        self.register_buffer("is_normalised", torch.zeros((), dtype=torch.bool, device=device))
        if initialise and parts.aggregation != NATIVE:
            initialise_head(self, seed=seed)

    @classmethod
    def from_backbone(cls, config: RewardModelConfig) -> "RewardModel":
        """A fresh reward model on a pretrained or random backbone.

        Args:
            config: what to build.

        Returns:
            The model, on the CPU, in training mode.

        Raises:
            ValueError: if the backbone's weights are incomplete, or a choice does not suit it.
        """
        tokenizer = load_tokenizer(
            config.tokenizer or config.backbone or "", trust_remote_code=config.trust_remote_code
        )
        backbone = backbone_from_config(config, tokenizer)
        plain: Any = backbone.config
        count = len(config.attributes)
        aggregation = config.aggregation
        if aggregation == "auto":
            aggregation = "last" if is_causal(plain) else "mean"
        layers = config.read_layers or ()
        if layers == "all":
            layers = tuple(range(plain.get_text_config().num_hidden_layers + 1))
        parts = RewardModelParts(
            read_layers=layers,
            aggregation=aggregation,
            aggregate_over=config.aggregate_over,
            discount=config.discount,
            attributes=config.attributes,
            attribute_weights=config.attribute_weights or (1.0 / count,) * count if count else (),
            max_length=config.max_length or longest_text(plain, tokenizer),
            attn_implementation=config.attn_implementation,
            backbone_name=config.backbone,
            template=config.template,
            too_long=config.too_long,
        )
        model = cls(backbone, tokenizer, parts, seed=config.seed)
        with torch.no_grad():
            model.head.weight.mul_(config.initial_spread)
        if config.lora is not None:
            from plaudit.models.lora import add_lora

            add_lora(model, config.lora, seed=config.seed)
        return model

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, dtype: str | None = None, attn_implementation: str | None = None, **options: Any
    ) -> "RewardModel":
        """Open a saved reward model: Plaudit's own folders and those of others; see `plaudit.models.saving.load`."""
        from plaudit.models.saving import load_reward_model

        return load_reward_model(name, dtype=dtype, attn_implementation=attn_implementation, **options)

    def save_pretrained(self, folder: str | Path, **options: Any) -> list[str]:
        """Save into a folder; see `plaudit.models.saving.save`. Returns what a user should be told."""
        from plaudit.models.saving import save_reward_model

        return save_reward_model(self, folder, **options)

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the outputs; empty for one unnamed output."""
        return self.parts.attributes

    @property
    def num_outputs(self) -> int:
        """How many numbers one completion gets: the number of attributes, at least 1."""
        return max(len(self.parts.attributes), 1)

    @property
    def max_length(self) -> int:
        """Most tokens of a text."""
        return self.parts.max_length

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.head.weight.device

    def states(self, batch: PackedBatch) -> Tensor:
        """States of every token: `[N, H]` in the backbone's dtype (`[N, L·H]` of `L` layers), packed or padded."""
        kind, layers = self.text_tokeniser.completion_token_type, self.parts.read_layers
        if self.packed:
            backend = backend_name(self.parts.attn_implementation)
            return packed_states(self.backbone, batch, backend=backend, completion_token_type=kind, layers=layers)
        pad = self.tokenizer.pad_token_id
        return padded_states(self.backbone, batch, pad_id=pad, completion_token_type=kind, layers=layers)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Raw scores in the layout's completion order.

        Args:
            batch: `N` tokens of `C` completions.

        Returns:
            `[C]` float32, or `[C, A]` with attributes.
        """
        if self.parts.aggregation == NATIVE:
            scores = self._native_scores(batch)
        else:
            scores = self.head_scores(self.states(batch), batch)
        return scores if self.attributes else scores.squeeze(-1)

    def _native_scores(self, batch: PackedBatch) -> Tensor:
        rows = unpack_rows(batch, self.tokenizer.pad_token_id)
        arguments = row_arguments(self.backbone, rows, self.text_tokeniser.completion_token_type)
        logits: Tensor = self.backbone(**arguments).logits
        return logits.float()

    def head_scores(self, states: Tensor, batch: PackedBatch) -> Tensor:
        """`W · agg(states) + b` in float32, also under autocast: `[N, H]` to `[C, max(A, 1)]`."""
        with torch.autocast(states.device.type, enabled=False):
            scores: Tensor = self.head(self.aggregation(states.float(), batch.layout))
        return scores

    def total(self, scores: Tensor) -> Tensor:
        """The weighted total over attributes: `[…, A]` to `[…]`; scores of a single output pass as they are."""
        if not self.attributes:
            return scores
        if scores.shape[-1] != len(self.attributes):
            raise ValueError(f"scores of shape {tuple(scores.shape)} for {len(self.attributes)} attributes")
        return scores @ scores.new_tensor(self.parts.attribute_weights)

    def set_normalisation(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        """Store the mean and standard deviation of raw scores that normalised scores refer to.

        Args:
            mean: mean raw score of demonstrations (or training completions), each prompt weighing the same; one
                number per attribute where there are several.
            std: the standard deviation seen with it, positive.

        Raises:
            ValueError: if a number is not finite, a deviation is not positive, or the count is wrong.
        """
        means, stds = (torch.tensor(v, dtype=torch.float32).reshape(-1) for v in (mean, std))
        if means.numel() != self.num_outputs or stds.numel() != self.num_outputs:
            raise ValueError(f"{means.numel()} means and {stds.numel()} deviations for {self.num_outputs} outputs")
        if not (means.isfinite().all() and stds.isfinite().all() and (stds > 0).all()):
            raise ValueError(f"mean {mean} and std {std}: both must be finite and std positive")
        self.normalisation_mean.copy_(means)
        self.normalisation_std.copy_(stds)
        self.is_normalised.fill_(True)

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw scores minus the stored mean (0 where none was set): `[…]`, or `[…, A]` with attributes."""
        mean = self.normalisation_mean.to(raw.device)
        return raw - (mean if self.attributes else mean[0])

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[str]], *, token_budget: int = 8192
    ) -> list[ScoreResult]:
        """Score completions as text, without dropout.

        Args:
            prompts: `P` prompts.
            completions: for each prompt its completions.
            token_budget: most tokens in one forward, padding included; see `plaudit.models.scoring.score_groups`.

        Returns:
            One result per prompt, in order.

        Raises:
            ValueError: if a text is too long (by the tokeniser's policy) or a prompt has no completion.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but completions for {len(completions)}")
        groups = [self.text_tokeniser.group(p, list(c)) for p, c in zip(prompts, completions, strict=True)]
        return [self._result(scores) for scores in score_groups(self, groups, token_budget=token_budget)]

    def _result(self, scores: Tensor) -> ScoreResult:
        return ScoreResult(
            raw=self.total(scores),
            normalised=self.total(self.normalise(scores)),
            attributes=scores if self.attributes else None,
        )

    def probabilities(self, prompt: Prompt, completions: Sequence[str]) -> Tensor:
        """`P(y_i | x) = softmax_i r(x, y_i)` over the given completions: `[K]`; unchanged by shifts."""
        return self.score([prompt], [completions])[0].raw.softmax(-1)

    def gradient_checkpointing_enable(self, *, use_reentrant: bool = False) -> None:
        """Recompute activations in the backward pass instead of keeping them; the gradients are the same."""
        enable_checkpointing(self.backbone, use_reentrant=use_reentrant)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        disable_checkpointing(self.backbone)
