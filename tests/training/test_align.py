"""The alignment run: it reaches the exact optimum, resumes bitwise, warns, stops, and leaves a model behind."""

import json
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from plaudit.cli.app import main
from plaudit.configs.align import AlignConfig, GuardsConfig
from plaudit.data.records import PromptRecord
from plaudit.models.causal_lm import CausalLM
from plaudit.models.policy import LanguagePolicy
from plaudit.models.reward_model import RewardModel
from plaudit.rewards.model import weights_hash
from plaudit.rewards.normalise import Running, normalised
from plaudit.rollout.engine import InProcessEngine
from plaudit.rollout.generate import generate
from plaudit.training import align
from plaudit.training.align_guards import Guards
from plaudit.training.align_job import AlignJob
from plaudit.training.checkpoints import list_checkpoints
from plaudit.training.folder import claimed
from plaudit.training.results import TrainingResult
from plaudit.training.trackers import read_metrics
from tests.training.conftest import SIZES, save_tokenizer, tiny_model

PROMPTS = [PromptRecord(prompt=text) for text in ("why is it", "the cat", "the dog ran", "so good", "is it a mat")]
HELD_OUT = [PromptRecord(prompt=text) for text in ("why the dog", "yes")]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny tokenizer of the training tests."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def count_good(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """+1 for every `good`, −1 for every `bad`."""
    return [float(text.split().count("good") - text.split().count("bad")) for text in completions]


def settings(tokenizer: str, output: Path, **options: Any) -> AlignConfig:
    """A run of a few seconds."""
    values: dict[str, Any] = {
        "model": {"model_type": "llama", "backbone_config": SIZES, "tokenizer": tokenizer, "template": "raw"},
        "output": output,
        "prompts_per_iteration": 4,
        "samples_per_prompt": 3,
        "iterations": 3,
        "sampling": {"max_new_tokens": 5},
        "optimizer": {"learning_rate": 3e-3},
        "algorithm": {"name": "ppo", "epochs": 2, "minibatches": 2},
        "save_every": 1,
        "quiet": True,
    }
    return AlignConfig.model_validate(values | options)


def run(config: AlignConfig, reward: Any = count_good, **options: Any) -> TrainingResult:
    """The job on the tiny prompts."""
    found = align.main(config, prompts=PROMPTS, held_out=HELD_OUT, reward=reward, **options)
    assert isinstance(found, TrainingResult)
    return found


def run_without_held_out(config: AlignConfig) -> TrainingResult:
    """The job with nothing to evaluate on."""
    found = align.main(config, prompts=PROMPTS, reward=count_good)
    assert isinstance(found, TrainingResult)
    return found


def weights(result: TrainingResult) -> dict[str, Tensor]:
    """Of the saved model."""
    assert result.model_folder is not None
    return dict(AutoModelForCausalLM.from_pretrained(result.model_folder).state_dict())


def logged(result: TrainingResult) -> list[dict[str, Any]]:
    """Metrics without clock readings, and samples."""
    lines = read_metrics(result.output / "metrics.jsonl") + read_metrics(result.output / "samples.jsonl")
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


class Killed(Exception):
    """What a test raises where a process would die."""


ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {"algorithm": {"name": "ppo", "epochs": 2, "minibatches": 2, "kl_target": 0.5, "kl_adaptation": 0.5}},
    "reinforce": {"algorithm": {"name": "reinforce", "baseline": "running_mean"}},
    "remax": {"algorithm": {"name": "reinforce", "baseline": "greedy"}, "final_temperature": 0.5},
    "grpo": {"algorithm": {"name": "grpo", "epochs": 2, "minibatches": 2}},
    "shared critic": {"critic": "shared", "algorithm": {"name": "a2c"}},
    "critic first": {"algorithm": {"name": "ppo", "epochs": 2, "minibatches": 2, "critic_warmup": 2}},
    "lora": {"lora": True, "algorithm": {"name": "rloo"}},
    "acer": {"algorithm": {"name": "acer", "replay_ratio": 1.5, "buffer_size": 16, "behaviour_tokens": 8}},
    "feudal": {"algorithm": {"name": "feudal", "horizon": 2, "surrogate": "clip", "epochs": 2, "minibatches": 2}},
    "styles": {
        "algorithm": {"name": "option_critic", "baseline": "value", "num_options": 2, "sentence_ends": ["good"]}
    },
}


TERMINATED, DIED = "terminated in the middle of an iteration", "killed after a checkpoint"
COLLECTED = "terminated behind the answers, before the first step"


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        *((name, TERMINATED) for name in ALGORITHMS),
        ("ppo", DIED),
        ("lora", DIED),
        *((name, COLLECTED) for name in ("reinforce", "shared critic", "lora", "styles")),
        pytest.param("dqn", TERMINATED, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(
    name: str, moment: str, tokenizer_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(ALGORITHMS.get(name) or {"algorithm": {"name": name, "minibatches": 2}})
    model = {"model_type": "llama", "backbone_config": SIZES, "tokenizer": tokenizer_path, "template": "raw"}
    if options.pop("lora", False):
        model["lora"] = {"rank": 2}
    options["model"] = model

    def scale() -> Any:
        return normalised(count_good, Running())

    whole = run(settings(tokenizer_path, tmp_path / "whole", **options), scale())
    taken, strike = 0, (2 if len(options["algorithm"]) == 1 or "baseline" in options["algorithm"] else 6)
    original = AlignJob.take_step

    def interrupted(job: AlignJob, iteration: Any) -> bool:
        nonlocal taken
        taken += 1
        if taken == strike:
            if moment == DIED:
                raise Killed
            signal.raise_signal(signal.SIGTERM)
        return original(job, iteration)

    collect = AlignJob.collect

    def collected(job: AlignJob, iteration: int) -> Any:
        found = collect(job, iteration)
        if iteration == 1:
            signal.raise_signal(signal.SIGTERM)
        return found

    part = settings(tokenizer_path, tmp_path / "part", **options)
    with monkeypatch.context() as patch:
        patched = {"collect": collected} if moment == COLLECTED else {"take_step": interrupted}
        patch.setattr(AlignJob, *next(iter(patched.items())))
        if moment == DIED:
            with pytest.raises(Killed):
                run(part, scale())
        else:
            stopped = run(part, scale())
            assert stopped.stopped_by == "SIGTERM"
            assert stopped.exit_code == 128 + signal.SIGTERM
            assert stopped.model_folder is None
    resumed = run(settings(tokenizer_path, tmp_path / "part", resume=True, **options), scale())
    assert resumed.stopped_by == whole.stopped_by == "iterations"
    ours, theirs = weights(resumed), weights(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert logged(resumed) == logged(whole)
    assert resumed.metrics == whole.metrics


def test_a_run_that_ran_out_of_memory_goes_on_in_smaller_pieces(
    tokenizer_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of an iteration: the same answers, and weights that differ by rounding alone."""
    options = ALGORITHMS["grpo"]
    whole = run(settings(tokenizer_path, tmp_path / "whole", **options))
    taken, original = 0, AlignJob.take_step

    def interrupted(job: AlignJob, iteration: Any) -> bool:
        nonlocal taken
        taken += 1
        if taken == 6:
            signal.raise_signal(signal.SIGTERM)
        return original(job, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(AlignJob, "take_step", interrupted)
        run(settings(tokenizer_path, tmp_path / "part", **options))
    budgets = []

    def watched(job: AlignJob, iteration: Any) -> bool:
        budgets.append((job.text_policy.token_budget, job.text_policy.max_rows))
        return original(job, iteration)

    monkeypatch.setattr(AlignJob, "take_step", watched)
    smaller = {"tokens_per_micro_batch": 16, "max_rows": 2, "gradient_checkpointing": True}
    capsys.readouterr()
    resumed = run(settings(tokenizer_path, tmp_path / "part", resume=True, **smaller, **options))
    assert "gradient_checkpointing, max_rows, tokens_per_micro_batch: the run goes on in" in capsys.readouterr().err
    assert set(budgets) == {(16, 2)}
    samples = [read_metrics(each.output / "samples.jsonl") for each in (whole, resumed)]
    assert [row["completion"] for row in samples[0]] == [row["completion"] for row in samples[1]]
    ours, theirs = weights(resumed), weights(whole)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=1e-4, rtol=1e-3)


def test_an_engine_samples_with_the_weights_of_every_iteration(tokenizer_path: str, tmp_path: Path) -> None:
    config = settings(tokenizer_path, tmp_path / "own")
    own = run_without_held_out(config)
    engine = InProcessEngine(CausalLM.from_backbone(config.model))
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.zero_()  # so that nothing comes of it but what it is handed
    through = config.model_copy(update={"output": tmp_path / "through"})
    other = align.main(through, prompts=PROMPTS, reward=count_good, engine=engine)
    assert isinstance(other, TrainingResult)
    ours, theirs = weights(other), weights(own)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert logged(other) == logged(own)
    adapted = settings(tokenizer_path, tmp_path / "adapted", model=config.model.model_dump() | {"lora": {"rank": 2}})
    with pytest.raises(ValueError, match="whole weights"):
        align.main(adapted, prompts=PROMPTS, reward=count_good, engine=engine)


@pytest.mark.parametrize(
    ("algorithm", "passes"), [({"name": "rloo"}, 1), ({"name": "a2c"}, 1), ({"name": "ppo", "epochs": 2}, 3)]
)
def test_a_batch_that_one_step_takes_goes_through_the_policy_once(
    algorithm: dict[str, Any], passes: int, tokenizer_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    evaluate = LanguagePolicy.evaluate

    def counted(policy: LanguagePolicy, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return evaluate(policy, *arguments)

    monkeypatch.setattr(LanguagePolicy, "evaluate", counted)
    once = run_without_held_out(settings(tokenizer_path, tmp_path / "once", algorithm=algorithm))
    assert calls == 3 * passes  # iterations times passes
    monkeypatch.setattr(AlignJob, "takes_one_step", False)
    anew = run_without_held_out(settings(tokenizer_path, tmp_path / "anew", algorithm=algorithm))
    ours, theirs = weights(once), weights(anew)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert logged(once) == logged(anew)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"name": "rloo"}, id="rloo"),
        pytest.param({"name": "dqn", "target_lambda": 1.0}, id="dqn", marks=pytest.mark.slow),
    ],
)
def test_the_run_reaches_the_exact_optimum_of_a_text_problem(
    options: dict[str, Any], tokenizer_path: str, tmp_path: Path
) -> None:
    """Answers of at most two tokens can all be listed: π* ∝ π_ref exp(r/β), J* = β log Σ_y π_ref(y) exp(r(y)/β)."""
    coefficient = 0.5
    config = settings(
        tokenizer_path,
        tmp_path,
        sampling={"max_new_tokens": 2},
        missing_end_penalty=0.0,
        prompts_per_iteration=2,
        samples_per_prompt=64,
        iterations=60,
        algorithm=options | {"kl_coefficient": coefficient},
        optimizer={"learning_rate": 2e-2, "schedule": "linear", "max_gradient_norm": None},
        save_every=None,
        evaluate_every=None,
    )
    prompts = PROMPTS[:2]
    found = align.main(config, prompts=prompts, reward=count_good)
    assert isinstance(found, TrainingResult)
    start = CausalLM.from_backbone(config.model).eval()
    for record in prompts:
        reference, policy = answer_logprobs(start, record), answer_logprobs(found.model, record)
        rewards = torch.tensor(count_good([], [text for text, _ in policy]), dtype=torch.float64)
        before, after = (
            torch.tensor([value for _, value in each], dtype=torch.float64) for each in (reference, policy)
        )
        assert float(after.exp().sum()) == pytest.approx(1.0, abs=1e-5)
        best = coefficient * float(torch.logsumexp(before + rewards / coefficient, 0))
        reached = float((after.exp() * (rewards - coefficient * (after - before))).sum())
        at_first = float((before.exp() * rewards).sum())
        assert best - reached <= 0.02 * (best - at_first), (best, reached, at_first)


def answer_logprobs(model: CausalLM, record: PromptRecord) -> list[tuple[str, float]]:
    """Every answer of at most two tokens, as text with its log-probability, from plain forwards."""
    tokenizer, hub = model.tokenizer, cast(Any, model.model)
    end = model.text_tokeniser().end_token_id
    prompt = model.text_tokeniser().prompt(record.prompt)

    def following(ids: list[int]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = hub(input_ids=torch.tensor([ids])).logits[0, -1]
        return logits.double().log_softmax(-1)

    found: list[tuple[str, float]] = []
    first = following(prompt)
    for token in range(len(first)):
        if token == end:
            found.append(("", float(first[token])))
            continue
        second = following([*prompt, token])
        for other in range(len(second)):
            text = tokenizer.decode([token, other], skip_special_tokens=True)
            found.append((text, float(first[token] + second[other])))
    return found


def test_it_leaves_a_model_that_transformers_opens_metrics_and_samples(tokenizer_path: str, tmp_path: Path) -> None:
    result = run(settings(tokenizer_path, tmp_path))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    trained = [line for line in lines if "objective/kl" in line]
    evaluated = [line for line in lines if "eval/objective/kl" in line]
    assert [line["step"] for line in trained] == [1, 2, 3]
    assert [line["step"] for line in evaluated] == [0, 3]
    assert evaluated[0]["eval/objective/kl"] == pytest.approx(0.0, abs=1e-5)
    for name in ("policy/clip_fraction", "policy/approximate_kl", "value/loss", "reward/mean", "time/share_update"):
        assert math.isfinite(trained[0][name]), name
    assert trained[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    rows = read_metrics(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4
    assert {"prompt", "completion", "reward", "parts", "finished"} <= rows[0].keys()
    opened = CausalLM.from_pretrained(tmp_path / "model")
    for ours, theirs in zip(result.model.parameters(), opened.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 3


def test_policies_on_the_way_are_kept_and_answers_may_be_sampled_few_at_a_time(
    tokenizer_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        together.append(options["max_rows"])
        return generate(*arguments, **options)

    monkeypatch.setattr("plaudit.rollout.answering.generate", watched)
    seen: list[dict[str, Tensor]] = []
    for name, options in (("few", {"max_rows": 5, "keep_model_every": 2}), ("many", {})):
        output = tmp_path / name
        run(
            settings(tokenizer_path, output, **options),
            on_iteration=lambda _, model: seen.append({k: v.clone() for k, v in model.model.state_dict().items()}),
        )
    assert [folder.name for folder in (tmp_path / "few" / "models").iterdir()] == ["00002"]
    assert not (tmp_path / "many" / "models").exists()
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "few" / "models" / "00002").state_dict()
    assert all(torch.equal(kept[key], seen[1][key]) for key in kept)
    assert set(together) == {5, 256}
    few, many = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("few", "many"))
    assert few[0]["eval/reward/mean"] == pytest.approx(many[0]["eval/reward/mean"])
    assert few[1]["reward/mean"] == pytest.approx(many[1]["reward/mean"])
    run(settings(tokenizer_path, tmp_path / "few", overwrite=True, iterations=1))
    assert not (tmp_path / "few" / "models").exists()


def test_with_a_dominating_penalty_the_policy_stays_and_without_one_it_goes(
    tokenizer_path: str, tmp_path: Path
) -> None:
    reached = {}
    for coefficient in (0.0, 20.0):
        algorithm = {"name": "rloo", "kl_coefficient": coefficient}
        config = settings(
            tokenizer_path,
            tmp_path / str(coefficient),
            algorithm=algorithm,
            iterations=8,
            optimizer={"learning_rate": 2e-2},
            samples_per_prompt=8,
            evaluation_samples=64,
            save_every=None,
        )
        reached[coefficient] = run(config).metrics["objective/kl"]
    assert reached[0.0] > 0.2
    assert abs(reached[20.0]) < reached[0.0] / 5


def test_prompts_are_passed_over_in_orders_of_their_own(tokenizer_path: str, tmp_path: Path) -> None:
    job, _, _ = align.prepare(settings(tokenizer_path, tmp_path), PROMPTS, HELD_OUT, None, count_good)
    seen = [index for iteration in range(5) for index in job.chosen_prompts(iteration)]
    passes = [seen[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(each) == [0, 1, 2, 3, 4] for each in passes)
    assert len({tuple(each) for each in passes}) > 1
    assert seen == [index for iteration in range(5) for index in job.chosen_prompts(iteration)]


def test_the_reward_model_stays_frozen_and_may_start_the_critic(tokenizer_path: str, tmp_path: Path) -> None:
    reward_model = RewardModel.from_backbone(tiny_model(tokenizer_path))
    before = weights_hash(reward_model)
    config = settings(tokenizer_path, tmp_path, critic_start="reward")
    job, _, _ = align.prepare(config, PROMPTS, [], None, reward_model)
    assert job.policy.critic is not None
    assert job.policy.critic.backbone is not None
    ours = dict(job.policy.critic.backbone.named_parameters())
    theirs = dict(reward_model.backbone.named_parameters())
    shared = ours.keys() & theirs.keys()
    assert shared
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)
    run(config, reward_model)
    assert weights_hash(reward_model) == before
    assert not any(parameter.requires_grad for parameter in reward_model.parameters())

    def moved(*_: Any) -> None:
        next(reward_model.parameters()).data.add_(1)

    with pytest.raises(RuntimeError, match="changed"):  # before a checkpoint is written of such a run
        run(config.model_copy(update={"overwrite": True}), reward_model, on_iteration=moved)


def test_a_limit_on_the_divergence_of_an_update_ends_its_passes(
    tokenizer_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, take_step = [], AlignJob.take_step

    def watched(job: AlignJob, iteration: Any) -> bool:
        taken.append(take_step(job, iteration))
        return taken[-1]

    monkeypatch.setattr(AlignJob, "take_step", watched)
    algorithm = {"name": "ppo", "epochs": 3, "minibatches": 1, "target_kl": 1e-12}
    run_without_held_out(settings(tokenizer_path, tmp_path, iterations=1, algorithm=algorithm))
    assert taken == [True, False]  # of three: before the first step nothing has diverged


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_the_policy_stays_while_its_critic_learns_alone(critic: str, tokenizer_path: str, tmp_path: Path) -> None:
    config = settings(tokenizer_path, tmp_path, critic=critic, algorithm={"name": "ppo", "critic_warmup": 2})
    model = CausalLM.from_backbone(config.model)
    hashes = [weights_hash(model)]
    result = run(config, model=model, on_iteration=lambda _, each: hashes.append(weights_hash(each)))
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]
    values = [line["value/mean"] for line in read_metrics(result.output / "metrics.jsonl") if "value/mean" in line]
    assert values[0] != values[1] != 0


def test_a_guard_stops_the_run_and_says_why(
    tokenizer_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(
        tokenizer_path,
        tmp_path,
        guards={"kl_limit": 0.04, "stop_kl": 0.05},
        save_every=None,
        iterations=30,
        optimizer={"learning_rate": 3e-2},
        algorithm={"name": "rloo", "kl_coefficient": 0.0},
    )
    result = run(config)
    assert result.stopped_by == "guard"
    assert 0 < result.steps < 30
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [result.steps]
    assert result.model_folder is not None
    assert result.exit_code == 0
    said = capsys.readouterr().err
    assert "past guards.stop_kl 0.05" in said
    assert said.count("(guards.kl_limit 0.04)") == 1


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"objective/kl": 51.0}, "51.0 nats from the reference"),
        ({"objective/entropy": 0.1}, "entropy fell from 2 to 0.1"),
        ({"policy/ratio_max": 11.0}, "11 times as likely"),
        ({"policy/ratio_min": 0.01}, "100 times as likely"),
        ({"objective/length": 41.0}, "grew from 20 to 41"),
        ({"objective/unfinished": 0.6}, "60 % of answers reach"),
        ({"objective/equal_groups": 0.95}, "95 % of prompts"),
    ],
)
def test_each_guard_speaks_once_when_its_limit_is_passed(metrics: dict[str, float], said: str) -> None:
    fine = {
        "objective/kl": 1.0,
        "objective/entropy": 2.0,
        "objective/length": 20.0,
        "objective/unfinished": 0.1,
        "objective/equal_groups": 0.1,
        "policy/ratio_min": 0.8,
        "policy/ratio_max": 1.2,
    }
    guards = Guards(GuardsConfig())
    assert guards.look(fine) == []
    found = guards.look(fine | metrics)
    assert len(found) == 1
    assert said in found[0]
    assert guards.look(fine | metrics) == []
    assert guards.look(fine) == []
    copied = Guards(GuardsConfig())
    copied.load_state_dict(guards.state_dict())
    assert len(copied.look(fine | metrics)) == 1


WITHIN_PROMPTS = {"parts": {"a": {"reward": "length_penalty", "normalise": "group"}}}
REMAX = {"name": "reinforce", "baseline": "greedy"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reward": "length_penalty=0.1", "rewards": {"parts": {"a": {"reward": "x"}}}}, "not both"),
        ({"sampling": {"method": "greedy"}}, "learning needs samples"),
        ({"sampling": {"top_p": 0.9}}, "not be samples of the policy"),
        ({"model": {"backbone": "a", "dropout": 0.1}}, "dropout is off while a policy is aligned"),
        ({"model": {"backbone": "a", "lora": {"dropout": 0.1}}}, "dropout is off while a policy is aligned"),
        ({"sampling": {"length_penalty": 2.0}}, "length_penalty and early_stopping are for method 'beam'"),
        ({"sampling": {"seed": 3}}, "sampling.seed: 3: all draws of a run follow from seed"),
        ({"algorithm": {"name": "rloo"}, "samples_per_prompt": 1}, "samples_per_prompt must be"),
        ({"algorithm": {"name": "rloo"}, "critic": "shared"}, "no learned value"),
        ({"critic": "shared", "critic_start": "reward"}, "for critic: separate"),
        ({"algorithm": {"name": "ppo", "critic_warmup": 3}}, "critic_warmup: 3 of 3 iterations: the policy would"),
        ({"algorithm": {"name": "feudal", "critic_warmup": 1}}, "critic_warmup: 1 would not hold the policy still"),
        ({"algorithm": {"name": "ppo", "minibatches": 8}}, "at least as many prompts"),
        ({"rewards": WITHIN_PROMPTS, "samples_per_prompt": 1}, "samples_per_prompt: 1: with normalise: group"),
        ({"rewards": WITHIN_PROMPTS, "data": ("a",), "held_out": ("b",)}, "evaluation_samples: 1: with normalise"),
        (
            {"rewards": {"parts": {"a": {"reward": "x"}}, "normalise": "rank"}, "algorithm": REMAX},
            "there is one greedy answer",
        ),
    ],
)
def test_combinations_without_a_meaning_are_refused(
    options: dict[str, Any], said: str, tokenizer_path: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        settings(tokenizer_path, tmp_path, **options)


def test_a_penalty_that_holds_nothing_is_said(
    tokenizer_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (options, said) in enumerate(
        [
            ({"kl_estimator": "k3"}, True),
            ({"kl_estimator": "k2", "kl_coefficient": 0}, False),
            ({"kl_estimator": "k3", "kl_placement": "loss"}, False),
            ({}, False),
        ]
    ):
        config = settings(tokenizer_path, tmp_path / str(number), algorithm={"name": "rloo", **options}, iterations=1)
        align.prepare(config, PROMPTS, reward=count_good)
        assert ("does not hold the policy near its reference" in capsys.readouterr().err) == said


def test_faults_of_the_user_are_told(tokenizer_path: str, tmp_path: Path) -> None:
    config = settings(tokenizer_path, tmp_path)
    with pytest.raises(ValueError, match="no reward is configured"):
        run(config, None)
    with pytest.raises(ValueError, match="handed over"):
        run(settings(tokenizer_path, tmp_path, reward="length_penalty=0.1"), count_good)
    with pytest.raises(ValueError, match="needs a reward model among the rewards"):
        run(settings(tokenizer_path, tmp_path, critic_start="reward"), count_good)
    with pytest.raises(ValueError, match="leaves room for sampling"):
        run(settings(tokenizer_path, tmp_path, sampling={"max_new_tokens": 126}), count_good)

    def broken(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [math.nan] * len(completions)

    with pytest.raises(ValueError, match="reward 'broken' is nan"):
        run(config, broken)
    assert not (tmp_path / "model").exists()


def test_two_runs_never_write_into_one_folder(tokenizer_path: str, tmp_path: Path) -> None:
    with claimed(tmp_path), pytest.raises(ValueError, match="another run is writing to"):
        run(settings(tokenizer_path, tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_command_reads_prompts_from_files_and_says_what_it_would_need(
    tokenizer_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = CausalLM.from_backbone(settings(tokenizer_path, tmp_path).model)
    start.save_pretrained(tmp_path / "start")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": each.prompt, "answer": 1}) + "\n" for each in PROMPTS * 2))
    words = [
        *("align", "--model.backbone", str(tmp_path / "start"), "--model.template", "raw", "--data", str(prompts)),
        *("--reward", "length_penalty=0.1", "--iterations", "2", "--prompts-per-iteration", "2"),
        *("--sampling.max-new-tokens", "4", "--output", str(tmp_path / "run")),
    ]
    main([*words, "--dry-run"])
    shown = capsys.readouterr().out
    assert "prompts          5\n" in shown
    assert "answers          16 in the whole run" in shown
    assert not (tmp_path / "run").exists()
    main(words)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["reward/invalid"] == 0.0
