"""Print the statistics of simulated screens beside those of Norman 2019.

    python docs/simulator_statistics.py [DIRECTORY]

DIRECTORY holds norman_2019_mini.h5ad and Ahlmann-Eltze's and Norman's published tables; without it
the published side is left out.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

import gpjepa
from gpjepa.effects import log1p_rates

N_CELLS, N_CONTROL = 300, 3_000  # cells per perturbation and controls, as in Norman 2019


def simulated(seed: int) -> dict[str, float]:
    adata = gpjepa.datasets.simulate(10_000, 5_000, seed=seed, n_combinations=60)
    truth = adata.uns["simulation"]
    double = (truth["rows"]["interaction"] != "single").to_numpy()
    library = np.asarray(adata.X.sum(1)).ravel()
    top = np.argsort(-np.asarray(adata.X.mean(0)).ravel())[:1_000]
    effect = truth["effect"]["mean_log1p"][:, top]
    interaction = truth["interaction"]["mean_log1p"][:, top][double]
    control = (adata.obs["perturbation"] == "control").to_numpy()
    logged = log1p_rates(adata.X, library)[control][:, top].toarray()
    cell = logged.var(0)
    rng = np.random.default_rng(seed)
    single_noise, control_noise = cell / N_CELLS, cell / N_CONTROL
    index = {p: i for i, p in enumerate(truth["rows"]["perturbation"])}
    pairs = [p.split("+") for p in truth["rows"]["perturbation"][double]]
    a, b = (effect[[index[p[k]] for p in pairs]] for k in (0, 1))
    noisy = [x + rng.normal(size=x.shape) * np.sqrt(single_noise) for x in (a, b, effect[double])]

    def correlation(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.median([np.corrcoef(p, q)[0, 1] for p, q in zip(x, y, strict=True)]))

    z = interaction / np.sqrt(3 * single_noise + control_noise)
    not_additive = found(z + rng.normal(size=z.shape)) / z.size
    everywhere = truth["effect"]["mean_log1p"]
    noise = log1p_rates(adata.X, library)[control].toarray().var(0) * (1 / N_CELLS + 1 / N_CONTROL)
    changed = everywhere / np.sqrt(np.maximum(noise, 1e-12))
    changed = np.array([found(x) for x in changed + rng.normal(size=changed.shape)])
    mid = slice(200, 1_000)
    raw = adata.X[control][:, top[mid]].toarray() / library[control, None] * np.median(library)
    excess = raw.var(0) - raw.mean(0)
    return {
        "counts per cell, median": float(np.median(library) / truth["network"]["panel_share"]),
        "counts per cell, sd of log": float(np.log(library).std()),
        "overdispersion of controls, median": float(np.median(excess / raw.mean(0) ** 2)),
        "no change, L2 on doubles, median": float(np.median(np.sqrt(
            (effect[double] ** 2).sum(1) + (single_noise + control_noise).sum()))),
        "additive, L2 on doubles, median": float(np.median(np.sqrt(
            (interaction**2).sum(1) + (3 * single_noise + control_noise).sum()))),
        "correlation of two singles, median": correlation(noisy[0], noisy[1]),
        "correlation of sum and double, median": correlation(noisy[0] + noisy[1], noisy[2]),
        "genes changed by a single, median": float(np.median(changed[~double])),
        "genes changed by a double, median": float(np.median(changed[double])),
        "gene x double pairs not additive, 5% FDR": not_additive,
    }  # fmt: skip


def found(z: np.ndarray) -> int:
    """Discoveries among z-scores at a false discovery rate of 5% (Benjamini and Hochberg)."""
    p_values = 2 * norm.sf(np.sort(np.abs(z).ravel())[::-1])
    return int(
        np.max(np.flatnonzero(p_values <= 0.05 * np.arange(1, z.size + 1) / z.size) + 1, initial=0)
    )


def published(directory: Path) -> dict[str, float]:
    import anndata as ad

    doubles = pd.read_csv(directory / "published" / "ahlmann2025_doubles_norman.csv")
    l2 = doubles.groupby(["method", "perturbation"])["l2"].mean()
    fits = pd.read_csv(directory / "published" / "norman2019_regr_fits_final.csv")
    cells = ad.read_h5ad(directory / "norman_2019_mini.h5ad")
    library = cells.obs["library_size"].to_numpy()
    control = (cells.obs["perturbation"] == "control").to_numpy()
    raw = cells.X[control].toarray() / library[control, None] * np.median(library)
    used = raw.mean(0) > 0.03
    excess = (raw.var(0) - raw.mean(0))[used] / raw.mean(0)[used] ** 2
    return {
        "counts per cell, median": float(np.median(library)),
        "counts per cell, sd of log": float(np.log(library).std()),
        "overdispersion of controls, median": float(np.median(excess)),
        "no change, L2 on doubles, median": float(l2["no_change"].median()),
        "additive, L2 on doubles, median": float(l2["additive_model"].median()),
        "correlation of two singles, median": float(fits["corr_first_second"].median()),
        "correlation of sum and double, median": float(fits["corr_sum"].median()),
        "genes changed by a single, median": 10
        ** float(fits[["de_first", "de_second"]].stack().median()),
        "genes changed by a double, median": 10 ** float(fits["de_double"].median()),
        "gene x double pairs not additive, 5% FDR": 0.04,
    }


if __name__ == "__main__":
    runs = pd.DataFrame([simulated(seed) for seed in range(5)])
    table = pd.DataFrame(
        {"simulated, 5 seeds": runs.mean(), "least": runs.min(), "most": runs.max()}
    )
    if len(sys.argv) > 1:
        table.insert(0, "Norman 2019", pd.Series(published(Path(sys.argv[1]))))
    print(table.round(3).to_string())
