"""Drawing tokens: temperature, top-k, top-p and min-p, with the log-probabilities that training needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plaudit.configs.generation import SamplingConfig

_TOP_P_CANDIDATES = 256
_BLOCK = 64


@dataclass(frozen=True)
class Drawn:
    """One token for each of `R` rows.

    Attributes:
        tokens: `[R]` int64.
        logprobs: `[R]` float32, log-probability under the model at this temperature, whatever was filtered: what the
            training forward computes.
        behaviour_logprobs: `[R]` float32, log-probability under the distribution that was drawn from (0 for greedy).
    """

    tokens: Tensor
    logprobs: Tensor
    behaviour_logprobs: Tensor


def filter_logits(
    logits: Tensor, *, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Tensor:
    """Put `-inf` on the tokens that may not be drawn; top-k first, then top-p, then min-p, as in transformers.

    Top-k keeps `z_v >= z_(k)`; top-p (Holtzman et al. 2019, arXiv:1904.09751) keeps a token where those more likely
    than it have less than `p` together; min-p (Nguyen et al. 2024, arXiv:2407.01082) keeps `π_v >= min_p · max π`.

    Args:
        logits: `[R, V]`, already divided by the temperature.
        top_k: how many to keep, or None.
        top_p: mass to keep, or None.
        min_p: share of the largest probability, or None.

    Returns:
        `[R, V]`; the input itself where nothing is filtered.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = torch.topk(logits, top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1.0:
        logits = _keep_mass(logits, top_p)
    if min_p is not None and min_p > 0.0:
        least = logits.amax(-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits


def _keep_mass(logits: Tensor, top_p: float) -> Tensor:
    """Top-p without sorting the vocabulary, where its most likely tokens already hold the mass."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    count = min(_TOP_P_CANDIDATES, logits.shape[-1])
    while True:
        found = torch.topk(logits, count)
        mass = (found.values - normaliser).exp().cumsum(-1)
        if count == logits.shape[-1] or bool((mass[:, -1] >= top_p).all()):
            break
        count = min(count * 8, logits.shape[-1])
    more_likely = torch.cat((mass.new_zeros(mass.shape[0], 1), mass[:, :-1]), -1)
    kept = found.values.masked_fill(more_likely >= top_p, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(-1, found.indices, kept)


def draw(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> Drawn:
    """Choose one token per row, by inversion of the cumulative distribution.

    The token is the first one whose cumulative probability exceeds the row's uniform number, so a row's draw depends on
    its own number and its own logits alone.

    Args:
        logits: `[R, V]` float32, as the model gives them.
        uniforms: `[R]` float32 in `[0, 1)`; not read by `greedy`.
        sampling: method, temperature and filters.

    Returns:
        Tokens and their log-probabilities.

    Raises:
        ValueError: if a logit is not a number.
    """
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    if sampling.method == "greedy":
        tokens = logits.argmax(-1)
        logprobs = _finite(logits.softmax(-1).gather(-1, tokens[:, None]).squeeze(-1).log())
        return Drawn(tokens, logprobs, torch.zeros_like(logprobs))
    kept = filter_logits(logits, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
    probabilities = kept.softmax(-1)
    tokens = invert(probabilities, uniforms)
    behaviour = _finite(probabilities.gather(-1, tokens[:, None]).squeeze(-1).log())
    if kept is logits:
        return Drawn(tokens, behaviour, behaviour)
    chosen = logits.gather(-1, tokens[:, None]).squeeze(-1)
    return Drawn(tokens, chosen - logits.logsumexp(-1), behaviour)


def invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first token of each row whose cumulative probability exceeds the row's uniform number.

    In two levels, since a running sum over a whole vocabulary takes longer than making its probabilities: first the
    block of tokens that the number falls into, then the token in it.

    Args:
        probabilities: `[R, V]` float32; rows need not add up to 1 exactly.
        uniforms: `[R]` float32 in `[0, 1)`.

    Returns:
        `[R]` int64, each with a probability above 0. Where a row holds no number, any token.
    """
    count = probabilities.shape[-1]
    whole = count // _BLOCK * _BLOCK
    parts = [probabilities[:, :whole].view(-1, whole // _BLOCK, _BLOCK).sum(-1)] if whole else []
    if whole < count:
        parts.append(probabilities[:, whole:].sum(-1, keepdim=True))
    blocks, left = _first_above(torch.cat(parts, -1), uniforms)
    places = blocks[:, None] * _BLOCK + torch.arange(min(_BLOCK, count), device=probabilities.device)
    inside = probabilities.gather(-1, places.clamp(max=count - 1)).masked_fill(places >= count, 0.0)
    found, _ = _first_above(inside, left, scale=False)
    return blocks * _BLOCK + found


def _first_above(masses: Tensor, wanted: Tensor, *, scale: bool = True) -> tuple[Tensor, Tensor]:
    """The first of `[R, n]` masses with which the sum exceeds `[R]`, and what of that the ones before it leave over.

    With `scale`, `wanted` is a share of the whole sum.
    """
    cumulative = masses.cumsum(-1)
    total = cumulative[:, -1:]
    wanted = wanted[:, None] * total if scale else wanted[:, None]
    # Below the total even after rounding: then some entry with a positive mass exceeds it.
    wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=masses.shape[-1] - 1)
    before = torch.where(found > 0, cumulative.gather(-1, (found - 1).clamp(min=0)), 0.0)
    return found.squeeze(-1), (wanted - before).clamp(min=0.0).squeeze(-1)


def _finite(logprobs: Tensor) -> Tensor:
    if not bool(logprobs.isfinite().all()):
        raise ValueError("the model gave logits that are not finite; look at its weights and its number type")
    return logprobs


def row_uniforms(seed: int, keys: Sequence[tuple[int, ...]], steps: int) -> Tensor:
    """`[R, steps]` uniform numbers in `[0, 1)`, each row from its own stream.

    Args:
        seed: of all streams.
        keys: for each row what names it, such as `(prompt, sample)`; a row's numbers depend on nothing else.
        steps: numbers per row; more of them begin with the same ones.
    """
    rows = [np.random.default_rng([seed, *key]).random(steps, dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, steps)
