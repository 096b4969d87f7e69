"""`plaudit doctor`: what this machine can do."""

import json
import sys
from typing import Annotated, Any

from cyclopts import Parameter


def doctor(*, as_json: Annotated[bool, Parameter(name="--json", negative="")] = False) -> None:
    """Say what this machine can do: devices, dtypes, threads, memory, extras, attention backends, trackers.

    Parameters
    ----------
    as_json
        Print one JSON object instead of tables.
    """
    from plaudit.training.doctor import diagnose

    report = diagnose()
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        print_report(report)


def print_report(report: dict[str, Any]) -> None:
    """Print the report of `plaudit.training.doctor.diagnose` as tables for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)

    def section(title: str, rows: list[tuple[str, str]]) -> None:
        table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 2))
        for name, value in rows:
            table.add_row(name, value)
        console.print(table)
        console.print()

    machine = report["machine"]
    section("Versions", [(name, version or "not installed") for name, version in report["versions"].items()])
    section(
        "Machine",
        [
            ("platform", machine["platform"]),
            ("cores", f"{machine['usable_cores']} of {machine['cores']} usable; torch uses {machine['torch_threads']}"),
            ("memory", f"{_gib(machine['memory'])}, {_gib(machine['memory_available'])} available"),
            ("disk", f"{_gib(machine['disk_free'])} free here"),
        ],
    )
    section("Devices", [(d["name"], f"{d['model']}, {_gib(d['memory'])}") for d in report["devices"]])
    section("Number formats (product and gradient tried)", [_dtype_row(row) for row in report["dtypes"]])
    section("Extras (pip install 'plaudit[NAME]')", [_extra_row(*item) for item in sorted(report["extras"].items())])
    attention = report["attention"]
    section(
        "Attention",
        [
            ("packed", ", ".join(attention["packed_backends"])),
            *((f"not on {d}", _faults(found)) for d, found in attention["packed_faults"].items() if found),
            ("stock", ", ".join(attention["stock"])),
        ],
    )
    ready = ", ".join(name for name, installed in report["trackers"].items() if installed)
    absent = ", ".join(name for name, installed in report["trackers"].items() if not installed)
    section("Trackers", [("ready", ready)] + ([("not installed", absent)] if absent else []))


def _faults(found: dict[str, str]) -> str:
    return "; ".join(f"{name} {reason}" for name, reason in found.items())


def _dtype_row(row: dict[str, Any]) -> tuple[str, str]:
    name = f"{row['device']} {row['dtype']}"
    if not row["works"]:
        return name, f"does not work: {row['fault']}"
    return name, f"works, {row['gigaflops']:.0f} Gflop/s, relative error {row['relative_error']:.1g}"


def _extra_row(extra: str, packages: dict[str, str | None]) -> tuple[str, str]:
    absent = [name for name, version in packages.items() if version is None]
    found = ", ".join(f"{name} {version}" for name, version in packages.items() if version is not None)
    missing = f"missing {', '.join(absent)}" if absent else ""
    return extra, "; ".join(filter(None, (found, missing)))


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
