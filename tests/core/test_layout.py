"""The packed layout: predictors by hand, the score table, and that inconsistent layouts are refused."""

from dataclasses import replace

import pytest
import torch

from plaudit.core.layout import PackedBatch, PackedLayout, check_layout, scatter_to_table
from plaudit.core.transfer import to_device
from plaudit.models.attention_layout import PackedAttention


def two_blocks() -> PackedLayout:
    """Prefix of 2 with completions of 2 and 1, then an empty one with 1 and 2; all of group 1 but the last."""
    return PackedLayout(
        positions=torch.tensor([0, 1, 2, 3, 2, 0, 0, 1]),
        block_ids=torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]),
        segment_ids=torch.tensor([0, 0, 1, 1, 2, 1, 2, 2]),
        completion_starts=torch.tensor([2, 4, 5, 6]),
        completion_ends=torch.tensor([4, 5, 6, 8]),
        prefix_starts=torch.tensor([0, 0, 5, 5]),
        prefix_ends=torch.tensor([2, 2, 5, 5]),
        group_index=torch.tensor([1, 1, 1, 0]),
        slot_index=torch.tensor([0, 2, 1, 0]),
        num_groups=2,
        num_slots=3,
    )


def encoder_blocks() -> PackedLayout:
    return PackedLayout(
        positions=torch.tensor([0, 1, 2, 0, 1]),
        block_ids=torch.tensor([0, 0, 0, 1, 1]),
        segment_ids=torch.zeros(5, dtype=torch.int64),
        completion_starts=torch.tensor([1, 4]),
        completion_ends=torch.tensor([3, 5]),
        prefix_starts=torch.tensor([0, 3]),
        prefix_ends=torch.tensor([1, 4]),
        group_index=torch.tensor([0, 0]),
        slot_index=torch.tensor([0, 1]),
        num_groups=1,
        num_slots=2,
        causal=False,
    )


def test_predictor_index_by_hand() -> None:
    # The prefix's last token (place 1) predicts the first token of both its completions.
    assert two_blocks().predictor_index.tolist() == [-1, 0, 1, 2, 1, -1, -1, 6]


def test_scatter_to_table_by_hand_and_with_gradient() -> None:
    values = torch.tensor([10.0, 20.0, 30.0, 40.0], requires_grad=True)
    table = scatter_to_table(values, two_blocks(), fill=-1.0)
    assert table.tolist() == [[40.0, -1.0, -1.0], [10.0, 30.0, 20.0]]
    (table * torch.arange(6.0).reshape(2, 3)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [3.0, 5.0, 4.0, 0.0]
    assert scatter_to_table(torch.ones(4, 5), two_blocks()).shape == (2, 3, 5)
    with pytest.raises(ValueError, match="3 values for 4 completions"):
        scatter_to_table(torch.ones(3), two_blocks())


def test_to_keeps_everything() -> None:
    batch = PackedBatch(torch.arange(8), two_blocks()).to("cpu")
    assert batch.layout.positions.tolist() == two_blocks().positions.tolist()
    assert (batch.layout.num_groups, batch.layout.num_slots, batch.layout.causal) == (2, 3, True)
    assert batch.to("meta").layout.completion_ends.device.type == "meta"


def test_check_layout_accepts_right_ones() -> None:
    check_layout(two_blocks())
    check_layout(encoder_blocks())


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("positions", [0, 1, 2, 3, 4, 0, 0, 1], r"positions\[4\] is 4 but the spans say 2"),
        ("positions", [0, 1, 2, 3, 2, 0, 0, 0], r"positions\[7\] is 0"),
        ("block_ids", [0, 0, 0, 0, 0, 1, 1, 2], r"block_ids\[7\] is 2"),
        ("segment_ids", [0, 0, 1, 1, 1, 1, 2, 2], r"segment_ids\[4\] is 1 but the spans say 2"),
        ("completion_starts", [2, 4, 5, 7], "completion 3 neither follows"),
        ("completion_ends", [4, 5, 6, 9], "ends at 9 but the row has 8"),
        ("completion_ends", [4, 4, 6, 8], "no token"),
        ("prefix_starts", [0, 1, 5, 5], "completion 1 neither follows"),
        ("prefix_ends", [2, 2, 4, 4], "ends before it starts"),
        ("group_index", [1, 1, 1, 2], r"group_index goes from 1 to 2, outside 0\.\.1"),
        ("slot_index", [0, 2, -1, 0], "slot_index goes from -1"),
        ("slot_index", [0, 2, 2, 0], "same slot"),
    ],
)
def test_check_layout_refuses(name: str, values: list[int], message: str) -> None:
    broken = replace(two_blocks(), **{name: torch.tensor(values)})
    with pytest.raises(ValueError, match=message):
        check_layout(broken)


def test_check_layout_refuses_dtypes_and_shared_encoder_blocks() -> None:
    with pytest.raises(ValueError, match="positions must be int64"):
        check_layout(replace(two_blocks(), positions=torch.arange(8.0)))
    with pytest.raises(ValueError, match=r"slot_index must be int64 \[4\]"):
        check_layout(replace(two_blocks(), slot_index=torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="bidirectional"):
        check_layout(replace(two_blocks(), causal=False))
    with pytest.raises(ValueError, match=r"segment_ids\[1\] is 1"):
        check_layout(replace(encoder_blocks(), segment_ids=torch.tensor([0, 1, 1, 0, 1])))


def test_a_moved_layout_is_read_on_the_host_that_it_came_from() -> None:
    layout = two_blocks()
    assert layout.on_host is layout
    moved = layout.to("meta")
    assert moved.positions.device.type == "meta"
    assert moved.on_host is layout
    assert PackedAttention(moved).blocks == PackedAttention(layout).blocks
    assert moved.to("meta").on_host is layout


def test_a_copy_to_a_gpu_is_pinned_and_waited_for_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    tensor = torch.arange(3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *where, **how: calls.append((where, how)) or self)
    to_device(tensor, "cuda:1")
    assert calls == ["pinned", (("cuda:1",), {"non_blocking": True})]
    calls.clear()
    to_device(tensor, "cpu")
    assert calls == [(("cpu",), {})]
