"""Styles and goals of a language model whose every answer can be listed: the gap to the exact optimum; resumable.

python studies/hierarchy_text.py run --seeds 0 1 2 3 4
python studies/hierarchy_text.py table

`run` adds to `docs/studies/hierarchy-text.jsonl`; what is there is not run again.

A Llama of 7k parameters over eight tokens answers two prompts with at most four tokens. An answer earns ½
for every time that its prompt's word stands in it. `plaudit align` is run by its `main`; then all 2801 answers to each
prompt are put through the model, so that `J = E[r] - β KL(π‖π_ref)` and `J* = β log E_ref exp(r / β)` are exact.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from plaudit.configs.align import AlignConfig
from plaudit.data.packing import pack_groups
from plaudit.data.records import PromptRecord
from plaudit.data.tokenising import TokenisedBlock, TokenisedGroup
from plaudit.models.causal_lm import CausalLM
from plaudit.models.policy import LanguagePolicy
from plaudit.rollout.stopping import decode
from plaudit.training import align

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "studies" / "hierarchy-text.jsonl"
COEFFICIENT, LONGEST = 0.5, 4
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")
WORDS = ("cat", "dog", "and", ".")
PROMPTS = ("cat", "dog")
VARIANTS: dict[str, dict[str, Any]] = {
    "a2c": {"name": "a2c", "gae_lambda": 0.95},
    "option_critic, 3 styles": {
        "name": "option_critic",
        "num_options": 3,
        "style_spread": 0.3,
        "sentence_ends": ["and", "."],
    },
    "feudal, α = 0": {"name": "feudal", "horizon": 2, "intrinsic_weight": 0.0},
    "feudal, α = 0.1": {"name": "feudal", "horizon": 2, "intrinsic_weight": 0.1},
}


def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """½ for every time that the prompt's word stands in the answer."""
    return [0.5 * words.split().count(prompt) for prompt, words in zip(prompts, completions, strict=True)]


def save_tokenizer(folder: Path) -> str:
    """One token per word."""
    vocabulary = {word: index for index, word in enumerate([*SPECIALS, *WORDS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    return str(folder)


def settings(folder: Path, algorithm: dict[str, Any], *, iterations: int, seed: int) -> AlignConfig:
    """The run; only the algorithm differs between variants."""
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AlignConfig.model_validate(
        {
            "model": {
                "model_type": "llama",
                "backbone_config": sizes | {"num_key_value_heads": 2, "max_position_embeddings": 32},
                "tokenizer": save_tokenizer(folder / "tokenizer"),
                "template": "raw",
                "seed": seed,
            },
            "algorithm": algorithm | {"kl_coefficient": COEFFICIENT},
            "output": folder / "run",
            "seed": seed,
            "prompts_per_iteration": 2,
            "samples_per_prompt": 64,
            "iterations": iterations,
            "sampling": {"max_new_tokens": LONGEST},
            "missing_end_penalty": 0.0,
            "optimizer": {"learning_rate": 1e-2},
            "save_every": None,
            "quiet": True,
        }
    )


def every_answer(end: int, count: int) -> list[list[int]]:
    """All answers as token ids: up to `LONGEST` tokens, an end token last and nowhere else."""
    others = [token for token in range(count) if token != end]
    ended = [[*ids, end] for length in range(LONGEST) for ids in product(others, repeat=length)]
    return ended + [list(ids) for ids in product(others, repeat=LONGEST)]


@torch.no_grad()
def distributions(model: CausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """`log π(y|x)` and `r(x, y)` of all answers, `[P, S]` float64."""
    tokeniser = model.text_tokeniser(template="raw")
    end = tokeniser.end_token_id
    assert end is not None
    answers = every_answer(end, len(SPECIALS) + len(WORDS))
    texts = [decode(model.tokenizer, ids).strip() for ids in answers]
    logprobs, rewards = [], []
    for prompt in PROMPTS:
        block = TokenisedBlock(tokeniser.prompt(prompt), answers, list(range(len(answers))))
        found = LanguagePolicy(model).evaluate(pack_groups([TokenisedGroup((block,))], causal=True))
        total = torch.zeros(len(answers), dtype=torch.float64)
        logprobs.append(total.index_add(0, found.spans.owner, found.logprobs.double()))
        rewards.append(torch.tensor(reward([prompt] * len(texts), texts), dtype=torch.float64))
    return torch.stack(logprobs), torch.stack(rewards)


def run(variant: str, seed: int, iterations: int) -> dict[str, Any]:
    """Align one model; where it stands between its start and the optimum."""
    with tempfile.TemporaryDirectory() as name:
        config = settings(Path(name), VARIANTS[variant], iterations=iterations, seed=seed)
        model = CausalLM.from_backbone(config.model)
        reference, rewards = distributions(model.eval())
        begun = time.process_time()
        align.main(config, prompts=[PromptRecord(prompt=text) for text in PROMPTS], model=model, reward=reward)
        seconds = time.process_time() - begun
        logprobs, _ = distributions(model)
        plain_model = CausalLM.from_pretrained(Path(name) / "run" / "model")
        opened, _ = distributions(plain_model)
    best = COEFFICIENT * torch.logsumexp(reference + rewards / COEFFICIENT, 1)
    optimum = reference + (rewards - best[:, None]) / COEFFICIENT
    start = (reference.exp() * rewards).sum(1)
    reached = (logprobs.exp() * (rewards - COEFFICIENT * (logprobs - reference))).sum(1)
    return {
        "variant": variant,
        "seed": seed,
        "optimum": round(float(best.mean()), 4),
        "start": round(float(start.mean()), 4),
        "gap": round(float((best - reached).mean()), 5),
        "gap_share": round(float((best - reached).mean() / (best - start).mean()), 5),
        "total_variation": round(float((logprobs.exp() - optimum.exp()).abs().sum(1).mean() / 2), 4),
        "sums_to": round(float(logprobs.exp().sum(1).mean()), 6),
        "saved_differs_by": float((opened - logprobs).abs().max()),
        "cpu_seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, Any]]) -> None:
    """Mean gap over seeds with its interval, and the gaps of all."""
    columns = ("algorithm", "seeds", "gap in shares of J* − J(π_ref)", "all", "total variation", "sum of π", "CPU s")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for variant in VARIANTS:
        chosen = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["seed"])
        if chosen:
            gaps = [row["gap_share"] for row in chosen]
            half = stats.t.ppf(0.975, max(len(gaps) - 1, 1)) * np.std(gaps, ddof=min(1, len(gaps) - 1))
            sums = max((row["sums_to"] for row in chosen), key=lambda found: abs(found - 1))
            cells = [
                variant,
                len(gaps),
                f"{np.mean(gaps):.4f} ± {half / len(gaps) ** 0.5:.4f}",
                ", ".join(f"{gap:.4f}" for gap in gaps),
                f"{np.mean([row['total_variation'] for row in chosen]):.3f}",
                f"{sums:.5f}",
                round(float(np.mean([row["cpu_seconds"] for row in chosen]))),
            ]
            print(f"| {' | '.join(map(str, cells))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in arguments.output.read_text().splitlines()] if arguments.output.exists() else []
    if arguments.action == "table":
        table(rows)
        return
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["variant"], row["seed"]) for row in rows}
    for seed in arguments.seeds:
        for variant in arguments.variants:
            if (variant, seed) not in done:
                row = run(variant, seed, arguments.iterations)
                print(json.dumps(row, ensure_ascii=False), flush=True)
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
