"""Tables of the report: frames of text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gpjepa.benchmark._config import Published
from gpjepa.benchmark._published import beside_published
from gpjepa.benchmark.metrics import METRICS

from ._text import number, with_interval

if TYPE_CHECKING:
    from gpjepa.benchmark._result import BenchmarkResult

HEADLINE = (
    "squared_error",
    "pearson_centroid",
    "pds_cosine",
    "de_wilcoxon_sig_jaccard",
    "energy_distance_unbiased",
    "embedding_cosine",
    "gene_set_agreement",
)
"""One or two metrics of each axis."""
WHERE = "data and split"


@dataclass(frozen=True)
class Table:
    """A frame of text, what it is called and a remark."""

    frame: pd.DataFrame
    title: str = ""
    note: str = ""


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "", note: str = ""
) -> Table:
    return Table(pd.DataFrame(rows, columns=list(columns)).astype(str), title, note)


def _where(row: Any) -> str:
    return f"{row['data']}: {row['kind']}"


def _groups(frame: pd.DataFrame, *more: str) -> Any:
    return frame.groupby(["data", "kind", *more], sort=False)


def _headline(table: pd.DataFrame) -> list[str]:
    return [m for m in HEADLINE if (table["metric"] == m).any()]


# The first screen


def first_screen(table: pd.DataFrame, verdicts: pd.DataFrame, focus: str | None) -> Table | None:
    """Each headline metric of the focus, and whether the best other method is better."""
    if not len(verdicts):
        return None
    names, rows = [m for m in _headline(table) if (verdicts["metric"] == m).any()], []
    for (data, kind), part in _groups(verdicts):
        by_metric, cells = part.set_index("metric"), [f"{data}: {kind}"]
        for metric in names:
            if metric not in by_metric.index:
                cells.append("–")
                continue
            row = by_metric.loc[metric]
            cells.append(
                f"{row['verdict']} ({number(row['value'])}; {row['rival']} "
                f"{number(row['rival_value'])})"
            )
        rows.append(cells)
    return _table(
        [WHERE, *(METRICS[m].label for m in names)],
        rows,
        f"{focus} beside the best other method",
        "The rival is the best by the very numbers that are compared, which favours it. Better and "
        "worse: significant at a false discovery rate of 5% over all verdicts of this report. Too "
        "few to tell: fewer than six contexts, where those are held out, or targets.",
    )


def headlines(table: pd.DataFrame) -> list[Table]:
    """All methods of each data set on the headline metrics, best first."""
    names = _headline(table)
    return [_methods(part, names, f"{d}: {k}") for (d, k), part in _groups(table)] if names else []


def _methods(part: pd.DataFrame, names: Sequence[str], title: str) -> Table:
    by_key = part.set_index(["method", "metric"])
    first = part[part["metric"] == names[0]].set_index("method")["value"]
    first = METRICS[names[0]].goodness(first)
    methods = sorted(dict.fromkeys(part["method"]), key=lambda m: -first.get(m, -np.inf))
    rows = []
    for method in methods:
        as_mean = int(part.loc[part["method"] == method, "n_as_mean"].max())
        cells = [method, f"{as_mean}" if as_mean else ""]
        for metric in names:
            if (method, metric) not in by_key.index:
                cells.append("–")
                continue
            row = by_key.loc[(method, metric)]
            text = with_interval(row["value"], row["low"], row["high"])
            if np.isfinite(row["scaled"]):
                text += f" · scaled {number(row['scaled'])}"
            cells.append(text)
        rows.append(cells)
    columns = ["method", "rows as mean", *(METRICS[m].label for m in names)]
    note = (
        f"{int(part[part['metric'] == names[0]]['n_rows'].max())} rows; 95% intervals. Rows as mean: what a method did not "
        "predict, or failed on, is scored as the mean response. Scaled: 0 is the mean response, 1 "
        "a replicate. A dash: not applicable, such as metrics of counts for cells without counts."
    )
    return _table(columns, rows, title, note)


# What is folded


def verdicts(found: pd.DataFrame, focus: str | None) -> list[Table]:
    """Everything in which the focus is worse, better, or neither."""
    tables = []
    for verdict, title in (("worse", "loses"), ("better", "wins")):
        part = found[found["verdict"] == verdict] if len(found) else found
        rows = [
            [
                _where(r),
                METRICS[r["metric"]].label,
                number(r["value"]),
                f"{r['rival']} {number(r['rival_value'])}",
                with_interval(r["gain"], r["low"], r["high"]),
                number(r["q"]),
            ]
            for _, r in part.iterrows()
        ]
        columns = [WHERE, "metric", str(focus), "best other", "gain", "adjusted p"]
        note = "" if rows else "Nowhere."
        if len(found):
            tables.append(_table(columns, rows, f"Where {focus} {title}", note))
    if len(found):
        n = found["verdict"].value_counts()
        said = ", ".join(f"{n.get(v, 0)} {v}" for v in ("worse", "better", "equal"))
        note = (
            f"{len(found)} verdicts: {said}, {n.get('not significantly different', 0)} not "
            "significantly different, {n.get('too few to tell', 0)} with fewer than six contexts "
            "(where those are held out) or targets. Benjamini–Hochberg over all of them; bootstrap "
            "p-values, no smaller than a sign test's."
        )
        tables.append(Table(pd.DataFrame(), "", note))
    return tables


def controls(table: pd.DataFrame) -> list[Table]:
    """Metrics on which a negative control is best, and those without a scale."""
    rows = []
    names = _headline(table)
    for (data, kind, metric), part in _groups(table, "metric"):
        declared = METRICS[str(metric)]
        own = part[~part["role"].isin(["ceiling", "oracle"])].set_index("method")
        if metric not in names or own.empty:
            continue
        good = declared.goodness(own["value"])
        best = str(good.idxmax())
        # Others that are as good are better witnesses than a control.
        others = good[~own["role"].isin(["negative", "floor"])]
        if own["role"][best] in ("negative", "floor") and not (others >= good[best]).any():
            rows.append([f"{data}: {kind}", declared.label, best, number(own["value"][best])])
    note = "" if rows else "None: no negative control is best on a headline metric."
    columns = [WHERE, "metric", "negative control", "value"]
    tables = [_table(columns, rows, "Where a negative control beats every method", note)]
    part = table[~table["unscaled"].isin(["", "no floor and ceiling"])]
    part = part.drop_duplicates(["data", "kind", "metric"])
    rows = [[_where(r), METRICS[r["metric"]].label, r["unscaled"]] for _, r in part.iterrows()]
    return [
        *tables,
        *([_table([WHERE, "metric", "why"], rows, "No scaled values")] if rows else []),
    ]


def strata(result: BenchmarkResult) -> list[Table]:
    """The error by regime, effect size and E-test."""
    if "squared_error" not in result.scores:
        return []
    tables = []
    for column, label in (
        ("regime", "regime"),
        ("size", "size of the measured effect, by the other half of the cells"),
        ("e_test", "E-test of the measured cells"),
    ):
        part = result.table((column,), ["squared_error"])
        part = part.sort_values(["data", "kind", column, "value"], kind="stable")
        rows = [
            [
                _where(r),
                r[column],
                r["method"],
                with_interval(r["value"], r["low"], r["high"]),
                r["n_rows"],
            ]
            for _, r in part.iterrows()
        ]
        columns = [WHERE, label, "method", METRICS["squared_error"].label, "rows"]
        tables.append(_table(columns, rows, f"By {label}"))
    return tables


def calibration(result: BenchmarkResult, table: pd.DataFrame) -> list[Table]:
    """Coverage, CRPS and risk–coverage of methods that state how sure they are."""
    names = [m for m, d in METRICS.items() if d.axis == "calibration" and m in result.scores]
    part = table[table["metric"].isin(names)]
    if part.empty:
        return []
    risk = result.calibration().set_index(["data", "kind", "method"])["risk_coverage"]
    rows = []
    for key, mine in _groups(part, "method"):
        values = mine.set_index("metric")["value"]
        shown = [number(values.get(m, np.nan)) for m in names]
        n = mine["n_rows"].max() - mine["n_as_mean"].max()
        rows.append([f"{key[0]}: {key[1]}", key[2], int(n), *shown, number(risk.get(key, np.nan))])
    return [
        _table(
            [WHERE, "method", "rows", *(METRICS[m].label for m in names), "risk–coverage"],
            rows,
            "",
            "Intervals are of the measured effect: what the method states and the sampling noise "
            "of the measurement together. Risk–coverage below 1: the most certain predictions are "
            "better than the average one.",
        )
    ]


def targets(scores: pd.DataFrame) -> list[Table]:
    """The change of the targeted genes, measured and predicted."""
    rows = []
    for (data, kind, method), mine in _groups(scores[scores["target_measured"].notna()], "method"):
        wrong = (mine["target_predicted"] - mine["target_measured"]).abs().mean()
        means = [mine["target_measured"].mean(), mine["target_predicted"].mean(), wrong]
        rows.append([f"{data}: {kind}", method, *map(number, means)])
    if not rows:
        return []
    columns = [WHERE, "method", "measured change", "predicted change", "mean absolute error"]
    note = (
        "Left out of every other number but those beside a published table: predicting a knock-down of what was knocked down is no "
        "achievement. Mean log1p counts per 10,000."
    )
    return [_table(columns, rows, "", note)]


def all_metrics(table: pd.DataFrame) -> list[Table]:
    """Every value."""
    rows = [
        [
            _where(r),
            METRICS[r["metric"]].label + (" (own space)" * METRICS[r["metric"]].own_space),
            r["method"],
            with_interval(r["value"], r["low"], r["high"]),
            with_interval(r["scaled"], r["scaled_low"], r["scaled_high"]),
        ]
        for _, r in table.iterrows()
    ]
    note = (
        "Values in an own space are of the space that each method brings: they say whether a method "
        "agrees with itself, and compare no methods."
    )
    return [_table([WHERE, "metric", "method", "value", "scaled"], rows, "", note)]


def given(result: BenchmarkResult) -> list[Table]:
    """What each method learned from, and with which settings."""
    rows, runs = [], result.runs[result.runs["status"] == "run"]
    if "given" not in runs:
        return []
    for method in result.config.methods:
        mine = runs[runs["method"] == method.title]
        if mine.empty:
            continue
        options = json.dumps(method.options) if method.options else "defaults"
        what = "; ".join(dict.fromkeys(mine["given"].dropna()))
        rows.append([method.title, what, options, mine["seed"].nunique(), len(mine)])
    columns = ["method", "given besides the training cells", "settings", "seeds", "runs"]
    note = (
        "All get the same training cells: counts, perturbation, context, the counts of the whole "
        "cell, and the batch where the data name it, on the same genes."
    )
    return [_table(columns, rows, "", note)]


def compute(runs: pd.DataFrame) -> list[Table]:
    """Seconds, memory and parameters."""
    if "seconds_fit" not in runs:
        return []
    rows = []
    for (data, kind, method), mine in _groups(runs[runs["seconds_fit"].notna()], "method"):
        parameters = mine["parameters"].max() if "parameters" in mine else np.nan
        rows.append(
            [
                f"{data}: {kind}",
                method,
                number(mine["seconds_fit"].mean()),
                number(mine["seconds_predict"].mean()),
                number(mine["peak_memory_gb"].max()),
                "–" if parameters != parameters else f"{int(parameters):,}",
            ]
        )
    columns = [WHERE, "method", "fit, s", "predict, s", "peak memory, GB", "parameters"]
    note = (
        "Means over runs, on the machine that ran this. Memory is the peak of the method's own "
        "process, or of the largest that it started, as the operating system counts it: Python, "
        "libraries and cells included, a GPU's not."
    )
    return [_table(columns, rows, "", note)]


def published(result: BenchmarkResult) -> list[Table]:
    """What was run here among the methods of a published table."""
    found = []
    for data in result.config.data:
        for split in (s for s in data.splits if isinstance(s, Published)):
            mine = result.scores[result.scores["data"] == data.name]
            mine = mine[~mine["role"].isin(["ceiling", "oracle"])]
            rows = [
                [
                    r["method"],
                    "published" if r["published"] else "here",
                    number(r["l2"]),
                    number(r["pearson_delta"]),
                    r["n_rows"],
                ]
                for _, r in beside_published(mine, split.path).iterrows()
            ]
            note = (
                f"The methods of {split.path.name} and those run here, on its splits and rows: means "
                "over seeds and perturbations, on the 1,000 genes highest in the control. The choice "
                "of genes and the normalisation are ours."
            )
            columns = ["method", "from", "L2", "Pearson delta", "rows"]
            if rows:
                found.append(_table(columns, rows, data.name, note))
    return found


def lost(result: BenchmarkResult) -> list[Table]:
    """What was not run, what failed, and what a method left out."""
    part = result.runs[result.runs["status"] != "run"]
    part = part.drop_duplicates(["data", "kind", "method", "status", "reason"])
    rows = [[_where(r), r["method"], r["status"], r["reason"]] for _, r in part.iterrows()]
    refused = result.scores[result.scores["refused"].astype(bool)]
    for (data, kind, method), mine in _groups(refused, "method"):
        names = list(dict.fromkeys(mine["perturbation"]))
        text = f"{len(names)} perturbations, such as {', '.join(names[:3])}"
        rows.append([f"{data}: {kind}", method, "scored as the mean response", text])
    note = (
        "A split on which a method failed is scored as the mean response. Not tested: a split with "
        "too few cells."
        if rows
        else "Everything that was asked for was run."
    )
    return [_table([WHERE, "method", "what", "why, or which"], rows, "", note)]


def splits(result: BenchmarkResult) -> list[Table]:
    """What was trained on and tested."""
    rows = []
    for data, manifest in result.manifests.items():
        dropped = result.dropped[result.dropped["data"] == data]
        for s in manifest.splits:
            few = dropped[dropped["split"] == s.name]
            n = [len(s.train), len(s.test) - len(few)]
            names = ", ".join(few["perturbation"])
            rows.append([data, manifest.data_hash[:12], s.name, s.seed, *n, names])
    columns = ["data", "hash", "split", "seed", "trained rows", "tested rows", "too few cells"]
    note = "A row is a perturbation in a context. The lists are in splits/*.json."
    return [_table(columns, rows, "", note)]


def metrics(scores: pd.DataFrame) -> list[Table]:
    """The declarations of the metrics."""
    rows = [
        [
            *(d.label, name, d.axis, d.direction, number(d.best)),
            *("left out" if d.masked else "counted", d.version, d.catches, d.reference),
        ]
        for name, d in METRICS.items()
        if name in scores
    ]
    columns = ["metric", "name", "axis", "better", "best", "targeted genes"]
    columns += ["version", "catches", "reference"]
    return [_table(columns, rows)]
