"""Tables: made from results alone, in their places, and the guard that compares with what was recorded."""

from multiprocessing import Pipe

import pytest
from common import alternate, median_ratio, shown, table
from growth import SWEEPS, Point, measure_point, rows
from quick import compare
from quick import main as guard
from report import NOT_YET, PAGE, PLACE, TABLES, rendered


def test_the_page_holds_the_tables_of_the_results_and_nothing_typed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert {place["name"] for place in PLACE.finditer(page)} == set(TABLES)
    assert rendered(page) == page


def test_a_table_without_results_says_so_and_an_unknown_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("report.load", lambda name: None)
    page = "a\n<!-- table: quick -->\nold\n<!-- end of table -->\nb\n"
    assert rendered(page) == f"a\n<!-- table: quick -->\n\n{NOT_YET}\n\n<!-- end of table -->\nb\n"
    with pytest.raises(KeyError, match="unknown"):
        rendered(page.replace("quick", "unknown"))


def test_tables_and_numbers() -> None:
    assert table([{"name": "a", "x": 1.0}, {"name": "b", "x": 1234.5}]).splitlines() == [
        "| name | x |",
        "|---|---:|",
        "| a | 1.00 |",
        "| b | 1,234 |",
    ]
    assert [shown(value) for value in (0.0, 2e-7, 12.34, 123.4, 5, "x")] == ["0.00", "2.0e-07", "12.3", "123", "5", "x"]
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3.0


def test_turns_are_taken_in_both_orders() -> None:
    order: list[str] = []
    times = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert "".join(order) == "baabba"
    assert [len(values) for values in times.values()] == [2, 2]


def test_the_guard_speaks_up_beyond_a_quarter() -> None:
    rows_now, fallen = compare({"a": 3.0, "b": 2.9, "new": 1.0}, {"a": 4.0, "b": 4.0})
    assert fallen == ["b"]
    assert [row["change"] for row in rows_now] == ["-25%", "-28%", "new"]


def test_the_guard_prints_both_and_ends_with_an_error_only_where_one_fell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = {"a": 3.0, "b": 2.0}
    monkeypatch.setattr("quick.ratios", lambda data: now)
    monkeypatch.setattr("quick.load", lambda name: {"results": [["a", 4.0], ["b", 2.0]]})
    monkeypatch.setattr("sys.argv", ["quick.py"])
    guard()
    assert "| a | 3.00 | 4.00 | -25% |" in capsys.readouterr().out
    now["a"] = 2.9
    with pytest.raises(SystemExit, match=r"slower than recorded by more than 25%: a$"):
        guard()
    assert "| a | 2.90 | 4.00 | -28% |" in capsys.readouterr().out
    monkeypatch.setattr("quick.load", lambda name: None)
    guard()
    assert "| a | 2.90 | – | new |" in capsys.readouterr().out


def test_a_point_of_growth_is_measured_on_both_paths() -> None:
    point = Point(prompts=1, completions=2, prompt=8, completion=4, layers=1, hidden=32)
    found = {}
    for path in ("packed", "padded"):
        here, there = Pipe(duplex=False)
        measure_point(point, path, 2, there)
        found[path] = here.recv()
        assert len(found[path]["seconds"]) == 2
    assert point.tokens == {"packed": 16, "padded": 24}
    result = {"x": 2, "tokens": point.tokens, "paths": {path: found[path] | {"memory": 2**20} for path in found}}
    assert rows(SWEEPS["completions"], [result])[0]["tokens, padded / packed"] == 1.5
