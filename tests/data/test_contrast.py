"""Demonstrations beside the completions of other prompts: who is picked, who may stand beside it."""

from collections import Counter

import pytest

from plaudit.data.contrast import beside_others
from plaudit.data.records import Best, Demonstration

DEMONSTRATIONS = [
    Demonstration(prompt=f"p{k}", completion=f"c{k}", id=f"d{k}", weight=1.0 + k, group=f"g{k}") for k in range(40)
]


def test_the_own_completion_is_the_pick_and_the_others_belong_to_other_prompts() -> None:
    found = beside_others(DEMONSTRATIONS, others=3)
    assert [record.prompt for record in found] == [each.prompt for each in DEMONSTRATIONS]
    for own, record in zip(DEMONSTRATIONS, found, strict=True):
        assert isinstance(record.judgement, Best)
        assert record.completions[record.judgement.index] == own.completion
        assert len(set(record.completions)) == 4
        assert (record.weight, record.group, record.subset) == (own.weight, own.group, "others")
    assert len({record.id for record in found}) == 40


def test_neither_place_nor_text_gives_the_pick_away() -> None:
    many = [Demonstration(prompt=f"p{k}", completion=f"c{k}") for k in range(800)]
    places = Counter(record.judgement.index for record in beside_others(many, others=3))  # type: ignore[union-attr]
    assert all(abs(places[k] - 200) < 50 for k in range(4))  # four standard deviations
    shown = Counter(text for record in beside_others(many, others=3) for text in record.completions)
    assert 3.8 < sum(shown.values()) / len(many) <= 4
    assert max(shown.values()) < 16


def test_one_seed_gives_one_draw_and_another_another() -> None:
    assert beside_others(DEMONSTRATIONS, seed=1) == beside_others(DEMONSTRATIONS, seed=1)
    assert beside_others(DEMONSTRATIONS, seed=1) != beside_others(DEMONSTRATIONS, seed=2)


def test_completions_of_the_same_prompt_and_equal_texts_never_stand_beside_it() -> None:
    few = [Demonstration(prompt=prompt, completion=text) for prompt, text in ["ax", "ay", "bx", "bz"]]
    for own, record in zip(few, beside_others(few, others=3), strict=True):
        beside = set(record.completions) - {own.completion}
        assert beside == {each.completion for each in few if each.prompt != own.prompt} - {own.completion}


def test_alone_there_is_nothing_to_compare() -> None:
    same = [Demonstration(prompt="p", completion=text) for text in "xy"]
    assert beside_others([]) == []
    assert beside_others(same) == []
    with pytest.raises(ValueError, match="at least 1"):
        beside_others(same, others=0)
