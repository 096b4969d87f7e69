"""The study of families: its settings are configurations, its rows are medians, and it never empties its page."""

import families
import pytest
from pydantic import TypeAdapter

from plaudit.configs.agents import AgentConfig


def test_every_setting_is_a_configuration():
    assert set(families.AGENTS) == set(families.SHORT) == set(families.GRIDS)
    for agent, settings in families.GRIDS.items():
        for options in settings:
            TypeAdapter(AgentConfig).validate_python(families.AGENTS[agent] | families.SHORT[agent] | options)


def test_a_row_is_the_median_of_the_seeds_and_the_best_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "RESULTS", tmp_path / "families.jsonl")
    for agent, gaps in {"ppo": (0.3, 0.1, 0.2), "world model": (0.0, 0.05, 0.4)}.items():
        for seed, gap in enumerate(gaps):
            cost = {"steps": 5000 + seed, "seconds": 2.0, "wall": 2.5 + seed, "memory": 300.0}
            families.keep(table="feedback", problem="strings", agent=agent, seed=seed, gap=gap, **cost)
    assert families.rows("strings", "feedback") == [
        "| world model | 5.0 % | 0.0 to 40.0 | 3 | 5,001 | 2.0 | 3.5 | 300 |",
        "| ppo | 20.0 % | 10.0 to 30.0 | 3 | 5,001 | 2.0 | 3.5 | 300 |",
    ]
    page = families.PAGE.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="strings, compute; dialogue, feedback"):
        families.write_page()
    assert families.PAGE.read_text(encoding="utf-8") == page


def test_the_best_setting_of_those_that_were_tried_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "RESULTS", tmp_path / "families.jsonl")
    monkeypatch.setattr(families, "train", lambda problem, options, seed, steps: {"gap": options["learning_rate"]})
    families.tune("strings", "dyna-q")
    assert [one["options"] for one in families.kept("tuning", "strings", "dyna-q")] == families.GRIDS["dyna-q"]
    assert families.settings("strings", "dyna-q")["learning_rate"] == 0.1
    families.tune("strings", "dyna-q")
    assert len(families.kept("tuning", "strings", "dyna-q")) == len(families.GRIDS["dyna-q"])
