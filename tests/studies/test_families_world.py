"""Families on the built-in world: rows by hand from made-up runs, and the best answer there is."""

import json
import subprocess

import families_world
import pytest

from plaudit.demo.world import World, gold_reward


def made_up(name, seed, gold, way=(), **costs):
    path = [{"kl": 0.0, "gold": value, "seconds": float(second)} for second, value in way]
    return {"name": name, "seed": seed, "kl": 0.5, "gold": gold, "path": path, **costs}


def best_of_n(seed, start, gold):
    return {"name": "best-of-n", "seed": seed, "kl": 1.8, "gold": gold, "path": [{"kl": 0.0, "gold": start}]}


def test_gold_after_some_seconds_by_hand():
    """Windows of four iterations stand at their mean time, 3.5 s and 7.5 s; the end at 10 s."""
    one = made_up("ppo", 0, 4.0, [(1 + step, 1.0 + (step > 4)) for step in range(1, 9)], seconds=10.0)
    for seconds, gold in ((0.0, 0.0), (3.5, 1.0), (5.5, 1.5), (7.5, 2.0), (8.75, 3.0), (10.0, 4.0)):
        assert families_world.gold_after(one, seconds, start=0.0) == pytest.approx(gold)
    assert families_world.gold_after({**one, "path": one["path"][:1]}, 1.0, start=0.0) is None


def test_half_of_the_demonstrations_reach_the_best_and_no_answer_more():
    demonstrations = World(0).demonstrations(100)
    worth = [gold_reward(each.prompt, each.completion) for each in demonstrations]
    assert max(worth) == families_world.BEST_GOLD == 5.75
    assert sum(value == families_world.BEST_GOLD for value in worth) > 30


def test_the_page_of_made_up_runs_by_hand(tmp_path, monkeypatch, capsys):
    """Gaps from the start at -1.25 and 0.75 to the best at 5.75: 7 and 5 to go, of which PPO goes 3.5 and 1."""
    for place in ("PAGES", "IMAGES"):
        monkeypatch.setattr(families_world, place, tmp_path)
    monkeypatch.setattr(families_world, "RESULTS", tmp_path / "rows.jsonl")
    page = tmp_path / "families.md"
    page.write_text("before\n<!-- table: world -->\nold\n<!-- end of table -->\nafter\n")
    rows = [best_of_n(0, -1.25, 2.0), best_of_n(1, 0.75, 4.0)]
    for seed, gold in ((0, 2.25), (1, 1.75)):
        way = [(step, gold) for step in range(1, 9)]
        rows.append(made_up("ppo", seed, gold, way, seconds=8.4, wall=12.0, memory=500.0 + 10 * seed))
    families_world.RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    families_world.write_page()
    assert "gain after 8 s" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    # Half the width of a mean of two is 12.71 · difference / 2, by Student's t with one degree of freedom.
    row = "| PPO, critic | 2 | +2.25 ± 15.88 | 65 % ± 191 | 0.50 ± 0.00 | +2.25 ± 15.88 | 8 | 12 | 505 |"
    assert row in text
    assert "| best of 16 (no training) | 2 | +3.25 ± 0.00 | 44 % ± 118 | 1.80 ± 0.00 |  |  |  |  |" in text
    assert (tmp_path / "families-world.png").stat().st_size > 5_000
    families_world.RESULTS.write_text(json.dumps(rows[2]) + "\n")
    with pytest.raises(SystemExit, match="no best-of-n of the seeds"):
        families_world.write_page()
    assert page.read_text() == text


def test_a_run_is_a_process_with_one_thread_and_what_is_there_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(families_world, "OUTPUT", tmp_path)
    monkeypatch.setattr(families_world, "RESULTS", tmp_path / "rows.jsonl")
    started = []

    def play(words, check, env):
        name, seed = words[words.index("run") + 1], int(words[-1])
        started.append((name, seed, env["OMP_NUM_THREADS"]))
        result = {"name": name, "seed": seed, "path": [{"kl": 0.12345, "gold": 1.0}], "end": {"kl": 1.0, "gold": 2.0}}
        file = tmp_path / "results" / name / f"{seed}-{0.0 if name == 'best-of-n' else families_world.RATE:g}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        costs = {} if name == "best-of-n" else {"seconds": 3.21, "wall": 4.0, "memory": 500.04}
        file.write_text(json.dumps(result | costs))

    monkeypatch.setattr(subprocess, "run", play)
    families_world.run(["best-of-n", "ppo"], [0])
    families_world.run(["best-of-n", "ppo"], [0, 1])
    assert started == [(name, seed, "1") for seed in (0, 1) for name in ("best-of-n", "ppo")]
    rows = families_world.kept(families_world.RESULTS)
    assert [row["name"] for row in rows] == ["best-of-n", "ppo"] * 2
    costs = {"seconds": 3.2, "wall": 4.0, "memory": 500.0}
    assert rows[1] == {"name": "ppo", "seed": 0, "kl": 1.0, "gold": 2.0, "path": [{"kl": 0.123, "gold": 1.0}]} | costs
