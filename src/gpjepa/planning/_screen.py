"""The best of millions of pairs, by the linear part of their effects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpjepa.effects import PairSums
from gpjepa.perturbations import Perturbation

from ._scoring import Scoring, in_blocks, together

_ROWS = 256  # targets whose pairs are scored at a time
_SLACK = 1.25
"""Side effects up to this much above the limit pass: the full model decides."""


def best_pairs(
    scoring: Scoring, targets: Sequence[Perturbation], n: int
) -> list[Perturbation] | None:
    """The n best pairs of some targets by the linear part; None if the model or goal has none."""
    objective, model = scoring.objective, scoring.model
    if objective.linear is None:
        return None
    sums = {}
    for context in {scoring.context, *scoring.protected}:
        of = model.pair_sums(targets, context)
        if of is None:
            return None
        sums[context] = of
    cost = scoring.constraints.costs(targets)
    # Two doses of one target are no pair.
    names = {t: k for k, t in enumerate(sorted({p.targets for p in targets}))}
    name = np.array([names[p.targets] for p in targets])
    best_value, best_pair = np.zeros(0, np.float32), np.zeros((0, 2), int)
    for rows in in_blocks(len(targets), _ROWS):
        value = _values(scoring, sums, np.arange(rows.start, rows.stop))
        i, j = np.meshgrid(np.arange(rows.start, rows.stop), np.arange(len(targets)), indexing="ij")
        allowed = (i < j) & (name[i] != name[j]) & np.isfinite(value)
        if scoring.constraints.max_cost is not None:
            allowed &= cost[i] + cost[j] <= scoring.constraints.max_cost
        mine = value[allowed]
        pairs = np.stack([i[allowed], j[allowed]], 1)
        if len(mine) > n:
            kept = np.argpartition(-mine, n)[:n]
            mine, pairs = mine[kept], pairs[kept]
        best_value = np.concatenate([best_value, mine])
        best_pair = np.concatenate([best_pair, pairs])
        kept = np.argsort(-best_value, kind="stable")[:n]
        best_value, best_pair = best_value[kept], best_pair[kept]
    return [together([targets[i], targets[j]]) for i, j in best_pair]


def _values(scoring: Scoring, sums: dict[str, PairSums], rows: np.ndarray) -> np.ndarray:
    """Score of some targets paired with each, less side effects; -inf where these are too large."""
    objective, constraints = scoring.objective, scoring.constraints
    assert objective.linear is not None
    value = sums[scoring.context].quadratic(rows, objective.linear, objective.metric)
    if not scoring.protected or not (constraints.weight or constraints.max_change is not None):
        return value
    square, n = np.zeros_like(value), 0
    nothing = np.zeros(len(objective.genes))
    for context, genes in scoring.protected.items():
        metric = np.zeros(len(objective.genes))
        metric[genes] = 1
        square += sums[context].quadratic(rows, nothing, metric)
        n += len(genes)
    side = np.sqrt(np.maximum(square, 0) / n)
    value = value - constraints.weight * side
    if constraints.max_change is not None:
        value[side > _SLACK * constraints.max_change] = -np.inf
    return value
