"""Fluency and similarity against plain transformers, on several texts at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from plaudit.data.records import Message
from plaudit.models.causal_lm import CausalLM
from plaudit.rewards.base import Sample
from plaudit.rewards.fluency import FluencyReward, fluency
from plaudit.rewards.relevance import similarity
from tests.models.conftest import ARCHITECTURES, tiny_base, word_tokenizer

SAMPLES = [
    Sample("why is it so", "no"),
    Sample("the cat", "very bad yes", finished=False),
    Sample("why is it so", "the cat sat"),
    Sample("why is it so", "yes no"),
]


def language_model() -> Any:
    kind, sizes = ARCHITECTURES["llama"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("lm")
    language_model().save_pretrained(place)
    word_tokenizer().save_pretrained(place)
    return place


def mean_logprob(model: Any, prefix: list[int], ids: list[int]) -> float:
    """One plain forward, its log-softmax read at every answer token."""
    with torch.no_grad():
        table = model(input_ids=torch.tensor([prefix + ids])).logits[0].log_softmax(-1)
    places = range(max(len(prefix), 1), len(prefix + ids))
    found = [float(table[place - 1, (prefix + ids)[place]]) for place in places]
    return sum(found) / len(found)


@pytest.mark.parametrize("budget", [8192, 12, 1])
def test_fluency_is_the_mean_log_probability(folder: Path, budget: int) -> None:
    reward = fluency(folder, token_budget=budget)
    plain = language_model()
    wanted = []
    for sample in SAMPLES:
        group = reward.tokeniser.group(sample.prompt, [sample.completion], cut_off=[not sample.finished])
        wanted.append(mean_logprob(plain, group.blocks[0].prefix, group.blocks[0].completions[0]))
    assert reward(SAMPLES).total.tolist() == pytest.approx(wanted, abs=1e-5)
    assert max(wanted) - min(wanted) > 0.05


def test_fluency_of_the_answer_alone(folder: Path) -> None:
    reward = fluency(folder, given_prompt=False)
    prompts = [Sample("the cat", sample.completion, sample.finished) for sample in SAMPLES]
    assert reward(SAMPLES).total.tolist() == pytest.approx(reward(prompts).total.tolist(), abs=1e-6)
    group = reward.tokeniser.group("", ["the cat sat"])
    wanted = mean_logprob(language_model(), group.blocks[0].prefix, group.blocks[0].completions[0])
    assert float(reward(SAMPLES).total[2]) == pytest.approx(wanted, abs=1e-5)


def test_what_has_no_fluency_is_invalid(folder: Path) -> None:
    model = CausalLM.from_pretrained(folder, max_length=16)
    score = FluencyReward(model)([Sample("why", "no " * 30), Sample("why", "", finished=False), Sample("why", "no")])
    assert score.valid.tolist() == [False, False, True]
    assert "max_length 16" in score.problems[0]
    assert score.problems[1] == "nothing was said"


def test_fluency_shares_prompts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = fluency(folder)
    sizes = []
    forward = reward.model.forward

    def counted(batch: Any) -> Any:
        sizes.append(batch.layout.num_tokens)
        return forward(batch)

    monkeypatch.setattr(reward.model, "forward", counted)
    together = reward([SAMPLES[0], SAMPLES[2], SAMPLES[3]]).total
    group = reward.tokeniser.group("why is it so", ["no", "the cat sat", "yes no"])
    assert sizes == [group.num_tokens]
    alone = torch.cat([reward([SAMPLES[i]]).total for i in (0, 2, 3)])
    assert torch.allclose(together, alone, atol=1e-5)
    reward.check()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("encoder")
    tiny_base("bert").save_pretrained(place)
    word_tokenizer(encoder=True).save_pretrained(place)
    return place


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_similarity_is_the_cosine_of_pooled_states(encoder: Path, pooling: Any) -> None:
    reward = similarity(encoder, pooling=pooling)
    model, tokenizer = tiny_base("bert"), word_tokenizer(encoder=True)

    def vector(text: str) -> torch.Tensor:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        pooled: torch.Tensor = states.mean(0) if pooling == "mean" else states[0]
        return pooled

    samples = [*SAMPLES, Sample((Message("user", "no"), Message("assistant", "x"), Message("user", "the cat")), "yes")]
    asked = [s.prompt if isinstance(s.prompt, str) else "the cat" for s in samples]
    wanted = [
        float(torch.cosine_similarity(vector(question), vector(sample.completion), dim=0))
        for question, sample in zip(asked, samples, strict=True)
    ]
    assert reward(samples).total.tolist() == pytest.approx(wanted, abs=1e-5)
    same = reward([Sample("the cat", "the cat"), Sample("the cat", " "), Sample("", "the cat")])
    assert float(same.total[0]) == pytest.approx(1.0, abs=1e-6)
    assert same.valid.tolist() == [True, False, False]
    reward.check()


def test_a_decoder_is_no_encoder(folder: Path) -> None:
    with pytest.raises(ValueError, match="is a decoder"):
        similarity(folder)
