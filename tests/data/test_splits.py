from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plaudit.data.records import Best, Comparison, Message
from plaudit.data.splits import (
    kfold,
    leave_one_out,
    near_duplicates,
    prompt_key,
    shingles,
    split_comparisons,
    split_keys,
)


def make(prompt: str, group: str | None = None) -> Comparison:
    return Comparison(prompt=prompt, completions=("a", "b"), judgement=Best(0), group=group)


def test_the_key_is_the_first_user_turn_however_written() -> None:
    turns = (Message("system", "s"), Message("user", " Hello  World"), Message("assistant", "x"), Message("user", "y"))
    assert prompt_key("hello world") == prompt_key(turns) == prompt_key("ＨＥＬＬＯ\nworld")
    assert prompt_key("hello world") != prompt_key("hello word")


@given(st.lists(st.text(max_size=3), max_size=40), st.integers(0, 3))
def test_every_record_once_and_no_prompt_on_both_sides(prompts: list[str], seed: int) -> None:
    records = [make(prompt) for prompt in prompts]
    parts = split_comparisons(records, fractions={"a": 0.5, "b": 0.3, "c": 0.2}, seed=seed)
    assert Counter(id(r) for part in parts.values() for r in part) == Counter(map(id, records))
    keys = [{prompt_key(record.prompt) for record in part} for part in parts.values()]
    assert sum(map(len, keys)) == len(set.union(*keys))


def test_splits_are_stable_when_data_grows_and_have_their_shares() -> None:
    records = [make(f"prompt {number}") for number in range(4000)]
    small, large = split_comparisons(records[:1000]), split_comparisons(records)
    assert large["test"][: len(small["test"])] == small["test"]
    assert len(large["test"]) == pytest.approx(400, abs=4 * 19)  # four standard errors of a binomial
    assert split_comparisons(records, seed=1)["test"] != large["test"]


def test_groups_that_share_a_prompt_stay_together() -> None:
    records = [make("p", "one"), make("q", "one"), make("q", "two"), make("r", "three"), make("r"), make("z")]
    keys = split_keys(records, "group")
    assert keys[:3] == ["group:one"] * 3
    assert keys[3:5] == ["group:three"] * 2
    assert keys[5] == f"prompt:{prompt_key('z')}"


def test_folds_hold_everything_out_once() -> None:
    records = [make(f"prompt {number % 60}") for number in range(300)]
    folds = kfold(records, 5)
    assert Counter(id(r) for _, test in folds for r in test) == Counter(map(id, records))
    for train, test in folds:
        assert len(train) + len(test) == len(records)
        assert not {r.prompt for r in train} & {r.prompt for r in test}
    with pytest.raises(ValueError, match="is empty"):
        kfold(records[:2], 5)


def test_leave_one_out_by_group() -> None:
    records = [make("p", "one"), make("q", "two"), make("r", "one")]
    parts = leave_one_out(records)
    assert {name: (len(train), len(test)) for name, (train, test) in parts.items()} == {"one": (1, 2), "two": (2, 1)}
    with pytest.raises(ValueError, match="same group"):
        leave_one_out(records[:1])


def test_fractions_must_sum_to_one() -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        split_comparisons([make("p")], fractions={"train": 0.9})


@pytest.mark.parametrize(
    ("first", "second", "far"),
    [
        ("Where is my parcel? I ordered it two weeks ago and nobody answers.",
         "Where is my parcel? I ordered it two weeks ago and nobody answers!!", "How do I boil an egg?"),
        ("私の荷物はどこですか。二週間前に注文しましたが、まだ届きません。",
         "私の荷物はどこですか。二週間前に注文しましたが、まだ届いていません。", "卵のゆで方は?"),
        ("我的包裹在哪里？我两个星期前下的订单，到现在还没有收到。",
         "我的包裹在哪里？我两个星期前下的订单，到现在都还没有收到。", "怎样才能把鸡蛋煮十分钟？请告诉我。"),
    ],
)  # fmt: skip
def test_near_duplicates_in_any_script(first: str, second: str, far: str) -> None:
    records = [make(first), make(far), make(second), make(first.upper())]
    found = near_duplicates(records, threshold=0.7)
    assert [(pair.first, pair.second) for pair in found] == [(0, 2)]
    one, two = shingles(first), shingles(second)
    assert found[0].similarity == len(one & two) / len(one | two)


def test_shingles_by_hand() -> None:
    assert shingles("abcdef") == {"abcde", "bcdef"}
    assert shingles("日本語") == {"日本", "本語"}
    assert shingles("") == {""}


def test_near_duplicates_match_brute_force() -> None:
    import random

    generator = random.Random(0)
    base = ["".join(generator.choices("abcdefgh ", k=60)) for _ in range(60)]
    records = [make(text) for text in base] + [make(text[:57] + "zz" + text[57:]) for text in base]
    sets = [shingles(str(record.prompt)) for record in records]
    brute = {(i, j) for i in range(120) for j in range(i + 1, 120)
             if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= 0.8}  # fmt: skip
    found = {(pair.first, pair.second) for pair in near_duplicates(records)}
    assert found <= brute
    assert len(brute - found) <= 0.02 * len(brute)
    assert len(brute) >= 55
