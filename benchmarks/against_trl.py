"""Against TRL's `RewardTrainer` and a careful loop by hand: the same weights, ids, pairs per step and optimizer.

    python benchmarks/against_trl.py [WORKLOAD …] [--steps 5] [--data FOLDER] [--processor-time] [--save-as NAME]

Each trains in a process of its own, one optimizer step in turn. The benchmark fails if losses or gradients disagree.
Every workload is saved as soon as it is measured, in a file of its own, so that they can be measured one by one.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, free_gib, median_ratio, save, table
from lockstep import Worker, take_turns
from peer_model import exploded_pairs
from peers import trl_python, trl_version
from work_loop import batches
from workloads import CACHE, DATA, SIZES, WORKLOADS, Workload, prepare

HERE = Path(__file__).parent
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCES = {"cpu": 1e-4, "cuda": 1e-3}
"""By device: a GPU adds up in other orders on the two sides, in kernels of different tile sizes."""
NAMES = ("trl", "loop", "plaudit")
SHIFTS = {"head.bias", "encoder.layer.5.output.LayerNorm.bias"}
"""Parameters that add the same to every score, the second through the mean over token states. No comparison moves them:
their gradient is 0 but for rounding; decoder classifiers have no such bias at all."""


def measure(
    workload: Workload,
    steps: int,
    data: Path,
    *,
    names: Sequence[str] = NAMES,
    device: str = "cpu",
    clock: str = "seconds",
    size: str = "7m",
    attention: str = "auto",
    cache: Path = CACHE,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One warm-up step and `steps` measured ones of each; their times, tokens, memory and agreement.

    Args:
        workload: what is trained on what.
        steps: measured steps of each.
        data: the folder of the preference data.
        names: who takes part.
        device: where all of them train.
        clock: which of the two clocks the tables go by, `seconds` (on the wall) or `processor_seconds`.
        size: key of `SIZES`, of decoders.
        attention: of Plaudit, `attn_implementation`.
        cache: where its folder is put; two measurements of one workload at a time need two.
        environment: more variables for the processes.
    """
    options: dict[str, Any] = {"sizes": SIZES[size], "changes": {"device": device}, "attention": attention}
    folder = prepare(workload, steps + 1, data, cache=cache, **options)

    def start(name: str) -> Worker:
        python = trl_python() if name == "trl" else Path(sys.executable)
        command = [str(python), str(HERE / f"work_{name}.py"), str(folder)]
        return Worker(name, [*command, str(folder / f"{name}-gradient.pt")], environment)

    workers = take_turns({name: partial(start, name) for name in names}, steps)
    losses = {name: worker.result["losses"] for name, worker in workers.items()}
    agreement = check_agreement(folder, losses, GRADIENT_TOLERANCES[device])
    tokens = tokens_of(folder)
    return {
        "workload": workload.name,
        "prompts": workload.prompts,
        "pairs": workload.pairs,
        "clock": clock,
        "size": size,
        "seconds": {name: worker.times for name, worker in workers.items()},
        "processor_seconds": {name: worker.processor_times for name, worker in workers.items()},
        "tokens": tokens,
        "agreement": agreement,
        "memory": {n: {k: w.result[k] for k in ("memory_before", "memory_peak")} for n, w in workers.items()},
        "threads": {name: worker.result["threads"] for name, worker in workers.items()},
    }


def tokens_of(folder: Path) -> dict[str, list[int]]:
    """Places that each way puts through the network in every measured step, padding included."""
    settings = json.loads((folder / "steps.json").read_text())
    peer_pairs = settings["workload"]["peer_pairs"]
    measured = settings["steps"][1:]
    chunks = exploded_pairs(settings["steps"])[1:]
    causal = not (folder / "backbone").exists()
    return {
        "trl": [
            sum(
                2 * len(part) * max(max(len(a), len(b)) for a, b in part)
                for part in (pairs[at : at + peer_pairs] for at in range(0, len(pairs), peer_pairs))
            )
            for pairs in chunks
        ],
        "loop": [
            sum(
                sum(len(g["rows"]) for g in groups) * max(max(map(len, g["rows"])) for g in groups)
                for groups in batches(step)
            )
            for step in measured
        ],
        "plaudit": [
            sum(group["unique"] if causal else sum(map(len, group["rows"])) for group in step) for step in measured
        ],
    }


def check_agreement(
    folder: Path, losses: dict[str, list[float]], tolerance: float = GRADIENT_TOLERANCES["cpu"]
) -> dict[str, dict[str, float]]:
    """How far each peer's first loss and gradient are from Plaudit's.

    Returns:
        For each peer `loss` (relative), `gradient` (largest difference over the largest entry), and `later_losses`:
        the largest relative difference of a later step's loss, after both have moved their weights.

    Raises:
        RuntimeError: if the first step's differ by more than rounding; then the times mean nothing.
    """
    gradients = {n: torch.load(folder / f"{n}-gradient.pt", weights_only=True, map_location="cpu") for n in losses}
    ours = gradients["plaudit"]
    names = {name for name, value in ours.items() if value is not None} - SHIFTS
    largest = max(ours[name].abs().max().item() for name in names)
    found = {}
    for peer in losses.keys() - {"plaudit"}:
        if missing := names - gradients[peer].keys():
            raise RuntimeError(f"{peer} has no parameters {sorted(missing)[:5]}")
        difference = max((ours[name] - gradients[peer][name]).abs().max().item() for name in names)
        relative = [abs(a - b) / abs(b) for a, b in zip(losses[peer], losses["plaudit"], strict=True)]
        found[peer] = {"loss": relative[0], "gradient": difference / largest, "later_losses": max(relative[1:])}
        if not (relative[0] < LOSS_TOLERANCE and difference / largest < tolerance):
            raise RuntimeError(f"{folder.name}: plaudit and {peer} do not compute the same: {found[peer]}")
    return found


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table of the comparison, one row per workload, by the clock that its result names."""
    shown = []
    for each in results:
        seconds, tokens = each[each["clock"]], each["tokens"]
        time, token = median_ratio(seconds["trl"], seconds["plaudit"]), median_ratio(tokens["trl"], tokens["plaudit"])
        ours = statistics.median(seconds["plaudit"])
        shown.append(
            {
                "data and batch": each["workload"] + f", {each.get('size', '7m')}" * (each.get("size", "7m") != "7m"),
                "TRL s/step": statistics.median(seconds["trl"]),
                "loop s/step": statistics.median(seconds["loop"]),
                "Plaudit s/step": ours,
                "tokens, TRL / Plaudit": token,
                "time, TRL / Plaudit": time,
                "share of tokens that becomes time": f"{time / token:.0%}",
                "goal": WORKLOADS[each["workload"]].goal or "–",
                "tokens, loop / Plaudit": median_ratio(tokens["loop"], tokens["plaudit"]),
                "time, loop / Plaudit": median_ratio(seconds["loop"], seconds["plaudit"]),
                "Plaudit prompts/s": each["prompts"] / ours,
                "Plaudit pairs/s": each["pairs"] / ours,
            }
        )
    return shown


def memory_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Peak memory of each process, and how much of it came with the steps; agreement of loss and gradient."""
    shown = []
    for each in results:
        row: dict[str, Any] = {"data and batch": each["workload"]}
        for name in NAMES:
            memory = each["memory"][name]
            grown = (memory["memory_peak"] - memory["memory_before"]) / 2**30
            row[f"{name} GiB (of these by steps)"] = f"{memory['memory_peak'] / 2**30:.2f} ({grown:.2f})"
        for peer in ("trl", "loop"):
            row[f"loss, {peer}"] = each["agreement"][peer]["loss"]
            row[f"gradient, {peer}"] = each["agreement"][peer]["gradient"]
        shown.append(row)
    return shown


def fitting(free: float) -> list[str]:
    """The workloads that `free` GiB of memory suffice for; the others are said aloud and left out."""
    for name, each in WORKLOADS.items():
        if each.memory_gib > free:
            print(f"{name} is left out: it needs {each.memory_gib:g} GiB of free memory, and {free:.1f} are free")
    return [name for name, each in WORKLOADS.items() if each.memory_gib <= free]


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=[], metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the preference data")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where all of them train")
    parser.add_argument("--size", default="7m", choices=tuple(SIZES), help="of the decoders")
    parser.add_argument("--attention", default="auto", help="attn_implementation of Plaudit")
    parser.add_argument(
        "--processor-time", action="store_true", help="go by the processor's clock: for one thread on a busy machine"
    )
    parser.add_argument(
        "--save-as", default="against_trl", help="start of names in benchmarks/results; empty: not saved"
    )
    arguments = parser.parse_args()
    clock = "processor_seconds" if arguments.processor_time else "seconds"
    for name in arguments.workloads or fitting(free_gib() if arguments.device == "cpu" else math.inf):
        options = {"device": arguments.device, "clock": clock, "size": arguments.size, "attention": arguments.attention}
        found = measure(WORKLOADS[name], arguments.steps, arguments.data, **options)
        print(table(rows([found])), table(memory_rows([found])), sep="\n\n", flush=True)
        if arguments.save_as:
            command = f"python benchmarks/against_trl.py {name} --steps {arguments.steps} --device {arguments.device}"
            command += f" --size {arguments.size}" * (arguments.size != "7m")
            command += f" --attention {arguments.attention}" * (arguments.attention != "auto")
            command += " --processor-time" * arguments.processor_time
            print(save(f"{arguments.save_as}-{name}", command, [found], peer=f"trl {trl_version()}").relative_to(ROOT))


if __name__ == "__main__":
    main()
