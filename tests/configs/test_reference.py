"""Keys, types, defaults and meanings as users read them."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from plaudit.configs.base import Config
from plaudit.configs.reference import key_references, markdown_table, type_text


class Inner(Config):
    """The inside."""

    width: int = Field(4, gt=0, le=9)
    """How wide
    it is."""


class Outer(Config):
    """The outside."""

    inner: Inner = Inner(width=6)
    """Always there."""
    optional: Inner | None = None
    """There if asked for."""
    data: tuple[str, ...]
    """Files."""
    loss: Literal["a", "b"] | None = "a"
    """Which."""


def test_rows_follow_the_source_and_take_defaults_from_instances() -> None:
    rows = {row.key: row for row in key_references(Outer)}
    assert list(rows) == ["inner.width", "optional", "optional.width", "data", "loss"]
    assert rows["inner.width"].default == "6"
    assert rows["optional.width"].default == "4"
    assert rows["inner.width"].meaning == "How wide it is."
    assert rows["inner.width"].type == "integer (> 0, ≤ 9)"
    assert rows["optional"].default == "none"
    assert rows["data"].default == "(required)"
    assert rows["loss"].type == "a or b or none"


def test_types_in_a_users_words() -> None:
    assert type_text(Path | None) == "path or none"
    assert type_text(tuple[str, ...] | Literal["all"]) == "list of text or all"
    assert type_text(dict[str, Any] | None) == "mapping or none"
    assert type_text(bool) == "true/false"
    assert type_text(list[float]) == "list of number"


def test_markdown_has_one_row_per_key() -> None:
    lines = markdown_table(Outer).splitlines()
    assert lines[0] == "| key | type | default | meaning |"
    assert len(lines) == 2 + 5
    assert "| `data` | list of text | (required) | Files. |" in lines
