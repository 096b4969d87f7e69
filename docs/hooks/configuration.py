"""Puts the configuration reference into the manual, taken from the configurations when the manual is built.

A line `<!-- configuration: module:Class -->` becomes the class's description and a table of its keys.
"""

import re
from typing import Any

from plaudit.cli.verb import import_string
from plaudit.configs.reference import markdown_table


def fill(markdown: str) -> str:
    """The page with every configuration marker replaced by its table."""

    def table(found: re.Match[str]) -> str:
        config: Any = import_string(found[1])
        about = " ".join((config.__doc__ or "").split())
        return f"{about}\n\n{markdown_table(config)}"

    return re.sub(r"<!-- configuration: (\S+) -->", table, markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return fill(markdown)
