"""Tables of the report: frames of text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gpjepa.benchmark._published import beside_published, published_means
from gpjepa.benchmark._splits import Published
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
KEY = ["data", "kind"]
Cell = str | Callable[[Any], Any]  # a column of the rows, or what makes a cell of a row


@dataclass(frozen=True)
class Table:
    """A frame of text, what it is called and a remark."""

    frame: pd.DataFrame
    title: str = ""
    note: str = ""


def _table(
    rows: pd.DataFrame,
    columns: Mapping[str, Cell],
    title: str = "",
    note: str = "",
) -> Table:
    """A line of text per row: each column is one of the rows', or made of a row."""
    cells = {
        name: [r[of] if isinstance(of, str) else of(r) for _, r in rows.iterrows()]
        for name, of in columns.items()
    }
    return Table(pd.DataFrame(cells, dtype=object).astype(str), title, note)


def _where(row: Any) -> str:
    return f"{row['data']}: {row['kind']}"


def _metric(row: Any) -> str:
    declared = METRICS[row["metric"]]
    return declared.label + (" (own space)" if declared.own_space else "")


def _value(row: Any) -> str:
    return with_interval(row["value"], row["low"], row["high"])


WHERE: dict[str, Cell] = {"data and split": _where}


def _headline(table: pd.DataFrame) -> list[str]:
    return [m for m in HEADLINE if (table["metric"] == m).any()]


# The first screen


def first_screen(table: pd.DataFrame, verdicts: pd.DataFrame, focus: str | None) -> Table | None:
    """Each headline metric of the focus, and whether the best other method is better."""
    if not len(verdicts):
        return None
    shown = verdicts[verdicts["metric"].isin(_headline(table))].copy()
    shown["text"] = [
        f"{r['verdict']} ({number(r['value'])}; {r['rival']} {number(r['rival_value'])})"
        for _, r in shown.iterrows()
    ]
    return Table(
        _wide(shown, [m for m in HEADLINE if (shown["metric"] == m).any()], KEY),
        f"{focus} beside the best other method",
        "The rival is the best by the very numbers that are compared, which favours it. Better and "
        "worse: significant at a false discovery rate of 5% over all verdicts of this report. Too "
        "few to tell: fewer than six contexts, where those are held out, or targets.",
    )


def _wide(shown: pd.DataFrame, metrics: Sequence[str], index: list[str]) -> pd.DataFrame:
    """``text`` with a column per metric, a dash where there is none."""
    keys = shown[index].drop_duplicates()
    wide = shown.set_index([*index, "metric"])["text"].unstack("metric")
    wide = wide.reindex(pd.MultiIndex.from_frame(keys) if len(index) > 1 else keys[index[0]])
    wide = wide.reindex(columns=list(metrics)).fillna("–").reset_index()
    if index == KEY:
        wide.insert(0, "data and split", wide.pop("data") + ": " + wide.pop("kind"))
    wide.columns.name = None
    return wide.rename(columns={m: METRICS[m].label for m in metrics})


def headlines(table: pd.DataFrame) -> list[Table]:
    """All methods of each data set on the headline metrics, best first."""
    metrics, found = _headline(table), []
    for (data, kind), part in table.groupby(KEY, sort=False) if metrics else ():
        first = part[part["metric"] == metrics[0]].set_index("method")["value"]
        good = METRICS[metrics[0]].goodness(first).reindex(part["method"].unique())
        shown = part[part["metric"].isin(metrics)].copy()
        if shown.empty:  # such as an error relative to no change, where nothing is there
            continue
        shown["text"] = [
            _value(r) + (f" · scaled {number(r['scaled'])}" if np.isfinite(r["scaled"]) else "")
            for _, r in shown.iterrows()
        ]
        order = {m: i for i, m in enumerate(good.sort_values(ascending=False).index)}
        shown = shown.sort_values("method", key=lambda m, order=order: m.map(order), kind="stable")
        wide = _wide(shown, metrics, ["method"])
        as_mean = part.groupby("method")["n_as_mean"].max()
        wide.insert(1, "rows as mean", [str(int(as_mean[m]) or "") for m in wide["method"]])
        note = (
            f"{shown['n_rows'].max():.0f} rows; 95% intervals. "
            "Rows as mean: what a method did not predict, or failed on, is scored as the mean "
            "response. Scaled: 0 is the mean response, 1 a replicate. A dash: not applicable, such "
            "as metrics of counts for cells without counts."
        )
        found.append(Table(wide, f"{data}: {kind}", note))
    return found


# What is folded


def verdicts(found: pd.DataFrame, focus: str | None) -> list[Table]:
    """Everything in which the focus is worse, better, or neither."""
    if not len(found):
        return []
    columns: dict[str, Cell] = {
        **WHERE,
        "metric": _metric,
        str(focus): lambda r: number(r["value"]),
        "best other": lambda r: f"{r['rival']} {number(r['rival_value'])}",
        "gain": lambda r: with_interval(r["gain"], r["low"], r["high"]),
        "adjusted p": lambda r: number(r["q"]),
    }
    tables = []
    for verdict, title in (("worse", "loses"), ("better", "wins")):
        part = found[found["verdict"] == verdict]
        note = "" if len(part) else "Nowhere."
        tables.append(_table(part, columns, f"Where {focus} {title}", note))
    counts = ", ".join(f"{n} {verdict}" for verdict, n in found["verdict"].value_counts().items())
    note = (
        f"{len(found)} verdicts: {counts}. Benjamini–Hochberg over all of them; bootstrap p-values, "
        "no smaller than a sign test's."
    )
    return [*tables, Table(pd.DataFrame(), "", note)]


def controls(table: pd.DataFrame) -> list[Table]:
    """Metrics on which a negative control is best, and those without a scale."""
    rows = []
    part = table[table["metric"].isin(_headline(table))]
    part = part[~part["role"].isin(["ceiling", "oracle"])]
    for (_, _, metric), own in part.groupby([*KEY, "metric"], sort=False):
        good = METRICS[str(metric)].goodness(own["value"])
        best = own.loc[good.idxmax()]
        # Others that are as good are better witnesses than a control.
        others = good[~own["role"].isin(["negative", "floor"])]
        if best["role"] in ("negative", "floor") and not (others >= good.max()).any():
            rows.append(best)
    columns: dict[str, Cell] = {
        **WHERE,
        "metric": _metric,
        "negative control": "method",
        "value": lambda r: number(r["value"]),
    }
    note = "" if rows else "None: no negative control is best on a headline metric."
    title = "Where a negative control beats every method"
    tables = [_table(pd.DataFrame(rows), columns, title, note)]
    bare = table[~table["unscaled"].isin(["", "no floor and ceiling"])]
    bare = bare.drop_duplicates([*KEY, "metric"])
    if len(bare):
        why: dict[str, Cell] = {**WHERE, "metric": _metric, "why": "unscaled"}
        tables.append(_table(bare, why, "No scaled values"))
    return tables


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
        part = part.sort_values([*KEY, column, "value"], kind="stable")
        columns: dict[str, Cell] = {**WHERE, label: column, "method": "method"}
        columns |= {METRICS["squared_error"].label: _value, "rows": "n_rows"}
        tables.append(_table(part, columns, f"By {label}"))
    return tables


def calibration(result: BenchmarkResult, table: pd.DataFrame) -> list[Table]:
    """Coverage, CRPS and risk–coverage of methods that state how sure they are."""
    names = [m for m, d in METRICS.items() if d.axis == "calibration" and m in result.scores]
    part = table[table["metric"].isin(names)].copy()
    if part.empty:
        return []
    part["text"] = part["value"].map(number)
    part["rows"] = (part["n_rows"] - part["n_as_mean"]).astype(int).astype(str)
    risk = result.calibration().set_index([*KEY, "method"])["risk_coverage"]
    wide = _wide(part, names, [*KEY, "method", "rows"])
    keys = zip(wide["data"], wide["kind"], wide["method"], strict=True)
    wide["risk–coverage"] = [number(risk.get(key, np.nan)) for key in keys]
    wide.insert(0, "data and split", wide.pop("data") + ": " + wide.pop("kind"))
    note = (
        "Intervals are of the measured effect: what the method states and the sampling noise of the "
        "measurement together. Risk–coverage below 1: the most certain predictions are better than "
        "the average one."
    )
    return [Table(wide, "", note)]


def targets(scores: pd.DataFrame) -> list[Table]:
    """The change of the targeted genes, measured and predicted."""
    part = scores[scores["target_measured"].notna()]
    if part.empty:
        return []
    wrong = (part["target_predicted"] - part["target_measured"]).abs()
    means = part.assign(wrong=wrong).groupby([*KEY, "method"], sort=False)
    means = means[["target_measured", "target_predicted", "wrong"]].mean().reset_index()
    columns: dict[str, Cell] = {
        **WHERE,
        "method": "method",
        "measured change": lambda r: number(r["target_measured"]),
        "predicted change": lambda r: number(r["target_predicted"]),
        "mean absolute error": lambda r: number(r["wrong"]),
    }
    note = (
        "Left out of every other number but those beside a published table: predicting a knock-down "
        "of what was knocked down is no achievement. Mean log1p counts per 10,000."
    )
    return [_table(means, columns, "", note)]


def all_metrics(table: pd.DataFrame) -> list[Table]:
    """Every value."""
    columns: dict[str, Cell] = {
        **WHERE,
        "metric": _metric,
        "method": "method",
        "value": _value,
        "scaled": lambda r: with_interval(r["scaled"], r["scaled_low"], r["scaled_high"]),
    }
    note = (
        "Values in an own space are of the space that each method brings: they say whether a method "
        "agrees with itself, and compare no methods."
    )
    return [_table(table, columns, "", note)]


def given(result: BenchmarkResult) -> list[Table]:
    """What each method learned from, and with which settings."""
    runs = result.runs[result.runs["status"] == "run"]
    options = {m.title: m.options for m in result.config.methods}
    if "given" not in runs:
        return []
    rows = runs.groupby("method", sort=False).agg(
        given=("given", lambda g: "; ".join(dict.fromkeys(g.dropna()))),
        seeds=("seed", "nunique"),
        runs=("seed", "size"),
    )
    columns: dict[str, Cell] = {
        "method": "method",
        "given besides the training cells": "given",
        "settings": lambda r: (
            json.dumps(options[r["method"]]) if options[r["method"]] else "defaults"
        ),
        "seeds": "seeds",
        "runs": "runs",
    }
    note = (
        "All get the same training cells: counts, perturbation, context, the counts of the whole "
        "cell, and the batch where the data name it, on the same genes."
    )
    return [_table(rows.reset_index(), columns, "", note)]


def compute(runs: pd.DataFrame) -> list[Table]:
    """Seconds, memory and parameters."""
    if "seconds_fit" not in runs:
        return []
    part = runs[runs["seconds_fit"].notna()]
    rows = part.groupby([*KEY, "method"], sort=False)
    seconds = rows[["seconds_fit", "seconds_predict"]].mean()
    most = rows[["peak_memory_gb", "parameters"]].max()
    columns: dict[str, Cell] = {
        **WHERE,
        "method": "method",
        "fit, s": lambda r: number(r["seconds_fit"]),
        "predict, s": lambda r: number(r["seconds_predict"]),
        "peak memory, GB": lambda r: number(r["peak_memory_gb"]),
        "parameters": lambda r: f"{r['parameters']:,.0f}" if r["parameters"] > 0 else "–",
    }
    note = (
        "Means over runs, on the machine that ran this. Memory is the peak of the method's own "
        "process, or of the largest that it started, as the operating system counts it: Python, "
        "libraries and cells included, a GPU's not."
    )
    return [_table(seconds.join(most).reset_index(), columns, "", note)]


def published(result: BenchmarkResult) -> list[Table]:
    """What was run here among the methods of a published table."""
    found = []
    for data in result.config.data:
        for split in (s for s in data.splits if isinstance(s, Published)):
            mine = result.scores[result.scores["data"] == data.name]
            rows = beside_published(mine[~mine["role"].isin(["ceiling", "oracle"])], split.path)
            columns: dict[str, Cell] = {
                "method": "method",
                "from": lambda r: "published" if r["published"] else "here",
                "L2": lambda r: number(r["l2"]),
                "Pearson delta": lambda r: number(r["pearson_delta"]),
                "rows": "n_rows",
            }
            note = (
                f"The methods of {split.path.name} and those run here, on its splits and rows: means "
                "over seeds and perturbations, on the 1,000 genes highest in the control. The choice "
                "of genes and the normalisation are ours."
            )
            if len(rows):
                found.append(_table(rows, columns, data.name, note))
    return found


def lost(result: BenchmarkResult) -> list[Table]:
    """What was not run, what failed, and what a method left out."""
    part = result.runs[result.runs["status"] != "run"]
    part = part.drop_duplicates([*KEY, "method", "status", "reason"])
    refused = result.scores[result.scores["refused"].astype(bool)]
    left_out = refused.groupby([*KEY, "method"], sort=False)["perturbation"].unique().reset_index()
    left_out["status"] = "scored as the mean response"
    left_out["reason"] = [
        f"{len(names)} perturbations, such as {', '.join(names[:3])}"
        for names in left_out["perturbation"]
    ]
    rows = pd.concat([part, left_out], ignore_index=True)
    columns: dict[str, Cell] = {
        **WHERE,
        "method": "method",
        "what": "status",
        "why, or which": "reason",
    }
    note = (
        "A split on which a method failed is scored as the mean response. Not tested: a split with "
        "too few cells."
        if len(rows)
        else "Everything that was asked for was run."
    )
    if (part["status"] == "not run").any():
        columns["published, Norman's doubles: L2, Pearson delta"] = _published_elsewhere
        additive, nothing = (_l2_and_pearson(m) for m in ("additive_model", "no_change"))
        note += (
            " Published: on all of Norman's doubles, by Ahlmann-Eltze, Huber and Anders 2025, where "
            f"additive has {additive} and no change {nothing}; not the rows of this report."
        )
    return [_table(rows, columns, "", note)]


def _l2_and_pearson(method: str) -> str:
    found = published_means(method)
    return "–" if found is None else f"{found['l2']:.2f}, {number(found['pearson_delta'])}"


def _published_elsewhere(row: Any) -> str:
    """What others measured of a method that was not run here."""
    return _l2_and_pearson(str(row["family"])) if row["status"] == "not run" else "–"


def splits(result: BenchmarkResult) -> list[Table]:
    """What was trained on and tested."""
    rows = []
    for data, manifest in result.manifests.items():
        dropped = result.dropped[result.dropped["data"] == data]
        for s in manifest.splits:
            few = dropped[dropped["split"] == s.name]
            row = {"data": data, "hash": manifest.data_hash[:12], "split": s.name, "seed": s.seed}
            row |= {"trained rows": len(s.train), "tested rows": len(s.test) - len(few)}
            rows.append(row | {"too few cells": ", ".join(few["perturbation"])})
    note = "A row is a perturbation in a context. The lists are in splits/*.json."
    return [Table(pd.DataFrame(rows).astype(str), "", note)]


def metrics(scores: pd.DataFrame) -> list[Table]:
    """The declarations of the metrics."""
    rows = [
        {
            "metric": d.label,
            "name": name,
            "axis": d.axis,
            "better": d.direction,
            "best": number(d.best),
            "targeted genes": "left out" if d.masked else "counted",
            "version": d.version,
            "catches": d.catches,
            "reference": d.reference,
        }
        for name, d in METRICS.items()
        if name in scores
    ]
    return [Table(pd.DataFrame(rows))]
