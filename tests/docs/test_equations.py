"""The table of equations names functions and tests that exist."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
FUNCTIONS = sorted(set(re.findall(r"`(plaudit(?:\.\w+)+)`", TABLE)))
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", TABLE)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_exist(name):
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return
    pytest.fail(f"{name} is not there")


@pytest.mark.parametrize("name", TESTS)
def test_tests_exist(name):
    file, _, function = name.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert not function or any(isinstance(n, ast.FunctionDef) and n.name == function for n in tree.body)


def test_every_row_has_an_equation_a_function_and_a_test():
    rows = [line for line in TABLE.splitlines() if line.startswith("|") and not re.match(r"\|(---|\s*equation)", line)]
    assert len(rows) > 35
    for row in rows:
        cells = row.strip("|").split("|")  # a bar inside code would be a column for some readers of Markdown
        assert len(cells) == 4, row
        assert "`plaudit." in cells[1] or "the same" in cells[1], row
        assert "`tests/" in cells[3], row


def test_every_loss_is_in_the_table():
    from plaudit.core import pointwise_losses, preference_losses

    for module in (preference_losses, pointwise_losses):
        for name in vars(module):
            # The loss of whole rankings is the negative of its likelihood, which has the rows.
            if name.endswith("_loss") and not name.startswith("_") and name not in ("plackett_luce_loss", "mse_loss"):
                assert f".{name}`" in TABLE or name == "huber_loss", name
