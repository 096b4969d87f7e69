"""Metrics against hand numbers, scipy and scikit-learn, brute force, identities and extremes."""

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import kendalltau
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss, ndcg_score, roc_auc_score

from plaudit.evaluation import metrics


@pytest.fixture
def generator():
    return np.random.default_rng(7)


def both_orders(d):
    return np.concatenate([expit(d), expit(-d)]), np.concatenate([np.ones_like(d), np.zeros_like(d)])


def test_by_hand():
    d = [2.0, -1.0, 0.0, 0.5]
    assert metrics.pair_credits(d).tolist() == [1.0, 0.0, 0.5, 1.0]
    assert metrics.pair_accuracy(d) == 2.5 / 4
    assert metrics.pair_accuracy(d, [1, 1, 2, 0]) == (1 + 0 + 1) / 4
    assert metrics.pair_log_loss([0.0]) == pytest.approx(np.log(2), abs=1e-15)
    assert metrics.pair_log_loss([np.log(3.0)]) == pytest.approx(-np.log(0.75), abs=1e-15)
    assert metrics.pair_brier([np.log(3.0)]) == pytest.approx(0.0625, abs=1e-15)
    assert metrics.top_credit([1.0, 3.0, 3.0], [False, True, False]) == 0.5
    assert metrics.top_credit([1.0, 3.0, 3.0], [False, True, True]) == 1.0
    assert metrics.top_credit([1.0, 3.0, 3.0], [True, False, False]) == 0.0
    # DCG: gains 0 and 2 at ranks 1 and 2; ideal: 2 at rank 1
    assert metrics.ndcg([2.0, 0.0], [0.0, 1.0]) == pytest.approx(1 / np.log2(3))
    assert metrics.kendall_tau_b([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)


def test_calibration_error_by_hand():
    # Four pairs at p = 3/4, three of them won: calibrated. Both orders: bins {1/4, 3/4}.
    d = np.array([1.0, 1.0, 1.0, -1.0]) * np.log(3.0)
    assert metrics.expected_calibration_error(d, 2) == pytest.approx(0.0, abs=1e-12)
    # All four won: observed 1 against 3/4, in both bins.
    assert metrics.expected_calibration_error(np.abs(d), 2) == pytest.approx(0.25)
    curve = metrics.reliability_curve(np.abs(d), 2)
    assert curve.predicted == pytest.approx([0.25, 0.75])
    assert curve.observed == pytest.approx([0.0, 1.0])
    assert curve.weight.tolist() == [4.0, 4.0]
    # One bin holds both orders of every pair: mean prediction and mean label are 1/2.
    assert metrics.expected_calibration_error(np.abs(d), 1) == pytest.approx(0.0, abs=1e-12)


def test_agrees_with_scikit_learn(generator):
    d = generator.normal(0.4, 1.5, 500)
    prediction, label = both_orders(d)
    assert metrics.pair_log_loss(d) == pytest.approx(log_loss(label, prediction), rel=1e-12)
    assert metrics.pair_brier(d) == pytest.approx(brier_score_loss(label, prediction), rel=1e-12)
    difference, order = np.concatenate([d, -d]), np.concatenate([np.ones(500), np.zeros(500)])
    # The pairs themselves, not all of their combinations: accuracy is what AUC is for one pair at a time.
    each = [roc_auc_score([1, 0], [value, -value]) for value in d]
    assert metrics.pair_accuracy(d) == pytest.approx(np.mean(each), abs=1e-12)
    observed, predicted = calibration_curve(order, expit(difference), n_bins=10, strategy="quantile")
    curve = metrics.reliability_curve(d, 10)
    assert curve.predicted == pytest.approx(predicted, abs=2e-3)
    assert curve.observed == pytest.approx(observed, abs=0.02)


def test_temperature_is_the_logistic_regression_coefficient(generator):
    d = generator.normal(0.6, 2.0, 400)
    weights = generator.uniform(0.2, 2.0, 400)
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12, max_iter=10_000)
    model.fit(
        np.concatenate([d, -d])[:, None],
        np.repeat([1, 0], 400),
        sample_weight=np.concatenate([weights, weights]),
    )
    assert metrics.temperature(d, weights) == pytest.approx(1 / model.coef_[0, 0], rel=1e-5)


@pytest.mark.parametrize("seed", range(40))
def test_rank_metrics_agree_with_scipy_and_scikit_learn(seed):
    generator = np.random.default_rng(seed)
    size = int(generator.integers(2, 10))
    human, model = generator.integers(0, 4, size).astype(float), generator.integers(0, 5, size).astype(float)
    assert metrics.kendall_tau_b(human, model) == pytest.approx(kendalltau(human, model).statistic, nan_ok=True)
    if human.sum() > 0:
        assert metrics.ndcg(human, model) == pytest.approx(ndcg_score(human[None], model[None]), abs=1e-12)


def test_kendall_tau_of_pairs_without_ties_is_twice_accuracy_less_one(generator):
    for _ in range(20):
        human, model = generator.permutation(6), generator.permutation(6)
        d = [model[i] - model[j] for i in range(6) for j in range(6) if human[i] > human[j]]
        assert metrics.kendall_tau_b(human, model) == pytest.approx(2 * metrics.pair_accuracy(d) - 1)


def test_swapping_the_completions_of_a_pair_changes_nothing(generator):
    """A swapped record has scores and label exchanged: `d` is the same number. What could differ is the use of orders:
    flipping forward and backward must give the same bins."""
    d = np.round(generator.normal(0.3, 1.0, 300), 1)
    prediction, label = both_orders(d)
    swapped_prediction, swapped_label = prediction[::-1], label[::-1]
    bins = metrics.calibration_bins(d, 7)
    index = np.searchsorted(bins.edges, swapped_prediction, side="right")
    error = sum(
        abs(swapped_label[index == b].sum() - swapped_prediction[index == b].sum()) for b in range(bins.count)
    ) / len(swapped_label)
    assert metrics.expected_calibration_error(d, 7) == pytest.approx(error, abs=1e-12)


def test_perfectly_calibrated_model_has_no_calibration_error_and_temperature_one():
    generator = np.random.default_rng(1)
    true = generator.normal(0.0, 2.0, 200_000)
    d = np.where(generator.uniform(size=true.size) < expit(true), true, -true)
    error, noise = metrics.expected_calibration_error(d), metrics.calibration_noise(d)
    assert error < 3 * noise < 0.005
    # Fisher information of s = 1/T at 1: sum d^2 p (1 - p).
    deviation = 1 / np.sqrt((d**2 * expit(d) * expit(-d)).sum())
    assert abs(1 / metrics.temperature(d) - 1) < 4 * deviation
    assert metrics.temperature(3 * d) == pytest.approx(3 * metrics.temperature(d), rel=1e-9)
    assert metrics.expected_calibration_error(3 * d) > 0.1


def test_calibration_noise_is_what_calibrated_models_show():
    generator = np.random.default_rng(2)
    true = generator.normal(0.0, 1.5, 400)
    shown = []
    for _ in range(600):
        d = np.where(generator.uniform(size=400) < expit(true), true, -true)
        shown.append(metrics.expected_calibration_error(d))
    noise = metrics.calibration_noise(true)
    assert np.mean(shown) == pytest.approx(noise, rel=0.05)


def test_ties_of_the_model_share_a_bin_and_cost_no_calibration():
    assert metrics.expected_calibration_error(np.zeros(101)) == pytest.approx(0.0, abs=1e-12)
    assert metrics.pair_accuracy(np.zeros(101)) == 0.5
    assert metrics.calibration_bins(np.zeros(5)).count == 1
    d = np.array([0.0] * 50 + [1.0] * 3)
    prediction, _ = both_orders(d)
    bins = metrics.calibration_bins(d, 10)
    index = np.concatenate([bins.forward, bins.backward])
    for value in np.unique(prediction):
        assert np.unique(index[prediction == value]).size == 1


def test_bins_hold_equal_mass(generator):
    d = generator.normal(0.0, 3.0, 1000)
    sums = metrics.calibration_sums(d, metrics.calibration_bins(d, 10))
    assert sums[:, 0].tolist() == [200.0] * 10


def test_monotone_transforms_leave_ranks_alone(generator):
    human, model = generator.integers(0, 4, 8), generator.normal(size=8)
    assert metrics.kendall_tau_b(human, model) == metrics.kendall_tau_b(human, np.exp(model))
    assert metrics.ndcg(human, model) == metrics.ndcg(human, 5 * model - 3)


def test_partial_correlation_is_the_correlation_of_residuals(generator):
    z = generator.normal(size=200)
    x, y = z + generator.normal(size=200), 2 * z + generator.normal(size=200)
    x, y, z = (v - v.mean() for v in (x, y, z))
    sums = np.array([x @ x, y @ y, z @ z, x @ y, x @ z, y @ z])
    residual_x, residual_y = x - z * (x @ z) / (z @ z), y - z * (y @ z) / (z @ z)
    assert metrics.partial_correlation(sums) == pytest.approx(np.corrcoef(residual_x, residual_y)[0, 1], abs=1e-12)
    sums[[2, 4, 5]] = 0.0
    assert metrics.partial_correlation(sums) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert np.isnan(metrics.partial_correlation(np.array([0.0, 1, 1, 0, 0, 0])))
    # x is a multiple of z: nothing of x is left to correlate
    assert np.isnan(metrics.partial_correlation(np.array([z @ z, y @ y, z @ z, z @ y, z @ z, z @ y])))


def test_extremes():
    huge = np.array([1e4, -1e4, 1e4])
    assert metrics.pair_log_loss(huge) == pytest.approx(1e4 / 3)
    assert metrics.pair_brier(huge) == pytest.approx(1 / 3)
    assert metrics.temperature([1.0, 2.0]) == 0.0
    assert metrics.temperature([-1.0, 0.5]) == float("inf")
    assert metrics.temperature([0.0, 0.0]) == float("inf")
    assert metrics.temperature(huge) == pytest.approx(1e4 / np.log(2), rel=1e-9)
    assert logit(2 / 3) == pytest.approx(np.log(2))  # two of three right at one |d|: sigma(d / T) = 2/3
    for function in (
        metrics.pair_accuracy, metrics.pair_log_loss, metrics.pair_brier, metrics.temperature,
        metrics.expected_calibration_error, metrics.calibration_noise,
    ):  # fmt: skip
        assert np.isnan(function([]))
    assert np.isnan(metrics.kendall_tau_b([1, 1], [1, 2]))
    assert np.isnan(metrics.ndcg([0, 0], [1, 2]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.pair_accuracy([np.nan]), "not finite"),
        (lambda: metrics.pair_accuracy([[1.0]]), "shape"),
        (lambda: metrics.pair_accuracy([1.0], [1.0, 2.0]), "weights"),
        (lambda: metrics.pair_accuracy([1.0], [-1.0]), "negative"),
        (lambda: metrics.expected_calibration_error([1.0], 0), "bins"),
        (lambda: metrics.ndcg([-1, 0], [0, 1]), "negative"),
        (lambda: metrics.top_credit([1.0], [True, False]), "K"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
