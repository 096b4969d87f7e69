"""Backbones: which are decoders, what is random, and pad tokens."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from plaudit.models.backbone import (
    ensure_pad_token,
    fit_tokenizer,
    freeze_first_layers,
    grow_embeddings,
    is_causal,
    load_backbone,
    load_tokenizer,
    longest_text,
    random_backbone,
    random_config,
    set_dropout,
)
from plaudit.models.saving import load_reward_model
from tests.models.conftest import ARCHITECTURES, tiny_base, word_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 27, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoders_and_encoders_are_told_apart(name: str) -> None:
    model = tiny_base(name)
    ids = torch.randint(3, 64, (1, 8), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 7 - 3) % 61 + 3
    with torch.no_grad():
        first, second = (model(input_ids=x).last_hidden_state[0, 3] for x in (ids, other))
    # A decoder's early states cannot know a later token.
    assert is_causal(model.config) is torch.allclose(first, second, atol=1e-6)


def test_encoder_decoders_are_refused() -> None:
    with pytest.raises(ValueError, match="'t5' is an encoder-decoder"):
        is_causal(AutoConfig.for_model("t5"))


def test_a_causal_language_model_loses_its_vocabulary_head(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    assert not any("lm_head" in name for name, _ in backbone.named_parameters())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are missing and would be random"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_the_first_layers_alone_are_those_of_the_whole(architecture: str, tmp_path: Path) -> None:
    whole = random_backbone(architecture, {**SIZES, "num_hidden_layers": 3}).eval()
    whole.save_pretrained(tmp_path)  # type: ignore[operator]
    ids = torch.arange(1, 6)[None]
    seen: list[torch.Tensor] = []
    layers = whole.encoder.layer if architecture == "bert" else whole.layers  # type: ignore[union-attr]
    layers[1].register_forward_hook(  # type: ignore[index, union-attr, operator]
        lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        whole(input_ids=ids)
        cut = load_backbone(tmp_path, layers=2).eval()
        found = cut(input_ids=ids).last_hidden_state
        expected = seen[0] if architecture == "bert" else cut.norm(seen[0])  # type: ignore[operator]
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"backbone_layers: 4 asked for, but .* has 3"):
        load_backbone(tmp_path, layers=4)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "opt"])
def test_frozen_layers_have_no_gradient_and_all_others_have_one(architecture: str) -> None:
    model = random_backbone(architecture, {**SIZES, "num_hidden_layers": 3})
    freeze_first_layers(model, 2)
    model(input_ids=torch.arange(1, 6)[None]).last_hidden_state.square().sum().backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    # The last layer, and a final norm where there is one.
    last = {"bert": "encoder.layer.2.", "gpt2": "h.2.", "llama": "layers.2.", "opt": "decoder.layers.2."}[architecture]
    whole = {name for name, _ in model.named_parameters()}
    final = {name for name in whole if name.startswith(("norm.", "ln_f.", "decoder.final_layer_norm."))}
    assert touched == {name for name in whole if name.startswith(last)} | final
    with pytest.raises(ValueError, match="frozen_layers: 4 asked for, but there are 3"):
        freeze_first_layers(model, 4)


def test_every_weight_of_an_encoder_is_used() -> None:
    assert not any("pooler" in name for name, _ in random_backbone("bert", SIZES).named_parameters())


def test_dropout_of_every_name_is_set() -> None:
    for model_type in ("bert", "gpt2", "llama", "phi", "modernbert", "opt"):
        config = AutoConfig.for_model(model_type)
        set_dropout(config, 0.25)
        found = {k: v for k, v in config.to_dict().items() if "drop" in k and isinstance(v, float)}
        assert found
        assert all(value == (0.0 if "layer" in key else 0.25) for key, value in found.items())


@pytest.mark.parametrize("pad", ["eos", "unk", "none"])
def test_a_pad_token_that_no_text_ends_with(pad: str) -> None:
    tokenizer = word_tokenizer(pad=None)
    if pad != "none":
        tokenizer.pad_token = tokenizer.eos_token if pad == "eos" else tokenizer.unk_token
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id == 27
    model = random_backbone("llama", SIZES)
    before = model.embed_tokens.weight[:27].detach().clone()  # type: ignore[index, union-attr]
    fit_tokenizer(model, tokenizer)
    assert model.embed_tokens.weight.shape[0] == 28  # type: ignore[union-attr]
    assert torch.equal(model.embed_tokens.weight[:27], before)  # type: ignore[index, union-attr]
    assert torch.allclose(model.embed_tokens.weight[27], before.mean(0), atol=1e-7)  # type: ignore[index, union-attr]
    assert model.config.pad_token_id == 27  # type: ignore[union-attr]


@pytest.mark.parametrize("tied", [True, False])
def test_added_rows_are_the_mean_whatever_was_drawn(tied: bool) -> None:
    config = AutoConfig.for_model("llama", tie_word_embeddings=tied, **(SIZES | {"vocab_size": 20}))
    torch.manual_seed(0)
    first = AutoModelForCausalLM.from_config(config)
    again = copy.deepcopy(first)
    grow_embeddings(first, 10)
    assert first.get_input_embeddings().weight.shape[0] == 20
    grow_embeddings(first, 23)
    torch.manual_seed(5)
    grow_embeddings(again, 23)
    for name, weight in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    for module in (first.get_input_embeddings(), first.get_output_embeddings()):
        assert torch.allclose(module.weight[20:], module.weight[:20].mean(0).expand(3, -1), atol=1e-7)


def test_a_good_pad_token_stays_and_a_spare_one_is_taken() -> None:
    tokenizer = word_tokenizer()
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == "<pad>"
    assert len(tokenizer) == 28
    tokenizer.pad_token = tokenizer.eos_token
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == "<pad>"
    assert len(tokenizer) == 28


def test_the_longest_text() -> None:
    tokenizer = word_tokenizer()
    assert longest_text(AutoConfig.for_model("bert"), tokenizer) == 512
    assert longest_text(AutoConfig.for_model("roberta", max_position_embeddings=514), tokenizer) == 512
    tokenizer.model_max_length = 100
    assert longest_text(AutoConfig.for_model("bert"), tokenizer) == 100


def test_random_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = random_backbone("llama", SIZES, seed=1)
    assert torch.equal(torch.rand(1), expected)
    second = random_backbone("llama", SIZES, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("here/missing", r"here/missing: no such folder \(there is a folder here"),
        ("./missing", "./missing: no such folder"),
        ("a/b/c", "a/b/c: no such folder"),
        ("here", "here: "),
    ],
)
def test_mistyped_folders_ask_nothing_of_the_network(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    for load in (load_tokenizer, load_reward_model):
        with pytest.raises(ValueError, match=message) as caught:
            load(name)
        assert "\n" not in str(caught.value)


def test_names_that_cannot_be_fetched_are_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **options: object) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unreachable)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    for load in (load_tokenizer, load_reward_model):
        with pytest.raises(ValueError, match="nobody/nothing: no such folder here, and no model of that name"):
            load("nobody/nothing")


@pytest.mark.parametrize(
    ("model_type", "sizes", "message"),
    [
        ("lama", {}, "model_type: 'lama' is unknown; did you mean 'llama'"),
        ("llama", {"hidden_sizes": 8}, "'llama' has no key 'hidden_sizes'; did you mean 'hidden_size'"),
        ("llama", {"hidden_size": 30, "num_attention_heads": 4}, r"backbone_config: .*30.* is not a multiple"),
    ],
)
def test_random_models_of_a_size_that_nobody_asked_for_are_refused(
    model_type: str, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        random_backbone(model_type, sizes)


def test_sizes_may_go_by_either_name() -> None:
    assert random_config("gpt2", {"hidden_size": 8, "n_head": 2}).n_embd == 8


def test_the_folder_of_a_run_points_to_the_model_inside(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"folder of a run.*did you mean .*model\?"):
        load_tokenizer(tmp_path)
