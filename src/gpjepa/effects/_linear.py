"""The linear model of Ahlmann-Eltze, Huber and Anders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gpjepa.perturbations import Perturbation

from ._baselines import Baseline
from ._regression import Units, check_no_leak, single_units
from ._scales import Scale
from ._table import EffectTable


class LinearModel(Baseline):
    r"""The linear model of Ahlmann-Eltze, Huber and Anders (2025), for single perturbations.

    .. math:: Y \approx G W P^\top + b, \qquad
       W = (G^\top G + \lambda I)^{-1} G^\top (Y - b) P\,(P^\top P + \lambda I)^{-1},

    with effects :math:`Y` (genes × perturbations, the control with effect 0 and embedding 0 among
    them), their row means :math:`b`, the scores :math:`G` of the genes on the first principal
    components of the training profiles, and :math:`P` the rows of :math:`G` of the perturbed
    genes, or an embedding that is given. Each context is fitted apart.

    Parameters
    ----------
    embedding
        Embedding of the targets, one row each; or the effects of another screen, whose first
        principal components are taken. None trains it on the effects themselves: then targets
        must be among the genes.
    n_components
        K, principal components.
    ridge
        λ.
    scale
        Scale of the effects.
    """

    def __init__(
        self,
        embedding: pd.DataFrame | EffectTable | None = None,
        n_components: int = 10,
        ridge: float = 0.1,
        scale: Scale = "mean_log1p",
    ) -> None:
        super().__init__(scale)
        self.embedding, self.n_components, self.ridge = embedding, n_components, ridge

    def _fit(self) -> None:
        given = self.embedding
        if isinstance(given, EffectTable):
            check_no_leak("The embedding", given.cells, self.effects_)
            scale = self.scale if self.scale in given.scales else given.scales[0]
            given = _screen_embedding(given, self.n_components, scale)
        self._models = {
            c: self._fit_context(c, single_units(self.measured_, c), given)
            for c in self._in_context
        }

    def _fit_context(
        self, context: str, units: Units, given: pd.DataFrame | None
    ) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
        effect = units.mean(self.measured_.values)
        control = self.effects_.control[self.scale][context].astype(float)
        genes = _principal_scores(np.vstack([effect + control, control]).T, self.n_components)
        table = given if given is not None else pd.DataFrame(genes, list(self.effects_.genes))
        known = [i for i, t in enumerate(units.targets) if t in table.index]
        if len(known) < 2:
            raise ValueError(
                f"The linear model needs at least 2 training targets with an embedding in context "
                f"{context!r}; it has {len(known)}."
            )
        p = table.loc[[units.targets[i] for i in known]].to_numpy(float)
        p = np.vstack([p, np.zeros(p.shape[1])])
        y = np.vstack([effect[known], np.zeros(effect.shape[1])]).T
        b = y.mean(1)
        left = np.linalg.solve(genes.T @ genes + self.ridge * np.eye(genes.shape[1]), genes.T)
        right = np.linalg.solve(p.T @ p + self.ridge * np.eye(p.shape[1]), p.T)
        return genes @ (left @ (y - b[:, None]) @ right.T), b, table

    def predict(self, perturbations: Sequence[Perturbation], contexts: Sequence[str]) -> np.ndarray:
        """Predict one effect per pair of perturbation and context, shape (n_pairs, n_genes).

        Raises
        ------
        ValueError
            For a combination, a target without an embedding or a context without perturbed cells.
        """
        pairs = zip(perturbations, contexts, strict=True)
        found = [self._predict(p, c) for p, c in pairs]
        return np.reshape(found, (len(found), len(self.effects_.genes)))

    def _predict(self, perturbation: Perturbation, context: str) -> np.ndarray:
        if perturbation.is_control:
            return np.zeros(len(self.effects_.genes))
        if context not in self._models:
            raise ValueError(f"No perturbation was measured in context {context!r}.")
        gw, b, table = self._models[context]
        if len(perturbation.targets) > 1:
            raise ValueError(f"The linear model predicts single perturbations, not {perturbation}.")
        if perturbation.targets[0] not in table.index:
            raise ValueError(f"The linear model has no embedding of {perturbation.targets[0]!r}.")
        return gw @ table.loc[perturbation.targets[0]].to_numpy(float) + b


def _principal_scores(values: np.ndarray, k: int) -> np.ndarray:
    from sklearn.decomposition import PCA

    k = min(k, *values.shape)
    return PCA(k, svd_solver="full").fit_transform(values)


def _screen_embedding(effects: EffectTable, k: int, scale: Scale) -> pd.DataFrame:
    """First principal components of the mean effects of the targets of a screen."""
    singles = [i for i, (_, p) in enumerate(effects.rows) if len(p.targets) == 1]
    frame = pd.DataFrame(
        effects.effect[scale][singles].astype(float),
        [effects.rows[i][1].targets[0] for i in singles],
    )
    frame = frame.groupby(level=0).mean()
    return pd.DataFrame(_principal_scores(frame.to_numpy(), k), frame.index)
