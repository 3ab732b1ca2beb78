"""Candidates in the order of how well they meet a goal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from gpjepa.perturbations import Perturbation

from ._constraints import Constraints
from ._goals import Goal
from ._model import as_model, check_context
from ._result import Ranking
from ._scoring import KNOWN, Risk, Scoring, check_risk, doses_of, together
from ._screen import best_pairs

_COLUMNS = (
    "perturbation",
    "regime",
    "score",
    "expected",
    "sd",
    "lower",
    "upper",
    "p_success",
    "p_best",
    "expected_rank",
    "side_effect",
    "cost",
    "feasible",
    "extrapolated",
)


def rank(
    model: Any,
    goal: Goal,
    candidates: Sequence[str | Perturbation] | None = None,
    *,
    targets: Sequence[str] | None = None,
    context: str | None = None,
    constraints: Constraints | None = None,
    risk: Risk = "mean",
    threshold: float | None = None,
    n_full: int = 10_000,
    n_joint: int = 200,
    n_draws: int = 200,
    seed: int = 0,
) -> Ranking:
    """Rank perturbations, alone and in pairs, by how well they meet a goal.

    Of more pairs than ``n_full``, the best are found first by the linear part of what the anchor
    predicts, exactly and for all of them; these are predicted again by the full model. The best of
    these are drawn together, so that pairs with a target in common share its error.

    Parameters
    ----------
    model
        A trained :class:`gpjepa.GPJEPA`, or what :func:`as_model` takes.
    goal
        What is wanted.
    candidates
        What may be chosen; by default all measured targets alone and in pairs, and what else was
        measured.
    targets
        Targets to be ranked alone and in pairs, instead of candidates.
    context
        Context of the effects; optional if the model has only one.
    constraints
        Limits.
    risk
        What the best are ordered by: ``"mean"``, the score of the predicted mean effect;
        ``"expected"``, the expected score over what is unknown, which for distances is lower the more is
        unknown; ``"quantile"``, the score that is exceeded in nine of ten cases; ``"success"``, the
        probability of reaching the threshold.
    threshold
        Score that counts as success; by default half of the way to an effect, and 0 of other goals.
    n_full
        Pairs that are predicted by the full model.
    n_joint
        Candidates that are drawn together: the best by their score.
    n_draws
        Number of draws.
    seed
        Random seed of the draws.

    Returns
    -------
    Ranking

    Raises
    ------
    ValueError
        If goal or constraints make no sense, or leave no candidates.
    """
    check_risk(risk)
    check_sizes(n_full=n_full, n_joint=n_joint, n_draws=n_draws)
    if candidates is not None and targets is not None:
        raise ValueError("Give either candidates or targets.")
    model = as_model(model)
    context = check_context(model, context)
    scoring = Scoring(model, goal, context, constraints or Constraints(), threshold)
    if candidates is not None:
        named = model.parse(listed(candidates, "candidates"))
        chosen, n_all = list(named), len(named)
    else:
        chosen, n_all = _all_of(scoring, targets, n_full)
        named = {}
    return ranked(scoring, chosen, named, n_all, risk, n_joint, n_draws, seed)


def ranked(
    scoring: Scoring,
    chosen: Sequence[Perturbation],
    named: dict[Perturbation, str],
    n_all: int,
    risk: Risk,
    n_joint: int,
    n_draws: int,
    seed: int,
) -> Ranking:
    """Candidates predicted by the full model, and the best of them drawn together."""
    chosen = _permitted(scoring, chosen, n_all)
    table = scoring.table(chosen)
    _check_feasible(scoring, chosen, table)
    unnamed = [p for p in chosen if p not in named]
    known = named | (scoring.model.parse(unnamed) if unnamed else {})
    table.insert(0, "perturbation", [known[p] for p in chosen])
    table["extrapolated"] = ~table["regime"].isin(KNOWN)
    order = _order(table, "expected" if risk == "expected" else "score")
    far = table["extrapolated"].to_numpy()[order]
    lists = [order[~far][:n_joint], order[far][:n_joint]]
    _add_draws(scoring, chosen, table, lists, risk, n_draws, seed)
    order = _order(table, "value", "score")
    order = order[np.argsort(table["extrapolated"].to_numpy()[order], kind="stable")]
    columns = [c for c in _COLUMNS if c in table]
    table = table.iloc[order].reset_index(drop=True)[columns]
    return Ranking(table, [chosen[i] for i in order], scoring, n_all, risk)


def _permitted(scoring: Scoring, chosen: Sequence[Perturbation], n_all: int) -> list[Perturbation]:
    """Candidates that the constraints permit, each once."""
    model, constraints = scoring.model, scoring.constraints
    given = [p for p in dict.fromkeys(chosen) if not p.is_control]
    if not given:
        raise ValueError("The control is the only candidate; it changes nothing.")
    measured = {t for c in model.contexts for p in model.measured(c) for t in p.targets}
    constraints.check_targets(measured | {t for p in given for t in p.targets})
    permitted = [p for p in given if constraints.permits(p)]
    if not permitted:
        raise ValueError(
            f"No candidates are left: the constraints permit none of {n_all:,}. Allow more targets, or "
            "raise the limits."
        )
    return permitted


def _check_feasible(scoring: Scoring, chosen: list[Perturbation], table: pd.DataFrame) -> None:
    if "feasible" in table and not table["feasible"].any():
        least = int(table["side_effect"].argmin())
        raise ValueError(
            f"None of {len(chosen):,} candidates keeps side effects within "
            f"max_change={scoring.constraints.max_change:g}; the smallest, of {chosen[least]}, is "
            f"{table['side_effect'][least]:.3g}."
        )


def _add_draws(
    scoring: Scoring,
    chosen: list[Perturbation],
    table: pd.DataFrame,
    lists: list[np.ndarray],
    risk: Risk,
    n_draws: int,
    seed: int,
) -> None:
    """Add what draws say of some rows of the table, all of them together; ranks within each list."""
    at = np.concatenate(lists)
    drawn = scoring.drawn([chosen[i] for i in at], n_draws, seed)
    table[["sd", "lower", "upper", "p_success", "p_best", "expected_rank", "value"]] = np.nan
    if scoring.objective.linear is None:  # nothing is known of it in closed form
        table["expected"] = np.nan
        table.loc[at, "expected"] = drawn.score.mean(0)
    table.loc[at, "sd"] = drawn.score.std(0)
    table.loc[at, ["lower", "upper"]] = np.quantile(drawn.score, [0.025, 0.975], axis=0).T
    table.loc[at, "p_success"] = scoring.success(drawn).mean(0)
    if risk in ("mean", "expected"):
        table["value"] = table["score" if risk == "mean" else "expected"]
    else:
        table.loc[at, "value"] = scoring.value(drawn, risk)
    # What breaks a limit is not the best, whatever its score.
    score = np.where(scoring.within(drawn), drawn.score, -np.inf)
    for start, rows in zip((0, len(lists[0])), lists, strict=True):
        if len(rows):
            mine = score[:, start : start + len(rows)]
            places = (-mine).argsort(1, kind="stable").argsort(1)
            table.loc[rows, "p_best"] = (places == 0).mean(0)
            table.loc[rows, "expected_rank"] = 1 + places.mean(0)


def _order(table: pd.DataFrame, *columns: str) -> np.ndarray:
    """Feasible first, then by columns, largest first; ties by name."""
    keys = [table["perturbation"].to_numpy(str)]
    for column in reversed(columns):
        keys.append(-table[column].fillna(-np.inf).to_numpy())
    if "feasible" in table:
        keys.append(~table["feasible"].to_numpy(bool))
    return np.lexsort(keys)


def _all_of(
    scoring: Scoring, targets: Sequence[str] | None, n_full: int
) -> tuple[list[Perturbation], int]:
    """All singles and pairs of some targets, or the best pairs of too many; and how many there are."""
    model, constraints = scoring.model, scoring.constraints
    more: list[Perturbation] = []
    if targets is None:
        singles = doses_of(model, scoring.context)
        # What was measured, also elsewhere, is more than the sum of its targets.
        measured = {p for c in model.contexts for p in model.measured(c) if len(p.targets) > 1}
        more = sorted(p for p in measured if {*p.singles} <= {*singles})
    else:
        given = list(model.parse(listed(targets, "targets")))
        wrong = [str(p) for p in given if len(p.targets) != 1]
        if wrong:
            raise ValueError(f"targets are single targets, not {wrong[:5]}; see candidates.")
        singles = given
    constraints.check_targets({t for p in singles for t in p.targets})
    singles = [s for s in singles if constraints.permits(s)]
    more = [p for p in more if constraints.permits(p)]
    n, doses = len(singles), Counter(s.targets for s in singles)
    # Two doses of one target are no pair.
    n_pairs = n * (n - 1) // 2 - sum(k * (k - 1) // 2 for k in doses.values())
    if constraints.max_targets == 1 or not n_pairs:
        return [*singles, *more], n + len(more)
    n_all = n + n_pairs + sum(len(p.targets) > 2 for p in more)
    if n_pairs <= n_full:
        pairs = [
            together(pair)
            for pair in combinations(singles, 2)
            if pair[0].targets != pair[1].targets
        ]
        return [*singles, *pairs, *more], n_all
    best = best_pairs(scoring, singles, n_full)
    if best is None:
        raise ValueError(
            f"{n_pairs:,} pairs are more than n_full={n_full}, and the best of them cannot be found "
            "beforehand, as the score is not quadratic in effects or the model has no linear part. "
            "Give fewer targets or candidates, or raise n_full."
        )
    return [*singles, *best, *more], n_all


def listed(given: Any, name: str) -> list[str | Perturbation]:
    """A list of names that is one, and not empty."""
    if isinstance(given, str | Perturbation):
        raise TypeError(f"{name}={given!r} is one name; give a list.")
    found = list(given)
    if not found:
        raise ValueError(f"{name} is empty: there is nothing to choose from.")
    return found


def check_sizes(**sizes: int) -> None:
    """Refuse what is not a positive integer."""
    wrong = [f"{k}={v}" for k, v in sizes.items() if isinstance(v, bool) or int(v) != v or v < 1]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: must be a positive integer.")
