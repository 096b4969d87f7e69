"""Policies against their starting model: every number with its interval, best of n, the frontier and its fits."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from plaudit.data.records import PromptRecord
from plaudit.evaluation.best_of_n import best_of_n_kl, best_of_n_means, best_of_n_sizes, joint
from plaudit.evaluation.intervals import Estimate, Statistic
from plaudit.evaluation.metrics import FloatArray
from plaudit.evaluation.overoptimisation import CurveFit, CurveKind, distance_of, fit_curve
from plaudit.evaluation.policy_answers import Answers
from plaudit.evaluation.policy_statistics import (
    Clusters,
    answer_statistics,
    clusters_of,
    difference,
    estimates,
    prompt_mean,
    reward_statistics,
    same_length_win_rate,
    win_tables,
)
from plaudit.evaluation.tilt import tilt_coefficients, tilt_kl, tilted_means
from plaudit.rewards.base import Reward, Sample
from plaudit.rewards.text import length

BEST_OF_N = "best of n"
"""What the curve of the starting model's favourites is called among the runs."""
TILT = "exact tilt"
"""What the curve of the best policy at every divergence is called, estimated from the starting model's answers."""


@dataclass(frozen=True)
class Scored:
    """One model's answers with their rewards.

    Attributes:
        answers: to `P` prompts.
        rewards: by name `[P, K]`, nan where a reward has nothing to say.
        problems: by name, why it had nothing to say, and how often.
    """

    answers: Answers
    rewards: Mapping[str, FloatArray]
    problems: Mapping[str, Counter[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class PolicyEvaluation:
    """What was found about one model.

    Attributes:
        name: of the model; `run/step` for a checkpoint of a run.
        metrics: by name (see `policy_statistics.METRICS`), those of a reward as `metric/reward`.
        differences: this model minus the starting model, paired by prompt; empty for the starting model.
        draws: `[R]` of every metric, and of the differences as `difference/metric`, on the same resampled prompts.
    """

    name: str
    metrics: dict[str, Estimate]
    differences: dict[str, Estimate]
    draws: dict[str, FloatArray] = field(repr=False)

    @property
    def run(self) -> str:
        """The run that the model belongs to: its name up to the first `/`."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class FrontierPoint:
    """How far a model (or a best of n) is from the start and what that brought.

    Attributes:
        run: `best of n`, `exact tilt`, or the policy's run.
        label: `n = 4`, `β = 0.5`, or the policy's name.
        kl: divergence from the starting model per answer, nats; for best of n its upper bound.
        values: mean reward by name.
        gains: reward minus that of the starting model by name.
        draws: `[R]` of the divergence under `kl` and of the gains under the reward's name.
    """

    run: str
    label: str
    kl: Estimate
    values: dict[str, Estimate]
    gains: dict[str, Estimate]
    draws: dict[str, FloatArray] = field(repr=False)

    @property
    def distance(self) -> float:
        """`√KL`, 0 where the estimate is negative."""
        return float(distance_of(np.array(self.kl.value)))


@dataclass(frozen=True)
class PolicyComparison:
    """Everything that was measured.

    Attributes:
        start: the starting model.
        policies: those that are compared with it, in the order given.
        points: best of n (from n = 1), the tilt by the proxy, and every policy whose divergence is known.
        fits: by run and reward the curve through its points.
        proxy: name of the reward that chose and was optimised.
        gold: name of the reward that is really wanted, if there is one.
    """

    start: PolicyEvaluation
    policies: list[PolicyEvaluation]
    points: list[FrontierPoint]
    fits: dict[tuple[str, str], CurveFit]
    proxy: str | None
    gold: str | None

    @property
    def judge(self) -> str | None:
        """The reward by which the verdict is spoken: gold where there is one, else the proxy."""
        return self.gold or self.proxy


@dataclass(frozen=True)
class CompareOptions:
    """How much is computed; see the fields of the same names in `EvaluatePolicyConfig`."""

    samples: int = 4
    best_of: int = 16
    length_control: bool = True
    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0


def score_answers(
    answers: Answers, prompts: Sequence[PromptRecord], rewards: Mapping[str, Reward], *, batch: int = 512
) -> Scored:
    """Give every answer every reward.

    Args:
        answers: to the `P` prompts.
        prompts: with the columns that rewards may read.
        rewards: by name.
        batch: answers that a reward sees at once.

    Returns:
        The rewards; nan and a counted reason where one is invalid.

    Raises:
        NonFiniteRewardError: (a ValueError) for a reward that is not finite, with the text.
    """
    places = [(row, column) for row, texts in enumerate(answers.completions) for column in range(len(texts))]
    samples = [
        Sample(
            prompt=prompts[row].prompt,
            completion=answers.completions[row][column],
            finished=answers.finished[row][column] is not False,
            columns=prompts[row].columns,
        )
        for row, column in places
    ]
    tables = {name: np.full(answers.shape, np.nan) for name in rewards}
    problems: dict[str, Counter[str]] = {name: Counter() for name in rewards}
    for name, reward in rewards.items():
        for start in range(0, len(samples), batch):
            score = reward(samples[start : start + batch])
            rows, columns = zip(*places[start : start + batch], strict=True)
            tables[name][list(rows), list(columns)] = score.total.double().numpy()
            invalid = (~score.valid).nonzero().squeeze(-1).tolist()
            problems[name].update(score.problems.get(place, "no reason given") for place in invalid)
    return Scored(answers, tables, problems)


def compare_policies(
    start: Scored,
    policies: Mapping[str, Scored],
    prompts: Sequence[PromptRecord],
    *,
    start_name: str = "start",
    proxy: str | None = None,
    gold: str | None = None,
    options: CompareOptions | None = None,
) -> PolicyComparison:
    """Measure policies against the model that they started from.

    Everything is paired: differences are taken within prompts, and all intervals redraw the same prompts (or groups of
    prompts). Win rates meet every answer with every answer of the starting model to the same prompt.

    Args:
        start: the starting model's answers.
        policies: by name the policies' answers, to the same prompts and with the same rewards.
        prompts: `P` prompts.
        start_name: what the starting model is called.
        proxy: the reward that chooses the best of n; None draws no such curve.
        gold: the reward that is really wanted.
        options: how much is computed.

    Raises:
        ValueError: if a model answered another number of prompts, or has other rewards.
    """
    options = options or CompareOptions()
    _check(start, policies, prompts)
    clusters = clusters_of([prompt.group for prompt in prompts])
    widths = [len(row) for scored in (start, *policies.values()) for row in scored.answers.completions]
    shown = min([options.samples, *widths])
    own = _statistics(start, None, clusters, shown, options)
    own_estimates, own_draws = _estimate(own, clusters, options)
    evaluations = []
    for name, scored in policies.items():
        found = _statistics(scored, start, clusters, shown, options)
        # A divergence is a difference already.
        both = [key for key in found if key in own and not key.startswith("kl")]
        gaps = {f"difference/{key}": difference(found[key], own[key]) for key in both}
        metrics, draws = _estimate({**found, **gaps}, clusters, options)
        differences = {key.removeprefix("difference/"): metrics.pop(key) for key in gaps}
        evaluations.append(PolicyEvaluation(name, metrics, differences, draws))
    points = _best_of_points(start, proxy, gold, clusters, options)
    points += _tilt_points(start, proxy, gold, clusters, options)
    points += [point for evaluation in evaluations if (point := _policy_point(evaluation, start.rewards)) is not None]
    return PolicyComparison(
        start=PolicyEvaluation(start_name, own_estimates, {}, own_draws),
        policies=evaluations,
        points=points,
        fits=_fits(points, list(start.rewards), options.confidence),
        proxy=proxy,
        gold=gold,
    )


def _statistics(
    scored: Scored, start: Scored | None, clusters: Clusters, shown: int, options: CompareOptions
) -> dict[str, Statistic]:
    found = answer_statistics(scored.answers, clusters, shown)
    for name, rewards in scored.rewards.items():
        base = None if start is None else start.rewards[name]
        parts = reward_statistics(rewards, scored.answers, base, clusters)
        if start is not None and base is not None and options.length_control:
            credits, _ = win_tables(rewards, base)
            sizes = [each.answers.table(lambda text: float(length(text, "characters"))) for each in (scored, start)]
            parts["win_rate_same_length"] = same_length_win_rate(credits, sizes[0], sizes[1], clusters)
        found |= {f"{key}/{name}": part for key, part in parts.items()}
    return found


def _estimate(
    statistics: Mapping[str, Statistic], clusters: Clusters, options: CompareOptions
) -> tuple[dict[str, Estimate], dict[str, FloatArray]]:
    return estimates(
        statistics, clusters, resamples=options.resamples, confidence=options.confidence, seed=options.seed
    )


def _best_of_points(
    start: Scored, proxy: str | None, gold: str | None, clusters: Clusters, options: CompareOptions
) -> list[FrontierPoint]:
    """The starting model's favourites of 1, 2, 4, … answers by the proxy, measured by the proxy and by gold."""
    tables = _choice_tables(start, proxy, gold, options)
    if proxy is None or not tables:
        return []
    names = list(tables)
    largest = int(np.max((~np.isnan(tables[proxy])).sum(1), initial=0))
    found: dict[str, Statistic] = {}
    sizes = best_of_n_sizes(min(options.best_of, largest))
    for n in sizes:
        for name in names:
            means = prompt_mean(best_of_n_means(tables[proxy], tables[name], n), clusters)
            found[f"value/{n}/{name}"] = means
            found[f"gain/{n}/{name}"] = difference(means, found[f"value/1/{name}"])
    measured, draws = _estimate(found, clusters, options)
    points = []
    for n in sizes:
        kl = best_of_n_kl(n)
        points.append(
            FrontierPoint(
                run=BEST_OF_N,
                label=f"n = {n}",
                kl=Estimate(kl, kl, kl, measured[f"value/{n}/{proxy}"].count),
                values={name: measured[f"value/{n}/{name}"] for name in names},
                gains={name: measured[f"gain/{n}/{name}"] for name in names},
                draws={"kl": np.full(options.resamples, kl)} | {name: draws[f"gain/{n}/{name}"] for name in names},
            )
        )
    return points


def _choice_tables(
    start: Scored, proxy: str | None, gold: str | None, options: CompareOptions
) -> dict[str, FloatArray]:
    """Gold and proxy of the starting model's answers, `[P, N]` by name; nothing where no curve is to be drawn."""
    if proxy is None or options.best_of < 1:
        return {}
    names = [proxy] if gold in (None, proxy) else [str(gold), proxy]
    return dict(zip(names, joint([start.rewards[name] for name in names]), strict=True))


def _tilt_points(
    start: Scored, proxy: str | None, gold: str | None, clusters: Clusters, options: CompareOptions
) -> list[FrontierPoint]:
    """The tilt of the starting model by the proxy at growing divergences, as far as its answers reach."""
    tables = _choice_tables(start, proxy, gold, options)
    if proxy is None or not tables:
        return []
    found: dict[str, Statistic] = {}
    coefficients = list(tilt_coefficients(tables[proxy]).values())
    means = {
        name: np.nanmean(np.where(np.isnan(table).all(1, keepdims=True), 0.0, table), axis=1)
        for name, table in tables.items()
    }
    for place, coefficient in enumerate(coefficients):
        found[f"kl/{place}"] = prompt_mean(tilt_kl(tables[proxy], coefficient), clusters)
        for name, table in tables.items():
            tilted = tilted_means(tables[proxy], table, coefficient)
            found[f"value/{place}/{name}"] = prompt_mean(tilted, clusters)
            found[f"gain/{place}/{name}"] = prompt_mean(tilted - means[name], clusters)
    measured, draws = _estimate(found, clusters, options)
    return [
        FrontierPoint(
            run=TILT,
            label=f"β = {coefficient:.3g}",
            kl=measured[f"kl/{place}"],
            values={name: measured[f"value/{place}/{name}"] for name in tables},
            gains={name: measured[f"gain/{place}/{name}"] for name in tables},
            draws={"kl": draws[f"kl/{place}"]} | {name: draws[f"gain/{place}/{name}"] for name in tables},
        )
        for place, coefficient in enumerate(coefficients)
    ]


def _policy_point(evaluation: PolicyEvaluation, rewards: Mapping[str, FloatArray]) -> FrontierPoint | None:
    if "kl" not in evaluation.metrics:
        return None
    return FrontierPoint(
        run=evaluation.run,
        label=evaluation.name,
        kl=evaluation.metrics["kl"],
        values={name: evaluation.metrics[f"reward/{name}"] for name in rewards},
        gains={name: evaluation.differences[f"reward/{name}"] for name in rewards},
        draws={"kl": evaluation.draws["kl"]}
        | {name: evaluation.draws[f"difference/reward/{name}"] for name in rewards},
    )


def _fits(
    points: Sequence[FrontierPoint], rewards: Sequence[str], confidence: float
) -> dict[tuple[str, str], CurveFit]:
    """The published curve through the points of every run, for every reward that its points have."""
    fits: dict[tuple[str, str], CurveFit] = {}
    for run in dict.fromkeys(point.run for point in points):
        if run == TILT:
            continue
        own = [point for point in points if point.run == run]
        kind: CurveKind = "best_of_n" if run == BEST_OF_N else "reinforcement"
        for name in rewards:
            if not all(name in point.gains for point in own):
                continue
            gains = np.array([point.gains[name].value for point in own])
            fitted = fit_curve(
                kind,
                np.array([point.distance for point in own]),
                gains,
                distance_draws=distance_of(np.stack([point.draws["kl"] for point in own], axis=1)),
                gain_draws=np.stack([point.draws[name] for point in own], axis=1),
                confidence=confidence,
            )
            if fitted is not None:
                fits[run, name] = fitted
    return fits


def _check(start: Scored, policies: Mapping[str, Scored], prompts: Sequence[PromptRecord]) -> None:
    for name, scored in {"the starting model": start, **policies}.items():
        if scored.answers.shape[0] != len(prompts):
            raise ValueError(f"{name} answered {scored.answers.shape[0]} prompts, there are {len(prompts)}")
        if list(scored.rewards) != list(start.rewards):
            raise ValueError(f"{name} has the rewards {list(scored.rewards)}, the start {list(start.rewards)}")
