"""What a picture of a comparison shows, and that nothing lies on it."""

import numpy as np
from matplotlib.transforms import Bbox

from plaudit.evaluation.intervals import Estimate
from plaudit.evaluation.overoptimisation import CurveFit
from plaudit.evaluation.policy_compare import BEST_OF_N, TILT, FrontierPoint, PolicyComparison
from plaudit.evaluation.policy_plots import frontier_plot


def point(run, label, kl, gain, half):
    """A point with a bar of this half length."""
    gains = dict.fromkeys(("gold", "proxy"), Estimate(gain, gain - half, gain + half, 96))
    return FrontierPoint(run, label, Estimate(kl, 0.92 * kl, 1.08 * kl, 96), gains, gains, {})


def test_the_legend_of_the_frontier_keeps_clear_of_points_and_bars():
    """Gains of the demo with seed 0, where the last bars reach up into the corner that no line passes."""
    best = [(0.0, 0.0, 0.0), (0.19, 1.02, 0.1), (0.64, 1.68, 0.17), (1.2, 2.07, 0.28), (1.84, 2.22, 0.52)]
    points = [point(BEST_OF_N, f"n = {2**place}", *values) for place, values in enumerate(best)]
    for number, values in enumerate(((1.32, 1.63, 0.33), (3.71, 2.17, 0.34), (4.17, 2.04, 0.3))):
        points.append(point("PPO", f"PPO/{number}", *values))
    points += [point(TILT, f"β of {kl}", kl, gain, 0.0) for kl, gain in ((0.1, 0.74), (0.5, 1.48), (1.0, 1.89))]
    fits = {
        (run, name): CurveFit(kind, *(Estimate(number, number, number, 4) for number in (alpha, beta, 2.0)), 0.0, 4)
        for name in ("gold", "proxy")
        for run, kind, alpha, beta in ((BEST_OF_N, "best_of_n", 2.74, 0.8), ("PPO", "reinforcement", 1.53, 0.69))
    }
    comparison = PolicyComparison(start=None, policies=[], points=points, fits=fits, proxy="proxy", gold="gold")
    plot = frontier_plot(comparison)
    plot.figure.draw_without_rendering()
    for axes in plot.figure.axes:
        place = axes.get_legend().get_window_extent()
        for each in points:
            gain = each.gains["gold"]
            ends = axes.transData.transform(np.array([[each.distance, gain.low], [each.distance, gain.high]]))
            assert not place.overlaps(Bbox(ends)), each.label
    assert len(plot.rows) == 2 * len(points)
