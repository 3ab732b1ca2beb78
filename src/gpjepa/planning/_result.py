"""What planning found."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import factorial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from gpjepa.perturbations import Perturbation

from ._scoring import Risk, Scoring, together

if TYPE_CHECKING:
    from anndata import AnnData


_SAID = {
    "mean": "score",
    "expected": "expected score",
    "quantile": "lower decile of the score",
    "success": "probability of success",
}


@dataclass(frozen=True)
class Ranking:
    """Perturbations in the order of how well they meet a goal.

    Candidates of which a target was not measured in the context are listed apart
    (:meth:`extrapolated`): what is unknown of them is known less well.

    Attributes
    ----------
    frame
        Both lists, each with the best first.
    perturbations
        Those of the rows.
    n_candidates
        Number of candidates, also of those that were not predicted by the full model.
    risk
        What the best are ordered by.
    """

    frame: pd.DataFrame
    perturbations: list[Perturbation]
    scoring: Scoring
    n_candidates: int
    risk: Risk

    @property
    def unit(self) -> str:
        """What the score is."""
        return self.scoring.objective.unit

    @property
    def best(self) -> str:
        """The first of the table, or of those that are extrapolated if there are no others."""
        return str(self.frame["perturbation"].iloc[0])

    def table(self, n: int | None = None) -> pd.DataFrame:
        """The best candidates whose targets were all measured.

        Parameters
        ----------
        n
            How many; all by default.

        Returns
        -------
        pandas.DataFrame
            ``perturbation, regime``; ``score`` of the predicted effect. Of the true effect:
            ``expected`` score, which for distances is lower, as something is unknown of every gene;
            and, of the best, which were drawn together, ``sd``, a 95% interval ``lower, upper``,
            ``p_success`` (the threshold is reached, and side effects are within the limit), ``p_best``
            and ``expected_rank`` among those drawn. With constraints ``side_effect, cost, feasible``.
        """
        return self._list(False, n)

    def extrapolated(self, n: int | None = None) -> pd.DataFrame:
        """As :meth:`table`, of candidates with a target that was not measured in the context."""
        return self._list(True, n)

    def _list(self, extrapolated: bool, n: int | None) -> pd.DataFrame:
        mine = self.frame[self.frame["extrapolated"] == extrapolated]
        found = mine.drop(columns="extrapolated").reset_index(drop=True)
        return found if n is None else found.head(n)

    def __repr__(self) -> str:
        known, far = self.table(), self.extrapolated()
        shown = known if len(known) else far
        columns = [c for c in shown if c != "expected_rank"]
        lines = [
            f"Ranking of {self.n_candidates:,} candidates in {self.scoring.context}, by "
            f"{_SAID[self.risk]}; score: {self.unit}",
            shown[columns].head(10).to_string(index=False, float_format="{:.3f}".format),
        ]
        if len(known) and len(far):
            lines.append(f"and {len(far):,} with targets that were not measured: extrapolated()")
        return "\n".join(lines)

    def effects(self, n: int = 10) -> pd.DataFrame:
        """Predicted effects of the best, shape (n, n_genes)."""
        names = self.frame["perturbation"].iloc[:n]
        found = self.scoring.model.predict(self.perturbations[:n], self.scoring.context)
        return pd.DataFrame(found.mean, pd.Index(names), self.scoring.model.genes)

    def to_anndata(self, n: int = 50) -> AnnData:
        """Predicted effects of the best as an AnnData, for scanpy.

        Parameters
        ----------
        n
            How many.

        Returns
        -------
        anndata.AnnData
            ``X`` effects; ``obs`` the table; ``varm["goal"]`` what a change of each gene does to the
            score, at no change, where it is a smooth function of effects.
        """
        from anndata import AnnData

        effects = self.effects(n)
        obs = self.frame.iloc[:n].set_index("perturbation", drop=False)
        obs.index = obs.index.astype(str)
        linear = self.scoring.objective.linear
        varm = {} if linear is None else {"goal": linear[:, None]}
        uns = {
            "gpjepa": {
                "score": self.unit,
                "scale": self.scoring.model.unit,
                "context": self.scoring.context,
                "risk": self.risk,
            }
        }
        var = pd.DataFrame(index=effects.columns.astype(str))
        return AnnData(effects.to_numpy(np.float32), obs, var, uns=uns, varm=varm)

    def plot(
        self,
        kind: Literal["ranking", "side_effects", "effect"] = "ranking",
        n: int = 20,
        **kwargs: Any,
    ) -> Any:
        """Draw the best candidates.

        Parameters
        ----------
        kind
            ``"ranking"``: scores with intervals. ``"side_effects"``: score against side effect, with
            the candidates that no other beats in both. ``"effect"``: the predicted effect of the best
            against the goal.
        n
            Candidates to name.
        **kwargs
            Of :func:`gpjepa.plotting.ranking`, :func:`~gpjepa.plotting.trade_off` or
            :func:`~gpjepa.plotting.goal_scatter`.
        """
        from gpjepa import plotting

        if kind == "ranking":
            return plotting.ranking(self.frame, n=n, unit=self.unit, **kwargs)
        if kind == "side_effects":
            if "side_effect" not in self.frame:
                raise ValueError(
                    "There are no side effects to draw: name what should not change in constraints."
                )
            return plotting.trade_off(self.frame, n=n, unit=self.unit, **kwargs)
        if kind != "effect":
            raise ValueError(f"kind={kind!r}: choose 'ranking', 'side_effects' or 'effect'.")
        goal = self.scoring.objective.goal
        if goal is None:
            raise ValueError("Only a goal that is an effect, or cells, can be drawn beside one.")
        return plotting.goal_scatter(
            pd.Series(self.effects(1).iloc[0], self.scoring.model.genes),
            pd.Series(goal, self.scoring.model.genes),
            title=str(self.frame["perturbation"].iloc[0]),
            **kwargs,
        )

    def agreement(self, energies: pd.DataFrame) -> float:
        """Spearman's correlation of scores with those in latent space.

        Parameters
        ----------
        energies
            Of :func:`gpjepa.planning.latent_energy`, of some of the candidates.
        """
        both = self.frame.merge(energies, on="perturbation", suffixes=("", "_latent"))
        if len(both) < 3:
            raise ValueError(f"{len(both)} candidates in common are too few for a correlation.")
        return float(both["score"].corr(both["score_latent"], method="spearman"))

    def why(self, perturbation: str | None = None) -> Why:
        """What each target brings to the score, and what is unknown.

        Parameters
        ----------
        perturbation
            One of the table; the best by default.
        """
        named = list(self.frame["perturbation"])
        wanted = self.best if perturbation is None else perturbation
        if wanted not in named:
            raise KeyError(f"{wanted!r} is not in the table; the best is {self.best!r}.")
        return explain(self.scoring, self.perturbations[named.index(wanted)], wanted)


@dataclass(frozen=True)
class Why:
    """Why a perturbation was chosen.

    Attributes
    ----------
    perturbation
        Its name.
    parts
        One row per target: its score ``alone``, what it ``adds`` to the combination on average over all
        orders in which targets are added (Shapley value), the score ``without`` it, and its ``regime``
        alone.
    unknown
        Share of each source of doubt in the variance of the effect.
    score, regime
        Of the perturbation.
    """

    perturbation: str
    parts: pd.DataFrame
    unknown: pd.Series
    score: float
    regime: str

    def __repr__(self) -> str:
        lines = [
            f"{self.perturbation} ({self.regime}), score {self.score:.3f}",
            self.parts.to_string(float_format="{:.3f}".format),
        ]
        if len(self.unknown):
            said = ", ".join(f"{v:.0%} {k}" for k, v in self.unknown.items())
            lines.append(f"variance of its effect: {said}")
        return "\n".join(lines)


def explain(scoring: Scoring, perturbation: Perturbation, name: str) -> Why:
    """What each target of a perturbation brings, by all of its subsets (Shapley 1953)."""
    singles, k = perturbation.singles, len(perturbation.targets)
    subsets = [s for size in range(1, k + 1) for s in combinations(range(k), size)]
    table = scoring.table([together(singles[i] for i in s) for s in subsets])
    nothing = float(scoring.objective(np.zeros((1, len(scoring.model.genes))))[0])
    score = {(): nothing} | dict(zip(subsets, table["score"], strict=True))
    rows = []
    for i, single in enumerate(singles):
        adds = 0.0
        for s in [(), *subsets]:
            if i not in s:
                weight = factorial(len(s)) * factorial(k - len(s) - 1) / factorial(k)
                adds += weight * (score[tuple(sorted((*s, i)))] - score[s])
        whole = tuple(range(k))
        rest = tuple(j for j in whole if j != i)
        regime = table["regime"].iloc[subsets.index((i,))]
        rows.append((str(single), score[(i,)], adds, score[rest], regime))
    parts = pd.DataFrame(rows, columns=["target", "alone", "adds", "without", "regime"])
    shares = scoring.model.joint([(perturbation, scoring.context)]).shares()
    return Why(
        name,
        parts.set_index("target"),
        pd.Series({of: float(v[0]) for of, v in shares.items()}, dtype=float),
        float(score[tuple(range(k))]),
        str(table["regime"].iloc[-1]),
    )
