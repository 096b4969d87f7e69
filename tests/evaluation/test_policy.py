"""The whole job: in memory with models, texts and callables; against enumeration on the test-bed; its faults."""

import json
import math

import numpy as np
import pytest
import torch

from plaudit.configs.evaluate_policy import EvaluatePolicyConfig
from plaudit.data.records import PromptRecord
from plaudit.evaluation.policy import evaluate_policy
from plaudit.evaluation.policy_answers import Answers
from plaudit.evaluation.policy_compare import BEST_OF_N, CompareOptions, Scored, compare_policies
from plaudit.evaluation.policy_sections import verdict
from plaudit.rollout.token_mdp import TokenMDP
from tests.evaluation.test_policy_answers import other_lm, write
from tests.rollout.language_models import tiny_lm

PROMPTS = ["alpha", "beta", "gamma delta", "epsilon", "alpha beta", "gamma"]
SHORT = {"max_new_tokens": 5}


def config(tmp_path, **settings):
    quick = {"samples": 2, "best_of": 4, "resamples": 50, "sampling": SHORT, "output": tmp_path / "out"}
    return EvaluatePolicyConfig.model_validate({**quick, **settings})


def gold(prompts, completions, **_):
    """The number of different letters; nothing to say about what was asked of `gamma`."""
    return [
        None if prompt == "gamma" else float(len(set(text))) for prompt, text in zip(prompts, completions, strict=True)
    ]


@pytest.fixture
def no_page(monkeypatch):
    """Spares the drawing of a page where the numbers are what is tested."""
    monkeypatch.setattr("plaudit.evaluation.policy.write_policy_report", lambda report, folder: folder)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    start, policies = tiny_lm(), {"other": other_lm(), "texts": [["one answer here", ""]] * 6}
    policies |= {"run/1": other_lm(2), "run/2": other_lm(3), "run/3": other_lm(4)}
    rewards = {"gold": gold, "brief": "length_penalty=0.1"}
    settings = config(folder)
    report = evaluate_policy(settings, policies=policies, reference=start, rewards=rewards, prompts=PROMPTS)
    return report, settings, (start, policies, rewards)


def test_the_report(job):
    report, _, _ = job
    assert list(report.policies) == ["other", "texts", "run/1", "run/2", "run/3"]
    assert report.comparison.proxy == "brief"
    assert report.comparison.gold == report.comparison.judge == "gold"
    other, texts = report.policies["other"], report.policies["texts"]
    assert other.metrics["kl"].value > 0
    assert other.metrics["kl"].count == 12
    assert "kl" not in texts.metrics
    assert texts.metrics["empty"].value == 0.5
    assert texts.metrics["words"].value == 1.5
    assert texts.metrics["reward/gold"].value == pytest.approx(len(set("one answer here")) / 2)
    assert texts.metrics["invalid/gold"].value == pytest.approx(1 / 6)
    assert texts.metrics["reward/gold"].count == 10
    assert report.start.metrics["kl"].value == 0.0
    assert report.start.metrics["reward/gold"].count == 20
    assert report.start.differences == {}
    gap = texts.metrics["reward/brief"].value - report.start.metrics["reward/brief"].value
    assert texts.differences["reward/brief"].value == pytest.approx(gap)
    assert "gold has nothing to say about 2 answers of texts (gold gave no value)." in report.notes
    assert any("Only 6 independent prompts" in note for note in report.notes)
    points = {(point.run, point.label) for point in report.comparison.points}
    assert points >= {(BEST_OF_N, "n = 1"), (BEST_OF_N, "n = 4"), ("other", "other"), ("run", "run/3")}
    assert ("run", "gold") in report.comparison.fits
    assert report.comparison.fits["run", "gold"].points == 3


def test_the_files(job):
    report, settings, _ = job
    page = (settings.output / "report.html").read_text("utf-8")
    for words in ("In short", "Before and after", "Was the proxy over-optimised?", "Every number", "one answer here"):
        assert words in page
    for fetched in ('src="http', "url(http", "<script", "<link"):
        assert fetched not in page
    saved = json.loads((settings.output / "report.json").read_text("utf-8"))
    assert saved["models"]["other"]["metrics"]["kl"]["value"] == report.policies["other"].metrics["kl"].value
    assert saved["gold"] == "gold"
    assert len(saved["examples"]) == 5  # of six prompts one has no gold
    for name in ("win_rate", "frontier", "best_of_n", "reward_distribution", "lengths"):
        table = (settings.output / "plots" / f"{name}.csv").read_text("utf-8").splitlines()
        assert len(table) > 1
        assert (settings.output / "plots" / f"{name}.svg").exists()
    for name in ("metrics", "differences", "fits", "examples"):
        assert (settings.output / f"{name}.csv").read_text("utf-8").count("\n") > 1
    line = json.loads((settings.output / "answers" / "texts.jsonl").read_text("utf-8").splitlines()[5])
    assert line["prompt"] == "gamma"
    assert line["rewards"]["gold"] == [None, None]


def test_examples_go_from_the_most_improved_to_the_most_worsened(job):
    report, _, _ = job
    gains = [example.rewards["gold"][1] - example.rewards["gold"][0] for example in report.examples]
    assert gains == sorted(gains, reverse=True)
    assert report.examples[0].models == ("start", *report.policies)


def test_the_same_again_from_the_written_answers(job, tmp_path, no_page):
    """Deterministic given the seed, whatever else is measured; and the files say what the models said."""
    report, settings, (start, policies, rewards) = job
    again = evaluate_policy(
        config(tmp_path), policies={"other": policies["other"]}, reference=start, rewards=rewards, prompts=PROMPTS
    )
    assert again.policies["other"].metrics == report.policies["other"].metrics
    answers = settings.output / "answers"
    read = evaluate_policy(
        config(tmp_path, policies=[f"other={answers}/other.jsonl"], reference=f"{answers}/start.jsonl"),
        rewards=rewards,
        prompts=PROMPTS,
    )
    for name in ("win_rate/gold", "reward/brief", "words", "self_bleu", "unfinished", "win_rate_same_length/brief"):
        assert read.policies["other"].metrics[name] == report.policies["other"].metrics[name], name
    assert read.comparison.points[1].gains == report.comparison.points[1].gains
    assert "kl" not in read.policies["other"].metrics


def answers_of(strings):
    return Answers([[" ".join(map(str, y)) for y in row] for row in strings], [[True] * len(row) for row in strings])


def test_known_answers_on_the_test_bed():
    """Strings drawn from the reference and from the exact optimum: win rate, gain, divergence and best of n lie within
    4 standard errors of what enumeration says."""
    mdp = TokenMDP(vocabulary=4, max_length=3, seed=2)
    reference = mdp.string_logprobs(mdp.reference_logprobs)[0]
    optimum = mdp.tilted_string_logprobs()[0]
    rewards = mdp.string_rewards[0].numpy()
    generator = torch.Generator().manual_seed(0)
    scored = {}
    for name, logprobs, samples in (("start", reference, 8), ("tilt", optimum, 4)):
        drawn = torch.multinomial(logprobs.exp().expand(600, -1), samples, replacement=True, generator=generator)
        kl = (logprobs - reference)[drawn].numpy()
        answers = answers_of([[mdp.strings[i] for i in row] for row in drawn.tolist()])
        measures = {"kl": kl, "kl_k3": np.exp(-kl) - 1 + kl, "tokens": np.ones_like(kl), "entropy": np.ones_like(kl)}
        scored[name] = Scored(Answers(answers.completions, answers.finished, measures), {"r": rewards[drawn.numpy()]})
    prompts = [PromptRecord(prompt=str(place)) for place in range(600)]
    options = CompareOptions(samples=4, best_of=8, resamples=400)
    found = compare_policies(scored["start"], {"tilt": scored["tilt"]}, prompts, proxy="r", options=options)
    p, q = reference.exp().numpy(), optimum.exp().numpy()
    higher = (rewards[:, None] > rewards[None, :]) + 0.5 * (rewards[:, None] == rewards[None, :])
    tilt = found.policies[0]
    wanted = {
        "win_rate/r": q @ higher @ p,
        "reward/r": q @ rewards,
        "kl": float((optimum.exp() * (optimum - reference)).sum()),
        "kl_k3": float((optimum.exp() * (optimum - reference)).sum()),
    }
    for name, value in wanted.items():
        assert abs(tilt.metrics[name].value - value) < 4 * np.std(tilt.draws[name]), name
    gain = tilt.differences["reward/r"]
    assert abs(gain.value - (q - p) @ rewards) < 4 * np.std(tilt.draws["difference/reward/r"])
    for point in (each for each in found.points if each.run == BEST_OF_N):
        n = int(point.label.rpartition(" ")[2])
        exact = float(mdp.best_of_n(n)[0].numpy() @ rewards)
        error = point.values["r"].high - point.values["r"].low
        assert abs(point.values["r"].value - exact) < error
        assert point.kl.value == pytest.approx(math.log(n) - (n - 1) / n)
    assert found.points[-1].distance == pytest.approx(math.sqrt(tilt.metrics["kl"].value))
    assert found.fits[BEST_OF_N, "r"].alpha.low > 0
    assert verdict(tilt, found).endswith(": it is better.")
    back = compare_policies(scored["tilt"], {"start": scored["start"]}, prompts, proxy="r", options=options)
    assert verdict(back.policies[0], back).endswith(": it is worse.")
    same = compare_policies(scored["tilt"], {"same": scored["tilt"]}, prompts, proxy="r", options=options)
    assert same.policies[0].metrics["win_rate/r"].value == 0.5
    assert "not told apart" in verdict(same.policies[0], same)


def test_nothing_valid_and_no_reward_at_all(tmp_path):
    texts = {"p": [["a", "b"]] * 6}
    nothing = evaluate_policy(
        config(tmp_path), policies=texts, reference=[["c"]] * 6, prompts=PROMPTS,
        rewards={"gold": lambda completions: [None] * len(completions)},
    )  # fmt: skip
    assert math.isnan(nothing.policies["p"].metrics["win_rate/gold"].value)
    assert "there is no verdict" in (tmp_path / "out" / "report.html").read_text("utf-8")
    silent = evaluate_policy(config(tmp_path), policies=texts, reference=[["c"]] * 6, prompts=PROMPTS)
    assert silent.comparison.judge is None
    assert "no reward was given" in (tmp_path / "out" / "report.html").read_text("utf-8")
    assert silent.policies["p"].metrics["words"].value == 1.0


def test_a_reward_that_is_not_finite_stops_the_job(tmp_path):
    with pytest.raises(ValueError, match=r"reward 'gold' is nan(.|\n)*completion: 'a'"):
        evaluate_policy(
            config(tmp_path), policies={"p": [["a"]]}, reference=[["a"]], prompts=["x"],
            rewards={"gold": lambda completions: [math.nan] * len(completions)},
        )  # fmt: skip


def test_columns_reach_the_rewards_and_prompts_are_read_once(tmp_path, no_page):
    data = write(
        tmp_path / "prompts.jsonl",
        *({"prompt": f"p{i % 3}", "answer": str(i % 3), "id": str(i)} for i in range(5)),
    )
    report = evaluate_policy(
        config(tmp_path, data=[str(data)], limit=2, rewards=["right=exact_match"]),
        policies={"p": [["0"], ["0"]]},
        reference=[["1"], ["1"]],
    )
    assert report.policies["p"].metrics["win_rate/right"].value == 0.5
    assert report.data["rows used"] == 5
    assert report.data["different prompts"] == 3
    assert report.data["prompts answered"] == 2


def test_prompts_without_room_are_left_out_and_counted(tmp_path, no_page):
    report = evaluate_policy(
        config(tmp_path, best_of=0, samples=1), policies={"p": other_lm()}, reference=tiny_lm(),
        prompts=["alpha", "beta " * 500],
    )  # fmt: skip
    assert report.data["prompts answered"] == 1
    assert "1 prompts are too long for the model and were left out." in report.notes
    assert report.comparison.points[0].run == "p"


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {}, "name a policy"),
        ({"policies": ["a=x"]}, {}, "give --reference"),
        ({}, {"policies": {"start": [["a"]]}, "reference": [["a"]]}, "two policies are called 'start'"),
        ({"policies": ["a=x"]}, {"policies": {"a": [["a"]]}, "reference": [["a"]]}, "two policies are called 'a'"),
        ({"policies": ["a=absent.jsonl"], "reference": "m"}, {}, "absent.jsonl: no such file of completions"),
        ({"gold": "g"}, {"policies": {"a": [["a"]]}, "reference": [["a"]]}, "no reward is called 'g'"),
        ({}, {"policies": {"a/b": [["a"]], "a?b": [["a"]]}, "reference": [["a"]]}, "written to one file"),
        ({}, {"policies": {"a": [["a"]] * 3}, "reference": [["a"]]}, "a has answers to 3 prompts, but 1"),
        ({}, {"policies": {"a": [["a"]]}, "reference": [["a"]], "prompts": []}, "give --data with held-out prompts"),
        ({"sampling": {"max_new_tokens": 400}}, {"policies": {"a": [["a"]]}, "reference": None}, "give --reference"),
    ],
)  # fmt: skip
def test_faults_are_told_before_the_work(settings, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate_policy(config(tmp_path, **settings), **{"prompts": ["x"], **arguments})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policies": ["runs/a/model", "other/a/model"]}, "two are called 'a'"),
        ({"policies": ["start=x"]}, "is the name of the starting model"),
        ({"rewards": ["length_penalty"]}, "has no name; write name=REWARD, for example proxy=length_penalty"),
        ({"rewards": ["a=x", "a=y"]}, "rewards: two are called 'a'"),
        ({"sums": {"s": {"parts": {"a": {"reward": "mtld", "normalise": "group"}}}}}, "normalised by 'group'"),
    ],
)  # fmt: skip
def test_meaningless_configurations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluatePolicyConfig.model_validate(settings)


def test_a_dry_run_reads_and_stops(tmp_path, capsys):
    settings = config(tmp_path, policies=["a=absent/model"], reference="absent/start", rewards=["r=mtld"], best_of=16)
    assert evaluate_policy(settings, dry_run=True, prompts=PROMPTS) is None
    said = capsys.readouterr().out
    assert "6 prompts: 96 answers of the starting model, 12 of each of 1 policies (a)" in said
    assert not (tmp_path / "out").exists()
