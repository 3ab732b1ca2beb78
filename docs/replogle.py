"""Many targets in two lines, with and without knowledge of genes: docs/anchor.md.

python docs/replogle.py DATA

Real knock-downs (Replogle 2022, ranks): error over that of the line's mean effect, over all genes
and over the 1,000 that vary most between the targets of training.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import read_h5ad

from gpjepa.effects import EffectAnchor, EffectTable
from gpjepa.perturbations import Perturbation, TargetFeatures, human_genes

UNIT = "rank score"
VARIABLE = 1_000
Kinds = Sequence[TargetFeatures]


class Screen:
    """Profiles of the two lines, and how well some are predicted from others."""

    def __init__(self, data: Path) -> None:
        self.adata = read_h5ad(data / "replogle_2022_up_ranks.h5ad")
        self.values = self.adata.X.toarray()
        self.target, self.line = (
            self.adata.obs[key].astype(str).to_numpy() for key in ("perturbation", "context")
        )
        self.targets = np.array(sorted(set(self.target)))

    def errors(self, train: np.ndarray, test: np.ndarray, features: Kinds) -> pd.DataFrame:
        """Squared errors of the anchor and of the mean effect, by line, over all and some genes."""
        table = EffectTable.from_anndata(self.adata[train], "perturbation", "context", unit=UNIT)
        wanted = [Perturbation.of([t]) for t in self.target[test]]
        anchor = EffectAnchor(features, "mean").fit(table)
        predicted = anchor.predict(wanted, list(self.line[test]), UNIT).mean
        found = []
        for line in np.unique(self.line[test]):
            here = self.values[train & (self.line == line)]
            mine = self.line[test] == line
            truth, most = self.values[test][mine], np.argsort(-here.var(0))[:VARIABLE]
            for genes, which in (("all", slice(None)), (f"{VARIABLE} most variable", most)):
                anchored, mean = (
                    float((((said - truth) ** 2)[:, which]).sum())
                    for said in (predicted[mine], here.mean(0))
                )
                found.append((line, genes, anchored, mean))
        return pd.DataFrame(found, columns=["line", "genes", "anchor", "mean"])

    def folds(self, features: Kinds) -> pd.Series:
        """Five folds over the targets, each out of both lines at once."""
        order = np.random.default_rng(0).permutation(self.targets)
        outs = [np.isin(self.target, order[k::5]) for k in range(5)]
        return _relative([self.errors(~out, out, features) for out in outs])

    def few_shot(self, features: Kinds, known: int = 50) -> pd.Series:
        """All targets of one line, and a few of the other; five draws for each line."""
        found = []
        for seed in range(5):
            some = np.random.default_rng(seed).permutation(self.targets)[:known]
            for line in np.unique(self.line):
                out = (self.line == line) & ~np.isin(self.target, some)
                found.append(self.errors(~out, out, features))
        return _relative(found)


def _relative(parts: list[pd.DataFrame]) -> pd.Series:
    total = pd.concat(parts).groupby(["line", "genes"])[["anchor", "mean"]].sum()
    return total["anchor"] / total["mean"]


if __name__ == "__main__":
    screen = Screen(Path(sys.argv[1]))
    shuffled = [f.permuted(0) for f in human_genes()]
    found = {
        "never perturbed, human genes": screen.folds(human_genes()),
        "never perturbed, human genes shuffled": screen.folds(shuffled),
        "never perturbed, nothing": screen.folds(()),
        "50 known here, 400 in the other line, human genes": screen.few_shot(human_genes()),
        "50 known here, 400 in the other line, nothing": screen.few_shot(()),
    }
    print(pd.DataFrame(found).T.round(3).to_markdown())
