"""The backends of packed attention by name, what each can do, and which one is taken where nobody chose."""

import importlib.util
import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from plaudit.core.layout import PackedLayout
from plaudit.models.attention_blocks import block_backend
from plaudit.models.attention_flex import flex_backend
from plaudit.models.attention_layout import AttentionOptions, PackedAttention
from plaudit.models.attention_reference import reference_backend
from plaudit.models.attention_varlen import flash_backend, varlen_backend

logger = logging.getLogger(__name__)

PackedBackend = Callable[[Tensor, Tensor, Tensor, PackedAttention, AttentionOptions], Tensor]
"""`(query, key, value, attention, options) -> [1, h, N, d]`; shapes as `reference_backend` says."""

BACKENDS: dict[str, PackedBackend] = {
    "blocks": block_backend,
    "flash_attn": flash_backend,
    "flex": flex_backend,
    "reference": reference_backend,
    "varlen": varlen_backend,
}
"""Ways to compute packed attention, by name; every one must equal `reference_backend`."""

CUDA_ORDER = ("varlen", "flash_attn", "flex", "blocks")
"""What is tried on CUDA, in this order; every other device takes `blocks`."""

_HALF = (torch.bfloat16, torch.float16)

WORTH_COMPILING = 4096
"""Tokens of a row from which `flex` may be chosen: its two programs are compiled first (12 s each on an H200)."""


def require_backend(name: str) -> None:
    """Refuse a name that no backend has.

    Raises:
        ValueError: for an unknown name.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown packed attention backend {name!r}; known: auto, {', '.join(sorted(BACKENDS))}")


def missing_part(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on this device with what is installed, or None where it can.

    Args:
        name: one of `BACKENDS`.
        device: where queries are.
    """
    if name in ("blocks", "reference"):
        return None
    if name == "varlen" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"needs torch 2.10 or later, this is {torch.__version__}"
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        return "needs the package flash_attn"
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if name == "flex" and importlib.util.find_spec("triton") is None:
        return "needs triton"
    return None


def unsupported(name: str, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> str | None:
    """Why a backend cannot compute this call, or None where it can. Windows and grouped heads: all of them can.

    Args:
        name: one of `BACKENDS`.
        query: `[1, h, N, d]`.
        key: `[1, g, N, d]`.
        value: `[1, g, N, e]`.
        options: of the layer.
    """
    if name in ("blocks", "reference"):
        return None
    if options.sinks is not None and name != "flex":
        return "has no attention sinks"
    if options.softcap is not None and name == "varlen":
        return "has no soft-cap"
    if options.dropout and name != "flash_attn":
        return "has no dropout"
    if name == "flex":
        return None
    if query.dtype not in _HALF or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"needs bfloat16 or float16, these are {query.dtype}, {key.dtype} and {value.dtype}"
    size = query.shape[-1]
    if key.shape[-1] != size or value.shape[-1] != size or size % 8 or size > 256:
        return f"needs heads of one size, a multiple of 8 up to 256, these have {size} and {value.shape[-1]}"
    return None


def pick_backend(
    attention: PackedAttention, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> str:
    """The backend of one layer: the one that was asked for, or the first that can do it and passes its self-test.

    Args:
        attention: the layout and the wish.
        query: `[1, h, N, d]`.
        key: `[1, g, N, d]`.
        value: `[1, g, N, e]`.
        options: of the layer.

    Returns:
        A key of `BACKENDS`.

    Raises:
        ValueError: if the one that was asked for cannot do it here.
    """
    if attention.backend == "auto" and query.device.type != "cuda":
        return "blocks"
    if attention.backend == "auto":
        for name in CUDA_ORDER[:-1]:
            if missing_part(name, query.device) or unsupported(name, query, key, value, options):
                continue
            if name == "flex" and attention.layout.num_tokens < WORTH_COMPILING:
                continue
            active = attention.active_window(options.window) is not None
            if self_test(name, query.device, query.dtype, query.shape[-1], active) is None:
                return name
        return CUDA_ORDER[-1]
    # FlexAttention has a forward on the CPU, which is enough to score and to test.
    forward_only = attention.backend == "flex" and query.device.type == "cpu" and not torch.is_grad_enabled()
    fault = None if forward_only else missing_part(attention.backend, query.device)
    fault = fault or unsupported(attention.backend, query, key, value, options)
    if fault is not None:
        raise ValueError(f"attn_implementation {attention.backend!r} {fault}; use attn_implementation: auto")
    return attention.backend


@cache
def self_test(name: str, device: torch.device, dtype: torch.dtype, head_size: int, windowed: bool) -> str | None:
    """Hold a backend against the reference on this device, values and gradients, once; log what is wrong.

    Args:
        name: one of `BACKENDS`.
        device: where to compute.
        dtype: of queries, keys and values.
        head_size: `d`.
        windowed: whether to test a sliding window.

    Returns:
        None where it agrees to what the dtype allows, otherwise what was wrong.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        try:
            fault = _difference(name, device, dtype, head_size, 60 if windowed else None)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, ImportError) as error:
            fault = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if fault is not None:
        logger.warning("packed attention: %s is not used on %s in %s: %s", name, device, dtype, fault)
    return fault


def _difference(name: str, device: torch.device, dtype: torch.dtype, size: int, window: int | None) -> str | None:
    layout = _test_layout().to(device)
    generator = torch.Generator().manual_seed(0)
    tokens, heads, groups = layout.num_tokens, 4, 2
    base = [torch.randn(1, tokens, n, size, generator=generator).transpose(1, 2) for n in (heads, groups, groups)]
    mix = torch.randn(1, heads, tokens, size, generator=generator).to(device)
    options = AttentionOptions(scaling=size**-0.5, window=window)
    found = []
    for backend, kind in ((name, dtype), ("reference", torch.float32)):
        # The reference starts from the same rounded numbers.
        tensors = [t.to(device, dtype).to(kind).detach().requires_grad_() for t in base]
        query, key, value = tensors
        out = BACKENDS[backend](query, key, value, PackedAttention(layout), options)
        found.append([out.float().detach(), *torch.autograd.grad((out.float() * mix).sum(), tensors)])
    tolerance = 8 * torch.finfo(dtype).eps if dtype in _HALF else 1e-2
    for label, ours, theirs in zip(("output", "query", "key", "value"), *found, strict=True):
        difference, scale = (ours.float() - theirs).norm().item(), theirs.norm().item()
        if not difference <= tolerance * scale:
            return f"{label} {'is' if label == 'output' else 'gradient is'} off by {difference / scale:.2g}"
    return None


def _test_layout() -> PackedLayout:
    """Two prompts of 150 and 1 tokens with three and one completions: several tiles of 128, all kinds of pairs."""
    starts, ends = torch.tensor([150, 190, 191, 392]), torch.tensor([190, 191, 391, 401])
    prefix = torch.tensor([[0, 150], [0, 150], [0, 150], [391, 392]])
    sizes = torch.tensor([150, 40, 1, 200, 1, 9])
    first = torch.tensor([0, 150, 150, 150, 0, 1]) - (sizes.cumsum(0) - sizes)
    return PackedLayout(
        positions=torch.arange(401) + first.repeat_interleave(sizes),
        block_ids=torch.tensor([0, 0, 0, 0, 1, 1]).repeat_interleave(sizes),
        segment_ids=torch.tensor([0, 1, 2, 3, 0, 1]).repeat_interleave(sizes),
        completion_starts=starts,
        completion_ends=ends,
        prefix_starts=prefix[:, 0].clone(),
        prefix_ends=prefix[:, 1].clone(),
        group_index=torch.tensor([0, 0, 0, 1]),
        slot_index=torch.tensor([0, 1, 2, 0]),
        num_groups=2,
        num_slots=3,
    )
