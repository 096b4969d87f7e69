"""The project's own files agree with one another: make targets, CI, lock file, extras."""

import os
import re
import shutil
import stat
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = {
    re.split(r"==", line)[0].lower().replace("_", "-"): line.partition("==")[2]
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
}


def packages(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", text)[0].lower().replace("_", "-") for text in requirements}  # type: ignore[index]


def dry_run(target: str, *variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", "-n", target, *variables],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_targets_are_what_contributing_says() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert {"demo", "test", "test-all", "check", "bench", "docs"} <= set(re.findall(r"^([\w-]+):", MAKEFILE, re.M))
    for target in set(re.findall(r"^make ([\w-]+)", contributing, re.M)):
        assert dry_run(target).returncode == 0, target
    check = dry_run("check").stdout
    for command in ("ruff format --check", "ruff check", "mypy", "tests/test_architecture.py"):
        assert command in check
    assert "not slow" in dry_run("test-all").stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_targets_of_the_benchmarks_run_what_they_should() -> None:
    everything, quick = dry_run("bench").stdout, dry_run("bench-quick").stdout
    assert everything.count("benchmarks/") >= 7
    assert everything.rstrip().endswith("benchmarks/report.py")
    assert "benchmarks/quick.py\n" in quick
    for script in re.findall(r"benchmarks/\w+\.py", everything + quick):
        assert (ROOT / script).exists(), script


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_unfit_python_is_refused_with_a_clear_line(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "venv", f"VENV={tmp_path / 'env'}", f"PYTHON={old}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "Plaudit needs Python 3.11 or later" in done.stderr
    assert not (tmp_path / "env").exists()


def test_ci_runs_check_and_test_and_nothing_else(tmp_path: Path) -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    log = tmp_path / "log"
    fake = tmp_path / "make"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {log}\n[ "$1" != "$FAIL" ]\n')
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "FAIL": "none"}
    assert subprocess.run([script], env=environment, capture_output=True, check=False).returncode == 0
    assert log.read_text().split() == ["check", "test"]
    for failing in ("check", "test"):
        done = subprocess.run([script], env=environment | {"FAIL": failing}, capture_output=True, check=False)
        assert done.returncode != 0


def test_everything_that_is_asked_for_is_locked() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = packages([*PROJECT["dependencies"], *extras["test"], *extras["docs"], *extras["dev"], *extras["lora"]])
    missing = wanted - set(LOCK) - {"plaudit"}
    assert not missing
    assert LOCK["torch"] == "2.13.0"
    assert not any("+" in pinned or "@" in pinned for pinned in LOCK.values())


def test_lower_bounds_hold_here() -> None:
    for requirement in PROJECT["dependencies"]:
        name, _, bound = requirement.partition(">=")
        found = re.findall(r"\d+", version(name))[:3]
        assert tuple(map(int, found)) >= tuple(map(int, re.findall(r"\d+", bound))), requirement


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"
