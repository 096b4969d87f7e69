"""Tokens per second of `plaudit.rollout.generate` beside transformers' `generate`, on a 7M Llama with random weights.

    python benchmarks/generation.py                     # the grid: K 1, 8; prompts of 16, 128, 512; 16, 128 new tokens
    python benchmarks/generation.py 8-125-64            # one row: 8 samples, prompts of 125 tokens, 64 new tokens
    python benchmarks/generation.py --clock processor   # on a machine that others use: seconds of the processor
    python benchmarks/generation.py 8-125-64 --device cuda --size 100m --save-as generation_gpu

Both sample at temperature 1 from the same weights, without an end token, so that both make the same number of tokens.
The two take turns; the figures are medians over `--repeats` turns, the ratio that of what was measured side by side.
Both clocks are read, the wall's and the processor's; tokens per second are by `--clock`.
Every row is saved as soon as it is measured, in a file of its own, from which `benchmarks/report.py` fills
`docs/benchmarks.md`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import ROOT, alternate, median_ratio, save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from plaudit.configs.generation import SamplingConfig
from plaudit.models.causal_lm import CausalLM
from plaudit.models.packed_attention import PACKED_ATTENTION
from plaudit.rollout.generate import generate

VOCABULARY = 8192
GRID = [(samples, prompt, new) for samples in (1, 8) for prompt in (16, 128, 512) for new in (16, 128)]
HEADLINE = (8, 125, 64)
"""Samples, tokens of a prompt, new tokens."""
CELLS = {"-".join(map(str, cell)): cell for cell in (HEADLINE, *GRID)}
"""Every row of the table by the end of its file's name."""


SIZES = {
    "7m": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}
"""Decoders by name, with a vocabulary of 8,192 tied to the head: 7.2 and 91 million weights."""


def build_model(size: str = "7m") -> LlamaForCausalLM:
    """A Llama of random weights, the same at every call."""
    torch.manual_seed(0)
    sizes = SIZES[size]
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
    lists, ids = ids.tolist(), ids.to(plain.device)
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


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table of the page: tokens per second of both, and how many times as many."""
    return [
        {
            "answers K": found["samples"],
            "prompt": found["prompt"],
            "new tokens": found["new"],
            "plaudit, tokens/s": round(found["plaudit"]),
            "transformers, tokens/s": round(found["transformers"]),
            "times as many": found["ratio"],
            "by the other clock": found.get("other_ratio", "–"),
        }
        for found in results
    ]


def both_clocks(
    ways: dict[str, Callable[[], int]], repeats: int, clock: Callable[[], float], other: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every turn by two clocks, the ways taking turns."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}

    def timed(way: str) -> Callable[[], None]:
        def run() -> None:
            started = other()
            ways[way]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[way].append(other() - started)

        return run

    first = alternate({way: timed(way) for way in ways}, repeats, clock=clock)
    return first, {way: each[-repeats:] for way, each in seconds.items()}


def main() -> None:
    """Measure, print a table and save it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"which rows, by default all: {', '.join(CELLS)}")
    parser.add_argument("--prompts", type=int, default=8, help="prompts in one call")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each, after one that is not counted")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where both generate")
    parser.add_argument("--size", default="7m", choices=tuple(SIZES), help="of the model")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="whose seconds count")
    parser.add_argument("--save-as", default="generation", help="start of names in results; empty: not saved")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    clock = clocks.pop(arguments.clock)
    [other] = clocks.values()
    plain, tokenizer = build_model(arguments.size).to(arguments.device), build_tokenizer()  # type: ignore[arg-type]
    ours = CausalLM(build_model(arguments.size), tokenizer).to(arguments.device).eval()
    assert ours.model.config._attn_implementation == PACKED_ATTENTION  # type: ignore[union-attr]
    for name in arguments.cells or CELLS:
        samples, length, new = CELLS[name]
        ways = contenders(plain, ours, arguments.prompts, length, samples, new)
        seconds, others = both_clocks(ways, arguments.repeats, clock, other)
        tokens = arguments.prompts * samples * new
        found: dict[str, Any] = {"samples": samples, "prompt": length, "new": new, "prompts": arguments.prompts}
        found |= {"device": arguments.device, "size": arguments.size}
        found |= {way: tokens / statistics.median(each) for way, each in seconds.items()}
        found |= {"ratio": median_ratio(seconds["transformers"], seconds["plaudit"]), "seconds": seconds}
        found |= {"other_ratio": median_ratio(others["transformers"], others["plaudit"]), "other_seconds": others}
        print("   ".join(f"{column} {value:,.2f}" for column, value in rows([found])[0].items()), flush=True)
        if arguments.save_as:
            command = f"python benchmarks/generation.py {name} --repeats {arguments.repeats} --clock {arguments.clock}"
            if arguments.device != "cpu":
                command += f" --device {arguments.device} --size {arguments.size}"
            print(save(f"{arguments.save_as}-{name}", command, [found]).relative_to(ROOT), flush=True)


if __name__ == "__main__":
    main()
