"""Puts the tables made from `benchmarks/results/` into `docs/benchmarks.md`, so that no number is typed by hand.

    python benchmarks/report.py

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, with its machine, versions and command.
"""

import re
import sys
from collections.abc import Callable
from typing import Any

import against_limit
import against_trl
import gpu
import growth
import scoring
from common import ROOT, load, table

PAGE = ROOT / "docs" / "benchmarks.md"
PLACE = re.compile(r"(<!-- table: (?P<name>[\w ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
NOT_YET = "Not yet measured."


def growth_tables(results: dict[str, Any]) -> str:
    """One table per sweep, behind its picture."""
    parts = []
    for name, found in results.items():
        sweep = growth.SWEEPS[name]
        picture = f"![Time and memory by {sweep.label}](images/benchmarks/growth-{name}.png)"
        parts += [picture, table(growth.rows(sweep, found))]
    return "\n\n".join(parts)


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "against trl": ("against_trl", lambda results: table(against_trl.rows(results))),
    "memory and agreement": ("against_trl", lambda results: table(against_trl.memory_rows(results))),
    "against trl on a gpu": ("against_trl_gpu", lambda results: table(against_trl.rows(results))),
    "against the limit": ("against_limit", lambda results: table(against_limit.rows(results))),
    "where the rest goes": ("against_limit", lambda results: table(against_limit.profile_rows(results))),
    "against the limit on a gpu": ("gpu", lambda results: table(against_limit.rows(results, gpu.GOAL))),
    "growth": ("growth", growth_tables),
    "scoring": ("scoring", lambda results: table(scoring.rows(results))),
    "quick": ("quick", lambda results: table([{"times faster than": n, "ratio": r} for n, r in results.items()])),
}
"""Name of a table to the file of its results, and how it is made from them."""


def provenance(saved: dict[str, Any]) -> str:
    """Where, with what and by which command something was measured, in one line."""
    machine = saved["machine"]
    parts = [
        f"{machine['gpu']}, " if "gpu" in machine else "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, ",
        f"{machine['memory_gib']:g} GiB; load at the end {machine['load_average']:g}; ",
        ", ".join(f"{name} {version}" for name, version in saved["versions"].items()),
        f", {saved['peer']}" if "peer" in saved else "",
        f"; commit {saved['commit']}, {saved['date']}: `{saved['command']}`",
    ]
    return f"*{''.join(parts)}*"


def rendered(page: str) -> str:
    """The page with every table made anew.

    Raises:
        KeyError: for a table that nothing makes.
    """

    def fill(place: re.Match[str]) -> str:
        file, make = TABLES[place["name"]]
        saved = load(file)
        body = NOT_YET if saved is None else f"{make(saved['results'])}\n\n{provenance(saved)}"
        return f"{place[1]}\n{body}\n\n{place[3]}"

    return PLACE.sub(fill, page)


def main() -> None:
    """Write the page."""
    if missing := TABLES.keys() - {place["name"] for place in PLACE.finditer(PAGE.read_text(encoding="utf-8"))}:
        sys.exit(f"{PAGE.relative_to(ROOT)} has no place for: {', '.join(sorted(missing))}")
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"tables put into {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
