"""Generation against transformers and against the training forward; ends, stop strings, batches and streams."""

import pytest
import torch

from plaudit.configs.generation import SamplingConfig
from plaudit.data.packing import pack_groups
from plaudit.models.causal_lm import CausalLM
from plaudit.models.policy import LanguagePolicy
from plaudit.rollout.generate import GenerationResult, generate, strip_padding
from tests.rollout.language_models import DECODERS, random_prompts, tiny_hub_model, tiny_lm

PROMPTS = random_prompts((7, 2, 11))


def run(model: CausalLM, prompts: list[list[int]] = PROMPTS, **options: object) -> GenerationResult:
    settings = {"end_token_ids": [2], **options}
    return generate(model, model.tokenizer, prompts, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3-window", "mistral-window"])
def test_greedy_equals_transformers(name: str) -> None:
    model = tiny_lm(name)
    found = run(model, sampling=SamplingConfig(method="greedy", max_new_tokens=20))
    peer = tiny_hub_model(name)
    for prompt, ids in zip(PROMPTS, found.token_ids, strict=True):
        rows = torch.tensor([prompt])
        wanted = peer.generate(
            rows, attention_mask=torch.ones_like(rows), do_sample=False, max_new_tokens=20, eos_token_id=2
        )[0]
        assert ids == wanted[len(prompt) :].tolist()


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_those_of_training(name: str, temperature: float) -> None:
    model = tiny_lm(name)
    sampling = SamplingConfig(max_new_tokens=12, temperature=temperature)
    found = run(model, samples_per_prompt=4, sampling=sampling)
    with torch.no_grad():
        output = LanguagePolicy(model).evaluate(pack_groups(found.groups(), causal=True), temperature)
    recorded = torch.tensor([value for row in found.logprobs for value in row])
    assert recorded.shape == output.logprobs.shape
    assert (recorded - output.logprobs).abs().max() < 1e-4
    assert len({tuple(ids) for ids in found.token_ids}) > 6


def test_filtered_draws_record_both() -> None:
    model = tiny_lm()
    sampling = SamplingConfig(max_new_tokens=12, top_k=3)
    found = run(model, samples_per_prompt=4, sampling=sampling)
    with torch.no_grad():
        output = LanguagePolicy(model).evaluate(pack_groups(found.groups(), causal=True))
    recorded = torch.tensor([value for row in found.logprobs for value in row])
    behaviour = torch.tensor([value for row in found.behaviour_logprobs for value in row])
    assert (recorded - output.logprobs).abs().max() < 1e-4
    assert bool((behaviour > recorded).all())


def test_samples_do_not_depend_on_their_company() -> None:
    model = tiny_lm()
    sampling = SamplingConfig(max_new_tokens=15, seed=5)
    together = run(model, samples_per_prompt=6, sampling=sampling)
    small = run(model, samples_per_prompt=6, sampling=sampling, max_rows=6)
    assert together.token_ids == small.token_ids
    fewer = run(model, samples_per_prompt=2, sampling=sampling)
    assert fewer.token_ids == [together.token_ids[row] for row in (0, 1, 6, 7, 12, 13)]
    other = run(model, samples_per_prompt=6, sampling=sampling.model_copy(update={"seed": 6}))
    assert other.token_ids != together.token_ids


def test_plain_rows_draw_the_same() -> None:
    sampling = SamplingConfig(max_new_tokens=12)
    found = run(tiny_lm(), samples_per_prompt=3, sampling=sampling)
    plain = run(tiny_lm(attn_implementation="padded"), samples_per_prompt=3, sampling=sampling)
    assert found.token_ids == plain.token_ids
    assert plain.finished == found.finished


def test_generators_are_followed_and_moved_on() -> None:
    model, sampling = tiny_lm(), SamplingConfig(max_new_tokens=8)
    generator = torch.Generator().manual_seed(1)
    first, second = (run(model, sampling=sampling, generator=generator) for _ in range(2))
    again = run(model, sampling=sampling, generator=torch.Generator().manual_seed(1))
    assert again.token_ids == first.token_ids != second.token_ids


def test_ends_and_limits() -> None:
    model = tiny_lm()
    found = run(model, samples_per_prompt=40, sampling=SamplingConfig(max_new_tokens=30))
    assert {True, False} == set(found.finished)
    for ids, finished, logprobs in zip(found.token_ids, found.finished, found.logprobs, strict=True):
        assert finished == (ids[-1] == 2)
        assert 2 not in ids[:-1]
        assert finished or len(ids) == 30
        assert len(logprobs) == len(ids)
    assert found.prompt_index == [prompt for prompt in range(3) for _ in range(40)]
    assert found.sample_index == list(range(40)) * 3
    endless = run(model, samples_per_prompt=3, sampling=SamplingConfig(max_new_tokens=30), end_token_ids=())
    assert not any(endless.finished)


def test_stop_strings() -> None:
    model = tiny_lm()
    sampling = SamplingConfig(max_new_tokens=30)
    free = run(model, samples_per_prompt=10, sampling=sampling, end_token_ids=())
    word = next(text.split()[3] for text in free.text if len(text.split()) > 3)
    stopped = run(
        model,
        samples_per_prompt=10,
        sampling=sampling.model_copy(update={"stop_strings": (word,)}),
        end_token_ids=(),
    )
    assert any(stopped.finished)
    for text, whole, ids, finished in zip(stopped.text, free.text, stopped.token_ids, stopped.finished, strict=True):
        assert finished == (word in whole)
        assert text == whole.split(word)[0]
        assert finished == (word in model.tokenizer.decode(ids))
        assert not finished or word not in model.tokenizer.decode(ids[:-1], skip_special_tokens=True)


def test_padding_changes_nothing() -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10], [3, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]])
    assert strip_padding(ids, mask) == [[5, 6], [7, 8, 9, 10], [3]]


def test_modes_stay() -> None:
    model = tiny_lm()
    model.train()
    model.model.model.layers[0].eval()  # type: ignore[union-attr, index]
    run(model, sampling=SamplingConfig(max_new_tokens=2))
    assert model.training
    assert not model.model.model.layers[0].training  # type: ignore[union-attr, index]
    assert model.model.model.layers[1].training  # type: ignore[union-attr, index]


def test_every_token_is_told() -> None:
    told: list[tuple[tuple[int, int], int]] = []
    found = run(
        tiny_lm(),
        samples_per_prompt=2,
        sampling=SamplingConfig(max_new_tokens=6),
        on_tokens=lambda names, tokens: told.extend(zip(names, tokens, strict=True)),
    )
    names = zip(found.prompt_index, found.sample_index, strict=True)
    for name, ids in zip(names, found.token_ids, strict=True):
        assert [token for who, token in told if who == name] == ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[3], []]}, "at least one token"),
        ({"samples_per_prompt": 0}, "at least 1"),
        ({"sampling": SamplingConfig(max_new_tokens=395)}, "do not fit"),
        ({"end_token_ids": [64]}, "vocabulary"),
        ({"sampling": SamplingConfig(method="beam", num_beams=2), "samples_per_prompt": 3}, "num_beams"),
    ],
)
def test_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_lm(), **options)  # type: ignore[arg-type]
