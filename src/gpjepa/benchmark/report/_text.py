"""Numbers and sentences of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from gpjepa.benchmark._result import BenchmarkResult


def number(value: float) -> str:
    """Three significant digits; a dash where there is no value."""
    if value != value:
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def with_interval(value: float, low: float, high: float) -> str:
    """``0.410 (0.350 to 0.470)``, or the value alone where there is no interval."""
    if value != value or low != low:
        return number(value)
    return f"{number(value)} ({number(low)} to {number(high)})"


def in_short(verdicts: pd.DataFrame, focus: str | None, result: BenchmarkResult) -> list[str]:
    """One sentence per data set and kind of split, losses first."""
    if focus is None or "squared_error" not in result.scores:
        return []
    said, told = [], set()
    main = verdicts[verdicts["metric"] == "squared_error"] if len(verdicts) else verdicts
    order = {"worse": 0, "not significantly different": 1, "equal": 2, "better": 3}
    if len(main):
        main = main.sort_values("verdict", key=lambda v: v.map(order), kind="stable")
    for _, row in main.iterrows():
        told.add((row["data"], row["kind"]))
        errors = f"{number(row['value'])} of no change against {number(row['rival_value'])}"
        gain = f"; gain {number(row['gain'])}, {number(row['low'])} to {number(row['high'])}"
        if row["verdict"] == "equal":
            errors, gain = f"{number(row['value'])} of no change", ""
        sentence = {
            "worse": f"{focus} loses to {row['rival']}",
            "better": f"{focus} is ahead of the best other method, {row['rival']}",
            "equal": f"{focus} and {row['rival']} are identical",
            "not significantly different": f"{focus} is not significantly different from the best "
            f"other method, {row['rival']}",
        }[str(row["verdict"])]
        where = f"{row['data']}, {row['kind']} ({row['n_rows']} rows)"
        said.append(f"{where}: {sentence}: error {errors}{gain}.")
    mine = result.scores[result.scores["entry"] == focus]
    for data, kind in mine[["data", "kind"]].drop_duplicates().itertuples(index=False, name=None):
        if (data, kind) not in told:
            said.append(
                f"{data}, {kind}: the measured effects are no larger than their sampling noise, so "
                "errors cannot be compared."
            )
    for data, kind in sorted(set(_failures(result, focus))):
        said.insert(0, f"{data}, {kind}: {focus} failed on some splits; see below.")
    return said


def _failures(result: BenchmarkResult, focus: str) -> list[tuple[str, str]]:
    lost = result.runs[(result.runs["method"] == focus) & (result.runs["status"] == "failed")]
    return list(lost[["data", "kind"]].itertuples(index=False, name=None))
