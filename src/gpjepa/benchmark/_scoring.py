"""A prediction beside one half of the truth, and what several metrics need of the pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from gpjepa.effects import gene_set_scores

from ._tasks import SCALE, CellSet, Task, Truth

MIN_SET = 5  # measured genes that a gene set must have


@dataclass(frozen=True)
class Prediction:
    """What a method predicts for the rows of a task.

    Attributes
    ----------
    effect
        Mean effects, scale ``mean_log1p``, against the training control, shape (n_rows, n_genes).
    cells
        Predicted cells of the rows.
    sd
        Standard deviation of the mean effects, shape (n_rows, n_genes), or None.
    refused
        Rows that the method did not predict, scored as the mean response; None for none.
    embed
        The method's own states of cells, shape (n_cells, n_dimensions), or None.
    known_states
        Those of the task's cells, as far as they were asked for; several predictions of one training
        share them.
    """

    effect: np.ndarray
    cells: CellSet
    sd: np.ndarray | None = None
    refused: np.ndarray | None = None
    embed: Callable[[AnnData], np.ndarray] | None = None
    known_states: dict[tuple, tuple[CellSet, np.ndarray]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Scoring:
    """A prediction beside one half of the truth; what several metrics need is computed once."""

    task: Task
    truth: Truth
    predicted: Prediction

    def each(self, function: Callable[[np.ndarray, np.ndarray], float]) -> np.ndarray:
        """A function of predicted and measured effect on the scored genes, for each row."""
        pairs = zip(self.predicted.effect, self.truth.effect, self.task.scored, strict=True)
        return np.array([function(p[s].astype(float), t[s].astype(float)) for p, t, s in pairs])

    @cached_property
    def noise(self) -> np.ndarray:
        """Sampling variance of the measured effects, shape (n_rows, n_genes)."""
        return self.truth.table.noise(SCALE)

    @cached_property
    def cell_eval(self) -> pd.DataFrame:
        """cell-eval2's values, one row per row of the task, a column per metric."""
        from ._cell_eval import run_cell_eval

        return run_cell_eval(self.task, self.truth, self.predicted.cells)

    @cached_property
    def states(self) -> tuple[np.ndarray, np.ndarray]:
        """States of predicted and of measured cells, shape (n_cells, n_dimensions).

        The method's own states, or principal components where it has none.
        """
        return self._states(self.predicted.cells), self.known_states(self.truth.cells)

    @cached_property
    def shifts(self) -> tuple[np.ndarray, np.ndarray]:
        """Predicted and measured shift of each row's mean state, shape (n_rows, n_dimensions)."""
        task, control = self.task, self.task.controls
        (own, theirs), start = self.states, self.known_states(control)
        rows, contexts = range(len(task.rows)), [c for c, _ in task.rows]
        base = {c: start[control.context == c].mean(0) for c in set(contexts)}
        theirs_base = {
            c: theirs[(self.truth.cells.row < 0) & (self.truth.cells.context == c)].mean(0)
            for c in set(contexts)
        }
        predicted = [own[self.predicted.cells.row == i].mean(0) - base[contexts[i]] for i in rows]
        measured = [theirs[self.truth.cells.row == i].mean(0) - theirs_base[contexts[i]]
                    for i in rows]  # fmt: skip
        return np.stack(predicted), np.stack(measured)

    @cached_property
    def trained_shifts(self) -> np.ndarray:
        """The same of the training rows, in the order of ``task.training.rows``."""
        labels = self.task.train.obs[["context", "perturbation"]].astype(str).agg(tuple, axis=1)
        own = self.predicted.embed is not None
        states = self.known_states(self.task.trained) if own else self.task.trained_components
        means = pd.DataFrame(states).groupby(labels.to_numpy()).mean()
        return np.stack([
            means.loc[[(c, str(p))]].to_numpy()[0] - means.loc[[(c, "control")]].to_numpy()[0]
            for c, p in self.task.training.rows
        ])  # fmt: skip

    def known_states(self, cells: CellSet) -> np.ndarray:
        """States of cells of the task, which are the same for all that one training predicts."""
        known, key = self.predicted.known_states, (self.predicted.embed, id(self.task), id(cells))
        if key not in known:
            known[key] = cells, self._states(cells)  # the cells too, or their id could be another's
        return known[key][1]

    def _states(self, cells: CellSet) -> np.ndarray:
        if self.predicted.embed is None:
            return self.task.pca.transform(cells.log1p)
        return np.asarray(self.predicted.embed(cells.to_anndata(self.task.genes)), float)

    @cached_property
    def enrichment(self) -> tuple[pd.DataFrame, pd.DataFrame] | None:
        """Gene-set scores of predicted and measured effects; None without gene sets."""
        return _enrichment(self)

    def cells_of(self, row: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Predicted and measured cells of a row, log1p counts per 10,000."""
        return tuple(s.log1p[np.flatnonzero(s.row == row)]
                     for s in (self.predicted.cells, self.truth.cells))  # fmt: skip


def _enrichment(scoring: Scoring) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Gene-set scores of predicted and measured effects, rows × sets: decoupler's ULM."""
    sets = scoring.task.gene_sets
    if sets is None:
        return None
    tables = []
    for effect in (scoring.predicted.effect, scoring.truth.effect):
        # The targeted gene is no evidence for its sets.
        values = np.where(scoring.task.scored, effect, 0)
        labels = [str(i) for i in range(len(values))]
        found = gene_set_scores(pd.DataFrame(values, labels, scoring.task.genes), sets, MIN_SET)
        if found is None:
            return None
        tables.append(found[0])
    return tables[0], tables[1]
