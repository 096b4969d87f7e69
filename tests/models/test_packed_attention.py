"""Packed attention against stock transformers, one plain unpadded row per completion: scores and every gradient."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from plaudit.core.layout import PackedBatch
from plaudit.models import attention_backends, attention_blocks, attention_layout
from plaudit.models.attention_layout import AttentionOptions, PackedAttention, allowed_pairs
from plaudit.models.attention_reference import explicit_attention
from plaudit.models.packed_attention import PACKED_ATTENTION, register_packed_attention
from plaudit.models.states import packed_states, padded_states, position_offset
from tests.models.conftest import ARCHITECTURES, random_batch, texts_of, tiny_base

BACKENDS = ("blocks", "reference")
ENCODERS = ("bert", "modernbert-window", "roberta")
# Prompts and completions from one token, groups of K = 1, 2, 3, 4 and 9; windows in the configurations are 3 or 4.
SHAPES = [(7, [5, 1, 8]), (1, [1]), (1, [2, 9]), (12, [1, 3, 1, 2]), (3, [1, 2, 3, 4, 5, 6, 7, 8, 9])]


@pytest.fixture(autouse=True)
def _register() -> None:
    register_packed_attention()


def scores_and_gradients(model: nn.Module, states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores from a fixed head over last-token states `[C, H]`, and gradients of a fixed mix of their squares."""
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(states.shape[1], generator=generator) / states.shape[1] ** 0.5
    scores = states @ head
    mix = torch.randn(scores.shape[0], generator=generator)
    model.zero_grad()
    (mix * (scores + 0.3 * scores.square())).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return scores.detach(), gradients


def stock_last_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Each text alone through the plain forward, nothing padded, nothing but its ids given."""
    return torch.stack([model(input_ids=ids[None]).last_hidden_state[0, -1] for ids in texts_of(batch)])


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    scale = theirs[0].abs().max()
    assert (ours[0] - theirs[0]).abs().max() <= 1e-5 * scale
    assert ours[1].keys() == theirs[1].keys()
    largest = max(gradient.norm() for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():
        difference = (ours[1][name] - gradient).norm()
        # The floor is for tensors whose true gradient is zero (key biases) or nearly so.
        assert difference <= 1e-5 * gradient.norm() + 2e-7 * largest, name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_scores_and_gradients_equal_stock_rows(name: str) -> None:
    causal = name not in ENCODERS
    batch = random_batch(SHAPES, causal=causal)
    stock = tiny_base(name, attn_implementation="eager")
    theirs = scores_and_gradients(stock, stock_last_states(stock, batch))
    ours_model = tiny_base(name, attn_implementation=PACKED_ATTENTION)
    ends = batch.layout.completion_ends - 1
    for backend in BACKENDS:
        states = packed_states(ours_model, batch, backend=backend)
        assert_same(scores_and_gradients(ours_model, states[ends]), theirs)
    for side in ("right", "left"):
        padded = scores_and_gradients(ours_model, padded_states(ours_model, batch, side=side)[ends])
        assert_same(padded, theirs)


@pytest.mark.parametrize("name", ["llama", "gemma2-window-softcap", "modernbert-window"])
@pytest.mark.parametrize("count", range(1, 10))
def test_every_group_size(name: str, count: int) -> None:
    causal = name not in ENCODERS
    batch = random_batch([(1 + count % 4, [1 + (3 * k) % 7 for k in range(count)])], causal=causal)
    model = tiny_base(name, attn_implementation=PACKED_ATTENTION)
    with torch.no_grad():
        packed = packed_states(model, batch)[batch.layout.completion_ends - 1]
        assert torch.allclose(packed, stock_last_states(model, batch), rtol=0, atol=1e-5 * packed.abs().max().item())


@pytest.mark.parametrize("name", ["gpt2", "gemma3-window", "gemma2-window-softcap", "gpt_oss-window-sinks", "bert"])
def test_without_a_layout_it_is_the_stock_attention(name: str) -> None:
    ids = torch.randint(3, 64, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    stock, ours = tiny_base(name, attn_implementation="eager"), tiny_base(name, attn_implementation=PACKED_ATTENTION)
    with torch.no_grad():
        for arguments in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
            theirs = stock(**arguments).last_hidden_state[:, 4:]
            mine = ours(**arguments).last_hidden_state[:, 4:]
            assert torch.allclose(mine, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def test_the_rule_by_hand() -> None:
    # Prompt a b, completions c d | e, then a prompt f with completion g.
    batch = random_batch([(2, [2, 1]), (1, [1])])
    expected = [
        "1......",
        "11.....",
        "111....",
        "1111...",
        "11..1..",
        ".....1.",
        ".....11",
    ]
    wanted = torch.tensor([[char == "1" for char in row] for row in expected])
    assert torch.equal(allowed_pairs(batch.layout), wanted)
    # A window of 2 sees its own and the previous position: d no prompt at all, e the prompt's last token although
    # c and d stand between them in the row.
    windowed = ["1......", "11.....", ".11....", "..11...", ".1..1..", ".....1.", ".....11"]
    wanted = torch.tensor([[char == "1" for char in row] for row in windowed])
    assert torch.equal(allowed_pairs(batch.layout, 2), wanted)


def test_the_rule_for_encoders_by_hand() -> None:
    batch = random_batch([(1, [2, 1])], causal=False)
    wanted = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).bool()
    assert torch.equal(allowed_pairs(batch.layout), wanted)
    wanted[0, 2] = wanted[2, 0] = False
    assert torch.equal(allowed_pairs(batch.layout, 2), wanted)


def test_explicit_attention_equals_the_kernel_and_sinks_take_their_share() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 4, generator=generator) for _ in range(3))
    mask = torch.ones(5, 5).tril().bool()
    kernel = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.5)
    assert torch.allclose(explicit_attention(query, key, value, mask, AttentionOptions(scaling=0.5)), kernel, atol=1e-6)
    # The first token sees itself alone: with a sink of the same logit, half of the weight is gone.
    logit = (query[0, :, 0] * key[0, :, 0]).sum(-1) * 0.5
    out = explicit_attention(query, key, value, mask, AttentionOptions(scaling=0.5, sinks=logit))
    assert torch.allclose(out[0, :, 0], 0.5 * value[0, :, 0], atol=1e-6)
    # A tiny cap makes all scores equal: the plain mean.
    flat = explicit_attention(query, key, value, mask, AttentionOptions(scaling=0.5, softcap=1e-6))
    assert torch.allclose(flat[0, 0, 4], value[0, 0].mean(0), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt_oss-window-sinks"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    batch = random_batch(SHAPES)
    model = tiny_base(name, attn_implementation=PACKED_ATTENTION).train()
    ends = batch.layout.completion_ends - 1
    plain = scores_and_gradients(model, packed_states(model, batch)[ends])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = scores_and_gradients(model, packed_states(model, batch)[ends])
    assert torch.equal(again[0], plain[0])
    for name, gradient in plain[1].items():
        assert torch.equal(again[1][name], gradient), name


@pytest.mark.parametrize(
    ("backend", "wanted"), [("reference", {(4, True): 1, (None, True): 1}), ("blocks", {(4, True): 24})]
)
def test_masks_are_built_once_per_window(
    backend: str, wanted: dict[tuple[int | None, bool], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: Counter[tuple[int | None, bool]] = Counter()
    real = attention_layout.visible_positions

    def counting(queries: Tensor, keys: Tensor, *, causal: bool, window: int | None) -> Tensor:
        built[window, causal] += 1
        return real(queries, keys, causal=causal, window=window)

    for module in (attention_layout, attention_blocks):
        monkeypatch.setattr(module, "visible_positions", counting)
    attention = PackedAttention(random_batch(SHAPES).layout, backend)
    tensors = torch.randn(3, 1, 2, attention.layout.num_tokens, 8).unbind(0)
    for window in (4, None, 4, None):
        attention_backends.BACKENDS[backend](*tensors, attention, AttentionOptions(scaling=1.0, window=window))
    # Five prompts and nineteen completions; without a window none of them needs a mask.
    assert built == wanted


def test_an_unknown_backend_and_a_wrong_length_are_refused() -> None:
    batch = random_batch([(2, [2])])
    model = tiny_base("llama", attn_implementation=PACKED_ATTENTION)
    with pytest.raises(ValueError, match="unknown packed attention backend 'fast'; known: auto, blocks"):
        packed_states(model, batch, backend="fast")
    with pytest.raises(ValueError, match="layout of 4 tokens"):
        model(input_ids=torch.tensor([[3, 4, 5]]), packed_attention=PackedAttention(batch.layout))


def test_a_forward_that_skips_the_packed_attention_is_an_error() -> None:
    model = tiny_base("llama", attn_implementation="sdpa")
    with pytest.raises(RuntimeError, match="called 0 times in 2 layers"):
        packed_states(model, random_batch([(2, [2])]))


def test_roberta_counts_positions_behind_its_padding_index() -> None:
    assert position_offset(tiny_base("roberta")) == 2
    assert position_offset(tiny_base("bert")) == 0


@pytest.mark.parametrize("name", ["llama", "gemma2-window-softcap"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_agrees_with_plain_rows_as_far_as_it_goes(name: str, autocast: bool) -> None:
    batch = random_batch(SHAPES)
    model = tiny_base(name, attn_implementation=PACKED_ATTENTION)
    with torch.no_grad():
        exact = packed_states(model, batch)
        model = model if autocast else model.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            packed, padded = packed_states(model, batch).float(), padded_states(model, batch).float()
    # The two round at different places: they differ no more than either does from float32.
    error = (padded - exact).norm()
    assert 0 < error < 0.1 * exact.norm()
    assert (packed - exact).norm() <= 1.5 * error
