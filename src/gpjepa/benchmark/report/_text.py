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
    failed = result.runs[(result.runs["method"] == focus) & (result.runs["status"] == "failed")]
    for (data, kind), lost in failed.groupby(["data", "kind"], sort=False):
        said.append(
            f"{data}, {kind}: {focus} failed on {len(lost)} runs and is scored there as the mean "
            f"response: {lost['reason'].iloc[0]}"
        )
    main = verdicts[verdicts["metric"] == "squared_error"] if len(verdicts) else verdicts
    order = ("worse", "not significantly different", "too few to tell", "equal", "better")
    if len(main):
        main = main.sort_values("verdict", key=lambda v: v.map(order.index), kind="stable")
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
            "too few to tell": f"{focus} beside the best other method, {row['rival']}, with too few "
            "contexts or targets to tell",
        }[str(row["verdict"])]
        where = f"{row['data']}, {row['kind']} ({row['n_rows']} rows)"
        said.append(f"{where}: {sentence}: error {errors}{gain}.")
    asked = [(d, k) for d, k in _asked(result) if (d, k) not in told]
    said += [f"{data}, {kind}: {_why_not(result, focus, data, kind)}" for data, kind in asked]
    return said


def _asked(result: BenchmarkResult) -> list[tuple[str, str]]:
    """Data sets and kinds of splits that were to be run."""
    return list(dict.fromkeys(zip(result.runs["data"], result.runs["kind"], strict=True)))


def _why_not(result: BenchmarkResult, focus: str, data: str, kind: str) -> str:
    """Why the focus has no verdict somewhere."""
    runs = result.runs[(result.runs["data"] == data) & (result.runs["kind"] == kind)]
    mine = runs[runs["method"] == focus]
    if not len(mine):
        return f"{focus} was not to be run."
    lost = mine[mine["status"] != "run"]
    if len(lost) == len(mine):
        return f"{focus}: {lost['status'].iloc[0]}. {lost['reason'].iloc[0]}"
    here = (result.scores["data"] == data) & (result.scores["kind"] == kind)
    rows = result.scores[here].drop_duplicates(["split", "context", "perturbation", "half"])
    if "squared_effect" in rows and rows["squared_effect"].sum() <= 0:
        return (
            "the measured effects are no larger than their sampling noise, so errors cannot be "
            "compared."
        )
    return f"no prediction of {focus} itself, or no other method, to compare."
