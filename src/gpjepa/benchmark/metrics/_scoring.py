"""A prediction beside one half of the truth, and what several metrics need of the pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa.benchmark.methods._predict import Prediction
from gpjepa.benchmark.tasks import CellSet, Task, Truth
from gpjepa.effects import gene_set_scores

MIN_SET = 5  # measured genes that a gene set must have
Need = Literal["counts", "sd", "controls", "embed", "countable states", "gene_sets", "cell_types"]


@dataclass(frozen=True)
class Scoring:
    """A prediction beside one half of the truth; what several metrics need is computed once."""

    task: Task
    truth: Truth
    predicted: Prediction

    def has(self, need: Need) -> bool:
        """Whether the prediction, or the data, have what a metric needs."""
        predicted = self.predicted
        if need == "sd":
            return predicted.sd is not None
        if need == "controls":
            return self.task.training.has_controls
        if need == "embed":
            return predicted.embed is not None
        if need == "gene_sets":
            return self.task.gene_sets is not None
        if need == "cell_types":
            return self.truth.cells.cell_type is not None
        # Only now: cells that no metric needs are not drawn. A method's own states are of counts.
        if need == "countable states" and predicted.embed is None:
            return True
        return predicted.cells.counts is not None

    def each(self, function: Callable[[np.ndarray, np.ndarray], float]) -> np.ndarray:
        """A function of predicted and measured effect on the scored genes, for each row."""
        pairs = zip(self.predicted.effect, self.truth.effect, self.task.scored, strict=True)
        return np.array([function(p[s].astype(float), t[s].astype(float)) for p, t, s in pairs])

    @cached_property
    def noise(self) -> np.ndarray:
        """Sampling variance of the measured effects, shape (n_rows, n_genes)."""
        return self.truth.table.noise(self.task.scale)

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
        (own, theirs), start = self.states, self.known_states(self.task.controls)
        controls, measured = self.task.controls, self.truth.cells
        predicted, found = [], []
        for i, (context, _) in enumerate(self.task.rows):
            theirs_start = theirs[(measured.row < 0) & (measured.context == context)].mean(0)
            found.append(theirs[measured.row == i].mean(0) - theirs_start)
            own_start = start[controls.context == context].mean(0)
            predicted.append(own[self.predicted.cells.row == i].mean(0) - own_start)
        return np.stack(predicted), np.stack(found)

    @cached_property
    def trained_shifts(self) -> np.ndarray:
        """The same of the training rows, in the order of ``task.training.rows``."""
        labels = self.task.train.obs[["context", "perturbation"]].astype(str).agg(tuple, axis=1)
        own = self.predicted.embed is not None
        states = self.known_states(self.task.trained) if own else self.task.trained_components
        means = pd.DataFrame(states).groupby(labels.to_numpy()).mean()
        return np.stack(
            [
                means.loc[[(c, str(p))]].to_numpy()[0] - means.loc[[(c, "control")]].to_numpy()[0]
                for c, p in self.task.training.rows
            ]
        )

    def known_states(self, cells: CellSet) -> np.ndarray:
        """States of cells of the task, which are the same for all that one training predicts."""
        known, key = self.predicted.known_states, (self.predicted.embed, id(self.task), id(cells))
        if key not in known:
            known[key] = cells, self._states(cells)  # the cells too, or their id could be another's
        return known[key][1]

    def _states(self, cells: CellSet) -> np.ndarray:
        if self.predicted.embed is None:
            return self.task.components(cells.log1p, self.task.targeted)
        blank = cells.without(self.task.targeted).to_anndata(self.task.genes)
        return np.asarray(self.predicted.embed(blank), float)

    @cached_property
    def enrichment(self) -> tuple[pd.DataFrame, pd.DataFrame] | None:
        """Gene-set scores of predicted and measured effects, rows × sets: decoupler's ULM.

        None where no set has enough measured genes.
        """
        tables = []
        for effect in (self.predicted.effect, self.truth.effect):
            # The targeted gene is no evidence for its sets.
            values = np.where(self.task.scored, effect, 0)
            frame = pd.DataFrame(values, [str(i) for i in range(len(values))], self.task.genes)
            found = gene_set_scores(frame, self.task.gene_sets or {}, MIN_SET)
            if found is None:
                return None
            tables.append(found[0])
        return tables[0], tables[1]

    def cells_of(self, row: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Predicted and measured cells of a row, log1p counts per 10,000."""
        predicted, measured = (
            s.log1p[np.flatnonzero(s.row == row)] for s in (self.predicted.cells, self.truth.cells)
        )
        return predicted, measured
