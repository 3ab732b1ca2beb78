"""What the networks add to the anchor, on simulated screens and on Norman's doubles: docs/response.md.

python docs/response.py DATA
"""

import sys
import warnings
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from gpjepa.datasets import simulate
from gpjepa.effects import (
    Additive,
    EffectTable,
    ShrunkenAdditive,
    effect_table,
    noise_corrected_error,
)
from gpjepa.perturbations import LabelReader, Perturbation
from gpjepa.response import ResponsePredictor, load_network

ON = "mean_log1p"
SEEDS = range(100, 108)  # of no screen on which anything was chosen
CELLS = (2_000, 3_000, 4_000, 5_000, 6_000, 8_000, 10_000, 12_000)
FOLDS = {"doubles": 6, "targets": 3}
SPLITS = 20
GATES = {"anchor": 0, "auto": "auto", "gate 1": 1}


def table_of(adata: ad.AnnData, keep: np.ndarray | None = None) -> EffectTable:
    """Effects of some cells, in one context."""
    read = LabelReader().read
    labels = adata.obs["perturbation"].astype(str)
    known = {label: read(label) for label in labels.unique()}
    library = adata.obs.get("library_size", np.asarray(adata.X.sum(1)).ravel())
    keep = np.ones(adata.n_obs, bool) if keep is None else keep
    perturbations, context = [known[label] for label in labels], ["all"] * adata.n_obs
    genes = adata.var_names
    return effect_table(adata.X, np.asarray(library, float), perturbations, context, genes, keep)


class Errors:
    """Squared errors of methods, summed over rows, by row of a table of the docs."""

    def __init__(self) -> None:
        self._rows: list[dict] = []

    def add(self, what: str, screen: int, of: dict[str, np.ndarray], nothing: np.ndarray) -> None:
        """Errors of some perturbations, and of no change."""
        summed = {name: float(np.sum(e)) for name, e in of.items()}
        self._rows.append({"what": what, "screen": screen, "n": float(nothing.sum()), **summed})

    def table(self) -> pd.DataFrame:
        """Errors over no change, pooled, and the share of screens made worse by more than 1%."""
        found = pd.DataFrame(self._rows).groupby(["what", "screen"], sort=False).sum()
        pooled = found.groupby(level=0, sort=False).sum()
        worse = (found["auto"] > 1.01 * found["anchor"]).groupby(level=0, sort=False).mean()
        return pooled.drop(columns="n").div(pooled["n"], axis=0).assign(worse=worse).round(3)


def predictions(train: EffectTable, wanted: list[Perturbation]) -> dict[str, np.ndarray]:
    """Of the anchor, of both gates, and of simple baselines."""
    predictor, contexts = ResponsePredictor().fit(train), ["all"] * len(wanted)
    said = {name: predictor.predict(wanted, contexts, ON, g).mean for name, g in GATES.items()}
    for name, simple in (("shrunken additive", ShrunkenAdditive()), ("additive", Additive())):
        said[name] = simple.fit(train).predict(wanted, contexts)
    return said


def of_simulated() -> pd.DataFrame:
    """Doubles of simulated screens, and of screens where nothing happens; against the truth."""
    errors = Errors()
    for seed, n_cells in zip(SEEDS, CELLS, strict=True):
        for null in (False, True):
            adata = simulate(n_cells, 600, seed=seed)
            if null:  # labels dealt out anew: no perturbation does anything
                labels = adata.obs["perturbation"].to_numpy()
                adata.obs["perturbation"] = np.random.default_rng(seed).permutation(labels)
            _of_screen(errors, seed, adata, null)
    return errors.table()


def of_parts() -> pd.DataFrame:
    """What training across screens, and on the screen, buys: on some of the simulated screens."""
    errors = Errors()
    for seed, n_cells in list(zip(SEEDS, CELLS, strict=True))[::4]:
        adata = simulate(n_cells, 600, seed=seed)
        table, truth = table_of(adata), adata.uns["simulation"]
        effect = dict(zip(truth["rows"]["perturbation"], truth["effect"][ON], strict=True))
        rows = [p for _, p in table.rows]
        several = np.flatnonzero([len(p.targets) > 1 for p in rows])
        fold = np.random.default_rng(seed).permutation(len(several)) % FOLDS["doubles"]
        for k in range(FOLDS["doubles"]):
            out = several[fold == k]
            train = table.subset(np.setdiff1d(np.arange(len(rows)), out))
            wanted, scored = [rows[i] for i in out], ~table.targeted(out)
            true = np.stack([effect[str(p)] for p in wanted]) * scored
            for what, network in (
                ("across screens, then on the screen", "pretrained"),
                ("across screens", load_network()),
                ("on the screen", "scratch"),
            ):
                predictor, contexts = (
                    ResponsePredictor(network=network).fit(train),
                    ["all"] * len(out),
                )
                said = {
                    n: predictor.predict(wanted, contexts, ON, g).mean for n, g in GATES.items()
                }
                of = {n: ((v * scored - true) ** 2).sum(1) for n, v in said.items()}
                errors.add(f"trained {what}", seed, of, (true**2).sum(1))
    return errors.table()


def _of_screen(errors: Errors, seed: int, adata: ad.AnnData, null: bool) -> None:
    table, truth = table_of(adata), adata.uns["simulation"]
    effect = dict(zip(truth["rows"]["perturbation"], truth["effect"][ON], strict=True))
    rows = [p for _, p in table.rows]
    true = np.stack([effect[str(p)] for p in rows])
    several = np.array([len(p.targets) > 1 for p in rows])

    def judge(what: str, out: np.ndarray, hidden: np.ndarray) -> None:
        wanted = [p for p, o in zip(rows, out, strict=True) if o]
        said = predictions(table.subset(~hidden), wanted)
        scored = ~table.targeted(np.flatnonzero(out))
        if null:  # there is nothing to be right about: in units of the noise
            nothing = (table.noise(ON)[out] * scored).sum(1)
            of = {k: ((v**2) * scored).sum(1) for k, v in said.items()}
        else:
            nothing = (true[out] ** 2 * scored).sum(1)
            of = {k: ((v - true[out]) ** 2 * scored).sum(1) for k, v in said.items()}
        errors.add(f"{what}, nothing there" if null else what, seed, of, nothing)

    rng = np.random.default_rng(seed)
    fold = np.where(several, rng.permutation(len(rows)) % FOLDS["doubles"], -1)
    for k in range(2 if null else FOLDS["doubles"]):
        judge("doubles", fold == k, fold == k)
    judge("doubles, none measured (prior)", several, several)
    targets = rng.permutation(sorted({p.targets[0] for p in rows if len(p.targets) == 1}))
    for k in range(FOLDS["targets"]):
        away = set(targets[k :: FOLDS["targets"]])
        hidden = np.array([not away.isdisjoint(p.targets) for p in rows])
        judge("doubles of targets never perturbed", hidden & several, hidden)


def of_norman(data: Path) -> pd.DataFrame:
    """Norman's doubles, each split of the controls on its own; errors without the noise."""
    adata = ad.read_h5ad(data / "norman_2019_mini.h5ad")
    spelt = {x: str(Perturbation.parse(x)) for x in adata.obs["perturbation"].unique()}
    labels = adata.obs["perturbation"].map(spelt).astype(str).to_numpy()
    alone = {x for x in labels if "+" not in x}
    doubles = sorted({x for x in labels if "+" in x})
    both = [x for x in doubles if set(x.split("+")) <= alone]
    errors = Errors()
    for split in range(SPLITS):
        rng = np.random.default_rng(split)
        controls = rng.permutation(np.flatnonzero(labels == "control"))
        train = np.ones(len(labels), bool)
        train[controls[1::2]] = False
        test = np.isin(labels, doubles)
        test[controls[1::2]] = True
        one, other = table_of(adata, train), table_of(adata, test)
        asked = [("five doubles, both targets measured (prior)", both, both)]
        asked += [("the same, no double measured (prior)", both, doubles)]
        asked += [("all fifteen doubles", doubles[k::5], doubles[k::5]) for k in range(5)]
        for what, out, hidden in asked:
            kept = np.array([str(p) not in hidden for _, p in one.rows])
            said = predictions(one.subset(kept), [Perturbation.parse(x) for x in out])
            there = {str(p): i for i, (_, p) in enumerate(other.rows)}
            at = [there[x] for x in out]
            truth = other.effect[ON][at], other.noise(ON)[at], ~other.targeted(at)
            of = {k: noise_corrected_error(v, *truth) for k, v in said.items()}
            errors.add(what, split, of, noise_corrected_error(0 * truth[0], *truth))
    return errors.table()


def draw(found: pd.DataFrame, path: Path) -> None:
    """Errors of the methods, a line for each kind of pairs."""
    shown = {"shrunken additive": "lightgrey", "anchor": "0.5", "auto": "C0"}
    rows = found.index[::-1]
    fig, ax = plt.subplots(figsize=(8, 1 + 0.4 * len(rows)), layout="constrained")
    ax.hlines(range(len(rows)), 0, 1, color="0.93", zorder=0)
    for name, color in shown.items():
        label = "predictor" if name == "auto" else name
        ax.scatter(found.loc[rows, name], range(len(rows)), s=60, color=color, label=label)
    ax.set(yticks=range(len(rows)), yticklabels=rows, xlim=(0, 1))
    ax.set_xlabel("squared error, relative to predicting no change")
    fig.legend(frameon=False, loc="outside upper right", ncols=len(shown))
    ax.spines[["top", "right", "left"]].set_visible(False)
    fig.savefig(path, dpi=150)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    simulated, norman = of_simulated(), of_norman(Path(sys.argv[1]))
    print(simulated.to_markdown())
    print(norman.to_markdown())
    print(of_parts().to_markdown())
    there = simulated[~simulated.index.str.contains("nothing there")]
    named = [there.rename("simulated: {}".format), norman.rename("Norman: {}".format)]
    draw(pd.concat(named), Path(__file__).with_suffix(".png"))
