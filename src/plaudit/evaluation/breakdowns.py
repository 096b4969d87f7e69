"""Parts of the judged pairs that are reported apart: by margin, K, annotator, subset and kind of judgement."""

from collections.abc import Sequence

import numpy as np

from plaudit.evaluation.judged import JudgedSet, gap_kind
from plaudit.evaluation.metrics import BoolArray, FloatArray

#: More parts than this are folded into "all others", smallest first.
MOST_PARTS = 24

#: Human margins with at most this many different values are shown value by value, else in five buckets of equal mass.
MOST_MARGINS = 8


def pair_groups(judged: JudgedSet) -> dict[str, dict[str, BoolArray]]:
    """Masks `[M]` over the judged pairs, by kind of part and label, in the order to show them.

    A kind on which the data does not differ (one annotator, one subset, one K, one judgement) is left out.
    """
    comparisons = [judged.comparisons[index] for index in judged.record]
    sizes = [str(len(comparison.completions)) for comparison in comparisons]
    found = {
        "margin": _margin_groups(judged),
        "K": dict(sorted(_label_groups(sizes).items(), key=lambda item: int(item[0]))),
        "annotator": _label_groups([comparison.annotator for comparison in comparisons]),
        "subset": _label_groups([comparison.subset for comparison in comparisons]),
        "judgement": _label_groups([type(comparison.judgement).__name__.lower() for comparison in comparisons]),
    }
    return {kind: parts for kind, parts in found.items() if len(parts) > 1}


def _label_groups(labels: Sequence[str | None]) -> dict[str, BoolArray]:
    """One mask per label, most pairs first; pairs without a label are a part of their own."""
    if not labels or all(label is None for label in labels):
        return {}
    names = np.array(["(none)" if label is None else label for label in labels], dtype=object)
    distinct, inverse, counts = np.unique(names.astype(str), return_inverse=True, return_counts=True)
    order = sorted(range(distinct.size), key=lambda place: (-int(counts[place]), str(distinct[place])))
    shown, rest = (order, []) if len(order) <= MOST_PARTS else (order[: MOST_PARTS - 1], order[MOST_PARTS - 1 :])
    groups = {str(distinct[place]): inverse == place for place in shown}
    if rest:
        groups[f"all others ({len(rest)})"] = np.isin(inverse, rest)
    return groups


def _margin_groups(judged: JudgedSet) -> dict[str, BoolArray]:
    """Pairs by how far apart people put them, each unit of margin (score, votes, places) by itself."""
    kinds = np.array([gap_kind(comparison) or "" for comparison in judged.comparisons], dtype=object)[judged.record]
    groups: dict[str, BoolArray] = {}
    for kind in sorted({str(kind) for kind in kinds} - {""}):
        mask = (kinds == kind) & ~np.isnan(judged.gap)
        if mask.any():
            groups |= {f"{kind} {label}": mask & part for label, part in _buckets(judged.gap, mask).items()}
    return groups


def _buckets(gap: FloatArray, mask: BoolArray) -> dict[str, BoolArray]:
    values = np.unique(gap[mask])
    if values.size <= MOST_MARGINS:
        return {f"{value:g}": gap == value for value in values}
    edges = np.unique(np.quantile(gap[mask], [0.2, 0.4, 0.6, 0.8], method="lower"))
    bucket = np.searchsorted(edges, gap, side="left")
    groups: dict[str, BoolArray] = {}
    for index in range(edges.size + 1):
        part = (bucket == index) & mask
        if part.any():
            inside = gap[part]
            low, high = f"{inside.min():.3g}", f"{inside.max():.3g}"
            groups[low if low == high else f"{low} to {high}"] = part
    return groups
