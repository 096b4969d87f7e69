"""Targets by hand, for every kind of judgement."""

import pytest
import torch

from plaudit.data.records import Best, Comparison, Judgement, Labels, Ranking, Ratings, Scores, Votes
from plaudit.data.targets import PreferenceTargets, make_targets


def record(judgement: Judgement, count: int = 3, **changes: float | str | None) -> Comparison:
    texts = tuple(f"answer {i}" for i in range(count))
    return Comparison(prompt="p", completions=texts, judgement=judgement, **changes)  # type: ignore[arg-type]


def one(judgement: Judgement, count: int = 3, num_slots: int | None = None, **arguments: float) -> PreferenceTargets:
    return make_targets([record(judgement, count)], num_slots=num_slots, **arguments)  # type: ignore[arg-type]


def test_ranking_with_ties_and_an_unjudged_completion() -> None:
    targets = one(Ranking(((2,), (0, 3))), 5, num_slots=6)
    assert targets.mask.tolist() == [[True] * 5 + [False]]
    assert targets.judged.tolist() == [[True, False, True, True, False, False]]
    assert targets.tiers.tolist() == [[1, -1, 0, 1, -1, -1]]
    assert targets.best.tolist() == [2]
    assert targets.votes.tolist() == [[0, 0, 1, 0, 0, 0]]
    assert not targets.score_mask.any()
    assert targets.ratings.shape == (1, 6, 0)


def test_a_shared_best_tier_is_no_pick_but_a_shared_vote() -> None:
    targets = one(Ranking(((0, 2), (1,))))
    assert targets.best.tolist() == [-1]
    assert targets.votes.tolist() == [[0.5, 0, 0.5]]
    # All in one tier: nobody was preferred.
    tied = one(Ranking(((0, 1, 2),)))
    assert (tied.best.tolist(), tied.votes.sum().item()) == ([-1], 0)


def test_pick() -> None:
    targets = one(Best(1))
    assert targets.best.tolist() == [1]
    assert targets.tiers.tolist() == [[1, 0, 1]]
    assert targets.votes.tolist() == [[0, 1, 0]]


def test_votes() -> None:
    targets = one(Votes((1, 4, 1, 0)), 4)
    assert targets.votes.tolist() == [[1, 4, 1, 0]]
    assert targets.tiers.tolist() == [[1, 0, 1, 2]]
    assert targets.best.tolist() == [1]
    assert one(Votes((2, 2, 0))).best.tolist() == [-1]
    assert one(Votes((2, 2, 0))).votes.tolist() == [[2, 2, 0]]


def test_scores_and_tie_threshold() -> None:
    targets = one(Scores((3.5, None, 4.0, 1.0)), 4)
    assert targets.scores.tolist() == [[3.5, 0, 4.0, 1.0]]
    assert targets.score_mask.tolist() == [[True, False, True, True]]
    assert targets.tiers.tolist() == [[1, -1, 0, 2]]
    assert targets.best.tolist() == [2]
    near = one(Scores((3.5, None, 4.0, 1.0)), 4, tie_threshold=1.0)
    assert near.tiers.tolist() == [[0, -1, 0, 1]]


def test_labels_are_zero_and_one_also_for_a_single_completion() -> None:
    targets = make_targets([record(Labels((True, False, None))), record(Labels((False,)), 1)])
    assert targets.scores.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert targets.score_mask.tolist() == [[True, True, False], [True, False, False]]
    assert targets.tiers.tolist() == [[0, 1, -1], [0, -1, -1]]
    assert targets.best.tolist() == [0, -1]


def test_ratings() -> None:
    ratings = Ratings({"helpful": (1.0, 5.0, None), "correct": (4.0, 2.0, 1.0)})
    targets = make_targets([record(ratings)], attributes=("correct", "helpful", "brief"))
    assert targets.ratings[0, :, 0].tolist() == [4, 2, 1]
    assert targets.ratings[0, :, 1].tolist() == [1, 5, 0]
    assert targets.rating_mask[0].tolist() == [[True, True, False], [True, True, False], [True, False, False]]
    assert targets.scores.tolist() == [[5, 7, 0]]
    assert targets.score_mask.tolist() == [[True, True, False]]
    assert targets.best.tolist() == [1]
    weighted = make_targets([record(ratings)], attribute_weights={"correct": 2.0})
    assert weighted.scores.tolist() == [[8, 4, 2]]
    assert weighted.best.tolist() == [0]


def test_weights_margins_and_devices() -> None:
    targets = make_targets([record(Best(0), weight=2.5, margin=0.25), record(Best(0), 2)])
    assert targets.weights.tolist() == [2.5, 1.0]
    assert targets.margins.tolist() == [0.25, 0.0]
    assert targets.num_prompts == 2
    assert targets.mask.tolist() == [[True] * 3, [True, True, False]]
    moved = targets.to("meta")
    assert {t.device.type for t in vars(moved).values()} == {"meta"}
    assert targets.to("cpu").tiers.equal(targets.tiers)
    wanted = {"tiers": torch.int64, "best": torch.int64, "mask": torch.bool, "votes": torch.float32}
    assert {name: getattr(targets, name).dtype for name in wanted} == wanted


@pytest.mark.parametrize(
    ("judgement", "message"),
    [
        (Ranking(((0,), (3,))), "judges completion 3 of only 3"),
        (Best(-1), "judges completion -1 of only 3"),
        (Scores((1.0, 2.0)), "comparison 0 has 3 completions but 2 judged values"),
        (Votes((1, 2)), "3 completions but 2 judged values"),
        (Votes((1, 2, 3, 4)), "judges completion 3 of only 3"),
    ],
)
def test_judgements_that_do_not_cover_are_refused(judgement: Judgement, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one(judgement)


def test_too_many_completions_or_none_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="3 completions, more than num_slots 2"):
        one(Best(0), num_slots=2)
    with pytest.raises(ValueError, match="no comparisons"):
        make_targets([])
