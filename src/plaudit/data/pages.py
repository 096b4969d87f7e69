"""One self-contained HTML page: sections, tables and inline SVG plots in one calm style, light and dark.

Shared by the data audit and the evaluation report. Nothing on the page is fetched from anywhere: style, plots and
the numbers behind each plot (as a CSV link) all stand in the one file.
"""

import base64
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: Categorical colours, told apart by the colour-blind (after Okabe and Ito) and legible on white and on near-black.
COLOURS = ("#3b7dd8", "#e08a1e", "#2a9d78", "#c8553d", "#8a63c9", "#5aa9c9", "#b8903a", "#c264a0")

#: Ink of axes and labels; `figure_as_svg` turns exactly this colour into the page's own text colour.
INK = "#1a2b3d"
GRID = "#8793a2"

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "plaudit",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.alpha": 0.25,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Section:
    """A titled part of a page: `body` is HTML made by the functions of this file, `intro` plain text above it."""

    title: str
    body: str
    intro: str = ""


@dataclass(frozen=True)
class Tile:
    """One headline number: the value as it is to be read, its label, and a short remark (an interval, a floor)."""

    value: str
    label: str
    note: str = ""


def new_figure(width: float = 6.4, height: float = 3.2, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure in the page's style, with `columns` axes side by side; sizes in inches. No global state."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = [figure.add_subplot(1, columns, index + 1) for index in range(columns)]
    return figure, axes


def figure_as_svg(figure: Figure) -> str:
    """The figure as inline SVG whose ink follows the page's text colour (so that it is legible in the dark)."""
    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Comma-separated text with a header line."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return buffer.getvalue()


def plot(
    figure: Figure | str, caption: str, *, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> str:
    """A plot (or its SVG) with its caption and a link that saves the numbers behind it as `name.csv`."""
    svg = figure if isinstance(figure, str) else figure_as_svg(figure)
    data = base64.b64encode(csv_text(columns, rows).encode()).decode()
    return (
        f'<figure>{svg}<figcaption>{escape(caption)} <a download="{escape(name)}.csv" '
        f'href="data:text/csv;base64,{data}">CSV</a></figcaption></figure>'
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str = "") -> str:
    """An HTML table; numbers are set right-aligned, floats to three places unless already text. Cells are escaped;
    pass `markupsafe.Markup` for a cell that is HTML."""
    lines = [list(row) for row in rows]
    head = "".join(
        f'<th class="number">{escape(column)}</th>' if _is_numeric(lines, place) else f"<th>{escape(column)}</th>"
        for place, column in enumerate(columns)
    )
    body = "".join("<tr>" + "".join(_cell(value) for value in line) + "</tr>" for line in lines)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def key_values(values: Mapping[str, Any]) -> str:
    """A two-column table of names and values."""
    return table(("what", "value"), values.items())


def tiles(items: Sequence[Tile]) -> str:
    """Headline numbers, side by side."""
    cells = "".join(
        f'<div class="tile"><div class="value">{escape(tile.value)}</div><div class="label">{escape(tile.label)}</div>'
        f'<div class="note">{escape(tile.note)}</div></div>'
        for tile in items
    )
    return f'<div class="tiles">{cells}</div>'


def side_by_side(*blocks: str) -> str:
    """Blocks in columns where the window is wide enough, else one under the other."""
    return '<div class="columns">' + "".join(f"<div>{block}</div>" for block in blocks) + "</div>"


def paragraph(text: str) -> str:
    """A paragraph of plain text, escaped."""
    return f"<p>{escape(text)}</p>"


def details(summary: str, body: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def quote(text: str, *, limit: int = 600) -> str:
    """A text as somebody wrote it, line breaks kept, cut (visibly) after `limit` characters."""
    shown = text if len(text) <= limit else text[:limit] + f" … [{len(text) - limit} more characters]"
    return f"<blockquote>{escape(shown)}</blockquote>"


def percent(value: float | None, places: int = 1) -> str:
    """A rate in 0..1 as a percentage; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.{places}f} %"


def page(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """The whole page as one HTML document."""
    environment = Environment(autoescape=True)
    parts = [(f"part-{index}", section) for index, section in enumerate(sections)]
    return environment.from_string(_PAGE).render(
        title=title,
        subtitle=subtitle,
        css=Markup(_CSS),
        parts=[(key, s.title, s.intro, Markup(s.body)) for key, s in parts],
    )


def _is_numeric(lines: Sequence[Sequence[Any]], place: int) -> bool:
    values = [line[place] for line in lines if place < len(line) and line[place] is not None]
    return bool(values) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _cell(value: Any) -> str:
    if value is None:
        return '<td class="number">–</td>'
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{escape(value)}</td>"
    return f'<td class="number">{value:,}</td>' if isinstance(value, int) else f'<td class="number">{value:.3f}</td>'


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ css }}</style></head><body><main>
<header><h1>{{ title }}</h1>{% if subtitle %}<p class="subtitle">{{ subtitle }}</p>{% endif %}
<nav>{% for key, name, intro, body in parts %}<a href="#{{ key }}">{{ name }}</a>{% endfor %}</nav></header>
{% for key, name, intro, body in parts %}<section id="{{ key }}"><h2>{{ name }}</h2>
{% if intro %}<p class="intro">{{ intro }}</p>{% endif %}{{ body }}</section>
{% endfor %}</main></body></html>
"""

_CSS = """
:root { --paper: #fbfbf9; --card: #ffffff; --ink: #1a2b3d; --soft: #5b6a7a; --line: #dfe3e8; --accent: #3b7dd8; }
@media (prefers-color-scheme: dark) { :root { --paper: #12171d; --card: #1a2129; --ink: #e3e8ee; --soft: #98a6b5;
  --line: #2c3641; --accent: #7fb0f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .2rem; letter-spacing: -.01em; } h2 { font-size: 1.25rem; margin: 0 0 .4rem; }
.subtitle, .intro, figcaption, .note, caption { color: var(--soft); } .subtitle { margin: 0; overflow-wrap: anywhere; }
.intro { margin: 0 0 .9rem; max-width: 46rem; } a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1rem 0 0; font-size: .92rem; }
nav a { text-decoration: none; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.2rem 1.4rem;
  margin-top: 1.3rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; }
.tile { border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; }
.tile .value { font-size: 1.55rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile .label { font-size: .92rem; } .tile .note { font-size: .82rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1rem 1.6rem; }
figure { margin: .4rem 0; } figure svg { width: 100%; height: auto; color: var(--ink); }
figcaption { font-size: .88rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; margin: .4rem 0; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: left; padding: .32rem .7rem .32rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); } td { overflow-wrap: anywhere; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
blockquote { margin: .4rem 0; padding: .4rem .9rem; border-left: 3px solid var(--line); white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .92rem; }
summary { cursor: pointer; color: var(--accent); margin: .4rem 0; }
@media print { section { break-inside: avoid; } }
"""
