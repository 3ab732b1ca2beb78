"""Which perturbations, contexts or cells are held out; training, effects and benchmark share it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .perturbations import Perturbation

MIN_UNITS = 5
"""Fewer held-out units than this do not decide anything (a gate, early stopping)."""


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

    Singles and combinations, a share of each kind and at least five where a kind has fifteen;
    five of both together if only their sum has fifteen; otherwise one context of at least three;
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
    units = sorted({p.targets for p in perturbations})  # doses of the same targets stay together
    singles = [u for u in units if len(u) == 1]
    combinations = [u for u in units if len(u) > 1]
    kinds = [kind for kind in (combinations, singles) if len(kind) >= 3 * MIN_UNITS]
    if not kinds and len(units) >= 3 * MIN_UNITS:
        kinds = [units]
    if kinds:
        out = {
            kind[i]
            for kind in kinds
            for i in rng.permutation(len(kind))[: max(MIN_UNITS, round(fraction * len(kind)))]
        }
        chosen = [p for p in perturbations if p.targets in out]
        return Holdout("perturbations", tuple(chosen), f"{len(chosen)} perturbations")
    few = f"only {len(units)} perturbations; {3 * MIN_UNITS} are needed to hold {MIN_UNITS} out"
    if len(contexts) >= 3:
        context = contexts[int(rng.integers(len(contexts)))]
        return Holdout("contexts", (context,), f"context {context!r} ({few})")
    return Holdout("cells", (), f"a tenth of the cells ({few}, and fewer than 3 contexts)")


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
