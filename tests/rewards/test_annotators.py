import json

import pytest

from plaudit.data.records import Best, Ranking, Scores
from plaudit.rewards.annotators import Question, as_annotator, open_annotator

QUESTIONS = [Question(id=f"q{number}", prompt="hello", completions=("good", "bad", "so")) for number in range(3)]


def by_length(prompt, completions):
    return [len(text) for text in completions]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (1, Best(1)),
        ([[2], [0, 1]], Ranking(((2,), (0, 1)))),
        ([3, 1.5, 0], Scores((3, 1.5, 0))),
        (Ranking(((0,), (1,))), Ranking(((0,), (1,)))),
    ],
)
def test_what_a_function_says_becomes_a_judgement(said, expected):
    (record,) = as_annotator(lambda prompt, completions: said)(QUESTIONS[:1])
    assert record.judgement == expected
    assert (record.prompt, record.completions, record.id) == ("hello", ("good", "bad", "so"), "q0")


def test_a_function_that_cannot_say_is_left_out_and_nonsense_refused():
    assert as_annotator(lambda prompt, completions: None)(QUESTIONS) == []
    with pytest.raises(ValueError, match="completion"):
        as_annotator(lambda prompt, completions: 7)(QUESTIONS)


def test_functions_by_name(tmp_path):
    annotator = open_annotator(f"{__name__}:by_length", tmp_path)
    assert annotator(QUESTIONS[:1])[0].judgement == Scores((4, 3, 2))
    assert annotator(QUESTIONS[:1])[0].annotator == "by_length"
    (tmp_path / "mine.py").write_text("def second(prompt, completions):\n    return 1\n", encoding="utf-8")
    assert open_annotator(f"{tmp_path}/mine.py:second", tmp_path)(QUESTIONS[:1])[0].judgement == Best(1)
    for name in ("no_such_module:f", f"{__name__}:nothing", "gold"):
        with pytest.raises(ValueError, match="neither queue nor module:function"):
            open_annotator(name, tmp_path)


def answer(folder, *rows, end="\n"):
    with (folder / "answers.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) for row in rows) + end)


def test_people_answer_through_files_and_may_be_late(tmp_path):
    annotator = open_annotator("queue", tmp_path)
    assert annotator(QUESTIONS[:2]) == []
    asked = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert asked[1] == {"id": "q1", "prompt": "hello", "completions": ["good", "bad", "so"]}
    answer(tmp_path, {"id": "q1", "ranking": [[0], [2], [1]], "annotator": "Ada"}, {"id": "other", "best": 0})
    answer(tmp_path, {"id": "q1", "best": 1})
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"id": "q0", "be')  # still being written
    (late,) = annotator(QUESTIONS[2:])
    assert (late.id, late.judgement, late.annotator) == ("q1", Ranking(((0,), (2,), (1,))), "Ada")
    saved = json.loads(json.dumps(annotator.state_dict()))
    again = open_annotator("queue", tmp_path)
    again.load_state_dict(saved)
    (tmp_path / "answers.jsonl").write_text('{"id": "q0", "skip": true}\n{"id": "q2", "best": 2}\n')
    assert [record.id for record in again([])] == ["q2"]
    assert again.done == {"q0", "q1", "q2"}
    # Asked again after a resume: nothing is written twice, nothing counted twice.
    assert again(QUESTIONS) == []
    assert len((tmp_path / "questions.jsonl").read_text().splitlines()) == 3


def test_questions_are_asked_on_after_a_kill_and_whatever_marks_they_hold(tmp_path):
    first, second = (Question(id=name, prompt="one\u2028two é", completions=("a\x85b", "c")) for name in "ab")
    open_annotator("queue", tmp_path)([first])
    path = tmp_path / "questions.jsonl"
    with path.open("ab") as file:
        file.write('{"id": "b", "prompt": "one\u2028two é'.encode()[:-1])  # a kill in the middle of a letter
    open_annotator("queue", tmp_path)([first, second])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(row["id"], row["prompt"]) for row in rows] == [("a", first.prompt), ("b", first.prompt)]


def test_it_waits_until_all_have_answered(tmp_path):
    annotator = open_annotator("queue", tmp_path, wait=0.2)
    annotator.poll = 0.01
    answer(tmp_path, {"id": "q0", "best": 0})
    assert [record.id for record in annotator(QUESTIONS[:1])] == ["q0"]
    assert annotator(QUESTIONS[1:2]) == []


def test_an_answer_that_does_not_fit_is_named_by_its_line(tmp_path):
    annotator = open_annotator("queue", tmp_path)
    annotator(QUESTIONS)
    answer(tmp_path, {"id": "q0", "best": 0}, {"id": "q1", "best": 9})
    with pytest.raises(ValueError, match=r"answers.jsonl:2: this answer cannot be used"):
        annotator([])
