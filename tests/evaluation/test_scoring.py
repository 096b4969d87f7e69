"""Scores from files and from models: matched rightly, refused clearly, nothing dropped in silence."""

import gzip
import json
from types import SimpleNamespace

import pytest

from plaudit.data.records import Best, Comparison
from plaudit.evaluation.scoring import ModelScorer, read_scores, write_scores


@pytest.fixture
def comparisons():
    return [
        Comparison(prompt=f"p{i}", completions=("a", "b", "c")[: 2 + i % 2], judgement=Best(0), id=f"n{i}")
        for i in range(4)
    ]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_lines_of_plaudit_score_are_read_by_their_raw_scores(comparisons, tmp_path):
    rows = [
        {"id": f"n{i}", "raw": [float(k) for k in range(2 + i % 2)], "normalised": [9.0] * (2 + i % 2)}
        for i in range(4)
    ]
    found = read_scores(lines(tmp_path / "s", rows), comparisons)
    assert found == [[0.0, 1.0], [0.0, 1.0, 2.0]] * 2


def test_round_trip(comparisons, tmp_path):
    scores = [[1.0, 2.0], [1.5, None, 3.0], [0.0, 0.0], [1.0, 2.0, 3.0]]
    write_scores(tmp_path / "new" / "s.jsonl", comparisons, scores)
    assert read_scores(tmp_path / "new" / "s.jsonl", comparisons) == scores
    packed = tmp_path / "s.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "new" / "s.jsonl").read_bytes()))
    assert read_scores(packed, comparisons) == scores


def test_ids_win_over_order_and_more_lines_do_no_harm(comparisons, tmp_path):
    rows = [{"id": f"n{i}", "scores": [float(i)] * (2 + i % 2)} for i in (3, 1, 0, 2, 7)]
    assert [row[0] for row in read_scores(lines(tmp_path / "s", rows), comparisons)] == [0.0, 1.0, 2.0, 3.0]


def test_without_ids_order_counts(comparisons, tmp_path):
    rows = [{"scores": [float(i)] * (2 + i % 2)} for i in range(4)]
    assert [row[0] for row in read_scores(lines(tmp_path / "s", rows), comparisons)] == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"scores": [1, 2]}], "1 lines of scores for 4"),
        ([{"scores": [1, 2, 3]}] * 4, ":1: 3 scores for 2 completions"),
        ([{"id": "n0", "scores": [1, 2]}], "no scores for the comparison with id 'n1'"),
        ([{"scores": [1, "2"]}] * 4, ":1: expected"),
        ([{"scores": [True, 2]}] * 4, ":1: expected"),
        ([[1, 2]], ":1: expected"),
    ],
)
def test_files_that_do_not_fit_are_refused(comparisons, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_scores(lines(tmp_path / "s", rows), comparisons)


def test_broken_json_names_the_line(comparisons, tmp_path):
    (tmp_path / "s").write_text('{"scores": [1, 2]}\n{"scores": [1,\n', encoding="utf-8")
    with pytest.raises(ValueError, match=":2: this is not JSON"):
        read_scores(tmp_path / "s", comparisons)


class TextTooLongError(ValueError):
    pass


class FakeModel:
    """Scores by length; cannot read texts beyond 20 characters, and fails as a whole, as a real model does."""

    def __init__(self):
        self.calls = 0

    def score(self, prompts, completions, *, token_budget):
        self.calls += 1
        for row in completions:
            for text in row:
                if not text:
                    raise ValueError("completion is empty")
                if len(text) > 20:
                    raise TextTooLongError(f"{len(text)} tokens")
        return [SimpleNamespace(raw=[float(len(text)) for text in row]) for row in completions]


def test_what_cannot_be_scored_is_found_and_counted_and_the_rest_is_scored():
    texts = [["ok", "fine"] for _ in range(300)]
    texts[137] = ["ok", "x" * 50, ""]
    model = FakeModel()
    scorer = ModelScorer(model)
    scores = scorer([str(i) for i in range(300)], texts)
    assert scores[137] == [2.0, None, None]
    assert [row for i, row in enumerate(scores) if i != 137] == [[2.0, 4.0]] * 299
    assert dict(scorer.unscored) == {"too long": 1, "completion is empty": 1}
    assert model.calls < 40


def test_progress_adds_up():
    seen = []
    ModelScorer(FakeModel(), progress=seen.append)(["p"] * 300, [["a"]] * 300)
    assert sum(seen) == 300
