"""Reward models as TRL, OpenRLHF, Skywork and others save them."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from plaudit.data.packing import unpack_rows
from plaudit.models.reward_model import RewardModel
from tests.models.conftest import word_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 28, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def llama_config(**options: Any) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, "num_labels": 1, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, **options})


def classifier_folder(folder: Path, model: Any, *, encoder: bool = False, pad_is_eos: bool = False) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.eval().save_pretrained(folder)
    tokenizer = word_tokenizer(encoder=encoder, pad=None if pad_is_eos else "<pad>")
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return model


def assert_scores_equal_logits(model: RewardModel, classifier: Any) -> None:
    """Raw scores against each text alone through the foreign model, without padding."""
    groups = [
        model.text_tokeniser.group("why is it so", ["yes it is", "no"]),
        model.text_tokeniser.group("the cat", ["ran"]),
    ]
    raw = [result.raw for result in model.score(["why is it so", "the cat"], [["yes it is", "no"], ["ran"]])]
    for group, scores in zip(groups, raw, strict=True):
        rows = [(block, ids) for block in group.blocks for ids in block.completions]
        for (block, ids), score in zip(rows, scores, strict=True):
            arguments = {"input_ids": torch.tensor([block.prefix + ids])}
            if not model.causal:
                types = [0] * len(block.prefix) + [model.text_tokeniser.completion_token_type] * len(ids)
                arguments["token_type_ids"] = torch.tensor([types])
            with torch.no_grad():
                assert classifier(**arguments).logits[0, 0].item() == pytest.approx(score.item(), abs=1e-5)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_a_sequence_classification_folder(pad_is_eos: bool, tmp_path: Path) -> None:
    options = {"pad_token_id": 2} if pad_is_eos else {}
    classifier = classifier_folder(
        tmp_path, LlamaForSequenceClassification(llama_config(**options)), pad_is_eos=pad_is_eos
    )
    model = RewardModel.from_pretrained(tmp_path)
    assert model.packed
    assert model.parts.aggregation == "last"
    assert model.tokenizer.pad_token_id != model.tokenizer.eos_token_id
    # Alone and without padding, HF would skip a final eos that it takes for padding: read every token instead.
    classifier.config.pad_token_id = None
    assert_scores_equal_logits(model, classifier)


def test_gemma2_as_skywork_uses_it(tmp_path: Path) -> None:
    config = Gemma2Config(
        **SIZES, num_labels=1, head_dim=8, num_key_value_heads=2, sliding_window=4, pad_token_id=3, eos_token_id=2
    )
    classifier = classifier_folder(tmp_path, Gemma2ForSequenceClassification(config))
    assert_scores_equal_logits(RewardModel.from_pretrained(tmp_path), classifier)


def test_openrlhf_value_head_with_its_normalisation(tmp_path: Path) -> None:
    classifier = classifier_folder(tmp_path, LlamaForSequenceClassification(llama_config()))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["value_head.weight"] = tensors.pop("score.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "normalize_reward": True, "mean": 0.5, "std": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = RewardModel.from_pretrained(tmp_path)
    assert_scores_equal_logits(model, classifier)
    assert model.normalisation_mean.item() == 0.5
    result = model.score(["the cat"], [["ran"]])[0]
    assert result.normalised.item() == pytest.approx(result.raw.item() - 0.5)


def test_an_encoder_keeps_its_own_head_and_survives_a_round_trip(tmp_path: Path) -> None:
    config = BertConfig(**SIZES, num_labels=1)
    classifier = classifier_folder(tmp_path / "a", BertForSequenceClassification(config), encoder=True)
    model = RewardModel.from_pretrained(tmp_path / "a")
    assert not model.packed
    assert model.parts.aggregation == "native"
    assert_scores_equal_logits(model, classifier)
    model.set_normalisation(0.2, 1.0)
    model.save_pretrained(tmp_path / "b")
    again = RewardModel.from_pretrained(tmp_path / "b")
    assert again.normalisation_mean.item() == pytest.approx(0.2)
    assert_scores_equal_logits(again, classifier)
    assert_scores_equal_logits(again, AutoModelForSequenceClassification.from_pretrained(tmp_path / "b").eval())
    model.train()
    model(small_batch(model)).sum().backward()
    assert classifier.classifier.weight.shape == model.backbone.classifier.weight.grad.shape  # type: ignore[union-attr]


def small_batch(model: RewardModel) -> Any:
    from plaudit.data.packing import pack_groups

    return pack_groups([model.text_tokeniser.group("the cat", ["ran", "sat on"])], causal=model.causal)


def test_several_labels_become_attributes(tmp_path: Path) -> None:
    config = llama_config(num_labels=2, id2label={0: "helpful", 1: "safe"})
    classifier = classifier_folder(tmp_path, LlamaForSequenceClassification(config))
    model = RewardModel.from_pretrained(tmp_path)
    assert model.attributes == ("helpful", "safe")
    batch = small_batch(model)
    rows = unpack_rows(batch, 3)
    with torch.no_grad():
        logits = classifier(input_ids=rows.input_ids, attention_mask=rows.attention_mask.long()).logits
        assert torch.allclose(model(batch), logits, atol=1e-5)


def test_models_without_a_trained_head_are_refused(tmp_path: Path) -> None:
    classifier_folder(tmp_path / "lm", LlamaForCausalLM(llama_config()))
    with pytest.raises(ValueError, match="no reward head"):
        RewardModel.from_pretrained(tmp_path / "lm")
    bert = BertForSequenceClassification(BertConfig(**SIZES, num_labels=1))
    classifier_folder(tmp_path / "bert", bert.bert, encoder=True)
    with pytest.raises(ValueError, match="missing and would be random"):
        RewardModel.from_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no model here"):
        RewardModel.from_pretrained(tmp_path / "empty")


@pytest.mark.parametrize("with_head", [True, False])
def test_adapters_on_a_classifier(with_head: bool, tmp_path: Path) -> None:
    classifier_folder(tmp_path / "base", LlamaForCausalLM(llama_config()))
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    settings = peft.LoraConfig(
        r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"] if with_head else None
    )
    if not with_head:
        settings.task_type = None
    adapted = peft.get_peft_model(base, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    if not with_head:
        with pytest.raises(ValueError, match="without a trained head"):
            RewardModel.from_pretrained(tmp_path / "adapter")
        return
    model = RewardModel.from_pretrained(tmp_path / "adapter")
    assert_scores_equal_logits(model, adapted.merge_and_unload().eval())
