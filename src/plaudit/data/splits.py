"""Splits that are stable when data grows and never put one prompt on both sides; near-duplicate prompts."""

import hashlib
import re
import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from plaudit.configs.data import SplitKey
from plaudit.data.records import Comparison, Demonstration, Prompt, PromptRecord, first_user_turn

Record = TypeVar("Record", Comparison, Demonstration, PromptRecord)

_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def prompt_key(prompt: Prompt) -> str:
    """The key of a prompt: a hash of the first user turn, the same for other spacing, case and Unicode forms.

    Returns:
        32 hexadecimal digits (128 bits of SHA-256).
    """
    return hashlib.sha256(normalised_text(first_user_turn(prompt)).encode("utf-8", "replace")).hexdigest()[:32]


def normalised_text(text: str) -> str:
    """Text in NFKC, lower case (case folding), with runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def split_keys(records: Sequence[Comparison | Demonstration | PromptRecord], key: SplitKey = "prompt") -> list[str]:
    """The key of each record that decides its side: records with equal keys are never split.

    With `prompt` it is `prompt_key`. With `group`, records of one group, and groups that share a prompt, are kept
    together: the key is the smallest group name in that chain; a record without a group counts as a group of its own
    prompt.
    """
    prompts = [prompt_key(record.prompt) for record in records]
    if key == "prompt":
        return prompts
    if key != "group":
        raise ValueError(f"unknown split key {key!r}; expected prompt or group")
    groups = [f"group:{record.group}" if record.group is not None else "" for record in records]
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for group, prompt in zip(groups, prompts, strict=True):
        one, other = root(f"prompt:{prompt}"), root(group or f"prompt:{prompt}")
        # The smaller name stays on top; "group:…" sorts before "prompt:…".
        parent[max(one, other)] = min(one, other)
    return [root(f"prompt:{prompt}") for prompt in prompts]


def split_comparisons(
    records: Sequence[Record],
    *,
    fractions: Mapping[str, float] | None = None,
    key: SplitKey = "prompt",
    seed: int = 0,
) -> dict[str, list[Record]]:
    """Split records by the hash of their key, so that a record's side depends on nothing but its key and the seed.

    When data grows, records stay on their side (with `group`: unless a new record links two groups by a shared
    prompt). The shares hold on average over prompts (or groups), not exactly.

    Args:
        records: comparisons or demonstrations.
        fractions: name of each part and its share; they sum to 1. Default: train 0.9, test 0.1.
        key: what must not be split, see `split_keys`.
        seed: another seed gives another split.

    Returns:
        The records of each part, in their order; every record is in exactly one part.

    Raises:
        ValueError: if the fractions are negative or do not sum to 1, or the key is unknown.
    """
    shares = dict(fractions) if fractions is not None else {"train": 0.9, "test": 0.1}
    if any(share < 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"fractions {shares} must be at least 0 and sum to 1")
    bounds = np.cumsum(list(shares.values()))
    bounds[-1] = 1.0
    parts: dict[str, list[Record]] = {name: [] for name in shares}
    names = list(shares)
    for record, name in zip(records, split_keys(records, key), strict=True):
        parts[names[int(np.searchsorted(bounds, _unit_hash(name, seed), side="right"))]].append(record)
    return parts


def kfold(
    records: Sequence[Record], folds: int, key: SplitKey = "prompt", seed: int = 0
) -> list[tuple[list[Record], list[Record]]]:
    """`folds` pairs of (training, held-out) records; every record is held out once, keys are never split.

    Folds come from the hash as well: stable when data grows, and equal in size only on average.

    Raises:
        ValueError: for fewer than two folds, or where one of them is empty.
    """
    if folds < 2:
        raise ValueError(f"{folds} folds; expected 2 or more")
    places = [int(_unit_hash(name, seed) * folds) for name in split_keys(records, key)]
    missing = sorted(set(range(folds)) - set(places))
    if missing:
        raise ValueError(f"fold {missing[0]} of {folds} is empty: {len(set(places))} folds can be filled; use fewer")
    return [
        ([r for r, place in zip(records, places, strict=True) if place != fold],
         [r for r, place in zip(records, places, strict=True) if place == fold])
        for fold in range(folds)
    ]  # fmt: skip


def leave_one_out(records: Sequence[Record], key: SplitKey = "group") -> dict[str, tuple[list[Record], list[Record]]]:
    """(training, held-out) records for every key in turn, e.g. leave one document out; by key, in order of appearance.

    Raises:
        ValueError: if all records have the same key.
    """
    keys = split_keys(records, key)
    if len(set(keys)) < 2:
        raise ValueError(f"all {len(records)} records have the same {key}; nothing would be left to train on")
    return {
        name.removeprefix("group:"): (
            [record for record, other in zip(records, keys, strict=True) if other != name],
            [record for record, other in zip(records, keys, strict=True) if other == name],
        )
        for name in dict.fromkeys(keys)
    }


@dataclass(frozen=True)
class NearDuplicate:
    """Two prompts that are almost the same: the index of a record of each, and their Jaccard similarity."""

    first: int
    second: int
    similarity: float


def near_duplicates(
    records: Sequence[Comparison | Demonstration],
    *,
    threshold: float = 0.8,
    permutations: int = 64,
    seed: int = 0,
) -> list[NearDuplicate]:
    """Pairs of different prompts (first user turns) whose character shingles overlap by at least `threshold`.

    Candidates come from MinHash with locality-sensitive bands of 4 rows (Broder 1997; Leskovec et al., "Mining of
    Massive Datasets", chapter 3) and each is then confirmed by the exact Jaccard similarity of its shingles, so what
    is reported is right; with 16 bands a pair at similarity 0.8 is missed with probability (1 - 0.8⁴)¹⁶ ≈ 2e-4.
    Shingles are 5 characters long, and 2 where the script has no spaces (Chinese, Japanese, Thai, …).

    Returns:
        The pairs, most similar first; exactly equal prompts (by `prompt_key`) share a key and are not pairs.
    """
    first_with: dict[str, int] = {}
    for index, record in enumerate(records):
        first_with.setdefault(prompt_key(record.prompt), index)
    indices = list(first_with.values())
    sets = [shingles(first_user_turn(records[index].prompt)) for index in indices]
    candidates = _candidates([_signature(s, permutations, seed) for s in sets], rows=4)
    found = []
    for one, other in candidates:
        similarity = len(sets[one] & sets[other]) / len(sets[one] | sets[other])
        if similarity >= threshold:
            found.append(NearDuplicate(indices[one], indices[other], similarity))
    return sorted(found, key=lambda pair: (-pair.similarity, pair.first, pair.second))


def shingles(text: str) -> frozenset[str]:
    """Overlapping pieces of the normalised text: 2 characters where its script has no spaces, else 5."""
    text = normalised_text(text)
    size = 2 if 2 * len(_UNSPACED.findall(text)) > len(text) else 5
    return frozenset(text[i : i + size] for i in range(max(1, len(text) - size + 1)))


def _signature(pieces: frozenset[str], permutations: int, seed: int) -> npt.NDArray[np.uint64]:
    """MinHash: `[permutations]` the smallest value of each random hash `(a·h + b) mod 2⁶⁴` over the pieces."""
    generator = np.random.default_rng(seed)
    factors = generator.integers(1, 2**63, permutations, dtype=np.uint64) | np.uint64(1)
    offsets = generator.integers(0, 2**63, permutations, dtype=np.uint64)
    digests = (hashlib.blake2b(piece.encode("utf-8", "replace"), digest_size=8).digest() for piece in pieces)
    values = np.frombuffer(b"".join(digests), dtype=np.uint64)
    mixed = values[:, None] * factors + offsets
    # The high bits of the product are the well-mixed ones.
    minima: npt.NDArray[np.uint64] = (mixed ^ (mixed >> np.uint64(32))).min(axis=0)
    return minima


def _candidates(signatures: Sequence[npt.NDArray[np.uint64]], rows: int) -> set[tuple[int, int]]:
    buckets: dict[Hashable, list[int]] = {}
    pairs: set[tuple[int, int]] = set()
    for index, signature in enumerate(signatures):
        for band in range(0, len(signature), rows):
            bucket = buckets.setdefault((band, signature[band : band + rows].tobytes()), [])
            # A bucket of thousands of copies is compared with its first members only: quadratic time helps nobody.
            pairs.update((other, index) for other in bucket[:50])
            bucket.append(index)
    return pairs


def _unit_hash(key: str, seed: int) -> float:
    """A number in [0, 1) from the first 53 bits of SHA-256 of seed and key."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode("utf-8", "replace")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
