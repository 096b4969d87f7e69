"""Tokens per second of `plaudit.rollout.generate` beside transformers' `generate`, on a 7M Llama with random weights.

    python benchmarks/generation.py                     # the grid: K 1, 8; prompts of 16, 128, 512; 16, 128 new tokens
    python benchmarks/generation.py --headline          # 8 prompts of 125 tokens, 8 samples, 64 new tokens
    python benchmarks/generation.py --output runs/generation.json

Both sample at temperature 1 from the same weights, without an end token, so that both make the same number of tokens.
The two take turns; the figure is the median over `--repeats` turns, and beside it the best turn, which is what a
machine that others use as well would give alone.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from plaudit.configs.generation import SamplingConfig
from plaudit.models.causal_lm import CausalLM
from plaudit.models.packed_attention import PACKED_ATTENTION
from plaudit.rollout.generate import generate

VOCABULARY = 8192
GRID = [(samples, prompt, new) for samples in (1, 8) for prompt in (16, 128, 512) for new in (16, 128)]


def build_model() -> LlamaForCausalLM:
    """7.2 million weights: 6 layers of 256, 8 heads, a vocabulary of 8,192 tied to the head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0, **sizes
    )
    return LlamaForCausalLM(config).eval()


def build_tokenizer() -> Any:
    """One word per id; only its ids are of use here."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    inner = Tokenizer(WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w2", pad_token="w0", unk_token="w3")


def contenders(
    plain: LlamaForCausalLM, ours: CausalLM, prompts: int, length: int, samples: int, new: int
) -> dict[str, Callable[[], int]]:
    """The two ways to make `prompts * samples * new` tokens; each returns how many it made."""
    ids = torch.randint(3, VOCABULARY, (prompts, length), generator=torch.Generator().manual_seed(length))
    lists = ids.tolist()
    sampling = SamplingConfig(max_new_tokens=new)

    def plaudit() -> int:
        return generate(
            ours, ours.tokenizer, lists, samples_per_prompt=samples, sampling=sampling, end_token_ids=()
        ).num_tokens

    def peer() -> int:
        with torch.no_grad():
            found = plain.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                num_return_sequences=samples,
                max_new_tokens=new,
                eos_token_id=None,
                pad_token_id=0,
            )
        return int(found[:, length:].numel())

    return {"plaudit": plaudit, "transformers": peer}


def compare(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Tokens per second of each way: median and best over turns that alternate, after one turn that is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            tokens = way()
            if turn:
                rates[name].append(tokens / (time.perf_counter() - start))
    result = {name: statistics.median(found) for name, found in rates.items()}
    result |= {f"{name}_best": max(found) for name, found in rates.items()}
    result["ratio"] = result["plaudit"] / result["transformers"]
    result["ratio_best"] = result["plaudit_best"] / result["transformers_best"]
    return result


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--headline", action="store_true", help="only 8 prompts of 125 tokens, K 8, 64 new tokens")
    parser.add_argument("--prompts", type=int, default=8, help="prompts in one call")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each, after one that is not counted")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--output", type=Path, default=None, help="write the rows as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plain, tokenizer = build_model(), build_tokenizer()
    ours = CausalLM(build_model(), tokenizer).eval()
    assert ours.model.config._attn_implementation == PACKED_ATTENTION  # type: ignore[union-attr]
    cases = [(8, 125, 64)] if arguments.headline else GRID
    threads = f"{arguments.threads} thread{'s' * (arguments.threads > 1)} of {os.cpu_count()} cores"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, {threads}")
    print(f"{arguments.prompts} prompts; tokens/s, median of {arguments.repeats} (best)")
    rows = []
    for samples, length, new in cases:
        ways = contenders(plain, ours, arguments.prompts, length, samples, new)
        found = compare(ways, arguments.repeats)
        rows.append({"samples": samples, "prompt": length, "new": new, "prompts": arguments.prompts, **found})
        print(
            f"K {samples}  prompt {length:3}  new {new:3}"
            f"   plaudit {found['plaudit']:7.0f} ({found['plaudit_best']:7.0f})"
            f"   transformers {found['transformers']:7.0f} ({found['transformers_best']:7.0f})"
            f"   x{found['ratio']:.2f} (x{found['ratio_best']:.2f})",
            flush=True,
        )
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
