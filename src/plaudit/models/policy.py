"""The policy: a causal language model with an optional critic, evaluated over packed samples; and its reference."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plaudit.core.entropy import logprobs_and_entropy
from plaudit.core.layout import PackedBatch
from plaudit.core.logprobs import token_logprobs
from plaudit.models.aggregation import TokenSpans, token_spans
from plaudit.models.causal_lm import CausalLM
from plaudit.models.checkpointing import checkpoint_in_evaluation, enable_checkpointing
from plaudit.models.probe import choose_path
from plaudit.models.reward_model import RewardModel
from plaudit.models.states import packed_states, padded_states, unwrap

CriticKind = Literal["none", "separate", "shared"]


@dataclass(frozen=True)
class PolicyOutput:
    """What a policy says of the `M` completion tokens of a packed batch, in the order of the row.

    Attributes:
        logprobs: `[M]` float32, log-probability of each token under the policy at the temperature.
        entropy: `[M]` float32, entropy of the distribution that the token was chosen from.
        values: `[M]` float32, the critic's value of the state before each token; None without a critic.
        spans: which completion (`owner`) and step each entry is; `to_steps` makes tables `[C, T]` of them.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None
    spans: TokenSpans


def to_steps(entries: Tensor, spans: TokenSpans, fill: float = 0.0) -> Tensor:
    """Entries `[M]` of completion tokens as a table `[C, T]`, `T` the longest completion; differentiable."""
    table = entries.new_full((spans.lengths.shape[0], int(spans.lengths.max())), fill)
    return table.index_put((spans.owner, spans.step), entries)


def from_steps(table: Tensor, spans: TokenSpans) -> Tensor:
    """The entries `[M]` of a table `[C, T]`; the inverse of `to_steps`."""
    return table[spans.owner, spans.step]


def steps_mask(spans: TokenSpans) -> Tensor:
    """`[C, T]` bool, True on the steps that a completion has."""
    column = torch.arange(int(spans.lengths.max()), device=spans.lengths.device)
    return column < spans.lengths[:, None]


class Critic(nn.Module):
    """`V(s) = w · h(s) + b` over token states: of a backbone of its own, or of the policy's.

    Attributes:
        backbone: the critic's own base model; None where it reads the policy's states.
        head: `w` and `b`, float32, zero at first: the first values are 0. With more than one output there is a value
            for each token that may follow.
        packed: whether its own backbone's forwards are packed.
    """

    def __init__(
        self, hidden_size: int, backbone: nn.Module | None = None, *, packed: bool = True, outputs: int = 1
    ) -> None:
        """Put a zero head on a backbone, or on states that are handed in."""
        super().__init__()
        self.backbone = backbone
        self.packed = packed
        device = None if backbone is None else next(backbone.parameters()).device
        self.head = nn.Linear(hidden_size, outputs, device=device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_policy(cls, policy: CausalLM, *, outputs: int = 1) -> "Critic":
        """A separate critic whose backbone is a copy of the policy's; adapters are merged into the copy."""
        plain = _merged_copy(policy.model)
        critic = cls(_hidden_size(plain), plain.base_model, packed=policy.packed, outputs=outputs)
        return critic.requires_grad_(True)

    @classmethod
    def of_actions(cls, policy: CausalLM, *, shared: bool) -> "Critic":
        """A critic with a value for every token, on the policy's states or on a copy of its backbone."""
        outputs = policy.head[0].shape[0]
        if not shared:
            return cls.from_policy(policy, outputs=outputs)
        return cls(_hidden_size(unwrap(policy.model)), outputs=outputs).to(_device(policy))

    @classmethod
    def from_reward_model(cls, reward_model: RewardModel) -> "Critic":
        """A separate critic whose backbone is a copy of the reward model's (Stiennon et al. 2020, appendix B.1).

        Raises:
            ValueError: if the reward model is an encoder: it has no state of a text's beginning alone.
        """
        if not reward_model.causal:
            raise ValueError("a critic reads a text up to each token; this reward model is an encoder: use a decoder")
        backbone: Any = _merged_copy(reward_model.backbone)
        if hasattr(backbone, "score"):
            backbone = backbone.base_model
        packed = choose_path(backbone, causal=True, wanted="auto" if reward_model.packed else "padded")
        critic = cls(_hidden_size(backbone), backbone, packed=packed)
        return critic.requires_grad_(True)

    def states(self, batch: PackedBatch) -> Tensor:
        """`[N, H]` states of its own backbone."""
        if self.backbone is None:
            raise ValueError("this critic has no backbone of its own; hand it the policy's states")
        return (packed_states if self.packed else padded_states)(self.backbone, batch)

    def forward(self, states: Tensor) -> Tensor:
        """States `[M, H]` to values `[M]` (`[M, A]` with A > 1 outputs) in float32, also under autocast."""
        with torch.autocast(states.device.type, enabled=False):
            values: Tensor = self.head(states.float())
        return values.squeeze(-1) if self.head.out_features == 1 else values


class LanguagePolicy(nn.Module):
    """A causal language model to be aligned, with an optional critic.

    Attributes:
        language_model: the policy proper; `plaudit.rollout.generate` samples from it.
        critic: the value estimate, or None.
        action_values: a critic with a value for each token that may follow, or None.
    """

    action_values: Critic | None

    def __init__(self, language_model: CausalLM, critic: Critic | None = None) -> None:
        """Put policy and critic together.

        Args:
            language_model: the model to be aligned.
            critic: a separate critic; one without a backbone reads the language model's states.

        Raises:
            ValueError: if the critic's head does not fit the states that it reads, or its vocabulary the policy's.
        """
        super().__init__()
        self.language_model = language_model
        self.critic = critic
        self.action_values = None
        if critic is None:
            return
        if critic.backbone is None:
            width = _hidden_size(unwrap(language_model.model))
        else:
            width = _hidden_size(unwrap(critic.backbone))
            rows = unwrap(critic.backbone).get_input_embeddings().weight.shape[0]  # type: ignore[operator]
            if rows < len(language_model.tokenizer):
                raise ValueError(
                    f"the critic's backbone has {rows} tokens, the policy's tokenizer {len(language_model.tokenizer)}; "
                    "a critic reads the policy's tokens: start it from the policy instead"
                )
        if critic.head.in_features != width:
            raise ValueError(f"the critic's head reads {critic.head.in_features} features, its states have {width}")

    @classmethod
    def build(
        cls, language_model: CausalLM, *, critic: CriticKind = "none", reward_model: RewardModel | None = None
    ) -> "LanguagePolicy":
        """A policy with the wanted kind of critic, its head zero.

        Args:
            language_model: the model to be aligned.
            critic: `none`, `separate` or `shared` (a head on the policy's own states).
            reward_model: starts a separate critic; None starts it from the policy.

        Raises:
            ValueError: if a reward model is given for another kind, reads other tokens, or is an encoder.
        """
        if reward_model is not None and critic != "separate":
            raise ValueError(f"a reward model starts a separate critic, not {critic!r}")
        if critic == "none":
            return cls(language_model)
        if critic == "shared":
            return cls(language_model, Critic(_hidden_size(unwrap(language_model.model))).to(_device(language_model)))
        if reward_model is None:
            return cls(language_model, Critic.from_policy(language_model))
        if reward_model.tokenizer.get_vocab() != language_model.tokenizer.get_vocab():
            raise ValueError(
                "the reward model's tokenizer is not the policy's, so its backbone cannot read the policy's tokens; "
                "start the critic from the policy"
            )
        return cls(language_model, Critic.from_reward_model(reward_model))

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations of policy and critic in the backward pass; in evaluation mode too, where they learn.

        Raises:
            ValueError: see `plaudit.models.checkpointing.checkpoint_in_evaluation`.
        """
        critics = [critic for critic in (self.critic, self.action_values) if critic is not None]
        backbones = [self.language_model.model, *(each.backbone for each in critics if each.backbone is not None)]
        for backbone in backbones:
            enable_checkpointing(backbone)
            checkpoint_in_evaluation(backbone)

    def evaluate(self, batch: PackedBatch, temperature: float = 1.0) -> PolicyOutput:
        """Log-probabilities, entropies and values of every completion token, differentiable.

        A prompt's tokens go through the network once for all its completions; logits exist one chunk at a time. The
        state that predicts a token (the prompt's last one for a completion's first token) also gives its value. A token
        that nothing predicts (the first one after an empty prompt) gets 0 everywhere.

        Args:
            batch: `N` tokens, `C` completions.
            temperature: the one that the tokens were drawn at.

        Returns:
            Entries for the `M` completion tokens.
        """
        spans = token_spans(batch.layout)
        predictors = batch.layout.predictor_index[spans.places]
        predicted = predictors >= 0
        states = self.language_model(batch)
        logprobs, entropy = _terms(self.language_model, states, batch, spans, temperature)
        values = None
        if self.critic is not None:
            seen = states if self.critic.backbone is None else self.critic.states(batch)
            if self.critic.backbone is None and self.language_model.logit_scale != 1.0:
                seen = seen / self.language_model.logit_scale
            values = _spread(self.critic(seen[predictors[predicted]]), predicted)
        return PolicyOutput(logprobs, entropy, values, spans)

    def values(self, batch: PackedBatch) -> Tensor:
        """The critic's values alone, `[M]`; a separate critic's forward without the policy's.

        A shared critic reads the policy's states without a gradient into them: its head alone learns from this.

        Raises:
            ValueError: without a critic.
        """
        if self.critic is None:
            raise ValueError("this policy has no critic; build it with critic='separate' or 'shared'")
        spans = token_spans(batch.layout)
        predictors = batch.layout.predictor_index[spans.places]
        predicted = predictors >= 0
        if self.critic.backbone is None:
            with torch.no_grad():
                seen = self.language_model(batch) / self.language_model.logit_scale
        else:
            seen = self.critic.states(batch)
        return _spread(self.critic(seen[predictors[predicted]]), predicted)


class ReferencePolicy(nn.Module):
    """The frozen starting point: a copy of the language model, or the base under its adapters.

    Attributes:
        copied: whether it holds weights of its own.
    """

    def __init__(self, language_model: CausalLM) -> None:
        """Freeze what the model is now.

        With adapters nothing is copied: the reference is the model with its adapters switched off, which is where
        adapters start. Otherwise the weights are copied, without gradients.

        Args:
            language_model: the policy's model, before its first update.
        """
        super().__init__()
        adapters = unwrap(language_model.model) is not language_model.model
        self.copied = not adapters
        # Adapters stay the policy's: held in a closure, so that they are not saved or moved a second time.
        self._model: Callable[[], CausalLM] = lambda: language_model
        if self.copied:
            frozen = copy.deepcopy(language_model).requires_grad_(False).eval()
            self.frozen = frozen
            self._model = lambda: self.frozen

    def train(self, mode: bool = True) -> "ReferencePolicy":
        """A reference is always in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
        """Log-probability of every completion token under the reference: `[M]`, as `LanguagePolicy.evaluate` orders it.

        Args:
            batch: `N` tokens, `C` completions.
            temperature: the policy's, so that the two are compared at the same one.
        """
        places = token_spans(batch.layout).places
        predictors = batch.layout.predictor_index[places]
        predicted = predictors >= 0
        with self.opened() as model:
            weight, bias, softcap = model.head
            found = token_logprobs(
                model(batch)[predictors[predicted]],
                weight,
                batch.input_ids[places[predicted]],
                bias=bias,
                temperature=temperature,
                softcap=softcap,
            )
        return _spread(found, predicted)

    @contextmanager
    def opened(self) -> Iterator[CausalLM]:
        """The language model as it was at first, for as long as the context lasts."""
        model = self._model()
        if self.copied:
            yield model
            return
        adapted: Any = model.model
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with adapted.disable_adapter():
                yield model
        finally:
            for module in training:
                module.training = True


def _terms(
    model: CausalLM,
    states: Tensor,
    batch: PackedBatch,
    spans: TokenSpans,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies `[M]` from the model's states `[N, H]`."""
    predictors = batch.layout.predictor_index[spans.places]
    predicted = predictors >= 0
    weight, bias, softcap = model.head
    if model.steering is not None:
        if not bool(predicted.all()):
            raise ValueError("styles and goals are chosen at a prompt's last token, so no prompt may be empty")
        return model.steering.terms(
            states[predictors],
            batch.input_ids[predictors],
            batch.input_ids[spans.places],
            spans,
            head=model.head,
            temperature=temperature,
        )
    found = logprobs_and_entropy(
        states[predictors[predicted]],
        weight,
        batch.input_ids[spans.places[predicted]],
        bias=bias,
        temperature=temperature,
        softcap=softcap,
    )
    return _spread(found[0], predicted), _spread(found[1], predicted)


def _spread(entries: Tensor, predicted: Tensor) -> Tensor:
    """Entries of the predicted tokens among all `[M]`, 0 elsewhere."""
    return entries.new_zeros(predicted.shape[0]).masked_scatter(predicted, entries)


def _merged_copy(model: nn.Module) -> Any:
    """A transformers model of its own, adapters added into the weights."""
    copied: Any = copy.deepcopy(model)
    return copied if unwrap(copied) is copied else copied.merge_and_unload()


def _hidden_size(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
