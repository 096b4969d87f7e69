"""The study of alignment: arms that the configuration takes, tables by hand, and a report of made-up runs."""

import fcntl
import json

import alignment
import alignment_report
import alignment_text
import pytest
from pydantic import TypeAdapter

from plaudit.configs.acer import AcerTextConfig
from plaudit.configs.agents import AlignAlgorithm
from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.data.records import Comparison, Ranking


def test_every_arm_is_a_configuration_with_as_many_answers_and_steps():
    for name, arm in alignment.ARMS.items():
        options = {"kl_coefficient": 0.1} | dict(arm.algorithm)
        found = TypeAdapter(AlignAlgorithm).validate_python(options)
        if isinstance(found, AcerTextConfig):
            assert found.passes == 4  # one on the policy, three on what it remembers
            continue
        config = found.resolved() if isinstance(found, AlgorithmConfig) else found
        iterations = arm.options.get("iterations", alignment.ITERATIONS)
        prompts = arm.options.get("prompts_per_iteration", alignment.PROMPTS)
        assert iterations * prompts == alignment.ITERATIONS * alignment.PROMPTS
        assert iterations * config.epochs * config.minibatches == 4 * alignment.ITERATIONS, name
        assert arm.reward in alignment.REWARD_MODELS


def test_runs_come_in_the_order_in_which_they_were_asked_for():
    named = [name for name, _, _ in alignment.jobs(["rloo", "ppo", "rloo"], [0], [1e-3])]
    assert named == ["rloo", "ppo"]
    both = list(alignment.jobs(["grpo", "ablations"], [0, 1], [1e-3]))
    assert [name for name, _, _ in both[:2]] == ["best-of-n", "grpo"]
    assert {name for name, _, _ in both} == {"best-of-n", "grpo", "no-kl", "no-whitening", "no-critic"}
    assert {(seed, rate) for name, seed, rate in both if name == "grpo"} == {(0, 1e-3), (1, 1e-3)}


def test_a_folder_is_made_by_one_at_a_time_and_a_file_is_whole(tmp_path):
    folder = tmp_path / "worlds" / "3"
    lock = folder.with_name("3.lock")
    with alignment.alone(folder), lock.open("w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    alignment.write_json(folder / "a.json", {"b": 1})
    assert [file.name for file in folder.iterdir()] == ["a.json"]


def test_fewer_completions_keep_the_order():
    record = Comparison(prompt="p", completions=("a", "b", "c", "d"), judgement=Ranking(((2,), (0, 3), (1,))))
    assert alignment.fewer(record, 3).judgement == Ranking(((2,), (0,), (1,)))
    assert alignment.fewer(record, 2).completions == ("a", "b")
    assert alignment.accuracy([record], [[1.0, 3.0, 2.0, 1.0]]) == pytest.approx(2 / 5)


def run(path, end, **more):
    return {"path": [{"kl": kl, "gold": gold} for kl, gold in path], "end": {"kl": end[0], "gold": end[1]}, **more}


def test_gold_at_a_divergence_by_hand():
    one = run([(0.5, 0.0)] * 4 + [(1.5, 1.0)] * 4, (1.4, 1.2))
    assert alignment_report.path_of(one) == [(0.5, 0.0), (1.5, 1.0), (1.4, 1.2)]
    assert alignment_report.gold_at(one, 1.0, start=-1.0) == pytest.approx(0.5)
    assert alignment_report.gold_at(one, 0.25, start=-1.0) == pytest.approx(-0.5)
    assert alignment_report.gold_at(one, 2.0, start=-1.0) is None
    mean, half = alignment_report.interval([1.0, 2.0, 3.0])
    assert (mean, half) == pytest.approx((2.0, 4.302653 / 3**0.5), rel=1e-5)


def test_the_report_of_made_up_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(alignment_report, "PAGES", tmp_path)
    monkeypatch.setattr(alignment_report, "IMAGES", tmp_path)
    best = [{"n": n, "kl": kl, "gold": gold} for n, kl, gold in ((1, 0.0, -1.0), (2, 0.19, -0.5), (4, 0.64, 0.0))]
    for seed in (0, 1):
        found = {"best-of-n": {"path": best, "end": best[-1], "rate": 0.0}}
        for place, name in enumerate(("ppo", "ppo-loo", "no-kl", "reward-mean", "reward-sum")):
            way = [(0.2 * step, -1 + 0.1 * place * step) for step in range(12)]
            one = run(way, (2.0, -0.5 + 0.1 * place + 0.02 * seed), accuracy=0.6 + 0.01 * place, seconds=9.0)
            found[name] = {**one, "rate": alignment.RATE}
        for name, one in found.items():
            file = tmp_path / "results" / name / f"{seed}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"name": name, "seed": seed, **one}))
    alignment_report.write_report(tmp_path)
    shown = capsys.readouterr().out
    assert "| PPO, critic | 2 | +0.51 ± 0.13 | 2.00 ± 0.00 | -0.10 ± 0.00 | +0.00 ± 0.00 | 2 | 9 |" in shown
    assert "Spearman" in shown
    described = json.loads((tmp_path / "alignment.json").read_text())
    assert described["accuracy_foretells"]["gain"] == pytest.approx({"rho": 1.0, "p": 0.0, "n": 3})
    assert described["accuracy_foretells"]["gain_of_single_runs"]["n"] == 6
    page = tmp_path / "alignment.md"
    page.write_text("before\n<!-- table: second -->\nold\n<!-- end of table -->\nafter\n")
    alignment_report.write_second(tmp_path)
    second = page.read_text()
    assert second.startswith("before\n<!-- table: second -->\n\n|  | seeds | gain in gold at the end |")
    assert second.endswith("\n\n<!-- end of table -->\nafter\n")
    assert second.count("\n| ") == 1 + 6
    assert "without KL" in second
    assert (tmp_path / "alignment-algorithms.png").stat().st_size > 5_000


def test_sums_on_the_way_are_checked():
    assert alignment_text.value_of("(2+3)*4") == 20
    assert alignment_text.value_of("1,200/5") == 240
    assert alignment_text.value_of("2+") is alignment_text.value_of("__import__('os')") is None
    shares = alignment_text.arithmetic(["q"] * 3, ["<<48/2=24>> <<1+1=3>>", "no sums", "<<.5*10=5>>"])
    assert shares == [0.5, 0.0, 1.0]
