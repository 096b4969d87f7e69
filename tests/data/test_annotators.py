from plaudit.data.annotators import merge_annotators
from plaudit.data.records import Best, Comparison, Judgement, Labels, Ranking, Ratings, Scores, Votes


def make(completions: str, judgement: Judgement, annotator: str = "x", **keys: object) -> Comparison:
    return Comparison(
        prompt="p", completions=tuple(completions), judgement=judgement, annotator=annotator, **keys  # type: ignore[arg-type]
    )  # fmt: skip


def judged(*records: Comparison) -> list[Judgement]:
    return [record.judgement for record in merge_annotators(records)]


def test_picks_rankings_and_votes_become_votes_in_the_order_of_the_first() -> None:
    records = [
        make("abc", Best(0)),
        make("cab", Ranking(((1,), (0,), (2,)))),
        make("abc", Ranking(((0, 1), (2,))), weight=2.0),
        make("bca", Votes((0.0, 3.0, 0.0))),
    ]
    (merged,) = merge_annotators(records)
    assert merged.completions == ("a", "b", "c")
    assert merged.judgement == Votes((1 + 1 + 1, 1, 3))
    assert (merged.annotator, merged.weight) == (None, 1.0)


def test_absolute_judgements_are_averaged() -> None:
    assert judged(make("ab", Scores((1.0, None))), make("ba", Scores((4.0, 3.0)))) == [Scores((2.0, 4.0))]
    assert judged(make("ab", Scores((1.0, 0.0)), weight=3.0), make("ab", Scores((5.0, 0.0)))) == [Scores((2.0, 0.0))]
    assert judged(make("a", Ratings({"u": (1.0,)})), make("a", Ratings({"u": (2.0,), "v": (5.0,)}))) == [
        Ratings({"u": (1.5,), "v": (5.0,)})
    ]
    votes = [Labels((True, False)), Labels((True, True)), Labels((False, None))]
    assert judged(*(make("ab", vote) for vote in votes)) == [Labels((True, None))]


def test_what_cannot_be_joined_stays() -> None:
    even = [make("a", Labels((True,))), make("a", Labels((False,)))]
    assert merge_annotators(even) == even
    alone = make("ab", Ranking(((0,), (1,))), "ben")
    assert merge_annotators([alone, make("ac", Best(0))])[0] == alone
    assert len(judged(make("ab", Best(0)), make("ab", Scores((1.0, 2.0))), make("ab", Best(1)))) == 2


def test_nobody_votes_against_what_was_not_judged() -> None:
    partial = [make("abc", Ranking(((0,), (1,)))), make("abc", Ranking(((1,), (0,))))]
    assert judged(*partial, make("abc", Best(2)), make("abc", Best(0))) == [
        partial[0].judgement, partial[1].judgement, Votes((1.0, 0.0, 1.0)),
    ]  # fmt: skip


def test_other_images_are_another_prompt() -> None:
    apart = [make("ab", Best(0), images=("cat.png",)), make("ab", Best(1), images=("dog.png",))]
    assert merge_annotators(apart) == apart


def test_margins_that_agree_are_kept() -> None:
    same = merge_annotators([make("ab", Best(0), margin=1.0), make("ab", Best(0), margin=1.0)])
    assert same[0].margin == 1.0
    assert merge_annotators([make("ab", Best(0), margin=1.0), make("ab", Best(0))])[0].margin is None
