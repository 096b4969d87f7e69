"""Reward models as rewards: the model's own numbers, whatever the policy's tokenizer, and never a changed weight."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from plaudit.data.records import Message
from plaudit.data.vocabulary import train_tokenizer
from plaudit.models.reward_model import RewardModel
from plaudit.models.scoring import score_tokens
from plaudit.rewards.base import Sample, as_reward
from plaudit.rewards.combine import combine
from plaudit.rewards.model import ModelReward, frozen, weights_hash
from plaudit.rewards.normalise import stored_of
from plaudit.rewards.spans import token_ends, token_rewards
from tests.models.conftest import word_tokenizer
from tests.models.test_saving import build

SAMPLES = [
    Sample("why is it so", "no"),
    Sample("the cat", "very bad yes"),
    Sample("why is it so", "the cat sat", finished=False),
    Sample((Message("user", "why"),), "no no"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reward") / "kind"
    word_tokenizer().save_pretrained(place / "tokenizer")
    model = build(str(place / "tokenizer"))
    model.set_normalisation(-1.5, 2.0)
    model.save_pretrained(place)
    return place


def test_the_scores_are_the_models_own(folder: Path) -> None:
    model = RewardModel.from_pretrained(folder)
    wanted = [float(model.score([s.prompt], [[s.completion]])[0].normalised[0]) for s in SAMPLES]
    score = as_reward(model)(SAMPLES)
    own = [0, 1, 3]
    assert score.total[own].tolist() == pytest.approx([wanted[i] for i in own], abs=1e-5)
    # The cut-off answer is read without an end token.
    group = model.text_tokeniser.group(SAMPLES[2].prompt, ["the cat sat"], cut_off=[True])
    from plaudit.models.scoring import score_groups

    raw = score_groups(model, [group])[0]
    assert float(score.total[2]) == pytest.approx(float(model.normalise(raw)[0]), abs=1e-5)
    assert abs(float(score.total[2]) - wanted[2]) > 1e-3
    raw_scores = ModelReward(model, normalised=False)(SAMPLES).total
    assert (raw_scores - score.total).tolist() == pytest.approx([-1.5] * 4, abs=1e-5)


def test_a_folder_is_a_reward_and_its_name_the_folders(folder: Path) -> None:
    for given in (folder, str(folder)):
        score = as_reward(given)(SAMPLES)
        assert list(score.parts) == ["kind"]
    assert torch.equal(score.total, as_reward(RewardModel.from_pretrained(folder))(SAMPLES).total)


def test_a_classifier_by_others_is_a_reward(tmp_path: Path) -> None:
    from transformers import AutoConfig

    from tests.models.conftest import ARCHITECTURES

    kind, sizes = ARCHITECTURES["bert"]
    config = AutoConfig.for_model(kind, **sizes, num_labels=1, problem_type="regression")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    word_tokenizer(encoder=True).save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path)("the cat", "very bad yes", return_tensors="pt")
    with torch.no_grad():
        wanted = float(classifier(**inputs).logits[0, 0])
    assert float(as_reward(tmp_path)(SAMPLES[1:2]).total[0]) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"aggregation": "discounted_sum"}, {"aggregate_over": "text"}])
def test_what_each_piece_of_text_adds_to_a_sum(tmp_path: Path, options: dict[str, Any]) -> None:
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = build(str(tmp_path / "tokenizer"), **({"aggregation": "sum"} | options))
    model.set_normalisation(-1.5, 2.0)
    score = ModelReward(model, token_budget=24)(SAMPLES)
    plain = ModelReward(model, token_spans=False)(SAMPLES)
    torch.testing.assert_close(score.total, plain.total)
    assert plain.spans is None
    assert score.spans is not None
    assert [(start, end) for start, end, _ in score.spans[1]] == [(0, 4), (4, 8), (8, 12)]
    # A decoder's pieces do not know what follows: those of a longer answer begin with those of a shorter one.
    longer = ModelReward(model)([Sample("the cat", "very bad yes no cat")])
    assert longer.spans is not None
    assert [value for *_, value in longer.spans[0]][:3] == pytest.approx([v for *_, v in score.spans[1]], abs=1e-5)
    # One word less changes the total by what the last word, and the end behind it, add.
    cut = [Sample("the cat", text, finished=False) for text in ("very bad", "very bad yes")]
    totals = ModelReward(model, token_spans=False)(cut).total
    assert float(totals[1] - totals[0]) == pytest.approx(score.spans[1][2][2], abs=1e-5)
    # On the policy's own tokens all of it adds up to the total.
    found = token_rewards(score, 1, [1, 4, 8, 12, 12])
    assert float(found.sum()) == pytest.approx(float(score.total[1]), abs=1e-5)
    assert found[2].item() == pytest.approx(score.spans[1][1][2])


def test_only_sums_have_pieces(folder: Path) -> None:
    model = RewardModel.from_pretrained(folder)
    assert ModelReward(model)(SAMPLES).spans is None
    with pytest.raises(ValueError, match="'last' do not add up"):
        score_tokens(model, [])


class Bytes:
    """A tokenizer whose tokens are bytes; 0 is its end token."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return bytes(token for token in ids if token).decode(errors="replace")


def test_characters_of_several_tokens_are_written_by_the_last() -> None:
    assert token_ends(Bytes(), [*"a猫b".encode(), 0], "a猫b") == [1, 1, 1, 2, 3, 3]
    assert token_ends(Bytes(), list(b"  ab"), "ab") == [0, 0, 1, 2]
    assert token_ends(Bytes(), list(b" ab"), " ab") == [1, 2, 3]
    assert token_ends(Bytes(), [], "") == []
    # A replacement sign that belongs to the text looks like half a character until the next token.
    assert token_ends(Bytes(), list("a\ufffdb".encode()), "a\ufffdb") == [1, 1, 1, 1, 3]


MIXED = "  naïve 猫が好き 👩‍👩‍👧 e\u0301t\u00e9,  \n\tend. "


@pytest.mark.parametrize("text", [MIXED, MIXED.strip(), "猫", " 猫\u3000犬 ", "  \n ", ""])
@pytest.mark.parametrize("vocab_size", [262, 290])
def test_written_characters_are_those_whose_bytes_are_all_there(text: str, vocab_size: int) -> None:
    """Against the bytes of the tokens themselves, which the tokenizer writes as letters of its own."""
    tokenizer = train_tokenizer([MIXED * 3, "猫犬"], vocab_size)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
    ids = tokenizer.encode(text, add_special_tokens=False)
    spelled = [bytes(letters[letter] for letter in token) for token in tokenizer.convert_ids_to_tokens(ids)]
    assert b"".join(spelled).decode() == text
    written = [len(b"".join(spelled[: count + 1]).decode(errors="ignore")) for count in range(len(ids))]
    leading = len(text) - len(text.lstrip())
    ended = [*ids, tokenizer.eos_token_id]
    for completion, before in ((text, 0), (text.strip(), leading)):
        wanted = [min(max(each - before, 0), len(completion)) for each in written]
        assert token_ends(tokenizer, ended, completion) == [*wanted, len(completion)]


def test_words_are_written_where_their_tokenizer_places_them() -> None:
    tokenizer, text = word_tokenizer(), "the cat sat so good"
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert token_ends(tokenizer, found["input_ids"], text) == [end for _, end in found["offset_mapping"]]


def test_what_cannot_be_scored_is_invalid(folder: Path) -> None:
    reward = ModelReward.from_pretrained(folder, max_length=16)
    score = reward([*SAMPLES[:2], Sample("why", "no " * 20), Sample("why", "", finished=False), Sample("why", "")])
    assert score.valid.tolist() == [True, True, False, False, True]
    assert "max_length 16" in score.problems[2]
    assert score.problems[3] == "nothing was said"


def test_attributes_are_parts(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    model = build(str(tmp_path), attributes=("kind", "right"), attribute_weights=(1.0, 3.0))
    score = as_reward(model)(SAMPLES)
    assert set(score.parts) == {"kind", "right"}
    assert torch.allclose(score.parts["kind"] + 3 * score.parts["right"], score.total, atol=1e-5)


def test_no_score_depends_on_its_company(folder: Path) -> None:
    reward = ModelReward.from_pretrained(folder, max_length=8, too_long="truncate_prompt")
    samples = [Sample("why is it so the cat sat", text) for text in ("no", "very bad yes the cat")]
    together = reward(samples).total
    alone = torch.cat([reward([sample]).total for sample in samples])
    assert torch.allclose(together, alone, atol=1e-5)


def test_scoring_leaves_the_model_frozen_and_in_evaluation_mode(folder: Path) -> None:
    model = RewardModel.from_pretrained(folder).train()
    reward = ModelReward(model)
    assert not model.training
    before = weights_hash(model)
    assert not reward(SAMPLES).total.requires_grad
    reward.check()
    assert weights_hash(model) == before
    policy = torch.nn.Linear(2, 2)
    combined = combine({"kind": reward, "rule": lambda completions: [0.0] * len(completions)})
    torch.optim.SGD(policy.parameters(), 1.0).step()
    combined.check()


def nudge(module: Any) -> None:
    next(iter(module.parameters())).data.view(-1)[0] += 1e-6


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (nudge, "weights of a frozen Sequential changed"),
        (lambda m: m.register_buffer("extra", torch.zeros(1)), "changed"),
        (lambda m: m[1].train(), "training mode: 1"),
        (lambda m: m[0].weight.requires_grad_(True), "asks for gradients: 0.weight"),
    ],
)
def test_what_is_done_to_a_frozen_model_is_seen(harm: Any, message: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout())
    guard = frozen(module)
    guard.check()
    harm(module)
    with pytest.raises(RuntimeError, match=message):
        guard.check()


def test_the_hash_knows_names_types_shapes_and_bytes() -> None:
    def hashed(**weights: torch.Tensor) -> str:
        module = torch.nn.Module()
        for name, value in weights.items():
            module.register_buffer(name, value)
        return weights_hash(module)

    one = torch.tensor([1.0, 0.0])
    others = [
        hashed(a=one),
        hashed(b=one),
        hashed(a=one.bfloat16()),
        hashed(a=one[None]),
        hashed(a=torch.tensor([1.0, -0.0])),
        hashed(a=torch.tensor(True)),
    ]
    assert len(set(others)) == len(others)
    assert hashed(a=one, b=one) == hashed(b=one.clone(), a=one.clone())


def test_the_stored_spread_of_a_model(folder: Path) -> None:
    model = RewardModel.from_pretrained(folder)
    score = as_reward(model)(SAMPLES)
    assert torch.allclose(stored_of(model)(score).total, score.total / 2.0)
    model.is_normalised.fill_(False)
    with pytest.raises(ValueError, match="no stored mean"):
        stored_of(model)
