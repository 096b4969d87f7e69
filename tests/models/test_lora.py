"""Adapters: what trains, what is saved, and that every form scores the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from plaudit.configs.model import LoraConfig, RewardModelConfig
from plaudit.models.lora import add_lora, has_lora, merge_lora
from plaudit.models.reward_model import RewardModel
from plaudit.models.states import packed_states
from tests.models.conftest import word_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPTS = ["why is it so good", "the cat"]
COMPLETIONS = [["yes it is", "no", "very bad yes"], ["sat on the mat", "ran"]]


def adapted(folder: str, *, encoder: bool = False, backbone: str | None = None, **options: Any) -> RewardModel:
    """A model with adapters that have moved away from zero."""
    start: dict[str, Any] = (
        {"backbone": backbone}
        if backbone
        else {"model_type": "bert" if encoder else "llama", "backbone_config": SIZES, "tokenizer": folder}
    )
    model = RewardModel.from_backbone(RewardModelConfig(**start, lora=LoraConfig(rank=4), **options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=generator)
    return model


def scores(model: RewardModel) -> torch.Tensor:
    return torch.cat([result.raw for result in model.score(PROMPTS, COMPLETIONS)])


def base_folder(path: Path) -> str:
    word_tokenizer().save_pretrained(path)
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("llama", vocab_size=28, **SIZES)).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("aggregation", ["last", "attention"])
def test_only_adapters_head_and_aggregation_train(aggregation: str, decoder_folder: str) -> None:
    model = adapted(decoder_folder, aggregation=aggregation).train()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"head.weight", "head.bias"} <= trainable
    assert ("aggregation.query" in trainable) is (aggregation == "attention")
    assert all("lora_" in name or name.startswith(("head.", "aggregation.")) for name in trainable)
    model(_batch(model)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is (name in trainable), name


def _batch(model: RewardModel) -> Any:
    from plaudit.data.packing import pack_groups

    groups = [model.text_tokeniser.group(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    return pack_groups(groups, causal=model.causal)


def test_fresh_adapters_change_no_score(decoder_folder: str) -> None:
    config = RewardModelConfig(model_type="llama", backbone_config=SIZES, tokenizer=decoder_folder)
    model = RewardModel.from_backbone(config).eval()
    before = scores(model)
    add_lora(model, LoraConfig())
    assert has_lora(model)
    assert torch.equal(scores(model), before)
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(model, LoraConfig())


def test_the_layout_passes_through_adapters(decoder_folder: str) -> None:
    model = adapted(decoder_folder)
    assert model.packed
    packed = scores(model)
    model.packed = False
    assert torch.allclose(scores(model), packed, atol=1e-5)
    packed_states(model.backbone, _batch(model))


@pytest.mark.parametrize("encoder", [False, True])
def test_a_saved_adapter_and_its_merged_export_score_the_same(
    encoder: bool, decoder_folder: str, encoder_folder: str, tmp_path: Path
) -> None:
    model = adapted(encoder_folder if encoder else decoder_folder, encoder=encoder)
    with torch.no_grad():
        model.head.weight.mul_(1.7)
        model.head.bias.fill_(0.3)
    wanted = scores(model)
    model.save_pretrained(tmp_path / "adapter")
    reopened = RewardModel.from_pretrained(tmp_path / "adapter")
    assert has_lora(reopened)
    assert torch.equal(scores(reopened), wanted)
    assert any("lora_" in name and p.requires_grad for name, p in reopened.named_parameters())
    model.save_pretrained(tmp_path / "merged", merge=True)
    merged = RewardModel.from_pretrained(tmp_path / "merged")
    assert not has_lora(merged)
    assert torch.allclose(scores(merged), wanted, atol=2e-5)
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_an_adapter_of_a_named_backbone_holds_no_backbone(tmp_path: Path) -> None:
    model = adapted("", backbone=base_folder(tmp_path / "base"))
    wanted = scores(model)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "backbone").exists()
    assert json.loads((tmp_path / "adapter" / "plaudit.json").read_text())["form"] == "adapter"
    assert torch.equal(scores(RewardModel.from_pretrained(tmp_path / "adapter")), wanted)


def test_an_adapter_over_a_changed_backbone_is_refused(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base")
    adapted("", backbone=folder).save_pretrained(tmp_path / "adapter")
    torch.manual_seed(1)
    AutoModel.from_config(AutoConfig.for_model("llama", vocab_size=28, **SIZES)).save_pretrained(folder)
    with pytest.raises(ValueError, match="belong to another backbone"):
        RewardModel.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("place", [(1, 20), (27, 31)])
def test_one_changed_bit_of_the_backbone_is_seen(tmp_path: Path, place: tuple[int, int]) -> None:
    folder = base_folder(tmp_path / "base")
    adapted("", backbone=folder).save_pretrained(tmp_path / "adapter")
    backbone = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        # So small that no score shows it.
        backbone.embed_tokens.weight[place] *= 1 + 2e-7
    backbone.save_pretrained(folder)
    with pytest.raises(ValueError, match="belong to another backbone"):
        RewardModel.from_pretrained(tmp_path / "adapter")


def test_an_adapter_over_a_backbone_that_had_to_grow_opens_again(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base")
    word_tokenizer(pad=None).save_pretrained(folder)
    AutoModel.from_config(AutoConfig.for_model("llama", vocab_size=27, **SIZES)).save_pretrained(folder)
    model = adapted("", backbone=folder)
    assert model.tokenizer.pad_token_id == 27
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(123)
    assert torch.equal(scores(RewardModel.from_pretrained(tmp_path / "adapter")), scores(model))


def test_merging_in_place_keeps_scores(decoder_folder: str) -> None:
    model = adapted(decoder_folder)
    wanted = scores(model)
    merge_lora(model)
    assert not has_lora(model)
    assert torch.allclose(scores(model), wanted, atol=2e-5)
