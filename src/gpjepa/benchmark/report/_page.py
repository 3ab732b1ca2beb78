"""One HTML page that needs nothing else, and the same as Markdown."""

from __future__ import annotations

import html
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from gpjepa._files import written_whole
from gpjepa.benchmark.metrics import cell_eval_version

from . import _tables as tables
from ._text import in_short

if TYPE_CHECKING:
    from gpjepa.benchmark._result import BenchmarkResult


@dataclass(frozen=True)
class Section:
    """A part of the page that is folded until it is asked for."""

    id: str
    title: str
    tables: list[tables.Table]
    figure: str = ""


def write_report(result: BenchmarkResult, out: Path) -> None:
    """Write ``report.html`` and ``report.md``.

    Parameters
    ----------
    result
        What a benchmark found.
    out
        Directory.
    """
    page = contents(result)
    for name in ("report.html", "report.md"):
        with written_whole(out / name) as draft:
            draft.write_text(_environment().get_template(f"{name}.j2").render(page))


def contents(result: BenchmarkResult) -> dict[str, Any]:
    """What the HTML page and the Markdown page show."""
    table, verdicts = result.table(), result.verdicts()
    focus = result.config.focus
    # Our own numbers first; the sections below hold everyone's.
    first = tables.first_screen(table, verdicts, focus)
    found = [
        Section("methods", "All methods", tables.headlines(table), _errors(table)),
        Section("published", "Beside published numbers", tables.published(result)),
        Section("verdicts", "Every verdict", tables.verdicts(verdicts, focus)),
        Section("controls", "Controls", tables.controls(table)),
        Section("strata", "By regime, effect size and E-test", tables.strata(result)),
        Section("calibration", "Calibration", tables.calibration(result, table), _intervals(table)),
        Section("targets", "The targeted genes themselves", tables.targets(result.scores)),
        Section("all", "All metrics", tables.all_metrics(table)),
        Section("given", "What each method was given", tables.given(result)),
        Section("compute", "Compute", tables.compute(result.runs), _scaling(table, result.runs)),
        Section("not-run", "Not run, failed, left out", tables.lost(result)),
        Section("splits", "Splits", tables.splits(result)),
        Section("metrics", "Metrics", tables.metrics(result.scores)),
    ]
    return {
        "title": result.config.title,
        "description": result.config.description,
        "focus": focus,
        "short": in_short(verdicts, focus, result),
        "figure": _overview(table, focus),
        "first": first,
        "sections": [s for s in found if any(len(t.frame) or t.note for t in s.tables)],
        "config": result.config.as_given(),
        "version": cell_eval_version(),
        "card": any(m.name == "GP-JEPA" for m in result.config.methods),
        "as_html": lambda t: _html(t.frame, focus),
        "as_markdown": _markdown,
    }


def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("gpjepa.benchmark.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _html(frame: pd.DataFrame, focus: str | None) -> str:
    """A frame of text as a table, rows of the focus and its verdicts marked."""
    head, *rows = frame.to_html(index=False, border=0, escape=True).split("<tbody>")
    body = rows[0] if rows else ""
    for verdict in ("better", "worse"):
        body = body.replace(f"<td>{verdict}", f'<td class="{verdict}">{verdict}')
    mine = f"<td>{html.escape(str(focus))}</td>"
    parts = [
        p.replace("<tr>", '<tr class="focus">') if mine in p else p for p in body.split("</tr>")
    ]
    return head + "<tbody>" + "</tr>".join(parts)


def _markdown(table: tables.Table) -> str:
    def line(cells: Any) -> str:
        return (
            "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
        )

    rows = [line(table.frame.columns), line(["---"] * table.frame.shape[1])]
    return "\n".join([*rows, *(line(r) for r in table.frame.itertuples(index=False))])


# Figures


def _overview(table: pd.DataFrame, focus: str | None) -> str:
    from gpjepa import plotting

    part = table[table["metric"] == "squared_error"]
    if focus is None or focus not in set(part["method"]):
        return _errors(table)
    return _svg(plotting.benchmark_overview(table, focus))


def _errors(table: pd.DataFrame) -> str:
    from gpjepa import plotting

    if not (table["metric"] == "squared_error").any():
        return ""
    return _svg(plotting.benchmark_scores(table, "squared_error"))


def _intervals(table: pd.DataFrame) -> str:
    from gpjepa import plotting

    stated = table["metric"].astype(str).str.startswith("coverage_").any()
    return _svg(plotting.calibration(table)) if stated else ""


def _scaling(table: pd.DataFrame, runs: pd.DataFrame) -> str:
    from gpjepa import plotting

    try:
        return _svg(plotting.scaling(table, runs))
    except ValueError:  # nothing was run in two sizes
        return ""


def _svg(figure: Any) -> str:
    """The figure as SVG that stands inside a page."""
    import matplotlib as mpl

    buffer = io.StringIO()
    # Without a date and with fixed ids, so that equal numbers give equal files.
    with mpl.rc_context({"svg.hashsalt": "gpjepa", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    head, rest = text[text.index("<svg") :].split(">", 1)
    # Without a size of its own it is as wide as the page.
    return re.sub(r' (?:width|height)="[^"]*"', "", head) + ">" + rest
