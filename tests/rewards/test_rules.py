"""Rules against numbers worked by hand, in English, Chinese and Japanese."""

import math
from typing import Any

import pytest

from plaudit.rewards.base import Reward, Sample
from plaudit.rewards.rules import (
    answer_number,
    exact_match,
    json_schema,
    keywords,
    length_penalty,
    matches,
    numeric_match,
    repetition,
    target_length,
)
from plaudit.rewards.text import length, sentences, spaceless_share, words


def value(reward: Reward, completion: str, **columns: Any) -> float | None:
    score = reward([Sample("p", completion, columns=columns)])
    return float(score.total[0]) if score.valid[0] else None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Don't panic: it's well-kept!", ["don't", "panic", "it's", "well-kept"]),
        ("Don’t -- 'quoted' a- b", ["don't", "quoted", "a", "b"]),
        ("机器学习很好。", ["机", "器", "学", "习", "很", "好"]),
        ("私はAIが好きです。", ["私", "は", "ai", "が", "好", "き", "で", "す"]),
        ("ﾃｽﾄ　ＡＢＣ１２", ["テ", "ス", "ト", "abc12"]),
        ("が", ["が"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("... !!", []),
        ("", []),
    ],
)
def test_words(text: str, wanted: list[str]) -> None:
    assert words(text) == wanted


def test_lengths() -> None:
    assert length("Hello there, world.") == 3
    assert length("机器学习很好。") == 6
    assert length("机器学习 很好。", "characters") == 7
    assert length("e\u0301a b", "characters") == 3
    with pytest.raises(ValueError, match="unit is 'tokens'"):
        length("a", "tokens")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three?", 3),
        ("Version 2.5 is out. Really", 2),
        ("これは本です。あれは何ですか？はい！", 3),
        ("他说：“好。”然后走了。", 2),
        ("No mark", 1),
        ("Title\n\nText goes on", 2),
        ("...", 0),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert len(sentences(text)) == count


def test_scripts_without_spaces() -> None:
    assert spaceless_share("日本語") == 1.0
    assert spaceless_share("ab日本") == 0.5
    assert spaceless_share("한국어") == spaceless_share("!?") == 0.0


def test_length_penalty() -> None:
    assert value(length_penalty(0.5), "one two three") == -1.5
    assert value(length_penalty(0.5, free=2), "one two three") == -0.5
    assert value(length_penalty(0.5, free=5), "one two three") == 0.0
    assert value(length_penalty(0.1, unit="characters"), "今日は 晴れ") == pytest.approx(-0.5)
    assert value(length_penalty(1.0), "今日は晴れ。") == -5.0
    with pytest.raises(ValueError, match="unit is 'lines'"):
        length_penalty(unit="lines")  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "wanted"), [(10, 1.0), (5, 0.5), (15, 0.5), (0, 0.0), (20, 0.0), (100, -1.0)])
def test_target_length(count: int, wanted: float) -> None:
    assert value(target_length(10), "w " * count) == wanted
    assert value(target_length(10), "字" * count) == wanted


def test_target_length_with_tolerance() -> None:
    assert value(target_length(10, tolerance=3), "w " * 13) == 1.0
    assert value(target_length(10, tolerance=3), "w " * 15) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="target is 0"):
        target_length(0)


def test_repetition() -> None:
    # a b a b a: trigrams aba, bab, aba.
    assert value(repetition(3), "a b a b a") == pytest.approx(2 / 3 - 1)
    assert value(repetition(1), "the cat the CAT the.") == pytest.approx(2 / 5 - 1)
    assert value(repetition(2), "好好好好好") == pytest.approx(1 / 4 - 1)
    assert value(repetition(2), "今日は今日は") == pytest.approx(3 / 5 - 1)
    assert value(repetition(3), "a b") == value(repetition(3), "") == 0.0
    with pytest.raises(ValueError, match="n is 0"):
        repetition(0)


def test_repetition_against_counting_another_way() -> None:
    import random

    rng = random.Random(0)
    for n in (1, 2, 4):
        tokens = [rng.choice("abc") for _ in range(50)]
        text = "".join(tokens)
        counts = {text[i : i + n] for i in range(len(text) - n + 1)}
        assert value(repetition(n), " ".join(tokens)) == pytest.approx(len(counts) / (50 - n + 1) - 1)


def test_regular_expressions() -> None:
    pattern = r"<think>.*</think>\s*<answer>.*</answer>"
    assert value(matches(pattern), " <think>a\nb</think>\n<answer>答え</answer>\n") == 1.0
    assert value(matches(pattern), "so: <think>a</think><answer>b</answer>") == 0.0
    assert value(matches(pattern, whole=False), "so: <think>a</think><answer>b</answer>") == 1.0
    assert value(matches("はい|いいえ"), "はい") == 1.0
    assert value(matches("YES", ignore_case=True), "yes") == 1.0
    with pytest.raises(ValueError, match="no regular expression"):
        matches("(")


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"name": "さくら", "age": 3}', 1.0),
        (' {"name": "a"}\n', 1.0),
        ('{"name": "a", "age": -1}', 0.25),
        ('{"age": 3}', 0.25),
        ("[]", 0.25),
        ('{"name": "a", "age": NaN}', 0.0),
        ('```json\n{"name": "a"}\n```', 0.0),
        ('{"name": "a"', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_schemas(text: str, wanted: float) -> None:
    assert value(json_schema(SCHEMA, partial=0.25), text) == wanted


def test_json_in_other_ways(tmp_path: Any) -> None:
    import json

    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    assert value(json_schema(tmp_path / "schema.json"), '{"name": "a"}') == 1.0
    assert value(json_schema(json.dumps(SCHEMA)), '{"nam": "a"}') == 0.0
    assert value(json_schema(SCHEMA, fenced=True), 'x\n```json\n{"name": "a"}\n```') == 0.0
    assert value(json_schema(SCHEMA, fenced=True), '```json\n{"name": "a"}\n```') == 1.0
    assert value(json_schema(), "[1, 2]") == 1.0
    with pytest.raises(ValueError, match="no JSON schema"):
        json_schema({"type": "objekt"})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "#/definitions/x"}, "refers to '#/definitions/x', which is not in it"),
        (
            {"properties": {"a": {"items": {"$ref": "http://127.0.0.1:9/s.json"}}}},
            "refers to 'http://127.0.0.1:9/s.json'",
        ),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"x": {"$ref": "#y"}}},
            "refers to '#y'",
        ),
        ({"$ref": "#"}, "refers to itself without an end"),
    ],
)
def test_schemas_that_refer_to_nothing(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        json_schema(schema)


def test_schemas_that_refer_to_their_own_parts() -> None:
    tree = {"$defs": {"node": {"type": "object", "properties": {"$ref": {"$ref": "#/$defs/node"}}}}}
    reward = json_schema({**tree, "$ref": "#/$defs/node"})
    assert value(reward, '{"$ref": {"$ref": {}}}') == 1.0
    assert value(reward, '{"$ref": {"$ref": 3}}') == 0.0
    assert value(reward, '{"$ref": ' * 500 + "{}" + "}" * 500) == 0.0
    assert value(json_schema({"$ref": "https://json-schema.org/draft/2020-12/schema"}), '{"type": "object"}') == 1.0


def test_keywords() -> None:
    rule = keywords(["cat", "New York"], ["dog", "bird", "fish", "cow"])
    assert value(rule, "The CAT went to New York.") == 1.0
    assert value(rule, "category, york new") == 0.0
    assert value(rule, "a cat and a dog") == 0.25
    assert value(rule, "dog bird fish cow") == -1.0
    assert value(keywords("天气|東京"), "今天的天气不好") == 0.5
    assert value(keywords(absent="ｺｰﾋｰ"), "コーヒーをどうぞ") == -1.0
    for bad in (((), ()), (["!"], ())):
        with pytest.raises(ValueError, match="keyword"):
            keywords(*bad)


def test_exact_match() -> None:
    rule = exact_match()
    assert value(rule, " Ｐａｒｉｓ\n", answer="paris") == 1.0
    assert value(rule, "Paris.", answer="paris") == 0.0
    assert value(rule, "東京", answer=["東京", "とうきょう"]) == 1.0
    assert value(rule, "Paris") is None
    assert value(rule, "Paris", answer=None) is None
    assert value(exact_match(ignore_case=False), "Paris", answer="paris") == 0.0
    boxed = exact_match("gold", pattern=r"\\boxed\{(.*?)\}")
    assert value(boxed, r"\boxed{1} no, \boxed{B}", gold="b") == 1.0
    assert value(boxed, "b", gold="b") == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 and 4.\n#### 72", 72.0),
        ("#### 1,234.50 dollars, 7 left", 1234.5),
        ("first #### 1 then #### 2", 2.0),
        ("so 3 + 4 = 7.", 7.0),
        ("$1,000,000!", 1e6),
        ("between 10-5", 5.0),
        ("it is -5", -5.0),
        ("it is −5°", -5.0),
        ("about 3/4 of it", 0.75),
        ("1e3", 1000.0),
        ("答えは４２です。", 42.0),
        ("＃＃＃＃ 一共 1,200 元", 1200.0),
        (".5", 0.5),
        ("1/0", None),
        ("none", None),
        ("####", None),
    ],
)
def test_numbers_in_texts(text: str, number: float | None) -> None:
    assert answer_number(text) == number


def test_numeric_match() -> None:
    rule = numeric_match()
    assert value(rule, "Therefore 72.0", answer="He ran 5.\n#### 72") == 1.0
    assert value(rule, "Therefore 71", answer="#### 72") == 0.0
    assert value(rule, "I do not know", answer="#### 72") == 0.0
    assert value(rule, "72", answer=72) == 1.0
    assert value(rule, "72", answer="") is None
    assert value(rule, "72") is None
    assert value(numeric_match(find="marked"), "72", answer="72") == 0.0
    assert value(numeric_match(find="marked"), "#### 72", answer="72") == 1.0
    assert value(numeric_match(tolerance=0.01), "100.9", answer="100") == 1.0
    assert value(numeric_match(tolerance=0.01), "101.1", answer="100") == 0.0


def test_ranges_hold_for_odd_texts() -> None:
    texts = ["", " ", "\n", "a" * 10_000, "字" * 10_000, "\ud800", "\x00", "🎉🎉", "а́", "a\u200db"]
    limits = {
        length_penalty(): (-math.inf, 0),
        target_length(7): (-1, 1),
        repetition(): (-1, 0),
        matches(".*"): (0, 1),
        json_schema(): (0, 1),
        keywords("a", "b"): (-1, 1),
        numeric_match("answer"): (0, 1),
    }
    for rule, (low, high) in limits.items():
        for text in texts:
            found = value(rule, text, answer="1")
            assert found is not None
            assert low <= found <= high


def test_a_broken_pattern_and_an_empty_reference_are_said() -> None:
    with pytest.raises(ValueError, match="no regular expression"):
        exact_match(pattern="(")
    assert not exact_match()([Sample("a", "", columns={"answer": ""})]).valid[0]
    with pytest.raises(ValueError, match="partial is 7"):
        json_schema(partial=7)
