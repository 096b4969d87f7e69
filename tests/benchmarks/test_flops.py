"""The arithmetic of a step: numbers by hand, the attention rule itself, and torch's own counter."""

import pytest
import torch
from flops import attended_pairs, layout_pairs, linear_layers, matmul_rate, step_flops
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

from plaudit.data.packing import pack_groups
from plaudit.data.tokenising import TokenisedBlock, TokenisedGroup
from plaudit.models.attention_layout import allowed_pairs


def group(prefix: int, *completions: int) -> TokenisedGroup:
    block = TokenisedBlock([1] * prefix, [[2] * length for length in completions], list(range(len(completions))))
    return TokenisedGroup((block,))


def test_pairs_by_hand() -> None:
    # Prompt of 3: 1 + 2 + 3. Completion of 2: 4 + 5. Completion of 1: 4.
    assert attended_pairs(3, [2, 1], causal=True) == 6 + 9 + 4
    assert attended_pairs(3, [2, 1], causal=False) == 25 + 16


@pytest.mark.parametrize("causal", [True, False])
def test_pairs_are_those_that_the_attention_rule_allows(causal: bool) -> None:
    shapes = [(5, 3), (0, 4), (0, 2), (7, 1)] if not causal else [(5, 3, 4), (0, 4, 1), (0, 2), (7, 1, 1, 6)]
    layout = pack_groups([group(*shape) for shape in shapes], causal=causal).layout
    assert layout_pairs(layout) == int(allowed_pairs(layout).sum())


def test_step_flops_are_what_torch_counts() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    model, tokens = LlamaModel(config), 128
    ids = torch.randint(0, 64, (1, tokens))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).last_hidden_state.sum().backward()
    # Eager attention computes the whole square.
    assert counter.get_total_flops() == step_flops(model, config, tokens, tokens**2)


def test_the_rate_of_matrix_products_is_that_of_the_shapes() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 16), torch.nn.Linear(16, 8, bias=False))
    assert linear_layers(model) == [(8, 16), (16, 8)]
    assert 0 < matmul_rate([(8, 16), (16, 8)], 32) < 1e15
