"""Predicted pairs of targets as sums of what each target brings, for millions of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from gpjepa.perturbations import Perturbation


@dataclass(frozen=True)
class PairSums:
    r"""The part of predicted pairs that is linear in what is said of their targets.

    Targets fall into groups, by whether they were measured alone, and here or elsewhere. A pair of
    targets *i*, *j* of groups *a*, *b*, of which *i* has the larger effect, is predicted by

    .. math:: (s_{ab} + l_{ab})\, S_i + s_{ba}\, S_j + p_{ab} (P_i + P_j) + c_{ab}

    with what is said of each target alone, *S*, and what the Gaussian process says of it, *P*; and by
    what each target does to its own gene. It is the anchor's prediction of a pair that was not measured
    here or elsewhere, but for saturation, the floor of no expression, and what one target does to the
    gene of the other.

    Attributes
    ----------
    targets
        Perturbations of one target each.
    alone, process
        S and P, shape (n_targets, n_genes).
    group, order
        Group of each target, and its place when they are sorted by size, largest first.
    of_alone, larger, of_process
        s, l and p, shape (n_groups, n_groups).
    constant
        c, shape (n_groups, n_groups, n_genes).
    own
        By target, the gene that it targets, and the effect on it, where that was measured.
    """

    targets: tuple[Perturbation, ...]
    alone: np.ndarray
    process: np.ndarray
    group: np.ndarray
    order: np.ndarray
    of_alone: np.ndarray
    larger: np.ndarray
    of_process: np.ndarray
    constant: np.ndarray
    own: dict[int, tuple[int, float]] = field(default_factory=dict)

    def effect(self, i: int, j: int) -> np.ndarray:
        """Predicted effect of one pair, shape (n_genes,)."""
        i, j = (i, j) if self.order[i] < self.order[j] else (j, i)
        a, b = self.group[i], self.group[j]
        first, second = self._parts(np.array([i]), a, b, True), self._parts(np.array([j]), b, a)
        return first[0] + second[0] + self.constant[a, b]

    def _parts(self, targets: np.ndarray, a: int, b: int, larger: bool = False) -> np.ndarray:
        """What targets of one group bring to pairs with those of another."""
        of_alone = self.of_alone[a, b] + larger * self.larger[a, b]
        found = of_alone * self.alone[targets] + self.of_process[a, b] * self.process[targets]
        for own, target in zip(found, targets, strict=True):
            if target in self.own:
                gene, effect = self.own[int(target)]
                own[gene] = effect - self.constant[a, b][gene]
        return found

    def quadratic(
        self, rows: Sequence[int] | np.ndarray, linear: np.ndarray, metric: np.ndarray | None
    ) -> np.ndarray:
        r"""A quadratic function of the effects of some targets paired with each.

        :math:`\omega^\top d + d^\top \mathrm{diag}(m)\, d` of effects *d*, by inner products of what
        the targets bring.

        Parameters
        ----------
        rows
            The first targets of the pairs.
        linear, metric
            ω and *m*, shape (n_genes,); None for no quadratic part.

        Returns
        -------
        numpy.ndarray
            Shape (n_rows, n_targets).
        """
        rows = np.asarray(rows)
        found = np.zeros((len(rows), len(self.targets)), np.float32)
        for a in np.unique(self.group[rows]):
            mine = np.flatnonzero(self.group[rows] == a)
            for b, columns in self._groups():
                i, c = rows[mine], self.constant[a, b]
                value = _quadratic(
                    self._parts(i, a, b, True), self._parts(columns, b, a), c, linear, metric
                )
                if self.larger[a, b]:
                    other = _quadratic(
                        self._parts(i, a, b), self._parts(columns, b, a, True), c, linear, metric
                    )
                    before = self.order[i][:, None] < self.order[columns]
                    value = np.where(before, value, other)
                found[np.ix_(mine, columns)] = value
        return found

    def _groups(self) -> Iterator[tuple[int, np.ndarray]]:
        for b in np.unique(self.group):
            yield b, np.flatnonzero(self.group == b)


def _quadratic(
    one: np.ndarray,
    other: np.ndarray,
    constant: np.ndarray,
    linear: np.ndarray,
    metric: np.ndarray | None,
) -> np.ndarray:
    """Of sums of a row of one, a row of the other, and a constant, shape (n_one, n_other)."""
    one = one + constant
    found = (one @ linear)[:, None] + other @ linear
    if metric is None:
        return found
    weighted = one * metric
    squares = (weighted * one).sum(1)[:, None] + (other**2) @ metric
    return found + squares + 2 * (weighted @ other.T)
