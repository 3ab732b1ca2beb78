"""From what a method returns to what is scored, and controls that see the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from ._methods import METHODS, Method
from ._scoring import Prediction
from ._tasks import CellSet, Task, moved


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
            answers.setdefault(label, {})[context] = _checked(cells, wanted, task.genes, label)
    embed = getattr(method, "embed", None)
    shared: dict[tuple, tuple[CellSet, np.ndarray]] = {}
    return {
        label: replace(_assemble(task, parts), embed=embed, known_states=shared)
        for label, parts in answers.items()
    }


def _checked(cells: ad.AnnData, wanted: Sequence[str], genes: np.ndarray, name: str) -> ad.AnnData:
    if not isinstance(cells, ad.AnnData):
        raise ValueError(f"{name} returned {type(cells).__name__}, not an AnnData.")
    scale = cells.uns.get("scale")
    if scale not in ("counts", "log1p"):
        raise ValueError(f"{name}: uns['scale'] is {scale!r}; say 'counts' or 'log1p'.")
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
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"{name} predicts values that are negative or not finite.")
    return cells


def _assemble(task: Task, parts: Mapping[str, ad.AnnData]) -> Prediction:
    effects, sets, sds, refused = [], [], [], []
    for i, (context, perturbation) in enumerate(task.rows):
        part = parts[context]
        label = str(perturbation)
        mine = part[(part.obs["perturbation"].astype(str) == label).to_numpy()]
        control = task.control_profiles[i]
        refused.append(mine.n_obs == 0)
        sd = part.uns.get("effect_sd")
        if refused[-1]:
            effects.append(task.mean_response[i])
            sets.append(_moved_row(task, control + task.mean_response[i], control, context, i))
            sds.append(None if sd is None else np.full(len(task.genes), np.nan))
            continue
        cells, profile = _one_row(task, mine, control, context, i)
        stated = part.uns.get("effect")
        effects.append(_of(stated, label, task.genes) if stated is not None else profile - control)
        sets.append(cells)
        sds.append(None if sd is None else _of(sd, label, task.genes))
    return Prediction(
        np.stack(effects),
        CellSet(
            sp.csr_matrix(sp.vstack([c.counts for c in sets])),
            np.concatenate([c.library for c in sets]), np.concatenate([c.row for c in sets]),
            np.concatenate([c.context for c in sets]),
        ),
        None if any(s is None for s in sds) else np.stack([s for s in sds if s is not None]),
        np.array(refused),
    )  # fmt: skip


def _of(frame: pd.DataFrame, label: str, genes: np.ndarray) -> np.ndarray:
    return frame.loc[label, genes].to_numpy(float)


def _one_row(
    task: Task, mine: ad.AnnData, control: np.ndarray, context: str, row: int
) -> tuple[CellSet, np.ndarray]:
    """Cells and mean profile that a method predicts for one row."""
    if mine.uns["scale"] == "counts":
        counts = sp.csr_matrix(mine.X).astype(np.float32)
        library = np.asarray(counts.sum(1)).ravel()
        if "library_size" in mine.obs:
            library = mine.obs["library_size"].to_numpy(float)
        # A cell without counts has no rates; its expression is 0 whatever it is divided by.
        cells = _cells(counts, np.maximum(library, 1), row, context)
        return cells, np.asarray(cells.log1p.mean(0)).ravel()
    values = mine.X.toarray() if sp.issparse(mine.X) else np.asarray(mine.X, float)
    if mine.n_obs == 1:
        return _moved_row(task, values[0], control, context, row), values[0]
    library = task.controls.of(context).library
    library = library[np.arange(mine.n_obs) % len(library)]
    rates = np.expm1(np.asarray(values, float)) * library[:, None] / 1e4
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(rates).astype(np.float32))
    return _cells(counts, library, row, context), values.mean(0)


def _moved_row(
    task: Task, profile: np.ndarray, control: np.ndarray, context: str, row: int
) -> CellSet:
    base = task.controls.of(context)
    # The same stream for every row: what is predicted to be equal stays equal.
    counts = moved(base, control, profile, np.random.default_rng(0))
    return _cells(counts, base.library, row, context)


def _cells(counts: sp.csr_matrix, library: np.ndarray, row: int, context: str) -> CellSet:
    n = counts.shape[0]
    return CellSet(counts, library, np.full(n, row), np.full(n, context, dtype=object).astype(str))


def oracle(name: str, task: Task, half: int) -> Prediction:
    """A positive control for one half of the truth.

    ``replicate`` is the other half; ``truth`` this half; ``interpolated duplicate`` the effects
    halfway between the mean response and the replicate, and cells of each (Mejia et al. 2025).
    """
    truth = task.truths[half if name == "truth" else 1 - half]
    keep = np.flatnonzero(truth.cells.row >= 0)
    cells = CellSet(
        *(getattr(truth.cells, f)[keep] for f in ("counts", "library", "row", "context"))
    )
    if name != "interpolated duplicate":
        return Prediction(truth.effect.astype(float), cells)
    baseline = METHODS["mean"]([], 0, {})
    baseline.fit(task.train, task.split)
    mean = predict_rows(baseline, task, "mean")["mean"]
    parts = [_every_other(c, i) for i, c in enumerate((cells, mean.cells))]
    joined = CellSet(
        sp.csr_matrix(sp.vstack([c.counts for c in parts])),
        *(np.concatenate([getattr(c, f) for c in parts]) for f in ("library", "row", "context")),
    )
    return Prediction((truth.effect + mean.effect) / 2, joined)


def _every_other(cells: CellSet, start: int) -> CellSet:
    keep = np.flatnonzero(np.arange(len(cells.row)) % 2 == start)
    return CellSet(*(getattr(cells, f)[keep] for f in ("counts", "library", "row", "context")))
