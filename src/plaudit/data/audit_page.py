"""The audit as a table for the terminal and as one HTML page."""

from collections.abc import Iterable

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.table import Table

from plaudit.data.audit import Audit, LengthSummary
from plaudit.data.floors import Rate
from plaudit.data.pages import (
    COLOURS,
    GRID,
    INK,
    Section,
    Tile,
    details,
    new_figure,
    page,
    paragraph,
    percent,
    plot,
    quote,
    side_by_side,
    table,
    tiles,
)


def rate_text(rate: Rate | None) -> str:
    """A rate with its interval, e.g. `55.3 % (53.0 to 57.5)`."""
    if rate is None:
        return "–"
    return f"{percent(rate.value)} ({100 * rate.low:.1f} to {100 * rate.high:.1f})"


def audit_rows(audit: Audit) -> list[tuple[str, str, str]]:
    """The findings as (what, value, what to make of it), for terminal and page alike."""
    refused = ", ".join(f"{count} {reason}" for reason, count in audit.rows["refused"].items())
    position = rate_text(audit.first_wins)
    if not audit.position_informative:
        position = "not known"
    agreement = audit.agreement
    floor = "fitted to other prompts" if audit.sampled == audit.comparisons else f"on a sample of {audit.sampled:,}"
    return [
        ("rows read", f"{audit.rows['read']:,}", f"{audit.rows['used']:,} used, {_refused(audit):,} refused"),
        *([("refused because", refused, "see the file of refused rows")] if refused else []),
        ("format", ", ".join(sorted(set(audit.rows["formats"].values()))), ""),
        ("comparisons", f"{audit.comparisons:,}", _counts(audit.judgements)),
        ("prompts", f"{audit.prompts:,}", f"{audit.distinct_prompts:,} by first user turn, which splits keep together"),
        ("completions K", _counts(audit.completions, ": "), "K: comparisons"),
        ("annotators", f"{len(audit.annotators):,}", "named in the records"),
        ("groups", f"{audit.groups:,}", "kept together in splits by group"),
        ("prompt length", _length(audit.prompt_lengths), "characters"),
        ("completion length", _length(audit.completion_lengths), "characters"),
        ("judged pairs", f"{audit.pairs:,}", "with a winner"),
        ("tied pairs", f"{audit.ties:,}", f"{percent(audit.ties / max(1, audit.ties + audit.pairs))} of judged pairs"),
        ("longer wins", rate_text(audit.longer_wins), "a model that only likes length gets this, or 1 minus this"),
        ("bag of words", rate_text(audit.bag_of_words), f"floor for pair accuracy, {floor}"),
        ("first shown wins", position,
         "position bias; 50 % is none" if audit.position_informative else "the winner always stands first or last"),
        ("duplicates", f"{audit.duplicates:,}", "repeat prompt, completions, judgement and annotator"),
        ("contradictory pairs", f"{audit.contradictory_pairs:,}", f"{audit.self_contradictions:,} by one annotator"),
        ("prompts with cycles", f"{audit.cyclic_prompts:,}", "majority preferences that run in a circle"),
        ("pairs judged again", f"{agreement.units:,}", f"{agreement.judgements:,} judgements"),
        ("agreement", percent(agreement.agreement), "of two annotators of the same pair"),
        ("Krippendorff's alpha", _alpha(audit), "0 is chance, 1 perfect"),
        ("near-duplicate prompts", f"{audit.near_duplicate_prompts:,}", "pairs of prompts; a split may part them"),
    ]  # fmt: skip


def audit_table(audit: Audit) -> Table:
    """The findings as a table for the terminal."""
    result = Table(title=f"Audit of {audit.source}", title_justify="left", box=None, pad_edge=False)
    result.add_column("what", style="bold", no_wrap=True)
    result.add_column("value")
    result.add_column("note", style="dim")
    for row in audit_rows(audit):
        result.add_row(*row)
    return result


def audit_page(audit: Audit) -> str:
    """The whole audit as one self-contained HTML page."""
    agreement = audit.agreement
    headline = [
        Tile(f"{audit.comparisons:,}", "comparisons", f"{audit.rows['read']:,} rows read, {_refused(audit):,} refused"),
        Tile(f"{audit.prompts:,}", "prompts", f"{audit.pairs:,} judged pairs"),
        _rate_tile(audit.bag_of_words, "bag of words"),
        _rate_tile(audit.longer_wins, "longer wins"),
        Tile(percent(agreement.agreement), "agreement", f"{agreement.units:,} pairs judged again"),
        Tile(f"{audit.contradictory_pairs:,}", "contradictory pairs", f"{audit.cyclic_prompts:,} prompts with cycles"),
    ]  # fmt: skip
    sections = [
        Section("At a glance", tiles(headline) + _refusals(audit)),
        Section("All findings", table(("what", "value", "note"), audit_rows(audit))),
        Section("What was compared", side_by_side(_completions_plot(audit), _judgement_table(audit))
                + side_by_side(_lengths_plot(audit.prompt_lengths, "prompt"),
                               _lengths_plot(audit.completion_lengths, "completion"))),
        Section("Shortcuts", side_by_side(_longer_plot(audit), _position_plot(audit)) + _words(audit),
                "What a model could learn instead of what people meant. Bars show 95 % intervals over prompts."),
        Section("Annotators", _annotators(audit), "Agreement of two judgements of the same pair of texts."),
        Section("Oddities", _oddities(audit), "A few of each kind, as they stand in the data."),
    ]  # fmt: skip
    return page("Audit of comparisons", sections, subtitle=audit.source)


def _refused(audit: Audit) -> int:
    return sum(audit.rows["refused"].values())


def _counts(counts: dict[str, int] | dict[int, int], between: str = " ") -> str:
    items = [f"{key}{between}{count:,}" for key, count in counts.items()]
    return ", ".join(items[:12]) + (", …" if len(items) > 12 else "")


def _length(lengths: LengthSummary) -> str:
    return f"median {lengths.quartiles[1]:,.0f}, 95 % below {lengths.p95:,.0f}, longest {lengths.maximum:,}"


def _interval(rate: Rate | None) -> str:
    return "too little data" if rate is None else f"{100 * rate.low:.1f} to {100 * rate.high:.1f} % (95 %)"


def _rate_tile(rate: Rate | None, label: str) -> Tile:
    return Tile(percent(None if rate is None else rate.value), label, _interval(rate))


def _alpha(audit: Audit) -> str:
    return "–" if audit.agreement.alpha is None else f"{audit.agreement.alpha:.3f}"


def _refusals(audit: Audit) -> str:
    if not audit.rows["refused"]:
        return ""
    return table(("refused because", "rows"), audit.rows["refused"].items())


def _completions_plot(audit: Audit) -> str:
    figure, (axes,) = new_figure(5.4, 2.9)
    rows = list(audit.completions.items())
    axes.bar([str(key) for key, _ in rows], [count for _, count in rows], color=COLOURS[0], width=0.65)
    axes.set_xlabel("completions per prompt, K")
    axes.set_ylabel("comparisons")
    axes.grid(axis="x", visible=False)
    return plot(figure, "How many completions were judged together.", name="completions", columns=("K", "comparisons"),
                rows=rows)  # fmt: skip


def _judgement_table(audit: Audit) -> str:
    parts = [table(("judgement", "comparisons"), audit.judgements.items())]
    if audit.subsets:
        parts.append(table(("subset", "comparisons"), list(audit.subsets.items())[:20]))
    return "".join(parts)


def _lengths_plot(lengths: LengthSummary, name: str) -> str:
    figure, (axes,) = new_figure(5.4, 2.7)
    rows = list(zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False))
    axes.bar([low for low, _, _ in rows], [count for _, _, count in rows], width=[high - low for low, high, _ in rows],
             align="edge", color=COLOURS[2], edgecolor="none")  # fmt: skip
    axes.axvline(lengths.quartiles[1], color=COLOURS[3], linewidth=1.5)
    if lengths.maximum > 20 * max(1, lengths.minimum):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"{name} length in characters")
    axes.set_ylabel(f"{name}s")
    caption = f"Lengths of {name}s; the line is the median, {lengths.quartiles[1]:,.0f}."
    return plot(figure, caption, name=f"{name}-lengths", columns=("from", "to", "count"), rows=rows)  # fmt: skip


def _longer_plot(audit: Audit) -> str:
    if not audit.longer_wins_by_difference:
        return "<p>Too few pairs of different length to show whether the longer one wins.</p>"
    figure, (axes,) = new_figure(5.4, 2.9)
    labels = [f"{low:,}–{high:,}" for low, high, _ in audit.longer_wins_by_difference]
    _rates(axes, labels, [rate for _, _, rate in audit.longer_wins_by_difference])
    axes.set_xlabel("difference in length, characters")
    axes.set_ylabel("longer one wins, %")
    rows = [(low, high, rate.value, rate.low, rate.high, rate.count)
            for low, high, rate in audit.longer_wins_by_difference]  # fmt: skip
    return plot(figure, "How often the longer of two won; the dashed line is no preference.", name="longer-wins",
                columns=("from", "to", "rate", "low", "high", "pairs"), rows=rows)  # fmt: skip


def _position_plot(audit: Audit) -> str:
    if not audit.position_informative:
        return "<p>The winner always stands in the same place, so the order of showing is not known from this data.</p>"
    figure, (axes,) = new_figure(5.4, 2.9)
    rows = [(place + 1, shown, best / shown, chance / shown)
            for place, (shown, best, chance) in audit.best_by_position.items()]  # fmt: skip
    axes.bar([row[0] for row in rows], [100 * row[2] for row in rows], color=COLOURS[4], width=0.65)
    axes.hlines([100 * row[3] for row in rows], [row[0] - 0.42 for row in rows], [row[0] + 0.42 for row in rows],
                color=INK, linewidth=1.6)  # fmt: skip
    axes.set_xticks([row[0] for row in rows])
    axes.set_xlabel("place in the list")
    axes.set_ylabel("ranked best, %")
    axes.grid(axis="x", visible=False)
    caption = (
        "How often each place was ranked best; the lines are chance (longer lists have more places). "
        f"The first shown won {rate_text(audit.first_wins)} of pairs."
    )
    return plot(figure, caption, name="position", columns=("place", "shown", "best", "chance"), rows=rows)


def _rates(axes: object, labels: list[str], rates: list[Rate]) -> None:
    values = [100 * rate.value for rate in rates]
    errors = [
        [100 * (rate.value - rate.low) for rate in rates],
        [100 * (rate.high - rate.value) for rate in rates],
    ]
    axes.errorbar(range(len(rates)), values, yerr=errors, fmt="o", color=COLOURS[1], capsize=3)  # type: ignore[attr-defined]
    axes.set_xticks(range(len(rates)), labels)  # type: ignore[attr-defined]
    axes.axhline(50, color=GRID, linestyle="--", linewidth=1.2)  # type: ignore[attr-defined]


def _words(audit: Audit) -> str:
    if not audit.preferred_words:
        return ""
    intro = "Words and pairs with the strongest weights in the bag-of-words floor."
    return paragraph(intro) + side_by_side(
        table(("preferred", "weight"), audit.preferred_words),
        table(("dispreferred", "weight"), audit.dispreferred_words),
    )


def _annotators(audit: Audit) -> str:
    agreement = audit.agreement
    if not agreement.units:
        return "<p>No pair was judged by two annotators, so their agreement cannot be measured.</p>"
    body = tiles([
        Tile(percent(agreement.agreement), "agreement", f"over {agreement.units:,} pairs of texts"),
        Tile(_alpha(audit), "Krippendorff's alpha", "interval metric on won, tied, lost; 0 is chance"),
    ])  # fmt: skip
    rows = sorted(agreement.by_annotator.items(), key=lambda item: item[1][0])
    if not rows:
        return body
    lines: Iterable[tuple[str, int, str, int]] = (
        (name, audit.annotators.get(name, 0), percent(rate), count) for name, (rate, count) in rows[:30]
    )
    return body + table(("annotator", "comparisons", "agrees with others", "occasions"), lines,
                        caption="Those who agree least with the others come first.")  # fmt: skip


def _oddities(audit: Audit) -> str:
    parts = [details(f"{name.capitalize()} ({len(texts)} shown)", "".join(quote(text, limit=1500) for text in texts))
             for name, texts in audit.examples.items() if texts]  # fmt: skip
    return "".join(parts) or "<p>None found.</p>"
