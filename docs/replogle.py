"""Many targets in two lines, with and without knowledge of genes: docs/target-features.md.

python docs/replogle.py DATA

Real knock-downs (Replogle 2022, ranks): error over that of the line's mean effect, over all genes
and over the 1,000 that vary most between the targets of training; of the anchor, and of the response
predictor, which adds networks to it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import read_h5ad

from gpjepa.effects import EffectTable
from gpjepa.perturbations import Perturbation, TargetFeatures, human_genes
from gpjepa.response import ResponsePredictor

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
        """Squared errors of anchor, response and mean effect, by target and line."""
        table = EffectTable.from_anndata(self.adata[train], "perturbation", "context", unit=UNIT)
        wanted = [Perturbation.of([t]) for t in self.target[test]]
        predictor = ResponsePredictor(features, missing_features="mean").fit(table)
        found = predictor.predict(wanted, list(self.line[test]), UNIT)
        parts = []
        for line in np.unique(self.line[test]):
            here = self.values[train & (self.line == line)]
            mine = self.line[test] == line
            truth, most = self.values[test][mine], np.argsort(-here.var(0))[:VARIABLE]
            targets = self.target[test][mine]
            said = {
                "anchor": found.anchor[mine],
                "response": found.mean[mine],
                "mean": np.broadcast_to(here.mean(0), truth.shape),
            }
            for genes, which in (("all", slice(None)), (f"{VARIABLE} most variable", most)):
                of = {k: ((v - truth) ** 2)[:, which].sum(1) for k, v in said.items()}
                parts.append(pd.DataFrame({"line": line, "genes": genes, "target": targets, **of}))
        return pd.concat(parts)

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
    """Errors over that of the mean effect, and what the networks gain with its 95% interval."""
    every = pd.concat(parts)
    total = every.groupby(["line", "genes"])[["anchor", "response", "mean"]].sum()
    found = total[["anchor", "response"]].div(total["mean"], axis=0).stack()
    for genes, of in every.groupby("genes"):
        gain = (of["anchor"] - of["response"]).groupby(of["target"]).mean() / of["mean"].mean()
        half = 1.96 * gain.std() / np.sqrt(len(gain))
        found["both", genes, "gain"] = f"{gain.mean():.4f} ± {half:.4f}"
    return found


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
    print(pd.DataFrame(found).T.to_markdown(floatfmt=".3f"))
