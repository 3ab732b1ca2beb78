"""Which perturbations, contexts or cells are held out; training, effects and benchmark share it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .perturbations import Perturbation

MIN_UNITS = 5
"""Fewer independent units than this decide nothing (stacking weights, a gate, early stopping)."""


@dataclass(frozen=True)
class Holdout:
    """What was held out: ``units`` of one ``kind``, and why this kind."""

    kind: Literal["perturbations", "contexts", "cells"]
    units: tuple
    reason: str


def hold_out(
    rows: Sequence[tuple[str, Perturbation]], *, fraction: float = 0.15, seed: int = 0
) -> Holdout:
    """Choose what training holds out for early stopping and the gate.

    Singles and combinations, a share of each kind and at least five where a kind has fifteen, with
    combinations whose singles all stay and others; five of both together if only their sum has
    fifteen; otherwise one context of at least three;
    otherwise cells.

    Parameters
    ----------
    rows
        The (context, perturbation) pairs measured in training; controls are ignored.
    fraction
        Share of the perturbations to hold out.
    seed
        Seed of the choice; the order of the rows does not matter.

    Returns
    -------
    Holdout
        ``units`` are perturbations, contexts, or empty for cells.
    """
    rng = np.random.default_rng(seed)
    perturbations = sorted({p for _, p in rows if not p.is_control})
    contexts = sorted({c for c, p in rows if not p.is_control})
    units: list[tuple[str, ...]] = sorted(
        {p.targets for p in perturbations}
    )  # doses of the same targets stay together
    singles: list[tuple[str, ...]] = [u for u in units if len(u) == 1]
    combinations = [u for u in units if len(u) > 1]
    out: set[tuple[str, ...]] = set()
    kinds: list[list[tuple[str, ...]]] = [singles, combinations]
    for kind in kinds:
        if len(kind) >= 3 * MIN_UNITS:
            out |= _choose(kind, out, set(singles), fraction, rng)
    if not out and len(units) >= 3 * MIN_UNITS:
        out = _choose(units, out, set(), fraction, rng)
    if out:
        chosen = [p for p in perturbations if p.targets in out]
        return Holdout("perturbations", tuple(chosen), f"{len(chosen)} perturbations")
    few = f"only {len(units)} perturbations; {3 * MIN_UNITS} are needed to hold {MIN_UNITS} out"
    if len(contexts) >= 3:
        context = contexts[int(rng.integers(len(contexts)))]
        return Holdout("contexts", (context,), f"context {context!r} ({few})")
    return Holdout("cells", (), f"a tenth of the cells ({few}, and fewer than 3 contexts)")


def _choose(
    kind: list[tuple[str, ...]], out: set[tuple[str, ...]], singles: set[tuple[str, ...]],
    fraction: float, rng: np.random.Generator,
) -> set[tuple[str, ...]]:  # fmt: skip
    """A share of a kind, at least five; combinations first of those whose singles all stay.

    Five of the other combinations come on top, so that each regime has something to be judged by.
    """
    shuffled = [kind[i] for i in rng.permutation(len(kind))]
    n = max(MIN_UNITS, round(fraction * len(kind)))
    if len(kind[0]) == 1 or not singles:
        return set(shuffled[:n])
    whole = [u for u in shuffled if all((t,) in singles - out for t in u)]
    others = [u for u in shuffled if u not in set(whole)]
    return set(whole[:n]) | set(others[: max(MIN_UNITS, n - len(whole))])


def exclude(
    labels: Iterable[Perturbation], contexts: Iterable[str], holdout: Holdout
) -> np.ndarray:
    """Mask of the cells that a hold-out of perturbations or contexts takes out of training.

    Control cells stay: a context is known by them.
    """
    out = set(holdout.units)
    if holdout.kind == "perturbations":
        return np.fromiter((p in out for p in labels), bool)
    if holdout.kind == "contexts":
        pairs = zip(labels, contexts, strict=True)
        return np.fromiter((c in out and not p.is_control for p, c in pairs), bool)
    raise ValueError("Cells are held out at random, not by label.")
