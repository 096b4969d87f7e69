"""Puts tables and pictures made from `benchmarks/results/` into `docs/benchmarks.md`: no number is typed by hand.

    python benchmarks/report.py

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, with its machine, versions and command.
"""

import re
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import against_limit
import against_trl
import against_trl_rl
import attention_gpu
import compiled
import generation
import gpu
import growth
import quick
import scoring
import syncs
import threads
from common import ROOT, load, table
from workloads import WORKLOADS

PAGE = ROOT / "docs" / "benchmarks.md"
PLACE = re.compile(r"(<!-- table: (?P<name>[\w ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
NOT_YET = "Not yet measured."


def growth_tables(results: list[dict[str, Any]]) -> str:
    """One table per sweep, behind its picture."""
    parts = []
    for each in results:
        name, sweep = each["sweep"], growth.SWEEPS[each["sweep"]]
        picture = f"![Time and memory by {sweep.label}](images/benchmarks/growth-{name}.png)"
        parts += [picture, table(growth.rows(sweep, each["points"]))]
    return "\n\n".join(parts)


def files(name: str, parts: Iterable[str]) -> tuple[str, ...]:
    """The files that a benchmark saves its parts in."""
    return tuple(f"{name}-{part}" for part in parts)


LIMITS = [name + end for name in against_limit.CHOSEN for end in ("", "-compiled")]

TABLES: dict[str, tuple[tuple[str, ...], Callable[[list[Any]], str]]] = {
    "against trl": (files("against_trl", WORKLOADS), lambda results: table(against_trl.rows(results))),
    "memory and agreement": (files("against_trl", WORKLOADS), lambda results: table(against_trl.memory_rows(results))),
    "against trl on a gpu": (files("against_trl_gpu", WORKLOADS), lambda results: table(against_trl.rows(results))),
    "against the limit": (
        files("against_limit", LIMITS),
        lambda results: table(against_limit.rows(results)),
    ),
    "where the rest goes": (
        files("against_limit", LIMITS),
        lambda results: table(against_limit.profile_rows(results)),
    ),
    "compiled": (files("compiled", compiled.CHOSEN), lambda results: table(compiled.rows(results))),
    "against the limit on a gpu": (("gpu",), lambda results: table(against_limit.rows(results, gpu.GOAL))),
    "attention on a gpu": (("attention_gpu",), lambda results: table(attention_gpu.rows(results))),
    "waits on a gpu": (("syncs",), lambda results: table(syncs.rows(results))),
    "growth": (files("growth", growth.SWEEPS), growth_tables),
    "scoring": (files("scoring", scoring.SETS), lambda results: table(scoring.rows(results))),
    "generation": (files("generation", generation.CELLS), lambda results: table(generation.rows(results))),
    "against trl rl": (
        files("against_trl_rl", against_trl_rl.ALGORITHMS),
        lambda results: table(against_trl_rl.rows(results)),
    ),
    "generation on a gpu": (
        files("generation_gpu", generation.CELLS),
        lambda results: table(generation.rows(results)),
    ),
    "against trl rl on a gpu": (
        files("against_trl_rl_gpu", against_trl_rl.ALGORITHMS),
        lambda results: table(against_trl_rl.rows(results)),
    ),
    "agreement rl": (
        files("against_trl_rl", against_trl_rl.ALGORITHMS),
        lambda results: table(against_trl_rl.agreement_rows(results)),
    ),
    "threads": (files("threads", "012"), lambda results: table(threads.rows(results))),
    "quick": (("quick",), lambda results: table(quick.rows(results))),
}
"""Name of a table to the files of its results, and how it is made from all of them."""


def provenance(saved: list[dict[str, Any]]) -> str:
    """Where, with what and by which commands something was measured."""
    lines = []
    for machine, group in groupby(saved, key=described):
        lines.append(f"*{machine}:*")
        lines += [
            f"*`{each['command']}` (commit {each['commit']}, {each['date']}, load at the end "
            f"{each['machine']['load_average']:g})*"
            for each in group
        ]
    return "<br>\n".join(lines)


def described(saved: dict[str, Any]) -> str:
    """Machine and versions in one line."""
    machine = saved["machine"]
    parts = [
        f"{machine['gpu']}, " if "gpu" in machine else "",
        f"{machine['processor']}, cores: {machine['cores']}, threads: {machine['threads']}, ",
        f"{machine['memory_gib']:g} GiB; ",
        ", ".join(f"{name} {version}" for name, version in saved["versions"].items()),
        f", {saved['peer']}" if "peer" in saved else "",
    ]
    return "".join(parts)


def rendered(page: str) -> str:
    """The page with every table made anew.

    Raises:
        KeyError: for a table that nothing makes.
    """

    def fill(place: re.Match[str]) -> str:
        names, make = TABLES[place["name"]]
        saved = [found for name in names if (found := load(name))]
        results = [each for found in saved for each in found["results"]]
        body = f"{make(results)}\n\n{provenance(saved)}" if saved else NOT_YET
        return f"{place[1]}\n{body}\n\n{place[3]}"

    return PLACE.sub(fill, page)


def main() -> None:
    """Write the page and draw its pictures."""
    if missing := TABLES.keys() - {place["name"] for place in PLACE.finditer(PAGE.read_text(encoding="utf-8"))}:
        sys.exit(f"{PAGE.relative_to(ROOT)} has no place for: {', '.join(sorted(missing))}")
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for saved in filter(None, map(load, files("growth", growth.SWEEPS))):
        for each in saved["results"]:
            growth.plot(each["sweep"], growth.SWEEPS[each["sweep"]], each["points"])
    print(f"tables put into {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
