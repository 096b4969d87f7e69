"""Which loss a judgement gets, and that nobody is said to have called two completions equal who did not."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from plaudit.configs.model import RewardModelConfig
from plaudit.configs.reward import RewardTrainingConfig
from plaudit.data.records import Best, Comparison, Judgement, Labels, Ranking, Ratings, Scores, Votes
from plaudit.data.targets import make_targets
from plaudit.training.objectives import PreferenceObjective, explode_pairs, loss_of, tie_rate


def record(judgement: Judgement, count: int = 3, **fields: float) -> Comparison:
    return Comparison(prompt="q", completions=tuple("abcdef"[:count]), judgement=judgement, **fields)  # type: ignore[arg-type]


def config(loss: str) -> RewardTrainingConfig:
    return RewardTrainingConfig.model_validate({"model": RewardModelConfig(backbone="x"), "loss": loss})


@pytest.mark.parametrize("ties", ["davidson", "rao_kupper"])
@pytest.mark.parametrize("judgement", [Best(0), Votes((3.0, 0.0, 0.0)), Labels((True, False, False))])
def test_completions_that_were_not_compared_are_no_ties(ties: str, judgement: Judgement) -> None:
    objective = PreferenceObjective(config(ties))
    scores = torch.tensor([[1.0, -0.5, 0.25]])
    one = record(judgement)
    loss, _ = objective(scores, scores, make_targets([one]), [loss_of(one, config(ties))], normaliser=1.0)
    wins = -(logsigmoid(torch.tensor(1.5)) + logsigmoid(torch.tensor(0.75))) / 2
    torch.testing.assert_close(loss, wins)
    assert objective.tie_parameter is not None
    assert not loss.requires_grad


@pytest.mark.parametrize(
    "judgement", [Ranking(((0, 1), (2,))), Scores((2.0, 2.0, 1.0)), Ratings({"u": (2.0, 2.0, 1.0)})]
)
def test_declared_ties_teach_the_tie_parameter(judgement: Judgement) -> None:
    objective = PreferenceObjective(config("davidson"))
    scores = torch.tensor([[1.0, -0.5, 0.25]])
    one = record(judgement)
    loss, _ = objective(scores, scores, make_targets([one]), [loss_of(one, config("davidson"))], normaliser=1.0)
    loss.backward()
    assert objective.tie_parameter is not None
    assert objective.tie_parameter.grad is not None


def test_the_tie_rate_counts_only_what_could_be_tied() -> None:
    judgements = [Ranking(((0, 1),)), Ranking(((0,), (1,))), Votes((2.0, 2.0)), Best(0), Labels((True, False))]
    assert tie_rate([record(judgement, 2) for judgement in judgements], 0.0) == 0.5


def test_shuffled_pairs_keep_every_record_and_every_weight() -> None:
    records = [record(Ranking(((0,), (1, 2))), weight=3.0), record(Scores((1.0,)), 1), record(Ranking(((0, 1, 2),)))]
    exploded = explode_pairs(records)
    assert [(each.completions, each.weight) for each in exploded[:2]] == [(("a", "b"), 1.5), (("a", "c"), 1.5)]
    assert exploded[2:] == records[1:]


def test_a_loss_without_a_branch_is_an_error_and_not_a_regression() -> None:
    one, scores = record(Ranking(((0,), (1,), (2,)))), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="'new_loss' has no branch"):
        PreferenceObjective(config("pairwise"))(scores, scores, make_targets([one]), ["new_loss"], normaliser=1.0)
