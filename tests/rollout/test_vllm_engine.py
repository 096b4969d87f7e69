"""The translation to vLLM and back, on a stand-in for the package: vLLM itself cannot be run here."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from plaudit.configs.generation import SamplingConfig
from plaudit.rollout.engine import InProcessEngine
from plaudit.rollout.generate import generate
from plaudit.rollout.vllm_engine import VllmEngine
from tests.rollout.language_models import random_prompts, tiny_lm


class StandIn:
    """`vllm.LLM` by Plaudit's own sampling: what it is asked for is kept."""

    def __init__(self, **options: Any) -> None:
        self.options, self.model, self.asked, self.resets = options, tiny_lm(), [], 0
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))

    def load_weights(self, weights: Any) -> None:
        InProcessEngine(self.model).load_weights(weights)

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def generate(self, requests: Any, *, sampling_params: Any, use_tqdm: bool) -> list[Any]:
        self.asked += list(zip(requests, sampling_params, strict=True))
        outputs = []
        for request, asked in zip(requests, sampling_params, strict=True):
            found = generate(
                self.model,
                self.model.tokenizer,
                [request["prompt_token_ids"]],
                samples_per_prompt=asked.n,
                sampling=SamplingConfig(
                    temperature=asked.temperature, max_new_tokens=asked.max_tokens, stop_strings=asked.stop or ()
                ),
                end_token_ids=asked.stop_token_ids,
                generator=torch.Generator().manual_seed(asked.seed),
            )
            answers = [
                SimpleNamespace(
                    index=k,
                    token_ids=ids,
                    logprobs=[
                        {token: SimpleNamespace(logprob=p)} for token, p in zip(ids, found.logprobs[k], strict=True)
                    ],
                    finish_reason="stop" if found.finished[k] else "length",
                )
                for k, ids in enumerate(found.token_ids)
            ]
            outputs.append(SimpleNamespace(outputs=answers[::-1]))
        return outputs


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> VllmEngine:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=StandIn, SamplingParams=SimpleNamespace))
    return VllmEngine("folder", tiny_lm().tokenizer, gpu_memory_utilization=0.3)


def test_answers_come_back_with_their_logprobs_in_order_and_ends(engine: VllmEngine) -> None:
    prompts, sampling = random_prompts((5, 2, 5)), SamplingConfig(max_new_tokens=9, temperature=0.7)
    found = engine.generate(prompts, samples_per_prompt=3, sampling=sampling, end_token_ids=[7, 9])
    inner: Any = engine._llm
    assert inner.options == {"model": "folder", "logprobs_mode": "processed_logprobs", "gpu_memory_utilization": 0.3}
    assert [request["prompt_token_ids"] for request, _ in inner.asked] == prompts == found.prompt_ids
    asked = inner.asked[0][1]
    assert (asked.n, asked.temperature, asked.max_tokens, asked.stop_token_ids) == (3, 0.7, 9, [7, 9])
    assert asked.ignore_eos
    assert len({each.seed for _, each in inner.asked}) == 3
    assert found.prompt_index == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.sample_index == [0, 1, 2] * 3
    assert found.logprobs == found.behaviour_logprobs
    assert any(found.finished)
    for ids, finished in zip(found.token_ids, found.finished, strict=True):
        assert finished == (ids[-1] in (7, 9))
    # By the training forward of the same model.
    model = tiny_lm()
    for row, ids in enumerate(found.token_ids):
        whole = torch.tensor([prompts[found.prompt_index[row]] + ids])
        logits = model.model(input_ids=whole).logits[0] / 0.7  # type: ignore[operator]
        own = logits.log_softmax(-1)[-len(ids) - 1 : -1].gather(1, torch.tensor(ids)[:, None]).flatten()
        torch.testing.assert_close(own, torch.tensor(found.logprobs[row]), atol=1e-4, rtol=0.0)


def test_generators_move_on_and_new_weights_are_used(engine: VllmEngine) -> None:
    prompts, generator = random_prompts((4,)), torch.Generator().manual_seed(0)
    sampling = SamplingConfig(max_new_tokens=12)
    first, second = (engine.generate(prompts, sampling=sampling, generator=generator) for _ in range(2))
    assert first.token_ids != second.token_ids
    policy = tiny_lm()
    with torch.no_grad():
        policy.model.lm_head.weight.copy_(policy.model.lm_head.weight.roll(1, 0))  # type: ignore[union-attr, operator, arg-type]
    engine.load_weights(policy.model.state_dict().items())
    third = engine.generate(prompts, sampling=sampling, generator=torch.Generator().manual_seed(0))
    assert third.token_ids != first.token_ids
    inner: Any = engine._llm
    assert inner.resets == 1


def test_what_it_cannot_do_is_said(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"method": "greedy"}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
        with pytest.raises(ValueError, match="whole distribution"):
            engine.generate(random_prompts((3,)), sampling=SamplingConfig.model_validate(options))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="pip install vllm"):
        VllmEngine("folder", engine.tokenizer)
