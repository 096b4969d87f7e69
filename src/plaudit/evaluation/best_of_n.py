"""Best of n without a bias: what the favourite of n answers is worth, from N ≥ n answers, and how far it is."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from plaudit.evaluation.metrics import FloatArray


def best_of_n_kl(n: int) -> float:
    """`log n − (n − 1)/n` nats: the divergence of the best of `n` from the sampler, at most.

    Exact where no two answers have the same reward (Stiennon et al. 2020, appendix G.3), else an upper bound
    (Beirami et al. 2024, arXiv:2401.01879).

    Raises:
        ValueError: if `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    return math.log(n) - (n - 1) / n


def best_of_n_sizes(largest: int) -> tuple[int, ...]:
    """The powers of two up to `largest`, and `largest` itself: where a curve is drawn."""
    sizes = [2**power for power in range(largest.bit_length()) if 2**power <= largest]
    return tuple(dict.fromkeys([*sizes, largest])) if largest else ()


def best_of_n_weights(proxy: FloatArray, n: int) -> FloatArray:
    """How probable it is that each of `N` answers is the favourite of a random `n` of them.

    With ranks `1..N` from the lowest proxy up, the favourite has rank at most m with probability
    `F(m) = C(m, n) / C(N, n)`; an answer of rank m gets `F(m) − F(m − 1)`, and answers with the same proxy share what
    they get together. So `Σ_i w_i g_i` is the mean of `g` of the favourite over all `C(N, n)` choices: an unbiased
    estimate for n fresh samples, of lower variance than choosing once.

    Source: Nakano et al. 2021, arXiv:2112.09332, appendix I; ties are ours.

    Args:
        proxy: `[N]` what chooses.
        n: how many are drawn, `1..N`.

    Returns:
        `[N]` weights that add up to 1.

    Raises:
        ValueError: if `n` is not in `1..N`, or a proxy is not a number.
    """
    count = len(proxy)
    if not 1 <= n <= count:
        raise ValueError(f"the best of {n} needs at least that many answers, and n of at least 1; there are {count}")
    if np.isnan(proxy).any():
        raise ValueError("a proxy is nan: leave out answers without a reward")
    _, place, size = np.unique(proxy, return_inverse=True, return_counts=True)
    reached = _reached(count, n)[np.concatenate([[0], np.cumsum(size)])]
    shared = np.diff(reached) / size
    return np.asarray(shared[place])


@lru_cache(maxsize=256)
def _reached(count: int, n: int) -> FloatArray:
    """`F(m)` for `m = 0..N`, from whole numbers: exact however large they are."""
    total = math.comb(count, n)
    return np.array([math.comb(m, n) / total for m in range(count + 1)])


def best_of_n_means(proxy: FloatArray, values: FloatArray, n: int) -> FloatArray:
    """Expected value of the favourite of `n`, for each prompt.

    Args:
        proxy: `[P, N]` what chooses; nan where an answer has no reward.
        values: `[P, N]` what is measured (the gold reward, or the proxy itself); nan likewise.
        n: how many are drawn.

    Returns:
        `[P]`; nan for prompts with fewer than `n` answers that have both.

    Raises:
        ValueError: if the shapes differ or `n` is below 1.
    """
    if proxy.shape != values.shape or proxy.ndim != 2:
        raise ValueError(f"proxy {proxy.shape} and values {values.shape} must both be [P, N]")
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    usable = ~(np.isnan(proxy) | np.isnan(values))
    found = np.full(len(proxy), np.nan)
    for prompt in np.flatnonzero(usable.sum(1) >= n):
        kept = usable[prompt]
        found[prompt] = best_of_n_weights(proxy[prompt, kept], n) @ values[prompt, kept]
    return found


def joint(tables: Sequence[FloatArray]) -> list[FloatArray]:
    """The tables `[P, N]` with nan wherever any of them has it: every curve then chooses among the same answers."""
    missing = np.any([np.isnan(table) for table in tables], axis=0)
    return [np.where(missing, np.nan, table) for table in tables]
