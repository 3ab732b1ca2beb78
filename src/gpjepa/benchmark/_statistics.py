"""From scores of rows to values with intervals, scaled values and verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

from gpjepa.perturbations import Perturbation

from .metrics import METRICS

N_DRAWS = 10_000
LEVEL = 0.05  # of intervals and verdicts
MIN_UNITS = 6  # fewer that all agree are no surprise: the sign test's p-value is above 5%
ROUNDING = 1e-6  # of the values: no difference
CONTEXTS = ("held-out-context", "few-shot", "cross-dataset")  # what is new there is a context
GROUP = ["data", "kind"]
ROW = ["split", "context", "perturbation"]
COLUMNS = [
    "method",
    "entry",
    "role",
    "metric",
    "value",
    "low",
    "high",
    "scaled",
    "scaled_low",
    "scaled_high",
    "unscaled",
    "n_rows",
    "n_as_mean",
    "label",
    "direction",
    "best",
]
SIZES = ("weak effects", "medium effects", "strong effects")


def summarise(
    scores: pd.DataFrame, by: Sequence[str] = (), metrics: Sequence[str] | None = None
) -> pd.DataFrame:
    """Every metric of every method, raw and scaled so that 0 is the mean response, 1 a replicate.

    Values of the two halves of the truth and of several seeds are averaged first. Intervals come
    from resampling contexts and targets, not rows: combinations that share a gene, and
    perturbations that share a context, are no independent witnesses (the pigeonhole bootstrap,
    Owen 2007: a row counts as often as its context times as often as each of its targets was
    drawn). A ratio whose denominator is not positive in more than 2.5% of the draws has none; draws
    with such a denominator count as infinitely large.

    Parameters
    ----------
    scores
        :attr:`gpjepa.benchmark.BenchmarkResult.scores`.
    by
        Further columns to stratify by; ``"size"`` is the third of the measured effect sizes, chosen
        on the half of the held-out cells that a row is not scored on.
    metrics
        Metrics to summarise; all by default.

    Returns
    -------
    pandas.DataFrame
        One row per data set × kind of split × stratum × method × metric: ``value`` with ``low``
        and ``high``; ``scaled`` with ``scaled_low`` and ``scaled_high``, or ``unscaled``, the
        reason why there is none; ``n_rows``, and ``n_as_mean`` of them that the method did not
        predict; the metric's ``label``, ``direction`` and ``best``; the method's ``entry`` and ``role``.
    """
    if "size" in by:
        scores = with_size(scores)
    keys = [*GROUP, *by]
    frames = []
    for group, part in scores.groupby(keys, sort=False, dropna=False):
        for metric in metrics or METRICS:
            if metric in part:
                about = dict(zip(keys, group, strict=True))
                frames.append(_summary(Resampled(part, metric)).assign(**about))
    table = pd.concat(frames, ignore_index=True)
    return table.reindex(columns=[*keys, *COLUMNS])


def with_size(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores with ``size``: the third that a row's effect belongs to, by the other half's cells.

    Chosen on the half that is scored, strong effects would be those that noise made larger.
    """
    if "squared_effect" not in scores:
        raise ValueError("Effect sizes need the metric 'squared_error' among the metrics.")
    own = scores.groupby([*GROUP, *ROW, "half"])["squared_effect"].mean().rename("other")
    other = own.reset_index().assign(half=lambda x: 1 - x["half"])
    merged = scores.merge(other, on=[*GROUP, *ROW, "half"], how="left")

    def thirds(values: pd.Series) -> pd.Series:
        ranks = values.rank(method="dense")
        edges = np.ceil(3 * ranks / ranks.max()).clip(1, 3).fillna(1).astype(int)
        return edges.map(dict(enumerate(SIZES, 1)))

    size = merged.groupby([*GROUP, "half"])["other"].transform(thirds)
    return scores.assign(size=size.to_numpy())


class Resampled:
    """One metric of all methods of a group: over its rows, and over draws of them.

    Attributes
    ----------
    metric, declared
        The metric's name and declaration.
    over
        Values, rows × methods; sums of them are divided by sums of ``under``.
    under
        What divides, of each row; 1 for a metric that is averaged.
    """

    def __init__(self, part: pd.DataFrame, metric: str) -> None:
        self.metric, self.declared = metric, METRICS[metric]
        self.part = part
        divide = self.declared.denominator
        columns = [metric, *([divide] if divide else [])]
        rows = part.groupby(["method", *ROW], sort=False)[columns].mean()
        self.over = rows[metric].unstack("method")[list(part["method"].unique())]
        # One ruler for all methods: what divides is a property of the truth.
        self.under = np.ones(len(self.over))
        if divide:
            self.under = rows[divide].unstack("method").bfill(axis=1).iloc[:, 0].to_numpy(float)

    def known(self, *methods: str) -> np.ndarray:
        """Mask of the rows on which all of these methods have a value."""
        values = self.over[list(methods)].to_numpy(float)
        return np.isfinite(values).all(1) & np.isfinite(self.under)

    def n_units(self, rows: np.ndarray) -> int:
        """Independent units among some rows: contexts where those are held out, else targets."""
        index = self.over.index[rows]
        if self.part["kind"].iloc[0] in CONTEXTS:
            return len({c for _, c, _ in index})
        perturbations = {str(p) for _, _, p in index}
        targets = {t for p in perturbations for t in Perturbation.parse(p).targets}
        return min(len(perturbations), len(targets))

    def is_few(self, rows: np.ndarray) -> bool:
        """Whether there are too few units, or only one value, to say how sure a value is."""
        return self.declared.per_task or self.n_units(rows) < MIN_UNITS

    def value(self, method: str, rows: np.ndarray | None = None) -> float:
        """The value over all rows, or over those of a mask; NaN if there is none."""
        rows = self.known(method) if rows is None else rows
        under = self.under[rows].sum()
        return float(self.over[method].to_numpy()[rows].sum() / under) if under > 0 else np.nan

    def sums(self, method: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums over the rows of each draw: what is divided, and what divides."""
        weights = _weights(tuple(self.over.index))[:, rows]
        return weights @ self.over[method].to_numpy(float)[rows], weights @ self.under[rows]

    def interval(self, method: str) -> tuple[float, float]:
        """95% interval of the value."""
        rows = self.known(method)
        if self.is_few(rows):
            return np.nan, np.nan
        return interval(*self.sums(method, rows))

    def gain(self, method: str, rival: str) -> tuple[float, np.ndarray]:
        """How much better a method is than another on the rows of both, and over draws.

        Differences of sums are divided by the denominator of all rows, which is no draw: whether
        one method is better does not depend on what divides both.
        """
        rows, declared = self.known(method, rival), self.declared
        values = [declared.goodness(self.value(m, rows)) for m in (method, rival)]
        (ours, under), (theirs, _) = (self.sums(m, rows) for m in (method, rival))
        if declared.denominator is None:
            some = under > 0
            draws = declared.goodness(ours[some] / under[some])
            draws = draws - declared.goodness(theirs[some] / under[some])
        else:
            times = _weights(tuple(self.over.index))[:, rows].mean(1)
            some = times > 0
            draws = declared.goodness((ours - theirs)[some] / times[some]) / self.under[rows].sum()
        # Two ways to the same number differ in their last digits.
        tiny = ROUNDING * max(np.abs(values))
        gain = values[0] - values[1]
        return gain * (abs(gain) > tiny), draws * (np.abs(draws) > tiny)

    def labels(self, column: str) -> pd.Series:
        """A column of the scores that is the same for all rows of a method."""
        return self.part.groupby("method", sort=False)[column].first()

    def one_with(self, role: str) -> str | None:
        """The first method that plays a part."""
        roles = self.labels("role")
        return next((str(m) for m, r in roles.items() if r == role), None)


def interval(over: np.ndarray, under: np.ndarray) -> tuple[float, float]:
    """95% interval of a ratio over draws; NaN where its denominator may well not be positive."""
    drawn = (over != 0) | (under != 0)  # a draw can miss all rows
    over, under = over[drawn], under[drawn]
    if not len(over) or (under <= 0).mean() > LEVEL / 2:
        return np.nan, np.nan
    infinite = np.copysign(np.inf, over)
    draws = np.divide(over, under, out=infinite, where=under > 0)
    low, high = np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2], method="inverted_cdf")
    return float(low), float(high)


@lru_cache(maxsize=4)
def _weights(rows: tuple[tuple[str, str, str], ...]) -> np.ndarray:
    """How often each row is drawn, shape (n_draws, n_rows)."""
    rng = np.random.default_rng(0)
    weights = np.ones((N_DRAWS, len(rows)))
    contexts = [[str(c)] for _, c, _ in rows]
    targets = [list(Perturbation.parse(str(p)).targets) for _, _, p in rows]
    for factor in (contexts, targets):
        names = sorted({name for each in factor for name in each})
        index = {name: i for i, name in enumerate(names)}
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), N_DRAWS)
        for i, each in enumerate(factor):
            for name in each:
                weights[:, i] *= times[:, index[name]]
    return weights


def _summary(found: Resampled) -> pd.DataFrame:
    declared, roles, entries = found.declared, found.labels("role"), found.labels("entry")
    as_mean = found.part[found.part["refused"].astype(bool)].drop_duplicates(["method", *ROW])
    as_mean = as_mean.groupby("method").size()
    why, rows = _unscaled(found), []
    for method in found.over:
        value = found.value(method)
        if not np.isfinite(value):
            continue
        low, high = found.interval(method)
        row = {"method": method, "entry": entries[method], "role": roles[method]}
        row |= {"metric": found.metric, "value": value}
        row |= {"low": low, "high": high, "scaled": np.nan, "scaled_low": np.nan}
        row |= {"scaled_high": np.nan, "unscaled": why, "n_rows": int(found.known(method).sum())}
        row |= {"n_as_mean": int(as_mean.get(method, 0)), "label": declared.label}
        row |= {"direction": declared.direction, "best": declared.best}
        if not why:
            row |= _scaled(found, method)
        rows.append(row)
    return pd.DataFrame(rows)


def _scaled(found: Resampled, method: str) -> dict[str, float]:
    """0 is the floor, 1 the ceiling, on the rows of all three."""
    floor, ceiling = found.one_with("floor"), found.one_with("ceiling")
    assert floor is not None and ceiling is not None
    rows = found.known(method, floor, ceiling)
    if found.is_few(rows):
        return {}
    ours, low, high = (found.value(m, rows) for m in (method, floor, ceiling))
    (own, under), (bottom, _), (top, _) = (found.sums(m, rows) for m in (method, floor, ceiling))
    sign = 1 if high > low else -1
    ends = interval(sign * (own - bottom), sign * (top - bottom))
    return {
        "scaled": (ours - low) / (high - low),
        "scaled_low": ends[0],
        "scaled_high": ends[1],
    }


def _unscaled(found: Resampled) -> str:
    """Why floor and ceiling give no scale; empty if they do."""
    declared = found.declared
    if declared.axis == "calibration":
        return "no floor and ceiling"
    floor, ceiling = found.one_with("floor"), found.one_with("ceiling")
    if floor is None or ceiling is None:
        return "floor or ceiling was not run"
    values = found.value(floor), found.value(ceiling)
    if not np.isfinite(values).all():
        return "not defined for these rows"
    if declared.per_task:
        return "one value for all rows, so no interval"
    if found.is_few(found.known(floor, ceiling)):
        return f"fewer than {MIN_UNITS} contexts or targets"
    text = f"a replicate ({values[1]:.3g}) {{}} the mean response ({values[0]:.3g})"
    low, high = np.quantile(found.gain(ceiling, floor)[1], [LEVEL / 2, 1 - LEVEL / 2])
    if high < 0:
        return text.format("is worse than")
    return "" if low > 0 else text.format("is not significantly different from")


def verdicts(
    scores: pd.DataFrame, focus: str, rivals: Sequence[str], metrics: Sequence[str]
) -> pd.DataFrame:
    """A method beside the best of its rivals, metric by metric.

    The rival is chosen by the very values that are compared, which favours it. p-values are
    bootstrap p-values; there are none where fewer than six contexts (if those are held out) or
    targets could agree. The false discovery rate is held at 5% over all verdicts that are asked for
    at once (Benjamini and Hochberg 1995). Metrics that each method measures in a space of its
    own compare nothing and have no verdict, nor have those with one value for all rows.

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
        ``low`` and ``high``, ``p`` and ``q`` (adjusted), ``n_rows``, and the ``verdict``:
        ``"better"`` or ``"worse"`` if ``q`` is below 0.05, ``"equal"`` if both are the same
        throughout, ``"too few to tell"``, else ``"not significantly different"``.
    """
    from scipy.stats import false_discovery_control

    found = []
    for (data, kind), part in scores.groupby(GROUP, sort=False):
        if focus not in set(part["method"]):
            continue
        for metric in metrics:
            declared = METRICS[metric]
            if metric not in part or declared.own_space or declared.per_task:
                continue
            row = _beside(Resampled(part, metric), focus, rivals)
            if row is not None:
                found.append({"data": data, "kind": kind, "metric": metric, **row})
    table = pd.DataFrame(found)
    if len(table):
        told = table["p"].notna()
        table.loc[told, "q"] = false_discovery_control(table.loc[told, "p"])
        sure = table["q"] < LEVEL
        same = (table["low"] == 0) & (table["high"] == 0)
        named = np.where(table["gain"] > 0, "better", "worse")
        table["verdict"] = np.where(sure, named, "not significantly different")
        table.loc[~told, "verdict"] = "too few to tell"
        table.loc[same, "verdict"] = "equal"
    return table


def _beside(found: Resampled, focus: str, rivals: Sequence[str]) -> dict | None:
    """The focus and the best of its rivals, each on the rows that both have."""
    values = {}
    for rival in (m for m in rivals if m in found.over and m != focus):
        rows = found.known(focus, rival)
        value = found.value(rival, rows) if rows.any() else np.nan
        if np.isfinite(value) and np.isfinite(found.value(focus, rows)):
            values[rival] = found.declared.goodness(value)
    if not values:
        return None
    rival = max(values, key=lambda m: values[m])
    rows = found.known(focus, rival)
    gain, draws = found.gain(focus, rival)
    low, high = np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2])
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    # No resampling of few units shows more than that all of them agree.
    agree = 2 * 0.5 ** found.n_units(rows)
    p = min(1.0, max(agree, 2 * (tail + 1) / (len(draws) + 1)))
    return {
        "value": found.value(focus, rows),
        "rival": rival,
        "rival_value": found.value(rival, rows),
        "gain": gain,
        "low": float(low),
        "high": float(high),
        "p": np.nan if found.is_few(rows) else p,
        "n_rows": int(rows.sum()),
    }


def risk_coverage(error: np.ndarray, uncertainty: np.ndarray) -> float:
    """Mean error of the most certain share of the rows, averaged over all shares, over the mean.

    Below 1 if the stated uncertainty tells good predictions from bad ones (the area under the
    risk-coverage curve, Geifman and El-Yaniv 2017).

    Parameters
    ----------
    error, uncertainty
        Of each row, shape (n_rows,).
    """
    ordered = error[np.argsort(uncertainty, kind="stable")]
    risk = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    return float(risk.mean() / error.mean())


def calibration(scores: pd.DataFrame) -> pd.DataFrame:
    """Whether stated uncertainty tells good predictions from bad ones, for methods that state any.

    Returns
    -------
    pandas.DataFrame
        One row per data set × kind × method: ``risk_coverage``
        (:func:`gpjepa.benchmark.risk_coverage`; below 1 is informative) and ``n_rows``; no rows
        without the metric ``squared_error``.
    """
    found = []
    stated = scores[scores["uncertainty"].notna()] if "squared_error" in scores else scores[:0]
    for (data, kind, method), part in stated.groupby([*GROUP, "method"], sort=False):
        rows = part.groupby(ROW)[["squared_error", "uncertainty"]].mean()
        if len(rows) < 2:
            continue
        # A noise-corrected error can be negative: the risk of a row is at least none.
        error = rows["squared_error"].clip(lower=0).to_numpy()
        value = risk_coverage(error, rows["uncertainty"].to_numpy()) if error.any() else np.nan
        found.append([data, kind, method, value, len(rows)])
    return pd.DataFrame(found, columns=[*GROUP, "method", "risk_coverage", "n_rows"])
