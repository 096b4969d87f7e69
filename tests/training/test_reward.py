"""Reward training reaches known optima, and its bookkeeping adds up."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from plaudit.configs.base import ConfigError, load_config
from plaudit.configs.reward import RewardTrainingConfig
from plaudit.configs.training import OptimizerConfig
from plaudit.data.records import (
    Best,
    Comparison,
    Demonstration,
    Judgement,
    Labels,
    Ranking,
    Ratings,
    Scores,
    Votes,
)
from plaudit.models.reward_model import RewardModel
from plaudit.training import reward
from plaudit.training.estimates import Estimate
from plaudit.training.guards import NonFiniteError
from plaudit.training.reward import RewardTrainingResult, main, prepare
from plaudit.training.reward_batches import MicroBatch
from plaudit.training.trackers import read_metrics
from tests.training.conftest import tiny_model

TEXTS = ("cat", "dog", "the mat", "a bad dog")


def config_for(tokenizer: str, output: Path, **options: Any) -> RewardTrainingConfig:
    """Full-batch training that converges on tiny problems."""
    settings = {"learning_rate": 1e-2, "weight_decay": 0.0, "warmup": 0.0}
    optimizer = OptimizerConfig(**{**settings, **options.pop("optimizer", {})})
    model = options.pop("model", None) or tiny_model(tokenizer)
    defaults = {"records_per_step": 1000, "epochs": 150, "quiet": True, "device": "cpu"}
    return RewardTrainingConfig(model=model, output=output, optimizer=optimizer, **{**defaults, **options})


def trained(config: RewardTrainingConfig, records: Sequence[Comparison], **options: Any) -> RewardTrainingResult:
    result = main(config, train=records, **options)
    assert isinstance(result, RewardTrainingResult)
    return result


def record(judgement: Judgement, texts: Sequence[str] = TEXTS, prompt: str = "why", **fields: Any) -> Comparison:
    return Comparison(prompt=prompt, completions=tuple(texts), judgement=judgement, **fields)


def pair(winner: str, loser: str, weight: float, **fields: Any) -> Comparison:
    return record(Ranking(((0,), (1,))), (winner, loser), weight=weight, **fields)


def scores_of(result: RewardTrainingResult, texts: Sequence[str] = TEXTS, prompt: str = "why") -> Tensor:
    model: RewardModel = result.model
    return model.score([prompt], [texts])[0].raw.double()


WINS = np.array([[0, 8, 6, 5], [4, 0, 7, 6], [3, 5, 0, 6], [4, 2, 5, 0]], dtype=float)


def test_pairs_reach_the_bradley_terry_maximum_likelihood(tokenizer_folder: str, tmp_path: Path) -> None:
    records = [pair(TEXTS[i], TEXTS[j], WINS[i, j]) for i in range(4) for j in range(4) if i != j]

    def negative_log_likelihood(r: np.ndarray) -> float:
        difference = r[:, None] - r[None, :]
        return float((WINS * np.log1p(np.exp(-difference))).sum())

    best = minimize(negative_log_likelihood, np.zeros(4)).x
    result = trained(config_for(tokenizer_folder, tmp_path), records)
    found = scores_of(result).numpy()
    np.testing.assert_allclose(found - found.mean(), best - best.mean(), atol=2e-3)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["loss"] == pytest.approx(negative_log_likelihood(best) / WINS.sum(), abs=1e-4)


def test_picks_reach_the_frequencies(tokenizer_folder: str, tmp_path: Path) -> None:
    counts = (5.0, 3.0, 1.0, 1.0)
    records = [record(Best(index), weight=count) for index, count in enumerate(counts)]
    result = trained(config_for(tokenizer_folder, tmp_path), records)
    expected = torch.tensor(counts) / sum(counts)
    torch.testing.assert_close(result.model.probabilities("why", TEXTS), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("ties", ["davidson", "rao_kupper"])
def test_ties_reach_the_maximum_likelihood_with_the_tie_parameter(
    tokenizer_folder: str, tmp_path: Path, ties: str
) -> None:
    wins, tied, losses = 6.0, 3.0, 2.0
    both = Ranking(((0, 1),))
    records = [pair("cat", "dog", wins), pair("dog", "cat", losses), record(both, ("cat", "dog"), weight=tied)]
    result = trained(config_for(tokenizer_folder, tmp_path, loss=ties), records)
    first, second = scores_of(result, ("cat", "dog")).tolist()
    parameter = result.tie_parameter
    assert parameter is not None
    strengths = math.exp(first), math.exp(second)
    if ties == "davidson":
        tie = math.exp(parameter) * math.sqrt(strengths[0] * strengths[1])
        win, equal = strengths[0] / (sum(strengths) + tie), tie / (sum(strengths) + tie)
    else:
        theta = 1 + math.exp(parameter)  # exp(softplus)
        win = strengths[0] / (strengths[0] + theta * strengths[1])
        equal = (theta**2 - 1) * win * strengths[1] / (strengths[1] + theta * strengths[0])
    # Two free parameters fit two free frequencies exactly.
    assert (win, equal) == pytest.approx((wins / 11, tied / 11), abs=2e-3)


def test_absolute_judgements_reach_their_means_and_log_odds(tokenizer_folder: str, tmp_path: Path) -> None:
    ratings = [record(Scores((value,)), ("cat",)) for value in (1.0, 2.0, 6.0)]
    result = trained(config_for(tokenizer_folder, tmp_path / "scores"), ratings)
    assert scores_of(result, ("cat",)).item() == pytest.approx(3.0, abs=1e-2)
    assert result.normalisation is None
    labels = [record(Labels((value,)), ("cat",)) for value in (True, True, True, False)]
    result = trained(config_for(tokenizer_folder, tmp_path / "labels"), labels)
    assert scores_of(result, ("cat",)).item() == pytest.approx(math.log(3), abs=1e-2)


def test_several_attributes(tokenizer_folder: str, tmp_path: Path) -> None:
    model = tiny_model(tokenizer_folder).model_copy(
        update={"attributes": ("helpful", "correct"), "attribute_weights": (0.5, 2.0)}
    )
    ratings = Ratings({"helpful": (1.0, 3.0), "correct": (2.0, None), "verbose": (9.0, 9.0)})
    # Longer than elsewhere: after 150 steps rounding still decides about the second digit.
    config = config_for(tokenizer_folder, tmp_path, model=model, epochs=300)
    result = trained(config, [record(ratings, ("cat", "dog"))])
    found = result.model.score(["why"], [["cat", "dog"]])[0]
    torch.testing.assert_close(found.attributes[0], torch.tensor([1.0, 2.0]), atol=1e-2, rtol=0)
    assert found.attributes[1, 0].item() == pytest.approx(3.0, abs=1e-2)
    assert found.raw[0].item() == pytest.approx(4.5, abs=5e-2)


def test_a_record_is_trained_on_the_same_thing_whatever_stands_beside_it(tokenizer_folder: str, tmp_path: Path) -> None:
    model = tiny_model(tokenizer_folder).model_copy(update={"attributes": ("helpful", "correct")})
    rated = record(Ratings({"helpful": (1.0, 3.0)}), ("cat", "dog"))
    scored = record(Scores((4.0, 2.0)), ("cat", "dog"), prompt="is it")
    config = config_for(tokenizer_folder, tmp_path, model=model, loss="regression")
    small = config.model_copy(update={"tokens_per_micro_batch": 1})
    together, gradients = gradient(config, [rated, scored])
    apart, others = gradient(small, [rated, scored])
    assert together == pytest.approx(apart, rel=1e-5)
    for name, value in gradients.items():
        # Gradients of up to 1400 here; in float32 sums in another order differ by some 4e-7 of a tensor's norm.
        assert (others[name] - value).norm() <= 1e-5 * value.norm(), name
    alone, _ = gradient(config, [rated])
    other, _ = gradient(config, [scored])
    assert together == pytest.approx((alone + other) / 2, rel=1e-5)
    unnamed = record(Ratings({"brief": (1.0, 3.0)}), ("cat", "dog"))
    with pytest.raises(ValueError, match="1 × no rating of the model's attributes"):
        prepare(config, [unnamed])


MIXED = [
    record(Ranking(((2,), (0, 3), (1,))), id="ranking", weight=2.0),
    record(Best(1), id="best", prompt="why is it"),
    record(Votes((3, 1, 0, 0)), id="votes", prompt="the cat sat on the mat"),
    record(Scores((3.5, 1.0, None, 2.0)), id="scores", prompt="is it"),
    record(Labels((True, False, None, True)), id="labels", prompt="why is the cat good", weight=0.5),
    record(Ratings({"helpful": (1.0, 2.0, 3.0, 4.0)}), id="ratings", prompt="very good"),
    record(Scores((2.0,)), ("yes",), id="one", prompt="is it bad"),
    pair("cat", "dog", 3.0, id="pair", prompt="so"),
]


def gradient(config: RewardTrainingConfig, records: Sequence[Comparison]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of the first step, before clipping."""
    trainer, _, _ = prepare(config, records)
    schedule = trainer.train.tokenised.schedule(config)
    weight, total, seen = sum(trainer.train.weights), 0.0, set()
    for _, micro in trainer.train.stream(schedule, 0, 1, trainer.device):
        total += trainer.backward(micro, weight)[0].item()
        seen.update(micro.indices)
    assert seen == set(range(len(records)))
    named = trainer.trained.named_parameters()
    return total, {name: p.grad.double() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("centring", [0.0, 0.1])
def test_micro_batches_add_up_to_one_big_batch(tokenizer_folder: str, tmp_path: Path, centring: float) -> None:
    big = config_for(tokenizer_folder, tmp_path, tokens_per_micro_batch=10_000, centring=centring)
    loss, expected = gradient(big, MIXED)
    for budget in (1, 40):
        small = big.model_copy(update={"tokens_per_micro_batch": budget})
        parts, found = gradient(small, MIXED)
        assert parts == pytest.approx(loss, rel=1e-6)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-6 * value.norm() + 1e-7, name


def test_weight_two_is_the_record_twice(tokenizer_folder: str, tmp_path: Path) -> None:
    config = config_for(tokenizer_folder, tmp_path)
    once = [each.model_copy() if hasattr(each, "model_copy") else each for each in MIXED]
    twice = [*once[1:], *[Comparison(**{**vars(once[0]), "weight": 1.0, "id": name}) for name in ("a", "b")]]
    loss, expected = gradient(config, once)
    again, found = gradient(config, twice)
    assert again == pytest.approx(loss, rel=1e-6)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm() + 1e-7, name


def test_gradient_checkpointing_changes_nothing(tokenizer_folder: str, tmp_path: Path) -> None:
    config = config_for(tokenizer_folder, tmp_path)
    loss, expected = gradient(config, MIXED)
    again, found = gradient(config.model_copy(update={"gradient_checkpointing": True}), MIXED)
    assert again == pytest.approx(loss, rel=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def test_shuffled_pairs_have_the_same_loss_over_the_data(tokenizer_folder: str, tmp_path: Path) -> None:
    rankings = [MIXED[0], record(Ranking(((1,), (0,), (3, 2))), prompt="is it", weight=0.5)]
    whole = config_for(tokenizer_folder, tmp_path)
    trainer, _, counts = prepare(whole.model_copy(update={"shuffled_pairs": True}), rankings)
    assert len(trainer.train.tokenised) == 10
    assert sum(trainer.train.weights) == pytest.approx(2.5)
    assert counts["comparisons"].read == counts["comparisons"].used == 10
    config = whole.model_copy(update={"shuffled_pairs": True})
    _, _ = gradient(whole, rankings)
    loss = prepare(whole, rankings)[0].evaluate(prepare(whole, rankings)[0].train)["loss"]
    assert trainer.evaluate(trainer.train)["loss"] == pytest.approx(loss, rel=1e-5)
    assert config.shuffled_pairs


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"margin": "constant", "margin_size": 0.7}, 0.7),
        ({"margin": "record"}, 0.4),
        ({"margin": "scores", "margin_size": 0.5}, 1.0),
        ({"label_smoothing": 0.1}, None),
    ],
)
def test_margins_and_smoothing_enter_the_loss(
    tokenizer_folder: str, tmp_path: Path, options: dict[str, Any], expected: float | None
) -> None:
    records = [record(Scores((3.0, 1.0)), ("cat", "dog"), margin=0.4)]
    config = config_for(tokenizer_folder, tmp_path, **options)
    trainer, _, _ = prepare(config, records)
    first, second = trainer.model.eval().score(["why"], [["cat", "dog"]])[0].raw.tolist()
    loss = trainer.micro_batch_loss([0], 1.0)[0].item()

    def minus_log_sigmoid(x: float) -> float:
        return math.log1p(math.exp(-x))

    if expected is None:
        by_hand = 0.9 * minus_log_sigmoid(first - second) + 0.1 * minus_log_sigmoid(second - first)
    else:
        by_hand = minus_log_sigmoid(first - second - expected)
    assert loss == pytest.approx(by_hand, rel=1e-5)
    assert trainer.evaluate(trainer.train)["loss"] == pytest.approx(minus_log_sigmoid(first - second), rel=1e-5)


def test_refused_records_are_counted_by_reason(
    tokenizer_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        *MIXED[:2],
        record(Ranking(((0, 1, 2, 3),))),
        record(Best(0), weight=0.0),
        record(Labels((None,)), ("yes",)),
        pair("cat " * 200, "dog", 1.0, id="long"),
    ]
    config = config_for(tokenizer_folder, tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"^long: .*on_error: skip leaves such records out"):
        main(config, train=records)
    config = config.model_copy(update={"on_error": "skip", "quiet": False})
    counts = trained(config, records).records["comparisons"]
    assert (counts["read"], counts["used"]) == (6, 2)
    assert counts["refused"] == {
        "no untied pair": 1,
        "weight 0": 1,
        "no absolute judgement for classification": 1,
        "too long": 1,
    }
    assert "comparisons: 6 read, 2 used, 4 refused (1 × no untied pair" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no usable comparison is left"):
        main(config.model_copy(update={"overwrite": True}), train=records[2:3])


def test_non_finite_loss_names_the_records_and_leaves_the_weights(
    tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[RewardModel] = []
    original = reward.RewardTrainer.loss

    def poisoned(self: Any, table: Tensor, micro: MicroBatch, weight_sum: float) -> Any:
        models.append(self.model)
        loss, sums = original(self, table, micro, weight_sum)
        names = [self.train.tokenised.names[index] for index in micro.indices]
        return (loss * math.nan if "votes" in names else loss), sums

    monkeypatch.setattr(reward.RewardTrainer, "loss", poisoned)
    config = config_for(tokenizer_folder, tmp_path, tokens_per_micro_batch=1)
    before = RewardModel.from_backbone(config.model).state_dict()
    with pytest.raises(NonFiniteError, match=r"step 0: the loss is nan.*Records: votes\."):
        main(config, train=MIXED)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, before[name]), name


def test_normalisation_puts_demonstrations_at_zero(tokenizer_folder: str, tmp_path: Path) -> None:
    demonstrations = [
        Demonstration(prompt="why", completion="cat"),
        Demonstration(prompt="why", completion="dog"),
        Demonstration(prompt="is it", completion="yes"),
    ]
    config = config_for(tokenizer_folder, tmp_path / "a", epochs=3)
    result = trained(config, MIXED[:2], demonstrations=demonstrations)
    opened = RewardModel.from_pretrained(result.model_folder)
    first, second = opened.score(["why", "is it"], [["cat", "dog"], ["yes"]])
    assert (first.normalised.mean() + second.normalised.mean()).item() / 2 == pytest.approx(0.0, abs=1e-6)
    raw = [*first.raw.tolist(), second.raw.item()]
    mean = ((raw[0] + raw[1]) / 2 + raw[2]) / 2
    variance = (((raw[0] - mean) ** 2 + (raw[1] - mean) ** 2) / 2 + (raw[2] - mean) ** 2) / 2
    assert result.normalisation is not None
    assert result.normalisation.mean[0] == pytest.approx(mean, abs=1e-6)
    assert result.normalisation.std[0] == pytest.approx(math.sqrt(variance), abs=1e-6)
    # Other tools cannot hold a bias: with none left they see the same raw scores.
    assert not opened.head.bias.any()
    without = trained(config_for(tokenizer_folder, tmp_path / "b", epochs=3), MIXED[:2])
    texts = [result.normalised for result in without.model.score(["why", "why is it"], [TEXTS, TEXTS])]
    assert torch.cat(texts).mean().item() == pytest.approx(0.0, abs=1e-6)


def test_demonstrations_that_do_not_fit_are_found_before_the_first_step(tokenizer_folder: str, tmp_path: Path) -> None:
    short = Demonstration(prompt="why", completion="cat")
    long = Demonstration(prompt="why", completion="cat " * 500, id="endless")
    config = config_for(tokenizer_folder, tmp_path, epochs=2)
    with pytest.raises(ValueError, match=r"endless: .*on_error: skip leaves such records out"):
        main(config, train=MIXED[:2], demonstrations=[short, long])
    assert not any(tmp_path.iterdir())
    result = trained(config.model_copy(update={"on_error": "skip"}), MIXED[:2], demonstrations=[short, long])
    assert result.records["demonstrations"] == {"read": 2, "used": 1, "refused": {"too long": 1}}
    assert result.model.score(["why"], [["cat"]])[0].normalised.item() == pytest.approx(0.0, abs=1e-6)


def test_best_weights_are_kept_and_patience_stops(tokenizer_folder: str, tmp_path: Path) -> None:
    train = [pair("cat", "dog", 1.0), pair("good cat", "bad dog", 1.0)]
    held_out = [pair("cat", "dog", 2.0, prompt="is it"), pair("dog", "cat", 1.0, prompt="is it")]
    config = config_for(
        tokenizer_folder, tmp_path, epochs=100, evaluate_every=1, patience=3, tolerance=1e-4, keep_last=1
    )
    result = trained(config, train, held_out=held_out)
    evaluations = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "eval/log_loss" in line]
    values = [line["eval/log_loss"] for line in evaluations]
    assert result.stopped_by == "patience"
    assert result.steps == len(values) < 100
    assert result.best_step == int(np.argmin(values)) + 1 < result.steps
    assert result.metrics["log_loss"] == min(values)
    difference = (scores_of(result, ("cat", "dog"), "is it").diff() * -1).item()
    by_hand = (2 * math.log1p(math.exp(-difference)) + math.log1p(math.exp(difference))) / 3
    assert by_hand == pytest.approx(min(values), abs=1e-5)
    assert json.loads((tmp_path / "result.json").read_text())["best_step"] == result.best_step


def test_a_damaged_best_checkpoint_is_reported_and_the_last_weights_kept(
    tokenizer_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, held_out = [pair("cat", "dog", 1.0)], [pair("dog", "cat", 1.0, prompt="is it")]
    config = config_for(tokenizer_folder, tmp_path, epochs=3, evaluate_every=1, keep_last=1)
    first = trained(config, train, held_out=held_out)
    assert first.best_step == 1
    (tmp_path / "checkpoints" / "step-000000001" / "state.pt").unlink()
    again = trained(config.model_copy(update={"resume": True}), train, held_out=held_out)
    assert "DAMAGED CHECKPOINT of the best step 1" in capsys.readouterr().err
    assert again.metrics["log_loss"] > first.metrics["log_loss"]
    with pytest.raises(ValueError, match="patience: 2 needs held-out records"):
        main(config.model_copy(update={"patience": 2, "overwrite": True}), train=train)


def test_folders_with_a_run_are_not_touched_by_accident(tokenizer_folder: str, tmp_path: Path) -> None:
    config = config_for(tokenizer_folder, tmp_path, epochs=2)
    first = trained(config, MIXED[:2])
    with pytest.raises(ValueError, match="already holds a run"):
        main(config, train=MIXED[:2])
    resume = config.model_copy(update={"resume": True})
    with pytest.raises(ValueError, match="made with other training records"):
        main(resume, train=MIXED[:3])
    with pytest.raises(ValueError, match="made with other held-out records"):
        main(resume, train=MIXED[:2], held_out=MIXED[2:])
    other = resume.model_copy(update={"label_smoothing": 0.1})
    written = (tmp_path / "configuration.yaml").read_text()
    with pytest.raises(ValueError, match=r"label_smoothing: 0\.0 then, 0\.1 now"):
        main(other, train=MIXED[:2])
    slower = resume.model_copy(update={"optimizer": resume.optimizer.model_copy(update={"weight_decay": 0.5})})
    with pytest.raises(ValueError, match=r"configuration \(optimizer.weight_decay: 0\.\d+ then, 0\.5 now\);"):
        main(slower, train=MIXED[:2])
    assert (tmp_path / "configuration.yaml").read_text() == written, "a refused run left its configuration there"
    (tmp_path / "file").touch()
    for output, message in ((tmp_path / "file", "is a file; name a folder"), (tmp_path, "already holds a run")):
        with pytest.raises(ValueError, match=message):
            main(config.model_copy(update={"output": output, "data": ("missing.jsonl",)}))
    again = trained(resume, MIXED[:2])
    assert again.steps == first.steps == 2
    assert torch.equal(scores_of(again), scores_of(first))
    longer = trained(resume.model_copy(update={"epochs": 4.0}), MIXED[:2])
    assert longer.steps == 4
    fresh = trained(config.model_copy(update={"overwrite": True}), MIXED[:2])
    assert torch.equal(scores_of(fresh), scores_of(first))


def test_dry_run_writes_nothing_and_counts(
    tokenizer_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tokenizer_folder, tmp_path / "run", epochs=2.5, records_per_step=3, quiet=False)
    before = torch.random.get_rng_state()
    estimate = main(config, train=MIXED, dry_run=True, held_out=[pair("cat", "dog", 1.0, prompt="bad")])
    assert isinstance(estimate, Estimate)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not (tmp_path / "run").exists()
    assert (estimate.num_records, estimate.steps) == (8, 8)
    assert estimate.tokens_per_epoch == sum(prepare(config, MIXED)[0].train.tokenised.lengths)
    assert estimate.state_bytes == 16 * estimate.parameters
    assert estimate.seconds > 0
    printed = capsys.readouterr()
    assert "(measured in a trial pass)" in printed.out
    assert "comparisons: 8 read, 8 used, 0 refused" in printed.err


def test_records_from_files_with_a_held_out_share(tokenizer_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": f"why {'cat ' * n}", "completions": ["good", "bad"], "best": 0} for n in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config_for(tokenizer_folder, tmp_path / "run", epochs=1, data=(str(path),), held_out_fraction=0.3)
    result = main(config)
    assert isinstance(result, RewardTrainingResult)
    train, held = result.records["comparisons"], result.records["held-out comparisons"]
    assert train["read"] + held["read"] == 20
    assert 2 <= held["used"] <= 12
    assert set(result.metrics) == {"loss", "log_loss", "accuracy", "margin", "mean_reward"}
    with pytest.raises(ConfigError, match="handed over as well"):
        main(config.model_copy(update={"overwrite": True}), train=MIXED)


def test_prompts_on_both_sides_are_said_aloud(
    tokenizer_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(config_for(tokenizer_folder, tmp_path, epochs=1), MIXED[:2], held_out=MIXED[:1])
    assert "1 prompts stand in the training and in the held-out records" in capsys.readouterr().err


def test_bfloat16_keeps_scores_and_loss_in_float32(tokenizer_folder: str, tmp_path: Path) -> None:
    config = config_for(tokenizer_folder, tmp_path, epochs=60, precision="bf16")
    trainer, _, _ = prepare(config, MIXED[:2])
    scores = trainer.scores(trainer.train.micro_batch([0, 1]))
    assert scores.dtype == trainer.model.total(scores).dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in trainer.trained.parameters())
    counts = (5.0, 3.0, 1.0, 1.0)
    result = trained(config, [record(Best(index), weight=count) for index, count in enumerate(counts)])
    expected = torch.tensor(counts) / sum(counts)
    torch.testing.assert_close(result.model.probabilities("why", TEXTS), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "best_of_k", "margin": "constant"}, "margin: constant has no meaning for loss: best_of_k"),
        ({"loss": "davidson", "label_smoothing": 0.1}, "label_smoothing: 0.1 has no meaning"),
        ({"loss": "votes", "shuffled_pairs": True}, "shuffled_pairs needs loss: pairwise"),
        ({"top": 2}, "top: 2 is an option of loss: plackett_luce"),
        ({"held_out": ["a"], "held_out_fraction": 0.1}, "not both"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"tolerance": 0.1}, "no effect without patience"),
        ({"optimizer": {"momentum": 0.9}}, "momentum is an option of sgd"),
        ({"optimiser": {}}, "did you mean 'optimizer'"),
    ],
)
def test_meaningless_configurations_are_refused(options: dict[str, Any], message: str) -> None:
    base = {"model": {"backbone": "x"}, "data": ["train.jsonl"]}
    load_config(RewardTrainingConfig, overrides=base)
    with pytest.raises(ConfigError, match=message):
        load_config(RewardTrainingConfig, overrides=base | options)
