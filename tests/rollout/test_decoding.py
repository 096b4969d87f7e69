"""Decoding over a shared prompt gives the states of the plain forward, for every architecture that is packed."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from plaudit.configs.generation import SamplingConfig
from plaudit.models.causal_lm import CausalLM
from plaudit.models.packed_attention import PACKED_ATTENTION, register_packed_attention
from plaudit.rollout.decoding import SharedPrefixDecoder, _groups
from plaudit.rollout.generate import generate
from plaudit.rollout.lean import lean_step
from plaudit.rollout.paths import decoding_fault, decoding_path
from plaudit.rollout.rows import RowsDecoder
from tests.models.conftest import tiny_base, word_tokenizer
from tests.rollout.language_models import DECODERS, random_prompts, tiny_lm


def base_of(name: str) -> Any:
    register_packed_attention()
    return tiny_base(name, attn_implementation=PACKED_ATTENTION)


def plain_state(base: Any, text: list[int]) -> torch.Tensor:
    return base(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0, -1]


@torch.no_grad()
def follow(base: Any, decoder: Any, prompts: list[list[int]], leaving: dict[int, list[int]], steps: int) -> float:
    """Largest difference from the plain forward over some steps in which rows leave."""
    generator = torch.Generator().manual_seed(1)
    states = decoder.prefill()
    worst = max((states[p] - plain_state(base, ids)).abs().max().item() for p, ids in enumerate(prompts))
    texts = [list(prompts[prompt]) for prompt in decoder.rows]
    for step in range(steps):
        tokens = torch.randint(3, 64, (len(texts),), generator=generator)
        states = decoder.step(tokens)
        texts = [[*text, int(token)] for text, token in zip(texts, tokens, strict=True)]
        worst = max(worst, *((states[r] - plain_state(base, text)).abs().max().item() for r, text in enumerate(texts)))
        if step in leaving:
            order = decoder.keep([row not in leaving[step] for row in range(len(texts))])
            texts = [texts[row] for row in order]
    return worst


@pytest.mark.parametrize("name", DECODERS)
def test_equals_the_plain_forward(name: str) -> None:
    base = base_of(name)
    prompts = random_prompts((9, 3, 6))
    decoder = SharedPrefixDecoder(base, prompts, 3)
    # Ragged prompts, windows shorter than the text, prompts of which some, then all rows leave.
    assert follow(base, decoder, prompts, {2: [1, 4], 4: [0, 1], 5: [2]}, 7) < 2e-5
    assert sorted(decoder.rows) == [1, 1, 2, 2]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2-window", "qwen3", "mistral-window"])
def test_the_lean_step_equals_the_plain_forward(name: str) -> None:
    base = base_of(name)
    prompts = random_prompts((9, 3, 6))
    lean = lean_step(base)
    assert lean is not None
    decoder = SharedPrefixDecoder(base, prompts, 3, lean=lean)
    assert follow(base, decoder, prompts, {2: [1, 4], 4: [0, 1], 5: [2]}, 7) < 2e-5


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        ("qwen3", {"attention_bias": True, "head_dim": 8}),
        ("mistral", {"head_dim": 8, "num_key_value_heads": 1}),
    ],
)
def test_the_lean_step_knows_the_options_of_its_architectures(model_type: str, change: dict[str, Any]) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    torch.manual_seed(0)
    hub = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(sizes | change)))
    with torch.no_grad():
        for parameter in hub.parameters():
            parameter.normal_(std=0.2)
    base = CausalLM(hub.eval(), word_tokenizer()).base
    lean = lean_step(base)
    assert lean is not None
    prompts = random_prompts((9, 3, 6))
    assert follow(base, SharedPrefixDecoder(base, prompts, 3, lean=lean), prompts, {2: [1, 4]}, 5) < 2e-5


def test_the_lean_step_of_large_matrices_leaves_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plaudit.rollout.lean._FUSE_BELOW", 0)
    base, prompts = base_of("qwen2"), random_prompts((9, 3))
    assert follow(base, SharedPrefixDecoder(base, prompts, 2, lean=lean_step(base)), prompts, {}, 3) < 2e-5


def test_what_has_no_lean_step() -> None:
    assert lean_step(base_of("gpt2")) is None
    hooked, replaced = tiny_lm(), tiny_lm()
    assert lean_step(hooked.base) is not None
    assert decoding_path(hooked) == "lean"
    handle = hooked.base.layers[0].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert lean_step(hooked.base) is None
    # A model whose hooks came after its first answers answers with them.
    prompts = random_prompts((4,))
    sampling = SamplingConfig(method="greedy", max_new_tokens=3)
    logprobs = generate(hooked, hooked.tokenizer, prompts, sampling=sampling).logprobs
    handle.remove()
    assert generate(hooked, hooked.tokenizer, prompts, sampling=sampling).logprobs != logprobs
    mlp = replaced.base.layers[0].mlp
    mlp.forward = mlp.forward
    assert lean_step(replaced.base) is None


def test_room_grows_and_prompts_are_stored_once() -> None:
    base = base_of("llama")
    prompts = random_prompts((5, 2))
    decoder = SharedPrefixDecoder(base, prompts, 2)
    with torch.no_grad():
        decoder.prefill()
        for _ in range(70):
            decoder.step(torch.full((4,), 5))
        found = decoder.step(torch.tensor([7, 8, 9, 10]))
        wanted = plain_state(base, [*prompts[1], *[5] * 70, 9])
    assert (found[2] - wanted).abs().max() < 2e-5
    assert all(keys.shape[0] == 2 for keys, _ in decoder._prompt_cache)
    keys = decoder._own_cache[0][0]
    assert keys.shape[2] == 80
    assert keys.is_contiguous()
    assert not bool(keys[:, :, 71:].any()), "places not yet written hold zeros, which no weight of 0 makes NaN"


def test_prompts_are_read_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plaudit.rollout.decoding._TOKENS_AT_ONCE", 12)
    assert list(_groups([9, 3, 6, 13, 1], 12)) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
    assert list(_groups([9, 3, 6], None)) == [range(3)]
    base, prompts = base_of("qwen3"), random_prompts((9, 3, 6, 13, 1))
    lean = lean_step(base, tokens=5000)
    assert lean is not None
    assert lean.prepared
    decoder = SharedPrefixDecoder(base, prompts, 2, lean=lean)
    assert follow(base, decoder, prompts, {1: [0, 1, 7]}, 4) < 2e-5


@pytest.mark.parametrize("name", ["llama", "gemma2-window-softcap", "mistral-window"])
def test_room_not_yet_written_counts_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, prompts = base_of(name), random_prompts((6, 4))
    assert follow(base, SharedPrefixDecoder(base, prompts, 2), prompts, {17: [1]}, 20) < 2e-5
    monkeypatch.setattr("plaudit.rollout.own_keys.ROOM", 1)
    assert follow(base, SharedPrefixDecoder(base, prompts, 2), prompts, {9: [1]}, 12) < 2e-5


def test_beams_move() -> None:
    base = base_of("qwen3")
    prompts = random_prompts((4,))
    decoder = SharedPrefixDecoder(base, prompts, 3)
    with torch.no_grad():
        decoder.prefill()
        decoder.step(torch.tensor([5, 6, 7]))
        decoder.reorder(torch.tensor([2, 2, 0]))
        states = decoder.step(torch.tensor([8, 9, 10]))
        for row, text in enumerate(([7, 8], [7, 9], [5, 10])):
            assert (states[row] - plain_state(base, prompts[0] + text)).abs().max() < 2e-5


@pytest.mark.parametrize("cached", [True, False])
def test_plain_rows(cached: bool) -> None:
    base = base_of("gpt2")
    prompts = random_prompts((4, 4))
    decoder = RowsDecoder(base, prompts, 2, cached=cached)
    assert follow(base, decoder, prompts, {1: [0], 2: [2]}, 4) < 2e-5
    with pytest.raises(ValueError, match="one length"):
        RowsDecoder(base, random_prompts((4, 3)), 2)


def test_paths(caplog: pytest.LogCaptureFixture) -> None:
    assert decoding_path(tiny_lm()) == "lean"
    assert decoding_path(tiny_lm("gpt2")) == "shared"
    assert not caplog.records
    assert decoding_path(tiny_lm(attn_implementation="padded")) == "cached"
    assert "its own copy of the prompt" in caplog.text


def test_the_probe_sees_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("mistral-window")
    assert decoding_fault(base, "shared", 1e-5) is None
    right = SharedPrefixDecoder._prompt_mask
    monkeypatch.setattr(SharedPrefixDecoder, "_prompt_mask", lambda self, window: right(self, None))
    assert "differ" in str(decoding_fault(base, "shared", 1e-5))


def test_refuses_empty_prompts() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        SharedPrefixDecoder(base_of("llama"), [[3], []], 2)
