"""Which perturbation made these cells?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from gpjepa.perturbations import Perturbation

from ._goals import control_profile, mean_and_variance
from ._model import as_model, check_context
from ._rank import check_sizes, listed

NONE = "none of these"
_LEAST_CONTROLS = 20


@dataclass(frozen=True)
class Reversal:
    """What may have made groups of cells.

    Attributes
    ----------
    frame
        One row per group and candidate, best first: ``group, perturbation, rank``, and ``score``, the
        share of the way from the control to the cells that the predicted effect goes.
    groups
        One row per group: ``n_cells``; ``best``; ``pvalue`` that controls are as near to some candidate;
        ``called``, the best, or "none of these" where controls could be as near. What was made by a
        perturbation that is not a candidate is not noticed by this: see how low its score is.
    """

    frame: pd.DataFrame
    groups: pd.DataFrame

    def table(self, group: str | None = None, n: int | None = None) -> pd.DataFrame:
        """Candidates of one group, best first.

        Parameters
        ----------
        group
            Name of the group; optional if there is only one.
        n
            How many; all by default.
        """
        if group is None:
            if len(self.groups) > 1:
                raise ValueError(f"Say which group: {list(self.groups.index)[:10]}.")
            group = str(self.groups.index[0])
        if group not in self.groups.index:
            raise KeyError(f"Unknown group {group!r}; known are {list(self.groups.index)[:10]}.")
        found = self.frame[self.frame["group"] == group].drop(columns="group")
        return found.head(n if n is not None else len(found)).reset_index(drop=True)

    def ranks(self, truth: Mapping[str, str]) -> pd.Series:
        """Rank of the true perturbation of each group, 1 for the best."""
        wanted = self.frame.set_index(["group", "perturbation"])["rank"]
        missing = [f"{g}: {p}" for g, p in truth.items() if (g, p) not in wanted.index]
        if missing:
            raise KeyError(f"Not among groups and candidates: {', '.join(missing[:5])}.")
        return pd.Series({g: int(wanted[g, p]) for g, p in truth.items()}, name="rank")

    def recall(self, truth: Mapping[str, str], k: int = 1) -> float:
        """Share of groups whose true perturbation is among the first k."""
        return float((self.ranks(truth) <= k).mean())

    def ndcg(self, truth: Mapping[str, str]) -> float:
        """Mean of 1 / log2(1 + rank): normalised discounted gain with one right answer each."""
        return float((1 / np.log2(1 + self.ranks(truth))).mean())

    def __repr__(self) -> str:
        return f"Reversal of {len(self.groups)} groups of cells\n{self.groups.head(10).to_string()}"


def reverse(
    model: Any,
    cells: AnnData,
    by: str | None = None,
    candidates: Sequence[str | Perturbation] | None = None,
    *,
    context: str | None = None,
    controls: AnnData | None = None,
    alpha: float = 0.05,
    n_null: int = 200,
    seed: int = 0,
) -> Reversal:
    """Ask which perturbation made some cells.

    Candidates are ranked by the squared distance of their predicted effect from the difference of the
    cells and the model's controls. The answer is "none of these" where as many control cells are as
    near to some candidate in more than a share ``alpha`` of samples.

    Parameters
    ----------
    model
        As in :func:`rank`.
    cells
        Cells with raw counts, laid out as the training data.
    by
        Column of ``obs`` with groups of cells, each asked about by itself; by default all are one.
    candidates
        Perturbations; by default what was measured in the context.
    context
        Context of the effects; optional if the model has only one.
    controls
        Control cells of the context, that "none of these" is calibrated on. By default those that a
        :class:`gpjepa.GPJEPA` was trained on; without any, ``pvalue`` is missing and the best is called.
    alpha
        Share of groups of control cells that may be called anything else.
    n_null
        Number of samples of control cells.
    seed
        Random seed of these samples.

    Returns
    -------
    Reversal
    """
    check_sizes(n_null=n_null)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha}: expected a number between 0 and 1.")
    plain, model = model, as_model(model)
    context = check_context(model, context)
    control = control_profile(model, context)
    named = model.parse(
        model.measured(context) if candidates is None else listed(candidates, "candidates")
    )
    effects = np.asarray(model.predict(list(named), context).mean, float)
    groups = _groups(cells, by)
    rates = model.log1p_counts(cells)
    if controls is None and hasattr(plain, "control_cells") and plain.adata is not None:
        controls = _in_context(plain, plain.control_cells(), context)
    null = None if controls is None else model.log1p_counts(controls)
    names = np.array(list(named.values()), dtype=object)
    frames, rows = [], []
    for name, at in groups.items():
        mean, noise = mean_and_variance(rates[at])
        apart = mean - control
        gain = 2 * effects @ apart - (effects**2).sum(1)
        size = (apart**2).sum() - noise.sum()
        size = size if size > 0 else np.nan  # all of it could be noise
        order = np.argsort(-gain, kind="stable")
        labels = list(names[order])
        ranks = np.arange(1, len(order) + 1)
        frames.append(
            pd.DataFrame(
                {"group": name, "perturbation": labels, "rank": ranks, "score": gain[order] / size}
            )
        )
        pvalue = (
            np.nan if null is None else _pvalue(gain.max(), null, len(at), effects, n_null, seed)
        )
        called = NONE if pvalue > alpha else labels[0]
        rows.append((name, len(at), labels[0], pvalue, called))
    columns = ["group", "n_cells", "best", "pvalue", "called"]
    return Reversal(
        pd.concat(frames, ignore_index=True), pd.DataFrame(rows, columns=columns).set_index("group")
    )


def _groups(cells: AnnData, by: str | None) -> dict[str, np.ndarray]:
    if by is None:
        return {"cells": np.arange(cells.n_obs)}
    if by not in cells.obs:
        raise ValueError(f"obs has no column {by!r}; it has {list(cells.obs.columns)}.")
    column = cells.obs[by]
    labels, labelled = column.astype(str).to_numpy(), column.notna().to_numpy()
    return {
        name: np.flatnonzero(labelled & (labels == name)) for name in sorted({*labels[labelled]})
    }


def _pvalue(
    gain: float, null: sp.csr_matrix, n: int, effects: np.ndarray, n_null: int, seed: int
) -> float:
    """How often as many control cells (half of them at most), against the others, gain as much."""
    total, every = np.asarray(null.sum(0)).ravel().astype(float), null.shape[0]
    if every < _LEAST_CONTROLS:
        raise ValueError(
            f"{every} control cells are too few to calibrate an answer; give {_LEAST_CONTROLS} or more."
        )
    n = min(n, every // 2)
    rng = np.random.default_rng([seed, n])
    reached = 0
    for _ in range(n_null):
        mine = np.asarray(null[rng.choice(every, n, replace=False)].sum(0)).ravel()
        apart = mine / n - (total - mine) / (every - n)
        reached += bool((2 * effects @ apart - (effects**2).sum(1)).max() >= gain)
    return (1 + reached) / (1 + n_null)


def _in_context(model: Any, controls: AnnData, context: str) -> AnnData:
    """Of the control cells of a GPJEPA, those of one context."""
    key = model.registry_["setup_args"]["context_key"]
    return (
        controls if key is None else controls[(controls.obs[key].astype(str) == context).to_numpy()]
    )
