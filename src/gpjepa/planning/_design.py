"""What to measure next, and with how many cells."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.linalg import cholesky, solve_triangular
from scipy.stats import norm

from gpjepa.perturbations import Perturbation

from ._constraints import Constraints
from ._goals import Goal
from ._model import EffectModel, OfPredictor, as_model, check_context
from ._rank import check_sizes, listed
from ._scoring import Scoring, together

_MOST = 5_000  # candidates whose covariance is held
_MOST_DRAWN = 1_000
_RANDOM = 50


@dataclass(frozen=True)
class Design:
    """What to measure next.

    Attributes
    ----------
    frame
        In the order of choice: ``perturbation, regime``, and what is reached with it and those before:
        ``reached``, beside the mean and a 95% interval of random choices, ``random, lower, upper``.
    measure
        What is reached, in words.
    differs
        Whether anything distinguishes candidates; if not, the order is arbitrary.
    """

    frame: pd.DataFrame
    measure: str
    differs: bool

    def table(self) -> pd.DataFrame:
        """The choices."""
        return self.frame

    def plot(self, **kwargs: Any) -> Any:
        """What is reached, beside random choices (:func:`gpjepa.plotting.design`)."""
        from gpjepa.plotting import design as draw

        return draw(self.frame, measure=self.measure, **kwargs)

    def __repr__(self) -> str:
        note = (
            ""
            if self.differs
            else "\nNothing distinguishes the candidates: the order is arbitrary."
        )
        shown = self.frame.head(10).to_string(index=False, float_format="{:.3f}".format)
        return f"Design of {len(self.frame)} perturbations; reached: {self.measure}{note}\n{shown}"


def design(
    model: Any,
    n: int,
    candidates: Sequence[str | Perturbation] | None = None,
    *,
    targets: Sequence[str | Perturbation] | None = None,
    goal: Goal | None = None,
    context: str | None = None,
    constraints: Constraints | None = None,
    threshold: float | None = None,
    n_cells: int = 100,
    n_draws: int = 400,
    seed: int = 0,
) -> Design:
    r"""Choose what to measure next, beside what random choices would reach.

    Without a goal, one after another, so that a batch is diverse: the perturbation whose measurement
    reduces what is unknown of all targets most. With covariance *C* of what is unknown (a Gaussian
    process over perturbations) and noise :math:`\sigma^2`, measuring *b* takes
    :math:`\sum_a C_{ab}^2 / (C_{bb} + \sigma^2)` off the variance (Cohn 1996).

    With a goal: the set of which at least one is likeliest to succeed, from joint draws.

    Parameters
    ----------
    model
        A trained :class:`gpjepa.GPJEPA`, a fitted :class:`gpjepa.response.ResponsePredictor` or
        :class:`gpjepa.effects.EffectAnchor`; with a goal, anything that :func:`as_model` takes.
    n
        How many to choose.
    candidates
        What may be measured; by default all pairs of measured targets that were not. Of more than
        5,000, without a goal, so many are taken at random.
    targets
        What is to be known; the candidates by default.
    goal, threshold, constraints, context
        As in :func:`rank`.
    n_cells
        Cells of each new perturbation.
    n_draws
        Number of draws, with a goal: half to choose by, half to judge by.
    seed
        Random seed of draws and random choices.

    Returns
    -------
    Design
    """
    check_sizes(n=n, n_cells=n_cells, n_draws=n_draws)
    model = as_model(model)
    context = check_context(model, context)
    limits = constraints or Constraints()
    limits.check(model, context)
    named = model.parse(
        _unmeasured(model, context) if candidates is None else listed(candidates, "candidates")
    )
    chosen = [p for p in named if limits.permits(p) and not p.is_control]
    limits.check_targets({t for p in named for t in p.targets})
    if len(chosen) < n:
        raise ValueError(f"{len(chosen)} candidates are fewer than n={n}.")
    rng = np.random.default_rng(seed)
    if goal is None and len(chosen) > _MOST:
        warnings.warn(
            f"Of {len(chosen):,} candidates, {_MOST:,} are taken at random, as the covariance of all "
            "would take too much memory.",
            UserWarning,
            stacklevel=2,
        )
        chosen = [chosen[i] for i in np.sort(rng.choice(len(chosen), _MOST, replace=False))]
    random = [rng.choice(len(chosen), n, replace=False) for _ in range(_RANDOM)]
    if goal is None:
        wanted = list(model.parse(listed(targets, "targets"))) if targets is not None else chosen
        if len(wanted) > _MOST:
            raise ValueError(f"{len(wanted):,} targets are more than {_MOST:,}; give fewer.")
        order, reached, differs = _by_variance(model, context, chosen, wanted, n, n_cells, random)
        measure = f"share of what is unknown of {len(wanted):,} perturbations that is left"
    else:
        scoring = Scoring(model, goal, context, limits, threshold)
        order, reached, differs = _by_hits(scoring, chosen, n, n_draws, seed, random)
        measure = f"probability that one at least reaches {scoring.threshold:g} ({scoring.objective.unit})"
    mine, theirs = reached[0], np.stack(reached[1:])
    low, high = np.quantile(theirs, [0.025, 0.975], axis=0)
    regime = model.predict([chosen[i] for i in order], context).regime
    frame = pd.DataFrame(
        {
            "perturbation": [named[chosen[i]] for i in order],
            "regime": regime,
            "reached": mine,
            "random": theirs.mean(0),
            "lower": low,
            "upper": high,
        }
    )
    return Design(frame, measure, differs)


def _unmeasured(model: EffectModel, context: str) -> list[Perturbation]:
    """Pairs of targets measured alone, that were not measured themselves."""
    known = set(model.measured(context))
    singles = sorted(p for p in known if len(p.targets) == 1)
    pairs = (
        together(pair) for pair in combinations(singles, 2) if pair[0].targets != pair[1].targets
    )
    found = [p for p in pairs if p not in known]
    if not found:
        raise ValueError("There are no pairs of measured targets left to measure; give candidates.")
    return found


def _by_variance(
    model: EffectModel,
    context: str,
    chosen: list[Perturbation],
    wanted: list[Perturbation],
    n: int,
    n_cells: int,
    random: list[np.ndarray],
) -> tuple[list[int], list[np.ndarray], bool]:
    """Choices that leave least unknown, and the share that each choice, and random ones, leave."""
    if not isinstance(model, OfPredictor):
        raise TypeError(
            f"{type(model).__name__} does not say what is unknown of perturbations together: give a "
            "GPJEPA, ResponsePredictor or EffectAnchor, or a goal."
        )
    both = list(dict.fromkeys([*chosen, *wanted]))
    at = {p: i for i, p in enumerate(both)}
    covariance, of_cell = model.unknown(both, context)
    noise = of_cell / n_cells
    of_wanted = np.array([at[p] for p in wanted])
    whole = covariance[of_wanted, of_wanted].sum()

    best, left, open_ = [], covariance.copy(), np.ones(len(chosen), bool)
    for _ in range(n):
        mine = left[: len(chosen)]
        gain = (mine[:, of_wanted] ** 2).sum(1) / (mine.diagonal() + noise)
        b = int(np.argmax(np.where(open_, gain, -np.inf)))
        open_[b] = False
        left -= np.outer(left[:, b], left[b]) / (left[b, b] + noise)
        best.append(b)

    def shares(order: np.ndarray) -> np.ndarray:
        """Share left with each further one of an order, by Cholesky's factor of those before."""
        block = covariance[np.ix_(order, order)] + noise * np.eye(n)
        taken = solve_triangular(
            cholesky(block, lower=True), covariance[np.ix_(order, of_wanted)], lower=True
        )
        return 1 - np.cumsum((taken**2).sum(1)) / whole

    reached = [shares(np.array(order)) for order in [best, *random]]
    return best, reached, bool(reached[0][-1] < np.mean([t[-1] for t in reached[1:]]) - 1e-6)


def _by_hits(
    scoring: Scoring,
    chosen: list[Perturbation],
    n: int,
    n_draws: int,
    seed: int,
    random: list[np.ndarray],
) -> tuple[list[int], list[np.ndarray], bool]:
    """Choices of which one at least is likeliest to succeed, and that probability."""
    table = scoring.table(chosen)
    likely = np.argsort(-table["score"].to_numpy(), kind="stable")[:_MOST_DRAWN]
    used = np.unique(np.concatenate([likely, *random]))
    place = {int(i): k for k, i in enumerate(used)}
    drawn = scoring.success(scoring.drawn([chosen[i] for i in used], n_draws, seed))
    # Half of the draws choose, the others judge: the best of many looks better than it is.
    hit, judging = drawn[::2], drawn[1::2]
    done, order = np.zeros(len(hit), bool), []
    score = table["score"].to_numpy()[used]
    for _ in range(n):
        gain = (hit & ~done[:, None]).sum(0).astype(float)
        # Where all draws have succeeded, or none will: the likeliest by itself, then the best.
        key = np.lexsort((-score, -hit.sum(0), -gain))
        b = next(k for k in key if int(used[k]) not in order)
        order.append(int(used[b]))
        done |= hit[:, b]
    sets = [np.array(order), *random]
    reached = [
        np.maximum.accumulate(judging[:, [place[int(i)] for i in mine]], axis=1).mean(0)
        for mine in sets
    ]
    return order, reached, bool(reached[0][-1] > np.mean([t[-1] for t in reached[1:]]))


@dataclass(frozen=True)
class Power:
    """How many cells show a predicted effect.

    Attributes
    ----------
    frame
        Per number of cells: ``n_cells``; ``power``, the expected share of the genes that truly change
        that are found; ``found``, how many genes are found in all.
    n_cells
        The first of these numbers with the wanted power; None if there is none.
    n_changed
        Genes expected to change by ``min_effect`` or more.
    """

    frame: pd.DataFrame
    n_cells: int | None
    n_changed: float


def power(
    model: Any,
    perturbation: str | Perturbation,
    context: str | None = None,
    *,
    fdr: float = 0.05,
    wanted: float = 0.8,
    min_effect: float = 0.2,
    n_cells: int | Sequence[int] = (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000),
    n_draws: int = 50,
    seed: int = 0,
) -> Power:
    r"""Cells needed to see a predicted effect at a false discovery rate.

    Of draws of the effect *d*, each gene is tested by :math:`z = d / \sqrt{s^2 / n + v}`, with the
    variance :math:`s^2` between cells and *v* of the model's controls. Benjamini and Hochberg's rule
    rejects below the level α at which :math:`\alpha G = q\, E[\text{rejections at } \alpha]`.

    Parameters
    ----------
    model
        As in :func:`design`.
    perturbation, context
        What is to be seen.
    fdr
        False discovery rate q.
    wanted
        Share of the changed genes that is to be found.
    min_effect
        Change from which a gene counts, in the model's units.
    n_cells
        Numbers of cells to try.
    n_draws, seed
        Number of draws of the effect, and random seed.

    Returns
    -------
    Power
    """
    for name, value in (("fdr", fdr), ("wanted", wanted)):
        if not 0 < value < 1:
            raise ValueError(f"{name}={value}: expected a number between 0 and 1.")
    numbers: list[int] = [n_cells] if isinstance(n_cells, int) else sorted(n_cells)
    if not numbers:
        raise ValueError("n_cells is empty: give numbers of cells to try.")
    check_sizes(n_draws=n_draws, **{f"n_cells[{i}]": n for i, n in enumerate(numbers)})
    model = as_model(model)
    context = check_context(model, context)
    if not isinstance(model, OfPredictor):
        raise TypeError(
            f"{type(model).__name__} does not say how much cells vary: give a GPJEPA, "
            "ResponsePredictor or EffectAnchor."
        )
    [asked] = model.parse([perturbation])
    effects = np.stack([d[0] for d in model.joint([(asked, context)]).draws(n_draws, seed)])
    spread = model.cell_variance(context)
    control = np.asarray(model.effects.control_variance[model.unit][context], float)
    changed = np.abs(effects) >= min_effect
    rows = []
    for n in numbers:
        z = np.abs(effects) / np.sqrt(np.maximum(spread / n + control, 1e-12))
        found = np.stack([_rejected(each, fdr) for each in z])
        share = (found * changed).sum(1) / np.maximum(changed.sum(1), 1)
        rows.append(
            (n, float(share[changed.any(1)].mean()) if changed.any() else 0.0, found.sum(1).mean())
        )
    frame = pd.DataFrame(rows, columns=["n_cells", "power", "found"])
    enough = frame.loc[frame["power"] >= wanted, "n_cells"]
    needed = int(enough.iloc[0]) if len(enough) else None
    return Power(frame, needed, float(changed.sum(1).mean()))


def _rejected(z: np.ndarray, fdr: float) -> np.ndarray:
    """Probability that each gene is rejected by the rule of Benjamini and Hochberg."""
    level, n = 1.0, len(z)
    for _ in range(200):
        at = norm.isf(level / 2)
        rejected = norm.sf(at - z) + norm.sf(at + z)
        # Equal, but for the last digits, once the level is what the rejections allow.
        new = min(level, fdr * rejected.sum() / n)
        if new <= 1e-300 or abs(new - level) < 1e-9 * level:
            break
        level = new
    return rejected
