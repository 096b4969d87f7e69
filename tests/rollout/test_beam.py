"""Beam search gives the answers of transformers, token by token and score by score."""

import itertools

import pytest
import torch

from plaudit.configs.generation import SamplingConfig
from plaudit.rollout.generate import generate
from tests.rollout.language_models import random_prompts, tiny_hub_model, tiny_lm

SETTINGS = list(itertools.product((2, 5), (False, True, "never"), (1.0, 0.0, -1.0, 2.0)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2-window-softcap"])
def test_equals_transformers(name: str) -> None:
    ours, peer = tiny_lm(name), tiny_hub_model(name)
    prompts = random_prompts((5, 3))
    settings = SETTINGS[::3] if name == "llama" else SETTINGS[4::11]
    # A quarter of the vocabulary, so that answers end at different places.
    ends = list(range(2, 64, 4))
    lengths = set()
    for beams, early_stopping, length_penalty in settings:
        sampling = SamplingConfig(
            method="beam",
            num_beams=beams,
            early_stopping=early_stopping,
            length_penalty=length_penalty,
            max_new_tokens=12,
        )
        found = generate(ours, ours.tokenizer, prompts, samples_per_prompt=beams, sampling=sampling, end_token_ids=ends)
        for place, prompt in enumerate(prompts):
            wanted = peer.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                num_beams=beams,
                num_return_sequences=beams,
                early_stopping=early_stopping,
                length_penalty=length_penalty,
                max_new_tokens=12,
                eos_token_id=ends,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
            )
            rows = slice(place * beams, (place + 1) * beams)
            for ids, theirs in zip(found.token_ids[rows], wanted.sequences[:, len(prompt) :].tolist(), strict=True):
                # transformers takes a pad id of 0 for none, and fills with the first end token.
                assert ids + [2] * (len(theirs) - len(ids)) == theirs
                lengths.add(len(ids))
            assert found.scores is not None
            assert found.scores[rows] == pytest.approx(wanted.sequences_scores.tolist(), abs=1e-4)
    assert len(lengths) > 1, "answers of one length only: the end was not tried"


def test_scores_are_sums_of_logprobs_over_length() -> None:
    model = tiny_lm()
    sampling = SamplingConfig(method="beam", num_beams=4, length_penalty=0.5, max_new_tokens=8)
    found = generate(model, model.tokenizer, random_prompts((6,)), samples_per_prompt=4, sampling=sampling)
    assert found.scores is not None
    for logprobs, score in zip(found.logprobs, found.scores, strict=True):
        assert sum(logprobs) / len(logprobs) ** 0.5 == pytest.approx(score, abs=1e-4)
    assert found.scores == sorted(found.scores, reverse=True)


def test_wide_enough_it_is_exhaustive() -> None:
    model = tiny_lm()
    sampling = SamplingConfig(method="beam", num_beams=64, length_penalty=0.0, max_new_tokens=2)
    prompt = random_prompts((3,))[0]
    best = generate(model, model.tokenizer, [prompt], sampling=sampling, end_token_ids=()).token_ids[0]
    with torch.no_grad():
        first = model.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        rows = torch.tensor([[*prompt, token] for token in range(64)])
        total = first[:, None] + model.model(rows).logits[:, -1].log_softmax(-1)
    assert best == [int(total.argmax()) // 64, int(total.argmax()) % 64]
