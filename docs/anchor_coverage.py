"""Coverage of the anchor's 95% intervals by the size of the predicted effect: docs/anchor.md.

    python docs/anchor_coverage.py DATA   # the folder of the real cells

Half of the cells predict what the other half measures, controls included; an interval holds the
prediction's variance and the measurement's. Means over 20 splits, with their 95% intervals.
"""

import sys
from pathlib import Path

import anndata as ad
import numpy as np
from scipy.stats import t

from gpjepa.datasets import simulate
from gpjepa.effects import EffectAnchor, EffectTable, effect_table
from gpjepa.perturbations import LabelReader

SPLITS = 20
SCALE = "mean_log1p"


def splits(adata: ad.AnnData, batch: str | None = None) -> list[tuple[EffectTable, EffectTable]]:
    """Tables of two halves of the cells, again and again."""
    counts = adata.layers["counts"] if "counts" in adata.layers else adata.X
    known = adata.obs.get("library_size")
    library = np.asarray(counts.sum(1)).ravel() if known is None else known.to_numpy(float)
    read = LabelReader().read
    labels = [read(x) for x in adata.obs["perturbation"].astype(str)]
    batches = None if batch is None else adata.obs[batch].astype(str).tolist()
    found = []
    for seed in range(SPLITS):
        half = np.random.default_rng(seed).random(adata.n_obs) < 0.5
        found.append(
            tuple(
                effect_table(
                    counts,
                    library,
                    labels,
                    ["c"] * adata.n_obs,
                    adata.var_names,
                    keep,
                    batches=batches,
                )
                for keep in (half & (library > 0), ~half & (library > 0))
            )
        )
    return found


def coverage(one: EffectTable, other: EffectTable) -> np.ndarray:
    """Overall, of each tenth of predicted size, of the top 1% measured; median width; share of 0."""
    where = {row: i for i, row in enumerate(other.rows)}
    rows = [i for i, row in enumerate(one.rows) if row in where]
    at = [where[one.rows[i]] for i in rows]
    anchor = EffectAnchor().fit(one)
    pairs = [one.rows[i][1] for i in rows], [one.rows[i][0] for i in rows]
    found = anchor.predict(*pairs, SCALE)
    noise = other.interval_noise(SCALE)[at]
    inside = np.abs(found.mean - other.effect[SCALE][at]) < 1.96 * np.sqrt(found.variance + noise)
    size = np.abs(found.mean)
    tenth = np.searchsorted(np.quantile(size, np.linspace(0.1, 0.9, 9)), size)
    strong = np.abs(one.effect[SCALE][rows])
    strong = strong >= np.quantile(strong, 0.99)
    return np.array(
        [
            inside.mean(),
            *(inside[tenth == k].mean() if (tenth == k).any() else np.nan for k in range(10)),
            inside[strong].mean(),
            2 * 1.96 * np.median(np.sqrt(found.variance)),
            (found.variance == 0).mean(),
        ]
    )


if __name__ == "__main__":
    data = Path(sys.argv[1])
    screens = {
        "simulated": (simulate(6_000, 500, seed=0), None),
        "Papalexi": (ad.read_h5ad(data / "papalexi_2021_mini.h5ad"), None),
        "Papalexi, within replicates": (
            ad.read_h5ad(data / "papalexi_2021_mini.h5ad"),
            "replicate",
        ),
        "Norman": (ad.read_h5ad(data / "norman_2019_mini.h5ad"), None),
    }
    for name, (adata, batch) in screens.items():
        values = np.array([coverage(*pair) for pair in splits(adata, batch)])
        mean = np.nanmean(values, axis=0)
        margin = t(SPLITS - 1).ppf(0.975) * values.std(0, ddof=1) / np.sqrt(SPLITS)
        tenths = " ".join(f"{x:.3f}" for x in mean[1:11])
        print(
            f"{name}: overall {mean[0]:.3f} ± {margin[0]:.3f}, tenths {tenths} (± at most "
            f"{np.nanmax(margin[1:11]):.3f}), top 1% {mean[11]:.3f} ± {margin[11]:.3f}, median width "
            f"{mean[12]:.4f}, of width 0 {mean[13]:.3f}",
            flush=True,
        )
