"""The report: one HTML page that needs nothing else, and its Markdown twin."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gpjepa._files import written_whole

from ._cell_eval import cell_eval_version
from ._config import Published
from ._methods import NEGATIVE, ORACLES
from ._metrics import METRICS
from ._published import beside_published
from ._summary import calibration, verdicts

if TYPE_CHECKING:
    from ._runner import BenchmarkResult

HEADLINE = ("squared_error", "pearson_centroid", "pds_cosine", "de_wilcoxon_sig_jaccard",
            "energy_distance_unbiased", "embedding_cosine", "gene_set_agreement")  # fmt: skip
"""One or two metrics of each axis: the first screen."""


@dataclass(frozen=True)
class Table:
    """A table of the report: a heading, a remark, columns and rows of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def write_report(result: BenchmarkResult, out: Path) -> None:
    """Write ``report.html``, ``report.md``, ``scores.csv``, ``table.csv`` and ``runs.csv``.

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
    for name, frame in (("scores", result.scores), ("runs", result.runs),
                        ("table", page["table"])):  # fmt: skip
        with written_whole(out / f"{name}.csv") as draft:
            frame.to_csv(draft, index=False)


def contents(result: BenchmarkResult) -> dict[str, Any]:
    """Everything that both twins of the report say."""
    table = result.table()
    methods = list(dict.fromkeys(table["method"]))
    focus = result.config.focus
    rivals = [m for m in methods if m not in ORACLES and not _variant(m, focus)]
    headline = [m for m in HEADLINE if m in result.scores]
    beside = pd.DataFrame()
    if focus is not None:
        beside = verdicts(result.scores, focus, rivals, [m for m in METRICS if m in result.scores])
    return {
        "title": result.config.title,
        "description": result.config.description,
        "focus": focus,
        "table": table,
        "short": _in_short(beside, focus),
        "first": _first_screen(beside, headline, focus),
        "headlines": _headlines(table, headline),
        "figures": _figures(table, result.runs),
        "wins": _wins(beside, focus),
        "regimes": _strata(result, "regime", "regime"),
        "sizes": _strata(result, "size", "size of the measured effect"),
        "e_test": _strata(result, "e_test", "E-test of the measured cells"),
        "calibration": _calibration(result, table),
        "targets": _targets(result.scores),
        "all_metrics": _all_metrics(table),
        "controls": _controls(table, headline, rivals),
        "compute": _compute(result.runs),
        "published": _published(result),
        "not_run": _not_run(result.runs, result.scores),
        "splits": _splits(result),
        "metrics": _metrics(result.scores),
        "unscaled": _unscaled(table),
        "config": result.config.as_given(),
        "version": cell_eval_version(),
    }


def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("gpjepa.benchmark"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _variant(method: str, focus: str | None) -> bool:
    return focus is not None and (method == focus or method.startswith(f"{focus} ("))


def number(value: float) -> str:
    """Three significant digits; a dash where there is no value."""
    if value != value:
        return "–"
    if abs(value) < 5e-4:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def with_interval(value: float, low: float, high: float) -> str:
    """``0.41 (0.35 to 0.47)``, or the value alone where there is no interval."""
    if value != value:
        return "–"
    if low != low:
        return number(value)
    return f"{number(value)} ({number(low)} to {number(high)})"


# The first screen


def _in_short(beside: pd.DataFrame, focus: str | None) -> list[str]:
    """One sentence per data set and kind of split, losses first."""
    if beside.empty:
        return []
    said = []
    main = beside[beside["metric"] == "squared_error"]
    order = {"worse": 0, "not significantly different": 1, "equal": 2, "better": 3}
    for _, row in main.sort_values("verdict", key=lambda v: v.map(order), kind="stable").iterrows():
        where = f"{row['data']}, {row['kind']} ({row['n_rows']} rows)"
        errors = f"{number(row['value'])} of no change against {number(row['rival_value'])}"
        gain = f"{number(row['low'])} to {number(row['high'])}"
        sentence = {
            "worse": f"{focus} loses to {row['rival']}: error {errors} (gain {gain}).",
            "better": f"{focus} is ahead of the best other method, {row['rival']}: error {errors} "
                      f"(gain {gain}).",
            "equal": f"{focus} and {row['rival']} are identical: error {errors}.",
            "not significantly different":
                f"{focus} is not significantly different from the best other method, "
                f"{row['rival']}: error {errors} (gain {gain}).",
        }[str(row["verdict"])]  # fmt: skip
        said.append(f"{where}: {sentence}")
    asked = beside[["data", "kind"]].drop_duplicates().itertuples(index=False)
    told = set(main[["data", "kind"]].itertuples(index=False, name=None))
    said += [
        f"{data}, {kind}: the measured effects are no larger than their sampling noise, so errors "
        "cannot be compared."
        for data, kind in asked if (data, kind) not in told
    ]  # fmt: skip
    return said


def _first_screen(beside: pd.DataFrame, headline: Sequence[str], focus: str | None) -> Table | None:
    if beside.empty:
        return None
    rows = []
    for (data, kind), part in beside.groupby(["data", "kind"], sort=False):
        by_metric = part.set_index("metric")
        cells = [f"{data}: {kind}"]
        for metric in headline:
            if metric not in by_metric.index:
                cells.append("–")
                continue
            row = by_metric.loc[metric]
            cells.append(f"{row['verdict']} ({number(row['value'])}; {row['rival']} "
                         f"{number(row['rival_value'])})")  # fmt: skip
        rows.append(cells)
    return Table(
        f"{focus} beside the best other method, metric by metric",
        ["data and split", *(METRICS[m].label for m in headline)], rows,
        "The rival is the best by the very numbers that are compared, which favours it; better "
        "and worse mean that a 95% interval of the difference excludes 0.",
    )  # fmt: skip


def _headlines(table: pd.DataFrame, headline: Sequence[str]) -> list[Table]:
    return [
        _methods_table(part, headline, f"{data}: {kind}")
        for (data, kind), part in table.groupby(["data", "kind"], sort=False)
    ]


def _methods_table(part: pd.DataFrame, metrics: Sequence[str], title: str) -> Table:
    by_key = part.set_index(["method", "metric"])
    first = part[part["metric"] == metrics[0]].set_index("method")["value"]
    better = METRICS[metrics[0]].direction == "higher"
    methods = sorted(dict.fromkeys(part["method"]),
                     key=lambda m: (-1 if better else 1) * first.get(m, np.inf))  # fmt: skip
    rows = []
    for method in methods:
        cells = [method]
        for metric in metrics:
            if (method, metric) not in by_key.index:
                cells.append("–")
                continue
            row = by_key.loc[(method, metric)]
            text = with_interval(row["value"], row["low"], row["high"])
            if np.isfinite(row["scaled"]):
                text += f" · scaled {number(row['scaled'])}"
            cells.append(text)
        rows.append(cells)
    n = int(part["n_rows"].max())
    return Table(title, ["method", *(METRICS[m].label for m in metrics)], rows, f"{n} rows.")


# The parts below it


def _wins(beside: pd.DataFrame, focus: str | None) -> list[Table]:
    """All metrics in which the focus is better, and those in which it is worse."""
    tables: list[Table] = []
    if beside.empty:
        return tables
    for verdict, title in (("worse", f"Where {focus} loses"), ("better", f"Where {focus} wins")):
        part = beside[beside["verdict"] == verdict]
        rows = [
            [f"{r['data']}: {r['kind']}", METRICS[r["metric"]].label, number(r["value"]),
             f"{r['rival']} {number(r['rival_value'])}",
             with_interval(r["gain"], r["low"], r["high"])]
            for _, r in part.iterrows()
        ]  # fmt: skip
        columns = ["data and split", "metric", str(focus), "best other", "gain"]
        note = "" if rows else "Nowhere: no interval of a difference lies on that side of 0."
        tables.append(Table(title, columns, rows, note))
    return tables


def _strata(result: BenchmarkResult, column: str, label: str) -> Table | None:
    if "squared_error" not in result.scores:
        return None
    table = result.table((column,))
    part = table[table["metric"] == "squared_error"]
    rows = [
        [f"{r['data']}: {r['kind']}", r[column], r["method"],
         with_interval(r["value"], r["low"], r["high"]), str(r["n_rows"])]
        for _, r in part.sort_values(["data", "kind", column, "value"], kind="stable").iterrows()
    ]  # fmt: skip
    columns = ["data and split", label, "method", METRICS["squared_error"].label, "rows"]
    return Table(f"By {label}", columns, rows)


def _calibration(result: BenchmarkResult, table: pd.DataFrame) -> Table | None:
    names = [m for m, d in METRICS.items() if d.axis == "calibration" and m in result.scores]
    part = table[table["metric"].isin(names)]
    if part.empty:
        return None
    risk = calibration(result.scores)
    rows = []
    for (data, kind, method), mine in part.groupby(["data", "kind", "method"], sort=False):
        values = mine.set_index("metric")["value"]
        here = risk[(risk["data"] == data) & (risk["kind"] == kind) & (risk["method"] == method)]
        area = float(here["risk_coverage"].iloc[0]) if len(here) else float("nan")
        rows.append([f"{data}: {kind}", str(method), *(number(values.get(m, np.nan)) for m in names),
                     number(area)])  # fmt: skip
    return Table(
        "Calibration", ["data and split", "method", *(METRICS[m].label for m in names),
                        "risk–coverage"], rows,
        "Intervals are of the measured effect: what the method states and the sampling noise of "
        "the measurement together. Risk–coverage below 1: the most certain predictions are better "
        "than the average one.",
    )  # fmt: skip


def _targets(scores: pd.DataFrame) -> Table | None:
    part = scores[scores["target_measured"].notna()]
    if part.empty:
        return None
    rows = []
    for (data, kind, method), mine in part.groupby(["data", "kind", "method"], sort=False):
        wrong = (mine["target_predicted"] - mine["target_measured"]).abs().mean()
        rows.append([f"{data}: {kind}", str(method), number(mine["target_measured"].mean()),
                     number(mine["target_predicted"].mean()), number(wrong)])  # fmt: skip
    return Table(
        "The targeted genes themselves",
        ["data and split", "method", "measured change", "predicted change", "mean absolute error"],
        rows, "Left out of every other number: predicting a knock-down of what was knocked down is "
        "no achievement. Mean log1p counts per 10,000.",
    )  # fmt: skip


def _all_metrics(table: pd.DataFrame) -> Table:
    rows = []
    for _, r in table.iterrows():
        scaled = with_interval(r["scaled"], r["scaled_low"], r["scaled_high"])
        rows.append([f"{r['data']}: {r['kind']}", METRICS[r["metric"]].label, r["method"],
                     with_interval(r["value"], r["low"], r["high"]), scaled])  # fmt: skip
    return Table("All metrics", ["data and split", "metric", "method", "value", "scaled"], rows)


def _controls(table: pd.DataFrame, headline: Sequence[str], rivals: Sequence[str]) -> Table | None:
    """Metrics on which a negative control is best: they say nothing about methods there."""
    rows = []
    for (data, kind, metric), part in table.groupby(["data", "kind", "metric"], sort=False):
        if metric not in headline:
            continue
        declared = METRICS[str(metric)]
        own = part[part["method"].isin(rivals)].set_index("method")["value"]
        if own.empty:
            continue
        best = str(own.idxmax() if declared.direction == "higher" else own.idxmin())
        if best in NEGATIVE:
            rows.append([f"{data}: {kind}", declared.label, best, number(own[best])])
    columns = ["data and split", "metric", "negative control", "value"]
    note = "" if rows else "None: no negative control is best on a headline metric."
    return Table("Where a negative control beats every method", columns, rows, note)


def _unscaled(table: pd.DataFrame) -> Table | None:
    part = table[(table["unscaled"] != "") & (table["unscaled"] != "no floor and ceiling")]
    part = part.drop_duplicates(["data", "kind", "metric"])
    rows = [[f"{r['data']}: {r['kind']}", METRICS[r["metric"]].label, r["unscaled"]]
            for _, r in part.iterrows()]  # fmt: skip
    if not rows:
        return None
    return Table("Without scaled values", ["data and split", "metric", "why"], rows)


def _compute(runs: pd.DataFrame) -> Table | None:
    if "seconds_fit" not in runs:
        return None
    part = runs[runs["seconds_fit"].notna()]
    rows = []
    for (data, kind, method), mine in part.groupby(["data", "kind", "method"], sort=False):
        parameters = mine["parameters"].max() if "parameters" in mine else np.nan
        rows.append([f"{data}: {kind}", str(method), number(mine["seconds_fit"].mean()),
                     number(mine["seconds_predict"].mean()), number(mine["peak_memory_gb"].max()),
                     "–" if parameters != parameters else f"{int(parameters):,}"])  # fmt: skip
    columns = ["data and split", "method", "fit, s", "predict, s", "peak memory, GB", "parameters"]
    return Table("Compute", columns, rows, "Means over runs; memory above what was there before.")


def _published(result: BenchmarkResult) -> list[Table]:
    found = []
    for data in result.config.data:
        for split in data.splits:
            if not isinstance(split, Published):
                continue
            mine = result.scores[result.scores["data"] == data.name]
            table = beside_published(mine[~mine["method"].isin(ORACLES)], split.path)
            if table.empty:
                continue
            rows = [[r["method"], "published" if r["published"] else "here", number(r["l2"]),
                     number(r["pearson_delta"]), str(r["n_rows"])]
                    for _, r in table.iterrows()]  # fmt: skip
            note = (
                f"The methods of {split.path.name} and those run here, on its splits and rows: means "
                "over seeds and perturbations, on the 1,000 genes highest in the control. The choice "
                "of genes and the normalisation are ours."
            )
            columns = ["method", "from", "L2", "Pearson delta", "rows"]
            found.append(Table(f"{data.name}: beside published numbers", columns, rows, note))
    return found


def _not_run(runs: pd.DataFrame, scores: pd.DataFrame) -> Table:
    part = runs[runs["status"] != "run"].drop_duplicates(["data", "kind", "method", "reason"])
    rows = [[f"{r['data']}: {r['kind']}", r["method"], r["reason"]] for _, r in part.iterrows()]
    refused = scores[scores["refused"].astype(bool)]
    for (data, kind, method), mine in refused.groupby(["data", "kind", "method"], sort=False):
        names = list(dict.fromkeys(mine["perturbation"]))
        rows.append([f"{data}: {kind}", str(method),
                     f"{len(names)} perturbations that it cannot predict are scored as the mean "
                     f"response, such as {', '.join(names[:3])}"])  # fmt: skip
    note = "" if rows else "Everything that was asked for was run."
    return Table("Not run", ["data and split", "method", "reason"], rows, note)


def _splits(result: BenchmarkResult) -> Table:
    rows = []
    for data, manifest in result.manifests.items():
        for s in manifest.splits:
            few = result.dropped[
                (result.dropped["data"] == data) & (result.dropped["split"] == s.name)
            ]
            rows.append([data, manifest.data_hash[:12], s.name, str(s.seed), str(len(s.train)),
                         str(len(s.test) - len(few)), ", ".join(few["perturbation"])])  # fmt: skip
    columns = ["data", "hash", "split", "seed", "trained rows", "tested rows", "too few cells"]
    return Table("Splits", columns, rows, "A row is a perturbation in a context. The lists are in "
                 "splits/*.json.")  # fmt: skip


def _metrics(scores: pd.DataFrame) -> Table:
    rows = [
        [d.label, name, d.axis, d.direction, number(d.best), d.catches, d.reference]
        for name, d in METRICS.items()
        if name in scores
    ]
    columns = ["metric", "name", "axis", "better", "best", "catches", "reference"]
    return Table("Metrics", columns, rows)


def _figures(table: pd.DataFrame, runs: pd.DataFrame) -> list[dict[str, str]]:
    from gpjepa import plotting

    found = []
    if (table["metric"] == "squared_error").any():
        figure = plotting.benchmark_scores(table, "squared_error")
        found.append({"svg": _svg(figure), "alt": "Error of every method, with intervals"})
    if table["metric"].str.startswith("coverage_").any():
        found.append({"svg": _svg(plotting.calibration(table)),
                      "alt": "Share of measured effects inside stated intervals"})  # fmt: skip
    models = runs.dropna(subset=["parameters"]) if "parameters" in runs else runs.iloc[:0]
    if models.groupby(["data", "kind"])["method"].nunique().gt(1).any():
        found.append({"svg": _svg(plotting.scaling(table, runs)),
                      "alt": "Error over the number of parameters"})  # fmt: skip
    return found


def _svg(figure: Any) -> str:
    """The figure as SVG that stands inside a page."""
    import matplotlib as mpl

    buffer = io.StringIO()
    # Without a date and with fixed ids, so that equal numbers give equal files.
    with mpl.rc_context({"svg.hashsalt": "gpjepa", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r'(<svg[^>]*?) width="[^"]*"([^>]*?) height="[^"]*"|(<svg[^>]*?) height="[^"]*"'
                  r'([^>]*?) width="[^"]*"', lambda m: "".join(g or "" for g in m.groups()), text,
                  count=1)  # fmt: skip
