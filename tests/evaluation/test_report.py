"""The report: what it writes, that JSON is strict, that texts cannot break the page, and every plot has its numbers."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from plaudit.data.records import Best, Comparison
from plaudit.evaluation.evaluate import EvaluationOptions, compare, evaluate_models
from plaudit.evaluation.intervals import Estimate
from plaudit.evaluation.plots import (
    breakdown_plot,
    forest_plot,
    length_plot,
    reliability_plot,
    reward_plot,
)
from plaudit.evaluation.probes import Probe, run_probes
from plaudit.evaluation.report import RewardReport, report_dictionary, write_report
from plaudit.evaluation.report_sections import cell, interval, number, verdict
from plaudit.evaluation.rewardbench import rewardbench_1

OPTIONS = EvaluationOptions(resamples=100)


@pytest.fixture(scope="module")
def report(simulated):
    comparisons, rewards = simulated(60)
    flat = [[0.0] * len(row) for row in rewards]
    found = evaluate_models(comparisons, {"good": rewards, "bad": [[-v for v in r] for r in rewards], "length": flat},
                            options=OPTIONS)  # fmt: skip
    probes = run_probes(comparisons, lambda p, t: [[float(len(x)) for x in row] for row in t],
                        probes=[Probe("flattery", "suffix", "!")], resamples=100)  # fmt: skip
    pairs = [Comparison(prompt="q", completions=("a", "b"), judgement=Best(0), subset="hep-go")]
    return RewardReport(
        title="<b>Title</b>",
        models=found[:2],
        floors=found[2:],
        differences=compare(found),
        probes={"good": probes, "bad": probes},
        rewardbench={"good": rewardbench_1(pairs, [[1.0, 0.0]]), "bad": rewardbench_1(pairs, [[0.0, 1.0]])},
        data={"data": "somewhere"},
        notes=["A note."],
    )


def test_everything_is_written(report, tmp_path):
    path = write_report(report, tmp_path / "new" / "folder")
    html = path.read_text("utf-8")
    assert "<b>Title</b>" not in html
    assert "&lt;b&gt;Title" in html
    for title in ("In short", "Differences", "Does it mean what it says?", "Shortcuts", "RewardBench 1", "Most confid"):
        assert title in html
    assert 'src="http' not in html
    assert "@import" not in html
    folder = path.parent
    names = {"metrics", "breakdowns", "best_of_k", "differences", "probes", "examples"}
    assert {file.stem for file in folder.glob("*.csv")} == names
    rows = list(csv.DictReader((folder / "metrics.csv").open(encoding="utf-8")))
    accuracy = next(row for row in rows if row["model"] == "good" and row["metric"] == "accuracy")
    assert float(accuracy["value"]) == report.models[0].metrics["accuracy"].value
    assert {row["kind"] for row in rows} == {"model", "floor"}
    titles = re.findall("<h2>(.*?)</h2>", html)
    assert len(titles) == len(set(titles)) >= 10
    drawn = list((folder / "plots").glob("*.svg"))
    assert len(drawn) == html.count("<svg") == len(list((folder / "plots").glob("*.csv"))) == 10
    for svg in drawn:
        assert svg.with_suffix(".csv").stat().st_size > 20, svg


def test_json_is_strict_and_complete(report):
    worst = report.models[1]
    assert worst.metrics["temperature"].value == float("inf")
    text = json.dumps(report_dictionary(report), allow_nan=False)
    found = json.loads(text)
    assert found["models"]["bad"]["metrics"]["temperature"]["value"] == "inf"
    assert found["models"]["good"]["metrics"]["accuracy"]["count"] == report.models[0].metrics["accuracy"].count
    assert {row["second"] for row in found["differences"]} == {"bad", "length"}
    assert found["rewardbench"]["good"]["subsets"]["hep-go"] == {"score": 1.0, "prompts": 1}


def test_hostile_texts_stay_text(tmp_path):
    hostile = "</section><script>alert(1)</script>"
    comparisons = [
        Comparison(
            prompt=hostile + str(i), completions=(hostile, "fine"), judgement=Best(0), annotator=hostile + "ab"[i % 2]
        )
        for i in range(6)
    ]
    (found,) = evaluate_models(comparisons, {hostile: [[0.0, 1.0]] * 6}, options=OPTIONS)
    html = write_report(RewardReport(title="t", models=[found]), tmp_path).read_text("utf-8")
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_smallest_report(tmp_path):
    """One pair, no floors, no intervals: nothing of it may fail or show nan."""
    comparison = Comparison(prompt="p", completions=("a", "b"), judgement=Best(0))
    (found,) = evaluate_models([comparison], {"m": [[1.0, 0.0]]}, options=EvaluationOptions(resamples=0))
    html = write_report(RewardReport(title="t", models=[found]), tmp_path).read_text("utf-8")
    assert "nan" not in html.replace("nance", "")
    assert "100.0 %" in html
    with pytest.raises(ValueError, match="at least one"):
        write_report(RewardReport(title="t", models=[]), tmp_path)


def test_numbers_as_read():
    assert number(0.7136, "accuracy") == "71.4 %"
    assert number(-0.0004, signed=True) == "+0.000"
    assert number(-0.05, "accuracy", signed=True) == "−5.0"
    assert number(float("nan")) == "–"
    assert number(float("inf")) == "∞"
    assert interval(Estimate(0.5, 0.4, 0.6, 9), "accuracy") == "40.0 to 60.0"
    assert interval(Estimate(0.5, float("nan"), float("nan"), 9)) == ""
    assert "<br>" in cell(Estimate(0.5, 0.4, 0.6, 9))


def test_verdict(report):
    good, bad = report.models
    share = number(good.metrics["accuracy"].value, "accuracy")
    assert verdict(good, report.floors, report.differences).startswith(f"good orders {share} of")
    assert "above the best floor, length" in verdict(good, report.floors, report.differences)
    assert "below the best floor" in verdict(bad, report.floors, report.differences)
    same = [replace(d, difference=Estimate(0.01, -0.02, 0.04, 9)) for d in report.differences]
    assert "not told apart from the best floor, length: the difference is +1.0 points (−2.0 to +4.0)" in verdict(
        good, report.floors, same
    )


def test_plots_hold_the_numbers_they_show(report):
    good = report.models[0]
    assert forest_plot(report.models, report.floors).rows[2][:2] == ("floor: length", 0.5)
    rows = reliability_plot(report.models).rows
    shown = [row[2] for row in rows if row[0] == "good"]
    assert shown == good.reliability.observed.tolist()
    assert {row[0] for row in breakdown_plot(report.models, "K").rows} == {"good", "bad"}
    assert breakdown_plot(report.models, "nothing") is None
    difference = [row for row in reward_plot(good).rows if row[0] == "difference"]
    assert sum(row[3] for row in difference) == good.counts["pairs_used"]
    left = sum(row[3] for row in difference if row[2] <= 1e-9)
    assert left == np.sum(good.chosen < good.rejected)
    assert sum(row[3] for row in length_plot([good]).rows) == 2 * np.sum(good.length_change != 0)


def test_length_curve_is_odd(report):
    """Both orders of each pair are shown, so the curve must be its own mirror image."""
    rows = [(x, y) for _, x, y, _ in length_plot([report.models[0]]).rows]
    assert np.array(rows) == pytest.approx(-np.array(rows)[::-1], abs=1e-9)
