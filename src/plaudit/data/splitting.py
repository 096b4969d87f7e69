"""Groups that are too long for one pass, cut into parts that keep every completion behind its whole prompt."""

from collections.abc import Sequence

from plaudit.data.batching import fill_batches, fill_padded_batches
from plaudit.data.tokenising import TokenisedBlock, TokenisedGroup


def split_group(group: TokenisedGroup, token_budget: int, *, packed: bool) -> list[TokenisedGroup]:
    """Cut a group into parts of at most `token_budget` tokens; each part repeats the prompt that it needs.

    Completions keep their slots, so a part's scores belong to the same row of the `[P, K]` table, and the parts' tables
    (0 where a part has nothing) add up to the table of the whole group.

    Args:
        group: a tokenised group.
        token_budget: most tokens of a part, padding included where rows are padded. One completion that is longer
            together with its prompt is a part of its own.
        packed: whether completions share their prompt; otherwise each takes a padded row of its own.

    Returns:
        One or more parts, each with at least one completion; the group itself where it fits.
    """
    whole = group.num_tokens if packed else group.longest * group.num_completions
    if whole <= token_budget or group.num_completions == 1:
        return [group]
    pieces = _pieces(group, token_budget if packed else 0)
    sizes = [piece.num_tokens for piece in pieces]
    everything = range(len(pieces))
    if packed:
        batches = fill_batches(everything, sizes, token_budget)
    else:
        batches = fill_padded_batches(everything, sizes, [1] * len(pieces), token_budget)
    return [TokenisedGroup(tuple(pieces[index] for index in sorted(batch))) for batch in batches]


def part_counts(groups: Sequence[TokenisedGroup], token_budget: int, *, packed: bool) -> list[int]:
    """How many parts `split_group` makes of each group: 1 for those that fit."""
    return [len(split_group(group, token_budget, packed=packed)) for group in groups]


def _pieces(group: TokenisedGroup, token_budget: int) -> list[TokenisedBlock]:
    """The group's blocks, those above the budget cut by completions."""
    pieces: list[TokenisedBlock] = []
    for block in group.blocks:
        if block.num_tokens <= token_budget:
            pieces.append(block)
            continue
        lengths = [len(ids) for ids in block.completions]
        room = max(1, token_budget - len(block.prefix))
        for chosen in fill_batches(range(len(lengths)), lengths, room):
            kept = sorted(chosen)
            completions, slots = [block.completions[i] for i in kept], [block.slots[i] for i in kept]
            pieces.append(TokenisedBlock(block.prefix, completions, slots))
    return pieces
