"""Backends of packed attention against the reference; those for CUDA through kernels written out for the CPU."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from plaudit.core.layout import PackedLayout
from plaudit.models import attention_backends, attention_flex, attention_varlen
from plaudit.models.attention_backends import BACKENDS, missing_part, pick_backend, self_test
from plaudit.models.attention_cascade import merge_parts
from plaudit.models.attention_flex import mask_function, padded_indices, tile_kinds
from plaudit.models.attention_layout import AttentionOptions, PackedAttention, allowed_pairs, block_spans
from tests.models.conftest import random_batch

PLAIN = AttentionOptions(scaling=1.0)
SHAPES = [(7, [5, 1, 8]), (1, [1]), (1, [2, 9]), (12, [1, 3, 1, 2])]
LONG = [(300, [40, 1, 150]), (3, [200, 2]), (1, [1])]


def layout_of(shapes: list[tuple[int, list[int]]], *, causal: bool = True) -> PackedLayout:
    return random_batch(shapes, causal=causal).layout


def tensors(tokens: int, *, heads: int = 4, groups: int = 2, size: int = 8, value_size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, size), (groups, size), (groups, value_size))
    return [torch.randn(1, n, tokens, d, generator=generator, dtype=torch.float64) for n, d in shapes]


def outcome(name: str, layout: PackedLayout, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """The output and every gradient of a fixed mix of it."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = BACKENDS[name](*leaves, PackedAttention(layout), AttentionOptions(**{"scaling": 0.4, **options}))
    mix = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    sinks = options.get("sinks")
    return [out.detach(), *torch.autograd.grad((out * mix).sum(), [*leaves, *([] if sinks is None else [sinks])])]


def assert_equal_outcomes(name: str, layout: PackedLayout, inputs: list[Tensor], **options: Any) -> None:
    ours, theirs = outcome(name, layout, inputs, **options), outcome("reference", layout, inputs, **options)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert (mine - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks", "value-size", "ungrouped"])
def test_blocks_equal_the_reference(causal: bool, window: int | None, kind: str) -> None:
    layout = layout_of(SHAPES, causal=causal)
    sizes = {"value-size": {"value_size": 5}, "ungrouped": {"groups": 4}}.get(kind, {})
    options: dict[str, Any] = {"softcap": 2.0} if kind == "softcap" else {}
    if kind == "sinks":
        options["sinks"] = torch.linspace(-1, 2, 4, dtype=torch.float64).requires_grad_()
    assert_equal_outcomes("blocks", layout, tensors(layout.num_tokens, **sizes), window=window, **options)


def test_blocks_cut_long_windows_into_chunks() -> None:
    for causal in (True, False):
        layout = layout_of([(700, [300, 20])], causal=causal)
        assert_equal_outcomes("blocks", layout, tensors(layout.num_tokens), window=30)


def test_parts_merge_by_hand() -> None:
    # Keys of weight 1 and 3 with values 10 and 2: (1 · 10 + 3 · 2) / 4 = 4, log-sum-exp log 4.
    log = torch.tensor([[1.0], [3.0]]).log()
    out, lse = merge_parts(torch.tensor([[[10.0]]]), log[:1], torch.tensor([[[2.0]]]), log[1:])
    assert out.item() == pytest.approx(4.0)
    assert lse.item() == pytest.approx(torch.tensor(4.0).log().item())


def saved_sizes(layout: PackedLayout) -> list[int]:
    """Elements of everything that the backward of the CPU's backend keeps."""
    found = []
    leaves = [t.float().requires_grad_() for t in tensors(layout.num_tokens)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t.numel()) or t, lambda t: t):
        BACKENDS["blocks"](*leaves, PackedAttention(layout), PLAIN)
    return found


def test_memory_is_linear_in_unique_tokens() -> None:
    one, more = saved_sizes(layout_of([(50, [30] * 2)])), saved_sizes(layout_of([(200, [30] * 16)]))
    # Queries and output of 4 heads, keys and values of 2, one log-sum-exp a head: 100 numbers a token, and no more.
    assert sum(one) == 110 * 100
    assert sum(more) == 680 * 100


def test_a_row_with_tokens_of_no_text_is_refused() -> None:
    layout = layout_of([(2, [2])])
    short = PackedLayout(**{**vars(layout), "completion_ends": layout.completion_ends - 1})
    with pytest.raises(ValueError, match="cover 3 of its 4 tokens"):
        block_spans(short)


# ---- kernels for many lengths, written out


def loop_attention(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, window: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """`[N, h, d]`, `[S, g, d]` to `[N, h, d]` and log-sum-exp `[h, N]`; queries stand at the end of their keys."""
    outs, sums = [], []
    for i in range(len(q_ends) - 1):
        (a, b), (c, d) = q_ends[i : i + 2].tolist(), k_ends[i : i + 2].tolist()
        keys, values = (t[c:d].repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        distance = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)[None]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        hidden |= (distance > window[0]) if window[0] >= 0 else False
        hidden |= (-distance > window[1]) if window[1] >= 0 else False
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        scores = scores.masked_fill(hidden, float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, 1)


def forward_kernel(q, k, v, q_ends, k_ends, max_q, max_k, causal, scale, window, gqa):  # type: ignore[no-untyped-def]
    assert (max_q, max_k) == (int(q_ends.diff().max()), int(k_ends.diff().max()))
    assert q_ends.dtype == k_ends.dtype == torch.int32
    assert list(window) == ([-1, 0] if causal else [-1, -1])
    return *loop_attention(q, k, v, q_ends, k_ends, tuple(window), scale), torch.zeros(2)


def backward_kernel(grad, q, k, v, out, lse, q_ends, k_ends, max_q, max_k, causal, rng, scale, window):  # type: ignore[no-untyped-def]
    """FlashAttention's backward: everything from the given output and log-sum-exp."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    repeats = q.shape[1] // k.shape[1]
    for i in range(len(q_ends) - 1):
        (a, b), (c, d) = q_ends[i : i + 2].tolist(), k_ends[i : i + 2].tolist()
        keys, values = (t[c:d].repeat_interleave(repeats, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(b - a, d - c).tril(d - c - b + a) == 0, float("-inf"))
        weights = (scores - lse[:, a:b, None]).exp()
        slope = torch.einsum("qhd,khd->hqk", grad[a:b], values) - (grad[a:b] * out[a:b]).sum(-1).T[..., None]
        inner = weights * slope * scale
        dq[a:b] = torch.einsum("hqk,khd->qhd", inner, keys)
        dk[c:d] = torch.einsum("hqk,qhd->khd", inner, q[a:b]).unflatten(1, (-1, repeats)).sum(2)
        dv[c:d] = torch.einsum("hqk,qhd->khd", weights, grad[a:b]).unflatten(1, (-1, repeats)).sum(2)
    return dq, dk, dv


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_varlen_lays_out_what_the_kernels_expect(
    causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def public(q, k, v, q_ends, k_ends, max_q, max_k, *, scale, window_size, enable_gqa):  # type: ignore[no-untyped-def]
        assert (max_q, max_k) == (int(q_ends.diff().max()), int(k_ends.diff().max()))
        return loop_attention(q, k, v, q_ends, k_ends, window_size, scale)[0]

    monkeypatch.setattr(attention_varlen, "_arguments_of_operator", lambda: ("query", "window_size", "enable_gqa"))
    monkeypatch.setattr(attention_varlen, "_kernels", lambda: (forward_kernel, backward_kernel))
    monkeypatch.setattr(varlen, "varlen_attn", public)
    layout = layout_of(SHAPES, causal=causal)
    assert_equal_outcomes("varlen", layout, tensors(layout.num_tokens), window=window)


@pytest.mark.parametrize("window", [None, 3])
def test_varlen_hands_torch_2_11_what_its_kernels_take(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def forward(q, k, v, q_ends, k_ends, max_q, max_k, causal, scale, window):  # type: ignore[no-untyped-def]
        return forward_kernel(q, k, v, q_ends, k_ends, max_q, max_k, causal, scale, window, True)

    def public(q, k, v, q_ends, k_ends, max_q, max_k, *, scale, window_size):  # type: ignore[no-untyped-def]
        return loop_attention(q, k, v, q_ends, k_ends, window_size, scale)[0]

    monkeypatch.setattr(attention_varlen, "_arguments_of_operator", lambda: ("query", "window_size"))
    monkeypatch.setattr(attention_varlen, "_kernels", lambda: (forward, backward_kernel))
    monkeypatch.setattr(varlen, "varlen_attn", public)
    layout = layout_of(SHAPES)
    assert_equal_outcomes("varlen", layout, tensors(layout.num_tokens), window=window)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_flash_attn_lays_out_what_the_package_expects(
    causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def public(q, k, v, q_ends, k_ends, max_q, max_k, *, dropout_p, softmax_scale, causal, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
        sides = (window_size[0], 0 if causal else window_size[1])
        return loop_attention(q, k, v, q_ends, k_ends, sides, softmax_scale)[0]

    package: Any = ModuleType("flash_attn")
    package.flash_attn_varlen_func = public
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    layout = layout_of(SHAPES, causal=causal)
    assert_equal_outcomes("flash_attn", layout, tensors(layout.num_tokens), window=window)


def test_kernels_of_torch_have_the_arguments_that_are_passed() -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    forward, backward = (kernel._opoverload._schema if hasattr(kernel, "_opoverload") else kernel.default._schema
                         for kernel in attention_varlen._kernels())  # fmt: skip
    names = [argument.name for argument in forward.arguments]
    assert names[:10] == [
        *("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"),
        *("is_causal", "scale", "window_size"),
    ]
    # torch 2.10 and 2.11 end here.
    assert names[10:11] in ([], ["enable_gqa"])
    names = [argument.name for argument in backward.arguments]
    assert names == [
        *("grad_out", "query", "key", "value", "out", "lse", "cu_seq_q", "cu_seq_k", "max_q", "max_k"),
        *("is_causal", "rng_state", "scale", "window_size"),
    ]


# ---- FlexAttention


@pytest.mark.parametrize("shapes", [SHAPES, LONG])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3, 100])
def test_the_flex_mask_and_its_tiles(shapes: list[tuple[int, list[int]]], causal: bool, window: int | None) -> None:
    layout, tile = layout_of(shapes, causal=causal), 16
    indices = padded_indices(layout, tile)
    size = indices.blocks.shape[0]
    place = torch.arange(size)
    rule = mask_function(indices, causal=causal, window=window)
    zero = torch.zeros((), dtype=torch.long)
    dense = rule(zero, zero, place[:, None], place[None])
    tokens = layout.num_tokens
    assert torch.equal(dense[:tokens, :tokens], allowed_pairs(layout, window))
    # The filling sees itself and is seen by nothing else.
    assert torch.equal(dense[tokens:], torch.eye(size, dtype=torch.bool)[tokens:])
    assert not dense[:tokens, tokens:].any()
    mixed, full = tile_kinds(indices, causal=causal, window=window, tile=tile)
    tiles = dense.view(size // tile, tile, size // tile, tile).transpose(1, 2)
    assert not (mixed & full).any()
    assert not tiles[~(mixed | full)].any()
    assert tiles[full].all()
    if window is None:
        # The judgement from extremes alone is then nearly as sharp as looking at every pair.
        assert mixed.sum() <= 1.3 * (tiles.any(-1).any(-1) & ~tiles.all(-1).all(-1)).sum() + 1


@pytest.mark.parametrize("kind", ["plain", "window", "softcap", "sinks", "encoder"])
def test_flex_equals_the_reference_in_its_forward(kind: str) -> None:
    layout = layout_of(LONG, causal=kind != "encoder")
    inputs = [t.float() for t in tensors(layout.num_tokens, size=16, value_size=16)]
    options: dict[str, Any] = {"window": 100 if kind == "window" else None, "scaling": 0.3}
    options["softcap"] = 2.0 if kind == "softcap" else None
    options["sinks"] = torch.linspace(-1, 2, 4) if kind == "sinks" else None
    with torch.no_grad():
        ours = BACKENDS["flex"](*inputs, PackedAttention(layout), AttentionOptions(**options))
        theirs = BACKENDS["reference"](*inputs, PackedAttention(layout), AttentionOptions(**options))
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_flex_is_not_compiled_anew_for_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        programs.append(len(inputs))
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(flex_attention, backend=counting)
    monkeypatch.setattr(attention_flex, "_kernel", lambda device: compiled)
    for prefix, count in ((150, 1), (200, 2), (480, 1), (310, 3), (620, 1)):
        layout = layout_of([(prefix, [40, 1])] * count)
        inputs = [t.float() for t in tensors(layout.num_tokens, size=16, value_size=16)]
        with torch.no_grad():
            ours = BACKENDS["flex"](*inputs, PackedAttention(layout), PLAIN)
            theirs = BACKENDS["reference"](*inputs, PackedAttention(layout), PLAIN)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    # One for the first length, one for all others.
    assert len(programs) == 2


# ---- the choice


def test_on_the_cpu_blocks_are_taken_and_others_say_what_they_need() -> None:
    layout = layout_of(SHAPES)
    inputs = tensors(layout.num_tokens)
    assert pick_backend(PackedAttention(layout), *inputs, PLAIN) == "blocks"
    for name in ("varlen", "flash_attn", "flex"):
        with pytest.raises(ValueError, match=f"'{name}' needs .*; use attn_implementation: auto"):
            pick_backend(PackedAttention(layout, name), *inputs, PLAIN)
    with torch.no_grad():
        assert pick_backend(PackedAttention(layout, "flex"), *inputs, PLAIN) == "flex"
        with pytest.raises(ValueError, match="'flex' has no dropout"):
            pick_backend(PackedAttention(layout, "flex"), *inputs, replace(PLAIN, dropout=0.1))


@pytest.mark.parametrize(
    ("options", "dtype", "broken", "wanted"),
    [
        ({}, torch.bfloat16, (), "varlen"),
        ({"window": 3}, torch.bfloat16, ("varlen",), "flash_attn"),
        ({}, torch.bfloat16, ("varlen", "flash_attn", "flex"), "blocks"),
        ({"softcap": 2.0}, torch.bfloat16, (), "flash_attn"),
        ({"dropout": 0.1}, torch.bfloat16, (), "flash_attn"),
        ({"sinks": torch.zeros(4)}, torch.bfloat16, (), "flex"),
        ({}, torch.float32, (), "flex"),
        ({"dropout": 0.1}, torch.float32, (), "blocks"),
    ],
)
def test_the_order_on_cuda(
    options: dict[str, Any],
    dtype: torch.dtype,
    broken: tuple[str, ...],
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_backends, "missing_part", lambda name, device: None)
    monkeypatch.setattr(attention_backends, "self_test", lambda name, *others: "broken" if name in broken else None)
    stand_in: Any = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 4, 27, 64))
    asked = replace(PLAIN, **options)
    layout = layout_of(SHAPES)
    # A short row is not worth compiling for.
    picked = pick_backend(PackedAttention(layout), stand_in, stand_in, stand_in, asked)
    assert picked == ("blocks" if wanted == "flex" else wanted)
    monkeypatch.setattr(attention_backends, "WORTH_COMPILING", layout.num_tokens)
    assert pick_backend(PackedAttention(layout), stand_in, stand_in, stand_in, asked) == wanted


def test_the_self_test_passes_what_is_right_and_logs_what_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu = torch.device("cpu")
    for windowed in (False, True):
        assert self_test("blocks", cpu, torch.float32, 8, windowed) is None
    assert self_test("blocks", cpu, torch.bfloat16, 8, False) is None

    def careless(*arguments: Any) -> Tensor:
        *others, options = arguments
        return BACKENDS["blocks"](*others, replace(options, window=None))

    monkeypatch.setitem(BACKENDS, "careless", careless)
    assert self_test("careless", cpu, torch.float32, 8, False) is None
    assert "off by" in str(self_test("careless", cpu, torch.float32, 8, True))
    assert "careless is not used on cpu" in caplog.text


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_part("blocks", torch.device("cpu")) is None
    assert "CUDA" in str(missing_part("flex", torch.device("cpu")))
    monkeypatch.setattr(attention_backends.importlib.util, "find_spec", lambda name: None)
    assert missing_part("flash_attn", torch.device("cuda")) == "needs the package flash_attn"
    assert "torch 2.10" in str(missing_part("varlen", torch.device("cuda")))
    assert missing_part("flex", torch.device("cuda")) == "needs triton"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["varlen", "flash_attn", "flex", "blocks"])
@pytest.mark.parametrize("windowed", [False, True])
def test_on_a_gpu_values_and_gradients_equal_the_reference(name: str, windowed: bool) -> None:
    device = torch.device("cuda")
    reason = missing_part(name, device)
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    assert self_test(name, device, torch.bfloat16, 64, windowed) is None
