"""Predicted cells as an AnnData that scanpy and pertpy take as it is."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData, read_h5ad
from anndata.io import read_elem, sparse_dataset, write_elem
from scipy.stats import false_discovery_control, norm

from gpjepa._files import written_whole
from gpjepa.effects import AnchorPrediction, Scale
from gpjepa.perturbations import Perturbation

from ._summary import REGIMES

logger = logging.getLogger(__name__)

COVERAGE = 0.95
"""Level of the intervals."""
Z = float(norm.ppf(0.5 + COVERAGE / 2))
_MOST_RANKED = 200  # perturbations in uns["rank_genes_groups"]: HDF5's tables have few columns


@dataclass(frozen=True)
class PredictedEffect:
    """Mean effect of one perturbation in one context.

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
    def sd(self) -> np.ndarray:
        """Standard deviation of the effect on log1p of the pooled rate, shape (n_genes,)."""
        return np.sqrt(self.variance["log1p_mean"])

    @property
    def network_share(self) -> float:
        """Share of the network's part in the predicted effect's length."""
        residual = np.linalg.norm(self.effect["mean_log1p"] - self.anchor["mean_log1p"])
        total = residual + np.linalg.norm(self.anchor["mean_log1p"])
        return float(residual / total) if total else 0.0


def effect_frame(
    effects: Sequence[PredictedEffect], genes: np.ndarray, scale: Scale
) -> pd.DataFrame:
    """One row per effect and gene."""

    def of_rows(name: str) -> np.ndarray:
        """Repeat what holds for all genes."""
        values = np.array([getattr(e, name) for e in effects], dtype=object)
        return np.repeat(values, len(genes))

    effect = np.stack([e.effect[scale] for e in effects])
    sd = np.sqrt(np.stack([e.variance[scale] for e in effects]))
    control = np.stack([e.control[scale] for e in effects])
    # Expression is not negative; within batches there may be more of it to lose.
    lower = np.maximum(effect - Z * sd, np.minimum(-control, effect))
    return pd.DataFrame(
        {
            "perturbation": of_rows("label"),
            "context": of_rows("context"),
            "gene": np.tile(genes, len(effects)),
            "effect": effect.ravel(),
            "sd": sd.ravel(),
            "lower": lower.ravel(),
            "upper": (effect + Z * sd).ravel(),
            "anchor": np.stack([e.anchor[scale] for e in effects]).ravel(),
            "regime": of_rows("regime"),
        }
    )


def interaction_frame(
    found: AnchorPrediction, parts: Sequence[PredictedEffect], genes: np.ndarray, scale: Scale
) -> pd.DataFrame:
    """One row per gene: a combination's effect less the sum of those of its singles.

    Parameters
    ----------
    found
        The anchor's interaction, of which the standard deviation is taken.
    parts
        Effects of the combination, then of its singles.
    genes, scale
        As in :func:`effect_frame`.
    """
    whole, *singles = (part.effect[scale] for part in parts)
    additive = np.sum(singles, 0)
    sd = np.sqrt(found.variance[0])
    interaction = whole - additive
    return pd.DataFrame(
        {
            "perturbation": parts[0].label,
            "context": parts[0].context,
            "gene": genes,
            "interaction": interaction,
            "sd": sd,
            "lower": interaction - Z * sd,
            "upper": interaction + Z * sd,
            "additive": additive,
            "regime": found.regime[0],
        }
    )


@dataclass(frozen=True)
class PredictedCells:
    """Cells predicted from control cells of one context: some of them or all."""

    effect: PredictedEffect
    counts: sp.csr_matrix
    expected: np.ndarray  # counts per 10,000, dense
    state: np.ndarray
    library: np.ndarray
    control_cells: np.ndarray
    draws: np.ndarray
    control_labels: np.ndarray | None  # of the control itself: as the cells are labelled


class Results:
    """Puts predicted cells together, in memory or on disk.

    Parameters
    ----------
    genes
        Names of the genes.
    seed, units
        Seed of the draws, and what ``X`` holds.
    keys
        The user's own names of columns.
    control
        What the data call their control.
    layers
        Which of ``expected`` and ``expected_sd`` are kept for every cell.
    """

    def __init__(
        self,
        genes: np.ndarray,
        seed: int,
        units: str,
        keys: Mapping[str | None, str],
        control: str,
        layers: Sequence[str],
    ) -> None:
        self.genes, self.seed, self.units = genes, seed, units
        self.keys, self.control, self.layers = keys, control, tuple(layers)
        self._effects: list[PredictedEffect] = []
        self._obs: list[pd.DataFrame] = []
        self._states: list[np.ndarray] = []

    def _add(self, part: PredictedCells) -> dict[str, np.ndarray]:
        """Note what is said of some cells; their layers are given back."""
        if not self._effects or self._effects[-1] is not part.effect:
            self._effects.append(part.effect)
        self._obs.append(_obs(part))
        self._states.append(part.state)
        return {name: _LAYERS[name](part) for name in self.layers}

    def in_memory(self, parts: Iterable[PredictedCells]) -> AnnData:
        """All cells as an AnnData."""
        counts: list[sp.csr_matrix] = []
        layers: dict[str, list[np.ndarray]] = {name: [] for name in self.layers}
        for part in parts:
            counts.append(part.counts)
            for name, values in self._add(part).items():
                layers[name].append(values)
        return AnnData(
            sp.vstack(counts, format="csr"),
            layers={name: np.concatenate(values) for name, values in layers.items()},
            **self._annotations(),
        )

    def on_disk(self, parts: Iterable[PredictedCells], path: Path) -> AnnData:
        """Write the cells as they come, and give them back with counts that stay on disk.

        The file has another name until it is whole.
        """
        with written_whole(path) as draft, warnings.catch_warnings():
            # What anndata and zarr say of their own formats.
            warnings.filterwarnings("ignore", "zarr v3 autosharding|.*Zarr V3 specification")
            store = _opened(draft, "w")
            write_elem(store, "/", AnnData(var=pd.DataFrame(index=self._var_names)))
            if "raw" in store:  # empty, and yet it would pass for expression
                del store["raw"]
            for part in parts:
                _append(store, "X", part.counts)
                for name, values in self._add(part).items():
                    _append(store["layers"], name, values)
            for name, value in self._annotations().items():
                write_elem(store, name, value)
            if path.suffix == ".h5ad":
                store.close()
        return _backed(path)

    @property
    def _var_names(self) -> pd.Index:
        return pd.Index(self.genes.astype(str))

    def _annotations(self) -> dict[str, Any]:
        """Everything but the matrices."""
        obs = pd.concat(self._obs, ignore_index=True)
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
        for own, column in self.keys.items():
            if own is not None and own not in obs:
                obs[own] = obs[column]
        return {
            "obs": obs,
            "var": pd.DataFrame(index=self._var_names),
            "obsm": {"X_gpjepa": np.concatenate(self._states)},
            "varm": self._profiles(),
            "uns": self._uns(),
        }

    def _profiles(self) -> dict[str, np.ndarray]:
        """Expected counts per 10,000 of each perturbation, with their standard deviation.

        As arrays, in the order of ``uns["gpjepa"]["effects"]``: HDF5 holds no table of thousands of
        columns.
        """
        rates = [e.target_rate for e in self._effects]
        sds = [(1 + r) * e.sd for r, e in zip(rates, self._effects, strict=True)]
        return {
            name: np.stack(x, 1).astype(np.float32)
            for name, x in (("expected", rates), ("expected_sd", sds))
        }

    def _uns(self) -> dict[str, Any]:
        effects = self._effects
        found: dict[str, Any] = {}
        if len({e.label for e in effects}) <= _MOST_RANKED:
            found["rank_genes_groups"] = _rank_genes(effects, self.genes, self.control)
        else:
            logger.info(
                "uns['rank_genes_groups'] is left out, as HDF5 holds no table of more than %d "
                "perturbations: use predict_effects.",
                _MOST_RANKED,
            )
        found["gpjepa"] = {
            "units": {
                "X": self.units,
                "expected": "expected counts per 10,000",
                "expected_sd": "standard deviation of `expected` from that of the mean effect",
                "effect": "difference from the control, log1p of counts per 10,000",
            },
            "effects": pd.DataFrame(
                {
                    "perturbation": [e.label for e in effects],
                    "context": [e.context for e in effects],
                    "regime": [e.regime for e in effects],
                    "gate": [e.gate for e in effects],
                    "anchor_share": [1 - e.network_share for e in effects],
                    "network_share": [e.network_share for e in effects],
                },
                index=[str(i) for i in range(len(effects))],
            ),
            "words": {
                "regime": "how far a prediction is from what was measured",
                **{r: REGIMES[r] for r in dict.fromkeys(e.regime for e in effects) if r in REGIMES},
                "gate": "share of the network's correction that was let in, 0 for the anchor alone",
                "anchor": "closed-form prediction, in which simple baselines are weighted",
                "context": "what was perturbed: cell line, donor, treatment; 'all' if there is just one",
            },
            "coverage": COVERAGE,
            "seed": self.seed,
            "versions": {name: version(name) for name in ("gpjepa", "scvi-tools", "torch")},
        }
        return found


def _obs(part: PredictedCells) -> pd.DataFrame:
    labels = part.effect.label if part.control_labels is None else part.control_labels
    return pd.DataFrame(
        {
            "perturbation": labels,
            "context": part.effect.context,
            "control_cell": part.control_cells,
            "library_size": part.library,
            "draw": part.draws,
        }
    )


def _expected_sd(part: PredictedCells) -> np.ndarray:
    """Delta method: a step in log1p of the rate is worth (1 + rate)."""
    return ((1 + part.expected) * part.effect.sd).astype(np.float32)


_LAYERS: dict[str, Callable[[PredictedCells], np.ndarray]] = {
    "expected": lambda part: part.expected.astype(np.float32),
    "expected_sd": _expected_sd,
}
LAYERS = tuple(_LAYERS)


def checked_file(out: str | Path) -> Path:
    """Where cells are to be written."""
    path = Path(out)
    if path.suffix not in (".h5ad", ".zarr"):
        raise ValueError(f"out={str(out)!r}: the name must end in .h5ad or .zarr.")
    if path.exists():
        raise FileExistsError(f"{out} already exists. Choose another name, or remove it.")
    return path


def _opened(path: Path, mode: Literal["r", "w"]) -> Any:
    """A group of an HDF5 file or a zarr store."""
    if path.suffix == ".h5ad":
        import h5py

        return h5py.File(path, mode)
    import zarr

    return zarr.open_group(str(path), mode=mode)


def _append(group: Any, name: str, block: sp.csr_matrix | np.ndarray) -> None:
    """Add rows to a matrix on disk."""
    if name not in group:
        # HDF5 has to be told what may grow, and compresses nothing by itself.
        options: dict[str, Any] = {}
        if not hasattr(group, "store"):
            options = {"compression": "gzip", "compression_opts": 1}
            if isinstance(block, np.ndarray):
                options |= {"maxshape": (None, block.shape[1]), "chunks": (256, block.shape[1])}
        if not isinstance(block, np.ndarray):
            block.indptr = block.indptr.astype(np.int64)  # there may be more than 2**31 values
        write_elem(group, name, block, dataset_kwargs=options)
    elif isinstance(block, np.ndarray):
        array, n = group[name], group[name].shape[0]
        array.resize((n + len(block), block.shape[1]))
        array[n:] = block
    else:
        sparse_dataset(group[name]).append(block)


def _backed(path: Path) -> AnnData:
    """An AnnData whose counts stay on disk."""
    if path.suffix == ".h5ad":
        return read_h5ad(path, backed="r")
    store = _opened(path, "r")
    parts = {name: read_elem(store[name]) for name in ("obs", "var", "obsm", "varm", "uns")}
    return AnnData(sparse_dataset(store["X"]), **parts)


def _rank_genes(effects: list[PredictedEffect], genes: np.ndarray, reference: str) -> dict:
    """Predicted differential expression in scanpy's own format.

    Not a test on sampled cells, which would find everything significant with enough of them: the
    score is the mean effect over its standard deviation, contexts averaged. Scores and fold changes
    are of one scale, log1p of the mean rate, and so have one sign.
    """
    columns: dict[str, dict[str, np.ndarray]] = {
        k: {} for k in ("names", "scores", "logfoldchanges", "pvals", "pvals_adj")
    }
    by_label: dict[str, list[PredictedEffect]] = {}
    for effect in effects:
        by_label.setdefault(effect.label, []).append(effect)
    for label, mine in by_label.items():
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
        name: pd.DataFrame(table).to_records(index=False) for name, table in columns.items()
    }
    result["params"] = {
        "groupby": "perturbation",
        "reference": reference,
        "method": "gpjepa",
        "use_raw": False,
        "corr_method": "benjamini-hochberg",
    }
    return result
