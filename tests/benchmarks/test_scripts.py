"""Every benchmark starts, measures its smallest case and prints a table; nothing recorded changes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALLEST = [
    "against_trl.py hh-8 --steps 1 --save-as=",
    "against_limit.py wmt_mqm-k9 --steps 1 --save-as=",
    "compiled.py wmt_mqm-k9 --steps 1 --save-as=",
    "growth.py --points 1 --repetitions 1 --save-as=",
    "scoring.py wmt_mqm --repetitions 1 --save-as=",
    "generation.py 1-16-16 --prompts 1 --repeats 1 --save-as=",
    "against_trl_rl.py rloo --iterations 1 --save-as=",
    "threads.py --competitors 1 --seconds 0.1 --rounds 1 --save-as=",
    "gpu.py --steps 1 --save-as=",
    "attention.py --repeats 1",
    "packing.py",
    "host.py",
]
"""What `make bench` runs and what else the manual names, with the options that make it short."""

NEEDS_DATA = ("against", "compiled", "scoring", "packing", "host")


def test_the_smallest_cases_are_those_of_what_make_runs() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nbench:")[2].partition("\nbench-quick:")[0]
    scripts = set(re.findall(r"benchmarks/(\w+\.py)", recipe))
    # The guard and the report are run as they are.
    assert scripts - {line.split()[0] for line in SMALLEST} == {"quick.py", "report.py"}


@pytest.mark.slow
@pytest.mark.timeout(960)
@pytest.mark.parametrize("line", SMALLEST)
def test_the_smallest_case_runs(line: str) -> None:
    if line.startswith(NEEDS_DATA) and not (ROOT.parent / "shared" / "data").is_dir():
        pytest.skip("the real preference data is not beside the checkout")
    if line.startswith("against_trl") and not list((ROOT / "benchmarks" / ".peers").glob("trl-*")):
        pytest.skip("TRL's own environment is not there; `make bench` makes it")
    before = recorded()
    done = subprocess.run(
        [sys.executable, *f"benchmarks/{line}".split()],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    assert recorded() == before


def recorded() -> dict[str, float]:
    """When each recorded file was written."""
    return {path.name: path.stat().st_mtime for path in (ROOT / "benchmarks" / "results").iterdir()}
