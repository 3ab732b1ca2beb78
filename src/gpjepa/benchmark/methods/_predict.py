"""From what a method returns to what is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa.benchmark.tasks import CellSet, Task, calibrated
from gpjepa.effects import PER

from ._protocol import Method


@dataclass(frozen=True)
class Prediction:
    """What a method predicts for the rows of a task.

    Attributes
    ----------
    effect
        Mean effects, scale ``mean_log1p``, against the training control, shape (n_rows, n_genes).
    drawn
        Predicted cells of the rows, or what makes them: metrics of mean effects need none.
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
    drawn: CellSet | Callable[[], CellSet]
    sd: np.ndarray | None = None
    refused: np.ndarray | None = None
    embed: Callable[[ad.AnnData], np.ndarray] | None = None
    known_states: dict[tuple, tuple[CellSet, np.ndarray]] = field(default_factory=dict, repr=False)

    @cached_property
    def cells(self) -> CellSet:
        """Predicted cells of the rows."""
        return self.drawn() if callable(self.drawn) else self.drawn


MAX_CELLS = 500
"""Cells of a row that are scored at most: more of them would have less noise in what is estimated."""
HIGHEST = 2 * np.log1p(PER)
"""A value on the log1p scale is at most half of this; a sum of effects may say more."""


def predict_rows(method: Method, task: Task, name: str) -> dict[str, Prediction]:
    """Ask a fitted method for all rows of a task.

    Returns
    -------
    dict
        A prediction per name: ``name``, or ``name`` and what the method calls it.

    Raises
    ------
    ValueError
        If what it returns is not what :class:`Method` asks for.
    """
    answers: dict[str, dict[str, ad.AnnData]] = {}
    for context in sorted({c for c, _ in task.rows}):
        control = task.control[(task.control.obs["context"] == context).to_numpy()].copy()
        wanted = [str(p) for c, p in task.rows if c == context]
        found = method.predict(wanted, control)
        for variant, cells in (found if isinstance(found, dict) else {"": found}).items():
            label = f"{name} ({variant})" if variant else name
            answers.setdefault(label, {})[context] = _checked(cells, wanted, task, label)
    embed = getattr(method, "embed", None)
    shared: dict[tuple, tuple[CellSet, np.ndarray]] = {}
    return {
        label: replace(_assembled(task, parts), embed=embed, known_states=shared)
        for label, parts in answers.items()
    }


def mean_prediction(task: Task) -> Prediction:
    """The mean response for every row: what a row is scored as that a method did not predict."""
    parts = [partial(_moved, task, task.mean_response[i], i) for i in range(len(task.rows))]
    refused = np.ones(len(task.rows), bool)
    return Prediction(task.mean_response, partial(_together, parts), refused=refused)


def _together(parts: Sequence[Callable[[], CellSet]]) -> CellSet:
    return CellSet.stacked([make() for make in parts])


def _checked(cells: ad.AnnData, wanted: Sequence[str], task: Task, name: str) -> ad.AnnData:
    genes = task.genes
    if not isinstance(cells, ad.AnnData):
        raise ValueError(f"{name} returned {type(cells).__name__}, not an AnnData.")
    scale = cells.uns.get("scale")
    known = ("counts", "log1p") if task.has_cells else ("effect",)
    if scale not in known:
        raise ValueError(f"{name}: uns['scale'] is {scale!r}; say {' or '.join(map(repr, known))}.")
    if "perturbation" not in cells.obs:
        raise ValueError(f"{name}: its AnnData has no obs['perturbation'].")
    given = cells.obs["perturbation"].astype(str)
    if not set(wanted) & set(given):
        raise ValueError(f"{name} predicts none of {wanted}.")
    if not cells.var_names.is_unique or set(genes) - set(cells.var_names):
        absent = sorted(set(genes) - set(cells.var_names))
        raise ValueError(f"{name}: its genes repeat or lack {len(absent)}, such as {absent[:3]}.")
    cells = cells[given.isin(wanted).to_numpy(), genes].copy()
    values = cells.X.data if sp.issparse(cells.X) else np.asarray(cells.X)
    if not np.isfinite(values).all() or (scale != "effect" and (values < 0).any()):
        raise ValueError(f"{name} predicts values that are negative or not finite.")
    if scale == "log1p" and values.size and values.max() > HIGHEST:
        raise ValueError(
            f"{name} predicts {values.max():.3g}, but log1p of counts per 10,000 is at most 9.21: "
            "its values are on another scale."
        )
    if scale == "counts" and (np.abs(values - np.rint(values)) > 1e-3).any():
        raise ValueError(f"{name}: uns['scale'] is 'counts', but its values are not integers.")
    if "library_size" in cells.obs and not (cells.obs["library_size"].to_numpy(float) > 0).all():
        raise ValueError(f"{name}: obs['library_size'] holds values that are not positive.")
    for key in ("effect", "effect_sd"):
        if key in cells.uns:
            _check_stated(cells.uns[key], set(cells.obs["perturbation"]), genes, f"{name}: {key}")
    return cells


def _check_stated(frame: pd.DataFrame, predicted: set[str], genes: np.ndarray, what: str) -> None:
    """Refuse effects that are not those of every predicted row and gene."""
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(
            f"{what} is a {type(frame).__name__}; give a frame, perturbations × genes."
        )
    for axis, wanted in ((frame.index, predicted), (frame.columns, set(genes))):
        if not axis.is_unique or wanted - set(axis):
            raise ValueError(
                f"{what}: names repeat, or some are missing: {sorted(wanted - set(axis))[:3]}."
            )
    if not np.isfinite(frame.loc[sorted(predicted), genes].to_numpy(float)).all():
        raise ValueError(f"{what} holds values that are not finite.")


def _assembled(task: Task, parts: Mapping[str, ad.AnnData]) -> Prediction:
    effects, sds, refused = [], [], []
    sets: list[Callable[[], CellSet]] = []
    for i, (context, perturbation) in enumerate(task.rows):
        part, label = parts[context], str(perturbation)
        mine = part[(part.obs["perturbation"].astype(str) == label).to_numpy()]
        refused.append(mine.n_obs == 0)
        stated, sd = (_stated(part.uns.get(k), label, task) for k in ("effect", "effect_sd"))
        cells: Callable[[], CellSet]
        if refused[-1]:
            effect = task.mean_response[i]
            cells = partial(_moved, task, effect, i)
            sd = None if sd is None else np.full(len(task.genes), np.nan)
        else:
            effect, cells = _row(task, mine, stated, i)
        effects.append(effect)
        sets.append(cells)
        sds.append(sd)
    known = [s for s in sds if s is not None]
    return Prediction(
        np.stack(effects),
        partial(_together, sets),
        np.stack(known) if len(known) == len(sds) else None,
        np.array(refused),
    )


def _stated(frame: pd.DataFrame | None, label: str, task: Task) -> np.ndarray | None:
    """What a method states of a row; NaN for a row that it left out."""
    if frame is None:
        return None
    return frame.reindex(index=[label], columns=task.genes).to_numpy(float)[0]


def _row(
    task: Task, mine: ad.AnnData, stated: np.ndarray | None, row: int
) -> tuple[np.ndarray, Callable[[], CellSet]]:
    """Mean effect of one row, and what makes its cells: cells with counts have the effect that is stated."""
    if mine.uns["scale"] == "effect":
        effect = np.asarray(mine.X, float).mean(0) if stated is None else stated
        return effect, lambda: task.truths[0].cells
    control = task.control_profiles[row]
    few = np.sort(np.random.default_rng(0).permutation(mine.n_obs)[:MAX_CELLS])
    if mine.uns["scale"] == "counts":
        mine = mine[few].copy() if stated is not None else mine
        cells = _cells(mine, _library(task, mine, row), row, task.rows[row][0], "counts")
        if stated is not None:
            return stated, partial(calibrated, cells, control + stated)
        return np.asarray(cells.log1p.mean(0)).ravel() - control, lambda: cells.take(few)
    values = sp.csr_matrix(mine.X, dtype=np.float32)
    own = np.asarray(values.mean(0), float).ravel() - control
    effect = own if stated is None else stated
    if mine.n_obs == 1:
        return effect, partial(_moved, task, effect, row)
    # Cells on the log1p scale are scored as they are: drawing counts anew would blur them.
    cells = _cells(mine, np.full(mine.n_obs, np.nan), row, task.rows[row][0], "values")
    return effect, lambda: cells.take(few)


def _library(task: Task, mine: ad.AnnData, row: int) -> np.ndarray:
    """Counts of the whole predicted cells."""
    if "library_size" in mine.obs:
        library = mine.obs["library_size"].to_numpy(float)
    else:
        # A panel holds a part of a cell's counts: the same part as in the control cells.
        base = task.controls.take(task.controls.context == task.rows[row][0])
        assert base.counts is not None
        library = np.asarray(mine.X.sum(1)).ravel() * base.library.sum() / base.counts.sum()
    # A cell without counts has no rates; its expression is 0 whatever it is divided by.
    return np.maximum(library, 1)


def _moved(task: Task, effect: np.ndarray, row: int) -> CellSet:
    """Control cells of the row's context with a mean effect."""
    base = task.controls.take(task.controls.context == task.rows[row][0])
    few = np.random.default_rng(0).permutation(len(base.row))[:MAX_CELLS]
    base = base.take(np.sort(few))
    moved = calibrated(base, task.control_profiles[row] + effect)
    return replace(moved, row=np.full(len(base.row), row))


def _cells(mine: ad.AnnData, library: np.ndarray, row: int, context: str, kind: str) -> CellSet:
    matrix = sp.csr_matrix(mine.X, dtype=np.float32)
    n = mine.n_obs
    return CellSet(
        matrix if kind == "counts" else None,
        library,
        np.full(n, row),
        np.full(n, context, dtype=object).astype(str),
        values=matrix if kind == "values" else None,
    )
