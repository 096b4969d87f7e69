"""Every format is recognised and read; the examples are those of docs/data.md, so that the page cannot be wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from plaudit.configs.data import ColumnsConfig
from plaudit.data.formats import COMPARISON_FORMATS, DEMONSTRATION_FORMATS
from plaudit.data.io import read_comparisons, read_demonstrations
from plaudit.data.records import Best, Judgement, Labels, Message, Ranking, Ratings, RecordError, Scores

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
EXAMPLES = dict(re.findall(r"<!-- example: ([\w-]+) -->\n```\w+\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))
FIRST, SECOND, TIE = Ranking(((0,), (1,))), Ranking(((1,), (0,))), Ranking(((0, 1),))
HI = (Message("user", "Hi"),)


def example(tmp_path: Path, name: str) -> Path:
    path = tmp_path / ("x.csv" if name == "table" else "x.jsonl")
    path.write_text(EXAMPLES[name], "utf-8")
    return path


def test_every_format_has_its_example() -> None:
    assert set(EXAMPLES) == set(COMPARISON_FORMATS)


@pytest.mark.parametrize("name", COMPARISON_FORMATS)
def test_examples_are_recognised(tmp_path: Path, name: str) -> None:
    path = example(tmp_path, name)
    result = read_comparisons(path)
    assert result.formats == {str(path): name}
    assert result.read == result.used
    assert read_comparisons(path, format=name).records == result.records


@pytest.mark.parametrize(
    ("name", "prompt", "completions", "judgement"),
    [
        ("completions", "2 + 2?", ("4", "5"), Scores((1.0, 0.0))),
        ("hh", HI, ("Hello!", "What?"), FIRST),
        ("preference", "Hi", ("Hello!", "What?"), FIRST),
        ("rewardbench2", "2 + 2?", ("4", "5", "22", "3"), Labels((True, False, False, False))),
        ("nectar", HI, ("What?", "Hello!"), SECOND),
        ("oasst-trees", HI, ("What?", "Hello!"), SECOND),
        ("oasst-messages", HI, ("What?", "Hello!"), SECOND),
        ("helpsteer2-preference", "Hi", ("Hello!", "What?"), FIRST),
        ("helpsteer3", HI, ("Hello!", "What?"), FIRST),
        ("shp", "How do I boil an egg?", ("Eight minutes.", "No."), FIRST),
        ("webgpt", "Why is the sky blue?", ("Scattering.", "Paint."), FIRST),
        ("summaries", "My dog\n\nHe ate it all.", ("Dog.", "The dog ate it."), SECOND),
        ("kto", "Hi", ("Hello!",), Labels((True,))),
    ],
)
def test_examples_mean_what_they_say(
    tmp_path: Path, name: str, prompt: object, completions: object, judgement: Judgement
) -> None:
    record = read_comparisons(example(tmp_path, name)).records[0]
    assert (record.prompt, record.completions, record.judgement) == (prompt, completions, judgement)


def test_details_that_formats_carry(tmp_path: Path) -> None:
    def first(name: str) -> object:
        return read_comparisons(example(tmp_path, name)).records

    (tree,), (messages,) = first("oasst-trees"), first("oasst-messages")  # type: ignore[misc]
    assert (tree.group, tree.id) == (messages.group, messages.id) == ("t", "m1")
    assert first("preference")[0].margin == 0.5  # type: ignore[index]
    assert first("helpsteer3")[0].margin == 2.0  # type: ignore[index]
    apart = first("helpsteer3-annotators")
    assert [(r.annotator, r.judgement, r.margin) for r in apart] == [("0", FIRST, 3.0), ("1", TIE, None)]  # type: ignore[attr-defined]
    ratings = first("ultrafeedback")[0].judgement.attributes  # type: ignore[index]
    assert ratings == {"helpfulness": (5.0, 2.0), "honesty": (None, 4.0)}
    assert first("helpsteer2")[0].judgement.attributes["helpfulness"] == (4.0, 1.0)  # type: ignore[index]
    assert first("summary-axes")[0].judgement.attributes == {"overall": (6.0,), "accuracy": (7.0,)}  # type: ignore[index]
    assert [r.judgement for r in first("table")] == [FIRST, SECOND, TIE]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["preference", "kto", "rewardbench2", "hh"])
def test_annotator_group_and_weight_are_read_beside_any_pair(tmp_path: Path, name: str) -> None:
    row = json.loads(EXAMPLES[name].splitlines()[0]) | {"annotator": "anna", "group": 7, "weight": 0.5}
    (tmp_path / "x.jsonl").write_text(json.dumps(row), "utf-8")
    (record,) = read_comparisons(tmp_path / "x.jsonl").records
    assert (record.annotator, record.group, record.weight) == ("anna", "7", 0.5)


def refused(tmp_path: Path, text: str, ending: str = "jsonl", columns: ColumnsConfig | None = None) -> RecordError:
    (tmp_path / f"x.{ending}").write_text(text, "utf-8")
    with pytest.raises(RecordError) as caught:
        read_comparisons(tmp_path / f"x.{ending}", columns=columns)
    return caught.value


@pytest.mark.parametrize(
    ("row", "reason", "key"),
    [
        ('{"chosen": "\\n\\nHuman: a\\n\\nAssistant: x", "rejected": "\\n\\nHuman: b\\n\\nAssistant: y"}',
         "histories differ", "rejected"),
        ('{"chosen": "\\n\\nHuman: a\\n\\nAssistant: x", "rejected": "\\n\\nHuman: a\\n\\nAssistant:"}',
         "empty completion", "rejected"),
        ('{"chosen": "\\n\\nHuman: a\\n\\nAssistant: x", "rejected": "\\n\\nHuman: a"}',
         "transcript does not end with an answer", "rejected"),
        ('{"chosen": "\\n\\nHuman: a\\n\\nAssistant: x", "rejected": "\\n\\nHuman: a\\n\\nAssistant: x"}',
         "identical completions", "rejected"),
        ('{"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]}', "missing key", "answers[1].rank"),
        ('{"prompt": "q", "completions": [{"text": "a", "rank": 1}, {"text": "b"}]}',
         "judgement does not cover the completions", "completions[1].rank"),
        ('{"prompt": "q", "completions": [{"text": "a", "rank": 1}, {"text": "b", "rank": NaN}]}',
         "not a finite number", "rank"),
        ('{"prompt": "q", "completions": [{"text": "a"}, {"text": "b"}]}', "no judgement", "completions[0]"),
        ('{"prompt": "q", "chosen": [], "rejected": ["a"]}', "wrong type", "chosen"),
        ('{"chosen": "good", "rejected": "bad"}', "no shared beginning", "prompt"),
        ('{"prompt": "q", "completion": "a", "label": "perhaps"}', "wrong type", "label"),
        ('{"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -100}',
         "strength out of range", "preference_strength"),
        ('{"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}', "unknown label", "labels"),
    ],
)  # fmt: skip
def test_rows_that_break_their_format(tmp_path: Path, row: str, reason: str, key: str) -> None:
    error = refused(tmp_path, row + "\n")
    assert (error.reason, error.key) == (reason, key)


def test_a_prompt_under_another_name_is_not_guessed_from_the_answers(tmp_path: Path) -> None:
    answers = {"chosen": "The sky is blue.", "rejected": "The sky is red."}
    rows = [
        {"question": "Why?", **answers},
        {"system": "Be brief.", "question": "Why?", **answers},
        {"system": "", "prompt": "Why?", "input": "more", **answers},
        {"info": {"post": "Why?"}, "summaries": [{"text": "blue"}, {"text": "red"}], "choice": 0, **answers},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows[:3])), "utf-8")
    system = (Message("system", "Be brief."), Message("user", "Why?"))
    assert [r.prompt for r in read_comparisons(tmp_path / "x.jsonl").records] == ["Why?", system, "Why?"]
    (tmp_path / "x.jsonl").write_text(json.dumps(rows[3]), "utf-8")
    (record,) = read_comparisons(tmp_path / "x.jsonl").records
    assert (record.prompt, record.completions) == ("Why?", ("blue", "red"))
    error = refused(tmp_path, json.dumps({"instruction": "Why?", "input": "more", **answers}))
    assert (error.reason, error.key) == ("several prompts", "instruction, input")


def test_shared_history_becomes_the_prompt(tmp_path: Path) -> None:
    rows = (
        '{"chosen": "Question: why? Answer: because", "rejected": "Question: why? Answer: no"}\n'
        '{"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "user", "content": "q"},'
        '{"role": "assistant", "content": "a"}], "rejected": [{"role": "user", "content": "q"},'
        '{"role": "assistant", "content": "b"}]}\n'
        '{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],'
        '"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}\n'
    )
    (tmp_path / "x.jsonl").write_text(rows, "utf-8")
    one, two, three = read_comparisons(tmp_path / "x.jsonl").records
    assert (one.prompt, one.completions) == ("Question: why? Answer:", ("because", "no"))
    assert (two.prompt, two.completions) == ((Message("user", "q"),), ("a", "b"))
    assert (three.prompt, three.completions) == ((Message("system", "s"), Message("user", "q")), ("a", "b"))


def test_several_turns_of_helpsteer_2_become_messages(tmp_path: Path) -> None:
    prompt = "Hi\\nthere\\n<extra_id_1>Assistant\\nHello!\\n\\nYes?\\n<extra_id_1>User\\nWhy?"
    turns = (Message("user", "Hi\nthere"), Message("assistant", "Hello!\n\nYes?"), Message("user", "Why?"))
    rows = [f'{{"prompt": "{prompt}", "response": "{text}", "helpfulness": 1}}' for text in "ab"]
    (tmp_path / "x.jsonl").write_text("\n".join(rows), "utf-8")
    assert [r.prompt for r in read_comparisons(tmp_path / "x.jsonl").records] == [turns]
    row = f'{{"prompt": "{prompt}", "response_1": "a", "response_2": "b", "preference_strength": 1}}'
    (tmp_path / "x.jsonl").write_text(row, "utf-8")
    assert [(r.prompt, r.judgement) for r in read_comparisons(tmp_path / "x.jsonl").records] == [(turns, SECOND)]


def test_what_has_no_rating_in_ultrafeedback_is_unjudged(tmp_path: Path) -> None:
    row = (
        '{"instruction": "q", "completions": [{"response": "a", "annotations": {"honesty": null, "helpfulness": '
        '{"Rating": "5"}}}, {"response": "b", "annotations": {"honesty": {"Rating": "3"}, "helpfulness": null}}]}'
    )
    (tmp_path / "x.jsonl").write_text(row, "utf-8")
    (record,) = read_comparisons(tmp_path / "x.jsonl").records
    assert record.judgement == Ratings({"honesty": (None, 3.0), "helpfulness": (5.0, None)})


def test_the_fault_of_a_row_in_a_group_is_told_at_its_line(tmp_path: Path) -> None:
    rows = [f'{{"prompt": "p", "response": "{text}", "helpfulness": 1}}' for text in ("a", "b", "")]
    error = refused(tmp_path, "\n".join(rows))
    assert (error.place, error.key) == (f"{tmp_path / 'x.jsonl'}:3", "response")


def test_rows_of_a_group_are_used_or_refused_together(tmp_path: Path) -> None:
    rows = [
        '{"prompt": "p", "response": "a", "helpfulness": 1}',
        '{"prompt": "p", "response": "b", "helpfulness": 2}',
        '{"prompt": "p", "helpfulness": 2}',
        '{"prompt": "z", "response": "same", "helpfulness": 1}',
        '{"prompt": "z", "response": "same", "helpfulness": 2}',
        '{"prompt": "p", "response": "alone", "helpfulness": 3}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(rows), "utf-8")
    result = read_comparisons(tmp_path / "x.jsonl", on_error="skip")
    assert [record.completions for record in result.records] == [("a", "b"), ("alone",)]
    assert (result.read, result.used) == (6, 3)
    assert dict(result.refused) == {"missing key": 1, "identical completions": 2}


def test_only_messages_that_stand_in_a_comparison_are_called_used(tmp_path: Path) -> None:
    def message(name: str, parent: str | None, rank: int | None = None, **more: object) -> str:
        role = "prompter" if name[0] == "p" else "assistant"
        return json.dumps({"message_id": name, "parent_id": parent, "message_tree_id": "t", "role": role,
                           "text": name, "rank": rank, **more})  # fmt: skip

    rows = [
        message("p1", None), message("a1", "p1", 0), message("a2", "p1", 1), message("a3", "p1", None, deleted=True),
        message("p2", "a1"), message("a4", "p2", 0),
        message("p3", "a3"), message("a5", "p3", 0), message("a6", "p3", 1),
    ]  # fmt: skip
    (tmp_path / "x.jsonl").write_text("\n".join(rows), "utf-8")
    result = read_comparisons(tmp_path / "x.jsonl")
    assert [(record.id, record.completions) for record in result.records] == [("p1", ("a1", "a2"))]
    assert (result.read, result.used, dict(result.refused)) == (9, 3, {"nothing to compare": 6})


def test_nothing_below_a_deleted_reply_of_a_tree_is_read(tmp_path: Path) -> None:
    def node(name: str, rank: int | None = None, *replies: object, **more: object) -> dict[str, object]:
        role = "prompter" if name[0] == "p" else "assistant"
        return {"message_id": name, "role": role, "text": name, "rank": rank, "replies": list(replies), **more}

    below = node("p2", None, node("a4", 0), node("a5", 1))
    replies = (node("a1", 0), node("a2", 1), node("a3", 2, below, deleted=True))
    tree = {"message_tree_id": "t", "prompt": node("p1", None, *replies)}
    (tmp_path / "x.jsonl").write_text(json.dumps(tree), "utf-8")
    records = read_comparisons(tmp_path / "x.jsonl").records
    assert [(record.id, record.completions) for record in records] == [("p1", ("a1", "a2"))]


def turn(name: str, rank: object = None, *replies: object, text: str | None = None) -> dict[str, object]:
    role = "prompter" if name[0] == "p" else "assistant"
    return {"message_id": name, "role": role, "text": text or name, "rank": rank, "replies": list(replies)}


def tree_with_faults() -> dict[str, object]:
    """Four turns with ranked replies: good, identical replies, a broken rank, good again below the broken one."""
    deep = turn("p4", None, turn("a7", 0), turn("a8", 1))
    broken = turn("p3", None, turn("a5", "first", deep), turn("a6", 1))
    alike = turn("p2", None, turn("a3", 0, text="same"), turn("a4", 1, text="same"))
    return {"message_tree_id": "t", "prompt": turn("p1", None, turn("a1", 0, alike), turn("a2", 1, broken))}


def test_one_bad_group_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / "trees.jsonl").write_text(json.dumps(tree_with_faults()), "utf-8")
    rows: list[str] = []

    def spread(node: dict[str, Any], parent: str | None) -> None:
        below = node.pop("replies")
        rows.append(json.dumps(node | {"parent_id": parent, "message_tree_id": "t"}))
        for reply in below:
            spread(reply, node["message_id"])

    spread(tree_with_faults()["prompt"], None)  # type: ignore[arg-type]
    (tmp_path / "messages.jsonl").write_text("\n".join(rows), "utf-8")
    with pytest.raises(RecordError, match="identical completions"):
        read_comparisons(tmp_path / "trees.jsonl")
    trees = read_comparisons(tmp_path / "trees.jsonl", on_error="skip", refused_file=tmp_path / "refused.jsonl")
    reasons = {"identical completions": 1, "wrong type": 1}
    assert [record.id for record in trees.records] == ["p1", "p4"]
    assert (trees.read, trees.used, dict(trees.refused)) == (4, 2, reasons)
    assert len((tmp_path / "refused.jsonl").read_text().splitlines()) == 2
    messages = read_comparisons(tmp_path / "messages.jsonl", on_error="skip")
    assert messages.records == trees.records
    assert messages.read == messages.used + sum(messages.refused.values()) == len(rows)
    assert messages.refused["identical completions"] == 2


def test_a_turn_without_text_costs_what_stands_below_it(tmp_path: Path) -> None:
    tree = tree_with_faults()
    tree["prompt"]["replies"][1]["replies"][0]["text"] = None  # type: ignore[index]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, [tree, tree, tree])), "utf-8")
    result = read_comparisons(tmp_path / "x.jsonl", on_error="skip", limit=2)
    assert [record.id for record in result.records] == ["p1", "p1"]
    assert result.problems[1].key == "prompt.replies[1].replies[0].text"
    assert (result.read, result.used, sum(result.refused.values())) == (6, 2, 4)


def test_a_row_without_any_judgement_in_it_is_not_called_used(tmp_path: Path) -> None:
    row = '{"context": "q", "response1": "a", "response2": "b", "individual_preference": []}'
    (tmp_path / "x.jsonl").write_text(row, "utf-8")
    result = read_comparisons(tmp_path / "x.jsonl")
    assert (result.read, result.used, dict(result.refused)) == (1, 0, {"nothing to compare": 1})


def test_messages_without_ranked_siblings_never_stop_a_run(tmp_path: Path) -> None:
    lone = EXAMPLES["oasst-messages"].splitlines()[:2]
    orphan = '{"message_id": "m9", "parent_id": "gone", "message_tree_id": "u", "role": "assistant", "text": "x"}'
    (tmp_path / "x.jsonl").write_text("\n".join(lone), "utf-8")
    result = read_comparisons(tmp_path / "x.jsonl")
    assert (result.read, result.used, dict(result.refused)) == (2, 0, {"nothing to compare": 2})
    (tmp_path / "x.jsonl").write_text("\n".join([*lone, orphan]), "utf-8")
    with pytest.raises(RecordError, match="parent missing"):
        read_comparisons(tmp_path / "x.jsonl")


def test_tables_with_names_of_their_own(tmp_path: Path) -> None:
    columns = ColumnsConfig(prompt="frage", completions=("links", "rechts"), choice="besser",
                            choices={"1": "links", "2": "rechts", "0": "tie"})  # fmt: skip
    (tmp_path / "x.tsv").write_text("frage\tlinks\trechts\tbesser\nq\ta\tb\t2\nq\ta\tb\t0\nq\ta\tb\tlinks\n", "utf-8")
    assert [r.judgement for r in read_comparisons(tmp_path / "x.tsv", columns=columns).records] == [SECOND, TIE, FIRST]
    error = refused(tmp_path, "frage,links,rechts,besser\nq,a,b,3\n", "csv", columns)
    assert (error.reason, error.key) == ("unknown choice", "besser")
    assert "one of links, rechts" in str(error)


def test_tables_with_scores_ranks_and_several_answers(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("question,answer_a,answer_b,answer_c,rank_a,rank_b,rank_c\nq,x,y,z,2,1,\n", "utf-8")
    assert read_comparisons(tmp_path / "x.csv").records[0].judgement == Ranking(((1,), (0,)))
    (tmp_path / "x.csv").write_text("prompt,response1,response2,score1,score2\nq,x,y,0.5,-1\n", "utf-8")
    assert read_comparisons(tmp_path / "x.csv").records[0].judgement == Scores((0.5, -1.0))
    (tmp_path / "x.csv").write_text("prompt,answer_1,answer_2,answer_3,choice\nq,x,y,z,3\n", "utf-8")
    assert read_comparisons(tmp_path / "x.csv").records[0].judgement == Best(2)


def test_csv_that_is_broken(tmp_path: Path) -> None:
    header = "prompt,answer_a,answer_b,choice\n"
    (tmp_path / "x.csv").write_bytes((header + 'q,"two\nlines",b,a\nq,a\nq,,b,a\n').encode() + b"q,\xff,b,a\n")
    result = read_comparisons(tmp_path / "x.csv", on_error="skip")
    assert result.records[0].completions == ("two\nlines", "b")
    assert dict(result.refused) == {"wrong number of cells": 1, "empty completion": 1, "not UTF-8": 1}
    assert [problem.place.rsplit(":", 1)[1] for problem in result.problems] == ["4", "5", "6"]
    (tmp_path / "x.csv").write_text("prompt,prompt\n1,2\n", "utf-8")
    with pytest.raises(ValueError, match="'prompt' stands there twice"):
        read_comparisons(tmp_path / "x.csv")


def test_columns_are_found_in_capitals_too(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("Question,Answer A,Answer B,Preferred,Annotator\nq,x,y,B,anna\n", "utf-8")
    (record,) = read_comparisons(tmp_path / "x.csv").records
    assert (record.prompt, record.judgement, record.annotator) == ("q", SECOND, "anna")
    (tmp_path / "x.csv").write_text("PROMPT,Response A,Response B,Score A,Score B\nq,x,y,1,2\n", "utf-8")
    assert read_comparisons(tmp_path / "x.csv").records[0].judgement == Scores((1.0, 2.0))


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    for mark in (";", "\t"):
        lines = [mark.join(["prompt", "answer_a", "answer_b", "choice"]), mark.join(['"q, r"', '"x,\ny"', "z", "b"])]
        (tmp_path / "x.csv").write_text("\n".join(lines), "utf-8")
        (record,) = read_comparisons(tmp_path / "x.csv").records
        assert (record.prompt, record.completions, record.judgement) == ("q, r", ("x,\ny", "z"), SECOND)
    (tmp_path / "x.csv").write_text("prompt,answer_a,answer_b,choice\nq,x,y,a\n", "utf-16")
    with pytest.raises(ValueError, match=r"x\.csv:1: not UTF-8; .*CSV UTF-8"):
        read_comparisons(tmp_path / "x.csv")


def test_named_columns_and_another_format_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="makes it a table; leave out the format 'hh'"):
        read_comparisons(example(tmp_path, "hh"), format="hh", columns=ColumnsConfig(choice="x"))


@pytest.mark.parametrize(
    ("row", "prompt", "name"),
    [
        ('{"prompt": "q", "response": "a"}', "q", "prompt-completion"),
        ('{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}',
         (Message("user", "q"),), "prompt-completion"),
        ('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
         (Message("user", "q"),), "conversation"),
        ('{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}',
         (Message("user", "q"),), "conversation"),
        ('{"instruction": "q", "input": "r", "output": "a"}', "q\n\nr", "instruction"),
        ('{"chosen": "\\n\\nHuman: q\\n\\nAssistant: a", "rejected": ""}', (Message("user", "q"),), "hh"),
    ],
)  # fmt: skip
def test_demonstrations(tmp_path: Path, row: str, prompt: object, name: str) -> None:
    (tmp_path / "x.jsonl").write_text(row, "utf-8")
    result = read_demonstrations(tmp_path / "x.jsonl")
    assert [(record.prompt, record.completion) for record in result.records] == [(prompt, "a")]
    assert list(result.formats.values()) == [name]
    assert name in DEMONSTRATION_FORMATS
