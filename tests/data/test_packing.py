"""Packing and its inverse: by hand, and as properties over random groups."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plaudit.core.layout import check_layout
from plaudit.data.io import read_comparisons
from plaudit.data.packing import pack_groups, unpack_rows
from plaudit.data.records import preference_pairs
from plaudit.data.tokenising import TextTokeniser, TokenisedBlock, TokenisedGroup
from plaudit.data.vocabulary import train_tokenizer

# Ids include 0, the pad id of the tests, so that a mask made from it would be found out.
tokens = st.integers(0, 50)
completion = st.lists(tokens, min_size=1, max_size=6)


@st.composite
def groups(draw: st.DrawFn, *, causal: bool) -> list[TokenisedGroup]:
    made = []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 5))
        slots = draw(st.permutations(range(count + draw(st.integers(0, 2)))))[:count]
        blocks, at = [], 0
        while at < count:
            size = draw(st.integers(1, count - at)) if causal else 1
            answers = draw(st.lists(completion, min_size=size, max_size=size))
            blocks.append(TokenisedBlock(draw(st.lists(tokens, max_size=6)), answers, list(slots[at : at + size])))
            at += size
        made.append(TokenisedGroup(tuple(blocks)))
    return made


def flat(packed: list[TokenisedGroup]) -> list[tuple[int, int, list[int], list[int]]]:
    """(group, slot, prefix, completion) of everything, in packing order."""
    return [
        (index, slot, block.prefix, answer)
        for index, group in enumerate(packed)
        for block in group.blocks
        for slot, answer in zip(block.slots, block.completions, strict=True)
    ]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_unpacking_gives_back_each_text(causal: bool, side: str, data: st.DataObject) -> None:
    packed = data.draw(groups(causal=causal))
    batch = pack_groups(packed, causal=causal)
    check_layout(batch.layout)
    assert batch.layout.num_tokens == sum(group.num_tokens for group in packed) == len(batch.input_ids)
    rows = unpack_rows(batch, pad_id=0, side=side)
    texts = flat(packed)
    assert rows.input_ids.shape == (len(texts), max(group.longest for group in packed))
    for row, (group, slot, prefix, answer) in enumerate(texts):
        assert (int(batch.layout.group_index[row]), int(batch.layout.slot_index[row])) == (group, slot)
        assert rows.input_ids[row][rows.attention_mask[row]].tolist() == prefix + answer
        start, end = int(rows.completion_start[row]), int(rows.completion_end[row])
        assert rows.input_ids[row, start:end].tolist() == answer
        first = rows.input_ids.shape[1] - len(prefix + answer) if side == "left" else 0
        assert rows.attention_mask[row, first : first + len(prefix + answer)].all()
        assert rows.position_ids[row, start].item() == len(prefix)


@settings(max_examples=40, deadline=None)
@given(packed=groups(causal=True))
def test_predictors_and_attention_rule_equal_those_of_plain_rows(packed: list[TokenisedGroup]) -> None:
    """Every token sees, and is predicted by, exactly what it sees and is predicted by when its text stands alone."""
    batch = pack_groups(packed, causal=True)
    layout, ids = batch.layout, batch.input_ids
    same_block = layout.block_ids[:, None] == layout.block_ids[None, :]
    visible = (layout.segment_ids[None, :] == layout.segment_ids[:, None]) | (layout.segment_ids[None, :] == 0)
    allowed = same_block & visible & (layout.positions[None, :] <= layout.positions[:, None])
    for row, (_, _, prefix, answer) in enumerate(flat(packed)):
        for step in range(len(answer)):
            place = int(layout.completion_starts[row]) + step
            assert ids[allowed[place]].tolist() == (prefix + answer)[: len(prefix) + step + 1]
            predictor = int(layout.predictor_index[place])
            if not prefix and step == 0:
                assert predictor == -1
            else:
                assert ids[allowed[predictor]].tolist() == (prefix + answer)[: len(prefix) + step]


def test_layout_by_hand() -> None:
    block = TokenisedBlock([7, 8], [[1, 2], [3]], [1, 0])
    other = TokenisedBlock([], [[4]], [2])
    batch = pack_groups([TokenisedGroup((block,)), TokenisedGroup((other,))], causal=True, num_slots=4)
    layout = batch.layout
    assert batch.input_ids.tolist() == [7, 8, 1, 2, 3, 4]
    assert layout.positions.tolist() == [0, 1, 2, 3, 2, 0]
    assert layout.segment_ids.tolist() == [0, 0, 1, 1, 2, 1]
    assert layout.block_ids.tolist() == [0, 0, 0, 0, 0, 1]
    assert layout.prefix_ends.tolist() == [2, 2, 5]
    assert layout.slot_index.tolist() == [1, 0, 2]
    assert (layout.num_groups, layout.num_slots) == (2, 4)
    left = unpack_rows(batch, pad_id=9, side="left")
    assert left.input_ids.tolist() == [[7, 8, 1, 2], [9, 7, 8, 3], [9, 9, 9, 4]]
    assert left.completion_start.tolist() == [2, 3, 3]
    assert left.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 0, 0]]
    assert left.to("cpu").input_ids.equal(left.input_ids)


def test_what_cannot_be_packed_is_refused() -> None:
    def group(**changes: list[int] | list[list[int]]) -> TokenisedGroup:
        parts = {"prefix": [1], "completions": [[2], [3]], "slots": [0, 1]} | changes
        return TokenisedGroup((TokenisedBlock(**parts),))  # type: ignore[arg-type]

    pack_groups([group()], causal=True)
    with pytest.raises(ValueError, match="at least one"):
        pack_groups([], causal=True)
    with pytest.raises(ValueError, match="bidirectional block holds one completion, not 2"):
        pack_groups([group()], causal=False)
    with pytest.raises(ValueError, match="completion of no token"):
        pack_groups([group(completions=[[2], []])], causal=True)
    with pytest.raises(ValueError, match="without any completion"):
        pack_groups([group(completions=[], slots=[])], causal=True)
    with pytest.raises(ValueError, match="two completions in one slot"):
        pack_groups([group(slots=[1, 1])], causal=True)
    with pytest.raises(ValueError, match="do not fit into a table of 1"):
        pack_groups([group()], causal=True, num_slots=1)
    with pytest.raises(ValueError, match="but 1 slots"):
        pack_groups([group(slots=[0])], causal=True)
    with pytest.raises(ValueError, match='"left"'):
        unpack_rows(pack_groups([group()], causal=True), 0, side="middle")


def test_packing_costs_little() -> None:
    """33 thousand tokens need 1.4 ms of one core; best of five below 50, so that only a loop over tokens fails."""
    block = TokenisedBlock(list(range(256)), [list(range(64))] * 4, [0, 1, 2, 3])
    many = [TokenisedGroup((block,))] * 64
    seconds = []
    for _ in range(5):
        start = time.thread_time()
        pack_groups(many, causal=True)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.05, seconds


def test_layout_tensors_do_not_share_memory() -> None:
    """A layout changed in place must not change another of its tensors."""
    layout = pack_groups([TokenisedGroup((TokenisedBlock([1], [[2]], [0]),))], causal=True).layout
    pointers = [t.untyped_storage().data_ptr() for t in vars(layout).values() if isinstance(t, torch.Tensor)]
    assert len(set(pointers)) == len(pointers)


REAL = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.parametrize(
    ("file", "least", "most"),
    [
        # Two completions behind one prompt: four texts' width for one prompt's worth; with K the pairs grow as K².
        ("hh_harmless_base/train.jsonl.gz", 2.5, 6),
        ("fgrlhf_qa/train.jsonl.gz", 8, 15),
        ("wmt_mqm/rankings_ende.jsonl.gz", 10, 30),
    ],
)
def test_real_data_packs_into_a_fraction_of_exploded_pairs(file: str, least: float, most: float) -> None:
    """Tokens of padded pairs (batches of 8, as other tools train) over packed ones, on 100 real groups."""
    if not (REAL / file).exists():
        pytest.skip(f"needs the real data {file} beside the checkout")
    comparisons = read_comparisons(REAL / file, on_error="skip", limit=100).records
    tokenizer = train_tokenizer((text for c in comparisons for text in c.completions), 2000)
    tokeniser = TextTokeniser(tokenizer, causal=True, max_length=100_000)
    packed = [tokeniser.group(c.prompt, c.completions) for c in comparisons]
    batch = pack_groups(packed, causal=True)
    check_layout(batch.layout)
    rows = unpack_rows(batch, 0)
    widths = rows.attention_mask.sum(1)
    first_row = np.cumsum([0] + [len(c.completions) for c in comparisons])
    pairs = [(first_row[i] + w, first_row[i] + v) for i, c in enumerate(comparisons) for w, v in preference_pairs(c)]
    padded = 0
    for start in range(0, len(pairs), 8):
        lengths = widths[torch.tensor(pairs[start : start + 8])]
        padded += int(lengths.numel() * lengths.max())
    assert least < padded / batch.layout.num_tokens < most
    assert tokeniser.counts["unstable"] == tokeniser.counts["verbatim"] == 0
