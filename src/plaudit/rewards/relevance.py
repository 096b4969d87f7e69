"""Relevance: how close an answer is to its prompt, by shared words and by an encoder's view of both."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plaudit.data.records import Prompt
from plaudit.rewards.base import Reward, Sample, Score, score_values
from plaudit.rewards.functions import SampleReward
from plaudit.rewards.model import Frozen, frozen
from plaudit.rewards.text import is_spaceless, words

#: English words that every text shares. Other languages' are told apart by no list: name them in `ignore`.
_FUNCTION_WORDS = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "been", "but", "by", "can", "could", "did", "do", "does", "for",
    "from", "had", "has", "have", "he", "her", "his", "how", "i", "if", "in", "is", "it", "its", "me", "my",
    "no", "not", "of", "on", "or", "our", "she", "should", "so", "that", "the", "their", "them", "there",
    "they", "this", "to", "us", "was", "we", "were", "what", "when", "where", "which", "who", "why", "will",
    "with", "would", "you", "your",
})  # fmt: skip


def lexical_overlap(*, ignore: Sequence[str] | None = None) -> Reward:
    """`r = |W_x ∩ W_y| / |W_x|`, in 0..1: the share of the prompt's content words that the answer takes up.

    `W` are the distinct words without function words; in scripts without spaces the distinct pairs of neighbouring
    characters, since single ones are shared by chance. Of a conversation the last user turn is the prompt. A prompt
    without content words has no reward (invalid). Repeating the prompt gives 1: keep its weight small, or limit it.

    Args:
        ignore: words that do not count; None is a list of English function words.
    """
    ignored = _FUNCTION_WORDS if ignore is None else frozenset(word.casefold() for word in ignore)

    def reward(sample: Sample) -> float | None:
        asked = _content(_question(sample.prompt), ignored)
        return len(asked & _content(sample.completion, ignored)) / len(asked) if asked else None

    return SampleReward(reward, "lexical_overlap")


@dataclass(frozen=True)
class SimilarityReward:
    """`r = cos(e(x), e(y))`, in −1..1, with an encoder's pooled last states `e`.

    Of a conversation the last user turn is `x`. Texts are cut at `max_length` tokens, as encoders are used. An answer
    without a character has no direction and is invalid.

    Attributes:
        encoder: a transformers base model; it is frozen here.
        tokenizer: its tokenizer.
        name: its name in logs.
        pooling: `mean` over the text's tokens, or the first token (`cls`).
        max_length: most tokens of a text.
        batch_size: texts of one forward.
        frozen: the encoder's weights as they were; `check` compares.
    """

    encoder: nn.Module
    tokenizer: Any
    name: str = "similarity"
    pooling: Literal["mean", "cls"] = "mean"
    max_length: int = 512
    batch_size: int = 32
    frozen: Frozen = field(init=False, repr=False, compare=False)

    is_checked = True

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"pooling is {self.pooling!r}; it must be 'mean' or 'cls'")
        object.__setattr__(self, "frozen", frozen(self.encoder))

    def check(self) -> None:
        """See that the encoder has not changed since; see `plaudit.rewards.model.Frozen.check`."""
        self.frozen.check()

    def __call__(self, samples: Sequence[Sample]) -> Score:
        """The cosine of each prompt and answer; each distinct text is read once."""
        pairs = [(_question(sample.prompt), sample.completion) for sample in samples]
        told = [bool(question.strip() and answer.strip()) for question, answer in pairs]
        texts = sorted({text for pair, both in zip(pairs, told, strict=True) if both for text in pair}, key=len)
        vectors = dict(zip(texts, self._vectors(texts), strict=True))
        values: list[float | None] = [None] * len(samples)
        problems: dict[int, str] = {}
        for number, ((question, answer), both) in enumerate(zip(pairs, told, strict=True)):
            if both:
                values[number] = float(vectors[question] @ vectors[answer])
            else:
                problems[number] = "the prompt or the answer is empty"
        return score_values(samples, values, name=self.name, problems=problems)

    @torch.no_grad()
    def _vectors(self, texts: list[str]) -> Tensor:
        """Unit vectors of the texts, `[n, H]` float32 on the CPU."""
        device = next(self.encoder.parameters()).device
        found = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                texts[start : start + self.batch_size],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(device)
            states = self.encoder(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].float()[..., None]
            pooled = states[:, 0] if self.pooling == "cls" else (states * mask).sum(1) / mask.sum(1)
            found.append(nn.functional.normalize(pooled, dim=-1).cpu())
        return torch.cat(found) if found else torch.zeros(0, 1)


def similarity(
    encoder: str | Path,
    *,
    pooling: Literal["mean", "cls"] = "mean",
    max_length: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> SimilarityReward:
    """A similarity reward from an encoder's folder or Hugging Face name.

    Args:
        encoder: e.g. a sentence encoder; what it was trained for decides what "similar" means.
        pooling: as the encoder was trained.
        max_length: most tokens of a text; None is what the encoder reads, 512 at most.
        device: where it runs; None takes the accelerator where there is one.
        trust_remote_code: whether code in the folder may run.

    Raises:
        ValueError: if it is no encoder, or its weights are incomplete.
    """
    from transformers import AutoConfig

    from plaudit.models.backbone import is_causal, load_backbone, load_tokenizer, longest_text

    config = AutoConfig.from_pretrained(encoder, trust_remote_code=trust_remote_code)
    if is_causal(config):
        raise ValueError(f"{encoder} is a decoder; its states are no picture of a whole text. Give an encoder")
    tokenizer = load_tokenizer(encoder, trust_remote_code=trust_remote_code)
    model = load_backbone(encoder, dtype="float32", trust_remote_code=trust_remote_code)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    longest = max_length or min(longest_text(config, tokenizer), 512)
    return SimilarityReward(model, tokenizer, pooling=pooling, max_length=longest)


def _question(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return next((message.content for message in reversed(prompt) if message.role == "user"), prompt[-1].content)


def _content(text: str, ignored: frozenset[str]) -> set[str]:
    """Words that say something; pairs of neighbouring characters where there are no spaces."""
    found = words(text)
    content: set[str] = set()
    for place, word in enumerate(found):
        if not is_spaceless(word[0]):
            content |= {word} - ignored
        elif place + 1 < len(found) and is_spaceless(found[place + 1][0]):
            content.add(word + found[place + 1])
    return content
