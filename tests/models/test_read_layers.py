"""Reading several layers' states: which numbers they are, by both paths, after saving, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModel

from plaudit.configs.model import RewardModelConfig
from plaudit.models.reward_model import RewardModel
from tests.models.conftest import ARCHITECTURES, random_batch

NAMES = ("llama", "gpt2", "gemma3-window", "bert", "modernbert-window")


def build(folder: str, name: str, **options: Any) -> RewardModel:
    model_type, sizes = ARCHITECTURES[name]
    values: dict[str, Any] = {"model_type": model_type, "backbone_config": sizes, "tokenizer": folder, **options}
    return RewardModel.from_backbone(RewardModelConfig(**values)).eval()


@pytest.mark.parametrize("name", NAMES)
def test_the_states_are_those_that_transformers_gives_and_both_paths_agree(
    name: str, decoder_folder: str, encoder_folder: str
) -> None:
    encoder = "bert" in name
    model = build(encoder_folder if encoder else decoder_folder, name, aggregation="mean", read_layers=(0, 2, 1))
    batch = random_batch([(4, [6])], causal=not encoder)
    kind = model.text_tokeniser.completion_token_type
    extra = {"token_type_ids": torch.tensor([[0] * 4 + [kind] * 6])} if name == "bert" else {}
    with torch.no_grad():
        packed = model.states(batch)
        model.packed = not model.packed
        assert torch.allclose(model.states(batch), packed, atol=1e-5)
        plain = model.backbone(batch.input_ids[None], output_hidden_states=True, **extra).hidden_states
        assert torch.allclose(packed, torch.cat([plain[0][0], plain[2][0], plain[1][0]], -1), atol=1e-5)
        assert not torch.allclose(plain[0], plain[2], atol=1e-2)


def test_the_last_layer_alone_is_what_none_reads(decoder_folder: str) -> None:
    batch = random_batch([(4, [6, 2]), (1, [3])])
    models = [build(decoder_folder, "llama", read_layers=layers) for layers in (None, (2,), "all")]
    with torch.no_grad():
        assert torch.equal(models[0](batch), models[1](batch))
        assert models[2].states(batch).shape == (16, 3 * 32)
    assert models[2].parts.read_layers == (0, 1, 2)
    assert models[2].head.weight.shape == (1, 3 * 32)


def test_gradients_reach_every_layer_by_both_paths(decoder_folder: str) -> None:
    batch = random_batch([(4, [6, 2])])
    gradients = []
    for packed in (True, False):
        model = build(decoder_folder, "llama", read_layers="all")
        model.packed = packed
        model.gradient_checkpointing_enable()
        model.train()
        model(batch).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7


@pytest.mark.parametrize(("name", "aggregation"), [("llama", "last"), ("bert", "mean")])
def test_it_comes_back_and_plain_transformers_refuses_it(
    name: str, aggregation: str, decoder_folder: str, encoder_folder: str, tmp_path: Path
) -> None:
    folder = encoder_folder if name == "bert" else decoder_folder
    model = build(folder, name, aggregation=aggregation, read_layers=(1, 2))
    notes = model.save_pretrained(tmp_path)
    assert "over layers (1, 2)" in " ".join(notes)
    loaded = RewardModel.from_pretrained(tmp_path)
    prompt, answers = "why is it so good", ["yes it is", "no"]
    assert loaded.parts.read_layers == (1, 2)
    assert torch.equal(loaded.score([prompt], [answers])[0].raw, model.score([prompt], [answers])[0].raw)
    with pytest.raises((ValueError, OSError)):
        AutoModel.from_pretrained(tmp_path)


def test_layers_that_are_not_there_are_refused(decoder_folder: str) -> None:
    with pytest.raises(ValueError, match="read_layers: 3 asked for, but there are 2 layers"):
        build(decoder_folder, "llama", read_layers=(3,))
    for layers in ((), (1, 1), (-1,)):
        with pytest.raises(ValidationError, match="name each layer once"):
            RewardModelConfig(backbone="a", read_layers=layers)
