"""Exports: equal raw scores in plain transformers, its pipeline and TRL, or a folder that they refuse."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from plaudit.configs.model import LoraConfig
from plaudit.models.export import export_reward_model
from plaudit.models.reward_model import RewardModel
from plaudit.models.shift import final_norm
from tests.models.test_saving import COMPLETIONS, PROMPTS, build, largest_difference

LONG = "the cat sat on the mat so the dog ran here and the cat sat on the mat so the dog ran"


def saved(folder: Path, tokenizer: str, name: str = "llama", *, bias: float = 0.0, **options: Any) -> RewardModel:
    """A model as training leaves it: normalised, saved to `folder`."""
    model = build(tokenizer, name, **options)
    outputs = model.num_outputs
    with torch.no_grad():
        model.head.weight.mul_(0.75)  # still outside of what a sigmoid could return; of order one, as rounding is
        model.head.bias.fill_(bias)
    model.set_normalisation([-1.7] * outputs, [2.0] * outputs)
    model.save_pretrained(folder, data_hash="abc", extra={"job": "test"})
    return model


def texts_of(model: RewardModel, prompt: str, completions: list[str]) -> list[str]:
    block = model.text_tokeniser.group(prompt, completions).blocks[0]
    return [model.tokenizer.decode(block.prefix + ids) for ids in block.completions]


@pytest.mark.parametrize(("name", "folds"), [("gpt2", True), ("phi", True), ("llama", False), ("qwen3", False)])
@pytest.mark.parametrize("bias", [0.0, 0.6])
def test_every_tool_sees_the_same_raw_score(
    name: str, folds: bool, bias: float, decoder_folder: str, tmp_path: Path
) -> None:
    model = saved(tmp_path / "model", decoder_folder, name, bias=bias)
    result = export_reward_model(tmp_path / "model", tmp_path / "out")
    assert result.form == "classifier"
    assert result.opens_plainly
    assert result.difference is not None
    assert result.difference <= 1e-5
    exported = RewardModel.from_pretrained(tmp_path / "out")
    assert largest_difference(model, exported, "normalised") <= 1e-5
    raw = torch.cat([r.raw for r in exported.score(PROMPTS, COMPLETIONS)])
    normalised = torch.cat([r.normalised for r in model.score(PROMPTS, COMPLETIONS)])
    said = " ".join(result.notes)
    assert (final_norm(model) is not None) == folds
    if folds:
        assert torch.allclose(raw, normalised, atol=1e-5)
        assert "folded into the bias of the final normalisation layer" in said
    else:
        assert not torch.allclose(raw, normalised, atol=0.1)
        assert "kept in plaudit.json" in said
        assert ("went into the normalising shift" in said) == bool(bias)
    scorer = pipeline("text-classification", model=str(tmp_path / "out"))
    texts = [t for p, c in zip(PROMPTS, COMPLETIONS, strict=True) for t in texts_of(model, p, c)]
    seen = torch.tensor([one["score"] for one in scorer(texts)])
    assert torch.allclose(seen, raw, atol=1e-5)
    assert seen.abs().max() > 1.5


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_pipeline_gives_raw_scores_padded_on_both_sides(
    side: str, batch_size: int, decoder_folder: str, tmp_path: Path
) -> None:
    model = saved(tmp_path / "model", decoder_folder)
    export_reward_model(tmp_path / "model", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.padding_side == "right"
    tokenizer.padding_side = side
    scorer = pipeline("text-classification", model=str(tmp_path / "out"), tokenizer=tokenizer)
    texts = texts_of(model, "why is it so", ["yes", "no no no no no", LONG])
    got = [one["score"] for one in scorer(texts, batch_size=batch_size, padding=True)]
    wanted = model.score(["why is it so"], [["yes", "no no no no no", LONG]])[0].raw
    assert got == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "aggregation"), [("llama", "mean"), ("llama", "sum"), ("llama", "attention"), ("bert", "mean")]
)
def test_what_cannot_be_expressed_is_refused_everywhere(
    name: str, aggregation: str, decoder_folder: str, encoder_folder: str, tmp_path: Path
) -> None:
    tokenizer = encoder_folder if name == "bert" else decoder_folder
    model = saved(tmp_path / "model", tokenizer, name, aggregation=aggregation)
    result = export_reward_model(tmp_path / "model", tmp_path / "out")
    assert (result.form, result.opens_plainly, result.difference) == ("own", False, None)
    assert f"cannot express the aggregation '{aggregation}'" in " ".join(result.notes)
    assert "folded into the head's bias" in " ".join(result.notes)
    for auto in (AutoModelForSequenceClassification, AutoModel, AutoModelForCausalLM):
        for folder in (tmp_path / "out", tmp_path / "out" / "backbone"):
            with pytest.raises((ValueError, OSError)):
                auto.from_pretrained(folder)
    with pytest.raises((ValueError, OSError)):
        pipeline("text-classification", model=str(tmp_path / "out"))
    exported = RewardModel.from_pretrained(tmp_path / "out")
    assert largest_difference(model, exported, "normalised") <= 1e-5


def test_adapters_stand_apart_or_are_merged(decoder_folder: str, tmp_path: Path) -> None:
    backbone = tmp_path / "backbone"
    start = build(decoder_folder)
    start.backbone.save_pretrained(backbone)  # type: ignore[operator]
    start.tokenizer.save_pretrained(backbone)
    model = RewardModel.from_backbone(
        start_config := _config(str(backbone), lora=LoraConfig(rank=4, target_modules="all-linear"))
    )
    assert start_config.lora is not None
    with torch.no_grad():
        for key, parameter in model.backbone.named_parameters():
            if "lora_B" in key:
                parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    model.set_normalisation(0.5, 1.0)
    model.save_pretrained(tmp_path / "model")
    apart = export_reward_model(tmp_path / "model", tmp_path / "apart")
    assert (apart.form, apart.opens_plainly) == ("adapter", False)
    assert "--merge" in " ".join(apart.notes)
    merged = export_reward_model(tmp_path / "model", tmp_path / "merged", merge=True)
    assert (merged.form, merged.opens_plainly) == ("classifier", True)
    assert not (tmp_path / "merged" / "adapter").exists()
    for name in ("apart", "merged"):
        exported = RewardModel.from_pretrained(tmp_path / name)
        assert largest_difference(model, exported, "normalised") <= 1e-5
    without = RewardModel.from_backbone(_config(str(backbone)))
    without.head.load_state_dict(model.head.state_dict())
    assert largest_difference(without, model) > 1e-2, "the adapters of this test do nothing"


def _config(backbone: str, **options: Any) -> Any:
    from plaudit.configs.model import RewardModelConfig

    return RewardModelConfig(backbone=backbone, **options)


def test_attributes_are_said_aloud_and_tools_that_want_one_reward_refuse(decoder_folder: str, tmp_path: Path) -> None:
    saved(tmp_path / "model", decoder_folder, attributes=("helpful", "brief"))
    result = export_reward_model(tmp_path / "model", tmp_path / "out")
    assert "['helpful', 'brief']" in " ".join(result.notes)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.id2label == {
        0: "helpful",
        1: "brief",
    }
    with pytest.raises((ValueError, RuntimeError)):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1)


def test_the_shift_stays_when_asked_and_in_lower_precision(decoder_folder: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", decoder_folder, "gpt2")
    for name, options in (("kept", {"fold": False}), ("half", {"dtype": "bfloat16"})):
        result = export_reward_model(tmp_path / "model", tmp_path / name, **options)  # type: ignore[arg-type]
        assert "kept in plaudit.json" in " ".join(result.notes)
        exported = RewardModel.from_pretrained(tmp_path / name)
        assert exported.normalisation_mean.tolist() == pytest.approx(model.normalisation_mean.tolist())
    assert "bfloat16" in " ".join(result.notes)


def test_a_foreign_encoder_gets_raw_scores_from_pipelines(encoder_folder: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from tests.models.conftest import ARCHITECTURES

    config = AutoConfig.for_model("bert", **ARCHITECTURES["bert"][1], num_labels=1)
    torch.manual_seed(0)
    foreign = AutoModelForSequenceClassification.from_config(config)
    foreign.classifier.bias.data.fill_(4.0)
    foreign.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(encoder_folder).save_pretrained(tmp_path / "model")
    result = export_reward_model(tmp_path / "model", tmp_path / "out")
    assert (result.form, result.opens_plainly) == ("native", True)
    scorer = pipeline("text-classification", model=str(tmp_path / "out"))
    got = scorer({"text": "the cat", "text_pair": "sat on the mat"})
    raw = RewardModel.from_pretrained(tmp_path / "model").score(["the cat"], [["sat on the mat"]])[0].raw.item()
    assert raw > 3
    assert got["score"] == pytest.approx(raw, abs=1e-5)


def test_folders_in_the_way(decoder_folder: str, tmp_path: Path) -> None:
    saved(tmp_path / "model", decoder_folder, aggregation="mean")
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="--overwrite"):
        export_reward_model(tmp_path / "model", out)
    with pytest.raises(ValueError, match="is the model itself"):
        export_reward_model(tmp_path / "model", tmp_path / "model", overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        export_reward_model(tmp_path / "model", out / "README.md", overwrite=True)
    export_reward_model(tmp_path / "model", out, overwrite=True)
    saved(tmp_path / "other", decoder_folder)
    result = export_reward_model(tmp_path / "other", out, overwrite=True)
    assert result.form == "classifier"
    assert (out / "README.md").read_text() == "mine"
    assert not (out / "backbone").exists()
    assert not (out / "head.safetensors").exists()
    assert sorted(os.listdir(tmp_path)) == ["decoder_tokenizer", "model", "other", "out"], "something was left behind"
    description = json.loads((out / "plaudit.json").read_text())
    assert (description["data_hash"], description["extra"]) == ("abc", {"job": "test"})


def test_a_wrong_folder_is_never_written(decoder_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If plain transformers read another number, nothing would appear."""
    import plaudit.models.export as module

    saved(tmp_path / "model", decoder_folder)
    save = module.save_reward_model

    def spoiled(model: RewardModel, folder: Path, **options: Any) -> list[str]:
        with torch.no_grad():
            model.head.weight.mul_(1.01)
        notes = save(model, folder, **options)
        with torch.no_grad():
            model.head.weight.div_(1.01)
        return notes

    monkeypatch.setattr(module, "save_reward_model", spoiled)
    with pytest.raises(ValueError, match="other scores"):
        export_reward_model(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
