"""Compiled parts of the layers: which they are, equal numbers, and a run that goes on where nothing can be compiled."""

from pathlib import Path

import pytest
import torch

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.data.records import Comparison, Ranking
from plaudit.models.backbone import random_backbone
from plaudit.training import compiling, reward
from plaudit.training.compiling import compile_model, compiler_fault, regions
from plaudit.training.trackers import read_metrics

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def parts_of(model_type: str) -> list[str]:
    model = random_backbone(model_type, SMALL)
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(region)] for region in regions(model)]


def test_regions_are_what_is_not_attention() -> None:
    assert parts_of("llama") == [
        f"layers.{n}.{part}" for n in range(2) for part in ("mlp", "input_layernorm", "post_attention_layernorm")
    ]
    assert parts_of("bert") == [f"encoder.layer.{n}.{part}" for n in range(2) for part in ("intermediate", "output")]


def test_without_a_compiler_the_run_goes_on_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    assert compiler_fault(torch.device("cpu")) == "RuntimeError: no C++ compiler found"
    model = random_backbone("llama", SMALL)
    assert not compile_model(model, torch.device("cpu"))
    assert all(region._compiled_call_impl is None for region in regions(model))
    assert "training goes on without: RuntimeError: no C++ compiler found" in capsys.readouterr().err


def test_a_model_without_layers_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert not compile_model(torch.nn.Linear(2, 2), torch.device("cpu"))
    assert "no list of layers" in capsys.readouterr().err


def test_the_configuration_asks_for_it(tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.nn.Module] = []
    monkeypatch.setattr(reward, "compile_model", lambda model, device, quiet: asked.append(model))
    for wanted in (False, True):
        trainer, _, _ = reward.prepare(configuration(tokenizer_folder, tmp_path, wanted), rankings())
        assert asked == ([trainer.model] if wanted else [])


@pytest.mark.slow
def test_compiled_numbers_are_the_same(tokenizer_folder: str, tmp_path: Path) -> None:
    if (fault := compiler_fault(torch.device("cpu"))) is not None:
        pytest.skip(f"nothing can be compiled here: {fault}")
    losses, compiled = {}, []
    keep = compiling.regions
    for wanted in (False, True):
        config = configuration(tokenizer_folder, tmp_path / str(wanted), wanted)
        result = reward.main(config, train=rankings())
        assert isinstance(result, reward.RewardTrainingResult)
        compiled.append({region._compiled_call_impl is not None for region in keep(result.model)})
        lines = read_metrics(config.output / "metrics.jsonl")
        losses[wanted] = torch.tensor([[line["loss"], line["gradient_norm"]] for line in lines if "loss" in line])
    assert compiled == [{False}, {True}]
    assert len(losses[True]) == 4
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-4, atol=1e-6)


def configuration(tokenizer_folder: str, output: Path, wanted: bool) -> RewardTrainingConfig:
    sizes = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    return RewardTrainingConfig.model_validate(
        {
            "model": {"model_type": "llama", "backbone_config": sizes, "tokenizer": tokenizer_folder},
            "output": output,
            "epochs": 1.0,
            "records_per_step": 2,
            "compile": wanted,
            "quiet": True,
            "token_cache": "off",
        }
    )


def rankings() -> list[Comparison]:
    """Eight prompts of different lengths, so that no two steps have rows of the same length."""
    texts = ["good", "rather good, I think", "bad", "bad and long, much too long to be of any use"]
    return [
        Comparison(prompt="tell me " * (n + 1), completions=tuple(texts[: 2 + n % 3]), judgement=Ranking(((0,), (1,))))
        for n in range(8)
    ]
