"""Rewards as users write them."""

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from plaudit.models.reward_model import RewardModelParts
from plaudit.models.saving import load_reward_model
from plaudit.rewards.base import Sample, as_reward
from plaudit.rewards.model import ModelReward
from plaudit.rewards.named import MODEL_OPTIONS, RULES, named_reward, rule_table
from plaudit.rewards.remote import RemoteReward

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


OWN = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
from plaudit.rewards.combine import combine
with open(__file__ + ".runs", "a") as file:
    file.write("once ")

def shorter(completions, than=3):
    return [float(len(text.split()) < than) for text in completions]

async def later(prompts, completions, **columns):
    return [1.0 for _ in completions]

@dataclass
class Limit:
    words: ClassVar[int] = 3

both = combine({"short": (shorter, 2.0), "right": "numeric_match"})
number = 3

class Judge:
    pass
"""


def test_functions_of_ones_own_by_file_and_by_module(tmp_path: Path) -> None:
    file = tmp_path / "json.py"  # called like an installed module, whose place it does not take
    file.write_text(OWN, encoding="utf-8")
    score = as_reward(f"{file}:shorter")([SAMPLE])
    assert (score.total.tolist(), list(score.parts)) == ([0.0], ["shorter"])
    assert named_reward(f"{file}:shorter", options={"than": 6}, name="mine")([SAMPLE]).parts["mine"].tolist() == [1.0]
    column = Sample("p", "one two", columns={"than": [2]})  # of a file that happens to have a column of that name
    assert named_reward(f"{file}:shorter", options={"than": 6})([column]).total.tolist() == [1.0]
    assert named_reward(f"{file}:later").waits  # type: ignore[attr-defined]
    assert as_reward(f"{file}:both")([SAMPLE]).total.tolist() == [1.0]
    assert as_reward("plaudit.demo.pipeline:_gold")([SAMPLE]).valid.tolist() == [True]
    assert file.with_name("json.py.runs").read_text() == "once "
    assert json.loads("1") == 1
    broken = tmp_path / "broken.py"
    broken.write_text("def shorter(completions:\n", encoding="utf-8")
    failing = tmp_path / "failing.py"
    failing.write_text("limit = 3\nlimits = [limit, mximum]\n", encoding="utf-8")
    for text, message in (
        (f"{file}:longer", "json.py has no 'longer'"),
        (f"{file}:shortr", "json.py has no 'shortr'; did you mean shorter?"),
        (f"{file}:Judge", "is a class, not a function"),
        (f"{failing}:limits", "failing.py, line 2: NameError: name 'mximum' is not defined"),
        (f"{file}:shorter=6", "options of a function are given as `options`"),
        (f"{file}", "which function of the file?"),
        (f"{file}:", "which function of the file?"),
        (f"{file}:number", "is int, not a function"),
        (f"{tmp_path}/none.py:shorter", "there is no file"),
        (f"{broken}:shorter", "broken.py, line 1"),
        ("no_such_module:shorter", "a file of your own is named with its ending"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            as_reward(text)
    with pytest.raises(ValueError, match="no option 'then'; did you mean than"):
        named_reward(f"{file}:shorter", options={"then": 5})


def test_the_options_of_a_model_are_those_that_open_one() -> None:
    taken = {
        *inspect.signature(ModelReward.from_pretrained).parameters,
        *inspect.signature(load_reward_model).parameters,
    }
    taken -= {"name_or_folder", "name", "options", "changes"}
    changes = {field.name for field in fields(RewardModelParts)}
    assert taken <= set(MODEL_OPTIONS) <= taken | changes


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("http://127.0.0.1:9/classify", {"timeuot": 3}, "no option 'timeuot'; did you mean timeout?"),
        ("http://127.0.0.1:9/classify", {"timeout": "long"}, "option timeout is 'long'"),
        ("http://127.0.0.1:9/classify", {"pause": -1}, "retries and pause at least 0"),
        ("http://127.0.0.1:9/classify", {"protocol": "grpc"}, "option protocol is 'grpc'"),
        ("runs/reward/model", {"normalized": False}, "no option 'normalized'; did you mean normalised?"),
    ],
)
def test_options_of_servers_and_models_that_are_written_wrongly(
    text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        named_reward(text, options=options)


def test_every_rule_has_formula_and_range_in_its_docstring_and_in_the_manual() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    for name, _, _ in rule_table():
        assert f"`{name}`" in page
        factory: Any = RULES[name]
        assert factory.__doc__


def test_the_table_names_every_option() -> None:
    rows = {name: options for name, options, _ in rule_table()}
    assert rows["length_penalty"] == "coefficient=0.01, free=0, unit='words'"


def test_every_option_of_a_server_reaches_it() -> None:
    options: dict[str, Any] = {
        "protocol": "get_reward",
        "model": "judge",
        "outputs": {1: 0.5},
        "batch_size": 3,
        "parallel": 2,
        "timeout": 7.0,
        "retries": 1,
        "pause": 0.25,
        "headers": {"Authorization": "Bearer x"},
        "extra": {"seed": 1},
    }
    assert named_reward("http://127.0.0.1:9/v1", options=options) == RemoteReward("http://127.0.0.1:9/v1", **options)
