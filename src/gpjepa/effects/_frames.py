"""Effect tables of effects that somebody else has measured, or of values that are no counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa.perturbations import Perturbation
from gpjepa.splits import MIN_UNITS

from ._parts import Parts
from ._table import EffectTable

_FOLDS = 5
_LEAST = 1e-3  # share of the mean square that a variance never falls below
_SHOWN = 10.0  # differences between replicates that a gene's variance needs to stand on its own


def table_of_frame(
    values: pd.DataFrame,
    perturbation: Sequence[str | Perturbation],
    context: Sequence[str] | None,
    control: str | Sequence[str],
    sd: pd.DataFrame | np.ndarray | None,
    n: Sequence[float] | np.ndarray | None,
    batch: Sequence[str] | None,
    control_profiles: Mapping[str, np.ndarray] | None,
    unit: str,
) -> EffectTable:
    """As :meth:`gpjepa.effects.EffectTable.from_frame` says."""
    x = values.to_numpy(float)
    size = np.ones(len(x)) if n is None else np.asarray(n, float)
    errors = None if sd is None else np.asarray(sd, float)
    labels = {"perturbation": perturbation, "context": context, "batch": batch}
    _check(values, labels, size, errors)
    named = {control} if isinstance(control, str) else set(control)
    read = [_read(p, named) for p in perturbation]
    contexts = ["all"] * len(read) if context is None else [str(c) for c in context]
    batches = [""] * len(read) if batch is None else [str(b) for b in batch]
    profiles = any(p.is_control for p in read)
    if control != "control" and not profiles:
        raise ValueError(
            f"No row is labelled {' or '.join(map(repr, sorted(named)))}, as control= says; leave it "
            "out if the values are effects."
        )
    if profiles and control_profiles is not None:
        raise ValueError("There are control rows among the values: leave control_profiles out.")
    if batch is not None and not profiles:
        raise ValueError(
            f"No row is a control ({' or '.join(map(repr, sorted(named)))}), so that nothing can be "
            "compared within batches: name the label of the control rows with control=, or leave "
            "batch out if the values are effects."
        )
    groups, total, mean, variance = _averaged(
        x, list(zip(contexts, read, batches, strict=True)), size, errors
    )
    genes = np.asarray(values.columns.astype(str), dtype=object)
    if not profiles:
        return _of_effects(genes, groups, total, mean, variance, control_profiles, unit)
    lacking = sorted(set(contexts) - {c for c, p, _ in groups if p.is_control})
    if lacking:
        raise ValueError(f"No control rows in context {', '.join(map(repr, lacking))}.")
    return Parts(groups, total, {unit: mean}, {unit: variance}).table(genes)


def _read(label: str | Perturbation, control: set[str]) -> Perturbation:
    if isinstance(label, Perturbation):
        return label
    return Perturbation() if str(label) in control else Perturbation.parse(str(label))


def _check(
    values: pd.DataFrame,
    labels: dict[str, Sequence | None],
    size: np.ndarray,
    sd: np.ndarray | None,
) -> None:
    for name, column in {**labels, "n": size}.items():
        if column is None:
            continue
        if len(column) != len(values):
            raise ValueError(
                f"{name} has {len(column)} entries; the values have {len(values)} rows."
            )
        if lost := sum(not isinstance(x, Perturbation) and pd.isna(x) for x in column):
            raise ValueError(f"{lost} rows have no {name}; label or remove them.")
    if not values.columns.is_unique:
        repeats = sorted(set(values.columns[values.columns.duplicated()].astype(str)))[:3]
        raise ValueError(f"Genes occur more than once, such as {repeats}.")
    if not np.isfinite(values.to_numpy(float)).all():
        raise ValueError("The values hold NaN or infinite entries; fill them or drop the genes.")
    if sd is not None and sd.shape != values.shape:
        raise ValueError(f"sd is of shape {sd.shape}; the values are of shape {values.shape}.")
    if sd is not None and not (sd > 0).all():
        raise ValueError(
            f"sd must be positive; {int((~(sd > 0)).sum())} of its values are not. Leave it out to "
            "have the noise estimated."
        )
    if not (size > 0).all():
        raise ValueError("n must be positive.")


_Keys = list[tuple[str, Perturbation, str]]


def _averaged(
    x: np.ndarray, keys: _Keys, size: np.ndarray, errors: np.ndarray | None
) -> tuple[_Keys, np.ndarray, np.ndarray, np.ndarray]:
    """Replicates put together: keys, what lies behind each, means and their variances."""
    groups = sorted(set(keys))
    at = {key: i for i, key in enumerate(groups)}
    code = np.array([at[key] for key in keys], int)
    total = np.bincount(code, size)
    at_row = code, np.arange(len(keys))
    share = sp.csr_matrix((size / total[code], at_row), shape=(len(groups), len(keys)))
    mean = share @ x
    shown = np.zeros_like(mean)
    if len(groups) < len(keys):
        shown = _between_replicates(x - mean[code], size, code) / total[:, None]
    elif errors is None:
        # The same of all rows, and less of those that more lies behind.
        shown = _out_of_fold(mean, [c for c, *_ in groups]) * (np.median(total) / total)[:, None]
    stated = np.zeros_like(mean) if errors is None else share.power(2) @ errors**2
    least = _LEAST * max((x**2).mean(), 1e-12) / total[:, None]
    return (
        groups,
        total,
        mean,
        np.maximum(np.maximum(stated, shown), least if errors is None else 0),
    )


def _of_effects(
    genes: np.ndarray,
    groups: _Keys,
    size: np.ndarray,
    effect: np.ndarray,
    variance: np.ndarray,
    control: Mapping[str, np.ndarray] | None,
    unit: str,
) -> EffectTable:
    """A table of what are differences already."""
    contexts = sorted({c for c, *_ in groups})
    if control is not None and (missing := [c for c in contexts if c not in control]):
        raise ValueError(f"control_profiles has no profile of {missing}.")
    # Contexts of which only the controls are known can be predicted too.
    contexts = sorted({*contexts, *map(str, control or ())})
    # Without names of cells, a table is known by its values.
    values = effect[:, np.argsort(genes.astype(str), kind="stable")].astype(np.float32)
    hashes = pd.util.hash_array(np.array([v.tobytes().hex() for v in values], dtype=object))
    nothing = np.zeros(len(genes), np.float32)
    known = {c: np.asarray(control[c], np.float32) if control else nothing for c in contexts}
    return EffectTable(
        genes,
        tuple((c, p) for c, p, _ in groups),
        size,
        {unit: effect.astype(np.float32)},
        {unit: variance.astype(np.float32)},
        {unit: known},
        {unit: dict.fromkeys(contexts, nothing)},
        has_controls=control is not None,
        cells=hashes,
        cell_rows=np.arange(len(groups)),
    )


def _between_replicates(apart: np.ndarray, size: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Variance of a single replicate, pooled over all groups, shape (n_genes,)."""
    freedom = len(code) - len(np.unique(code))
    own = (size[:, None] * apart**2).sum(0) / freedom
    return (freedom * own + _SHOWN * own.mean()) / (freedom + _SHOWN)


def _out_of_fold(values: np.ndarray, contexts: Sequence[str]) -> np.ndarray:
    """Variance of what other rows and other genes do not predict of a gene, shape (n_genes,).

    Rows and genes are left out together (bi-cross-validation, Owen and Perry 2009), and the block
    that both leave out is predicted by ridge regression. What is left is noise, and what is special
    to a gene: an upper bound, never 0.
    """
    centred = values.astype(float).copy()
    for context in set(contexts):
        mine = np.array([c == context for c in contexts])
        centred[mine] -= centred[mine].mean(0)
    least = _LEAST * max((values**2).mean(), 1e-12)
    if len(values) < MIN_UNITS:
        return np.maximum((values**2).mean(0), least)
    rng = np.random.default_rng(0)
    rows, genes = (rng.permutation(n) % _FOLDS for n in values.shape)
    error = np.zeros(values.shape[1])
    for i in range(_FOLDS):
        for j in range(_FOLDS):
            there, here = rows != i, rows == i
            x, y = centred[there][:, genes != j], centred[there][:, genes == j]
            kernel = x @ x.T
            kernel[np.diag_indices_from(kernel)] += np.trace(kernel) / len(kernel)
            predicted = centred[here][:, genes != j] @ x.T @ np.linalg.solve(kernel, y)
            error[genes == j] += ((centred[here][:, genes == j] - predicted) ** 2).sum(0)
    return np.maximum(error / len(values), least)
