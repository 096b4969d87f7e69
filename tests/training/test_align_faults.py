"""Alignment runs: what a review found wrong, each held by a test."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plaudit.algorithms.base import Prepared
from plaudit.configs.rewards import RewardsConfig
from plaudit.data.records import PromptRecord
from plaudit.models.checkpointing import checkpoint_in_evaluation
from plaudit.rewards.base import as_reward
from plaudit.rewards.build import build_reward
from plaudit.rewards.model import ModelReward
from plaudit.rewards.normalise import Running, normalised
from plaudit.rollout.text_policy import TextPolicy
from plaudit.rollout.text_rollout import collect_text
from plaudit.rollout.trajectory import Evaluation, Trajectory
from plaudit.training import align
from plaudit.training.align_job import AlignJob
from plaudit.training.align_journal import PHASES
from plaudit.training.trackers import read_metrics
from tests.training.conftest import save_tokenizer
from tests.training.test_align import HELD_OUT, PROMPTS, count_good, run, settings


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny tokenizer of the training tests."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def job_of(tokenizer: str, output: Path, **options: Any) -> AlignJob:
    """The parts of a run."""
    return align.prepare(settings(tokenizer, output, **options), PROMPTS, HELD_OUT, None, count_good)[0]


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(
    critic: str, tokenizer_path: str, tmp_path: Path
) -> None:
    """Dropout is off while aligning: modules are in evaluation mode, where transformers recomputes nothing."""
    found: dict[bool, tuple[int, list[torch.Tensor]]] = {}
    for checkpointing in (False, True):
        job = job_of(tokenizer_path, tmp_path, gradient_checkpointing=checkpointing, critic=critic)
        backbones = [job.policy.language_model.base]
        assert job.policy.critic is not None
        backbones += [job.policy.critic.backbone] if job.policy.critic.backbone is not None else []
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        iteration = job.collect(0)
        for backbone in backbones:
            for layer in backbone.layers:  # type: ignore[union-attr]
                layer.mlp.register_forward_pre_hook(count)
        torch.manual_seed(0)
        job.text_policy.prompts = iteration.prompt_ids
        evaluation = job.text_policy.evaluate(iteration.prepared.trajectory)
        (evaluation.logprobs.sum() + evaluation.values.square().sum()).backward()  # type: ignore[no-untyped-call]
        found[checkpointing] = calls, [each.grad for each in job.policy.parameters() if each.grad is not None]
        assert not any(isinstance(part, nn.Dropout) and part.training for part in job.policy.modules())
    assert found[True][0] == 2 * found[False][0]
    assert len(found[True][1]) == len(found[False][1]) > 0
    for ours, theirs in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradient_checkpointing_refuses_layers_that_drop_out_or_cannot_recompute(
    tokenizer_path: str, tmp_path: Path
) -> None:
    job = job_of(tokenizer_path, tmp_path)
    model = job.policy.language_model.model
    with pytest.raises(ValueError, match="cannot recompute"):
        checkpoint_in_evaluation(model)
    job.policy.language_model.gradient_checkpointing_enable()
    layer: Any = job.policy.language_model.base.layers[0]  # type: ignore[index]
    layer.dropout = 0.1
    with pytest.raises(ValueError, match=r"drops out \(dropout\)"):
        checkpoint_in_evaluation(model)


def test_a_signal_stops_before_the_next_answers_are_sampled(
    tokenizer_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes in the last step of the first iteration; sampling and scoring of the second could take minutes."""
    collected = 0
    collect, take_step = AlignJob.collect, AlignJob.take_step

    def counted(job: AlignJob, iteration: int) -> Any:
        nonlocal collected
        collected += 1
        return collect(job, iteration)

    def struck(job: AlignJob, iteration: Any) -> bool:
        if iteration.done == len(iteration.plan) - 1:
            signal.raise_signal(signal.SIGTERM)
        return take_step(job, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(AlignJob, "collect", counted)
        patch.setattr(AlignJob, "take_step", struck)
        stopped = run(settings(tokenizer_path, tmp_path / "part"))
    assert stopped.stopped_by == "SIGTERM"
    assert (stopped.steps, collected) == (1, 1)
    resumed = run(settings(tokenizer_path, tmp_path / "part", resume=True))
    whole = run(settings(tokenizer_path, tmp_path / "whole"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_first_evaluation_is_on_the_scale_of_the_later_ones(tokenizer_path: str, tmp_path: Path) -> None:
    """A running scale knows nothing before the first answers; the policy has not moved when it is evaluated first."""
    scale = Running(shift=False)
    config = settings(tokenizer_path, tmp_path, iterations=1, optimizer={"learning_rate": 1e-9}, evaluation_samples=16)

    def tenfold(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [10.0 * value for value in count_good(prompts, completions)]

    run(config, normalised(tenfold, scale))
    first, last = (line for line in read_metrics(tmp_path / "metrics.jsonl") if "eval/reward/mean" in line)
    assert (first["step"], last["step"]) == (0, 1)
    assert scale.std > 2
    assert first["eval/reward/mean"] == pytest.approx(last["eval/reward/mean"])
    assert first["eval/reward/mean"] == pytest.approx(first["eval/reward/tenfold"] / scale.std)
    assert first["eval/objective/kl"] == pytest.approx(0.0, abs=1e-5)


def test_prompts_that_are_cut_keep_their_bos_token(
    tokenizer_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"model_type": "llama", "tokenizer": tokenizer_path, "template": "raw"}
    config = settings(tokenizer_path, tmp_path)
    model = config.model.model_dump() | options | {"max_length": 12, "too_long": "truncate_prompt"}
    long = [PromptRecord(prompt="the cat sat on a mat and the dog ran on the mat"), PROMPTS[0]]
    job, _, _ = align.prepare(
        settings(tokenizer_path, tmp_path, model=model, prompts_per_iteration=2), long, None, None, count_good
    )
    tokeniser = job.policy.language_model.text_tokeniser(template="raw")
    whole = tokeniser.prompt(long[0].prompt)
    room = 12 - 5
    cut = job.prompt_ids[0]
    bos = job.policy.language_model.tokenizer.bos_token_id
    assert len(whole) > room == len(cut)
    head = [whole[0]] if whole[0] == bos else []
    assert cut == head + whole[len(whole) - room + len(head) :]
    assert "1 of 2 prompts lost tokens on the left" in capsys.readouterr().err
    assert tokeniser.cut_prompt([bos, 5, 6, 7], 3) == [bos, 6, 7]
    assert tokeniser.cut_prompt([5, 6, 7], 2) == [6, 7]
    with pytest.raises(ValueError, match="room for 1 tokens"):
        tokeniser.cut_prompt([bos, 5, 6], 1)


def test_repeated_prompts_are_said(tokenizer_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": each.prompt}) + "\n" for each in PROMPTS * 2))
    config = settings(tokenizer_path, tmp_path / "run", data=[str(path)], quiet=False)
    align.prepare(config, reward=count_good)
    assert "prompts: 10 read, 10 used, 0 refused; 5 different ones" in capsys.readouterr().err


def test_times_of_an_iteration_that_was_broken_off_are_those_of_all_its_parts(
    tokenizer_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = AlignJob.take_step

    def struck(job: AlignJob, iteration: Any) -> bool:
        if iteration.done == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(job, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(AlignJob, "take_step", struck)
        run(settings(tokenizer_path, tmp_path))
    run(settings(tokenizer_path, tmp_path, resume=True))
    for line in (line for line in read_metrics(tmp_path / "metrics.jsonl") if "time/share_update" in line):
        shares = [line[f"time/share_{name}"] for name in PHASES]
        assert all(0 < share < 1 for share in shares)
        assert 0.5 < sum(shares) <= 1


def test_a_run_is_not_resumed_with_a_reward_of_another_kind(tokenizer_path: str, tmp_path: Path) -> None:
    run(settings(tokenizer_path, tmp_path, iterations=1), normalised(count_good, Running()))
    with pytest.raises(ValueError, match="reward of the saved run and that of this one differ"):
        run(settings(tokenizer_path, tmp_path, iterations=2, resume=True), count_good)


def test_everything_of_an_iteration_goes_to_the_device_of_the_policy(
    tokenizer_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an accelerator only the places are seen that move it: before it is evaluated, and out of a checkpoint."""
    job = job_of(tokenizer_path, tmp_path)
    job.pending = job.collect(0)
    state = job.state_dict()
    moved = state["pending"] | {"prepared": Prepared.from_state(state["pending"]["prepared"]).to("meta").state()}
    assert {each.device.type for each in moved["prepared"]["trajectory"].values()} == {"meta"}
    assert moved["prepared"]["advantages"].device.type == moved["prepared"]["returns"].device.type == "meta"
    job.device = torch.device("meta")
    job.load_state_dict(state)
    assert job.pending.prepared.trajectory.mask.device.type == "meta"
    assert job.pending.prepared.advantages.device.type == "meta"
    evaluate_all = TextPolicy.evaluate_all
    seen: list[Any] = []

    def moved_to(trajectory: Trajectory, device: Any) -> Trajectory:
        seen.append(device)
        return trajectory

    def evaluated(policy: TextPolicy, trajectory: Trajectory) -> Evaluation:
        seen.append("evaluated")
        return evaluate_all(policy, trajectory)

    monkeypatch.setattr(Trajectory, "to", moved_to)
    monkeypatch.setattr(TextPolicy, "evaluate_all", evaluated)
    collect_text(
        job.text_policy,
        job.reward,
        PROMPTS[:1],
        job.prompt_ids[:1],
        sampling=job.config.sampling,
        samples_per_prompt=2,
    )
    assert seen == [torch.device("cpu"), "evaluated"]


def test_configured_reward_models_run_where_the_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []

    def opened(folder: str, **options: Any) -> Any:
        found.append(options["device"])
        return as_reward(count_good)

    monkeypatch.setattr(ModelReward, "from_pretrained", opened)
    parts: dict[str, Any] = {
        "here": {"reward": "a-model"},
        "there": {"reward": "a-model", "options": {"device": "cpu"}},
    }
    config = RewardsConfig.model_validate({"parts": parts | {"rule": {"reward": "length_penalty=0.1"}}})
    build_reward(config, device="cuda:1")
    build_reward(config)
    assert found == ["cuda:1", "cpu", None, "cpu"]
