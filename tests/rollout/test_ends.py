"""Every id that ends an answer ends it: those of a model's `generation_config` beside the tokeniser's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from plaudit.configs.generation import SamplingConfig
from plaudit.configs.model import LoraConfig
from plaudit.data.records import Message, PromptRecord
from plaudit.models.causal_lm import CausalLM, configured_ends
from plaudit.models.lora import wrap_lora
from plaudit.models.policy import LanguagePolicy
from plaudit.rewards.base import as_reward
from plaudit.rollout.answering import answer_rows, reply
from plaudit.rollout.engine import InProcessEngine
from plaudit.rollout.generate import GenerationResult, generate
from plaudit.rollout.text_policy import TextPolicy
from plaudit.rollout.text_rollout import collect_text
from plaudit.rollout.vllm_engine import _ends
from tests.rollout.language_models import random_prompts, tiny_hub_model, tiny_lm

ENDS = [2, 8, *range(10, 28, 5)]
"""The tokenizer's end of text, then words: ids that the tokenizer does not call special."""
PROMPTS = random_prompts((7, 2, 11))


def with_ends(name: str = "llama", ends: Any = ENDS, **options: Any) -> CausalLM:
    model = tiny_lm(name, **options)
    model.model.generation_config.eos_token_id = ends  # type: ignore[union-attr]
    return model


def answers(model: CausalLM, **options: Any) -> GenerationResult:
    return generate(model, model.tokenizer, PROMPTS, **options)


def ended_by(found: GenerationResult) -> set[int]:
    """Which ids ended answers, every answer being looked at."""
    for ids, finished in zip(found.token_ids, found.finished, strict=True):
        assert finished == (ids[-1] in ENDS)
        assert not set(ids[:-1]) & set(ENDS)
    return {ids[-1] for ids, finished in zip(found.token_ids, found.finished, strict=True) if finished}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_greedy_and_beams_equal_transformers(name: str) -> None:
    model, peer = with_ends(name), tiny_hub_model(name)
    peer.generation_config.eos_token_id = ENDS
    greedy = answers(model, sampling=SamplingConfig(method="greedy", max_new_tokens=25))
    sampling = SamplingConfig(method="beam", num_beams=3, max_new_tokens=25)
    beams = answers(model, sampling=sampling, samples_per_prompt=3)
    assert beams.scores is not None
    for place, prompt in enumerate(PROMPTS):
        rows = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(rows), "do_sample": False, "max_new_tokens": 25, "pad_token_id": 3}
        wanted = peer.generate(rows, **options)[0, len(prompt) :].tolist()
        assert greedy.token_ids[place] == wanted
        assert greedy.finished[place] == (wanted[-1] in ENDS)
        best = peer.generate(
            rows, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True, **options
        )
        own = slice(3 * place, 3 * place + 3)
        for ids, theirs in zip(beams.token_ids[own], best.sequences[:, len(prompt) :].tolist(), strict=True):
            assert ids + [3] * (len(theirs) - len(ids)) == theirs
        assert beams.scores[own] == pytest.approx(best.sequences_scores.tolist(), abs=1e-4)
    assert (ended_by(greedy) | ended_by(beams)) - {2}, "no answer ended by a further id: nothing was tried"


@pytest.mark.parametrize("options", [{}, {"attn_implementation": "padded"}])
def test_samples_end_by_each_of_them_and_nothing_else_changes(options: dict[str, str]) -> None:
    sampling = SamplingConfig(max_new_tokens=30)
    found = answers(with_ends(**options), samples_per_prompt=40, sampling=sampling)
    assert ended_by(found) == set(ENDS)
    assert False in found.finished
    # The same draws as without ends, cut behind the first of them.
    endless = answers(with_ends(**options), samples_per_prompt=40, sampling=sampling, end_token_ids=())
    for ids, whole in zip(found.token_ids, endless.token_ids, strict=True):
        cut = next((place for place, token in enumerate(whole) if token in ENDS), len(whole) - 1)
        assert ids == whole[: cut + 1]


def test_an_end_token_is_no_part_of_the_text() -> None:
    model = with_ends()
    found = answers(model, samples_per_prompt=10, sampling=SamplingConfig(max_new_tokens=30))
    for ids, text, finished in zip(found.token_ids, found.text, found.finished, strict=True):
        assert text == model.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)


def test_only_answers_without_any_end_are_penalised_and_rewards_stand_at_their_last_token() -> None:
    model = with_ends()
    policy = TextPolicy(LanguagePolicy.build(model, critic="none"))
    prompts = [PromptRecord(prompt=str(number)) for number in range(len(PROMPTS))]

    def one(prompts: Sequence[str], completions: Sequence[str], finished: Sequence[bool], **_: Any) -> list[float]:
        return [1.0 + ended for ended in finished]

    found = collect_text(
        policy,
        as_reward(one),
        prompts,
        PROMPTS,
        sampling=SamplingConfig(max_new_tokens=10),
        samples_per_prompt=20,
        missing_end_penalty=0.25,
    )
    generation, trajectory = found.answers.generation, found.trajectory
    assert ended_by(generation) - {2}
    ended = torch.tensor(generation.finished)
    assert 0 < int(ended.sum()) < len(ended)
    assert found.answers.unfinished == pytest.approx(1 - ended.float().mean().item())
    assert trajectory.mask.sum(1).tolist() == [len(ids) for ids in generation.token_ids]
    last = trajectory.mask.sum(1, keepdim=True) - 1
    assert torch.equal(trajectory.rewards.gather(1, last)[:, 0], torch.where(ended, 2.0, 0.75))
    assert torch.equal(trajectory.rewards.sum(1), torch.where(ended, 2.0, 0.75))
    assert bool((trajectory.continues.gather(1, last) == 0).all())


def test_engines_rows_and_replies_know_them() -> None:
    model, sampling = with_ends(), SamplingConfig(max_new_tokens=30, seed=3)
    assert ended_by(InProcessEngine(model).generate(PROMPTS, samples_per_prompt=20, sampling=sampling)) - {2}
    rows = list(answer_rows(model, [{"prompt": "why is it so"}], samples_per_prompt=20, sampling=sampling))
    words = {model.tokenizer.decode([end]) for end in ENDS if end != 2}
    for text, finished in zip(rows[0]["completions"], rows[0]["finished"], strict=True):
        assert not set(text.split()) & words
        assert finished or len(text.split()) > 15
    said: list[str] = []
    whole = reply(model, [Message("user", "the cat")], sampling, said.append)
    assert "".join(said).strip() == whole
    assert not set(whole.split()) & words


def test_a_saved_model_keeps_them(tmp_path: Path) -> None:
    model = with_ends()
    model.save_pretrained(tmp_path / "plain")
    model.model = wrap_lora(model.model, LoraConfig(rank=2), seed=0)
    model.save_pretrained(tmp_path / "merged")
    for folder in (tmp_path / "plain", tmp_path / "merged"):
        assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == ENDS
        opened = CausalLM.from_pretrained(folder)
        assert opened.end_token_ids == ENDS
        assert _ends(folder, opened.tokenizer) == ENDS
    assert model.end_token_ids == ENDS, "adapters hide nothing"


def test_where_they_come_from() -> None:
    assert configured_ends(None) == configured_ends(GenerationConfig()) == []
    assert configured_ends(GenerationConfig(eos_token_id=7)) == [7]
    assert with_ends(ends=None).end_token_ids == [2], "the tokeniser's own"
    assert with_ends(ends=9).end_token_ids == [2, 9]
    # The default of an architecture, which the vocabulary of 64 does not have.
    assert with_ends(ends=[50256, 9, 2]).end_token_ids == [2, 9]
