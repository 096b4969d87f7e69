"""How attention on the CPU is cut into calls of the flash kernel, and that the cuts change nothing."""

from collections.abc import Iterator

import pytest
import torch

from plaudit.models import attention_cpu
from plaudit.models.attention_backends import BACKENDS
from plaudit.models.attention_cpu import KernelCall, Spans, plan_kernel_calls, rows_of
from plaudit.models.attention_layout import AttentionOptions, PackedAttention, Sequences, allowed_pairs
from tests.models.conftest import random_batch
from tests.models.test_attention_backends import assert_equal_outcomes, layout_of, tensors

SHAPES = [(19, [5, 5, 5, 8]), (1, [1]), (4, [12, 12]), (30, [1, 3]), (4, [12, 12]), (8, [4])]


@pytest.fixture(autouse=True)
def _small_triangles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triangles of 4 tokens, so that short texts are cut as long ones are."""
    monkeypatch.setattr(attention_cpu, "TRIANGLE", 4)
    plan_kernel_calls.cache_clear()
    yield
    plan_kernel_calls.cache_clear()


def spans(start: int, length: int, step: int = 0) -> Spans:
    return Spans(start, length, step)


def test_calls_of_one_run_by_hand() -> None:
    # 18 tokens: triangles 0-4, 4-8, 8-12, 12-16 in one call, 16-18; rectangles of 4, of 8 and of 16.
    run = ((0, 18),)
    assert plan_kernel_calls(Sequences(run, run, whole=True), True) == (
        KernelCall(4, spans(0, 4, 4), spans(0, 4, 4), True, False),
        KernelCall(1, spans(16, 2), spans(16, 2), True, False),
        KernelCall(2, spans(4, 4, 8), spans(0, 4, 8), False, True),
        KernelCall(1, spans(8, 8), spans(0, 8), False, True),
        KernelCall(1, spans(16, 2), spans(0, 16), False, True),
    )


def test_short_runs_of_equal_length_share_a_call() -> None:
    runs = ((0, 7), (7, 14), (14, 21), (21, 27))
    assert plan_kernel_calls(Sequences(runs, runs, whole=True), True) == (
        KernelCall(3, spans(0, 7, 7), spans(0, 7, 7), True, False),
        KernelCall(1, spans(21, 6), spans(21, 6), True, False),
    )


def test_keys_that_overlap_do_not_share_a_call() -> None:
    # Both read the same prefix: their shares of its gradient must not be added at once.
    sequences = Sequences(((4, 6), (6, 8)), ((0, 4), (0, 4)))
    assert [call.number for call in plan_kernel_calls(sequences, False)] == [1, 1]


@pytest.mark.parametrize("causal", [True, False])
def test_every_allowed_pair_is_in_exactly_one_call(causal: bool) -> None:
    layout = layout_of(SHAPES, causal=causal)
    attention = PackedAttention(layout)
    seen = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.long)
    for sequences, triangular in ((attention.own, causal), (attention.shared, False)):
        touched = torch.zeros(layout.num_tokens, dtype=torch.bool)
        for call in plan_kernel_calls(sequences, triangular):
            places = torch.arange(layout.num_tokens)
            for queries, keys in zip(
                rows_of(places, call.queries, call.number), rows_of(places, call.keys, call.number), strict=True
            ):
                square = torch.ones(len(queries), len(keys), dtype=torch.long)
                seen[queries[:, None], keys] += square.tril() if call.causal else square
                # What is merged has been written before, what is not has not.
                assert touched[queries].all() if call.merged else not touched[queries].any()
                touched[queries] = True
    assert torch.equal(seen, allowed_pairs(layout).long())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_values_and_gradients_equal_the_reference(causal: bool, groups: int) -> None:
    layout = layout_of(SHAPES, causal=causal)
    assert_equal_outcomes("blocks", layout, tensors(layout.num_tokens, groups=groups))


@pytest.mark.parametrize("shapes", [[(6, [3])] * 3, [(11, [9])] * 2, [(40, [3])], [(1, [1])]])
def test_rows_that_need_no_merging_equal_the_reference(shapes: list[tuple[int, list[int]]]) -> None:
    layout = layout_of(shapes)
    assert_equal_outcomes("blocks", layout, tensors(layout.num_tokens))


def test_bfloat16_stays_near_the_reference() -> None:
    layout = random_batch(SHAPES).layout
    query, key, value = (t.to(torch.bfloat16) for t in tensors(layout.num_tokens))
    options = AttentionOptions(scaling=0.4)
    wanted = BACKENDS["reference"](*(t.float() for t in (query, key, value)), PackedAttention(layout), options)
    found = BACKENDS["blocks"](query, key, value, PackedAttention(layout), options)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() <= 8 * torch.finfo(torch.bfloat16).eps * wanted.norm()
