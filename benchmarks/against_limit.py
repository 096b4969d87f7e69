"""Against the limit: the arithmetic that unique tokens need, over what this machine's matrix products reach.

    python benchmarks/against_limit.py [WORKLOAD …] [--compile] [--steps 5] [--data FOLDER] [--processor-time]
    python benchmarks/against_limit.py --profile FOLDER

The steps are Plaudit's own. The rate of matrix products is taken before and behind them, at the model's shapes and the
number of tokens that go through at once. A profile of the same steps then says where the rest goes.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from common import ROOT, save, table
from flops import layout_pairs, linear_layers, matmul_rate, step_flops
from lockstep import Worker, take_turns
from torch.profiler import ProfilerActivity, profile
from work_plaudit import open_run
from workloads import CACHE, DATA, WORKLOADS, Workload, prepare

from plaudit.training.reward import run_steps

HERE = Path(__file__).parent
GOAL = 0.60
CHOSEN = ("hh-64", "fgrlhf_qa-k4", "wmt_mqm-k9")
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn", "aten::_addmm"),
    "attention": ("scaled_dot_product", "flash_attention", "aten::_flex", "varlen"),
}


def measure(
    workload: Workload,
    steps: int,
    data: Path,
    *,
    sizes: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    clock: str = "seconds",
) -> dict[str, Any]:
    """Arithmetic per second of one workload's steps, and the share of the machine's rate; options as for `prepare`."""
    changes = {"device": "cpu"} | (changes or {})
    compiled = bool(changes.get("compile"))
    folder = prepare(workload, steps + 1, data, sizes=sizes, changes=changes, cache=CACHE / "limit")
    work, shapes, tokens = work_of(folder)
    device = json.loads((folder / "steps.json").read_text())["changes"]["device"]
    watch = perf_counter if clock == "seconds" else process_time
    rate_now = partial(matmul_rate, shapes, tokens, dtype=dtype, device=device, clock=watch)
    before = rate_now()
    command = [sys.executable, str(HERE / "work_plaudit.py"), str(folder), str(folder / "plaudit-gradient.pt")]
    worker = take_turns({"plaudit": partial(Worker, "plaudit", command)}, steps)["plaudit"]
    rate = statistics.median([before, rate_now()])
    times = worker.times if clock == "seconds" else worker.processor_times
    reached = [flops / seconds for flops, seconds in zip(work[1:], times, strict=True)]
    command = [sys.executable, __file__, "--profile", str(folder)]
    # A profile of the compiled steps would mostly be one of compiling.
    profiled = "{}" if compiled else subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "workload": workload.name + ", compiled" * compiled,
        "seconds": times,
        "clock": clock,
        "flops": work[1:],
        "matmul_rate": rate,
        "tokens_at_once": tokens,
        "share": statistics.median(reached) / rate,
        "profile": json.loads(profiled.splitlines()[-1]),
    }


def work_of(folder: Path) -> tuple[list[float], list[tuple[int, int]], int]:
    """Arithmetic of every step, shapes of the linear layers, and how many tokens go through at once (the median)."""
    trainer, _ = open_run(folder)
    tokenised, backbone = trainer.train.tokenised, trainer.model.backbone
    config: Any = backbone.config
    work, at_once = [], []
    for step in tokenised.schedule(trainer.config).steps(0, tokenised.schedule(trainer.config).steps_per_epoch):
        layouts = [tokenised.pack(chosen).layout for chosen in step.micro_batches]
        at_once += [layout.num_tokens for layout in layouts]
        # Everything of the step in one row counts a prompt once, however the step was cut.
        whole = tokenised.pack(step.indices).layout
        work.append(step_flops(backbone, config, whole.num_tokens, layout_pairs(whole)))
    return work, linear_layers(backbone), int(statistics.median(at_once))


def profile_steps(folder: Path) -> dict[str, float]:
    """Seconds of all steps of a folder by kind of work, from the profiler; `outside of operations` is Python."""
    trainer, session = open_run(folder)
    on_gpu = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as recorded:
        started = perf_counter()
        run_steps(trainer, session)
        seconds = perf_counter() - started
    kinds: Counter[str] = Counter()
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            kinds[kind_of(event)] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    kinds["outside of operations"] = max(0.0, seconds - sum(kinds.values()))
    return dict(kinds.most_common())


def kind_of(event: Any) -> str:
    """What an event of the profiler belongs to: by the ranges around it, else by its name."""
    above = event
    while above is not None:
        if above.name.startswith("Optimizer.step"):
            return "optimizer"
        above = above.cpu_parent
    for kind, names in KINDS.items():
        if any(name in event.name for name in names):
            return kind
    if event.name in ("aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::zero_", "aten::split"):
        return "copies and zeros"
    return "other operations, element by element"


def rows(results: list[dict[str, Any]], goal: float = GOAL) -> list[dict[str, Any]]:
    """One row per workload."""
    return [
        {
            "data and batch": each["workload"],
            "Gflop per step": statistics.median(each["flops"]) / 1e9,
            "s/step": statistics.median(each["seconds"]),
            "Gflop/s": statistics.median(each["flops"]) / statistics.median(each["seconds"]) / 1e9,
            "matrix products, Gflop/s": each["matmul_rate"] / 1e9,
            "share of the limit": f"{each['share']:.0%}",
            "goal": f"{goal:.0%}",
        }
        for each in results
    ]


def profile_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where the time goes, in shares of the profiled steps."""
    results = [each for each in results if each["profile"]]
    kinds = dict.fromkeys(kind for each in results for kind in each["profile"])
    return [
        {"work": kind}
        | {e["workload"]: f"{e['profile'].get(kind, 0.0) / sum(e['profile'].values()):.0%}" for e in results}
        for kind in kinds
    ]


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=[], metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--compile", action="store_true", help="with compile: true")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the preference data")
    parser.add_argument("--processor-time", action="store_true", help="by the processor's clock: for a busy machine")
    parser.add_argument("--save-as", default="against_limit", help="start of names in results; empty: not saved")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="only profile a prepared folder, as JSON")
    arguments = parser.parse_args()
    if arguments.profile:
        print(json.dumps(profile_steps(arguments.profile)))
        return
    clock = "processor_seconds" if arguments.processor_time else "seconds"
    for name in arguments.workloads or CHOSEN:
        changes = {"compile": arguments.compile}
        found = measure(WORKLOADS[name], arguments.steps, arguments.data, changes=changes, clock=clock)
        print(table(rows([found])), table(profile_rows([found])), sep="\n\n", flush=True)
        if arguments.save_as:
            command = f"python benchmarks/against_limit.py {name} --steps {arguments.steps}"
            command += " --compile" * arguments.compile + " --processor-time" * arguments.processor_time
            file = f"{arguments.save_as}-{name}" + "-compiled" * arguments.compile
            print(save(file, command, [found]).relative_to(ROOT))


if __name__ == "__main__":
    main()
