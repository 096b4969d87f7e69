"""Answers of real (tiny, random) language models: what is summed over their tokens, and what draws depend on."""

import json

import numpy as np
import pytest
import torch

from plaudit.configs.generation import SamplingConfig
from plaudit.core.kl import exact_kl
from plaudit.data.records import Message
from plaudit.evaluation.policy_answers import (
    answer_prompts,
    comparable,
    given_answers,
    measure_answers,
    read_answers,
)
from plaudit.models.causal_lm import CausalLM
from plaudit.rollout.generate import generate
from tests.models.conftest import word_tokenizer
from tests.rollout.language_models import random_prompts, tiny_hub_model, tiny_lm

PROMPTS = random_prompts((6, 3))


def other_lm(seed=1):
    return CausalLM(tiny_hub_model("llama", seed=seed), word_tokenizer(), max_length=400).eval()


@pytest.mark.parametrize("budget", [8192, 15])
@torch.no_grad()
def test_sums_equal_a_plain_forward(budget):
    model, reference, temperature = tiny_lm(), other_lm(), 0.8
    sampling = SamplingConfig(max_new_tokens=6, temperature=temperature, seed=3)
    found = generate(model, model.tokenizer, PROMPTS, samples_per_prompt=3, sampling=sampling)
    tables = measure_answers(model, found, temperature, reference, budget)
    model.train()
    alone = measure_answers(model, found, temperature, None, budget)
    assert model.training
    assert set(alone) == {"tokens", "entropy"}
    for place, ids in enumerate(found.token_ids):
        prompt = PROMPTS[found.prompt_index[place]]
        rows = torch.tensor([prompt + ids])
        own, base = (
            torch.log_softmax(each.model.eval()(input_ids=rows).logits[0, len(prompt) - 1 : -1] / temperature, -1)
            for each in (model, reference)
        )
        taken = torch.tensor(ids)[:, None]
        gap = (own.gather(1, taken) - base.gather(1, taken)).squeeze(1)
        where = divmod(place, 3)
        assert tables["tokens"][where] == len(ids)
        assert tables["kl"][where] == pytest.approx(float(gap.sum()), abs=1e-4)
        assert tables["kl_k3"][where] == pytest.approx(float((torch.exp(-gap) - 1 + gap).sum()), rel=1e-3, abs=1e-4)
        assert tables["entropy"][where] == pytest.approx(float(-(own.exp() * own).sum()), abs=1e-4)
        assert alone["entropy"][where] == pytest.approx(tables["entropy"][where], abs=1e-4)


def test_both_estimators_have_the_exact_divergence_as_their_mean():
    """With one token an answer's divergence is known from the logits: both means lie within 4 standard errors."""
    model, reference = tiny_lm(), other_lm()
    sampling = SamplingConfig(max_new_tokens=1, seed=5)
    found = generate(model, model.tokenizer, PROMPTS[:1], samples_per_prompt=600, sampling=sampling, max_rows=2000)
    tables = measure_answers(model, found, 1.0, reference)
    logits = [each.model(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1] for each in (model, reference)]
    exact = float(exact_kl(*logits))
    assert exact > 0.1
    for name in ("kl", "kl_k3"):
        values = tables[name]
        assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(values.size)
    assert tables["kl_k3"].min() >= 0


def test_the_model_itself_is_at_distance_nothing():
    model = tiny_lm()
    found = answer_prompts(
        model, ["alpha beta", "gamma"], samples=2, sampling=SamplingConfig(max_new_tokens=4), seed=0, name="a",
        reference=model,
    )  # fmt: skip
    assert found.shape == (2, 2)
    assert found.measures["kl"].tolist() == [[0.0, 0.0]] * 2
    assert found.measures["kl_k3"].tolist() == [[0.0, 0.0]] * 2


def test_draws_depend_on_seed_and_name_alone():
    model, sampling = tiny_lm(), SamplingConfig(max_new_tokens=5)
    prompts = ["alpha", "beta gamma", "delta"]

    def texts(name, seed=0, samples=2, prompts=prompts):
        found = answer_prompts(model, prompts, samples=samples, sampling=sampling, seed=seed, name=name)
        return [list(row) for row in found.completions]

    first = texts("a")
    assert texts("a") == first
    assert texts("b") != first
    assert texts("a", seed=1) != first
    assert [row[:2] for row in texts("a", samples=3)] == first
    assert texts("a", prompts=prompts[:2]) == first[:2]


def test_divergences_need_the_whole_distribution_and_the_same_tokens():
    model, reference = tiny_lm(), other_lm()
    assert comparable(model, reference, SamplingConfig())
    assert not comparable(model, reference, SamplingConfig(top_p=0.9))
    assert not comparable(model, reference, SamplingConfig(method="greedy"))
    strange = other_lm()
    strange.tokenizer = word_tokenizer()
    strange.tokenizer.add_tokens(["<other>"])
    assert not comparable(model, strange, SamplingConfig())
    found = answer_prompts(
        model, ["alpha"], samples=1, sampling=SamplingConfig(method="greedy", max_new_tokens=3), seed=0, name="a",
        reference=reference,
    )  # fmt: skip
    assert set(found.measures) == {"tokens", "entropy"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_answers_from_a_file(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": [{"role": "user", "content": "two"}], "completions": ["x", "y"], "finished": [True, False]},
        {"prompt": "one", "completion": "z", "finished": True},
        {"prompt": "elsewhere", "completions": ["w"]},
        {"prompt": "one", "completions": ["again"]},
    )
    found = read_answers(path, ["one", (Message("user", "two"),)])
    assert [list(row) for row in found.completions] == [["z", "again"], ["x", "y"]]
    assert [list(row) for row in found.finished] == [[True, None], [True, False]]
    assert np.isnan(found.unfinished()[0, 1])
    assert given_answers([["a"]]).finished == [[None]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "one", "completions": []}, r"a.jsonl:1: .*completions"),
        ({"prompt": "one", "completions": [1]}, r"a.jsonl:1: .*expected a list of texts"),
        ({"prompt": "one", "completions": ["a"], "finished": [True, True]}, r"a.jsonl:1: .*finished"),
        ({"completions": ["a"]}, r"a.jsonl:1: "),
        ({"prompt": "two", "completions": ["a"]}, r"no answer to 1 of 1 prompts, the first of which is 'one'"),
    ],
)
def test_faults_of_a_file(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_answers(write(tmp_path / "a.jsonl", row), ["one"])


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ValueError, match="no such file of completions"):
        read_answers(tmp_path / "absent.jsonl", ["one"])
    (tmp_path / "broken.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.jsonl:1"):
        read_answers(tmp_path / "broken.jsonl", ["one"])
