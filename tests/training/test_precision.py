"""Threads: a quota is kept, the caller's setting comes back, the command line's do not spin; freed memory is kept."""

import ctypes
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from plaudit.cli import app
from plaudit.configs.reward import RewardTrainingConfig
from plaudit.training import precision
from plaudit.training.precision import threads, usable_processors


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu.max": "9900000 100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({}, 64),
        ({"cpu.max": "broken"}, 64),
    ],
)
def test_the_quota_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_processors(tmp_path) == expected


def test_threads_are_set_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    with threads(3) as number:
        assert number == torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
    torch.set_num_threads(4)
    monkeypatch.setattr(precision, "usable_processors", lambda: 2)
    with threads("auto"):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 4
    torch.set_num_threads(before)


@pytest.mark.parametrize("value", [0, -1, "many"])
def test_only_numbers_and_auto(value: object) -> None:
    model = {"model_type": "llama", "tokenizer": "x"}
    assert RewardTrainingConfig.model_validate({"model": model, "threads": 2}).threads == 2
    with pytest.raises(ValueError, match="threads"):
        RewardTrainingConfig.model_validate({"model": model, "threads": value})


def test_what_the_user_says_about_waiting_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {"OMP_WAIT_POLICY": "active"}
    monkeypatch.setattr(os, "environ", environment)
    app.wait_without_spinning()
    assert environment == {"OMP_WAIT_POLICY": "active"}
    environment.clear()
    app.wait_without_spinning()
    assert environment == {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
    environment["KMP_BLOCKTIME"] = "200"
    app.wait_without_spinning()
    assert environment == {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "200"}


def test_freed_memory_is_kept_unless_the_user_or_the_c_library_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda parameter, value: said.append((parameter, value)))
    environment = {"MALLOC_TRIM_THRESHOLD_": "0"}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    app.keep_freed_memory()
    assert not said
    environment.clear()
    app.keep_freed_memory()
    assert dict(said) == {-1: 512 << 20, -2: 64 << 20, -3: 32 << 20}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    app.keep_freed_memory()
    assert len(said) == 3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_a_later_step_takes_no_new_pages() -> None:
    script = """
import resource, torch
from plaudit.cli.app import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(1 << 19) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(3)])
"""
    clean = {name: value for name, value in os.environ.items() if name not in app.MEMORY}
    done = subprocess.run([sys.executable, "-c", script], env=clean, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[-1] < 2048, "16 MiB are 4096 pages"
