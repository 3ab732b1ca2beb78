"""What planning is worth, on simulated screens with known truth and on real cells: docs/planning.md.

python docs/planning.py DATA [choices | figure | selectivity | search | norman | papalexi | design | speed ...]
"""

import resource
import sys
import time
import warnings
from itertools import combinations
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from denoise import SCALE, Cells
from response import table_of

from gpjepa import planning
from gpjepa.datasets import simulate
from gpjepa.effects import Additive, EffectAnchor, EffectTable
from gpjepa.perturbations import Perturbation, TargetFeatures
from gpjepa.response import ResponsePredictor

SEEDS = (100, 101, 102)  # of no screen on which anything was chosen
N_TARGETS, N_GENES, N_GOALS, N_MEASURED = 45, 400, 20, 60


class Screen:
    """A simulated screen of which some pairs were measured, and the truth of all."""

    def __init__(self, seed: int, n_targets: int = N_TARGETS, n_contexts: int = 1) -> None:
        n_pairs = n_targets * (n_targets - 1) // 2
        n_cells = int((n_targets + n_pairs) * 43.5) * n_contexts
        self.cells = simulate(
            n_cells,
            N_GENES,
            n_targets=n_targets,
            n_combinations=n_pairs,
            n_contexts=n_contexts,
            seed=seed,
        )
        rows = self.cells.uns["simulation"]["rows"]
        effect = self.cells.uns["simulation"]["effect"][SCALE].astype(float)
        self.truth = {
            c: pd.DataFrame(effect[at], rows["perturbation"].iloc[at], self.cells.var_names)
            for c, at in rows.reset_index(drop=True).groupby("context").indices.items()
        }
        names = next(iter(self.truth.values())).index
        self.pairs = np.random.default_rng(seed).permutation([n for n in names if "+" in n])

    def table(self, pairs: list[str], context_key: str | None = None) -> EffectTable:
        """Effects of all singles and some pairs."""
        labels = self.cells.obs["perturbation"].astype(str)
        keep = (~labels.str.contains("+", regex=False) | labels.isin(pairs)).to_numpy()
        if context_key is None:
            return table_of(self.cells, keep)
        return Cells(self.cells, context_key).table(keep)


def distances(truth: pd.DataFrame, goal: pd.Series) -> np.ndarray:
    """True distance of each perturbation from a goal."""
    return np.sqrt(((truth - goal) ** 2).sum(1).to_numpy())


def choices() -> None:
    """Regret of what is chosen, and whether probabilities of success are what they say."""
    rows, calibration = [], []
    for seed in SEEDS:
        screen = Screen(seed)
        [truth] = screen.truth.values()
        table = screen.table(list(screen.pairs[:N_MEASURED]))
        model, simple = ResponsePredictor().fit(table), Additive().fit(table)
        measured = {str(p): e for (_, p), e in zip(table.rows, table.effect[SCALE], strict=True)}
        singles = [n for n in truth.index if "+" not in n]
        for i, name in enumerate(screen.pairs[N_MEASURED : N_MEASURED + N_GOALS]):
            goal = planning.TowardsEffect(truth.loc[name])
            far = pd.Series(distances(truth, truth.loc[name]), truth.index)
            none = np.sqrt((truth.loc[name] ** 2).sum())
            for among in ("with it", "without it"):
                names = [n for n in truth.index if among == "with it" or n != name]
                # All candidates are drawn for six goals; for choosing, none need be.
                drawn = len(names) if among == "with it" and i < 6 else 1
                ranking = planning.rank(model, goal, names, n_joint=drawn, n_draws=100)
                frame = ranking.frame.set_index("perturbation")
                first = frame["score"][[n for n in singles if n in names]].idxmax()
                near = {n: ((e - truth.loc[name]) ** 2).sum() for n, e in measured.items()}
                chosen = {
                    "rank()": ranking.best,
                    "rank(risk='expected')": str(frame["expected"].idxmax()),
                    "greedy": str(
                        frame["score"][[n for n in names if first in n.split("+")]].idxmax()
                    ),
                    "best single": first,
                    "nearest measured": min(near, key=near.get),
                    "additive": planning.rank(simple, goal, names, n_joint=1).best,
                }
                if among == "with it":  # all sets are its candidates
                    chosen["plan()"] = planning.plan(model, goal, 2, n_joint=1).best
                best = far[names].min()
                regret = {k: (far[c] - best) / (none - best) for k, c in chosen.items()}
                regret["random"] = float(((far[names] - best) / (none - best)).mean())
                rows += [(among, k, r, seed) for k, r in regret.items()]
                if drawn > 1:
                    true = 1 - (far[frame.index] / none) ** 2 >= 0.5
                    said = frame.assign(true=true, seed=seed, unmeasured=frame["regime"] != "seen")
                    calibration.append(said[["p_success", "true", "seed", "unmeasured"]])
    found = pd.DataFrame(rows, columns=["candidates", "chosen by", "regret", "screen"])
    found = found.groupby(["candidates", "chosen by"], sort=False)["regret"]
    print(found.agg(["median", "mean"]).round(3).unstack(0).to_markdown())
    said = pd.concat(calibration)
    for what, mine in (("all", said), ("not measured", said[said["unmeasured"]])):
        brier = ((mine["p_success"] - mine["true"]) ** 2).mean()
        rate = mine["true"].mean()
        print(f"\n{what}: Brier score {brier:.4f}, of the base rate {rate * (1 - rate):.4f}")
        bins = pd.cut(mine["p_success"], [-0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1])
        shown = mine.groupby(bins, observed=True).agg(
            said=("p_success", "mean"), true=("true", "mean"), n=("true", "size")
        )
        print(shown.round(3).to_markdown())


def figure() -> None:
    """A goal that was hidden from training, and the best candidates."""
    screen = Screen(SEEDS[0])
    [truth] = screen.truth.values()
    name = screen.pairs[N_MEASURED]
    model = ResponsePredictor().fit(screen.table(list(screen.pairs[:N_MEASURED])))
    drawn = planning.rank(model, planning.TowardsEffect(truth.loc[name])).plot(n=12)
    drawn.axes[0].set_title(f"wanted: the state of {name}, which was not measured", loc="left")
    drawn.savefig(Path(__file__).parent / "planning.png", dpi=150)


def selectivity() -> None:
    """Move one context and leave the other: true progress and true side effect."""
    rows = []
    for seed in SEEDS:
        screen = Screen(seed, n_targets=24, n_contexts=2)
        here, there = screen.truth.values()
        model = ResponsePredictor().fit(screen.table(list(screen.pairs[:40]), "context"))
        for name in screen.pairs[40 : 40 + N_GOALS]:
            goal, none = planning.TowardsEffect(here.loc[name]), (here.loc[name] ** 2).sum()
            size = np.sqrt(none / N_GENES)
            for weight in (0, 0.5, 1, 2):
                limits = planning.Constraints(unchanged_in=["context1"], weight=weight / size)
                best = planning.rank(
                    model, goal, context="context0", constraints=limits, n_joint=1
                ).best
                rows.append(
                    (
                        weight,
                        1 - ((here.loc[best] - here.loc[name]) ** 2).sum() / none,
                        np.sqrt((there.loc[best] ** 2).mean()) / size,
                    )
                )
    columns = ["weight", "true share of the way", "true side effect over size of the goal"]
    print(pd.DataFrame(rows, columns=columns).groupby("weight").mean().round(3).to_markdown())


def search() -> None:
    """Sets of up to three of 30 targets: the search against all sets, in the model's own score."""
    rows = []
    for seed in SEEDS:
        screen = Screen(seed, n_targets=30)
        [truth] = screen.truth.values()
        model = EffectAnchor().fit(screen.table(list(screen.pairs[:N_MEASURED])))
        targets = [n for n in truth.index if "+" not in n]
        sets = ["+".join(s) for k in (1, 2, 3) for s in combinations(targets, k)]
        rng = np.random.default_rng(seed)
        for _ in range(7):
            parts = [str(x) for x in rng.choice(targets, 3, replace=False)]
            goal = planning.TowardsEffect(truth.loc[parts].sum())
            every = planning.rank(model, goal, sets, n_joint=1).frame.set_index("perturbation")
            score, best = every["score"], every["score"].max()
            found = planning.plan(model, goal, 3, n_joint=1)
            random = score[rng.choice(len(score), found.n_evaluated, replace=False)].max()
            chosen: list[str] = []
            for _ in range(3):
                rest = [t for t in targets if t not in chosen]
                more = {"+".join(sorted([*chosen, t])): t for t in rest}
                top = score[list(more)].idxmax()
                if chosen and score[top] <= score["+".join(sorted(chosen))]:
                    break
                chosen.append(more[top])
            greedy = score["+".join(sorted(chosen))]
            mine = score["+".join(sorted(found.best.split("+")))]
            rows.append((found.n_evaluated, best - mine, best - greedy, best - random))
    table = pd.DataFrame(rows, columns=["sets looked at", "plan()", "greedy", "random"])
    exact = (table[["plan()", "greedy", "random"]] < 1e-6).mean()
    print(f"{len(sets)} sets; score short of the best of them; goals where it was found")
    print(pd.DataFrame({"mean": table.mean(), "found": exact}).round(4).to_markdown())


def split(cells: Cells, seed: int) -> np.ndarray:
    """Half of the cells of each perturbation."""
    rng, half = np.random.default_rng(seed), np.zeros(len(cells.contexts), bool)
    for members in cells.groups().values():
        half[rng.permutation(members)[::2]] = True
    return half


def norman(data: Path) -> None:
    """Real doubles as goals: place of the true one among all pairs and singles."""
    adata = ad.read_h5ad(data / "norman_2019_mini.h5ad")
    cells = Cells(adata)
    alone = {p for _, p in cells.groups() if "+" not in p and p != "control"}
    doubles = [p for _, p in cells.groups() if "+" in p and set(p.split("+")) <= alone]
    rows, nearest = [], []
    for seed in range(10):
        half = split(cells, seed)
        other = cells.table(~half)
        for double in doubles:
            mine = np.array([str(p) == double for p in cells.perturbations])
            train = cells.table(half & ~mine)
            effect = other.effect[SCALE][other.rows.index(("all", Perturbation.parse(double)))]
            goal = planning.TowardsEffect(pd.Series(effect, other.genes))
            pairs = ["+".join(sorted(p)) for p in combinations(sorted(alone), 2)]
            names = [*sorted(alone), *pairs]
            models = {
                "rank()": ResponsePredictor().fit(train),
                "anchor": EffectAnchor().fit(train),
                "additive": Additive().fit(train),
            }
            for name, model in models.items():
                frame = planning.rank(model, goal, names, n_joint=1).frame
                rows.append((name, 1 + list(frame["perturbation"]).index(double)))
            measured = {
                str(p): e for (_, p), e in zip(train.rows, train.effect[SCALE], strict=True)
            }
            near = min(measured, key=lambda p: ((measured[p] - effect) ** 2).sum())
            nearest.append(near in double.split("+"))
    table = pd.DataFrame(rows, columns=["by", "rank"])
    print(f"{len(doubles)} doubles, {len(names)} candidates, 10 splits of the cells")
    print(f"the nearest measured effect is that of one of its targets: {np.mean(nearest):.2f}")
    print(
        table.groupby("by", sort=False)["rank"]
        .agg(["median", "mean", "max"])
        .round(2)
        .to_markdown()
    )


def papalexi(data: Path) -> None:
    """Which of 25 targets made these held-out cells?"""
    adata = ad.read_h5ad(data / "papalexi_2021_mini.h5ad")
    cells = Cells(adata)
    sets = [
        data / "knowledge" / f"{n}.gmt" for n in ("hallmark", "reactome", "go_biological_process")
    ]
    features = TargetFeatures.from_gene_sets([str(s) for s in sets])
    rows, none = [], []
    for seed in range(5):
        half = split(cells, seed)
        rest, controls = (
            adata[~half],
            adata[half & (adata.obs["perturbation"] == "control").to_numpy()],
        )
        rest.obs["group"] = rest.obs["perturbation"].astype(str)
        perturbed = rest[(rest.obs["group"] != "control").to_numpy()]
        table = cells.table(half)
        whole = EffectAnchor().fit(table)
        names = [str(p) for p in table.perturbations]
        for n_cells in (10, 30, 100):
            few = _some(perturbed, n_cells, seed)
            known = {g: g for g in sorted(set(few.obs["group"]))}
            found = planning.reverse(_reading(whole, adata), few, "group", controls=controls)
            rows.append(
                (
                    "measured",
                    n_cells,
                    found.recall(known),
                    found.recall(known, 5),
                    found.ndcg(known),
                )
            )
        control = rest[(rest.obs["group"] == "control").to_numpy()].copy()
        control.obs["group"] = [f"c{i % 40}" for i in range(control.n_obs)]
        called = planning.reverse(
            _reading(whole, adata), control, "group", controls=controls
        ).groups
        none.append((called["called"] == "none of these").mean())
        for given, kinds in (
            ("never perturbed, no features", ()),
            ("never perturbed, gene sets", features),
        ):
            ranks = []
            for target in names:
                keep = np.array([str(p) != target for _, p in table.rows])
                model = EffectAnchor(kinds, "mean").fit(table.subset(keep))
                mine = perturbed[(perturbed.obs["group"] == target).to_numpy()]
                found = planning.reverse(
                    _reading(model, adata), mine, "group", names, controls=controls, n_null=1
                )
                ranks.append(found.ranks({target: target})[target])
            ranks = np.array(ranks)
            gain = (1 / np.log2(1 + ranks)).mean()
            rows.append((given, "all", (ranks == 1).mean(), (ranks <= 5).mean(), gain))
    columns = ["target", "cells", "recall@1", "recall@5", "nDCG"]
    found = pd.DataFrame(rows, columns=columns).groupby(columns[:2], sort=False).mean()
    print(found.round(3).to_markdown())
    print(f"held-out control cells answered by 'none of these': {np.mean(none):.3f}")


def _reading(model: EffectAnchor, adata: ad.AnnData) -> planning.OfPredictor:
    """With library sizes of the whole cell, where these are known."""
    key = "library_size" if "library_size" in adata.obs else None
    return planning.OfPredictor(model, library_size_key=key)


def _some(adata: ad.AnnData, n: int, seed: int) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    groups = adata.obs.groupby("group").indices
    chosen = [rng.choice(at, n, replace=False) for at in groups.values() if len(at) >= n]
    return adata[np.sort(np.concatenate(chosen))]


def design() -> None:
    """Pairs measured ten at a time: by design, and at random; error of those not measured."""
    rows = []
    for seed in range(200, 210):
        screen = Screen(seed, n_targets=24)
        [truth] = screen.truth.values()
        start = list(screen.pairs[:10])
        for how in ("design", "random"):
            known = list(start)
            for batch in range(6):
                model = EffectAnchor().fit(screen.table(known))
                rest = [p for p in screen.pairs if p not in known]
                wanted = [Perturbation.parse(p) for p in rest]
                said = model.predict(wanted, ["all"] * len(wanted), SCALE, own_genes=False).mean
                wrong = ((said - truth.loc[rest]) ** 2).to_numpy().sum()
                rows.append(
                    (seed, how, len(known), wrong / (truth.loc[rest] ** 2).to_numpy().sum())
                )
                if batch < 5:
                    rng = np.random.default_rng([seed, batch])
                    if how == "random":
                        known += [str(p) for p in rng.choice(rest, 10, replace=False)]
                    else:
                        chosen = planning.design(model, 10, rest, n_cells=40)
                        known += list(chosen.table()["perturbation"])
    table = pd.DataFrame(rows, columns=["seed", "how", "pairs measured", "error"])
    wide = table.pivot(index=["seed", "pairs measured"], columns="how", values="error")
    apart = (wide["design"] - wide["random"]).groupby(level=1)
    shown = wide.groupby(level=1).mean()
    shown["difference"] = apart.mean()
    shown["95%"] = 2.262 * apart.std() / np.sqrt(10)
    print(shown.round(4).to_markdown())


def speed() -> None:
    """All pairs of 5,000 targets."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(20, 5_000)) * (rng.random((20, 5_000)) < 0.2)
    effects = rng.normal(size=(5_000, 20)) @ shared * 0.05
    values = pd.DataFrame(effects + 0.05 * rng.normal(size=effects.shape), columns=_genes(5_000))
    names = [f"T{i:04d}" for i in range(5_000)]
    since = time.perf_counter()
    table = EffectTable.from_frame(
        values, names, sd=np.full(values.shape, 0.05), unit="log fold change"
    )
    model = EffectAnchor().fit(table)
    model.predict([Perturbation.of(["T0000"])], ["all"], table.scales[0])
    print(f"fit: {time.perf_counter() - since:.0f} s")
    goal = planning.TowardsEffect(pd.Series(effects[:2].sum(0), values.columns))
    since = time.perf_counter()
    ranking = planning.rank(model, goal)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{ranking.n_candidates:,} candidates: {time.perf_counter() - since:.0f} s, {memory:.1f} GB"
    )
    print(ranking.table(3).to_string())


def _genes(n: int) -> list[str]:
    return [f"G{i:05d}" for i in range(n)]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder, *wanted = sys.argv[1:]
    parts = {
        "choices": choices,
        "figure": figure,
        "selectivity": selectivity,
        "search": search,
        "norman": lambda: norman(Path(folder)),
        "papalexi": lambda: papalexi(Path(folder)),
        "design": design,
        "speed": speed,
    }
    for part in wanted or parts:
        since = time.perf_counter()
        print(f"\n## {part}\n", flush=True)
        parts[part]()
        print(f"\n({time.perf_counter() - since:.0f} s)", flush=True)
