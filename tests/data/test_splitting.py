"""Groups above the budget: each completion once, behind its whole prompt, in its slot, within the budget."""

from hypothesis import given, settings
from hypothesis import strategies as st

from plaudit.data.splitting import part_counts, split_group
from plaudit.data.tokenising import TokenisedBlock, TokenisedGroup


def group(prefix: int, *lengths: int, blocks: bool = False) -> TokenisedGroup:
    prompt, texts = list(range(prefix)), [[100 * k + j for j in range(n)] for k, n in enumerate(lengths, start=1)]
    if blocks:
        return TokenisedGroup(tuple(TokenisedBlock(prompt, [ids], [k]) for k, ids in enumerate(texts)))
    return TokenisedGroup((TokenisedBlock(prompt, texts, list(range(len(texts)))),))


def slots(part: TokenisedGroup) -> list[int]:
    return [slot for block in part.blocks for slot in block.slots]


def test_by_hand() -> None:
    # A budget of 10 leaves 6 behind the prompt: 5 and 1 together, 4 and 2 together.
    parts = split_group(group(4, 5, 2, 4, 1), 10, packed=True)
    assert [slots(part) for part in parts] == [[0, 3], [1, 2]]
    assert [part.num_tokens for part in parts] == [10, 10]
    whole = group(4, 3, 3)
    assert split_group(whole, 10, packed=True) == [whole]
    assert split_group(group(4, 99), 10, packed=True) == [group(4, 99)]
    assert [slots(part) for part in split_group(group(4, 99, 1), 10, packed=True)] == [[0], [1]]
    # Padded rows of 6, 6 and 5 places: two of the widest fill 12.
    assert [slots(p) for p in split_group(group(4, 2, 2, 1), 12, packed=False)] == [[0, 1], [2]]
    assert part_counts([whole, group(4, 5, 2, 4, 1)], 10, packed=True) == [1, 2]


@settings(max_examples=150, deadline=None)
@given(
    prefix=st.integers(0, 20),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    budget=st.integers(1, 120),
    packed=st.booleans(),
    blocks=st.booleans(),
)
def test_parts_hold_every_completion_once(
    prefix: int, lengths: list[int], budget: int, packed: bool, blocks: bool
) -> None:
    whole = group(prefix, *lengths, blocks=blocks)
    parts = split_group(whole, budget, packed=packed)
    found = {
        slot: (block.prefix, ids)
        for part in parts
        for block in part.blocks
        for slot, ids in zip(block.slots, block.completions, strict=True)
    }
    assert sorted(slot for part in parts for slot in slots(part)) == list(range(len(lengths)))
    for block in whole.blocks:
        for slot, ids in zip(block.slots, block.completions, strict=True):
            assert found[slot] == (block.prefix, ids)
    for part in parts:
        cost = part.num_tokens if packed else part.longest * part.num_completions
        assert cost <= budget or part.num_completions == 1
    # No two parts that would fit into one: the budget is used.
    if packed and len(parts) > 1 and not blocks:
        rest = sorted(part.num_tokens - prefix for part in parts)
        assert prefix + rest[0] + rest[1] > budget
