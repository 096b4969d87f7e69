"""The study of the demo's settings: a small run gives rows that the table can show, beside those that are committed."""

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

STUDIES = Path(__file__).resolve().parents[2] / "studies"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(STUDIES))
    module = importlib.import_module("demo_settings")
    monkeypatch.setattr(module, "LETTERS", 4)
    return module


def test_a_small_run_gives_finite_rows_and_own_letters_fit_a_trained_model_better(
    demo: ModuleType, tmp_path: Path
) -> None:
    sizes = {"letter_book": 60, "demonstrations": 20, "rankings": 20, "test_rankings": 20, "vocabulary": 400}
    sizes |= {"hidden_size": 32, "layers": 1, "iterations": 1, "prompts_per_iteration": 4, "max_new_tokens": 8}
    run = demo.first_stages(tmp_path / "run", 3, **sizes)
    rows = [{"seed": 3, **row} for row in (demo.start_row(run), demo.aligned_row(run, "rate 3e-4, β 0.1"))]
    assert all(math.isfinite(value) for row in rows for value in row.values() if not isinstance(value, str))
    assert "| 3 |" in demo.table(rows)
    own, other = demo.read(str(run.file("sft/model")), 3, letters=6)
    assert 0 < own < 1000
    assert 0 < other < 1000


def test_the_committed_rows_fill_the_table_of_the_page(demo: ModuleType) -> None:
    rows = [json.loads(line) for line in demo.RESULTS.read_text().splitlines()]
    page = (demo.ROOT / "docs" / "studies" / "demo.md").read_text()
    assert demo.table(rows) in page
