import math

import pytest

from plaudit.data.records import (
    Best,
    Comparison,
    Demonstration,
    Judgement,
    Labels,
    Message,
    Ranking,
    Ratings,
    RecordError,
    Scores,
    Votes,
    first_user_turn,
    preference_pairs,
    prompt_text,
    rating_totals,
    tied_pairs,
    tiers_of,
)
from plaudit.data.validation import validate_comparison, validate_demonstration


def make(judgement: Judgement, count: int = 4, **keys: object) -> Comparison:
    return Comparison(prompt="q", completions=tuple("abcdefghi"[:count]), judgement=judgement, **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("judgement", "tiers", "pairs", "ties"),
    [
        (Ranking(((2,), (0, 3), (1,))), ((2,), (0, 3), (1,)), 5, [(0, 3)]),
        (Ranking(((2,), (0,))), ((2,), (0,)), 1, []),
        (Best(1), ((1,), (0, 2, 3)), 3, []),
        (Votes((1.0, 0.0, 6.0, 0.0)), ((2,), (0,), (1, 3)), 5, []),
        (Votes((3.0, 3.0, 0.0, 0.0)), ((0, 1), (2, 3)), 4, [(0, 1)]),
        (Scores((3.5, 1.0, None, 3.5)), ((0, 3), (1,)), 2, [(0, 3)]),
        (Labels((True, False, None, True)), ((0, 3), (1,)), 2, []),
        (Ratings({"a": (1.0, 2.0, 0.0, None), "b": (1.0, 0.0, 0.0, 5.0)}), ((0, 1), (2,)), 2, [(0, 1)]),
    ],
)
def test_every_judgement_as_tiers(judgement: Judgement, tiers: object, pairs: int, ties: object) -> None:
    assert tiers_of(judgement, 4) == tiers
    assert len(preference_pairs(make(judgement))) == pairs
    assert tied_pairs(make(judgement)) == ties


def test_tie_threshold_ties_only_smaller_differences() -> None:
    assert tiers_of(Scores((0.0, -0.9, -1.0, -1.8)), 4, tie_threshold=1.0) == ((0, 1), (2, 3))
    assert tiers_of(Scores((0.0, -1.0)), 2, tie_threshold=1.0) == ((0,), (1,))


def test_ratings_weigh_their_attributes() -> None:
    ratings = Ratings({"good": (1.0, 3.0), "long": (4.0, 1.0)})
    assert rating_totals(ratings, {"good": 1.0, "long": -0.5}) == (-1.0, 2.5)
    assert tiers_of(ratings, 2, attribute_weights={"good": 0.0, "long": 1.0}) == ((0,), (1,))
    with pytest.raises(ValueError, match=r"\['polite'\]"):
        rating_totals(ratings, {"polite": 1.0})


def test_prompt_texts() -> None:
    messages = (Message("system", "s"), Message("user", "u"), Message("assistant", "a"), Message("user", "v"))
    assert first_user_turn(messages) == "u"
    assert prompt_text(messages) == "system: s\n\nuser: u\n\nassistant: a\n\nuser: v"
    assert prompt_text("x") == first_user_turn("x") == "x"


@pytest.mark.parametrize(
    ("comparison", "reason", "key"),
    [
        (make(Best(0), 1), "one completion for a relative judgement", "completions"),
        (make(Best(4)), "index out of range", "best"),
        (make(Best(True)), "wrong type", "best"),
        (make(Ranking(((0,), (0, 1)))), "completion ranked twice", "ranking[1]"),
        (make(Ranking(((0,),))), "ranking judges fewer than two completions", "ranking"),
        (make(Ranking(((0,), ()))), "wrong type", "ranking[1]"),
        (make(Votes((1.0, 2.0))), "judgement does not cover the completions", "votes"),
        (make(Votes((0.0,) * 4)), "no votes", "votes"),
        (make(Scores((1.0, math.nan, 2.0, 3.0))), "not a finite number", "scores[1]"),
        (make(Scores((None,) * 4)), "nothing judged", "scores"),
        (make(Labels((True, 1, None, None))), "wrong type", "labels[1]"),  # type: ignore[arg-type]
        (make(Ratings({"x": (1.0,)})), "judgement does not cover the completions", "ratings.x"),
        (make(Best(0), weight=-1.0), "weight below 0", "weight"),
        (make(Best(0), margin=math.inf), "not a finite number", "margin"),
        (make(Best(0), annotator="\ud800"), "lone surrogate", "annotator"),
        (make(Best(0), id=7), "wrong type", "id"),
        (make(Best(0), images=("cat.png", 1)), "wrong type", "images[1]"),
        (make(Ratings({"\ud800": (1.0,) * 4})), "lone surrogate", "ratings.'\\ud800'"),
        (Comparison(prompt="q", completions=("a", " \n"), judgement=Best(0)), "empty completion", "completions[1]"),
        (Comparison(prompt="q", completions=("a", "a"), judgement=Best(0)), "identical completions", "completions[1]"),
        (Comparison(prompt=" ", completions=("a", "b"), judgement=Best(0)), "empty prompt", "prompt"),
        (Comparison(prompt="q", completions=("a", "x\ud83d"), judgement=Best(0)), "lone surrogate", "completions[1]"),
        (
            Comparison(prompt=(Message("assistant", "r"),), completions=("a", "b"), judgement=Best(0)),
            "prompt ends with an assistant turn", "prompt[0]",
        ),
        (Comparison(prompt=(Message("me", "q"),), completions=("a", "b"), judgement=Best(0)), "unknown role",
         "prompt[0].role"),
    ],
)  # fmt: skip
def test_what_does_not_hold_is_named(comparison: Comparison, reason: str, key: str) -> None:
    with pytest.raises(RecordError) as caught:
        validate_comparison(comparison)
    assert (caught.value.reason, caught.value.key) == (reason, key)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("demonstration", "reason", "key"),
    [
        (Demonstration(prompt="q", completion="a", weight=-1.0), "weight below 0", "weight"),
        (Demonstration(prompt="q", completion="a", group="\ud800"), "lone surrogate", "group"),
        (Demonstration(prompt="q", completion=" "), "empty completion", "completion"),
    ],
)
def test_demonstrations_that_do_not_hold_are_named(demonstration: Demonstration, reason: str, key: str) -> None:
    with pytest.raises(RecordError) as caught:
        validate_demonstration(demonstration)
    assert (caught.value.reason, caught.value.key) == (reason, key)


def test_absolute_judgements_of_one_completion_hold() -> None:
    for judgement in (Scores((1.0,)), Labels((False,)), Ratings({"a": (2.0,)})):
        validate_comparison(make(judgement, 1))
