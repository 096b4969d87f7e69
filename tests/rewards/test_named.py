"""Rewards as users write them."""

import re
from pathlib import Path
from typing import Any

import pytest

from plaudit.rewards.base import Sample, as_reward
from plaudit.rewards.named import RULES, named_reward, rule_table

SAMPLE = Sample("p", "one, two! three = 3", columns={"answer": "#### 3", "gold": "4"})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("length_penalty=0.5", -2.0),
        ("length_penalty", -0.04),
        ("length_penalty=0.5,free=2", -1.0),
        ("length_penalty=unit=characters", -0.15),
        ("length_penalty=1,unit=sentences", -2.0),
        ('length_penalty={"coefficient": 2, "free": 3}', -2.0),
        ("target_length=4", 1.0),
        ("matches=one, .*= 3", 1.0),
        ('matches={"pattern": "ONE", "whole": false, "ignore_case": true}', 1.0),
        ("keywords=one|four,absent=two", -0.5),
        ("numeric_match", 1.0),
        ("numeric_match=gold", 0.0),
        ("type_token", 1.0),
        ("repetition=1", 0.0),
    ],
)
def test_rules_by_name(text: str, wanted: float) -> None:
    score = as_reward(text)([SAMPLE])
    assert float(score.total[0]) == pytest.approx(wanted)
    assert list(score.parts) == [text.partition("=")[0]]
    assert list(as_reward(text, name="mine")([SAMPLE]).parts) == ["mine"]


def test_options_from_elsewhere_win() -> None:
    assert float(named_reward("length_penalty=0.5", options={"coefficient": 1.0})([SAMPLE]).total[0]) == -4.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lenght_penalty=1", "did you mean length_penalty?"),
        ("lenght_penalty", "did you mean length_penalty?"),
        ("nonsense=1", "there is no rule 'nonsense'. The rules are length_penalty"),
        ("length_penalty=1,fre=2", "no option 'fre'; did you mean free?"),
        ("length_penalty=1,2", "'2' is no KEY=VALUE"),
        ("target_length", "needs target"),
        ('length_penalty={"a"', "begins like JSON"),
        ("length_penalty=abc", "option coefficient is 'abc'"),
        ("type_token=abc", "option window is 'abc'"),
        ("target_length=0", "target is 0"),
        ("readability=fog", "option formula is 'fog'"),
        ("fluency=gpt2,foo=3", "no option 'foo'. Its options are model, given_prompt"),
        ("fluency=gpt2,token_budget=abc", "option token_budget is 'abc'"),
        ("fluency=gpt2,dtype=int3", "option dtype is 'int3'"),
    ],
)
def test_what_is_written_wrongly(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        as_reward(text)


def test_every_rule_has_formula_and_range_in_its_docstring_and_in_the_manual() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    for name, _, _ in rule_table():
        assert f"`{name}`" in page
        factory: Any = RULES[name]
        assert factory.__doc__


def test_the_table_names_every_option() -> None:
    rows = {name: options for name, options, _ in rule_table()}
    assert rows["length_penalty"] == "coefficient=0.01, free=0, unit='words'"
