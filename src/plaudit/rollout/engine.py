"""Engines: whatever takes new weights and prompts and gives back token ids with their log-probabilities."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from plaudit.configs.generation import SamplingConfig
from plaudit.models.causal_lm import CausalLM
from plaudit.models.policy import LanguagePolicy
from plaudit.models.states import unwrap
from plaudit.rollout.generate import GenerationResult, generate


class Engine(Protocol):
    """A way to generate for training: in this process, or by a server that holds a copy of the policy."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take new weights by their names in the transformers model; those that are not named stay."""

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int = 1,
        sampling: SamplingConfig | None = None,
        end_token_ids: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> GenerationResult:
        """Answer prompts given as token ids; see `plaudit.rollout.generate.generate`."""


class InProcessEngine:
    """Generation by a model of this process.

    Given the policy's own model, new weights are there as soon as they are trained. Given a copy, `load_weights` brings
    them, as it would to a server.

    Attributes:
        model: what generates.
    """

    def __init__(self, model: CausalLM, *, max_rows: int = 256) -> None:
        """Generate with `model`, at most `max_rows` rows in one forward."""
        self.model = model
        self._max_rows = max_rows

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy weights into the model.

        Args:
            weights: names in the transformers model (under its adapters) and tensors of the same shapes.

        Raises:
            ValueError: for a name that the model does not have, or a wrong shape.
        """
        own = unwrap(self.model.model).state_dict(keep_vars=True)
        for name, tensor in weights:
            if name not in own:
                raise ValueError(f"the model has no weight {name!r}")
            if own[name].shape != tensor.shape:
                raise ValueError(
                    f"{name} is {tuple(own[name].shape)} here and {tuple(tensor.shape)} among the new ones"
                )
            own[name].data.copy_(tensor)

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int = 1,
        sampling: SamplingConfig | None = None,
        end_token_ids: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> GenerationResult:
        """Answer prompts given as token ids; see `plaudit.rollout.generate.generate`."""
        return generate(
            self.model,
            self.model.tokenizer,
            prompt_ids,
            samples_per_prompt=samples_per_prompt,
            sampling=sampling,
            end_token_ids=end_token_ids,
            generator=generator,
            max_rows=self._max_rows,
        )


def require_plain_policy(policy: LanguagePolicy, *, workers: bool = False) -> None:
    """See that an engine can hold a policy.

    Raises:
        ValueError: with workers that sample too, adapters, styles or goals, which an engine knows nothing of.
    """
    adapters = unwrap(policy.language_model.model) is not policy.language_model.model
    for name, there in (
        ("asynchronous", workers),
        ("LoRA", adapters),
        ("styles or goals", policy.language_model.steering is not None),
    ):
        if there:
            raise ValueError(f"{name}: an engine takes the whole weights of a plain policy; leave one of the two out")
