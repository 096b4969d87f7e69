"""Token states of a packed batch, by either of two paths with the same numbers: packed, or plain padded rows."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plaudit.core.layout import PackedBatch, PackedLayout
from plaudit.data.packing import PaddedRows, unpack_rows
from plaudit.models.attention_backends import require_backend
from plaudit.models.packed_attention import LAYOUT_ARGUMENT, PackedAttention
from plaudit.models.quick_products import quick_products


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model itself, under adapters if there are any."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def takes_argument(model: nn.Module, name: str) -> bool:
    """Whether the model's forward names this argument."""
    return name in inspect.signature(unwrap(model).forward).parameters


def position_offset(model: nn.Module) -> int:
    """What position ids start from: RoBERTa and its kin count from `padding_idx + 1`, all others from 0."""
    for module in unwrap(model).modules():
        if hasattr(module, "create_position_ids_from_input_ids"):
            return int(module.padding_idx) + 1  # type: ignore[arg-type]
    return 0


def num_attention_layers(model: nn.Module) -> int:
    """How often one forward has to call the attention function."""
    return int(unwrap(model).config.get_text_config().num_hidden_layers)  # type: ignore[operator, union-attr]


def completion_mask(layout: PackedLayout) -> Tensor:
    """`[N]` bool, True on the tokens of completions."""
    steps = torch.zeros(layout.num_tokens + 1, dtype=torch.long, device=layout.positions.device)
    ones = torch.ones_like(layout.completion_starts)
    steps = steps.index_add(0, layout.completion_starts, ones).index_add(0, layout.completion_ends, -ones)
    return steps.cumsum(0)[:-1] > 0


def packed_states(
    model: nn.Module,
    batch: PackedBatch,
    *,
    backend: str = "auto",
    completion_token_type: int = 0,
    layers: Sequence[int] = (),
) -> Tensor:
    """Token states from one packed forward: a shared prompt goes through the network once, nothing is padded.

    Args:
        model: a transformers base model that uses packed attention.
        batch: `N` tokens and their layout.
        backend: which of `packed_attention.BACKENDS`, or `auto`.
        completion_token_type: token type of completions, for encoders that tell the texts of a pair apart.
        layers: whose states, side by side (0 is the embeddings); none is the last layer.

    Returns:
        `[N, H]`, in the model's dtype; `[N, L·H]` for `L` layers.

    Raises:
        RuntimeError: if the layers did not all call the packed attention; the states would be wrong.
    """
    require_backend(backend)
    attention = PackedAttention(batch.layout, backend)
    arguments = {
        "input_ids": batch.input_ids[None],
        # Four dimensions: transformers hands such a mask on as it is and builds none. Packed attention ignores it.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device),
        "position_ids": batch.layout.positions[None] + position_offset(model),
        **_no_cache(model),
        **_token_types(model, completion_mask(batch.layout)[None], completion_token_type),
        **_wanted(layers),
    }
    with quick_products(model, batch.layout.num_tokens):
        output = model(**arguments, **{LAYOUT_ARGUMENT: attention})
    expected = num_attention_layers(model)
    if attention.calls != expected:
        raise RuntimeError(
            f"packed attention was called {attention.calls} times in {expected} layers of "
            f"{type(unwrap(model)).__name__}; use attn_implementation: padded"
        )
    return _read(output, layers)[0]


def padded_states(
    model: nn.Module,
    batch: PackedBatch,
    *,
    pad_id: int = 0,
    side: str = "right",
    completion_token_type: int = 0,
    layers: Sequence[int] = (),
) -> Tensor:
    """The same states from the plain transformers forward over padded rows, put back in packed order.

    Args:
        model: any transformers base model.
        batch: `N` tokens and their layout.
        pad_id: what stands in the padding; no state depends on it.
        side: where the padding goes, `right` or `left`.
        completion_token_type: token type of completions, for encoders that tell the texts of a pair apart.
        layers: whose states, side by side (0 is the embeddings); none is the last layer.

    Returns:
        `[N, H]`, or `[N, L·H]` for `L` layers. A prompt's states are taken from its first row; in a causal model all
        its rows have the same.
    """
    rows = unpack_rows(batch, pad_id, side)
    with quick_products(model, rows.input_ids.numel()):
        output = model(**row_arguments(model, rows, completion_token_type), **_wanted(layers))
    states = _read(output, layers)
    return states.flatten(0, 1)[_packed_places(rows, batch.layout)]


def row_arguments(model: nn.Module, rows: PaddedRows, completion_token_type: int = 0) -> dict[str, Tensor | bool]:
    """What the plain forward over padded rows is called with. Positions come from the mask, never from a pad id."""
    column = torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device)
    answers = (column >= rows.completion_start[:, None]) & (column < rows.completion_end[:, None])
    arguments = _no_cache(model) | _token_types(model, answers, completion_token_type)
    if takes_argument(model, "position_ids"):
        arguments["position_ids"] = rows.position_ids + position_offset(model)
    return arguments | {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask.long()}


def _wanted(layers: Sequence[int]) -> dict[str, bool]:
    return {"output_hidden_states": True} if layers else {}


def _read(output: Any, layers: Sequence[int]) -> Tensor:
    """`[…, H]` of the last layer, or `[…, L·H]` of the layers asked for."""
    states: Tensor = output.last_hidden_state
    return torch.cat([output.hidden_states[layer] for layer in layers], -1) if layers else states


def _no_cache(model: nn.Module) -> dict[str, Tensor | bool]:
    return {"use_cache": False} if takes_argument(model, "use_cache") else {}


def _token_types(model: nn.Module, answers: Tensor, completion_token_type: int) -> dict[str, Tensor | bool]:
    if completion_token_type == 0 or not takes_argument(model, "token_type_ids"):
        return {}
    return {"token_type_ids": answers.long() * completion_token_type}


def _packed_places(rows: PaddedRows, layout: PackedLayout) -> Tensor:
    """`[N]`: for each packed token the flat index of the first row and column that holds it."""
    column = rows.attention_mask.long().cumsum(1) - 1
    prefix_lengths = (layout.prefix_ends - layout.prefix_starts)[:, None]
    place = torch.where(
        column < prefix_lengths,
        layout.prefix_starts[:, None] + column,
        layout.completion_starts[:, None] + column - prefix_lengths,
    )
    flat = torch.arange(place.numel(), device=place.device).view_as(place)
    mask = rows.attention_mask
    first = torch.full((layout.num_tokens,), place.numel(), device=place.device)
    first = first.scatter_reduce(0, place[mask], flat[mask], "amin")
    # A prefix without completions is in no row; nothing reads its state.
    return first.clamp(max=place.numel() - 1)
