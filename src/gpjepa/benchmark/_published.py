"""Our numbers beside published ones: their splits, their metrics, their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from gpjepa.perturbations import Perturbation
from gpjepa.splits import Row, Split

from .metrics import N_HIGHEST, correlation
from .tasks import SCALE, Task

KIND = "published"
NORMAN_DOUBLES = Path(__file__).parent / "presets" / "ahlmann-eltze-2025-norman-doubles.csv"
"""Doubles of Norman 2019, source data of Ahlmann-Eltze, Huber and Anders 2025 (MIT licence)."""
SCORES = {"published_l2": "l2", "published_pearson": "pearson_delta"}
"""Columns of our scores, and those of a published table."""
_read = Perturbation.parse


def read_published(path: Path) -> pd.DataFrame:
    """A published table, one row per seed × method × perturbation.

    Parameters
    ----------
    path
        CSV with columns ``seed``, ``method``, ``perturbation``, ``l2``, ``pearson_delta``.

    Raises
    ------
    ValueError
        If a column is missing.
    """
    table = pd.read_csv(path)
    missing = {"seed", "method", "perturbation", *SCORES.values()} - set(table)
    if missing:
        raise ValueError(f"{path} has no columns {sorted(missing)}; it has {list(table.columns)}.")
    # "A+ctrl" is the target A alone.
    names = table["perturbation"].str.removesuffix("+ctrl")
    return table.assign(perturbation=[str(_read(p)) for p in names])


def published_splits(path: Path, rows: Sequence[Row]) -> list[Split]:
    """The split of every seed: what the table holds is held out, all else is trained on.

    Raises
    ------
    ValueError
        If a perturbation of the table is not among the rows.
    """
    table, found = read_published(path), []
    absent = sorted(set(table["perturbation"]) - {str(p) for _, p in rows})
    if absent:
        raise ValueError(
            f"{len(absent)} perturbations of {path.name} are not in the data, such as "
            f"{', '.join(absent[:5])}: its splits are for the whole data set, under its own names."
        )
    for seed, part in table.groupby("seed"):
        held = set(part["perturbation"])
        test = tuple(r for r in rows if str(r[1]) in held)
        train = tuple(r for r in rows if str(r[1]) not in held)
        found.append(Split(f"{KIND}-seed-{seed}", KIND, train, test, int(str(seed))))
    return found


def published_means(family: str) -> pd.Series | None:
    """Mean L2 and Pearson delta of a method on all of Norman's doubles; None if not published."""
    table = pd.read_csv(NORMAN_DOUBLES)
    mine = table[table["method"] == family.lower()]
    return mine[list(SCORES.values())].mean() if len(mine) else None


def published_scores(task: Task, effect: np.ndarray) -> pd.DataFrame:
    """L2 and Pearson delta as Ahlmann-Eltze, Huber and Anders 2025 define them, for each row.

    Of mean profiles on the 1,000 genes highest in the control, the targeted ones among them; what
    was measured is the mean of all held-out cells.

    Parameters
    ----------
    task
        The task.
    effect
        Predicted mean effects, shape (n_rows, n_genes).

    Returns
    -------
    pandas.DataFrame
        Columns as the keys of ``SCORES``.
    """
    halves = [t.table for t in task.truths]
    control = [np.stack([t.control[SCALE][c] for c, _ in t.rows]) for t in halves]
    profiles = np.stack([t.effect[SCALE] + c for t, c in zip(halves, control, strict=True)])
    n = np.stack([t.n_cells for t in halves]).astype(float)
    measured = np.einsum("hr,hrg->rg", n / n.sum(0), profiles)
    top = np.argsort(-task.control_profiles, axis=1, kind="stable")[:, :N_HIGHEST]
    shift = np.take_along_axis(measured - task.control_profiles, top, 1)
    predicted = np.take_along_axis(effect.astype(float), top, 1)
    l2 = np.sqrt(((predicted - shift) ** 2).sum(1))
    pearson = [correlation(p, s) for p, s in zip(predicted, shift, strict=True)]
    return pd.DataFrame(dict(zip(SCORES, (l2, pearson), strict=True)))


def beside_published(scores: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Means of published methods and of ours over the same seeds and perturbations.

    Parameters
    ----------
    scores
        Scores of one data set on the splits of :func:`published_splits`.
    path
        The published table.

    Returns
    -------
    pandas.DataFrame
        One row per method, best first: ``method``, ``published``, ``l2``, ``pearson_delta``,
        ``n_rows``.
    """
    columns = ["method", "published", *SCORES.values(), "n_rows"]
    if not set(SCORES) <= set(scores):
        return pd.DataFrame(columns=columns)  # nothing could be run on these splits
    mine = scores[scores["kind"] == KIND].rename(columns=SCORES)
    # A method's own seed is another thing than that of the split.
    mine = mine.assign(seed=mine["split"].str.rsplit("-", n=1).str[-1].astype(int))
    key, values = ["seed", "perturbation"], list(SCORES.values())
    ours = mine.groupby(["method", *key])[values].mean().reset_index()
    theirs = read_published(path).merge(ours[key].drop_duplicates(), on=key)
    both = pd.concat([ours.assign(published=False), theirs.assign(published=True)])
    table = both.groupby(["method", "published"])[values].mean()
    table["n_rows"] = both.groupby(["method", "published"]).size()
    return table.reset_index().sort_values("l2", ignore_index=True)
