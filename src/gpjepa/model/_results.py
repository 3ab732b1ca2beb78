"""Predicted cells as an AnnData that scanpy and pertpy take as it is."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scipy.stats import false_discovery_control, norm

from gpjepa.effects import Scale
from gpjepa.perturbations import Perturbation

from ._held_out import REGIMES

COVERAGE = 0.95
"""Level of the intervals."""
Z = float(norm.ppf(0.5 + COVERAGE / 2))


@dataclass(frozen=True)
class PredictedEffect:
    """Mean effect of one perturbation in one context, on both scales.

    Attributes
    ----------
    perturbation, label
        What is predicted, and what results call it.
    effect, anchor, variance
        Per scale, shape (n_genes,).
    control
        log1p of the control's pooled rate per 10,000, shape (n_genes,).
    """

    perturbation: Perturbation
    label: str
    context: str
    regime: str
    gate: float
    effect: dict[str, np.ndarray]
    anchor: dict[str, np.ndarray]
    variance: dict[str, np.ndarray]
    control: dict[Scale, np.ndarray]  # profile of the control, per scale

    @property
    def target_rate(self) -> np.ndarray:
        """Mean rate per 10,000 that predicted cells must have: expm1(y_ctrl + d), floored at 0."""
        y = self.control["log1p_mean"].astype(float) + self.effect["log1p_mean"]
        return np.expm1(np.maximum(y, 0))

    @property
    def network_share(self) -> float:
        """Share of the network's part in the predicted effect's length."""
        residual = np.linalg.norm(self.effect["mean_log1p"] - self.anchor["mean_log1p"])
        total = residual + np.linalg.norm(self.anchor["mean_log1p"])
        return float(residual / total) if total else 0.0

    def frame(self, genes: np.ndarray, scale: Scale) -> pd.DataFrame:
        """One row per gene."""
        sd = np.sqrt(self.variance[scale])
        effect = self.effect[scale]
        return pd.DataFrame(
            {
                "perturbation": self.label,
                "context": self.context,
                "gene": genes,
                "effect": effect,
                "sd": sd,
                # Expression is not negative; within batches there may be more of it to lose.
                "lower": np.maximum(effect - Z * sd, np.minimum(-self.control[scale], effect)),
                "upper": effect + Z * sd,
                "anchor": self.anchor[scale],
                "regime": self.regime,
            }
        )


@dataclass(frozen=True)
class PredictedCells:
    """Cells predicted from the control cells of one context."""

    effect: PredictedEffect
    counts: sp.csr_matrix
    expected: np.ndarray  # counts per 10,000
    state: np.ndarray
    library: np.ndarray
    control_cells: np.ndarray
    draws: np.ndarray
    control_labels: np.ndarray | None  # of the control itself: as the cells are labelled


def assemble(
    groups: list[PredictedCells],
    genes: np.ndarray,
    seed: int,
    units: str,
    keys: dict[str | None, str],
    control: str,
) -> AnnData:
    """Put predicted cells into one AnnData.

    ``keys`` are the user's own names of columns, and ``control`` what the data call their control.
    """
    obs = pd.concat([_obs(g) for g in groups], ignore_index=True)
    columns = (obs["control_cell"], obs["perturbation"], obs.pop("draw"))
    obs.index = pd.Index(
        [
            f"{cell}|{p}" + (f"|{draw}" if draw else "")
            for cell, p, draw in zip(*columns, strict=True)
        ]
    )
    labels = list(dict.fromkeys(obs["perturbation"]))
    obs["perturbation"] = pd.Categorical(obs["perturbation"], labels)
    obs["context"] = obs["context"].astype("category")
    for own, column in keys.items():
        if own is not None and own not in obs:
            obs[own] = obs[column]
    adata = AnnData(
        sp.vstack([g.counts for g in groups], format="csr"),
        obs=obs,
        var=pd.DataFrame(index=pd.Index(genes.astype(str))),
        obsm={"X_gpjepa": np.concatenate([g.state for g in groups])},
    )
    adata.layers["expected"] = np.concatenate([g.expected for g in groups])
    adata.layers["expected_sd"] = np.concatenate([_expected_sd(g) for g in groups])
    adata.uns["rank_genes_groups"] = _rank_genes(groups, genes, control)
    adata.uns["gpjepa"] = {
        "units": {
            "X": units,
            "expected": "expected counts per 10,000",
            "expected_sd": "standard deviation of `expected` from that of the mean effect",
            "effect": "difference from the control, log1p of counts per 10,000",
        },
        "effects": pd.DataFrame(
            {
                "perturbation": [g.effect.label for g in groups],
                "context": [g.effect.context for g in groups],
                "regime": [g.effect.regime for g in groups],
                "gate": [g.effect.gate for g in groups],
                "anchor_share": [1 - g.effect.network_share for g in groups],
                "network_share": [g.effect.network_share for g in groups],
            },
            index=[str(i) for i in range(len(groups))],
        ),
        "words": {
            "regime": "how far a prediction is from what was measured",
            **{
                r: REGIMES[r]
                for r in dict.fromkeys(g.effect.regime for g in groups)
                if r in REGIMES
            },
            "gate": "share of the network's correction that was let in, 0 for the anchor alone",
            "anchor": "closed-form prediction, in which simple baselines are weighted",
            "context": "what was perturbed: cell line, donor, treatment; 'all' if there is just one",
        },
        "coverage": COVERAGE,
        "seed": seed,
        "versions": {name: version(name) for name in ("gpjepa", "scvi-tools", "torch")},
    }
    return adata


def _obs(group: PredictedCells) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "perturbation": group.effect.label
            if group.control_labels is None
            else group.control_labels,
            "context": group.effect.context,
            "control_cell": group.control_cells,
            "library_size": group.library,
            "draw": group.draws,
        }
    )


def _expected_sd(group: PredictedCells) -> np.ndarray:
    """Delta method: a step in log1p of the rate is worth (1 + rate)."""
    sd = np.sqrt(group.effect.variance["log1p_mean"])
    return ((1 + group.expected) * sd).astype(np.float32)


def _rank_genes(groups: list[PredictedCells], genes: np.ndarray, reference: str) -> dict:
    """Predicted differential expression in scanpy's own format.

    Not a test on sampled cells, which would find everything significant with enough of them: the
    score is the mean effect over its standard deviation, contexts averaged. Scores and fold changes
    are of one scale, log1p of the mean rate, and so have one sign.
    """
    columns: dict[str, dict[str, np.ndarray]] = {
        k: {} for k in ("names", "scores", "logfoldchanges", "pvals", "pvals_adj")
    }
    for label in dict.fromkeys(g.effect.label for g in groups):
        mine = [g.effect for g in groups if g.effect.label == label]
        control = np.mean([e.control["log1p_mean"].astype(float) for e in mine], axis=0)
        changed = np.mean([np.log1p(e.target_rate) for e in mine], axis=0)
        variance = np.mean([e.variance["log1p_mean"] for e in mine], axis=0) / len(mine)
        score = (changed - control) / np.sqrt(np.maximum(variance, 1e-12))
        before, after = np.expm1(control), np.expm1(changed)
        p = 2 * norm.sf(np.abs(score))
        order = np.argsort(-score, kind="stable")
        columns["names"][label] = genes[order].astype(object)
        columns["scores"][label] = score[order].astype(np.float32)
        ratio = np.log2((after + 1e-9) / (before + 1e-9))
        columns["logfoldchanges"][label] = ratio[order].astype(np.float32)
        columns["pvals"][label] = p[order]
        columns["pvals_adj"][label] = false_discovery_control(p)[order]
    result: dict[str, Any] = {
        name: pd.DataFrame(by_label).to_records(index=False) for name, by_label in columns.items()
    }
    result["params"] = {
        "groupby": "perturbation",
        "reference": reference,
        "method": "gpjepa",
        "use_raw": False,
        "corr_method": "benjamini-hochberg",
    }
    return result
