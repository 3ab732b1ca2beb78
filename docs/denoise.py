"""What denoising is worth on real cells: docs/anchor.md.

python docs/denoise.py DATA
"""

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from gpjepa.datasets import simulate
from gpjepa.effects import (
    Additive,
    EffectAnchor,
    EffectTable,
    ShrunkenAdditive,
    denoise,
    effect_table,
    noise_corrected_error,
)
from gpjepa.perturbations import LabelReader

SCALE = "mean_log1p"
FILES = {
    "Norman": ("norman_2019_mini.h5ad", None),
    "Papalexi": ("papalexi_2021_mini.h5ad", None),
    "Datlinger": ("datlinger_2021_mini.h5ad", None),
    "Datlinger, by treatment": ("datlinger_2021_mini.h5ad", "treatment"),
    "Zhao": ("zhao_2021_mini.h5ad", "patient"),
    "McFaline": ("mcfaline_2023_mini.h5ad", "cell_line"),
}
SPLITS = 20
DEPTHS = (15, 30, 60, 100)


class Cells:
    """Counts and labels, from which tables of some cells are made."""

    def __init__(self, adata: ad.AnnData, context_key: str | None = None) -> None:
        self.counts, self.genes = adata.X, adata.var_names
        read = LabelReader().read
        known = {label: read(label) for label in adata.obs["perturbation"].astype(str).unique()}
        self.perturbations = [known[label] for label in adata.obs["perturbation"].astype(str)]
        contexts = adata.obs[context_key].astype(str) if context_key else ["all"] * adata.n_obs
        self.contexts = list(contexts)
        whole = adata.obs.get("library_size", np.asarray(adata.X.sum(1)).ravel())
        self.library = np.asarray(whole, float)

    def table(self, keep: np.ndarray) -> EffectTable:
        """Effects of some cells."""
        return effect_table(
            self.counts, self.library, self.perturbations, self.contexts, self.genes, keep
        )

    def groups(self) -> dict[tuple[str, str], np.ndarray]:
        """Cells of each context and perturbation."""
        keys = pd.MultiIndex.from_arrays([self.contexts, list(map(str, self.perturbations))])
        return pd.Series(np.arange(len(keys)), keys).groupby(level=[0, 1]).indices


def halves(cells: Cells) -> dict[str, float]:
    """Half of the cells predicts what the other half measures: error over no change."""
    error = {"as measured": 0.0, "shrunk one by one": 0.0, "denoised": 0.0}
    size, all_genes, all_size = 0.0, {"like others": 0.0, "by themselves": 0.0}, 0.0
    for seed in range(SPLITS):
        rng = np.random.default_rng(seed)
        half = np.zeros(len(cells.contexts), bool)
        for members in cells.groups().values():
            half[rng.permutation(members)[::2]] = True
        one, other = cells.table(half), cells.table(~half)
        both = sorted(set(one.rows) & set(other.rows))
        one, other = (t.subset(np.array([t.rows.index(r) for r in both])) for t in (one, other))
        effect, noise, scored = one.effect[SCALE], one.noise(SCALE), ~one.targeted(range(len(both)))
        factor = np.maximum(1 - noise.sum(1) / (effect**2).sum(1), 0)[:, None]
        said = {
            "as measured": effect,
            "shrunk one by one": factor * effect,
            "denoised": denoise(one, SCALE).X[len(one.contexts) :],
        }
        truth = other.effect[SCALE], other.noise(SCALE), scored
        size += noise_corrected_error(0 * effect, *truth).sum()
        for name, predicted in said.items():
            error[name] += noise_corrected_error(predicted, *truth).sum()
        # Targeted genes count here; they are denoised like others, or by themselves.
        pairs, anchor = ([p for _, p in both], [c for c, _ in both]), EffectAnchor().fit(one)
        for name, own in (("like others", False), ("by themselves", True)):
            predicted = anchor.predict(*pairs, SCALE, own_genes=own).mean
            all_genes[name] += noise_corrected_error(predicted, *truth[:2]).sum()
        all_size += noise_corrected_error(0 * effect, *truth[:2]).sum()
    whole = {f"targeted genes {name}": e / all_size for name, e in all_genes.items()}
    return {name: e / size for name, e in error.items()} | whole


def doubles(cells: Cells, depth: int) -> dict[str, float]:
    """Norman's doubles of which both singles were measured, with few cells of each single."""
    groups = cells.groups()
    alone = {p for _, p in groups if "+" not in p}
    known = [k for k in groups if "+" in k[1] and set(k[1].split("+")) <= alone]
    error = {"additive": 0.0, "shrunken additive": 0.0, "anchor": 0.0}
    for seed in range(SPLITS):
        rng = np.random.default_rng(seed)
        train, test = (np.zeros(len(cells.contexts), bool) for _ in range(2))
        for key, members in groups.items():
            mine = rng.permutation(members)
            if key[1] == "control":
                train[mine[::2]] = test[mine[1::2]] = True
            elif key in known:
                test[mine] = True
            else:
                train[mine[:depth]] = True
        one, other = cells.table(train), cells.table(test)
        pairs = [p for _, p in other.rows], [c for c, _ in other.rows]
        said = {
            "additive": Additive().fit(one).predict(*pairs),
            "shrunken additive": ShrunkenAdditive().fit(one).predict(*pairs),
            "anchor": EffectAnchor().fit(one).predict(*pairs, SCALE).mean,
        }
        truth = other.effect[SCALE], other.noise(SCALE), ~other.targeted(range(len(other.rows)))
        for name, predicted in said.items():
            error[name] += noise_corrected_error(predicted, *truth).sum()
    return {name: e / error["additive"] for name, e in error.items()}


def main(data: Path) -> None:
    """Print both tables."""
    found = {}
    for name, (file, context_key) in FILES.items():
        found[name] = halves(Cells(ad.read_h5ad(data / file), context_key))
    found["simulated"] = halves(Cells(simulate(6_000, 500)))
    print(pd.DataFrame(found).T.round(3).to_markdown())
    norman = Cells(ad.read_h5ad(data / FILES["Norman"][0]))
    print(pd.DataFrame({n: doubles(norman, n) for n in DEPTHS}).T.round(3).to_markdown())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
