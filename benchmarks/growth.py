"""How cost grows with completions, with the length of prompts and completions, and with the model; packed and padded.

    python benchmarks/growth.py [SWEEP …] [--repetitions 5] [--processor-time]

One forward and backward pass of a Llama with random weights over random tokens, by Plaudit's packed path and by its
padded path, which gives the same numbers. Each point is a fresh process, so that its peak memory is its own. A point
that takes more than five seconds is measured three times, any other `--repetitions` times.
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import REPETITIONS, ROOT, save, table
from flops import attended_pairs
from lockstep import peak_memory, reset_peak_memory
from matplotlib.ticker import LogLocator, ScalarFormatter, StrMethodFormatter
from torch import nn

from plaudit.data.packing import pack_groups
from plaudit.data.tokenising import TokenisedBlock, TokenisedGroup
from plaudit.models.states import packed_states, padded_states

IMAGES = ROOT / "docs" / "images" / "benchmarks"
VOCABULARY = 8192


@dataclass(frozen=True)
class Point:
    """What goes through the network: `prompts` of `prompt` tokens, each with `completions` of `completion` tokens."""

    prompts: int = 2
    completions: int = 4
    prompt: int = 256
    completion: int = 64
    layers: int = 6
    hidden: int = 256

    @property
    def tokens(self) -> dict[str, int]:
        """Places that each path puts through the network."""
        rows = self.prompts * self.completions
        return {
            "packed": self.prompts * (self.prompt + self.completions * self.completion),
            "padded": rows * (self.prompt + self.completion),
        }


@dataclass(frozen=True)
class Sweep:
    """One curve: which size changes, through which points, and what the axis is called."""

    label: str
    x: Callable[[Point], float]
    points: list[Point]


SWEEPS = {
    "completions": Sweep(
        "completions per prompt", lambda p: p.completions, [Point(completions=2**i) for i in range(5)]
    ),
    "prompt": Sweep(
        "prompt length in tokens (two layers, one prompt)",
        lambda p: p.prompt,
        [Point(prompts=1, prompt=2**i, layers=2) for i in range(6, 14)],
    ),
    "completion": Sweep(
        "length of each completion in tokens", lambda p: p.completion, [Point(completion=4**i) for i in range(2, 6)]
    ),
    "model": Sweep(
        "parameters without embeddings, in millions",
        lambda p: round(p.layers * 12 * p.hidden**2 / 1e6, 1),
        [Point(prompts=1, layers=n, hidden=h) for n, h in ((4, 128), (6, 256), (8, 512), (12, 768))],
    ),
}


def groups_of(point: Point) -> list[TokenisedGroup]:
    """Random tokens of the wanted lengths."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()

    slots = list(range(point.completions))
    return [
        TokenisedGroup((TokenisedBlock(ids(point.prompt), [ids(point.completion) for _ in slots], slots),))
        for _ in range(point.prompts)
    ]


def backbone_of(point: Point) -> nn.Module:
    """A Llama of the point's size with random weights and packed attention."""
    from transformers import AutoModel, LlamaConfig

    from plaudit.models.packed_attention import PACKED_ATTENTION, register_packed_attention

    register_packed_attention()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=point.hidden,
        intermediate_size=point.hidden * 8 // 3,
        num_hidden_layers=point.layers,
        num_attention_heads=point.hidden // 32,
        max_position_embeddings=point.prompt + point.completion,
    )
    model: nn.Module = AutoModel.from_config(config, attn_implementation=PACKED_ATTENTION)
    return model


def measure_point(
    point: Point, path: str, repetitions: int, connection: Connection, clock: Callable[[], float] = perf_counter
) -> None:
    """Send seconds of every repetition and the peak memory of one path, in bytes above what was there before."""
    torch.manual_seed(0)
    model, batch = backbone_of(point), pack_groups(groups_of(point), causal=True)
    ends = batch.layout.completion_ends - 1
    before = reset_peak_memory()
    times: list[float] = []
    while len(times) < 1 + (repetitions if not times or times[-1] < 5 else min(3, repetitions)):
        started = clock()
        states = packed_states(model, batch) if path == "packed" else padded_states(model, batch)
        states[ends].square().sum().backward()
        model.zero_grad(set_to_none=True)
        times.append(clock() - started)
    connection.send({"seconds": times[1:], "memory": peak_memory() - before})
    connection.close()


def in_own_process(point: Point, path: str, repetitions: int, clock: Callable[[], float]) -> dict[str, Any]:
    """`measure_point` in a process of its own, forked so that nothing has to be imported again.

    Nothing in this process may have computed anything before: threads do not survive a fork.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=measure_point, args=(point, path, repetitions, there, clock))
    process.start()
    there.close()
    try:
        result: dict[str, Any] = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{path} at {point} ended with code {process.exitcode}") from None
    process.join()
    return result


def measure(sweep: Sweep, repetitions: int, clock: Callable[[], float] = perf_counter) -> list[dict[str, Any]]:
    """Both paths at every point of a sweep."""
    found = []
    for point in sweep.points:
        pairs = point.prompts * attended_pairs(point.prompt, [point.completion] * point.completions, causal=True)
        measured = {path: in_own_process(point, path, repetitions, clock) for path in ("packed", "padded")}
        found.append(
            {"x": sweep.x(point), "point": asdict(point), "tokens": point.tokens, "pairs": pairs, "paths": measured}
        )
    return found


def rows(sweep: Sweep, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per point."""
    shown = []
    for each in results:
        seconds = {path: statistics.median(found["seconds"]) for path, found in each["paths"].items()}
        memory = {path: found["memory"] / 2**20 for path, found in each["paths"].items()}
        shown.append(
            {
                sweep.label: f"{each['x']:g}",
                "tokens, padded / packed": each["tokens"]["padded"] / each["tokens"]["packed"],
                "packed s": seconds["packed"],
                "padded s": seconds["padded"],
                "time, padded / packed": seconds["padded"] / seconds["packed"],
                "packed MiB": memory["packed"],
                "padded MiB": memory["padded"],
                "memory, padded / packed": memory["padded"] / memory["packed"],
            }
        )
    return shown


def plot(name: str, sweep: Sweep, results: list[dict[str, Any]], folder: Path = IMAGES) -> Path:
    """Time and memory of both paths over one size; returns the picture's path."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    shown = rows(sweep, results)
    for panel, unit, title in (
        (panels[0], "s", "seconds, forward and backward"),
        (panels[1], "MiB", "peak memory, MiB"),
    ):
        for path, style in (("padded", "s--"), ("packed", "o-")):
            panel.plot([each["x"] for each in results], [row[f"{path} {unit}"] for row in shown], style, label=path)
        panel.set(xscale="log", yscale="log", xlabel=sweep.label, title=title)
        panel.set_xticks([each["x"] for each in results])
        panel.xaxis.set_major_formatter(ScalarFormatter())
        # Less than two decades often have a single power of ten between them.
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"growth-{name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main() -> None:
    """Measure, print, save; `report.py` draws the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", default=[], metavar="SWEEP", help=", ".join(SWEEPS))
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="measured passes at every point")
    parser.add_argument("--points", type=int, help="only so many of the smallest points")
    parser.add_argument("--processor-time", action="store_true", help="by the processor's clock: for a busy machine")
    parser.add_argument("--save-as", default="growth", help="start of names in benchmarks/results; empty: not saved")
    arguments = parser.parse_args()
    clock = process_time if arguments.processor_time else perf_counter
    for name in arguments.sweeps or SWEEPS:
        sweep = replace(SWEEPS[name], points=SWEEPS[name].points[: arguments.points])
        found = measure(sweep, arguments.repetitions, clock)
        print(table(rows(sweep, found)), end="\n\n", flush=True)
        if arguments.save_as:
            command = f"python benchmarks/growth.py {name} --repetitions {arguments.repetitions}"
            command += " --processor-time" * arguments.processor_time
            print(save(f"{arguments.save_as}-{name}", command, [{"sweep": name, "points": found}]).relative_to(ROOT))


if __name__ == "__main__":
    main()
