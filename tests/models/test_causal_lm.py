"""Language models over packed batches: log-probabilities, generation and folders as plain transformers has them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from plaudit.configs.model import LoraConfig
from plaudit.configs.sft import LanguageModelConfig
from plaudit.models.causal_lm import CausalLM
from tests.models.conftest import random_batch, texts_of

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SMALL),
    "gpt2": ("gpt2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "phi-with-head-bias": ("phi", SMALL),
    "gemma2-softcap": (
        "gemma2",
        {**SMALL, "head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 0.5, "sliding_window": 4},
    ),
    "granite-divides-logits": ("granite", {**SMALL, "logits_scaling": 8.0}),
    "cohere-scales-logits": ("cohere", {**SMALL, "logit_scale": 0.25}),
    "mpt-cannot-be-packed": ("mpt", {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2}),
}
SHAPES = [(7, [5, 1, 8]), (1, [1]), (1, [2, 9])]


def build(folder: str, name: str = "llama", **options: Any) -> CausalLM:
    model_type, sizes = MODELS[name]
    config = LanguageModelConfig(model_type=model_type, backbone_config=sizes, tokenizer=folder, **options)
    model = CausalLM.from_backbone(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=generator)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_and_gradients_equal_the_plain_model(name: str, decoder_folder: str) -> None:
    model = build(decoder_folder, name)
    assert model.packed is ("cannot" not in name)
    batch = random_batch(SHAPES)
    ours, spans = model.completion_logprobs(batch)
    ours.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    theirs = []
    for index, ids in enumerate(texts_of(batch)):
        logprobs = model.model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
        chosen = logprobs[:-1].gather(1, ids[1:, None])[:, 0]
        theirs.append(chosen[-int(spans.lengths[index]) :])
    assert torch.allclose(ours, torch.cat(theirs), atol=2e-5)
    torch.cat(theirs).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            difference = (gradients[parameter_name] - parameter.grad).norm()
            assert difference <= 2e-5 * parameter.grad.norm() + 1e-5, parameter_name


def test_nothing_predicts_the_first_token_behind_an_empty_prompt(decoder_folder: str) -> None:
    model = build(decoder_folder)
    logprobs, spans = model.completion_logprobs(random_batch([(0, [3, 2])]))
    assert (logprobs[spans.step == 0] == 0).all()
    assert (logprobs[spans.step > 0] < 0).all()


def test_generation_is_the_stock_one_and_stops_at_the_end_token(decoder_folder: str, tmp_path: Path) -> None:
    model = build(decoder_folder)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(4, 28, (2, 6), generator=torch.Generator().manual_seed(0))
    arguments = {"input_ids": ids, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.model.generate(**arguments), stock.generate(**arguments))  # type: ignore[operator]
    assert stock.config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 2
    assert stock.config.pad_token_id == 3


def test_a_round_trip_is_bitwise(decoder_folder: str, tmp_path: Path) -> None:
    model = build(decoder_folder)
    model.save_pretrained(tmp_path)
    batch = random_batch(SHAPES)
    again = CausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.completion_logprobs(batch)[0], model.completion_logprobs(batch)[0])


def test_adapters_train_alone_and_are_merged_when_saved(decoder_folder: str, tmp_path: Path) -> None:
    model = build(decoder_folder, lora=LoraConfig(rank=4))
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    batch = random_batch(SHAPES)
    logprobs, _ = model.completion_logprobs(batch)
    logprobs.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    model.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    assert torch.allclose(again.completion_logprobs(batch)[0], logprobs, atol=2e-5)
    assert any("lora_" in name for name, _ in model.named_parameters())


def test_encoders_are_refused(encoder_folder: str) -> None:
    with pytest.raises(ValueError, match="is an encoder"):
        CausalLM.from_backbone(LanguageModelConfig(model_type="bert", backbone_config=SMALL, tokenizer=encoder_folder))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool, decoder_folder: str) -> None:
    model = build(decoder_folder).train()
    batch = random_batch(SHAPES)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(use_reentrant=reentrant)
        model.zero_grad()
        model.completion_logprobs(batch)[0].sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])
    model.gradient_checkpointing_disable()
