"""What every benchmark shares: the machine and its software, medians and ratios, results as JSON and as Markdown."""

import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REPETITIONS = 5


def machine() -> dict[str, Any]:
    """Processor, threads, memory, accelerator."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    found = {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def free_gib() -> float:
    """Memory that processes can still have; infinite where the system does not say."""
    file = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable: +(\d+) kB", file.read_text() if file.exists() else "", re.MULTILINE)
    return int(found[1]) / 2**20 if found else math.inf


def versions(*names: str) -> dict[str, str]:
    """Versions of Python and of packages."""
    packages = ("torch", "transformers", *names)
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def commit() -> str:
    """The commit in place now, with a + where files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


COMMIT = commit()
"""What is measured: read when a benchmark starts, for by its end the checkout may have moved on."""


def alternate(
    runs: Mapping[str, Callable[[], object]],
    repetitions: int = REPETITIONS,
    *,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every repetition of each function behind one warm-up: all in turn, every other time in reverse."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-1, repetitions):
        for name in list(runs) if number % 2 == 0 else list(reversed(runs)):
            started = clock()
            runs[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 0:
                times[name].append(clock() - started)
    return times


def median_ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """The median of the ratios of what was measured side by side."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def save(name: str, command: str, results: Sequence[Any], **more: Any) -> Path:
    """Write `results/<name>.json` with machine, versions, commit and command; returns its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    described = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": COMMIT,
        "machine": machine(),
        "versions": versions(),
        **more,
        "results": results,
    }
    path.write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def load(name: str) -> dict[str, Any] | None:
    """What `save` wrote; None where nothing was measured yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows with the same keys; numbers to the right."""
    if not rows:
        return "Not yet measured."
    columns = list(rows[0])
    numeric = {c for c in columns if all(isinstance(row[c], int | float) or row[c] in ("", "–") for row in rows)}
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join('---:' if c in numeric else '---' for c in columns)}|"]
    lines += [f"| {' | '.join(shown(row[c]) for c in columns)} |" for row in rows]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A number with three digits that matter, anything else as text."""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    return (
        f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"
    )
