"""Folders: plain transformers opens them with equal raw scores, or refuses; damage is noticed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    pipeline,
)

from plaudit.configs.model import RewardModelConfig
from plaudit.models.reward_model import RewardModel
from plaudit.models.saving import saved_form
from plaudit.models.shift import fold_shift
from tests.models.conftest import ARCHITECTURES, tiny_base

PROMPTS = ["why is it so good", "the cat"]
COMPLETIONS = [["yes it is", "no", "very bad yes"], ["sat on the mat", "ran"]]
DECODERS = [name for name in ARCHITECTURES if name not in ("bert", "modernbert-window", "roberta")]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(folder: str, name: str = "llama", **options: Any) -> RewardModel:
    model_type, sizes = ARCHITECTURES[name]
    values: dict[str, Any] = {"model_type": model_type, "backbone_config": sizes, "tokenizer": folder, **options}
    model = RewardModel.from_backbone(RewardModelConfig(**values)).eval()
    model.backbone.load_state_dict(tiny_base(name, seed=3).state_dict(), strict=False)
    return model


def largest_difference(one: RewardModel, other: RewardModel, field: str = "raw") -> float:
    pairs = zip(one.score(PROMPTS, COMPLETIONS), other.score(PROMPTS, COMPLETIONS), strict=True)
    return max((getattr(a, field) - getattr(b, field)).abs().max().item() for a, b in pairs)


def plain_scores(folder: Path, model: RewardModel, side: str) -> torch.Tensor:
    """The first prompt's completions through plain transformers, padded together; `[K]` or `[K, A]`."""
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    assert tokenizer.pad_token_id == classifier.config.pad_token_id != tokenizer.eos_token_id
    block = model.text_tokeniser.group(PROMPTS[0], COMPLETIONS[0]).blocks[0]
    rows = tokenizer.pad({"input_ids": [block.prefix + ids for ids in block.completions]}, return_tensors="pt")
    with torch.no_grad():
        logits: torch.Tensor = classifier(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    return logits.squeeze(-1)


@pytest.mark.parametrize("name", DECODERS)
def test_plain_transformers_gives_equal_raw_scores(name: str, decoder_folder: str, tmp_path: Path) -> None:
    model = build(decoder_folder, name)
    assert saved_form(model) == "classifier"
    notes = model.save_pretrained(tmp_path)
    # transformers puts Qwen 2's own tokenizer class over the word tokenizer of these tests.
    assert ["PreTrainedTokenizerFast" in note for note in notes] == [True] * name.startswith("qwen2")
    raw = model.score(PROMPTS, COMPLETIONS)[0].raw
    scale = max(1.0, raw.abs().max().item())
    assert (plain_scores(tmp_path, model, "right") - raw).abs().max() <= 1e-5 * scale
    if name not in ("gpt2",):  # plain GPT-2 counts positions of left padding too; that is not the folder's doing
        assert (plain_scores(tmp_path, model, "left") - raw).abs().max() <= 1e-5 * scale
    assert largest_difference(model, RewardModel.from_pretrained(tmp_path)) == 0.0


def test_the_round_trip_through_plain_transformers_is_bitwise(decoder_folder: str, tmp_path: Path) -> None:
    model = build(decoder_folder, attn_implementation="padded")
    model.save_pretrained(tmp_path / "ours")
    classifier, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    for name, parameter in model.backbone.named_parameters():
        assert torch.equal(parameter, classifier.model.get_parameter(name)), name
    assert torch.equal(classifier.score.weight, model.head.weight)
    # Saved by plain transformers, and read here as somebody else's model.
    classifier.save_pretrained(tmp_path / "theirs")
    model.tokenizer.save_pretrained(tmp_path / "theirs")
    assert largest_difference(model, RewardModel.from_pretrained(tmp_path / "theirs")) <= 1e-5


def test_a_pipeline_returns_the_raw_score(decoder_folder: str, tmp_path: Path) -> None:
    model = build(decoder_folder)
    with torch.no_grad():
        model.head.weight.mul_(5)  # far outside of what a sigmoid could return
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert "plaudit" not in json.dumps(config)
    block = model.text_tokeniser.group("the cat", ["ran"]).blocks[0]
    text = model.tokenizer.decode(block.prefix + block.completions[0])
    scorer = pipeline("text-classification", model=str(tmp_path))
    assert scorer.tokenizer(text)["input_ids"] == block.prefix + block.completions[0]
    raw = model.score(["the cat"], [["ran"]])[0].raw.item()
    assert scorer(text)[0] == {"label": "reward", "score": pytest.approx(raw, abs=1e-5)}


@pytest.mark.parametrize(
    ("name", "aggregation"),
    [("llama", a) for a in ("mean", "sum", "weighted_sum", "discounted_sum", "attention", "transformer")]
    + [("bert", "mean"), ("bert", "last"), ("modernbert-window", "attention"), ("roberta", "mean")],
)
def test_other_aggregations_come_back_and_cannot_be_opened_wrongly(
    name: str, aggregation: str, decoder_folder: str, encoder_folder: str, tmp_path: Path
) -> None:
    encoder = name in ("bert", "modernbert-window", "roberta")
    model = build(encoder_folder if encoder else decoder_folder, name, aggregation=aggregation)
    with torch.no_grad():
        for parameter in model.aggregation.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
        model.head.bias.fill_(0.7)
    model.set_normalisation(0.3, 1.5)
    notes = model.save_pretrained(tmp_path)
    assert "refuses this folder" in " ".join(notes)
    loaded = RewardModel.from_pretrained(tmp_path)
    assert largest_difference(model, loaded) == 0.0
    assert largest_difference(model, loaded, "normalised") == 0.0
    for auto in (AutoModelForSequenceClassification, AutoModel, AutoModelForCausalLM):
        for folder in (tmp_path, tmp_path / "backbone"):
            with pytest.raises((ValueError, OSError)):
                auto.from_pretrained(folder)
    for folder in (tmp_path, tmp_path / "backbone"):
        with pytest.raises((ValueError, OSError, RuntimeError)):
            LlamaForSequenceClassification.from_pretrained(folder)


def test_attributes_and_bias_come_back_and_are_said_aloud(decoder_folder: str, tmp_path: Path) -> None:
    model = build(decoder_folder, attributes=("helpful", "brief"), attribute_weights=(1.0, 3.0))
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([0.5, -1.25]))
    model.set_normalisation([1.0, 2.0], [1.0, 1.0])
    notes = " ".join(model.save_pretrained(tmp_path))
    assert "without b = [0.5, -1.25]" in notes
    assert "shift [1.0, 2.0] is kept in plaudit.json" in notes
    loaded = RewardModel.from_pretrained(tmp_path)
    assert loaded.attributes == ("helpful", "brief")
    assert largest_difference(model, loaded) == 0.0
    assert largest_difference(model, loaded, "normalised") == 0.0
    attributes = model.score(PROMPTS, COMPLETIONS)[0].attributes
    assert attributes is not None
    assert torch.allclose(plain_scores(tmp_path, model, "right") + model.head.bias.detach(), attributes, atol=1e-5)


@pytest.mark.parametrize(("name", "folds"), [("gpt2", True), ("gpt_neox", True), ("phi", True), ("llama", False)])
def test_the_shift_is_folded_where_that_is_exact(name: str, folds: bool, decoder_folder: str, tmp_path: Path) -> None:
    model = build(decoder_folder, name)
    with torch.no_grad():
        model.head.bias.fill_(0.4)
    model.set_normalisation(-1.7, 2.0)
    wanted = model.score(PROMPTS, COMPLETIONS)[0].normalised
    assert fold_shift(model) is folds
    assert torch.allclose(model.score(PROMPTS, COMPLETIONS)[0].normalised, wanted, atol=1e-5)
    notes = model.save_pretrained(tmp_path)
    assert bool(notes) is not folds
    if folds:
        assert (plain_scores(tmp_path, model, "right") - wanted).abs().max() <= 1e-5
        assert RewardModel.from_pretrained(tmp_path).is_normalised


def test_an_own_form_folds_the_shift_into_its_bias(decoder_folder: str) -> None:
    model = build(decoder_folder, aggregation="mean")
    model.set_normalisation(2.5, 1.0)
    wanted = model.score(PROMPTS, COMPLETIONS)[0].normalised
    assert fold_shift(model)
    assert torch.allclose(model.score(PROMPTS, COMPLETIONS)[0].raw, wanted, atol=1e-6)


def test_saving_again_in_another_form_leaves_nothing_behind(decoder_folder: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    build(decoder_folder, aggregation="mean").save_pretrained(tmp_path)
    model = build(decoder_folder)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "backbone").exists()
    assert not (tmp_path / "head.safetensors").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert largest_difference(model, RewardModel.from_pretrained(tmp_path)) == 0.0


def test_what_is_stored_beside_the_weights(decoder_folder: str, tmp_path: Path) -> None:
    build(decoder_folder).save_pretrained(tmp_path, data_hash="abc", extra={"seed": 3})
    description = json.loads((tmp_path / "plaudit.json").read_text())
    assert description["data_hash"] == "abc"
    assert description["extra"] == {"seed": 3}
    assert set(description["versions"]) == {"plaudit", "torch", "transformers"}
    assert description["parts"]["aggregation"] == "last"


def test_changed_weights_are_noticed(decoder_folder: str, tmp_path: Path) -> None:
    build(decoder_folder).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1.5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="other scores than when it was saved"):
        RewardModel.from_pretrained(tmp_path)


def test_missing_weights_are_noticed(decoder_folder: str, tmp_path: Path) -> None:
    build(decoder_folder).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    whole = dict(tensors)
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing and would be random"):
        RewardModel.from_pretrained(tmp_path)
    del whole["score.weight"]
    save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no safetensors file holds 'score\.weight'"):
        RewardModel.from_pretrained(tmp_path)


def test_a_damaged_description_and_a_missing_folder_are_named(decoder_folder: str, tmp_path: Path) -> None:
    build(decoder_folder).save_pretrained(tmp_path)
    (tmp_path / "plaudit.json").write_text("{")
    with pytest.raises(ValueError, match=r"plaudit\.json is damaged"):
        RewardModel.from_pretrained(tmp_path)
    (tmp_path / "plaudit.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        RewardModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        RewardModel.from_pretrained(tmp_path / "nowhere")


def test_dtype_and_settings_can_change_at_loading(decoder_folder: str, tmp_path: Path) -> None:
    model = build(decoder_folder)
    model.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(
        tmp_path, dtype="bfloat16", attn_implementation="padded", max_length=40, too_long="truncate_prompt"
    )
    assert next(loaded.backbone.parameters()).dtype == torch.bfloat16
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert not loaded.packed
    assert loaded.max_length == loaded.text_tokeniser.max_length == 40
    scale = max(result.raw.abs().max().item() for result in model.score(PROMPTS, COMPLETIONS))
    assert 0 < largest_difference(model, loaded) < 0.05 * scale


def test_weights_in_bfloat16_come_back_exactly(decoder_folder: str, tmp_path: Path) -> None:
    model = build(decoder_folder, dtype="bfloat16")
    notes = model.save_pretrained(tmp_path)
    assert "round the head" in notes[0]
    assert largest_difference(model, RewardModel.from_pretrained(tmp_path)) == 0.0
