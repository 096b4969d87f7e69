"""The help page of a verb: every configuration key with its type, default and meaning."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from plaudit.cli.verb import COMMON_OPTIONS
from plaudit.configs.base import Config
from plaudit.configs.reference import REQUIRED, key_references


def print_verb_help(config_class: type[Config], *, verb: str, about: str, positional: str | None) -> None:
    """Print how to call a verb and every key of its configuration."""
    console = Console(highlight=False)
    word = f" [{positional.upper()}]" if positional else ""
    console.print(f"Usage: plaudit {verb}{word} [FILE.yaml …] [--key value …]", markup=False)
    paragraphs = [" ".join(paragraph.split()) for paragraph in about.strip().split("\n\n")]
    console.print("\n" + "\n\n".join(paragraphs) + "\n", markup=False)
    console.print(
        "Settings are merged in this order, later ones win: defaults, YAML files from left to right, flags. Switches "
        "have a --no- form; 'none' unsets; a list takes one value per flag, which may be repeated, or '[a, b]'.\n",
        markup=False,
    )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), expand=True)
    table.add_column("key", no_wrap=True, overflow="fold")
    table.add_column("meaning", ratio=1)
    for row in key_references(config_class):
        tail = REQUIRED if row.default == REQUIRED else f"[{row.type}; default {row.default}]"
        table.add_row(Text(f"--{row.key.replace('_', '-')}", style="bold"), Text(f"{row.meaning} ").append(tail, "dim"))
    table.add_section()
    for option, meaning in COMMON_OPTIONS:
        table.add_row(Text(option, style="bold"), Text(meaning))
    console.print(table)
