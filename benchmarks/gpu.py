"""The rows that need a GPU: a decoder of half a billion parameters in bf16 against the limit of the device.

    python benchmarks/gpu.py [WORKLOAD …] [--steps 5] [--data FOLDER]

Random weights, the token lengths of real rankings, Plaudit's own training step. Against TRL on the same device:
`python benchmarks/against_trl.py --device cuda --save-as against_trl_gpu`. Without a GPU it says so and writes nothing.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from against_limit import measure, profile_rows, rows
from common import ROOT, save, table
from workloads import DATA, WORKLOADS

GOAL = 0.45
DECODER_HALF_BILLION: dict[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 4096,
}
WORKLOADS_LARGE = (
    replace(WORKLOADS["fgrlhf_qa-k4"], name="gpu-fgrlhf_qa-k4", prompts=32, pairs=192),
    replace(WORKLOADS["hh-64"], name="gpu-hh-256", prompts=256, pairs=256),
)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [each.name for each in WORKLOADS_LARGE]
    parser.add_argument("workloads", nargs="*", default=[], metavar="WORKLOAD", help=", ".join(names))
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the preference data")
    parser.add_argument("--tokens-per-micro-batch", type=int, default=32_768, help="of one forward pass")
    parser.add_argument("--save-as", default="gpu", help="name under benchmarks/results; empty: not saved")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device is visible: the rows for GPUs stay as they are")
        return
    changes = {
        "device": "cuda",
        "precision": "bf16",
        "tokens_per_micro_batch": arguments.tokens_per_micro_batch,
    }
    results: list[dict[str, Any]] = []
    for workload in WORKLOADS_LARGE:
        if arguments.workloads and workload.name not in arguments.workloads:
            continue
        sizes = {"sizes": DECODER_HALF_BILLION, "changes": changes, "dtype": torch.bfloat16}
        results.append(measure(workload, arguments.steps, arguments.data, **sizes))
        print(table(rows(results, GOAL)), table(profile_rows(results)), sep="\n\n", flush=True)
        if arguments.save_as:
            # After each: what was measured is kept when the time on a lent machine is over.
            command = " ".join(["python benchmarks/gpu.py", *arguments.workloads, f"--steps {arguments.steps}"])
            print(save(arguments.save_as, command, results).relative_to(ROOT), flush=True)


if __name__ == "__main__":
    main()
