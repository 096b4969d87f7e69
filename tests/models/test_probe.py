"""No architecture is packed unless the probe says that it may be."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from plaudit.core.layout import PackedLayout
from plaudit.models import attention_layout, packed_attention, probe
from plaudit.models.attention_layout import BlockSpans
from plaudit.models.backbone import is_causal
from plaudit.models.packed_attention import PACKED_ATTENTION, register_packed_attention
from plaudit.models.probe import PACKABLE, choose_path, equality_fault, probe_batch, tiny_twin, twin_fault
from plaudit.models.states import packed_states, padded_states
from tests.models.conftest import random_batch, texts_of, tiny_base

_SIZES = {"vocab_size": 64, "num_hidden_layers": 2}
UNPACKABLE: dict[str, dict[str, Any]] = {
    "mpt": {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2},
    "gpt_neo": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "window_size": 4,
        "attention_types": [[["global", "local"], 1]],
        "intermediate_size": 48,
    },
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {**_SIZES, "hidden_size": 32, "num_attention_heads": 4, "alibi": True, "new_decoder_architecture": False},
    "llama4_text": {
        **_SIZES,
        "hidden_size": 32,
        "intermediate_size": 48,
        "intermediate_size_mlp": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 2,
        "attention_chunk_size": 4,
        "layer_types": ["chunked_attention", "full_attention"],
        "pad_token_id": 0,
    },
    "qwen3_next": {
        **_SIZES,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


def unpackable(model_type: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **UNPACKABLE[model_type])
    model = AutoModel.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("model_type", UNPACKABLE)
def test_models_that_would_be_silently_wrong_take_padded_rows(model_type: str) -> None:
    model = unpackable(model_type)
    assert choose_path(model, causal=True) is False
    with pytest.raises(ValueError, match="cannot be packed"):
        choose_path(model, causal=True, wanted="packed")
    # Beyond the window of 4, with prompts and completions of one token, several lengths in one batch.
    batch = random_batch([(7, [5, 1, 8]), (1, [1]), (1, [2, 9])])
    with torch.no_grad():
        states = padded_states(model, batch)[batch.layout.completion_ends - 1]
        alone = torch.stack([model(input_ids=ids[None]).last_hidden_state[0, -1] for ids in texts_of(batch)])
    assert torch.allclose(states, alone, rtol=0, atol=1e-5 * alone.abs().max().item())


@pytest.mark.parametrize("model_type", sorted(PACKABLE))
def test_every_architecture_on_the_list_is_right_in_states_and_gradients(model_type: str) -> None:
    register_packed_attention()
    config = AutoConfig.for_model(model_type)
    causal = is_causal(config)
    model = tiny_twin(config)
    batch = probe_batch(causal, [(9, [7, 1, 12, 3]), (1, [1, 9])])
    gradients = []
    for path in (packed_states, padded_states):
        model.zero_grad()
        states = path(model, batch)
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
        (states * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    largest = max(gradient.norm() for gradient in gradients[1].values())
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        difference = (gradients[0][name] - gradient).norm()
        assert difference <= 2e-5 * gradient.norm() + 1e-6 * largest, name


def test_the_twin_keeps_each_kind_of_layer_and_has_a_short_window() -> None:
    twin = tiny_twin(AutoConfig.for_model("gemma3_text"))
    config: Any = twin.config
    assert config.sliding_window == 5
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert sum(p.numel() for p in twin.parameters()) < 100_000


def test_the_probe_notices_a_backend_that_ignores_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    careful = packed_attention.BACKENDS["blocks"]

    def careless(*arguments: Any) -> torch.Tensor:
        *others, options = arguments
        return careful(*others, replace(options, window=None))

    monkeypatch.setitem(packed_attention.BACKENDS, "blocks", careless)
    monkeypatch.setattr(probe, "_verdicts", {})
    # The window of the real model is longer than any probe: only the twin can tell.
    config = AutoConfig.for_model("mistral", sliding_window=4096)
    assert "differ" in str(twin_fault(config, True))
    assert twin_fault(AutoConfig.for_model("llama"), True) is None


def test_the_probe_notices_siblings_that_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention_layout.block_spans

    def leaky(layout: PackedLayout) -> tuple[BlockSpans, ...]:
        return tuple(BlockSpans(block.prefix, (block.tail,)) for block in real(layout))

    register_packed_attention()
    model = tiny_base("llama", attn_implementation=PACKED_ATTENTION)
    batch = probe_batch(True, [(5, [3, 1, 4])])
    assert equality_fault(model, batch, 1e-5) is None
    monkeypatch.setattr(attention_layout, "block_spans", leaky)
    assert "differ" in str(equality_fault(model, batch, 1e-5))


def test_the_path_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "plaudit.models.probe")
    assert choose_path(tiny_base("llama"), causal=True)
    assert "LlamaModel: packed attention; the equality probe passed" in caplog.text
    assert not choose_path(unpackable("mpt"), causal=True)
    assert "MptModel: padded rows, because the architecture 'mpt'" in caplog.text
    assert not choose_path(tiny_base("llama"), causal=True, wanted="padded")
    assert "LlamaModel: padded rows, as asked" in caplog.text


def test_a_known_good_architecture_off_the_list_packs_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PACKABLE", frozenset())
    model = tiny_base("llama")
    assert choose_path(model, causal=True) is False
    assert model.config._attn_implementation != PACKED_ATTENTION
    assert choose_path(model, causal=True, wanted="packed") is True
