"""The Plackett-Luce likelihood of whole rankings, of top-m rankings and of rankings with ties."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from plaudit.core.masked import masked_logsumexp

# Exact ties visit all 2^K sets of completions; beyond this the tables outgrow the network's own activations.
MAX_EXACT_COMPLETIONS = 12


def plackett_luce_log_likelihood(
    scores: Tensor, tiers: Tensor, mask: Tensor, *, top: int | None = None, ties: str = "exact"
) -> Tensor:
    """Log-probability of each prompt's ranking: completions are drawn one by one, each by a softmax over those left.

    Equation, for a strict ranking `y_(1) ≻ … ≻ y_(K)`: `Σ_k [r_(k) - log Σ_{j≥k} exp r_(j)]`.
    A tier of several completions means that their order was not judged:
    - `exact`: the probability of the tiers is the sum over all strict orders that agree with them. Computed over sets:
      `f(S) = Σ_{i∈S} f(S∖i) exp(r_i) / Σ_{j∉S∖i} exp(r_j)`, with `f(S) = 0` for a set that a ranking cannot pass
      through. The last tier has probability 1, so a top-m ranking is m tiers of one and a last tier with the rest.
      Where the host holds the values (on the CPU), each tier visits only the sets of its own completions, `2^m` for
      `m` of them in place of `2^K` for the ranking; elsewhere that would make the device wait.
    - `efron`: for a tier of m with weight `w`, `W` the weight of it and all that follow:
      `log m! + Σ_i r_i - Σ_{k=0}^{m-1} log(W - k w / m)`; exact when the tied scores are equal, cheap for any K.
    Sources: Plackett, "The analysis of permutations", Appl. Statist. 24 (1975); Luce, "Individual choice behavior"
    (1959); Efron, "The efficiency of Cox's likelihood function for censored data", JASA 72 (1977), for the
    approximation.

    Args:
        scores: `[P, K]` floating point.
        tiers: `[P, K]` int64, 0 best; gaps are fine; ignored where masked.
        mask: `[P, K]` bool, the completions that were judged.
        top: count only the tiers that begin before this place (1 with a single best completion is best-of-K);
            None counts all.
        ties: `exact` or `efron`.

    Returns:
        `[P]`, in nats, at most 0; 0 for a prompt with fewer than two tiers, which says nothing.

    Raises:
        ValueError: for wrong shapes, `top < 1`, an unknown `ties`, or `exact` with K above 12.
    """
    if scores.ndim != 2 or tiers.shape != scores.shape or mask.shape != scores.shape:
        raise ValueError(
            f"scores {tuple(scores.shape)}, tiers {tuple(tiers.shape)} and mask {tuple(mask.shape)} must all be [P, K]"
        )
    if top is not None and top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    scores = scores.masked_fill(~mask, 0.0)
    if ties == "efron":
        return _efron(scores, tiers, mask, top)
    if ties != "exact":
        raise ValueError(f"ties must be 'exact' or 'efron', got {ties!r}")
    if scores.shape[1] > MAX_EXACT_COMPLETIONS:
        raise ValueError(f"exact ties stop at K = {MAX_EXACT_COMPLETIONS}, got {scores.shape[1]}; use ties='efron'")
    return (_exact_by_tier if scores.device.type == "cpu" else _exact)(scores, tiers, mask, top)


def _counted(tiers: Tensor, mask: Tensor, top: int | None) -> Tensor:
    """`[P, K]`: completions of a tier that begins before place `top` and is not the last one."""
    both = mask[:, :, None] & mask[:, None, :]
    num_better = (both & (tiers[:, None, :] < tiers[:, :, None])).sum(-1)
    followed = (both & (tiers[:, None, :] > tiers[:, :, None])).any(-1)
    return followed if top is None else followed & (num_better < top)


def _efron(scores: Tensor, tiers: Tensor, mask: Tensor, top: int | None) -> Tensor:
    both = mask[:, :, None] & mask[:, None, :]
    same = both & (tiers[:, :, None] == tiers[:, None, :])
    later = both & (tiers[:, None, :] > tiers[:, :, None])
    size = same.sum(-1).clamp_min(1).to(scores.dtype)
    num_before = torch.tril(same, diagonal=-1).sum(-1).to(scores.dtype)
    # The k-th of a tier of m sees all later tiers whole and the share 1 - k/m of its own.
    log_share = torch.log1p(-num_before / size)[:, :, None] * same.to(scores.dtype)
    denominator = masked_logsumexp(scores[:, None, :] + log_share, same | later)
    terms = scores - denominator + torch.log(num_before + 1)
    return terms.masked_fill(~_counted(tiers, mask, top), 0.0).sum(-1)


@dataclass(frozen=True)
class _Sets:
    """All sets of `0..num-1` as bit masks, by size: who may have come last and which set was there before.

    Attributes:
        inside: `[2^num, num]` bool, who is in each set.
        last: per size, `[sets, size]` int64, each member of each set of that size.
        before: per size, `[sets, size]` int64, the set without that member.
        source: per size, `[sets, size]` int64, the place of `before` among the sets of its own size.
        place: `[2^num]` int64, the place of each set when all are ordered by size.
    """

    inside: Tensor
    last: tuple[Tensor, ...]
    before: tuple[Tensor, ...]
    source: tuple[Tensor, ...]
    place: Tensor


@lru_cache(maxsize=32)
def _all_sets(num: int, device: torch.device) -> _Sets:
    by_size: list[list[int]] = [[] for _ in range(num + 1)]
    for subset in range(1 << num):
        by_size[subset.bit_count()].append(subset)
    index = {subset: row for level in by_size for row, subset in enumerate(level)}
    members = [[[i for i in range(num) if subset >> i & 1] for subset in level] for level in by_size]
    before = [
        [[subset & ~(1 << i) for i in row] for subset, row in zip(level, rows, strict=True)]
        for level, rows in zip(by_size, members, strict=True)
    ]
    source = [[[index[subset] for subset in row] for row in rows] for rows in before]
    place = {subset: position for position, subset in enumerate(subset for level in by_size for subset in level)}
    return _Sets(
        inside=torch.tensor([[bool(s >> i & 1) for i in range(num)] for s in range(1 << num)], device=device),
        last=tuple(torch.tensor(rows, device=device) for rows in members[1:]),
        before=tuple(torch.tensor(rows, device=device) for rows in before[1:]),
        source=tuple(torch.tensor(rows, device=device) for rows in source[1:]),
        place=torch.tensor([place[subset] for subset in range(1 << num)], device=device),
    )


def _exact(scores: Tensor, tiers: Tensor, mask: Tensor, top: int | None) -> Tensor:
    num = scores.shape[1]
    sets = _all_sets(num, scores.device)
    counted = _counted(tiers, mask, top)
    left = mask[:, None, :] & ~sets.inside
    log_left = masked_logsumexp(scores[:, None, :].expand(-1, 1 << num, -1), left)
    better = mask[:, :, None] & mask[:, None, :] & (tiers[:, None, :] < tiers[:, :, None])
    waiting = (better[:, :, None, :] & ~sets.inside).any(-1)
    # [P, item, set]: the item may be drawn when the set is gone. The last tier, and those past `top`, never are.
    allowed = counted[:, :, None] & ~waiting
    impossible = torch.finfo(scores.dtype).min / 4  # finite, so that no gradient becomes NaN; far below any real value
    levels = [scores.new_zeros(scores.shape[0], 1)]
    for last, before, source in zip(sets.last, sets.before, sets.source, strict=True):
        step = scores[:, last] - log_left[:, before]
        step = torch.where(allowed[:, last, before], step, torch.full_like(step, impossible))
        levels.append(torch.logsumexp(levels[-1][:, source] + step, dim=-1).clamp_min(impossible))
    drawn = (counted.to(torch.int64) << torch.arange(num, device=scores.device)).sum(-1)
    return torch.cat(levels, dim=1).gather(1, sets.place[drawn][:, None]).squeeze(1)


def _exact_by_tier(scores: Tensor, tiers: Tensor, mask: Tensor, top: int | None) -> Tensor:
    """`_exact` as a sum over tiers, tiers of one size together; reads sizes on the host. Same arguments and result."""
    both = mask[:, :, None] & mask[:, None, :]
    same = both & (tiers[:, :, None] == tiers[:, None, :])
    later = both & (tiers[:, None, :] > tiers[:, :, None])
    first = _counted(tiers, mask, top) & ~torch.tril(same, diagonal=-1).any(-1)
    prompts, items = first.nonzero(as_tuple=True)
    members = same[prompts, items]
    log_rest = masked_logsumexp(scores[prompts], later[prompts, items])
    sizes = members.sum(-1)
    total = scores.new_zeros(scores.shape[0])
    # One place alone is always visited, so that a table in which nothing counts still has a gradient, of zeros.
    for size in sorted({1, *sizes.tolist()}):
        rows = (sizes == size).nonzero()[:, 0]
        tied = scores[prompts[rows]][members[rows]].view(-1, size)
        total = total.index_add(0, prompts[rows], _log_tier_first(tied, log_rest[rows]))
    return total


def _log_tier_first(tied: Tensor, log_rest: Tensor) -> Tensor:
    """Log-probability `[R]` that a tier `[R, m]` is drawn before all that follow it, of joint log-weight `[R]`."""
    sets = _all_sets(tied.shape[1], tied.device)
    left = masked_logsumexp(tied[:, None, :].expand(-1, len(sets.inside), -1), ~sets.inside.expand(len(tied), -1, -1))
    # Nobody draws from what is left when the whole tier is gone.
    log_left = torch.logaddexp(left, log_rest[:, None])
    level = tied.new_zeros(len(tied), 1)
    for last, before, source in zip(sets.last, sets.before, sets.source, strict=True):
        level = torch.logsumexp(level[:, source] + tied[:, last] - log_left[:, before], dim=-1)
    return level.squeeze(1)
