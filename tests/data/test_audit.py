import json
from collections.abc import Callable
from pathlib import Path

import pytest

from plaudit.configs.data import DataConfig
from plaudit.data.audit import audit_comparisons
from plaudit.data.audit_page import audit_page, audit_rows
from plaudit.data.inspecting import convert_data, inspect_data
from plaudit.data.io import read_comparisons, read_demonstrations
from plaudit.data.pages import Section, new_figure, page, percent, plot, quote, table
from plaudit.data.records import Comparison, Ranking
from plaudit.data.splits import leave_one_out

DATA = Path(__file__).parents[2].parent / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the real preference data is not beside this checkout")


def make(prompt: str, completions: tuple[str, ...], tiers: tuple[tuple[int, ...], ...], who: str | None) -> Comparison:
    return Comparison(prompt=prompt, completions=completions, judgement=Ranking(tiers), annotator=who)


RECORDS = [
    make("p", ("aa", "b", "ccc"), ((0,), (1,), (2,)), "x"),
    make("p", ("aa", "b", "ccc"), ((0,), (1,), (2,)), "x"),
    make("p", ("b", "aa"), ((0,), (1,)), "y"),
    make("p", ("b", "aa"), ((0,), (1,)), "z"),
    make("q", ("d", "ee"), ((0, 1),), "x"),
    make("q", ("d", "ee"), ((1,), (0,)), "y"),
]


def test_audit_by_hand() -> None:
    audit = audit_comparisons(RECORDS, floor=False)
    assert (audit.comparisons, audit.prompts, audit.pairs, audit.ties) == (6, 2, 9, 1)
    assert audit.completions == {2: 4, 3: 2}
    assert audit.annotators == {"x": 3, "y": 2, "z": 1}
    assert audit.duplicates == 1
    assert audit.contradictory_pairs == 1
    assert audit.self_contradictions == 0
    # Longer wins: twice aa over b of three lost to ccc each, b over aa twice lost, ee over d once: 3 of 9.
    assert audit.longer_wins is not None
    assert audit.longer_wins.value == pytest.approx(3 / 9)
    assert audit.first_wins is not None
    assert audit.first_wins.value == pytest.approx(8 / 9)
    assert audit.best_by_position[2] == (2, 0.0, pytest.approx(2 / 3))
    # One judgement per annotator: a/b has x against y and z (1 of 3 pairs equal), d/e a tie against a win (0 of 1).
    assert audit.agreement.units == 2
    assert audit.agreement.agreement == pytest.approx(1 / 4)
    assert json.loads(json.dumps(audit.to_json()))["pairs"] == 9


def test_ties_at_the_top_share_the_best_place() -> None:
    shared = make("p", ("a", "b", "c"), ((0, 1), (2,)), None)
    audit = audit_comparisons([shared], floor=False)
    assert audit.best_by_position == {
        place: (1, best, pytest.approx(1 / 3)) for place, best in enumerate((0.5, 0.5, 0.0))
    }


def test_the_page_is_self_contained_and_escapes_what_people_wrote() -> None:
    nasty = [make(f"<script>{n}", ("<b>good</b>", f"bad {n}"), ((n % 2,), (1 - n % 2,)), None) for n in range(60)]
    text = audit_page(audit_comparisons([*nasty, nasty[0], *RECORDS], source="<x>"))
    assert "<script>" not in text
    assert "<b>good" not in text
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert text.count("<svg") >= 4
    assert "currentColor" in text


def test_nothing_to_audit() -> None:
    with pytest.raises(ValueError, match="no comparison to audit"):
        audit_comparisons([])


def test_page_helpers() -> None:
    figure, (axes,) = new_figure()
    axes.plot([1, 2], [3, 4])
    body = plot(figure, "a & b", name="n", columns=("x", "y"), rows=[(1, 3), (2, 4)])
    assert "a &amp; b" in body
    assert 'download="n.csv"' in body
    shown = table(("name", "n"), [("<a>", 1234), (None, 2.0)])
    assert "&lt;a&gt;" in shown
    assert "1,234" in shown
    assert '<th class="number">n</th>' in shown
    assert quote("x" * 700).count("x") == 600
    assert (percent(0.1234), percent(None)) == ("12.3 %", "–")
    whole = page("T & U", [Section("One", body)])
    assert whole.startswith("<!DOCTYPE html>")
    assert "T &amp; U" in whole


def test_inspect_and_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.csv"
    source.write_text("prompt,answer_a,answer_b,choice\n" + "q,aa,b,a\n" * 3 + "q,,b,a\n", "utf-8")
    config = DataConfig(path=str(source), on_error="skip", refused_file=str(tmp_path / "side.jsonl"))
    audit = inspect_data(config, html=tmp_path / "a.html", json_file=tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text("utf-8"))["rows"]["refused"] == {"empty completion": 1}
    assert (tmp_path / "a.html").stat().st_size > 5000
    assert {what: value for what, value, _ in audit_rows(audit)}["rows read"] == "4"
    assert "Audit of" in capsys.readouterr().out
    tally = convert_data(config, tmp_path / "out.parquet")
    assert (tally.read, tally.used) == (4, 3)
    assert len(read_comparisons(tmp_path / "out.parquet").records) == 3
    convert_data(config.model_copy(update={"annotators": "merge"}), tmp_path / "out.jsonl")
    assert len(read_comparisons(tmp_path / "out.jsonl").records) == 1
    inspect_data(config, json_file=Path("-"), floor=False)
    assert json.loads(capsys.readouterr().out)["comparisons"] == 3


def test_refused_file_vanishes_when_nothing_was_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "q", "response": "a"}\n', "utf-8")
    config = DataConfig(path=str(tmp_path / "d.jsonl"), on_error="skip", refused_file=str(tmp_path / "side.jsonl"))
    convert_data(config, tmp_path / "out.jsonl", demonstrations=True)
    assert not (tmp_path / "side.jsonl").exists()
    assert read_demonstrations(tmp_path / "out.jsonl").records[0].completion == "a"


@real
def test_hh_has_its_broken_rows_and_shorter_wins() -> None:
    result = read_comparisons(DATA / "hh_harmless_base" / "train.jsonl.gz", on_error="skip")
    assert (result.read, result.used) == (1875, 1868)
    assert dict(result.refused) == {"histories differ": 4, "empty completion": 3}
    audit = audit_comparisons(result.records, floor=False)
    assert audit.longer_wins is not None
    assert 1 - audit.longer_wins.value == pytest.approx(0.553, abs=0.001)
    assert not audit.position_informative


@real
@pytest.mark.parametrize(
    ("name", "rows", "check"),
    [
        ("fgrlhf_qa/train", 380, lambda counts: counts == {4: 380}),
        ("oasst/rankings_train", 153, lambda counts: sum(counts.values()) == 153 and max(counts) == 9),
        ("wmt_mqm/rankings_ende", 376, lambda counts: counts[9] == 220),
        ("gsm8k/graded_k4", 543, lambda counts: counts == {3: 2, 4: 541}),
    ],
)
def test_real_files_are_read_whole(name: str, rows: int, check: Callable[[dict[int, int]], bool]) -> None:
    records = read_comparisons(DATA / f"{name}.jsonl.gz").records
    assert len(records) == rows
    counts: dict[int, int] = {}
    for record in records:
        counts[len(record.completions)] = counts.get(len(record.completions), 0) + 1
    assert check(counts)


@real
def test_real_groups_and_demonstrations() -> None:
    talks = leave_one_out(read_comparisons(DATA / "wmt_mqm" / "rankings_ende.jsonl.gz", group_key="doc").records)
    assert {name: len(test) for name, (_, test) in talks.items()} == {
        "talk.1": 109, "talk.3": 17, "talk.4": 90, "talk.5": 50, "talk.6": 110,
    }  # fmt: skip
    assert read_demonstrations(DATA / "gsm8k" / "demonstrations.jsonl.gz").used == 7473
    assert read_demonstrations(DATA / "oasst" / "demonstrations_train.jsonl.gz", group_key="tree").used == 179
