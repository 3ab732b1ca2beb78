"""From scores of rows to tables with a floor, a ceiling and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gpjepa.perturbations import Perturbation

from ._measures import risk_coverage
from ._metrics import METRICS

FLOOR, CEILING = "mean", "replicate"
N_DRAWS = 1_000
GROUP = ["data", "kind"]
_ROW = ["split", "context", "perturbation"]


def summarise(scores: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Every metric of every method, raw and scaled so that 0 is the mean response, 1 a replicate.

    Values of the two halves of the truth and of several seeds are averaged first. Intervals come
    from resampling contexts and targets, not rows: combinations that share a gene, and
    perturbations that share a context, are no independent witnesses (the pigeonhole bootstrap,
    Owen 2007: a row counts as often as its context times as often as each of its targets was
    drawn).

    Parameters
    ----------
    scores
        :attr:`gpjepa.benchmark.BenchmarkResult.scores`.
    by
        Further columns to stratify by; ``"size"`` is the third of the measured effect sizes.

    Returns
    -------
    pandas.DataFrame
        One row per data set × kind of split × stratum × method × metric: ``value`` with ``low``
        and ``high``; ``scaled`` with ``scaled_low`` and ``scaled_high``, or ``unscaled``, the
        reason why there is none; ``n_rows``; the metric's ``label``, ``direction`` and ``best``.
    """
    if "size" in by:
        scores = with_size(scores)
    keys = [*GROUP, *by]
    frames = []
    for group, part in scores.groupby(keys, sort=False, dropna=False):
        table = _summary(part)
        for column, value in zip(keys, group, strict=True):
            table.insert(keys.index(column), column, value)
        frames.append(table)
    return pd.concat(frames, ignore_index=True)


def with_size(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores with ``size``: the third that a row's measured effect belongs to, within its data."""
    if "squared_effect" not in scores:
        raise ValueError("Effect sizes need the metric 'squared_error' among the metrics.")
    size = scores.groupby([*GROUP, *_ROW])["squared_effect"].transform("mean")
    labels = ["weak effects", "medium effects", "strong effects"]

    def thirds(values: pd.Series) -> pd.Series:
        ranks = values.rank(method="dense")
        edges = np.ceil(3 * ranks / ranks.max()).clip(1, 3).astype(int)
        return edges.map(dict(enumerate(labels, 1)))

    groups = [scores[k] for k in GROUP]
    return scores.assign(size=size.groupby(groups).transform(thirds))


@dataclass(frozen=True)
class Resampled:
    """Sums of numerator and denominator of one method, as measured and over draws."""

    value: float
    draws: np.ndarray

    @classmethod
    def of(cls, over: np.ndarray, under: np.ndarray, weights: np.ndarray) -> Resampled:
        """Ratio of sums over the rows where both are known; weights of shape (n_draws, n_rows)."""
        known = np.isfinite(over) & np.isfinite(under)
        over, under = np.where(known, over, 0), np.where(known, under, 0)
        total = under.sum()
        value = over.sum() / total if known.any() and total > 0 else np.nan
        below = weights @ under
        draws = np.divide(weights @ over, below, out=np.full(len(below), np.nan), where=below > 0)
        return cls(float(value), draws)

    def interval(self) -> tuple[float, float]:
        return interval(self.draws)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """95% interval of draws; NaN if none is defined."""
    known = draws[np.isfinite(draws)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def resampled(part: pd.DataFrame, metric: str) -> tuple[dict[str, Resampled], int]:
    """One metric of each method over the rows of a group, under the same draws for all."""
    denominator = METRICS[metric].denominator
    rows = part.groupby(["method", *_ROW], sort=False)[
        [metric, *([denominator] if denominator else [])]
    ].mean()
    over = rows[metric].unstack("method")
    # One ruler for all methods: what divides is a property of the truth.
    under = rows[denominator].unstack("method").bfill(axis=1).iloc[:, 0] if denominator else 1.0
    weights = _weights(over.index)
    below = np.broadcast_to(np.asarray(under, float), len(over))
    found = {
        str(m): Resampled.of(over[m].to_numpy(float), below, weights)
        for m in part["method"].unique()
    }
    if METRICS[metric].per_task:  # rows that share a value say nothing of how sure it is
        found = {m: Resampled(r.value, np.full_like(r.draws, np.nan)) for m, r in found.items()}
    return found, len(over)


def _weights(rows: pd.MultiIndex) -> np.ndarray:
    """How often each row is drawn, shape (n_draws, n_rows)."""
    rng = np.random.default_rng(0)
    weights = np.ones((N_DRAWS, len(rows)))
    contexts = rows.get_level_values("context").astype(str)
    labels = rows.get_level_values("perturbation").astype(str)
    targets = [list(Perturbation.parse(p).targets) for p in labels]
    for factor in ([[c] for c in contexts], targets):
        names = sorted({name for each in factor for name in each})
        index = {name: i for i, name in enumerate(names)}
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), N_DRAWS)
        for i, each in enumerate(factor):
            for name in each:
                weights[:, i] *= times[:, index[name]]
    return weights


def _summary(part: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for metric, declared in METRICS.items():
        if metric not in part:
            continue
        found, n = resampled(part, metric)
        why = "no floor and ceiling" if declared.axis == "calibration" else _unscaled(metric, found)
        for method, value in found.items():
            if not np.isfinite(value.value):
                continue
            low, high = value.interval()
            row = {"method": method, "metric": metric, "value": value.value, "low": low,
                   "high": high, "scaled": np.nan, "scaled_low": np.nan, "scaled_high": np.nan,
                   "unscaled": why, "n_rows": n, "label": declared.label,
                   "direction": declared.direction, "best": declared.best}  # fmt: skip
            if not why:
                floor, ceiling = found[FLOOR], found[CEILING]
                row["scaled"] = (value.value - floor.value) / (ceiling.value - floor.value)
                with np.errstate(divide="ignore", invalid="ignore"):  # a draw without a scale
                    draws = (value.draws - floor.draws) / (ceiling.draws - floor.draws)
                row["scaled_low"], row["scaled_high"] = interval(draws)
            rows.append(row)
    return pd.DataFrame(rows)


def _unscaled(metric: str, found: dict[str, Resampled]) -> str:
    """Why floor and ceiling give no scale; empty if they do."""
    if FLOOR not in found or CEILING not in found:
        return "floor or ceiling was not run"
    floor, ceiling = found[FLOOR], found[CEILING]
    if not np.isfinite(floor.value) or not np.isfinite(ceiling.value):
        return "not defined for these rows"
    if METRICS[metric].per_task:
        return "one value for all rows, so no interval"
    values = f"a replicate ({ceiling.value:.3g}) {{}} the mean response ({floor.value:.3g})"
    low, high = interval(goodness(metric, ceiling.draws) - goodness(metric, floor.draws))
    if high < 0:
        return values.format("is worse than")
    return "" if low > 0 else values.format("is not significantly different from")


def verdicts(
    scores: pd.DataFrame, focus: str, rivals: Sequence[str], metrics: Sequence[str]
) -> pd.DataFrame:
    """A method beside the best of its rivals, metric by metric.

    The rival is chosen by the very values that are compared, which favours it.

    Parameters
    ----------
    scores
        Scores of all methods.
    focus
        The method.
    rivals
        Methods it may be compared with.
    metrics
        Metrics to look at.

    Returns
    -------
    pandas.DataFrame
        One row per data set × kind × metric: ``value`` of the method, the ``rival`` and its
        ``rival_value``, ``gain`` (how much better the method is, in the metric's own unit) with
        ``low`` and ``high``, and the ``verdict``: ``"better"`` or ``"worse"`` if the interval
        excludes 0, ``"equal"`` if both are the same throughout, else ``"not significantly different"``.
    """
    found = []
    for (data, kind), part in scores.groupby(GROUP, sort=False):
        for metric in metrics:
            if metric not in part:
                continue
            values, n = resampled(part, metric)
            others = {m: goodness(metric, values[m].value) for m in rivals if m in values}
            others = {m: v for m, v in others.items() if np.isfinite(v) and m != focus}
            if focus not in values or not others or not np.isfinite(values[focus].value):
                continue
            rival = max(others, key=lambda m: others[m])
            gain = goodness(metric, values[focus].draws) - goodness(metric, values[rival].draws)
            low, high = interval(gain)
            verdict = (
                "better" if low > 0 else "worse" if high < 0 else "not significantly different"
            )
            if low == high == 0:
                verdict = "equal"
            found.append(
                {"data": data, "kind": kind, "metric": metric, "value": values[focus].value,
                 "rival": rival, "rival_value": values[rival].value,
                 "gain": goodness(metric, values[focus].value) - others[rival],
                 "low": low, "high": high, "verdict": verdict, "n_rows": n}
            )  # fmt: skip
    return pd.DataFrame(found)


def goodness(metric: str, value: Any) -> Any:
    """A metric's values turned so that more is better."""
    declared = METRICS[metric]
    if declared.direction == "closest":
        return -np.abs(value - declared.best)
    return value if declared.direction == "higher" else -value


def calibration(scores: pd.DataFrame) -> pd.DataFrame:
    """Whether stated uncertainty tells good predictions from bad ones, for methods that state any.

    Returns
    -------
    pandas.DataFrame
        One row per data set × kind × method: ``risk_coverage``
        (:func:`gpjepa.benchmark.risk_coverage`; below 1 is informative) and ``n_rows``.
    """
    found = []
    stated = scores[scores["uncertainty"].notna()]
    for (data, kind, method), part in stated.groupby([*GROUP, "method"], sort=False):
        rows = part.groupby(_ROW)[["squared_error", "uncertainty"]].mean()
        if len(rows) < 2:
            continue
        # A noise-corrected error can be negative: the risk of a row is at least none.
        error = rows["squared_error"].clip(lower=0).to_numpy()
        value = risk_coverage(error, rows["uncertainty"].to_numpy()) if error.any() else np.nan
        found.append(
            {"data": data, "kind": kind, "method": method, "risk_coverage": value, "n_rows": len(rows)}
        )  # fmt: skip
    return pd.DataFrame(found)
