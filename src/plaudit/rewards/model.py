"""A trained reward model as a reward: text goes in, so its tokenizer may differ from the policy's; it stays frozen."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from plaudit.data.tokenising import TextTooLongError, TokenisedGroup
from plaudit.models.scoring import ADDING, score_groups, score_tokens
from plaudit.rewards.base import Sample, Score, Span, score_values
from plaudit.rewards.spans import token_ends

if TYPE_CHECKING:
    from plaudit.models.reward_model import RewardModel


@dataclass(frozen=True)
class Frozen:
    """A module that is not to change any more, and the hash by which that is checked.

    Attributes:
        module: the module.
        digest: SHA-256 of its weights when it was frozen.
    """

    module: nn.Module
    digest: str

    def check(self) -> None:
        """See that the module is as it was.

        Raises:
            RuntimeError: if a part of it is in training mode, a parameter asks for gradients, or a weight changed.
        """
        training = [name or "the module itself" for name, part in self.module.named_modules() if part.training]
        if training:
            raise RuntimeError(f"a frozen {type(self.module).__name__} is in training mode: {training[0]}")
        loose = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
        if loose:
            raise RuntimeError(f"a frozen {type(self.module).__name__} asks for gradients: {loose[0]}")
        if weights_hash(self.module) != self.digest:
            raise RuntimeError(f"the weights of a frozen {type(self.module).__name__} changed")


def frozen(module: nn.Module) -> Frozen:
    """Put a module into evaluation mode, switch its gradients off, and remember its weights.

    The module is changed in place. What shares its parameters (a policy on the same backbone) is frozen with it.
    """
    module.eval().requires_grad_(False)
    module.zero_grad(set_to_none=True)
    return Frozen(module, weights_hash(module))


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over name, type, shape and bytes of every weight and buffer that would be saved."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # Bytes, since numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class ModelReward:
    """A reward model's scores.

    Each completion is read with the model's own template up to its own end token, which it gets unless it was cut off.
    A text that is too long for the model, and a cut-off answer without a single character, are invalid.

    Attributes:
        model: the reward model. It is frozen here, see `frozen`.
        name: its name in logs.
        normalised: subtract the stored mean, so that 0 is an average demonstration.
        token_budget: most tokens in one forward.
        token_spans: whether a model that sums over tokens (`sum`, `discounted_sum`) says as `Score.spans` what each
            piece of the text adds; the bias, the stored mean and the end token's part are earned at the end.
        frozen: the model's weights as they were; `check` compares.
    """

    model: "RewardModel"
    name: str = "model"
    normalised: bool = True
    token_budget: int = 8192
    token_spans: bool = True
    frozen: Frozen = field(init=False, repr=False, compare=False)

    is_checked = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen", frozen(self.model))

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        name: str | None = None,
        normalised: bool = True,
        token_budget: int = 8192,
        token_spans: bool = True,
        device: str | None = None,
        **options: Any,
    ) -> "ModelReward":
        """Open a reward model, Plaudit's or any `AutoModelForSequenceClassification`.

        Args:
            name_or_folder: folder or Hugging Face name.
            name: its name in logs; by default the last part of the folder's name.
            normalised: see the class.
            token_budget: see the class.
            token_spans: see the class.
            device: where it runs; None takes the accelerator where there is one.
            options: of `RewardModel.from_pretrained`, e.g. `dtype`, `too_long="truncate_prompt"`.

        Raises:
            ValueError: if it is no reward model.
        """
        from plaudit.models.reward_model import RewardModel

        model = RewardModel.from_pretrained(name_or_folder, **options)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model, name or Path(name_or_folder).name, normalised, token_budget, token_spans)

    def renew(self) -> None:
        """Freeze the model as it is now: it has learned something, and is to stay so from here on."""
        object.__setattr__(self, "frozen", frozen(self.model))

    def check(self) -> None:
        """See that the model has not changed since; see `Frozen.check`."""
        self.frozen.check()

    def __call__(self, samples: Sequence[Sample]) -> Score:
        """One score per sample, with the model's attributes as parts where it has them."""
        groups: list[TokenisedGroup] = []
        places: list[int] = []
        problems: dict[int, str] = {}
        for place, sample in enumerate(samples):
            # One group per sample: how much of a long prompt is cut must not depend on the sample's siblings.
            # What shares a prompt still shares its pass through the network.
            if not sample.completion and not sample.finished:
                problems[place] = "nothing was said"
                continue
            try:
                group = self.model.text_tokeniser.group(
                    sample.prompt, [sample.completion], cut_off=[not sample.finished]
                )
            except TextTooLongError as error:
                problems[place] = str(error)
                continue
            groups.append(group)
            places.append(place)
        values: list[float | None] = [None] * len(samples)
        parts: dict[str, list[float | None]] = {name: [None] * len(samples) for name in self.model.attributes}
        adding = self.token_spans and self.model.causal and self.model.parts.aggregation in ADDING
        spans: list[list[Span]] | None = [[] for _ in samples] if adding else None
        if spans is not None:
            scores, tokens = score_tokens(self.model, groups, token_budget=self.token_budget)
            for place, group, (added,) in zip(places, groups, tokens, strict=True):
                ids = group.blocks[0].completions[0]
                spans[place] = self._spans(ids, samples[place].completion, self.model.total(added).reshape(-1))
        else:
            scores = score_groups(self.model, groups, token_budget=self.token_budget)
        for place, raw in zip(places, scores, strict=True):
            shown = self.model.normalise(raw) if self.normalised else raw
            values[place] = float(self.model.total(shown)[0])
            for number, name in enumerate(self.model.attributes):
                parts[name][place] = float(shown[0, number])
        return score_values(samples, values, name=self.name, parts=parts or None, spans=spans, problems=problems)

    def _spans(self, ids: Sequence[int], completion: str, added: Tensor) -> list[Span]:
        """What each piece of the completion adds, `added [T]` by token; tokens that write nothing join the next one."""
        spans: list[Span] = []
        start, waiting = 0, 0.0
        ends = token_ends(self.model.tokenizer, ids, completion)
        for end, value in zip(ends, added.tolist(), strict=True):
            waiting += value
            if end > start:
                spans.append((start, end, waiting))
                start, waiting = end, 0.0
        return spans
