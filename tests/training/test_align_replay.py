"""ACER in the alignment run: what its steps weigh, what it needs room for, adapters, and what it refuses."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from plaudit.algorithms.acer import targets_and_weights
from plaudit.algorithms.acer_text import AcerText
from plaudit.models.goals import GoalHeads, ManagerOutputs
from plaudit.rollout.text_action_values import TextActionValues
from plaudit.training import align, align_estimate
from plaudit.training.align_estimate import AlignEstimate, replay_bytes
from plaudit.training.align_job import AlignJob
from plaudit.training.trackers import read_metrics
from tests.training.conftest import SIZES, save_tokenizer
from tests.training.test_align import HELD_OUT, PROMPTS, count_good, run, settings


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny tokenizer of the training tests."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def acer(**options: Any) -> dict[str, Any]:
    return {"algorithm": {"name": "acer", "replay_ratio": 1.0, "buffer_size": 24} | options}


def parts(job: AlignJob) -> tuple[AcerText, TextActionValues]:
    assert isinstance(job.algorithm, AcerText)
    assert isinstance(job.algorithm.policy, TextActionValues)
    return job.algorithm, job.algorithm.policy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_remembered_answer_pays_the_penalty_of_the_policy_as_it_is_now(
    temperature: float, tokenizer_path: str, tmp_path: Path
) -> None:
    """One token an answer, `Q = b`: the sampled one weighs `ρ (r - β log π/π_ref - (b - β KL(π‖π_ref)))`."""
    beta = 0.3
    options = acer(kl_coefficient=beta, truncation=None, trust_region=None)
    sampling = {"max_new_tokens": 1, "temperature": temperature}
    config = settings(tokenizer_path, tmp_path, sampling=sampling, missing_end_penalty=0.0, **options)
    job, _, _ = align.prepare(config, PROMPTS, HELD_OUT, None, count_good)
    job.collect(0)
    algorithm, learner = parts(job)
    remembered = algorithm.replay.sample(7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in learner.language_model.parameters():
            parameter.mul_(1.5)
    tables = learner.tables(remembered)
    targets, weights, ratios = targets_and_weights(
        tables, remembered, algorithm.config, next_values=None, kl_coefficient=beta
    )
    assert tables.reference_logprobs is not None
    assert (tables.logprobs - tables.reference_logprobs).abs().max() > 0.01
    actions, rewards = remembered.actions[:, :1], remembered.rewards[:, 0]
    torch.testing.assert_close(targets, rewards)
    own, reference = tables.logprobs.detach(), tables.reference_logprobs
    # What the policy was when it answered is the reference: nothing had been learned yet.
    torch.testing.assert_close(ratios, (own - reference).gather(1, actions)[:, 0].exp())
    divergence = (own.exp() * (own - reference)).sum(1)
    begun = learner.critic.head.bias.detach()
    everything = algorithm.replay.state_dict()["columns"]["rewards"]
    torch.testing.assert_close(begun, everything.mean().expand_as(begun))
    values = begun[0] - beta * divergence
    wanted = ratios * (rewards - beta * (own - reference).gather(1, actions)[:, 0] - values)
    torch.testing.assert_close(weights.gather(1, actions)[:, 0], wanted)
    assert weights.count_nonzero() == 7  # without a bound nothing is made up for


def test_whole_distributions_are_kept_in_the_vocabulary_s_order_and_parts_with_their_tokens(
    tokenizer_path: str, tmp_path: Path
) -> None:
    for kept, named in ((None, False), (1000, False), (3, True)):
        config = settings(tokenizer_path, tmp_path, **acer(behaviour_tokens=kept))
        job, _, _ = align.prepare(config, PROMPTS, HELD_OUT, None, count_good)
        job.collect(0)
        columns = parts(job)[0].replay.state_dict()["columns"]
        assert ("behaviour_actions" in columns) is named
        found = [columns[name] for name in ("behaviour_logits", "behaviour_actions") if name in columns]
        answers, steps = columns["mask"].shape
        expected = replay_bytes(config, job.policy.language_model.head[0].shape[0]) / (24 * 5) * answers * steps
        assert sum(column.numel() * column.element_size() for column in found) == expected


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_adapters_learn_from_remembered_answers(critic: str, tokenizer_path: str, tmp_path: Path) -> None:
    model = {"model_type": "llama", "backbone_config": SIZES, "tokenizer": tokenizer_path, "template": "raw"}
    config = settings(tokenizer_path, tmp_path, model=model | {"lora": {"rank": 2}}, critic=critic, **acer())
    job, _, _ = align.prepare(config, PROMPTS, HELD_OUT, None, count_good)
    _, learner = parts(job)
    names = list(learner.average_state())
    assert names
    assert all("lora" in name for name in names)
    result = run(config)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "replay/answers" in line]
    assert [line["replay/answers"] for line in lines] == [12, 24, 24]
    # The average policy starts at the policy, which moves away from it.
    assert 0 < 10 * lines[0]["policy/average_kl"] < lines[-1]["policy/average_kl"]
    assert math.isfinite(result.metrics["objective/kl"])


def test_gradient_checkpointing_recomputes_the_critic_too(tokenizer_path: str, tmp_path: Path) -> None:
    calls, gradients = {}, {}
    for checkpointing in (False, True):
        config = settings(tokenizer_path, tmp_path, gradient_checkpointing=checkpointing, **acer())
        job, _, _ = align.prepare(config, PROMPTS, HELD_OUT, None, count_good)
        job.collect(0)
        algorithm, learner = parts(job)
        critic: Any = learner.critic.backbone
        counted: list[int] = []
        critic.layers[0].mlp.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        with torch.no_grad():
            learner.critic.head.weight.fill_(0.1)
        found = learner.tables(algorithm.replay.sample(4, generator=torch.Generator().manual_seed(0)))
        found.action_values.square().sum().backward()  # type: ignore[no-untyped-call]
        calls[checkpointing] = len(counted)
        gradients[checkpointing] = critic.layers[0].mlp.up_proj.weight.grad
    assert calls == {False: 1, True: 2}
    torch.testing.assert_close(gradients[True], gradients[False])
    assert gradients[True].abs().max() > 0


def test_the_estimate_counts_what_is_remembered(
    tokenizer_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    routes = {"acer": acer(), "alone": acer(trust_region=None), "a2c": {"algorithm": {"name": "a2c"}}}
    for name, options in routes.items():
        config = settings(tokenizer_path, tmp_path, **options)
        estimate = align.main(config, dry_run=True, prompts=PROMPTS, reward=count_good)
        assert isinstance(estimate, AlignEstimate)
        found[name] = estimate
    vocabulary = 20
    assert found["acer"].replay_bytes == 24 * 5 * 4 * vocabulary
    assert found["a2c"].replay_bytes == 0
    # The average policy is a copy of the language model, without gradients.
    job, _, _ = align.prepare(config, PROMPTS, HELD_OUT, None, count_good)
    own = sum(each.numel() for each in job.policy.language_model.parameters())
    assert found["acer"].state_bytes - found["alone"].state_bytes == 4 * own
    assert capsys.readouterr().out.count("for remembered answers") == 2


def test_a_dry_run_counts_the_manager_s_passes(
    tokenizer_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view of all answers before the steps of the worker, and a step of the manager's own behind each of them."""
    passes: list[bool] = []
    unroll = GoalHeads.unroll

    def counted(heads: GoalHeads, states: torch.Tensor) -> ManagerOutputs:
        passes.append(torch.is_grad_enabled())
        return unroll(heads, states)

    monkeypatch.setattr(GoalHeads, "unroll", counted)
    options = {"algorithm": {"name": "feudal", "horizon": 2}}
    align.main(settings(tokenizer_path, tmp_path, **options), dry_run=True, prompts=PROMPTS, reward=count_good)
    # What the answers were sampled by, what they are paid by, the worker's loss; and the manager's, with gradients.
    assert passes == [False, False, False, True]


def test_a_memory_that_does_not_fit_is_refused_before_anything_is_sampled(
    tokenizer_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(align_estimate, "total_memory", lambda: 24 * 5 * 4 * 20 - 1)
    with pytest.raises(
        ValueError, match=r"algorithm\.buffer_size: 24 remembered answers.*over 20 tokens need 0\.0 MiB"
    ):
        run(settings(tokenizer_path, tmp_path, **acer()))
    run(settings(tokenizer_path, tmp_path, iterations=1, **acer(behaviour_tokens=2)))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (acer(buffer_size=11), r"algorithm\.buffer_size: 11 answers are remembered, but an iteration has 12"),
        (acer() | {"critic_start": "reward"}, "critic_start: reward: the critic of acer has a value for every token"),
        (
            acer() | {"sampling": {"top_k": 4}, "allow_filtered_sampling": True},
            r"sampling\.top_k: acer remembers whole distributions",
        ),
        (
            acer() | {"refresh_reward": {"every": 1, "budget": 4, "data": ["x"]}},
            "refresh_reward: acer learns again from answers whose rewards the old reward model gave",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_read(
    options: dict[str, Any], problem: str, tokenizer_path: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=problem):
        settings(tokenizer_path, tmp_path, **options)


def test_what_is_put_through_the_network_before_the_steps_has_the_precision_of_the_run(
    tokenizer_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the distributions that are remembered are not those that the answers were drawn from."""
    seen: list[bool] = []
    plain = TextActionValues.logprobs

    def watched(self: TextActionValues, trajectory: Any) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return plain(self, trajectory)

    monkeypatch.setattr(TextActionValues, "logprobs", watched)
    job, _, _ = align.prepare(
        settings(tokenizer_path, tmp_path, precision="bf16", **acer()), PROMPTS, HELD_OUT, None, count_good
    )
    job.collect(0)
    assert seen
    assert all(seen)
