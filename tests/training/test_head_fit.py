"""The fitted head: an optimum by its own gradient, another library's answer, and a ridge that follows the evidence."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from plaudit.configs.model import RewardModelConfig
from plaudit.configs.reward import RewardTrainingConfig
from plaudit.data.records import Best, Comparison, Judgement, Labels, Ranking, Ratings, Scores, Votes
from plaudit.data.targets import make_targets
from plaudit.models.reward_model import RewardModel
from plaudit.training import head_fit
from plaudit.training.head_fit import choose_ridge, fit_linear, linear_loss
from plaudit.training.objectives import PreferenceObjective
from plaudit.training.reward import main, prepare
from tests.training.conftest import WORDS, tiny_model


def setting(loss: str = "auto", **fields: object) -> RewardTrainingConfig:
    return RewardTrainingConfig.model_validate({"model": RewardModelConfig(backbone="x"), "loss": loss, **fields})


def judged(judgement: Judgement, count: int) -> Comparison:
    return Comparison(prompt="q", completions=tuple("abcdef"[:count]), judgement=judgement)


def test_pairs_give_the_logistic_regression_of_another_library() -> None:
    generator = np.random.default_rng(0)
    features = torch.tensor(generator.normal(size=(60, 2, 5)) * [1.0, 3.0, 0.2, 1.0, 1.0], dtype=torch.float32)
    signs = np.where(generator.random(60) < 0.7, 0, 1)
    records = [judged(Ranking(((int(sign),), (1 - int(sign),))), 2) for sign in signs]
    ridge = 0.05
    weight, bias = fit_linear(
        features, make_targets(records), ["pairwise"] * 60, PreferenceObjective(setting()), ridge=ridge
    )
    spread = features.reshape(-1, 5).std(0)
    differences = ((features[:, 0] - features[:, 1]) / spread).numpy() * np.where(signs == 0, 1, -1)[:, None]
    # Both orientations, so that there are two classes: the sum of 2·60 losses is 120 times the mean.
    peer = LogisticRegression(C=1 / (120 * ridge), fit_intercept=False, tol=1e-10, max_iter=1000)
    peer.fit(np.concatenate([differences, -differences]), np.repeat([1, 0], 60))
    assert torch.allclose(weight[0] * spread, torch.tensor(peer.coef_[0], dtype=torch.float32), atol=2e-4)
    assert bias.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("loss", "judgement"),
    [
        ("pairwise", Ranking(((2,), (0, 1), (3,)))),
        ("best_of_k", Best(1)),
        ("votes", Votes((2.0, 1.0, 0.0, 4.0))),
        ("plackett_luce", Ranking(((3,), (0,), (1, 2)))),
        ("davidson", Ranking(((3,), (0,), (1, 2)))),
        ("regression", Scores((1.0, -2.0, 0.5, 3.0))),
        ("classification", Labels((True, False, None, True))),
    ],
)
def test_the_gradient_vanishes_at_the_fit(loss: str, judgement: Judgement) -> None:
    features = torch.randn(12, 4, 3, generator=torch.Generator().manual_seed(1))
    targets = make_targets([judged(judgement, 4)] * 12)
    objective = PreferenceObjective(setting(loss))
    weight, bias = fit_linear(features, targets, [loss] * 12, objective, ridge=0.3)
    assert objective.tie_parameter is None or objective.tie_parameter.grad is None
    spread = features.reshape(-1, 3).std(0).double()
    scaled = (weight.double() * spread).requires_grad_()
    shift = bias.double().requires_grad_()
    found = linear_loss(features.double() / spread, scaled, shift, targets, [loss] * 12, objective)
    (found + 0.15 * scaled.square().sum()).backward()
    assert scaled.grad is not None
    assert shift.grad is not None
    assert scaled.abs().max() > 1e-3
    assert scaled.grad.abs().max() < 1e-4
    assert shift.grad.abs().max() < 1e-4


def test_the_ridge_follows_the_evidence(tokenizer_folder: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    chosen = {}
    for kind in ("signal", "noise"):
        records = []
        for number in range(60):
            words = [WORDS[i] for i in torch.randint(len(WORDS), (2,), generator=generator).tolist()]
            if words[0] == words[1]:
                continue
            best = 0 if kind == "signal" else int(torch.randint(2, (), generator=generator))
            texts = ("good " + words[0], "bad " + words[1])
            records.append(
                Comparison(prompt=f"why {number}", completions=texts, judgement=Ranking(((best,), (1 - best,))))
            )
        config = RewardTrainingConfig(model=tiny_model(tokenizer_folder), output=tmp_path, quiet=True, device="cpu")
        trainer, *_ = prepare(config, records, fit=False)
        features = torch.randn(len(records), 2, 4, generator=generator)
        if kind == "signal":
            features[:, 0, 0] += 2.0
        targets = trainer.train.targets(range(len(records)), 2)
        prompts = [str(each.prompt) for each in records]
        losses = choose_ridge(features, targets, trainer.train.losses, prompts, trainer.objective)
        chosen[kind] = min(losses, key=lambda each: losses[each])
        assert (min(losses.values()) < 0.5) == (kind == "signal")
    assert chosen["signal"] < 0.1 < 1 <= chosen["noise"]


def test_the_loss_of_a_ridge_is_that_of_prompts_never_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two records of each of 11 prompts, with weights; smoothing is for training, not for choosing."""
    monkeypatch.setattr(head_fit, "RIDGES", (0.1, 1.0))
    features = torch.randn(22, 2, 3, generator=torch.Generator().manual_seed(2))
    weights = torch.arange(1, 23).double()
    records = [replace(judged(Ranking(((0,), (1,))), 2), weight=weight) for weight in weights.tolist()]
    keys = [f"q{number // 2}" for number in range(22)]
    objective = PreferenceObjective(setting(label_smoothing=0.2))
    targets, losses = make_targets(records), ["pairwise"] * 22
    found = choose_ridge(features, targets, losses, keys, objective)
    folds = torch.arange(22) // 2 % 5
    for ridge, value in found.items():
        total = 0.0
        for fold in range(5):
            rows = (folds != fold).nonzero()[:, 0]
            head, _ = fit_linear(features, targets, losses, objective, ridge=ridge, rows=rows)
            margins = ((features[:, 0] - features[:, 1]) @ head[0])[folds == fold].double()
            total += (weights[folds == fold] * torch.nn.functional.softplus(-margins)).sum().item()
        assert value == pytest.approx(total / weights.sum().item(), rel=1e-5)


@pytest.mark.parametrize("budget", [1, 10_000])
def test_features_are_what_the_head_reads_when_it_scores(tokenizer_folder: str, tmp_path: Path, budget: int) -> None:
    """Also for groups that take several passes, and although the model is in training with dropout."""
    records = [
        Comparison(prompt=f"why {word}", completions=("good", "a very bad cat", word), judgement=Best(0))
        for word in ("dog", "mat")
    ]
    config = RewardTrainingConfig(
        model=tiny_model(tokenizer_folder, dropout=0.3), output=tmp_path, quiet=True, device="cpu",
        tokens_per_micro_batch=budget,
    )  # fmt: skip
    trainer, *_ = prepare(config, records, fit=False)
    features = head_fit.completion_features(trainer.model, trainer.train, token_budget=budget)
    assert trainer.model.training
    assert features.shape == (2, 3, 16)
    scores = features @ trainer.model.head.weight[0] + trainer.model.head.bias[0]
    wanted = trainer.model.eval().score([each.prompt for each in records], [each.completions for each in records])
    assert torch.allclose(scores, torch.stack([each.raw for each in wanted]), atol=1e-5)


def test_a_run_starts_at_the_fit(tokenizer_folder: str, tmp_path: Path) -> None:
    records = [
        Comparison(prompt=f"why {word}", completions=("good " + word, "bad " + word), judgement=Ranking(((0,), (1,))))
        for word in WORDS
        for _ in "ab"
    ]
    fixed = {"learning_rate": 1e-12, "head_learning_rate": 1e-12, "weight_decay": 0.0}
    losses = {}
    for start in ("random", "fitted"):
        config = RewardTrainingConfig.model_validate(
            {"model": tiny_model(tokenizer_folder), "output": tmp_path / start, "quiet": True, "device": "cpu",
             "max_steps": 1, "head_start": start, "optimizer": fixed}
        )  # fmt: skip
        result = main(config, train=records)
        scores = RewardModel.from_pretrained(tmp_path / start / "model").score(
            [each.prompt for each in records], [each.completions for each in records]
        )
        losses[start] = sum(math.log1p(math.exp(-(one.raw[0] - one.raw[1]).item())) for one in scores) / len(records)
        assert not isinstance(result, type(None))
    assert losses["fitted"] < 0.1 < losses["random"]


def test_frozen_layers_of_a_run_are_those_of_the_backbone(tokenizer_folder: str, tmp_path: Path) -> None:
    """Bit for bit, while the layer above them and the fitted head move."""
    whole = RewardModel.from_backbone(tiny_model(tokenizer_folder, num_hidden_layers=2))
    whole.backbone.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    whole.tokenizer.save_pretrained(tmp_path / "base")
    records = [
        Comparison(prompt=f"why {word}", completions=("good " + word, "bad " + word), judgement=Ranking(((0,), (1,))))
        for word in WORDS
    ]
    config = RewardTrainingConfig.model_validate(
        {"model": {"backbone": str(tmp_path / "base"), "frozen_layers": 1, "template": "raw"}, "quiet": True,
         "output": tmp_path / "run", "device": "cpu", "max_steps": 1, "head_start": "fitted"}
    )  # fmt: skip
    main(config, train=records)
    before = dict(whole.backbone.named_parameters())
    after = RewardModel.from_pretrained(tmp_path / "run" / "model").backbone
    same = {name: torch.equal(before[name], value) for name, value in after.named_parameters()}
    assert {name for name, equal in same.items() if equal} == {
        name for name in before if name.startswith(("embed_tokens.", "layers.0."))
    }


def test_several_outputs_are_fitted_together() -> None:
    # Twice as many features as completions: the ratings can be met exactly, each by its own row of W.
    texts, ratings = 4, {"kind": (2.0, -1.0, 0.0, 3.0), "brief": (1.0, 1.0, -2.0, 0.5)}
    features = torch.randn(1, texts, 8, generator=torch.Generator().manual_seed(5))
    targets = make_targets([judged(Ratings(ratings), texts)], num_slots=texts, attributes=("kind", "brief"))
    objective = PreferenceObjective(setting())
    weight, bias = fit_linear(features, targets, ["regression"], objective, attribute_weights=(0.5, 0.5), ridge=1e-6)
    assert weight.shape == (2, 8)
    expected = torch.tensor([ratings["kind"], ratings["brief"]]).T
    assert torch.allclose(features[0] @ weight.T + bias, expected, atol=1e-2)
